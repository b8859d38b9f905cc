"""CUDA without a framework: one GPU, one stream, its memory, kernels and graphs.

The only importer of cuda.bindings, and only when something asks for a GPU. Each call of the driver
goes through `_done`, which turns its code into a DeviceError in the driver's own words.
"""

from __future__ import annotations

import ctypes
import functools
import gc
import math
import weakref
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from diffusionact.engine_files import Gpu
from diffusionact.errors import BackendMissing, DeviceError
from diffusionact.gpu import gpu_here
from diffusionact.runtime.device import KERNELS, Array, Work
from diffusionact.runtime.device import DeviceArray as AnyDeviceArray
from diffusionact.runtime.kernel_code import kernel_image

INSTALL = "pip install 'diffusionact[cuda]'"
BLOCK = 256  # threads; every kernel is one thread an element
_WITHOUT = "install NVIDIA's driver, see that `nvidia-smi` answers, or take --device cpu"
# What to do about a code, where there is something better than to report it.
_MEND = {
    "CUDA_ERROR_OUT_OF_MEMORY": "close what else uses the GPU (nvidia-smi lists it), or take "
    "a smaller bundle",
    "CUDA_ERROR_NO_DEVICE": "plug in or enable an NVIDIA GPU, or take --device cpu",
    "CUDA_ERROR_NO_BINARY_FOR_GPU": "install NVRTC, which compiles for this GPU: " + INSTALL,
    "CUDA_ERROR_STREAM_CAPTURE_UNSUPPORTED": "run it without a graph",
}


@functools.cache
def _driver() -> Any:
    """The module of the driver's functions.

    Raises: BackendMissing when it is not installed.
    """
    try:
        from cuda.bindings import driver
    except (ImportError, OSError) as error:
        raise BackendMissing(f"device 'cuda' needs cuda-bindings ({error}); run: {INSTALL}") from (
            error
        )
    return driver


def _done(result: tuple[Any, ...]) -> Any:
    """The value, or tuple of values, of a driver call. Raises: DeviceError."""
    code, *values = result
    if int(code) != 0:
        raise _error(code)
    return values[0] if len(values) == 1 else tuple(values) or None


def _error(code: Any) -> DeviceError:
    driver = _driver()
    told = driver.cuGetErrorString(code)[1]
    name = getattr(code, "name", str(code))
    mend = _MEND.get(name, "run: diffusionact check")
    return DeviceError(f"the GPU says {name}: {(told or b'').decode() or 'no more'}; {mend}")


def probe(index: int = 0) -> Gpu:
    """Return the GPU of this index; nothing is made on it.

    Raises: BackendMissing when cuda-bindings is not installed, DeviceError when there is no
    driver, no such GPU, or none that answers. No other exception comes out.
    """
    driver = _driver()
    try:
        _done(driver.cuInit(0))
        count = _done(driver.cuDeviceGetCount())
        if index >= count:
            raise DeviceError(f"no GPU {index}: the driver sees {count}; {_WITHOUT}")
        device = _done(driver.cuDeviceGet(index))
        name = _done(driver.cuDeviceGetName(128, device)).split(b"\0")[0].decode()
        wanted = driver.CUdevice_attribute
        major, minor = (
            _done(driver.cuDeviceGetAttribute(attribute, device))
            for attribute in (
                wanted.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR,
                wanted.CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR,
            )
        )
    except DeviceError:
        raise
    except Exception as error:  # the loader's own classes: no driver, or one too old
        absent = type(error).__name__ == "DynamicLibNotFoundError"
        told = "libcuda is not found" if absent else error
        raise DeviceError(f"no NVIDIA driver here ({told}); {_WITHOUT}") from error
    return Gpu(name, f"sm_{major}{minor}", _driver_major())


@functools.cache  # nvidia-smi takes up to seconds, and a GPU is asked for with every network
def _driver_major() -> int:
    """The driver's own number, which engines are keyed by; 0 where nvidia-smi does not tell it, as
    in some containers: then only engines made ahead of time fit."""
    try:
        seen = gpu_here()
    except DeviceError:
        return 0
    return seen.driver_major if seen else 0


def gpu_to_build_for() -> Gpu | None:
    """Return the GPU that this process would run engines on, as it will look them up: nvidia-smi
    knows nothing of CUDA_VISIBLE_DEVICES and of MIG, so it is asked only where cuda-bindings are not
    there to ask. None where there is no GPU.

    Raises: DeviceError when there is one that does not answer.
    """
    return probe() if why_not() is None else gpu_here()


def why_not() -> str | None:
    """Return None where a GPU answers, else the sentence that says why none does."""
    try:
        probe()
    except (BackendMissing, DeviceError) as error:
        return str(error)
    return None


@functools.cache
def _context(index: int) -> Any:
    """The GPU's primary context, kept until the process ends: other libraries use it too."""
    driver = _driver()
    return _done(driver.cuDevicePrimaryCtxRetain(_done(driver.cuDeviceGet(index))))


