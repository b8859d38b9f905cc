"""The engines of a bundle: which may be run, and which are damaged. Needs neither TensorRT nor a
GPU."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

from diffusionact import engine_files, trt_library
from diffusionact.engine_files import Gpu, State
from diffusionact.errors import DeviceError, DiffusionActError
from diffusionact.manifest import Manifest
from diffusionact.runtime.cuda import gpu_to_build_for
from diffusionact.runtime.doctor.finding import Finding, found

# What cannot be run because it was made for something else is no damage.
PASSED: Mapping[State, bool | None] = {"valid": True, "stale": None, "foreign": None}


def findings(bundle_dir: Path, manifest: Manifest) -> Iterator[Finding]:
    """Yield one finding for each engine; a damaged one fails."""
    try:
        gpu: Gpu | None = gpu_to_build_for()
    except DeviceError:
        gpu = None
    versions = _versions()
    paths = list(engine_files.engine_paths(bundle_dir))
    if not paths:
        what = "none; TensorRT would need them" if gpu else "none; they are for a GPU only"
        yield Finding("engines", None, what, f"diffusionact build {bundle_dir}" if gpu else "")
    for path in paths:
        judged = engine_files.judge(bundle_dir, path, manifest, gpu, versions)
        subject = f"engine {path.stem}"
        if judged.state == "valid" and judged.manifest is not None:
            yield Finding(subject, True, _told(judged.manifest))
        else:
            passed = PASSED.get(judged.state, False)
            yield found(subject, passed, f"{judged.state.upper()}: {judged.reason}")


def _told(manifest: engine_files.EngineManifest) -> str:
    key, parity = manifest.key, manifest.parity
    place = key.gpu or ", ".join(key.targets)
    far = f"{parity.max_error:.1e} from fp32 on {parity.gpu}" if parity else "never run"
    return f"{key.precision} for {place}, {manifest.plan_bytes / 1e6:.1f} MB, as built; {far}"


def _versions() -> dict[str, str]:
    """Those of the libraries that are installed and load."""
    made = {}
    for name in trt_library.installed():
        try:
            made[name] = trt_library.find(name).version
        except DiffusionActError:
            continue
    return made
