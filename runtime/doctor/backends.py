"""Which backends load, on what, and whether a stored frame comes out of each as it should."""

from __future__ import annotations

import importlib
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from diffusionact import driver_path, portrait_paths
from diffusionact.condition import draw_condition
from diffusionact.errors import BackendMissing, DeviceError, DiffusionActError
from diffusionact.image import bgr_to_rgb, to_tensor, warp_crop
from diffusionact.landmarks import Track, crop_matrix
from diffusionact.manifest import Manifest
from diffusionact.runtime import cuda
from diffusionact.runtime.choice import explain
from diffusionact.runtime.component import BACKENDS, precisions
from diffusionact.runtime.doctor.finding import Finding, found
from diffusionact.runtime.gpu_choice import gpu_backend
from diffusionact.runtime.loop import Float32Array, open_loop

FRAMES = 3  # timed on each backend, after one that is not
DRIVER_FRAME = 40  # of the shipped track: the head is turned, the mouth open
REFERENCE = ("ort", "cpu", "fp32")
NEEDED = ("ort",)  # the product's own dependency; the others are extras
LEVELS = 127.5  # of 8 bits in a picture's [-1, 1]
# How far a frame may be from the reference, in levels of 255, the mean over all pixels. fp32 is
# another order of sums. On the shipped model fp16 was 0.012 (rounded by hand) and bf16 0.2 to 0.4;
# the rest is room for networks of more steps.
ALLOWED = {"fp32": 0.02, "fp16": 0.2, "bf16": 1.5, "int8": 3.0, "fp8": 3.0}


@dataclass(frozen=True)
class Way:
    """One way to run the networks."""

    backend: str
    device: str
    precision: str

    def __str__(self) -> str:
        return f"{self.backend} {self.device} {self.precision}"


@dataclass(frozen=True)
class _Frame:
    """What goes into a frame, each float32 [1,3,S,S]."""

    x_T: Float32Array
    image: Float32Array
    condition: Float32Array


def loading() -> Iterator[tuple[Finding, tuple[Way, ...]]]:
    """Yield each backend: whether it loads, and the ways in which it runs here."""
    for name, module_name in BACKENDS.items():
        subject = f"backend {name}"
        try:
            module = importlib.import_module(module_name)
        except BackendMissing as error:
            yield found(subject, False if name in NEEDED else None, error), ()
            continue
        problems = {device: _problem(module, device) for device in module.DEVICES}
        usable = [device for device, problem in problems.items() if problem is None]
        ways = [Way(name, d, p) for d in usable for p in precisions(module, d)]
        told = [", ".join(f"{way.device} {way.precision}" for way in ways)] if ways else []
        told += [f"not on {device}: {problem}" for device, problem in problems.items() if problem]
        yield found(subject, True if usable else None, "; ".join(told)), tuple(ways)


def _problem(module: Any, device: str) -> str | None:
    """Why a backend does not run on a device here; None if it may."""
    if hasattr(module, "problem"):
        told: str | None = module.problem(device)
        return told
    return cuda.why_not() if device == "cuda" else None


def defaults(bundle_dir: Path, manifest: Manifest) -> Iterator[Finding]:
    """Yield what "auto" runs this bundle on: on the GPU, if one answers, and on the CPU, and why."""
    if cuda.why_not() is None:
        try:
            name = gpu_backend(bundle_dir, manifest, "auto", asked=True)
            yield Finding("default on the GPU", None, str(name))
        except DiffusionActError as error:
            yield found("default on the GPU", None, error)
    try:
        told = explain(bundle_dir, manifest)
    except DiffusionActError as error:
        yield found("default on the CPU", False, error)
        return
    yield Finding("default on the CPU", None, "; ".join(s.strip() for s in told.splitlines()))


def parity(bundle_dir: Path, manifest: Manifest, ways: tuple[Way, ...]) -> Iterator[Finding]:
    """Yield, for each way, how far a stored frame is from fp32 on the CPU, and whether it comes out
    the same each time."""
    frame = _stored(manifest)
    reference: Float32Array | None = None
    for way in sorted(ways, key=lambda w: (w.backend, w.device, w.precision) != REFERENCE):
        try:
            first, last, spent_ms = _rendered(bundle_dir, manifest, way, frame)
        except (BackendMissing, DeviceError) as error:
            yield found(f"parity {way}", None, error)
            continue
        except DiffusionActError as error:  # of optional parts, such as weights or engines
            failed = None if way.backend not in NEEDED else False
            yield found(f"parity {way}", failed, error)
            continue
        if reference is None and (way.backend, way.device, way.precision) == REFERENCE:
            reference = first
        yield _repeated(way, first, last, spent_ms)
        if reference is not None:
            yield _compared(way, first, reference)


def _repeated(way: Way, first: Float32Array, last: Float32Array, spent_ms: float) -> Finding:
    subject = f"repeatability {way}"
    if not np.isfinite(first).all():
        return Finding(subject, False, "WRONG: the picture is not finite", _OTHER)
    far = float(np.abs(last - first).max())
    what = "the same picture each time" if far == 0.0 else f"WRONG: pictures differ by {far:.1e}"
    return Finding(subject, far == 0.0, f"{what}, {spent_ms:.1f} ms each", _OTHER if far else "")


def _compared(way: Way, seen: Float32Array, due: Float32Array) -> Finding:
    apart = np.abs(seen.astype(np.float64) - due) * LEVELS
    mean, allowed = float(apart.mean()), ALLOWED[way.precision]
    told = f"mean {mean:.3f} levels of 255 from fp32, {allowed} allowed, max {apart.max():.2f}"
    passed = mean <= allowed
    return Finding(f"parity {way}", passed, told, "" if passed else _OTHER)


def _rendered(
    bundle_dir: Path, manifest: Manifest, way: Way, frame: _Frame
) -> tuple[Float32Array, Float32Array, float]:
    """The same picture rendered twice, and milliseconds for each."""
    loop = open_loop(
        bundle_dir, manifest, backend=way.backend, device=way.device, precision=way.precision
    )
    first = loop.render(frame.x_T, loop.encode(frame.image, frame.condition)).copy()
    start_ns = time.perf_counter_ns()
    for _ in range(FRAMES):
        last = loop.render(frame.x_T, loop.encode(frame.image, frame.condition))
    return first, last.copy(), (time.perf_counter_ns() - start_ns) / 1e6 / FRAMES


def _stored(manifest: Manifest) -> _Frame:
    """A shipped portrait under the face of a frame of the shipped driver, from fixed noise."""
    path, side = portrait_paths()[0], manifest.image_size
    face = Track.load(path.with_suffix(".landmarks.npz"))[0]
    driver = Track.load(driver_path().with_suffix(".landmarks.npz"))[DRIVER_FRAME]
    assert face is not None and driver is not None, "shipped files"
    picture: Any = cv2.imread(str(path))
    how = manifest.crop
    crop = warp_crop(
        bgr_to_rgb(picture), crop_matrix(face.points, side, how.rotate, how.scale), side
    )
    drawn = driver.transformed(crop_matrix(driver.points, side, how.rotate, how.scale))
    canvas = np.zeros((side, side, 3), np.uint8)
    draw_condition(drawn, side, manifest.drawing, canvas)
    noise = np.random.default_rng(0).standard_normal((1, 3, side, side), np.float32)
    return _Frame(noise, to_tensor(crop), to_tensor(canvas))


_OTHER = "diffusionact run --backend ort --device cpu ..."
