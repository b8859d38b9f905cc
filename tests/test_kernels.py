"""The CUDA kernels: that nvcc takes them, and that their arithmetic is that of their NumPy twins.

The second needs no GPU: the host's C++ compiler builds the same file, with CUDA's words defined
away, and a loop stands in for the grid. Rounding is IEEE on both sides, so equality is exact.
"""

from __future__ import annotations

import ctypes
import re
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusionact.image import to_tensor, to_uint8
from diffusionact.runtime import kernel_code
from diffusionact.runtime.device import KERNELS
from diffusionact.schedule import Prediction, alpha_bars, ddim_step, inversion_run, render_run

FOLDER = Path(__file__).parent.parent / "runtime" / "kernels"
ENTRIES = {
    file: tuple(name for name, holder in KERNELS.items() if holder == file)
    for file in KERNELS.values()
}
BLOCK = 32  # threads; the counts below are no multiple of it, so the bounds checks work too

HOST_CUDA = """
#include <math.h>
#define __global__
#define __device__
#define __forceinline__ inline
struct Dim {{ int x; }};
static Dim blockIdx, blockDim, threadIdx;
#include "{source}"
extern "C" void {entry}_grid({parameters}) {{
  blockDim.x = {block};
  for (blockIdx.x = 0; blockIdx.x * blockDim.x < count; ++blockIdx.x)
    for (threadIdx.x = 0; threadIdx.x < blockDim.x; ++threadIdx.x)
      {entry}({arguments}, count);
}}
"""


def on_host(folder: Path, stem: str, entry: str, *parameters: str) -> Any:
    """Return the kernel as a C function that takes `parameters` and the count."""
    compiler = shutil.which("c++") or shutil.which("g++") or shutil.which("clang++")
    if compiler is None:
        pytest.skip("no C++ compiler on this machine")
    source, library = folder / f"{entry}.cpp", folder / f"{entry}.so"
    source.write_text(
        HOST_CUDA.format(
            source=FOLDER / f"{stem}.cu",
            entry=entry,
            parameters=", ".join((*parameters, "int count")),
            arguments=", ".join(p.split()[-1] for p in parameters),
            block=BLOCK,
        )
    )
    command = [compiler, "-shared", "-fPIC", "-O1", "-ffp-contract=off", "-o", library, source]
    subprocess.run(command, check=True, capture_output=True)
    return getattr(ctypes.CDLL(str(library)), f"{entry}_grid")


def pointer(array: np.ndarray[Any, Any]) -> ctypes.c_void_p:
    return ctypes.c_void_p(array.ctypes.data)


def test_the_folder_holds_the_kernels_named_here() -> None:
    assert {path.stem for path in FOLDER.glob("*.cu")} == set(ENTRIES)
    for file, names in ENTRIES.items():
        entries = re.findall(
            r'extern "C" __global__ void (\w+)', (FOLDER / f"{file}.cu").read_text()
        )
        assert sorted(entries) == sorted(names)


@pytest.mark.parametrize("stem", ENTRIES)
def test_nvcc_compiles_and_the_entries_are_there(stem: str, tmp_path: Path) -> None:
    nvcc = shutil.which("nvcc")
    if nvcc is None:
        pytest.skip("no nvcc on this machine")
    (tmp_path / "probe.cu").write_text("__global__ void probe() {}\n")
    probe = [nvcc, "--fatbin", "-o", tmp_path / "probe.fatbin", tmp_path / "probe.cu"]
    refused = subprocess.run(probe, capture_output=True, text=True)
    if refused.returncode:
        pytest.skip(f"nvcc does not work here: {refused.stderr.strip()}")
    fatbin = tmp_path / f"{stem}.fatbin"
    # Uncompressed, or the names could not be read from the file.
    build = [nvcc, "--fatbin", "--no-compress", "-Werror=all-warnings", "--fmad=false"]
    subprocess.run([*build, "-o", fatbin, FOLDER / f"{stem}.cu"], check=True)
    code = fatbin.read_bytes()
    for entry in ENTRIES[stem]:
        assert b".text." + entry.encode() + b"\0" in code, f"{entry} is no entry of {stem}.fatbin"


