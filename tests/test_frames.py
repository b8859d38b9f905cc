"""Pictures of other libraries, told apart by what they say of themselves: no library is imported."""

from __future__ import annotations

import ctypes
import gc
import weakref
from typing import Any

import numpy as np
import pytest

from diffusionact.errors import MediaError
from diffusionact.runtime import cuda, frames
from diffusionact.runtime.frames import device_view, host_array, lies_on_device, picture
from tests.recording_device import RecordingDevice

H, W = 6, 5
ANY = (None, None, 3)


def image(seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (H, W, 3), np.uint8)


class Interface:
    """As pycuda's and Numba's arrays."""

    def __init__(self, array: Any, **changes: Any) -> None:
        self.array = array
        self.__cuda_array_interface__ = {
            "shape": array.shape,
            "typestr": array.dtype.str,
            "data": (array.ctypes.data, False),
            "version": 3,
            **changes,
        }


class Dlpack:
    """As CuPy's and PyTorch's arrays: NumPy's own capsule, the kind of memory changed to CUDA."""

    def __init__(self, array: Any, kind: int = frames.CUDA) -> None:
        self.array = array
        self.kind = kind
        self.streams: list[Any] = []

    def __dlpack_device__(self) -> tuple[int, int]:
        return self.kind, 0

    def __dlpack__(self, **how: Any) -> Any:
        self.streams.append(how.get("stream"))
        return self.array.__dlpack__()


class Both(Interface, Dlpack):
    def __init__(self, array: Any) -> None:
        Interface.__init__(self, array)
        Dlpack.__init__(self, array)


class OnHost(RecordingDevice):
    """A device whose memory is the host's, so that a view can be looked into."""

    def download(self, target: Any, source: Any) -> None:
        ctypes.memmove(target.ctypes.data, source.ptr, source.nbytes)


@pytest.fixture
def device() -> OnHost:
    return OnHost()


@pytest.mark.parametrize("kind", [Interface, Dlpack, Both])
def test_a_frame_of_the_device_is_taken_where_it_lies(kind: Any, device: OnHost) -> None:
    array = image()
    taken = device_view(kind(array), device, "frame", ANY)
    assert taken.ptr == array.ctypes.data and taken.nbytes == array.nbytes
    assert (taken.shape, taken.dtype) == (array.shape, array.dtype)
    assert taken.__cuda_array_interface__["data"] == (array.ctypes.data, False)
    assert taken.first(2).shape == (2, W, 3)
    assert lies_on_device(kind(array)) and not lies_on_device(array)


def test_dlpack_is_asked_for_our_stream_and_preferred(device: OnHost) -> None:
    frame = Both(image())
    device_view(frame, device, "frame", ANY)
    assert frame.streams == [device.stream]


@pytest.mark.parametrize("stream", [None, 1, 2, 0xABC])
def test_the_makers_stream_is_waited_for(stream: Any, device: OnHost) -> None:
    device_view(Interface(image(), stream=stream), device, "frame", ANY)
    assert device.launched == ([] if stream is None else [("wait", stream)])


@pytest.mark.parametrize("kind", [Interface, Dlpack])
def test_the_owner_lives_as_long_as_the_view(kind: Any, device: OnHost) -> None:
    frame = kind(image())
    seen = weakref.ref(frame)
    taken = device_view(frame, device, "frame", ANY)
    part = taken.first(1)
    del frame, taken
    gc.collect()
    assert seen() is not None
    del part
    gc.collect()
    assert seen() is None


def test_dlpacks_memory_is_given_back_once(device: OnHost) -> None:
    array = image()
    base = weakref.ref(array)
    frame = Dlpack(array)
    del array
    for _ in range(3):
        device_view(frame, device, "frame", ANY)
    del frame
    gc.collect()
    assert base() is None, "a capsule still holds it"


@pytest.mark.parametrize("kind", [Interface, Dlpack])
def test_c_order_without_gaps_is_wanted(kind: Any, device: OnHost) -> None:
    wide = np.zeros((H, W * 2, 3), np.uint8)
    for crooked in (wide[:, :W], wide[:, ::2], image().transpose(1, 0, 2), image()[..., ::-1]):
        changes = {"strides": crooked.strides} if kind is Interface else {}
        with pytest.raises(MediaError, match="frame: strides .*; wanted C order"):
            device_view(kind(crooked, **changes), device, "frame", ANY)
    told = {"strides": image().strides} if kind is Interface else {}
    device_view(kind(image(), **told), device, "frame", ANY)
    flat = image()[:1]  # of an axis of one element no stride matters
    told = {"strides": (7, 3, 1)} if kind is Interface else {}
    device_view(kind(flat, **told), device, "frame", ANY)


