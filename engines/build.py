"""`diffusionact build`: an engine for every component of a bundle, each made in a child process."""

from __future__ import annotations

import logging
import os
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TypeAlias

from diffusionact import engine_files, trt_library
from diffusionact import manifest as manifest_file
from diffusionact.engine_files import Census, EngineKey, EngineManifest, Gpu, Parity
from diffusionact.engines import quantize
from diffusionact.engines.plan import PERCENT, Request
from diffusionact.engines.process import MORE_ROOM, run_child
from diffusionact.errors import DeviceError, EngineError, SettingsError
from diffusionact.manifest import ComponentSpec, Manifest
from diffusionact.progress import StageCallback

# An engine that can be run here, against the bundle's graph; None where it cannot.
Gate: TypeAlias = Callable[[EngineManifest, Path], Parity | None]

LEVELS = range(6)
BRIEF = 200  # characters of an error, in a warning
LEAST_WORKSPACE_MIB = 64
# Of a builder that ran out of memory, the GPU's or the machine's: the libraries' words, C++'s, and
# how Linux ends a process that takes too much.
_OUT_OF_MEMORY = (
    "out of memory", "outofmemory", "out_of_memory", "memoryallocation", "bad_alloc",
    "insufficient memory", "insufficient workspace", "signal 9",
)  # fmt: skip
log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Settings:
    """What to build.

    here: the GPU of this machine, if it has one; gpus: architectures to build for ahead of time;
    steps: step counts of render, the bundle's own if empty; force: build what is valid again;
    calibration: the folder of `quantize.write` for 8 bits, COMPONENT-KIND.json.
    """

    here: Gpu | None = None
    gpus: tuple[str, ...] = ()
    library: str | None = None
    precision: str = "fp16"
    level: int = 3
    workspace_mib: int = 4096
    steps: tuple[int, ...] = ()
    force: bool = False
    calibration: Path | None = None


@dataclass(frozen=True)
class Built:
    """One engine, new or found valid."""

    component: str
    path: Path
    new: bool
    manifest: EngineManifest

    @property
    def title(self) -> str:
        """The component, and the step count that it is for where it depends on one."""
        rows = self.manifest.key.shapes.get("time_rows")
        return f"{self.component} N={rows[0]}" if rows else self.component


def build(
    bundle_dir: Path,
    settings: Settings,
    progress: StageCallback | None = None,
    gate: Gate | None = None,
) -> Iterator[Built]:
    """Yield the engines of the bundle, one after the other as they are ready.

    gate: compares an engine with the bundle's graph; its result is stored beside the engine.

    Raises: BundleError, SettingsError; BackendMissing without TensorRT; DeviceError without a GPU
    and without `gpus`; EngineError when one cannot be built, written, or answers wrongly.
    """
    _check(settings)
    bundle_dir = Path(bundle_dir)
    manifest = manifest_file.read(bundle_dir)
    library = trt_library.find(_library(settings))
    keys = wanted_keys(manifest, settings, library.name, library.version)
    folder = engine_files.folder_to_write(bundle_dir)
    for key in keys:
        found = engine_files.find(bundle_dir, key)
        if found.path and found.manifest and not settings.force:
            yield Built(key.component, found.path, False, found.manifest)
            continue
        if found.state in ("truncated", "tampered") and found.path:
            _remove(found.path)
        path, made = _patiently(bundle_dir, manifest, key, settings, folder, progress)
        yield Built(key.component, path, True, _gated(made, path, gate))


def wanted_keys(
    manifest: Manifest, settings: Settings, library: str, version: str
) -> tuple[EngineKey, ...]:
    """Return the key of every engine that the bundle needs.

    The networks of a schedule have an engine for each step count.
    """
    target = settings.gpus or settings.here
    if target is None:
        raise DeviceError(
            "no GPU here to build for; name what the engines are for, as in --gpu sm_89,sm_120"
        )
    own = any(name.endswith("_invert") for name in manifest.components)
    render = settings.steps or (manifest.render.steps,)
    keys = []
    for name, part in manifest.components.items():
        inversion = () if own and not name.endswith("_invert") else (manifest.invert.steps,)
        counts = inversion if name.endswith("_invert") else (*render, *inversion)
        named = any(isinstance(size, str) for spec in part.inputs for size in spec.shape)
        for count in dict.fromkeys(counts if named else (1,)):
            key = engine_files.make_key(
                manifest,
                name,
                library=library,
                version=version,
                target=target,
                precision=settings.precision,
                sizes={"N": count},
                level=settings.level,
            )
            keys.append(_calibrated(key, settings))
    return tuple(keys)


def _calibrated(key: EngineKey, settings: Settings) -> EngineKey:
    path = _calibration(key, settings)
    if path is None:
        return key
    quantize.read(path, key.onnx_sha256, key.precision)
    return replace(key, calibration=manifest_file.file_sha256(path))


def _calibration(key: EngineKey, settings: Settings) -> Path | None:
    if key.precision not in quantize.KINDS or settings.calibration is None:
        return None
    return settings.calibration / f"{key.component}-{key.precision}.json"


def _quality_db(key: EngineKey, settings: Settings) -> float | None:
    """What the calibration was worth, where there is one."""
    path = _calibration(key, settings)
    return quantize.read(path, key.onnx_sha256, key.precision).psnr_db if path else None


