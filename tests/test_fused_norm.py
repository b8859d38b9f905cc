"""The compiled norm-modulate-SiLU against PyTorch's own operations, values and gradients."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F

from diffusionact.training.models import fused_norm

pytestmark = [pytest.mark.torch, pytest.mark.slow]  # compiling takes half a minute

FLOAT32 = 2e-5  # sums in another order
BFLOAT16 = 2e-2  # one rounding of the result: half a unit in the last place of values up to 4


@pytest.fixture(scope="module", autouse=True)
def _compiled() -> None:
    if shutil.which("g++") is None and shutil.which("c++") is None:
        pytest.skip("no C++ compiler here")
    assert fused_norm.enable(), "there is a compiler, so the operation must build"


def reference(x: torch.Tensor, scale: torch.Tensor, shift: torch.Tensor) -> torch.Tensor:
    n = F.group_norm(x.float(), 8, eps=1e-5)
    return F.silu(n * scale[:, :, None, None] + shift[:, :, None, None])


@pytest.mark.parametrize(
    ("dtype", "tolerance"), [(torch.float32, FLOAT32), (torch.bfloat16, BFLOAT16)]
)
def test_values_and_gradients(dtype: torch.dtype, tolerance: float) -> None:
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 16, 5, 7, generator=generator).to(dtype).requires_grad_()
    rows = [torch.randn(3, 16, generator=generator).requires_grad_() for _ in range(2)]
    grad = torch.randn(3, 16, 5, 7, generator=generator).to(dtype)
    seen = fused_norm.norm_silu(x, *rows, 8, 1e-5)
    wanted = reference(x, *rows)
    assert seen.dtype == dtype
    assert (seen.float() - wanted).abs().max() < tolerance
    ours = torch.autograd.grad(seen, (x, *rows), grad)
    theirs = torch.autograd.grad(wanted, (x, *rows), grad.float())
    for a, b in zip(ours, theirs, strict=True):
        assert (a.float() - b.float()).abs().max() < tolerance * max(1.0, float(b.abs().max()))


@pytest.mark.parametrize("size", [50.0, 88.0, 120.0, 1e4])
def test_large_negative_inputs_do_not_overflow(size: float) -> None:
    x = torch.randn(1, 8, 4, 4, requires_grad=True)
    shift = torch.full((1, 8), -size)
    y = fused_norm.norm_silu(x, torch.ones(1, 8), shift, 8, 1e-5)
    y.sum().backward()  # type: ignore[no-untyped-call]
    assert bool(y.isfinite().all()) and x.grad is not None and bool(x.grad.isfinite().all())


def test_a_killed_build_keeps_nobody_waiting(tmp_path: Path) -> None:
    """What it left is passed by, and what is built is found again without a compiler."""
    left = tmp_path / "fused_norm" / ".part-killed"
    left.mkdir(parents=True)
    (left / "lock").touch()
    code = "from diffusionact.training.models import fused_norm as f; assert f.enable()"
    for path in (os.environ["PATH"], str(tmp_path)):
        environment = {**os.environ, "DIFFUSIONACT_CACHE": str(tmp_path), "PATH": path}
        subprocess.run([sys.executable, "-c", code], env=environment, check=True, timeout=280)
    (made,) = (tmp_path / "fused_norm").glob("*.so")
    assert sorted((tmp_path / "fused_norm").iterdir()) == [left, made]
