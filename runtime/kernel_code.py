"""The kernels as code for a GPU: compiled with the installation, or once by NVRTC and kept.

NVRTC is a library and needs neither a driver nor a compiler on the machine.
"""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from diffusionact.engine_files import cache_root
from diffusionact.errors import BackendMissing, DeviceError
from diffusionact.files import write_whole
from diffusionact.runtime.device import KERNELS

FOLDER = Path(__file__).parent / "kernels"
INSTALL = "pip install 'diffusionact[cuda]'"
# As CMakeLists.txt: without fused multiply-add a kernel rounds as its NumPy twin does.
FLAGS = ("--fmad=false", "--std=c++17")
_log = logging.getLogger("diffusionact")


def kernel_image(file: str, target: str) -> Iterator[bytes]:
    """Yield the code of runtime/kernels/FILE.cu, the next where the GPU refuses one.

    target: the GPU's architecture, such as "sm_90".

    Raises: BackendMissing without NVRTC, DeviceError when it does not compile them.
    """
    fatbin = FOLDER / f"{file}.fatbin"
    if fatbin.is_file():
        yield fatbin.read_bytes()
    source = (FOLDER / f"{file}.cu").read_bytes()
    path = cached_path(file, source, target)
    if path.is_file():
        yield path.read_bytes()
    image = compiled(file, source, target)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, image)
    except OSError as error:
        _log.debug("%s: not kept (%s), compiled again next time", path, error.strerror)
    yield image


def described() -> tuple[bool, str]:
    """Return whether the kernels' code can be had on this machine, and from where."""
    files = sorted({*KERNELS.values()})
    if all((FOLDER / f"{file}.fatbin").is_file() for file in files):
        return True, "compiled with the installation"
    try:
        return True, f"NVRTC {nvrtc_version()} compiles them on a GPU's first use"
    except BackendMissing as error:
        return False, str(error)


def cached_path(file: str, source: bytes, target: str) -> Path:
    """Return where the code is kept: named by all that it is made from."""
    key = b"\0".join((source, target.encode(), nvrtc_version().encode(), *map(str.encode, FLAGS)))
    return cache_root() / "kernels" / f"{file}-{hashlib.sha256(key).hexdigest()[:16]}.bin"


def nvrtc_version() -> str:
    """Return the version of the library that is here. Raises: BackendMissing."""
    major, minor = _call(_nvrtc().nvrtcVersion)
    return f"{major}.{minor}"


def compiled(file: str, source: bytes, target: str) -> bytes:
    """Return the code of a source: for this GPU, or PTX where NVRTC is older than the GPU.

    Raises: BackendMissing without NVRTC, DeviceError with the compiler's words.
    """
    nvrtc = _nvrtc()
    wanted = int(target.removeprefix("sm_"))
    # The arch list holds plain numbers, ascending; a GPU of a later one reads PTX of the last.
    known = [arch for arch in _call(nvrtc.nvrtcGetSupportedArchs) if arch <= wanted]
    if not known:
        raise DeviceError(f"NVRTC {nvrtc_version()} compiles for no GPU as old as {target}")
    exact = known[-1] == wanted
    arch = f"{'sm' if exact else 'compute'}_{known[-1]}"
    options = [f"--gpu-architecture={arch}".encode(), *(flag.encode() for flag in FLAGS)]
    program = _call(nvrtc.nvrtcCreateProgram, source, f"{file}.cu".encode(), 0, [], [])
    try:
        status = nvrtc.nvrtcCompileProgram(program, len(options), options)[0]
        if int(status) != 0:
            log = _text(nvrtc.nvrtcGetProgramLogSize, nvrtc.nvrtcGetProgramLog, program)
            raise DeviceError(
                f"runtime/kernels/{file}.cu does not compile for {arch}: "
                f"{log.decode(errors='replace').strip()}; reinstall diffusionact"
            )
        if exact:
            return _text(nvrtc.nvrtcGetCUBINSize, nvrtc.nvrtcGetCUBIN, program)
        return _text(nvrtc.nvrtcGetPTXSize, nvrtc.nvrtcGetPTX, program)
    finally:
        nvrtc.nvrtcDestroyProgram(program)


def _nvrtc() -> Any:
    try:
        from cuda.bindings import nvrtc

        nvrtc.nvrtcVersion()  # loads the library, which another package brings
    except (ImportError, OSError, RuntimeError) as error:
        told = " ".join(str(error).split())
        raise BackendMissing(f"the kernels need NVRTC ({told}); run: {INSTALL}") from error
    return nvrtc


def _call(function: Any, *arguments: Any) -> Any:
    code, *values = function(*arguments)
    if int(code) != 0:
        raise DeviceError(f"NVRTC: {function.__name__} says {code.name}; run: {INSTALL}")
    return values[0] if len(values) == 1 else tuple(values)


def _text(size: Any, get: Any, program: Any) -> bytes:
    content = bytes(_call(size, program))
    _call(get, program, content)  # fills it
    return content