@pytest.mark.parametrize("kind", [Interface, Dlpack])
@pytest.mark.parametrize(
    ("array", "seen"),
    [
        (np.zeros((3, H, W), np.uint8), r"uint8 \[3, 6, 5\]"),
        (np.zeros((H, W, 4), np.uint8), r"uint8 \[6, 5, 4\]"),
        (np.zeros((H, W, 3), np.float32), r"float32 \[6, 5, 3\]"),
        (np.zeros((0, W, 3), np.uint8), r"uint8 \[0, 5, 3\]"),
        (np.zeros((H, W), np.uint8), r"uint8 \[6, 5\]"),
    ],
)
def test_another_shape_or_type_is_named(kind: Any, array: Any, seen: str, device: OnHost) -> None:
    with pytest.raises(MediaError, match=rf"portrait: {seen}; wanted uint8 \[any,any,3\]"):
        device_view(kind(array), device, "portrait", ANY)


def test_a_fixed_shape_is_held_to(device: OnHost) -> None:
    x_T = np.zeros((1, 3, 8, 8), np.float32)
    assert device_view(Dlpack(x_T), device, "x_T", x_T.shape, "float32").shape == x_T.shape
    with pytest.raises(MediaError, match=r"wanted float32 \[1,3,9,9\]"):
        device_view(Dlpack(x_T), device, "x_T", (1, 3, 9, 9), "float32")


def test_what_is_no_array_is_told_what_is_wanted(device: OnHost) -> None:
    for wrong in ("a path", [[1, 2]], 3):
        with pytest.raises(
            MediaError, match="frame: not an array but .* Wanted a NumPy array, or an array"
        ):
            host_array(wrong, "frame")
        with pytest.raises(MediaError, match="in a GPU's memory"):
            device_view(wrong, device, "frame", ANY)
    with pytest.raises(MediaError, match="masked"):
        device_view(Interface(image(), mask=image()), device, "frame", ANY)
    with pytest.raises(MediaError, match="DLPack type"):
        device_view(Dlpack(np.zeros((H, W, 3), bool)), device, "frame", ANY)


def test_a_library_that_refuses_is_quoted(device: OnHost) -> None:
    class Refuses(Dlpack):
        def __dlpack__(self, **how: Any) -> Any:
            raise BufferError("it requires a gradient")

    for taken in (
        lambda: device_view(Refuses(image()), device, "frame", ANY),
        lambda: host_array(Refuses(image(), frames.CPU), "frame"),
    ):
        with pytest.raises(MediaError, match="does not hand over its memory: it requires a gradi"):
            taken()


def test_frames_of_the_host_are_the_same_memory() -> None:
    class Host(Dlpack):
        def __dlpack__(self, **how: Any) -> Any:
            return self.array.__dlpack__(max_version=how.get("max_version"))

    array = image()
    seen = picture(Host(array, frames.CPU), "frame")
    assert seen.ctypes.data == array.ctypes.data
    np.testing.assert_array_equal(seen, array)
    assert picture(array, "frame") is array


@pytest.mark.torch
def test_a_tensor_of_the_host_is_the_same_memory() -> None:
    import torch

    tensor = torch.arange(H * W * 3, dtype=torch.uint8).reshape(H, W, 3)
    seen = picture(tensor, "frame")
    assert seen.ctypes.data == tensor.data_ptr()
    with pytest.raises(MediaError, match="does not hand over"):
        picture(torch.zeros(2, 2, requires_grad=True), "frame")


def test_a_frame_of_the_device_is_copied_once_for_the_cpu(device: OnHost) -> None:
    array = image(4)
    np.testing.assert_array_equal(picture(Dlpack(array), "frame", device), array)
    with pytest.raises(MediaError, match="wanted uint8"):
        picture(Dlpack(np.zeros((3, 4, 4), np.uint8)), "frame", device)


def test_without_a_device_the_first_gpu_copies(
    device: OnHost, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(cuda, "first_device", lambda: device)
    np.testing.assert_array_equal(picture(Interface(image(5)), "frame"), image(5))
