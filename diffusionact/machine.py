"""What a measurement was made on: processor, memory, GPUs, versions, commit, load."""

from __future__ import annotations

import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from diffusionact._version import __version__

LIBRARIES = (
    "numpy", "onnxruntime", "onnxruntime-gpu", "openvino", "opencv-python-headless", "av", "torch",
    "triton", "nvidia-cudnn-cu13", "cuda-bindings", "tensorrt_cu13", "tensorrt_rtx_cu13_libs",
)  # fmt: skip
# The instruction sets that matter to convolutions, as Linux names them.
FLAGS = (
    "avx2", "fma", "avx512f", "avx512_vnni", "avx_vnni", "avx512_bf16", "avx512_fp16",
    "amx_bf16", "amx_int8", "asimd", "sve", "bf16", "i8mm",
)  # fmt: skip
TOOL_TIMEOUT_S = 10.0
CPU_MODEL = r"^(?:model name|Model|Hardware)\s*:\s*(.+)$"
# Of describe(): what two measurements must share to be compared.
IDENTITY = ("cpu", "cpu_id", "cores", "flags", "memory_gib", "gpus", "system")


def describe() -> dict[str, Any]:
    """Return what this machine is, ready for JSON; what cannot be found out is None or empty."""
    memory_kib = _first(r"^MemTotal:\s*(\d+) kB$", _read("/proc/meminfo"))
    return {
        **cpu(),
        "memory_gib": round(int(memory_kib) / 2**20) if memory_kib else None,
        "gpus": gpus(),
        "system": f"{platform.system()} {platform.machine()}",
    }


def cpu() -> dict[str, Any]:
    """Return of `describe` what concerns the processor; starts no program."""
    info = _read("/proc/cpuinfo")
    flags = set((_first(r"^(?:flags|Features)\s*:\s*(.+)$", info) or "").split())
    return {
        "cpu": _first(CPU_MODEL, info) or platform.processor() or platform.machine(),
        "cpu_id": _cpu_id(info),
        "cores": cores(),
        "flags": [flag for flag in FLAGS if flag in flags],
    }


def cores() -> int:
    """Return the number of processors this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def gpus() -> list[str]:
    """Return the NVIDIA GPUs as name, driver, memory; none where no driver answers."""
    asked = ["nvidia-smi", "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    return [line.strip() for line in (_output(asked) or "").splitlines() if line.strip()]


def versions() -> dict[str, str]:
    """Return the versions of Python, of this package and of the libraries that are installed."""
    found = {"diffusionact": __version__, "python": platform.python_version()}
    for library in LIBRARIES:
        try:
            found[library] = importlib.metadata.version(library)
        except importlib.metadata.PackageNotFoundError:
            continue
    return found


def commit() -> str | None:
    """Return the commit of the checkout this package runs from, "+" behind it where files differ
    from it; None where it is no checkout."""
    root = Path(__file__).resolve().parent.parent
    if not (root / ".git").exists():
        return None
    name = _output(["git", "-C", str(root), "rev-parse", "--short=12", "HEAD"])
    if name is None:
        return None
    changed = _output(["git", "-C", str(root), "status", "--porcelain", "-uno"])
    return name.strip() + ("+" if changed else "")


def load_average() -> float | None:
    """Return the processes that wanted to run, over the last minute; None where not known."""
    try:
        return round(os.getloadavg()[0], 2)
    except (AttributeError, OSError):
        return None


def now() -> str:
    """Return the time, UTC, to the second."""
    return datetime.now(timezone.utc).strftime("%Y-%m-%dT%H:%M:%SZ")


def differences(a: Mapping[str, Any], b: Mapping[str, Any]) -> list[str]:
    """Return in words what sets two machines, as `describe` gives them, apart."""
    return [
        f"{name}: {a.get(name)} there, {b.get(name)} here"
        for name in IDENTITY
        if a.get(name) != b.get(name)
    ]


def describe_briefly(machine: Mapping[str, Any]) -> str:
    """Return a machine of `describe` in one line."""
    bf16 = next((f for f in ("amx_bf16", "avx512_bf16") if f in machine["flags"]), None)
    parts = [
        f"{machine['cores']} cores of {machine['cpu']}"
        + (f" ({machine['cpu_id']})" if machine.get("cpu_id") else ""),
        bf16,
        f"{machine['memory_gib']} GiB" if machine["memory_gib"] else None,
        *machine["gpus"],
    ]
    return ", ".join(part for part in parts if part)


def _cpu_id(info: str) -> str | None:
    """Family and model, for processors whose name says little, as on virtual machines."""
    family, model = (_first(rf"^{what}\s*:\s*(\d+)$", info) for what in ("cpu family", "model"))
    return f"family {family}, model {model}" if family and model else None


def _first(pattern: str, text: str) -> str | None:
    found = re.search(pattern, text, re.MULTILINE)
    return found[1].strip() if found else None


def _read(path: str) -> str:
    try:
        return Path(path).read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""


def _output(command: list[str]) -> str | None:
    """What a program prints; None where it is missing, fails or hangs."""
    if shutil.which(command[0]) is None:
        return None
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=TOOL_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout
