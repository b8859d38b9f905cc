"""cuda.py and the loop on it, on a GPU: the real one, or `cuda_double`, which test_cuda.py runs it on.

The networks are toys of our own kernels, so that loop, kernels and graphs are proven without any
other library, and to the last bit.
"""

from __future__ import annotations

import gc
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusionact import schedule
from diffusionact.errors import DeviceError
from diffusionact.image import to_tensor, to_uint8
from diffusionact.manifest import TensorSpec
from diffusionact.runtime import cuda, device, frames, kernel_code
from diffusionact.runtime.component import check_bound
from diffusionact.runtime.device_run import DevicePass
from diffusionact.runtime.graph import GraphLoop
from diffusionact.runtime.loop import Loop, Pass
from tests.recording_device import TWINS

pytestmark = pytest.mark.gpu
FOLDER = Path(__file__).parent / "cuda_double"
SIDE, Z, K = 24, 16, 5
PICTURE = (1, 3, SIDE, SIDE)
REPLAYS = 1000


@pytest.fixture(scope="module")
def gpu() -> cuda.Device:
    if reason := cuda.why_not():
        pytest.skip(reason)
    return cuda.Device()


@pytest.fixture(autouse=True)
def toy_kernels(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    for name in ("toy_encode", "toy_modulate", "toy_step"):
        monkeypatch.setitem(device.KERNELS, name, "toy")  # type: ignore[arg-type]
    images = kernel_code.kernel_image

    def with_toys(file: str, target: str) -> Iterator[bytes]:
        with monkeypatch.context() as patch:
            if file == "toy":
                patch.setattr(kernel_code, "FOLDER", FOLDER)
            yield from images(file, target)

    monkeypatch.setattr(cuda, "kernel_image", with_toys)
    yield


def spec(name: str, *shape: int) -> TensorSpec:
    return TensorSpec(name, "float32", shape)


def by_name(*specs: TensorSpec) -> dict[str, TensorSpec]:
    return {each.name: each for each in specs}


class Toy:
    """A network: on a GPU its kernel, else the same in NumPy, rounded alike."""

    def __init__(self, kind: str, gpu: cuda.Device | None, steps: int = 0) -> None:
        scale, shift = ((spec(name, steps or 1, K)) for name in ("scale", "shift"))
        x = spec("x_t", *PICTURE)
        self.inputs, self.outputs = {
            "encode": (by_name(spec("image", *PICTURE), spec("condition", *PICTURE)),
                       by_name(spec("z", 1, Z))),
            "modulate": (by_name(spec("z", 1, Z), spec("time_rows", steps, 2 * K)),
                         by_name(scale, shift)),
            "step": (by_name(x, scale, shift), by_name(spec("prediction", *PICTURE))),
        }[kind]  # fmt: skip
        self._kind = kind
        self._gpu = gpu

    def bind(self, **arrays: Any) -> None:
        specs = {**self.inputs, **self.outputs}
        check_bound(specs, arrays, "cuda" if self._gpu else "cpu")
        self._arrays = [arrays[name] for name in specs]
        if self._gpu:
            more = {"encode": (), "modulate": (K, Z), "step": (K,)}[self._kind]
            count = {"encode": Z, "step": 3 * SIDE * SIDE}.get(self._kind)
            count = count or int(np.prod(arrays["scale"].shape))
            name = f"toy_{self._kind}"
            self.run = self._gpu.kernel(name, count, *self._arrays, *more)

    def run(self) -> None:
        a, b, c, d = (*self._arrays, None)[:4]
        if self._kind == "encode":
            c[0] = a.reshape(-1)[:Z] * np.float32(0.5) + b.reshape(-1)[:Z]
        elif self._kind == "modulate":
            z = np.resize(a[0], c.shape)
            c[...], d[...] = b[:, :K] * z, b[:, K:] + z
        else:
            flat = a.reshape(-1)
            moved = flat * np.resize(b[0], flat.shape) + np.resize(c[0], flat.shape)
            d[...] = moved.reshape(PICTURE)


def noise(seed: int, *shape: int) -> Any:
    return np.random.default_rng(seed).standard_normal(shape or PICTURE).astype(np.float32)


def drawing(seed: int) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def runs() -> list[schedule.Run]:
    table = schedule.alpha_bars()
    down = [schedule.render_run("v", schedule.timesteps(n), table) for n in (4, 10)]
    return [*down, schedule.inversion_run("v", schedule.timesteps(5), table)]


def passes(gpu: cuda.Device | None) -> list[Any]:
    step = Toy("step", gpu)
    made: list[Any] = []
    for seed, run in enumerate(runs()):
        rows = noise(seed, len(run.steps), 2 * K)
        modulation = Toy("modulate", gpu, len(run.steps))
        if gpu is None:
            made.append(Pass(run, rows, modulation, step))
            continue
        there = gpu.empty(rows.shape, "float32")
        gpu.upload(there, rows)
        made.append(DevicePass(run, there, modulation, step))
    return made


def graph_loop(gpu: cuda.Device, mode: Any) -> GraphLoop:
    render, other, invert = passes(gpu)
    return GraphLoop(gpu, Toy("encode", gpu), render, invert, [other], mode)


@pytest.fixture
def reference() -> Loop:
    render, other, invert = passes(None)
    return Loop(Toy("encode", None), render, invert, [other])


def test_memory_goes_there_and_back(gpu: cuda.Device) -> None:
    sent, seen = noise(1, 7, 9), gpu.pinned((7, 9), "float32")
    assert not seen.any() and seen.ctypes.data % 64 == 0
    first, second = gpu.empty((7, 9), "float32"), gpu.empty((7, 9), "float32")
    assert first.ptr % 256 == 0 and first.nbytes == sent.nbytes
    interface = first.__cuda_array_interface__
    assert interface["data"] == (first.ptr, False) and interface["shape"] == (7, 9)
    gpu.upload(first, sent)
    gpu.copy(second, first)
    gpu.download(seen, second)
    gpu.synchronize()
    np.testing.assert_array_equal(seen, sent)
    rows = gpu.pinned((2, 9), "float32")
    gpu.download(rows, second.first(2))
    gpu.synchronize()
    np.testing.assert_array_equal(rows, sent[:2])


def test_what_is_too_large_says_how_much_is_free(gpu: cuda.Device) -> None:
    with pytest.raises(
        DeviceError, match=r"MiB of GPU memory wanted, \d+ of \d+ MiB free: .*OUT_OF"
    ):
        gpu.empty((1 << 50,), "uint8")
    gpu.empty((8,), "uint8")  # and goes on working


def test_a_view_keeps_the_memory_and_the_last_user_frees_it(gpu: cuda.Device) -> None:
    gpu.synchronize()
    before = cuda.free_bytes()
    whole = gpu.empty((64 << 20,), "uint8")
    part = whole.first(10)
    assert cuda.free_bytes() <= before - (60 << 20)
    del whole
    gc.collect()
    assert cuda.free_bytes() <= before - (60 << 20)
    del part
    gc.collect()
    assert cuda.free_bytes() >= before - (4 << 20)


def test_memory_is_freed_from_another_thread(gpu: cuda.Device) -> None:
    gpu.synchronize()
    before = cuda.free_bytes()
    held = [gpu.empty((64 << 20,), "uint8")]
    other = threading.Thread(target=held.clear)
    other.start()
    other.join()
    gc.collect()
    assert cuda.free_bytes() >= before - (4 << 20)


def test_another_thread_works_after_it_is_activated(gpu: cuda.Device) -> None:
    seen: list[Any] = []

    def work() -> None:
        gpu.activate()
        there, here = gpu.empty((3,), "int32"), np.zeros(3, np.int32)
        gpu.upload(there, np.arange(3, dtype=np.int32))
        gpu.download(here, there)
        gpu.synchronize()
        seen.append(here)

    other = threading.Thread(target=work)
    other.start()
    other.join()
    np.testing.assert_array_equal(seen[0], [0, 1, 2])


def test_events_measure_and_wait(gpu: cuda.Device) -> None:
    start, end = gpu.event(), gpu.event()
    start.wait()  # one that was never recorded has passed
    counter = gpu.empty((1,), "int32")
    seen = gpu.pinned((1,), "int32")
    gpu.upload(counter, np.zeros(1, np.int32))
    next_step = gpu.kernel("next_step", 1, counter)
    start.record()
    for _ in range(100):
        next_step()
    gpu.download(seen, counter)
    end.record()
    end.wait()
    assert seen[0] == 100 and end.ms_since(start) > 0  # type: ignore[arg-type]


def test_every_kernel_is_its_twin(gpu: cuda.Device) -> None:
    side, width = 33, 300  # no multiple of a block
    run = runs()[0]
    table = np.array([s[1:] for s in run.steps], np.float32)
    shapes: dict[str, tuple[int, list[Any]]] = {
        "pack": (side * side, [np.random.default_rng(1).integers(0, 256, (side, side, 3), np.uint8),
                               noise(2, 1, 3, side, side)]),
        "unpack": (side * side, [noise(3, 1, 3, side, side), np.zeros((side, side, 3), np.uint8)]),
        "ddim_step": (1000, [noise(4, 1000), noise(5, 1000), table, np.array([2], np.int32)]),
        "start": (1000, [noise(6, 1000), noise(7, 1000), np.array([9], np.int32)]),
        "take_row": (width, [noise(8, 4, width), noise(9, 4, width),
                             np.array([2, 0, 3, 1], np.int32), np.array([1], np.int32),
                             noise(10, 1, width), noise(11, 1, width)]),
        "next_step": (1, [np.array([4], np.int32)]),
    }  # fmt: skip
    assert set(shapes) == set(TWINS)
    for name, (count, hosts) in shapes.items():
        there = [gpu.empty(host.shape, host.dtype.name) for host in hosts]
        for array, host in zip(there, hosts, strict=True):
            gpu.upload(array, host)
        gpu.kernel(name, count, *there)()
        TWINS[name](count, *hosts)
        for array, host in zip(there, hosts, strict=True):
            seen = np.zeros_like(host)
            gpu.download(seen, array)
            gpu.synchronize()
            np.testing.assert_array_equal(seen, host, err_msg=name)


def test_what_cannot_be_recorded_leaves_the_stream_working(gpu: cuda.Device) -> None:
    counter = gpu.empty((1,), "int32")
    gpu.upload(counter, np.zeros(1, np.int32))
    next_step = gpu.kernel("next_step", 1, counter)

    def waits() -> None:
        next_step()
        gpu.synchronize()

    def breaks() -> None:
        next_step()
        raise RuntimeError("of another library")

    for work, why in ((waits, "CAPTURE"), (breaks, "of another library")):
        with pytest.raises(DeviceError, match=why):
            gpu.capture(work)
        assert gc.isenabled()
    graph = gpu.capture(next_step)
    seen = np.zeros(1, np.int32)
    for _ in range(3):
        graph.launch()
    gpu.download(seen, counter)
    gpu.synchronize()
    assert seen[0] == 3, "nothing of what was recorded has been done"


def test_a_recording_that_cannot_begin_changes_nothing(
    gpu: cuda.Device, monkeypatch: pytest.MonkeyPatch
) -> None:
    driver = gpu._driver

    class Busy:
        """The driver, where another library records on the stream."""

        def __getattr__(self, name: str) -> Any:
            return getattr(driver, name)

        def cuStreamBeginCapture(self, stream: int, mode: Any) -> Any:  # noqa: N802
            return (driver.CUresult.CUDA_ERROR_ILLEGAL_STATE,)

    monkeypatch.setattr(gpu, "_driver", Busy())
    with pytest.raises(DeviceError, match="ILLEGAL_STATE"):
        gpu.capture(lambda: pytest.fail("it has not begun"))
    assert gc.isenabled()


def test_a_damaged_cache_is_compiled_again(gpu: cuda.Device) -> None:
    source = (kernel_code.FOLDER / "steps.cu").read_bytes()
    path = kernel_code.cached_path("steps", source, gpu.gpu.target)
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"half a fi")
    again = cuda.Device()
    counter = again.empty((1,), "int32")
    again.kernel("next_step", 1, counter)()
    again.synchronize()
    assert path.stat().st_size > 1000, "and the file is whole again"


