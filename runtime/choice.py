"""Which backend and precision run a bundle here: what was asked for, and what "auto" means."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from diffusionact.manifest import Manifest


@dataclass(frozen=True)
class Choice:
    """What runs the networks. precision: "auto" is the backend's best."""

    backend: str
    precision: str


def choose(
    bundle_dir: Path,
    manifest: Manifest,
    *,
    backend: str = "auto",
    precision: str = "auto",
    device: str = "auto",
    threads: int = 0,
) -> Choice:
    """Return the backend and precision for a bundle on this machine.

    What the caller names is taken; backend "auto" is ONNX Runtime.
    """
    return Choice("ort" if backend == "auto" else backend, precision)
