"""The candidates of runtime/choice.py, rendering the same frame in turn: how long, and how alike.

    python -m diffusionact.runtime.trial BUNDLE THREADS

prints one line of JSON. A process of its own, for what crashes takes its process along.
"""

from __future__ import annotations

import importlib
import json
import statistics
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from diffusionact.assets import portrait_paths
from diffusionact.condition import draw_condition
from diffusionact.errors import BackendMissing, DiffusionActError
from diffusionact.image import bgr_to_rgb, to_tensor, warp_crop
from diffusionact.landmarks import Track, crop_matrix
from diffusionact.manifest import Manifest
from diffusionact.manifest import read as read_manifest
from diffusionact.runtime.component import BACKENDS, precisions
from diffusionact.runtime.loop import AnyLoop, Approximation, open_loop
from diffusionact.runtime.media import read_image

Float32Array: TypeAlias = npt.NDArray[np.float32]

Candidate: TypeAlias = tuple[str, str, Approximation | None]

CANDIDATES = ("openvino", "ort")  # torch needs weights that a bundle has not
REFERENCE = ("ort", "fp32")  # its frame is what others are held to
BUDGET_S = 1.0  # of timed frames, over all candidates
ROUNDS = 15  # of them at most
STEPS = 8  # of a timed frame at most
LARGE_BYTES, LARGE_STEPS = 100 * 10**6, 4  # a step of such a network takes about a second
EQUAL_DB = 999.0  # stands for infinity, which JSON has not


@dataclass(frozen=True)
class Measured:
    """A candidate: milliseconds a step, and how far its frame is from fp32's in ONNX Runtime."""

    backend: str
    precision: str
    approximate: str = ""
    step_ms: float = 0.0  # median
    psnr_db: float = 0.0  # of pictures in [-1, 1]; infinite values are stored as 999
    worst: float = 0.0  # the largest difference of a value, of 255
    error: str = ""  # why it cannot be used

    @property
    def name(self) -> str:
        return " ".join(filter(None, (self.backend, self.precision, self.approximate)))


def candidates(large: bool = False) -> list[Candidate]:
    """Return backend, precision and approximation of what runs on this CPU, the reference last.

    large: of each backend the best precision only, for each takes seconds to open.
    """
    found: list[Candidate] = []
    for backend in CANDIDATES:
        try:
            module = importlib.import_module(BACKENDS[backend])
        except BackendMissing:
            continue
        known = precisions(module, "cpu")[: 1 if large else None]
        found += [(backend, precision, None) for precision in known]
        if hasattr(module, "open_reusing"):
            found.append((backend, known[0], "reuse"))
    return found


def measure(bundle_dir: Path, threads: int) -> list[Measured]:
    """Return all candidates, measured in this process, in turns."""
    manifest = read_manifest(bundle_dir, verify=False)
    large = is_large(bundle_dir, manifest)
    steps = manifest.render.steps
    if manifest.student_of is None:  # a student takes few, and no other count
        steps = LARGE_STEPS if large else min(steps, STEPS)
    loops: dict[Candidate, AnyLoop] = {}
    errors: dict[Candidate, str] = {}
    for one in candidates(large):
        backend, precision, approximate = one
        try:
            loops[one] = open_loop(
                bundle_dir, manifest, steps=steps, backend=backend, device="cpu",
                precision=precision, approximate=approximate, threads=threads,
            )  # fmt: skip
        except DiffusionActError as error:
            errors[one] = str(error)
    x_T, image, condition = fixed_input(manifest)
    # The first frame warms up, and is the one that is looked at.
    frames = {one: _frame(loop, x_T, image, condition) for one, loop in loops.items()}
    spent = _timed(list(loops.values()), x_T, image, condition)
    reference = frames[(*REFERENCE, None)]
    done = [
        Measured(backend, precision, approximate or "", taken / steps, *_apart(frame, reference))
        for ((backend, precision, approximate), frame), taken in zip(
            frames.items(), spent, strict=True
        )
    ]
    lost = [
        Measured(backend, precision, approximate or "", error=error)
        for (backend, precision, approximate), error in errors.items()
    ]
    return done + lost


def is_large(bundle_dir: Path, manifest: Manifest) -> bool:
    """Return whether the step network is so large that measuring takes long."""
    return (bundle_dir / manifest.components["unet_step"].file).stat().st_size > LARGE_BYTES


def fixed_input(manifest: Manifest) -> tuple[Float32Array, Float32Array, Float32Array]:
    """Return noise from a seed, the first shipped portrait, and the drawing of the second's face,
    each float32 [1,3,S,S]: about what a trained network is given."""
    side, how = manifest.image_size, manifest.crop
    paths = portrait_paths()
    tracks = [Track.load(path.with_suffix(".landmarks.npz")) for path in paths[:2]]
    faces = [face for track in tracks if (face := track[0]) is not None]
    matrices = [crop_matrix(face.points, side, how.rotate, how.scale) for face in faces]
    picture = read_image(paths[0])
    canvas = np.zeros((side, side, 3), np.uint8)
    draw_condition(faces[1].transformed(matrices[1]), side, manifest.drawing, canvas)
    noise = np.random.default_rng(0).standard_normal((1, 3, side, side), np.float32)
    crop = warp_crop(bgr_to_rgb(picture), matrices[0], side)
    return noise, to_tensor(crop), to_tensor(canvas)


def _frame(loop: AnyLoop, x_T: Float32Array, image: Float32Array, to: Float32Array) -> Float32Array:
    return loop.render(x_T, loop.encode(image, to)).copy()


def _timed(
    loops: Sequence[AnyLoop], x_T: Float32Array, image: Float32Array, condition: Float32Array
) -> list[float]:
    """Median milliseconds of a render by each loop, taken in turns for about `BUDGET_S`."""
    codes = [loop.encode(image, condition) for loop in loops]
    spent: list[list[float]] = [[] for _ in loops]
    begun = time.perf_counter()
    for _ in range(ROUNDS):
        for loop, z, times in zip(loops, codes, spent, strict=True):
            start = time.perf_counter()
            loop.render(x_T, z)
            times.append((time.perf_counter() - start) * 1e3)
        if time.perf_counter() - begun > BUDGET_S:
            break
    return [statistics.median(times) for times in spent]


def _apart(frame: Float32Array, reference: Float32Array) -> tuple[float, float]:
    """PSNR in dB and the largest difference of 255, of pictures in [-1, 1]."""
    error = frame.astype(np.float64) - reference
    square = float(np.mean(error**2))
    psnr_db = min(10 * np.log10(4.0 / square), EQUAL_DB) if square else EQUAL_DB
    return float(psnr_db), float(np.abs(error).max() * 127.5)


if __name__ == "__main__":
    folder, count = sys.argv[1:]
    print(json.dumps([asdict(one) for one in measure(Path(folder), int(count))]))