@pytest.mark.parametrize("mode", ["step", "turbo", "eager", None])
def test_the_loop_is_the_numpy_loop_to_the_bit(
    mode: Any, gpu: cuda.Device, reference: Loop
) -> None:
    loop = graph_loop(gpu, mode)
    assert loop.mode == mode or (mode is None and loop.mode in ("step", "turbo"))
    assert loop.why_eager == ("asked for" if mode == "eager" else None)
    portrait, x_T, image = drawing(1), noise(2), np.clip(noise(3), -1, 1)
    loop.set_source(portrait, x_T)
    for steps in (4, 10, 4):
        loop.set_steps(steps)
        reference.set_steps(steps)
        z = reference.encode(image, noise(4)).copy()
        np.testing.assert_array_equal(loop.encode(image, noise(4)), z)
        np.testing.assert_array_equal(loop.invert(image, z), reference.invert(image, z))
        np.testing.assert_array_equal(loop.render(x_T, z), reference.render(x_T, z))
        wanted = to_uint8(
            reference.render(x_T, reference.encode(*map(to_tensor, (portrait, drawing(5)))))
        )
        np.testing.assert_array_equal(loop.frame(drawing(5)), wanted)


def test_a_thousand_replays_allocate_nothing_and_give_the_same(gpu: cuda.Device) -> None:
    for mode in ("step", "turbo"):
        loop = graph_loop(gpu, mode)
        loop.set_source(drawing(1), noise(2))
        wanted = loop.frame(drawing(3)).copy()
        gc.collect()  # of former loops
        gpu.synchronize()
        before = cuda.free_bytes()
        ticket = loop.submit(drawing(3))
        for _ in range(REPLAYS - 1):
            following = loop.submit(drawing(3))
            np.testing.assert_array_equal(loop.result(ticket), wanted)
            ticket = following
        np.testing.assert_array_equal(loop.result(ticket), wanted)
        assert cuda.free_bytes() == before