def test_pack_is_to_tensor(tmp_path: Path) -> None:
    pack = on_host(tmp_path, "pack", "pack", "unsigned char* picture", "float* x")
    picture = np.random.default_rng(1).integers(0, 256, (13, 21, 3), np.uint8)
    picture.flat[:256] = np.arange(256)  # every value there is
    x = np.zeros((1, 3, 13, 21), np.float32)
    pack(pointer(picture), pointer(x), 13 * 21)
    np.testing.assert_array_equal(x, to_tensor(picture))


def test_unpack_is_to_uint8(tmp_path: Path) -> None:
    unpack = on_host(tmp_path, "pack", "unpack", "float* x", "unsigned char* picture")
    x = np.random.default_rng(2).uniform(-1.5, 1.5, (1, 3, 13, 21)).astype(np.float32)
    x.flat[:4] = (-1.0, 1.0, 0.0, -1e9)
    picture = np.full((13, 21, 3), 77, np.uint8)
    unpack(pointer(x), pointer(picture), 13 * 21)
    np.testing.assert_array_equal(picture, to_uint8(x))


@pytest.mark.parametrize("direction", ["render", "invert"])
@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
def test_ddim_step_is_the_schedules(kind: Prediction, direction: str, tmp_path: Path) -> None:
    step = on_host(
        tmp_path, "ddim_step", "ddim_step",
        "float* x", "float* prediction", "Step* table", "int* step",
    )  # fmt: skip
    make = render_run if direction == "render" else inversion_run
    run = make(kind, [0, 250, 500, 750], alpha_bars())
    table = np.array([s[1:] for s in run.steps], np.float32)
    rng = np.random.default_rng(3)
    x = rng.standard_normal(1000).astype(np.float32)
    for row, coefficients in enumerate(run.steps):
        prediction = rng.standard_normal(1000).astype(np.float32)
        level, level_to = run.alpha_bar[coefficients.row], run.alpha_bar_to[coefficients.row]
        wanted = ddim_step(kind, x, prediction, level, level_to)
        step(pointer(x), pointer(prediction), pointer(table), ctypes.byref(ctypes.c_int(row)), 1000)
        np.testing.assert_array_equal(x, wanted)


def test_start_copies_and_counts_from_zero(tmp_path: Path) -> None:
    start = on_host(tmp_path, "steps", "start", "float* x", "float* x_T", "int* step")
    x_T = np.random.default_rng(4).standard_normal(1000).astype(np.float32)
    x, step = np.zeros_like(x_T), ctypes.c_int(7)
    start(pointer(x), pointer(x_T), ctypes.byref(step), 1000)
    np.testing.assert_array_equal(x, x_T)
    assert step.value == 0


def test_take_row_takes_the_row_of_the_step(tmp_path: Path) -> None:
    take_row = on_host(
        tmp_path, "steps", "take_row",
        "float* scales", "float* shifts", "int* rows", "int* step", "float* scale", "float* shift",
    )  # fmt: skip
    rng = np.random.default_rng(5)
    scales, shifts = (rng.standard_normal((4, 77)).astype(np.float32) for _ in range(2))
    rows = np.array([3, 1, 2, 0], np.int32)
    scale, shift = np.zeros(77, np.float32), np.zeros(77, np.float32)
    for step, row in enumerate(rows):
        take_row(
            pointer(scales), pointer(shifts), pointer(rows), ctypes.byref(ctypes.c_int(step)),
            pointer(scale), pointer(shift), 77,
        )  # fmt: skip
        np.testing.assert_array_equal(scale, scales[row])
        np.testing.assert_array_equal(shift, shifts[row])


def test_next_step_counts_one_step(tmp_path: Path) -> None:
    next_step = on_host(tmp_path, "steps", "next_step", "int* step")
    steps = (ctypes.c_int * 3)(4, 5, 6)
    next_step(steps, 1)
    assert list(steps) == [5, 5, 6]


@pytest.mark.parametrize("target", ["sm_75", "sm_80", "sm_86", "sm_89", "sm_90", "sm_120"])
@pytest.mark.parametrize("stem", ENTRIES)
def test_nvrtc_compiles_for_every_generation(stem: str, target: str) -> None:
    pytest.importorskip("cuda.bindings.nvrtc")
    code = kernel_code.compiled(stem, (FOLDER / f"{stem}.cu").read_bytes(), target)
    assert code[:4] == b"\x7fELF"
    for entry in ENTRIES[stem]:
        assert b".text." + entry.encode() + b"\0" in code
