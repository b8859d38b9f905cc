"""Pictures of other libraries, taken as they lie: pycuda, CuPy, PyTorch, JAX, NumPy.

Two protocols say where an array lies, and no library of theirs is imported: DLPack, which also
orders the producer's work before ours, and `__cuda_array_interface__`. Nothing is copied; the
array is kept until the last user of the view is gone.
"""

from __future__ import annotations

import ctypes
from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from diffusionact.errors import MediaError
from diffusionact.runtime.cuda import DeviceArray
from diffusionact.runtime.device import Device

UInt8Array: TypeAlias = npt.NDArray[np.uint8]

# Kinds of memory, as DLPack numbers them.
CPU, CUDA, CUDA_HOST, CUDA_MANAGED = 1, 2, 3, 13
HOST_KINDS, DEVICE_KINDS = (CPU, CUDA_HOST), (CUDA, CUDA_MANAGED)
_WANTED = (
    "a NumPy array, or an array with __dlpack__ or __cuda_array_interface__ "
    "(PyTorch, CuPy, JAX, pycuda.gpuarray)"
)


class SpeaksDlpack(Protocol):
    """An array of PyTorch, CuPy, JAX or NumPy, on a GPU or not."""

    def __dlpack__(self, *, stream: Any = None) -> Any: ...

    def __dlpack_device__(self) -> tuple[Any, int]: ...


class SpeaksInterface(Protocol):
    """An array of pycuda, Numba, CuPy or PyTorch on a GPU."""

    @property
    def __cuda_array_interface__(self) -> Mapping[str, Any]: ...


Foreign: TypeAlias = SpeaksDlpack | SpeaksInterface


def lies_on_device(array: object) -> bool:
    """Return whether the array is another library's, in a GPU's memory."""
    if isinstance(array, np.ndarray):
        return False
    if hasattr(array, "__cuda_array_interface__"):
        return True
    return _kind(array) in DEVICE_KINDS


def device_view(
    array: Any, device: Device, what: str, shape: Sequence[int | None], dtype: str = "uint8"
) -> DeviceArray:
    """Return the array where it lies; the device's stream waits for what its maker still does.

    what: for errors, such as "driver frame"; shape: that is wanted, None for any size.

    Raises: MediaError for an array that is not on a GPU, is of another shape or type, or not in
    C order.
    """
    if hasattr(array, "__dlpack__") and _kind(array) in DEVICE_KINDS:
        view, strides = _from_dlpack(array, device, what)
    elif hasattr(array, "__cuda_array_interface__"):
        view, strides = _from_interface(array, device, what)
    else:
        raise MediaError(f"{what}: a {_type(array)}; wanted an array in a GPU's memory")
    _check(view, what, shape, dtype)
    if strides is not None and not _is_c_order(view.shape, strides, view.dtype.itemsize):
        raise MediaError(f"{what}: strides {list(strides)}; wanted C order, make it contiguous")
    return view


def host_array(array: Any, what: str) -> UInt8Array:
    """Return a picture of the host as a NumPy array, the same memory.

    Raises: MediaError for what is no array, or not in the host's memory.
    """
    if isinstance(array, np.ndarray):
        return array
    kind = _kind(array)
    if kind in HOST_KINDS:
        try:
            made: Any = np.from_dlpack(array)
            return np.asarray(made)
        except (BufferError, RuntimeError, TypeError, ValueError) as error:
            raise MediaError(
                f"{what}: {_type(array)} does not hand over its memory: {error}"
            ) from (error)
    raise MediaError(
        f"{what}: not an array but {_type(array)}; is the file missing? Wanted {_WANTED}"
    )


