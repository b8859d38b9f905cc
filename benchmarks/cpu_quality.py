"""How far lower precision and approximations are from fp32, on the trained model, and how fast.

    python -m benchmarks.cpu_quality --json benchmarks/results/cpu_quality.json

Every shipped portrait follows frames of the shipped driver. The reference is ONNX Runtime in fp32.
A variant renders twice: from the reference's own x_T (the render alone), and from an x_T that it
inverted itself (all of it). Variants take turns frame by frame, so that what disturbs the machine
disturbs all of them alike. `--bundle` takes another trained model.
"""

from __future__ import annotations

import argparse
import json
import logging
import statistics
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from diffusionact import bundle_path, driver_path, machine, manifest, portrait_paths
from diffusionact.evaluation.metrics import psnr
from diffusionact.files import write_whole
from diffusionact.landmarks import Landmarks, Track
from diffusionact.runtime.loop import Approximation
from diffusionact.runtime.openvino import PRECISIONS
from diffusionact.runtime.reenactor import Reenactor
from diffusionact.runtime.settings import Settings

Picture = NDArray[np.uint8]
Variant = tuple[str, str, Approximation | None]

REFERENCE: Variant = ("ort", "fp32", None)
CHOICES: tuple[Approximation | None, ...] = (None, "reuse")
VARIANTS: tuple[Variant, ...] = (
    REFERENCE,
    *(("openvino", precision, how) for precision in PRECISIONS for how in CHOICES),
)


def measure(bundle: Path, steps: int, portraits: int, frames: int, threads: int) -> dict[str, Any]:
    """Return the figures of all variants at one number of steps."""
    driver = Track.load(driver_path().with_suffix(".landmarks.npz"))
    motions = [driver[i] for i in np.linspace(0, len(driver) - 1, frames).round().astype(int)]
    rows: dict[str, list[dict[str, float]]] = {_name(variant): [] for variant in VARIANTS}
    with ExitStack() as stack:
        acts = {
            variant: stack.enter_context(
                Reenactor.load(bundle, device="cpu", settings=_settings(variant, steps, threads))
            )
            for variant in VARIANTS
        }
        for path in portrait_paths()[:portraits]:
            _one_portrait(path, acts, motions, rows)
    return {
        "steps": steps,
        "frames": len(rows[_name(REFERENCE)]),
        "variants": {name: _summary(found) for name, found in rows.items()},
    }


def _one_portrait(
    path: Path,
    acts: dict[Variant, Reenactor],
    motions: Sequence[Landmarks | None],
    rows: dict[str, list[dict[str, float]]],
) -> None:
    picture = cv2.imread(str(path))
    face = Track.load(path.with_suffix(".landmarks.npz"))[0]
    if picture is None or face is None:
        raise SystemExit(f"{path}: not a portrait with landmarks")
    portrait = picture.astype(np.uint8)
    due = acts[REFERENCE].prepare(portrait, landmarks=face)
    sources = {
        variant: (
            act.prepare(portrait, landmarks=face, x_T=due.x_T),
            act.prepare(portrait, landmarks=face),
        )
        for variant, act in acts.items()
    }
    session = acts[REFERENCE].session(due)
    for number, motion in enumerate(motions):
        target = session.target(motion)
        wanted = acts[REFERENCE].render(target, due).crop
        for variant, act in acts.items():
            given, own = sources[variant]
            result = act.render(target, given)
            row = {
                "ms": (result.times["encode"] + result.times["render"]) / 1e6,
                "psnr_db": psnr(wanted, result.crop),
                "worst": _worst(wanted, result.crop),
                "all_psnr_db": psnr(wanted, act.render(target, own).crop),
            }
            if number:  # the first warms up
                rows[_name(variant)].append(row)


def _summary(rows: Sequence[dict[str, float]]) -> dict[str, float | None]:
    """Medians, and the least favourable frame; None: not one frame differs."""

    def column(name: str) -> list[float]:
        return [row[name] for row in rows]

    def finite(value: float) -> float | None:
        return round(value, 2) if np.isfinite(value) else None

    return {
        "ms": round(statistics.median(column("ms")), 2),
        "psnr_db": finite(statistics.median(column("psnr_db"))),
        "least_psnr_db": finite(min(column("psnr_db"))),
        "worst_of_255": max(column("worst")),
        "with_own_inversion_psnr_db": finite(statistics.median(column("all_psnr_db"))),
        "with_own_inversion_least_psnr_db": finite(min(column("all_psnr_db"))),
    }


def _worst(a: Picture, b: Picture) -> float:
    return float(np.abs(a.astype(int) - b.astype(int)).max())


def _settings(variant: Variant, steps: int, threads: int) -> Settings:
    backend, precision, approximate = variant
    return Settings(
        steps=steps, backend=backend, precision=precision, approximate=approximate, threads=threads
    )


def _name(variant: Variant) -> str:
    return " ".join(word for word in variant if word)


def table(results: Sequence[dict[str, Any]]) -> str:
    """Return the figures as Markdown."""
    lines = [
        "| T | variant | ms a frame | times as fast | PSNR dB, median (least) | worst of 255 | "
        "with its own inversion |",
        "| --- | --- | --- | --- | --- | --- | --- |",
    ]
    for result in results:
        slowest = result["variants"][_name(REFERENCE)]["ms"]
        for name, row in result["variants"].items():
            shown = [
                "equal" if row[key] is None else f"{row[key]:.1f}"
                for key in ("psnr_db", "least_psnr_db", "with_own_inversion_psnr_db",
                            "with_own_inversion_least_psnr_db")
            ]  # fmt: skip
            lines.append(
                f"| {result['steps']} | {name} | {row['ms']:.1f} | {slowest / row['ms']:.2f} | "
                f"{shown[0]} ({shown[1]}) | {row['worst_of_255']:.0f} | {shown[2]} ({shown[3]}) |"
            )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description="Quality and speed of precisions on a CPU.")
    add = parser.add_argument
    add("--bundle", type=Path, default=Path(bundle_path()), help="trained (default: shipped)")
    add("--steps", help="counts, between commas (default: those of the bundle)")
    add("--portraits", type=int, default=4)
    add("--frames", type=int, default=9, help="of the driver, for each portrait")
    add("--threads", type=int, default=0)
    add("--json", type=Path)
    given = parser.parse_args()
    logging.getLogger("diffusionact").setLevel(logging.ERROR)
    before = machine.load_average()
    counts = given.steps.split(",") if given.steps else manifest.read(given.bundle).render.counts
    results = [
        measure(given.bundle, int(steps), given.portraits, given.frames, given.threads)
        for steps in counts
    ]
    figures = {
        "machine": machine.describe_briefly(machine.describe()),
        "versions": machine.versions(),
        "commit": machine.commit(),
        "load_average": [before, machine.load_average()],
        "threads": given.threads,
        "results": results,
    }
    print(table(results))
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        write_whole(given.json, json.dumps(figures, indent=1) + "\n")


if __name__ == "__main__":
    main()