def test_device_frames_go_in_and_come_out(gpu: cuda.Device, reference: Loop) -> None:
    loop = graph_loop(gpu, "step")

    def there(array: Any) -> Any:
        made = gpu.empty(array.shape, array.dtype.name)
        gpu.upload(made, array)
        return made

    loop.set_source(there(drawing(1)), there(noise(2)))
    loop.frame(there(drawing(3)))
    wanted = reference.encode(*map(to_tensor, (drawing(1), drawing(3))))
    picture = np.zeros((SIDE, SIDE, 3), np.uint8)
    gpu.download(picture, loop.device_picture)
    gpu.synchronize()
    np.testing.assert_array_equal(picture, to_uint8(reference.render(noise(2), wanted)))


@pytest.mark.parametrize("stream", [None, 1, 2])
def test_another_librarys_array_is_read_where_it_lies(gpu: cuda.Device, stream: Any) -> None:
    theirs = gpu.empty((SIDE, SIDE, 3), "uint8")
    gpu.upload(theirs, drawing(6))
    gpu.synchronize()

    class Foreign:
        __cuda_array_interface__ = {**theirs.__cuda_array_interface__, "stream": stream}

    view = frames.device_view(Foreign(), gpu, "frame", (SIDE, SIDE, 3))
    assert view.ptr == theirs.ptr
    loop = graph_loop(gpu, "step")
    loop.set_source(drawing(1), noise(2))
    np.testing.assert_array_equal(loop.frame(view).copy(), loop.frame(drawing(6)))
    np.testing.assert_array_equal(frames.picture(Foreign(), "frame", gpu), drawing(6))
    np.testing.assert_array_equal(frames.picture(Foreign(), "frame"), drawing(6))


def test_nothing_is_left_behind(gpu: cuda.Device) -> None:
    gc.collect()
    gpu.synchronize()
    before = cuda.free_bytes()
    for _ in range(3):
        loop = graph_loop(gpu, "turbo")
        loop.set_source(drawing(1), noise(2))
        loop.frame(drawing(3))
        del loop
        gc.collect()
    assert cuda.free_bytes() >= before - (32 << 20)
