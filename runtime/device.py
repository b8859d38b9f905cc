"""The seam between the loop and a GPU: memory, kernels, one stream, graphs.

`cuda.py` is it on NVIDIA's driver. The tests have one over NumPy that records every operation and
address, so that all of the loop's logic is proven without a GPU.

Nothing here waits for the GPU but `synchronize` and `Event.wait`: everything else is put on the
device's one stream, in the order of the calls.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from diffusionact.engine_files import Gpu

Array: TypeAlias = npt.NDArray[Any]
Work: TypeAlias = Callable[[], None]

# kernel -> the file of runtime/kernels that holds it
KERNELS: Mapping[str, str] = {
    "pack": "pack",
    "unpack": "pack",
    "ddim_step": "ddim_step",
    "start": "steps",
    "take_row": "steps",
    "next_step": "steps",
}


class DeviceArray(Protocol):
    """Memory of a device, in C order; freed once, with the last array that is in it."""

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> np.dtype[Any]: ...

    @property
    def ptr(self) -> int:
        """The address, aligned to 256 bytes unless it is a view."""

    @property
    def nbytes(self) -> int: ...

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]: ...

    def first(self, rows: int) -> DeviceArray:
        """Return the first rows, the same memory."""


class Event(Protocol):
    """A mark in the stream."""

    def record(self) -> None:
        """Return nothing; the mark is behind all that was put on the stream so far."""

    def wait(self) -> None:
        """Return nothing once the stream has passed the mark."""


class Graph(Protocol):
    """Recorded work."""

    def launch(self) -> None:
        """Return nothing; the work is put on the stream."""


class Device(Protocol):
    """One GPU and one stream of it; a thread calls `activate` before it calls the rest."""

    @property
    def gpu(self) -> Gpu:
        """What engines for this GPU are looked up by."""

    @property
    def stream(self) -> int:
        """The stream's handle, for libraries that put their own work on it."""

    def activate(self) -> None:
        """Return nothing; the calling thread works on this GPU."""

    def empty(self, shape: Sequence[int], dtype: str) -> DeviceArray:
        """Return new memory. Raises: DeviceError when there is too little."""

    def pinned(self, shape: Sequence[int], dtype: str) -> Array:
        """Return host memory that the GPU copies from and to by itself, zero."""

    def upload(self, target: DeviceArray, source: Array) -> None:
        """Return nothing; `source` is read later unless it is not pinned: leave it alone."""

    def download(self, target: Array, source: DeviceArray) -> None:
        """Return nothing; `target` is written later, an `Event` tells when."""

    def copy(self, target: DeviceArray, source: DeviceArray) -> None:
        """Return nothing; of the same size, on the device."""

    def wait_for(self, stream: int) -> None:
        """Return nothing; what is put on our stream from now on comes after what is on that one.

        stream: a handle, or 1 or 2 for the default streams, as CUDA numbers them.
        """

    def kernel(self, name: str, count: int, *arguments: DeviceArray | int) -> Work:
        """Return the launch of a kernel of KERNELS over `count` elements, ready to be repeated.

        Its parameters are the arguments, then the count. Raises: DeviceError.
        """

    def event(self) -> Event: ...

    def synchronize(self) -> None:
        """Return nothing once all work is done. Raises: DeviceError when some of it failed."""

    def capture(self, work: Work) -> Graph:
        """Return the work recorded, not done. Do it once before: libraries allocate the first time.

        Raises: DeviceError when something in it cannot be recorded; the stream works on.
        """
