"""What is on this machine: versions, processor, driver, GPU, kernels."""

from __future__ import annotations

import importlib.metadata
import os
import platform
from collections.abc import Iterator, Mapping

from diffusionact import __version__, trt_library
from diffusionact.errors import BackendMissing, DeviceError
from diffusionact.gpu import gpu_here
from diffusionact.runtime import cuda, kernel_code
from diffusionact.runtime.doctor.finding import Finding, found

# library -> the extra that it comes with; "" for what is always installed.
LIBRARIES: Mapping[str, str] = {
    "numpy": "",
    "opencv-python-headless": "",
    "onnxruntime": "",
    "av": "",
    "mediapipe": "track",
    "openvino": "openvino",
    "torch": "torch",
    "onnx": "export",
    "cuda-bindings": "cuda",
    "tensorrt_rtx_cu13_libs": "rtx",
    "tensorrt_cu13_libs": "trt",
}
OTHER_NAMES = {"onnxruntime": "onnxruntime-gpu"}  # the same module from another package


def findings() -> Iterator[Finding]:
    """Yield what is on this machine; nothing here fails."""
    yield Finding("diffusionact", None, f"{__version__}, Python {platform.python_version()}")
    for library, extra in LIBRARIES.items():
        version = _version(library) or _version(OTHER_NAMES.get(library, library))
        command = f"pip install 'diffusionact[{extra}]'" if extra and not version else ""
        yield Finding(library, None, version or "not installed", command)
    yield Finding("cpu", None, f"{os.cpu_count()} threads, {platform.machine()}")
    yield from _gpu()
    yield _kernels()


def _version(library: str) -> str | None:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return None


def _gpu() -> Iterator[Finding]:
    """The driver is asked before TensorRT is touched: without one, that ends the process."""
    try:
        seen = gpu_here()
    except DeviceError as error:
        yield Finding("gpu", None, str(error), "nvidia-smi")
        return
    if seen is None:
        yield Finding("gpu", None, "none (no nvidia-smi); the CPU does the work")
    else:
        told = f"{seen.name}, {seen.target}, driver {seen.driver_major}"
        yield Finding("gpu", None, told)
    problem = cuda.why_not()
    if problem is None:
        yield Finding("driver", True, "cuInit answers")
    elif seen is None:
        yield Finding("driver", None, problem)
    else:  # a GPU that this process cannot reach
        yield found("driver", None, problem)
    yield _tensorrt(problem is None)


def _tensorrt(with_driver: bool) -> Finding:
    names = trt_library.installed()
    if not names:
        return Finding("tensorrt", None, "not installed", trt_library.INSTALL["tensorrt_rtx"])
    try:
        libraries = [trt_library.find(name) for name in names]
    except BackendMissing as error:
        return found("tensorrt", None, error)
    told = ", ".join(f"{library.name} {library.version}" for library in libraries)
    if with_driver:
        return Finding("tensorrt", True, told)
    ahead = "tensorrt_rtx" in names
    return Finding(
        "tensorrt",
        None,
        f"{told}; without a GPU it {'builds ahead of time and ' if ahead else ''}runs nothing",
        "diffusionact build --gpu sm_89" if ahead else "",
    )


def _kernels() -> Finding:
    usable, told = kernel_code.described()
    return found("kernels", True if usable else None, told)
