"""What ships with the package: the model, portraits and a driving clip, all rendered by us."""

from __future__ import annotations

from pathlib import Path

_HERE = Path(__file__).resolve().parent


def bundle_path() -> Path:
    """Return the folder of the shipped model, where a bundle is left out."""
    return _HERE / "face.bundle"


def portrait_paths() -> tuple[Path, ...]:
    """Return the shipped portraits (.png), sorted; NAME.landmarks.npz lies beside each."""
    return tuple(sorted((_HERE / "portraits").glob("*.png")))


def driver_path() -> Path:
    """Return the shipped driving clip; driver.landmarks.npz lies beside it."""
    return _HERE / "driver.mp4"


def judge_path() -> Path:
    """Return the network that reads rendered faces, for `diffusionact eval`."""
    return _HERE / "judge.onnx"


def benchmark_path() -> Path:
    """Return the rendered people that `diffusionact eval` measures a model on."""
    return _HERE / "benchmark.npz"
