"""Which backend runs a bundle on the GPU that is here."""

from __future__ import annotations

import importlib
from pathlib import Path

from diffusionact.errors import DeviceError, DiffusionActError
from diffusionact.manifest import Manifest
from diffusionact.runtime import cuda
from diffusionact.runtime.component import BACKENDS, precisions

# The fastest first. ONNX Runtime's networks cannot be recorded into a graph of ours, so it is only
# taken where the GPU was asked for and nothing else runs on it.
ORDER = ("trt", "torch", "ort")


def gpu_backend(bundle_dir: Path, manifest: Manifest, precision: str, asked: bool) -> str | None:
    """Return the backend to take on the GPU, or None where it was not asked for and none is usable.

    asked: for the GPU, by name; then ONNX Runtime will do, and the CPU never does.

    Raises: DeviceError when the GPU was asked for, saying why each backend does not run on it.
    """
    reason = cuda.why_not()
    if reason is not None:
        if asked:
            raise DeviceError(f"device 'cuda': {reason}")
        return None
    why = []
    for name in ORDER if asked else ORDER[:2]:
        problem = _problem(name, bundle_dir, manifest, precision)
        if problem is None:
            return name
        why.append(f"{name}: {problem}")
    if asked:
        raise DeviceError(f"device 'cuda': no backend runs this bundle on it: {'; '.join(why)}")
    return None


def _problem(name: str, bundle_dir: Path, manifest: Manifest, precision: str) -> str | None:
    try:
        module = importlib.import_module(BACKENDS[name])
        known = precisions(module, "cuda")
        if precision not in ("auto", *known):
            return f"computes in {', '.join(known)}, not in {precision}"
        told: str | None = module.problem("cuda")
        if told is None and hasattr(module, "cannot_run"):
            rounding = known[0] if precision == "auto" else precision
            told = module.cannot_run(bundle_dir, manifest, rounding)
    except DiffusionActError as error:
        return str(error)
    return told