def _freed_with(owner: object, free: Callable[[Any], Any], handle: Any) -> None:
    """Nothing; `free` gets the handle once, when nobody uses the owner any more."""
    context = _done(_driver().cuCtxGetCurrent())
    ending = weakref.finalize(owner, _free, context, free, handle)
    # The process's end frees it all; by then the driver may be gone.
    ending.atexit = False


def _free(context: Any, free: Callable[[Any], Any], handle: Any) -> None:
    """Nothing; called in whichever thread let go of the owner, so that brings its context."""
    driver = _driver()
    driver.cuCtxPushCurrent(context)
    free(handle)
    driver.cuCtxPopCurrent()


class _Memory:
    """What a call of the driver made and another frees."""

    def __init__(self, ptr: int, free: Callable[[Any], Any]) -> None:
        self.ptr = ptr
        _freed_with(self, free, ptr)


class DeviceArray:
    """As `device.DeviceArray`, in a GPU's memory."""

    __slots__ = ("dtype", "nbytes", "ptr", "shape", "_owner")

    def __init__(self, owner: Any, ptr: int, shape: Sequence[int], dtype: Any) -> None:
        self.shape = tuple(int(size) for size in shape)
        self.dtype: np.dtype[Any] = np.dtype(dtype)
        self.nbytes = math.prod(self.shape) * self.dtype.itemsize
        self.ptr = ptr
        self._owner = owner

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {
            "shape": self.shape,
            "typestr": self.dtype.str,
            "data": (self.ptr, False),
            "strides": None,
            "version": 3,
        }

    def first(self, rows: int) -> DeviceArray:
        return DeviceArray(self._owner, self.ptr, (rows, *self.shape[1:]), self.dtype)


def allocate(shape: Sequence[int], dtype: str) -> DeviceArray:
    """Return new memory of the GPU that the calling thread works on.

    Raises: DeviceError when there is too little.
    """
    driver = _driver()
    nbytes = math.prod(shape) * np.dtype(dtype).itemsize
    try:
        ptr = int(_done(driver.cuMemAlloc(max(1, nbytes))))
    except DeviceError as error:
        free, total = (count >> 20 for count in _done(driver.cuMemGetInfo()))
        told = f"{nbytes >> 20} MiB of GPU memory wanted, {free} of {total} MiB free"
        raise DeviceError(f"{told}: {error}") from error
    return DeviceArray(_Memory(ptr, driver.cuMemFree), ptr, shape, dtype)


def free_bytes() -> int:
    """Return how much memory is free on the GPU that the calling thread works on."""
    return int(_done(_driver().cuMemGetInfo())[0])


class _Pinned:
    """Page-locked host memory; the NumPy arrays over it keep it alive."""

    def __init__(self, memory: _Memory, shape: Sequence[int], dtype: str) -> None:
        self._memory = memory
        self.__array_interface__ = {
            "shape": tuple(shape),
            "typestr": np.dtype(dtype).str,
            "data": (memory.ptr, False),
            "version": 3,
        }


class _Launch:
    """A kernel with its arguments in place."""

    def __init__(self, device: Device, function: Any, count: int, arguments: Sequence[Any]) -> None:
        values: list[Any] = [
            ctypes.c_int32(a) if isinstance(a, int) else ctypes.c_void_p(a.ptr)
            for a in (*arguments, count)
        ]
        places = (ctypes.c_void_p * len(values))(*(ctypes.addressof(v) for v in values))
        self._kept = (values, places, arguments)  # the driver reads them at every launch
        self._launch = _driver().cuLaunchKernel
        grid = (math.ceil(count / BLOCK), 1, 1)
        block = (min(BLOCK, count), 1, 1)
        self._call = (function, *grid, *block, 0, device.stream, ctypes.addressof(places), 0)

    def __call__(self) -> None:
        _done(self._launch(*self._call))


class Event:
    """As `device.Event`."""

    def __init__(self, device: Device) -> None:
        self._driver = _driver()
        self._stream = device.stream
        self.handle = _done(self._driver.cuEventCreate(0))
        _freed_with(self, self._driver.cuEventDestroy, self.handle)

    def record(self) -> None:
        _done(self._driver.cuEventRecord(self.handle, self._stream))

    def wait(self) -> None:
        _done(self._driver.cuEventSynchronize(self.handle))

    def ms_since(self, earlier: Event) -> float:
        """Return the milliseconds between two marks that the stream has passed."""
        return float(_done(self._driver.cuEventElapsedTime(earlier.handle, self.handle)))


class Graph:
    """As `device.Graph`."""

    def __init__(self, device: Device, handle: Any) -> None:
        self._driver = _driver()
        self._stream = device.stream
        self._handle = handle
        _freed_with(self, self._driver.cuGraphExecDestroy, handle)

    def launch(self) -> None:
        _done(self._driver.cuGraphLaunch(self._handle, self._stream))


class Device:
    """As `device.Device`: a GPU's primary context, which PyTorch and ONNX Runtime use too."""

    def __init__(self, index: int = 0) -> None:
        """Raises: BackendMissing, DeviceError, as `probe`."""
        self.gpu = probe(index)
        self._driver = driver = _driver()
        self._modules: dict[str, Any] = {}
        self._context = _context(index)
        self.activate()
        # One that the default stream does not wait for, so that other libraries' work does not
        # end up in the middle of ours; capture asks for one too.
        flag = driver.CUstream_flags.CU_STREAM_NON_BLOCKING
        self.stream = int(_done(driver.cuStreamCreate(flag)))
        _freed_with(self, driver.cuStreamDestroy, self.stream)

    def activate(self) -> None:
        _done(self._driver.cuCtxSetCurrent(self._context))

    def empty(self, shape: Sequence[int], dtype: str) -> DeviceArray:
        return allocate(shape, dtype)

    def pinned(self, shape: Sequence[int], dtype: str) -> Array:
        nbytes = max(1, math.prod(shape) * np.dtype(dtype).itemsize)
        ptr = int(_done(self._driver.cuMemHostAlloc(nbytes, 0)))
        memory = _Memory(ptr, self._driver.cuMemFreeHost)
        array: Array = np.asarray(_Pinned(memory, shape, dtype))
        array[...] = 0
        return array

    def upload(self, target: AnyDeviceArray, source: Array) -> None:
        _same_size(target, source)
        copy = self._driver.cuMemcpyHtoDAsync
        _done(copy(target.ptr, source.ctypes.data, source.nbytes, self.stream))

    def download(self, target: Array, source: AnyDeviceArray) -> None:
        _same_size(source, target)
        copy = self._driver.cuMemcpyDtoHAsync
        _done(copy(target.ctypes.data, source.ptr, target.nbytes, self.stream))

    def copy(self, target: AnyDeviceArray, source: AnyDeviceArray) -> None:
        assert target.nbytes == source.nbytes
        copy = self._driver.cuMemcpyDtoDAsync
        _done(copy(target.ptr, source.ptr, source.nbytes, self.stream))

    def wait_for(self, stream: int) -> None:
        if stream != self.stream:
            mark = Event(self)
            _done(self._driver.cuEventRecord(mark.handle, stream))
            _done(self._driver.cuStreamWaitEvent(self.stream, mark.handle, 0))

    def kernel(self, name: str, count: int, *arguments: AnyDeviceArray | int) -> Work:
        file = KERNELS[name]
        if file not in self._modules:
            self._modules[file] = self._load(file)
        function = _done(self._driver.cuModuleGetFunction(self._modules[file], name.encode()))
        return _Launch(self, function, count, arguments)

    def event(self) -> Event:
        return Event(self)

    def synchronize(self) -> None:
        _done(self._driver.cuStreamSynchronize(self.stream))

    def capture(self, work: Work) -> Graph:
        driver = self._driver
        # Thread-local: what other threads do, PyTorch's or a video decoder's, stays allowed.
        mode = driver.CUstreamCaptureMode.CU_STREAM_CAPTURE_MODE_THREAD_LOCAL
        self.synchronize()
        _done(driver.cuStreamBeginCapture(self.stream, mode))
        collects = gc.isenabled()
        gc.disable()  # what it frees may be memory of the GPU, which would spoil the recording
        problem: Exception | None = None
        try:
            work()
        except Exception as error:  # other libraries' classes share no other root
            problem = error
        finally:
            ended = driver.cuStreamEndCapture(self.stream)
            if collects:
                gc.enable()
        if problem is not None:
            if int(ended[0]) == 0:
                driver.cuGraphDestroy(ended[1])
            raise DeviceError(f"not recordable: {problem}") from problem
        graph = _done(ended)
        try:
            made = Graph(self, _done(driver.cuGraphInstantiate(graph, 0)))
        finally:
            driver.cuGraphDestroy(graph)
        _done(driver.cuGraphUpload(made._handle, self.stream))
        return made

    def _load(self, file: str) -> Any:
        """A file of kernels on the GPU: as the installation compiled it, or compiled now."""
        problem: DeviceError | None = None
        for image in kernel_image(file, self.gpu.target):
            try:
                return _done(self._driver.cuModuleLoadData(image))
            except DeviceError as error:
                problem = error  # of other GPUs, or a damaged cache: the next one
        raise DeviceError(f"kernels {file}.cu do not load on {self.gpu.name}: {problem}")


@functools.cache
def first_device() -> Device:
    """Return the first GPU, the same at every call: for copies outside of any loop.

    Raises: BackendMissing, DeviceError.
    """
    return Device()


def _same_size(on_device: AnyDeviceArray, on_host: Array) -> None:
    assert on_host.flags.c_contiguous and on_host.nbytes == on_device.nbytes, (
        f"host {on_host.dtype} {on_host.shape}, device {on_device.dtype} {on_device.shape}"
    )