def _check(settings: Settings) -> None:
    if settings.level not in LEVELS:
        raise SettingsError(f"level {settings.level}; wanted 0 to {LEVELS[-1]}")
    if settings.workspace_mib < 1:
        raise SettingsError(f"workspace {settings.workspace_mib} MiB; wanted at least 1")
    if settings.precision not in engine_files.PRECISIONS:
        known = ", ".join(engine_files.PRECISIONS)
        raise SettingsError(f"precision {settings.precision!r}; choose from: {known}")
    if settings.precision in quantize.KINDS and settings.calibration is None:
        raise SettingsError(
            f"precision {settings.precision!r} needs a calibration; run: diffusionact calibrate "
            f"BUNDLE --kind {settings.precision} -o DIR, then build with --calibration DIR"
        )
    if settings.gpus and settings.library == "tensorrt":
        raise SettingsError(
            "tensorrt builds for the GPU it runs on; with --gpu take --library tensorrt_rtx"
        )
    if any(count < 1 for count in settings.steps):
        raise SettingsError(f"steps {settings.steps}; wanted at least 1")


def _library(settings: Settings) -> str | None:
    """The one that was asked for, and ahead of time the one that can."""
    return settings.library or ("tensorrt_rtx" if settings.gpus else None)


def _patiently(
    bundle_dir: Path,
    manifest: Manifest,
    key: EngineKey,
    settings: Settings,
    folder: Path,
    progress: StageCallback | None,
) -> tuple[Path, EngineManifest]:
    """An engine and its manifest; where memory is short, of a lower level than was asked for."""
    part = manifest.components[key.component]
    while True:
        path = folder / f"{engine_files.stem(key)}{engine_files.SUFFIX}"
        try:
            return path, _build_one(bundle_dir, part, key, settings, path, progress)
        except EngineError as error:
            less = _with_less_memory(key, settings) if _is_short_of_memory(error) else None
            if less is None:
                raise
            key, settings = less
            log.warning(
                "%s: memory was short (%s); trying level %d and %d MiB of workspace",
                key.component, _brief(error), key.level, settings.workspace_mib,
            )  # fmt: skip


def _is_short_of_memory(error: EngineError) -> bool:
    told = str(error).lower()
    return any(words in told for words in _OUT_OF_MEMORY)


def _with_less_memory(key: EngineKey, settings: Settings) -> tuple[EngineKey, Settings] | None:
    """The next to try: a level lower, a quarter of the workspace; None at the end of both."""
    level = max(LEVELS[0], key.level - 1)
    workspace_mib = max(LEAST_WORKSPACE_MIB, settings.workspace_mib // 4)
    if level == key.level and workspace_mib >= settings.workspace_mib:
        return None
    return replace(key, level=level), replace(settings, workspace_mib=workspace_mib)


def _brief(error: EngineError) -> str:
    text = str(error)
    return text if len(text) <= BRIEF else f"{text[:BRIEF]}..."


def _build_one(
    bundle_dir: Path,
    part: ComponentSpec,
    key: EngineKey,
    settings: Settings,
    path: Path,
    progress: StageCallback | None,
) -> EngineManifest:
    """The manifest of the engine at `path`; both files are there, each whole."""
    plan = path.with_name(f".part-{os.getpid()}-{path.name}")
    # On RTX it is empty: what depends on the GPU is done when the engine is loaded.
    cache = path.with_name(f"timing-{key.library}-{key.version}-{key.targets[0]}.cache")
    request = Request(
        onnx=str(bundle_dir / part.file),
        plan=str(plan),
        shapes=key.shapes,
        precision=key.precision,
        library=key.library,
        targets=key.targets,
        gpu=key.gpu,
        level=key.level,
        workspace_mib=settings.workspace_mib,
        timing_cache=str(cache) if key.library == "tensorrt" else None,
        calibration=str(_calibration(key, settings)) if key.calibration else None,
    )
    try:
        result = run_child(request, lambda n: progress and progress(key.component, n, PERCENT))
        inputs, outputs = engine_files.fixed_specs(part, key)
        manifest = EngineManifest(
            key,
            result.plan_sha256,
            result.plan_bytes,
            inputs,
            outputs,
            graph=result.graph,
            network=result.network,
            engine=result.engine,
            build_s=round(result.build_s, 3),
            psnr_db=_quality_db(key, settings),
        )
        os.replace(plan, path)
        engine_files.write_manifest(path, manifest)
    except OSError as error:
        raise EngineError(f"{path}: not written ({error.strerror}); {MORE_ROOM}") from error
    finally:
        plan.unlink(missing_ok=True)
    return manifest


def _gated(manifest: EngineManifest, path: Path, gate: Gate | None) -> EngineManifest:
    parity = gate(manifest, path) if gate else None
    if parity is None:
        return manifest
    told = replace(manifest, parity=parity)
    engine_files.write_manifest(path, told)
    if not parity.passed:
        raise EngineError(
            f"{path}: differs from the bundle's graph by {parity.max_error:.1e}, "
            f"{parity.max_allowed:.1e} is allowed; it is not used. Try --precision fp32"
        )
    return told


def _remove(path: Path) -> None:
    for damaged in (path, path.with_suffix(".json")):
        try:
            damaged.unlink(missing_ok=True)
        except OSError:
            pass  # in a folder that is not ours to write; it is passed over when read


def describe(census: Census) -> str:
    """Return a census in one line: the layers that take the time, or all where none is known."""
    told = {name: counts for name, counts in census.items() if name in _TOLD}
    totals: Counter[str] = Counter()
    for counts in census.values():
        totals.update(counts)
    lines = told or {"layer": totals}
    return ", ".join(
        f"{name.lower()} {' '.join(f'{n} {kind}' for kind, n in sorted(counts.items()))}"
        for name, counts in lines.items()
    )


_TOLD = ("QUANTIZE", "CONVOLUTION", "DECONVOLUTION", "MATRIX_MULTIPLY", "NORMALIZATION", "SOFTMAX")
