"""What works here and what does not: versions, devices, backends, the tracker and a bundle."""

from __future__ import annotations

import importlib
import importlib.metadata
import json
import os
import platform
import shutil
import subprocess
import time
from collections.abc import Iterator
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path

import numpy as np

from diffusionact import __version__, manifest
from diffusionact.errors import BackendMissing, DiffusionActError
from diffusionact.manifest import Manifest
from diffusionact.runtime.component import BACKENDS
from diffusionact.runtime.loop import Float32Array, Loop, open_loop
from diffusionact.runtime.tracker import open_tracker

LIBRARIES = ("numpy", "opencv-python-headless", "onnxruntime", "av", "mediapipe", "torch", "onnx")
FRAMES = 3  # timed on each backend, after one that is not
PARITY_FILE = "parity.json"  # in a bundle: how far its graphs were from the weights, at export
NVIDIA_SMI_TIMEOUT_S = 10.0


@dataclass(frozen=True)
class Finding:
    """One line of the report. passed: None for what is only told."""

    subject: str
    passed: bool | None
    detail: str


def findings(bundle_dir: Path) -> Iterator[Finding]:
    """Yield the findings, one after the other as they are made; none raises."""
    yield Finding("diffusionact", None, f"{__version__}, Python {platform.python_version()}")
    for library in LIBRARIES:
        yield Finding(library, None, _version(library))
    yield Finding("cpu", None, f"{os.cpu_count()} threads, {platform.machine()}")
    yield Finding("gpu", None, _gpus())
    yield Finding("kernels", None, _kernels())
    backends = [_backend(name) for name in BACKENDS]
    yield from backends
    yield _tracker()
    try:
        found = manifest.read(bundle_dir)
    except DiffusionActError as error:
        yield Finding("bundle", False, str(error))
        return
    yield Finding("bundle", True, _describe(bundle_dir, found))
    yield from _parity(bundle_dir / PARITY_FILE)
    for name, backend in zip(BACKENDS, backends, strict=True):
        if backend.passed:
            yield _repeatability(bundle_dir, found, name)


def _version(library: str) -> str:
    try:
        return importlib.metadata.version(library)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _gpus() -> str:
    tool = shutil.which("nvidia-smi")
    if tool is None:
        return "none (no nvidia-smi)"
    query = [tool, "--query-gpu=name,driver_version,memory.total", "--format=csv,noheader"]
    try:
        done = subprocess.run(
            query, capture_output=True, text=True, timeout=NVIDIA_SMI_TIMEOUT_S, check=True
        )
    except (OSError, subprocess.SubprocessError) as error:
        return f"none that answers ({error})"
    return "; ".join(done.stdout.split("\n")).strip("; ") or "none"


def _kernels() -> str:
    folder = files("diffusionact.runtime").joinpath("kernels")
    names = sorted(entry.name for entry in folder.iterdir() if entry.name.endswith(".fatbin"))
    return ", ".join(names) or "not compiled (no nvcc at installation); needed on a GPU only"


def _backend(name: str) -> Finding:
    try:
        module = importlib.import_module(BACKENDS[name])
    except BackendMissing as error:
        return Finding(f"backend {name}", False, str(error))
    return Finding(f"backend {name}", True, f"on {', '.join(module.DEVICES)}")


def _tracker() -> Finding:
    try:
        open_tracker().close()
    except BackendMissing as error:
        return Finding("tracker", None, str(error))
    return Finding("tracker", True, "finds faces in pictures and videos")


def _describe(bundle_dir: Path, found: Manifest) -> str:
    return (
        f"{bundle_dir}: {found.name}, {found.image_size} px, {found.render.steps} steps, "
        f"weights {found.weights_sha256[:12]}, all hashes right"
    )


def _parity(path: Path) -> Iterator[Finding]:
    """What the export measured against the weights; nothing is run here."""
    if not path.is_file():
        yield Finding("parity", None, f"not recorded: the bundle has no {path.name}")
        return
    try:
        for row in json.loads(path.read_text(encoding="utf-8"))["rows"]:
            seen, allowed = (
                (float(row[f"max_{what}"]), float(row[f"mean_{what}"]))
                for what in ("error", "allowed")
            )
            yield Finding(
                f"parity {row['what']}",
                seen[0] <= allowed[0] and seen[1] <= allowed[1],
                f"at export: max {seen[0]:.1e} of {allowed[0]:.0e}, "
                f"mean {seen[1]:.1e} of {allowed[1]:.0e} allowed",
            )
    except (OSError, ValueError, KeyError, TypeError) as error:
        yield Finding("parity", False, f"{path}: not readable ({error!r}); export the bundle again")


def _repeatability(bundle_dir: Path, found: Manifest, backend: str) -> Finding:
    """Render one noise picture several times."""
    subject = f"repeatability {backend}"
    try:
        first, last, spent_ms = _render(open_loop(bundle_dir, found, backend=backend), found)
    except DiffusionActError as error:
        return Finding(subject, False, str(error))
    if not np.isfinite(first).all():
        return Finding(subject, False, "WRONG: the picture is not finite")
    far = float(np.abs(last - first).max())
    what = "the same picture each time" if far == 0.0 else f"WRONG: pictures differ by {far:.1e}"
    return Finding(subject, far == 0.0, f"{what}, {spent_ms:.1f} ms each")


def _render(loop: Loop, found: Manifest) -> tuple[Float32Array, Float32Array, float]:
    """Return the same picture rendered twice, and milliseconds for each."""
    rng = np.random.default_rng(0)
    shape = (1, 3, found.image_size, found.image_size)
    x_T = rng.standard_normal(shape, np.float32)
    image, condition = (rng.uniform(-1.0, 1.0, shape).astype(np.float32) for _ in range(2))
    first = loop.render(x_T, loop.encode(image, condition)).copy()
    start_ns = time.perf_counter_ns()
    for _ in range(FRAMES):
        last = loop.render(x_T, loop.encode(image, condition))
    return first, last.copy(), (time.perf_counter_ns() - start_ns) / 1e6 / FRAMES
