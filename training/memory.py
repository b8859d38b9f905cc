"""How much memory the training took, on the GPU or of the process."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterable
from pathlib import Path

import torch

STATUS, CLEAR = Path("/proc/self/status"), Path("/proc/self/clear_refs")
FORGET_PEAK = "5"  # what Linux wants to hear for it


def peak_bytes(device: torch.device) -> int | None:
    """Returns the most that was in use since `forget_peak`: of the GPU by tensors, else by the
    whole process; None where the system does not tell."""
    if device.type == "cuda":
        return int(torch.cuda.max_memory_allocated(device))
    if STATUS.exists():
        return _kib("VmHWM") * 1024
    if sys.platform == "win32":
        return None
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def used_bytes(device: torch.device) -> int | None:
    """Returns what is in use now, as `peak_bytes`."""
    if device.type == "cuda":
        return int(torch.cuda.memory_allocated(device))
    return _kib("VmRSS") * 1024 if STATUS.exists() else peak_bytes(device)


def forget_peak(device: torch.device) -> None:
    """Lets the peak begin anew at what is in use, where the system can."""
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats(device)
        return
    try:
        CLEAR.write_text(FORGET_PEAK, encoding="ascii")
    except OSError:
        return  # the peak of the whole process, then


def _kib(name: str) -> int:
    rows = STATUS.read_text(encoding="ascii").splitlines()
    (row,) = (row for row in rows if row.startswith(f"{name}:"))
    return int(row.split()[1])


def give_back(device: torch.device) -> None:
    """Gives freed memory back to the system where that is possible, so that the peak of what comes
    next is its own."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.empty_cache()
    elif sys.platform == "linux":
        trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # of glibc
        if trim is not None:
            trim(0)


def bytes_of(tensors: Iterable[torch.Tensor]) -> int:
    """Returns how much the tensors take."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)
