"""A device over NumPy that records every operation and address, for the loop's logic on the CPU.

It is as unkind as a GPU may be: work is done as late as possible, when someone waits; pinned memory
is read and written then; new memory holds rubbish; and what is run for the first time while a graph
is recorded allocates, so it cannot be recorded.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from diffusionact.engine_files import Gpu
from diffusionact.errors import DeviceError
from diffusionact.image import to_tensor, to_uint8
from diffusionact.manifest import TensorSpec
from diffusionact.runtime.component import Component
from diffusionact.runtime.device import KERNELS, Work
from diffusionact.runtime.loop import ddim_step
from diffusionact.schedule import Step

RUBBISH = 0xCB
Operation = tuple[Any, ...]  # what, and the addresses in the order of the arguments


class RecordedArray:
    def __init__(self, host: Any, ptr: int) -> None:
        self.host = host
        self.ptr = ptr
        self.shape: tuple[int, ...] = host.shape
        self.dtype: np.dtype[Any] = host.dtype
        self.nbytes: int = host.nbytes

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.ptr, False),
            "strides": None,
            "version": 3,
        }

    def first(self, rows: int) -> RecordedArray:
        return RecordedArray(self.host[:rows], self.ptr)


class RecordedEvent:
    def __init__(self, device: RecordingDevice) -> None:
        self._device = device
        self._done = True

    def record(self) -> None:
        self._done = False
        self._device.enqueue(("event",), self._pass)

    def wait(self) -> None:
        self._device.work_until(lambda: self._done)

    def _pass(self) -> None:
        self._done = True


class RecordedGraph:
    def __init__(self, device: RecordingDevice, name: int, parts: list[Any]) -> None:
        self._device = device
        self.name = name
        self.parts = parts

    def launch(self) -> None:
        self._device.enqueue(("graph", self.name), lambda: [work() for _, work in self.parts])


class RecordingDevice:
    """refuses: names of networks that cannot be recorded. launched: what was put on the stream;
    graphs: what was recorded; allocated: how often memory was asked for."""

    stream = 7
    gpu = Gpu("recorder", "sm_90", 580)

    def __init__(self, refuses: Sequence[str] = ()) -> None:
        self.refuses = refuses
        self.launched: list[Operation] = []
        self.graphs: list[RecordedGraph] = []
        self.allocated = 0
        self.waits = 0
        self._waiting: list[Work] = []
        self._recording: list[Any] | None = None
        self._addresses = itertools.count(0x1000, 0x100)
        self._pinned: set[int] = set()
        self.places: dict[int, RecordedArray] = {}

    def activate(self) -> None:
        pass

    def empty(self, shape: Sequence[int], dtype: str) -> RecordedArray:
        host = np.empty(shape, dtype)
        host.reshape(-1).view(np.uint8)[:] = RUBBISH
        made = RecordedArray(host, next(self._addresses))
        self.allocated += 1
        self.places[made.ptr] = made
        return made

    def pinned(self, shape: Sequence[int], dtype: str) -> Any:
        self.allocated += 1
        made = np.zeros(shape, dtype)
        self._pinned.add(made.ctypes.data)
        return made

    def upload(self, target: Any, source: Any) -> None:
        assert target.shape == source.shape and target.dtype == source.dtype
        read = source if source.ctypes.data in self._pinned else source.copy()
        self.enqueue(("upload", target.ptr), lambda: np.copyto(target.host, read))

    def download(self, target: Any, source: Any) -> None:
        assert target.shape == source.shape and target.dtype == source.dtype
        self.enqueue(("download", source.ptr), lambda: np.copyto(target, source.host))

    def copy(self, target: Any, source: Any) -> None:
        assert target.nbytes == source.nbytes
        self.enqueue(("copy", target.ptr, source.ptr), lambda: np.copyto(target.host, source.host))

    def wait_for(self, stream: int) -> None:
        self.enqueue(("wait", stream), lambda: None)

    def kernel(self, name: str, count: int, *arguments: Any) -> Work:
        assert name in KERNELS
        twin = TWINS[name]
        operation = (name, *(argument.ptr for argument in arguments))
        hosts = [argument.host for argument in arguments]
        return lambda: self.enqueue(operation, lambda: twin(count, *hosts))

    def event(self) -> RecordedEvent:
        return RecordedEvent(self)

    def synchronize(self) -> None:
        assert self._recording is None, "a wait cannot be recorded"
        self.waits += 1
        self.work_until(lambda: False)

    def capture(self, work: Work) -> RecordedGraph:
        assert self._recording is None and not self._waiting
        self._recording = parts = []
        try:
            work()
        finally:
            self._recording = None
        self.graphs.append(RecordedGraph(self, len(self.graphs), parts))
        return self.graphs[-1]

    @property
    def is_recording(self) -> bool:
        return self._recording is not None

    def enqueue(self, operation: Operation, work: Callable[[], object]) -> None:
        if self._recording is not None:
            self._recording.append((operation, work))
            return
        self.launched.append(operation)
        self._waiting.append(lambda: (work(), None)[1])

    def work_until(self, passed: Callable[[], bool]) -> None:
        while self._waiting and not passed():
            self._waiting.pop(0)()


class OnDevice:
    """A component of the CPU as one of a recording device: `run` only puts it on the stream."""

    def __init__(self, device: RecordingDevice, name: str, inner: Component) -> None:
        self.inputs: Mapping[str, TensorSpec] = inner.inputs
        self.outputs: Mapping[str, TensorSpec] = inner.outputs
        self._device = device
        self._name = name
        self._inner = inner
        self._has_run = False
        self._operation: Operation = ()

    def bind(self, **arrays: Any) -> None:
        self._inner.bind(**{name: array.host for name, array in arrays.items()})
        names = (*self.inputs, *self.outputs)
        self._operation = (self._name, *(arrays[name].ptr for name in names))

    def run(self) -> None:
        if self._device.is_recording:
            if self._name in self._device.refuses:
                raise DeviceError(f"{self._name} cannot be recorded")
            if not self._has_run:
                raise DeviceError(f"{self._name} allocates while a graph is recorded")
        self._has_run = True
        self._device.enqueue(self._operation, self._inner.run)


def _pack(pixels: int, picture: Any, x: Any) -> None:
    assert pixels == picture.size // 3
    to_tensor(picture, x)


def _unpack(pixels: int, x: Any, picture: Any) -> None:
    assert pixels == picture.size // 3
    picture[...] = to_uint8(x)


def _ddim_step(count: int, x: Any, prediction: Any, table: Any, step: Any) -> None:
    assert count == x.size
    ddim_step(x, prediction.copy(), np.empty_like(x), Step(0, *table[step[0]]))


def _start(count: int, x: Any, x_T: Any, step: Any) -> None:
    assert count == x.size
    np.copyto(x, x_T)
    step[0] = 0


def _take_row(
    count: int, scales: Any, shifts: Any, rows: Any, step: Any, scale: Any, shift: Any
) -> None:
    assert count == scale.size == scales.shape[1]
    scale[0] = scales[rows[step[0]]]
    shift[0] = shifts[rows[step[0]]]


def _next_step(count: int, step: Any) -> None:
    assert count == 1
    step += 1


TWINS: Mapping[str, Callable[..., None]] = {
    "pack": _pack,
    "unpack": _unpack,
    "ddim_step": _ddim_step,
    "start": _start,
    "take_row": _take_row,
    "next_step": _next_step,
}
