"""Group norm, scale, shift and SiLU as one operation for training on a CPU.

PyTorch runs them as six passes over memory and converts between bfloat16 and float32 twice; for
the small networks that a CPU can train, this takes longer than the convolutions. `enable` compiles
one C++ file with the machine's compiler; without one, training runs on PyTorch's own operations.
Inference and export never come here.
"""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import os
import platform
import shutil
import sys
import sysconfig
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusionact.engine_files import cache_root

log = logging.getLogger(__name__)

NAME = "diffusionact_fused_norm"
SOURCE = Path(__file__).with_name("fused_norm.cpp")
FLAGS = ["-O3", "-march=native", "-ffast-math", "-fopenmp"]
_extension: Any = None


def enable() -> bool:
    """Whether the compiled operation is in use from here on; compiles it at first call (~30 s)."""
    global _extension
    if _extension is None:
        try:
            _extension = _built()
        except (ImportError, OSError, RuntimeError) as error:
            log.warning("no fused group norm, training will be slower: %s", error)
            return False
    return True


def _built() -> Any:
    """The compiled file, from the cache where it lies under what it was made from. It is compiled
    in a folder of this process: torch's own cache has a lock, which a killed process leaves behind
    and all later ones wait for."""
    key = [SOURCE.read_text(encoding="utf-8"), *FLAGS, torch.__version__, sys.version]
    digest = hashlib.sha256("\n".join([*key, *_processor()]).encode()).hexdigest()
    place = cache_root() / "fused_norm" / f"{NAME}-{digest[:16]}.so"
    if not place.exists():
        _find_ninja()
        from torch.utils.cpp_extension import load

        place.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=".part-", dir=place.parent) as folder:
            made = load(NAME, [str(SOURCE)], extra_cflags=FLAGS, build_directory=folder)
            os.replace(Path(folder) / f"{NAME}.so", place)
        return made
    spec = importlib.util.spec_from_file_location(NAME, place)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def _processor() -> list[str]:
    """What "native" means here: one home folder may be shared by machines."""
    try:
        rows = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        return [platform.machine(), platform.processor()]
    return sorted({row for row in rows if row.startswith(("flags", "Features"))})


def _find_ninja() -> None:
    """Puts this environment's programs on PATH if torch would not find its build tool: a Python
    that was started by its full name does not bring them along."""
    if shutil.which("ninja") is None:
        os.environ["PATH"] = os.pathsep.join([sysconfig.get_path("scripts"), os.environ["PATH"]])


def usable(x: Tensor) -> bool:
    """Whether `norm_silu` takes this tensor: enabled, on the CPU, gradients wanted."""
    return _extension is not None and x.device.type == "cpu" and torch.is_grad_enabled()


def norm_silu(x: Tensor, scale: Tensor, shift: Tensor, groups: int, eps: float) -> Tensor:
    """SiLU(GN(x) * scale + shift), same shape and dtype as x.

    x: float32 or bfloat16 [N,C,H,W]; scale, shift: float32 [N,C], the norm's affine included.
    """
    result: Tensor = _NormSiLU.apply(x, scale, shift, groups, eps)  # type: ignore[no-untyped-call]
    return result


class _NormSiLU(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any, x: Tensor, scale: Tensor, shift: Tensor, groups: int, eps: float
    ) -> Tensor:
        x = x.contiguous(memory_format=torch.channels_last)
        scale, shift = scale.float().contiguous(), shift.float().contiguous()
        y, mean, rstd = _extension.forward(x, scale, shift, groups, eps)
        ctx.save_for_backward(x, scale, shift, mean, rstd)
        ctx.groups = groups
        output: Tensor = y
        return output

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, Tensor, Tensor, None, None]:
        x, *rest = ctx.saved_tensors
        grad = grad.to(x.dtype).contiguous(memory_format=torch.channels_last)
        dx, dscale, dshift = _extension.backward(x, grad, *rest, ctx.groups)
        return dx, dscale, dshift, None, None