def picture(array: Any, what: str, device: Device | None = None) -> UInt8Array:
    """Return a picture, uint8 [H,W,3], for a stage on the CPU: the same memory where it lies on the
    host, else one copy from the GPU.

    device: the one that copies; None opens the first.

    Raises: MediaError for what is no such picture; DeviceError without a usable GPU.
    """
    if not lies_on_device(array):
        return host_array(array, what)
    if device is None:
        from diffusionact.runtime import cuda  # only frames on a GPU need one

        device = cuda.first_device()
    device.activate()
    view = device_view(array, device, what, (None, None, 3))
    copied: UInt8Array = np.empty(view.shape, np.uint8)
    device.download(copied, view)
    device.synchronize()
    return copied


def _kind(array: object) -> int | None:
    """DLPack's number of the memory; None for what does not say."""
    if not hasattr(array, "__dlpack_device__"):
        return None
    return int(array.__dlpack_device__()[0])


def _from_interface(
    array: Any, device: Device, what: str
) -> tuple[DeviceArray, tuple[int, ...] | None]:
    told = array.__cuda_array_interface__
    if told.get("mask") is not None:
        raise MediaError(f"{what}: a masked array; wanted all of its pixels")
    stream = told.get("stream")  # of version 3; None: nothing is under way
    if stream is not None:
        device.wait_for(int(stream))
    view = DeviceArray(array, int(told["data"][0]), told["shape"], np.dtype(told["typestr"]))
    strides = told.get("strides")
    return view, None if strides is None else tuple(strides)


class _Tensor(ctypes.Structure):
    """DLTensor, as dlpack.h has it."""

    _fields_ = [
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    ]


_KINDS = {0: "i", 1: "u", 2: "f"}  # of numbers, DLPack's code -> NumPy's letter


def _from_dlpack(
    array: Any, device: Device, what: str
) -> tuple[DeviceArray, tuple[int, ...] | None]:
    try:
        capsule = array.__dlpack__(stream=device.stream)
    except (BufferError, RuntimeError, TypeError, ValueError) as error:
        raise MediaError(
            f"{what}: {_type(array)} does not hand over its memory: {error}"
        ) from error
    get = ctypes.pythonapi.PyCapsule_GetPointer
    get.restype, get.argtypes = ctypes.c_void_p, [ctypes.py_object, ctypes.c_char_p]
    tensor = _Tensor.from_address(get(capsule, b"dltensor"))
    if tensor.lanes != 1 or tensor.code not in _KINDS:
        raise MediaError(f"{what}: numbers of DLPack type {tensor.code}; wanted uint8 or float32")
    dtype = np.dtype(f"{_KINDS[tensor.code]}{tensor.bits // 8}")
    shape = tensor.shape[: tensor.ndim]
    strides = None
    if tensor.strides:
        strides = tuple(count * dtype.itemsize for count in tensor.strides[: tensor.ndim])
    # The capsule, which is never marked as used, gives the memory back when the view is gone.
    view = DeviceArray((capsule, array), (tensor.data or 0) + tensor.byte_offset, shape, dtype)
    return view, strides


def _check(view: DeviceArray, what: str, shape: Sequence[int | None], dtype: str) -> None:
    fits = len(view.shape) == len(shape) and all(
        size in (None, seen) for size, seen in zip(shape, view.shape, strict=True)
    )
    if not fits or view.dtype != np.dtype(dtype) or 0 in view.shape:
        wanted = ",".join("any" if size is None else str(size) for size in shape)
        raise MediaError(f"{what}: {view.dtype} {list(view.shape)}; wanted {dtype} [{wanted}]")


def _is_c_order(shape: tuple[int, ...], strides: tuple[int, ...], itemsize: int) -> bool:
    """Whether strides, in bytes, are those of an array without gaps, the last axis densest."""
    due = itemsize
    for size, stride in zip(reversed(shape), reversed(strides), strict=True):
        if size > 1 and stride != due:
            return False
        due *= size
    return True


def _type(array: object) -> str:
    kind = type(array)
    return f"{kind.__module__}.{kind.__qualname__}".removeprefix("builtins.")
