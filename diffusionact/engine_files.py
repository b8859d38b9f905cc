"""Engine files: what one was made from, where it lies, and whether it may be run.

`engines/build.py` writes them and `runtime/trt.py` opens them; they meet only here. An engine is
two files, NAME.engine (the library's plan) and NAME.json (`EngineManifest`), where NAME is
`<component>-<16 digits of the key's hash>`. Neither TensorRT nor a GPU is needed to judge one.
"""

from __future__ import annotations

import hashlib
import json
import os
import tempfile
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Literal, TypeAlias

from diffusionact.decode import DecodeError, decode
from diffusionact.errors import BundleError, EngineError, SettingsError
from diffusionact.files import write_whole
from diffusionact.manifest import ComponentSpec, Manifest, TensorSpec, file_sha256

FORMAT = 1
# Raised when `diffusionact build` makes other graphs of the same bundle: older engines are stale.
RECIPE = 2
FOLDER = "engines"
SUFFIX = ".engine"
CACHE_VARIABLE = "DIFFUSIONACT_CACHE"
PRECISIONS = ("fp16", "fp32", "int8", "fp8")
# They run once a session and once a frame, on one row or a few: half precision would save nothing
# there, and would round the coordinates and the factors that every step is scaled with.
ONCE = ("time", "modulation", "time_invert", "modulation_invert")

State: TypeAlias = Literal["valid", "truncated", "tampered", "wrong", "foreign", "stale", "missing"]
Census: TypeAlias = Mapping[str, Mapping[str, int]]  # operator -> type of its output -> count


@dataclass(frozen=True)
class Gpu:
    """The GPU that engines are made for or run on."""

    name: str  # as the driver says it
    target: str  # its architecture, such as "sm_89"
    driver_major: int  # 580 of driver 580.65.06


@dataclass(frozen=True)
class EngineKey:
    """All that an engine depends on."""

    component: str
    onnx_sha256: str  # of the bundle's file
    shapes: Mapping[str, tuple[int, ...]]  # of inputs and outputs, all sizes fixed
    precision: str
    library: str  # "tensorrt" or "tensorrt_rtx"
    version: str  # of the library
    targets: tuple[str, ...]  # ascending
    gpu: str = ""  # empty: made ahead of time, for any GPU of the targets
    driver_major: int = 0  # 0: likewise
    level: int = 3  # how long the builder searched, 0..5
    recipe: int = RECIPE
    calibration: str = ""  # sha256 of the file that 8 bits were calibrated with


@dataclass(frozen=True)
class Parity:
    """How far the engine's answers are from the fp32 graph's on the CPU, on the same inputs."""

    max_error: float
    max_allowed: float
    gpu: str  # where it ran

    @property
    def passed(self) -> bool:
        return self.max_error <= self.max_allowed


@dataclass(frozen=True)
class EngineManifest:
    """What lies beside an engine."""

    key: EngineKey
    plan_sha256: str
    plan_bytes: int
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]
    graph: Census  # of the ONNX graph that the builder was given
    network: Census  # of TensorRT's own network of it, which it keeps to: it is strongly typed
    build_s: float
    engine: Census | None = None  # of the finished engine; None: it was not opened here
    parity: Parity | None = None  # None: it was not run here
    psnr_db: float | None = None  # of 8 bits: the graph against fp32, at calibration
    format: int = FORMAT


@dataclass(frozen=True)
class Found:
    """An engine, or why there is none that may be run."""

    state: State
    reason: str  # one sentence without a full stop, the next command included
    path: Path | None = None
    manifest: EngineManifest | None = None


def make_key(
    manifest: Manifest,
    component: str,
    *,
    library: str,
    version: str,
    target: Gpu | Sequence[str],
    precision: str = "fp16",
    sizes: Mapping[str, int] | None = None,
    level: int = 0,
) -> EngineKey:
    """Return the key of the engine that a component of the bundle needs.

    target: the GPU that is here, or architectures to build for ahead of time; precision: what was
    asked for, the component may keep fp32; sizes: numbers of named sizes, such as {"N": 4};
    level: the least.

    Raises: BundleError for an unknown component, SettingsError for a precision or size.
    """
    if component not in manifest.components:
        known = ", ".join(sorted(manifest.components))
        raise BundleError(f"no component {component!r} in the bundle, only {known}")
    if precision not in PRECISIONS:
        raise SettingsError(f"precision {precision!r}; choose from: {', '.join(PRECISIONS)}")
    part = manifest.components[component]
    here = target if isinstance(target, Gpu) else Gpu("", "", 0)
    targets = (here.target,) if isinstance(target, Gpu) else sorted(set(target), key=_sm)
    return EngineKey(
        component=component,
        onnx_sha256=part.sha256,
        shapes={spec.name: _shape(spec, sizes or {}) for spec in (*part.inputs, *part.outputs)},
        precision="fp32" if component in ONCE else precision,
        library=library,
        version=version,
        targets=tuple(targets),
        gpu=here.name,
        driver_major=here.driver_major,
        level=level,
    )


def fixed_specs(
    part: ComponentSpec, key: EngineKey
) -> tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]:
    """Return the inputs and outputs of a component with the sizes of the key."""
    inputs, outputs = (
        tuple(replace(spec, shape=key.shapes[spec.name]) for spec in specs)
        for specs in (part.inputs, part.outputs)
    )
    return inputs, outputs


def stem(key: EngineKey) -> str:
    """Return the name of the engine's files without their endings."""
    content = json.dumps(asdict(key), sort_keys=True, separators=(",", ":"))
    return f"{key.component}-{hashlib.sha256(content.encode()).hexdigest()[:16]}"


def cache_root() -> Path:
    """Return the cache directory, which may not be there: DIFFUSIONACT_CACHE, or the user's."""
    return Path(os.environ.get(CACHE_VARIABLE) or Path.home() / ".cache" / "diffusionact")


def folders(bundle_dir: Path) -> tuple[Path, Path]:
    """Return where the engines of a bundle may lie: in it, and in the cache directory."""
    place = Path(bundle_dir).resolve()
    mark = hashlib.sha256(str(place).encode()).hexdigest()[:8]
    return place / FOLDER, cache_root() / FOLDER / f"{place.name}-{mark}"


def folder_to_write(bundle_dir: Path) -> Path:
    """Return the first of `folders` that a file can be written to; it is made.

    Raises: EngineError when neither can.
    """
    problems = []
    for folder in folders(bundle_dir):
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                return folder
        except OSError as error:
            problems.append(f"{folder}: {error.strerror}")
    raise EngineError(
        f"no folder for engines: {'; '.join(problems)}; set {CACHE_VARIABLE} to one that is yours"
    )


def write_manifest(path: Path, manifest: EngineManifest) -> None:
    """Return nothing; the manifest lies beside the engine `path`, whole or not at all."""
    write_whole(path.with_suffix(".json"), json.dumps(asdict(manifest), indent=2) + "\n")


def read_manifest(path: Path) -> EngineManifest:
    """Return the manifest beside the engine `path`; the plan itself is not looked at.

    Raises: EngineError when it is missing, damaged, or not that of this file name.
    """
    beside = path.with_suffix(".json")
    try:
        values = json.loads(beside.read_bytes())
        seen = values.get("format") if isinstance(values, dict) else None
        if seen != FORMAT:
            raise EngineError(f"{beside}: format {seen!r}, this version reads {FORMAT}")
        manifest = decode(EngineManifest, values)
    except OSError as error:
        raise EngineError(f"{beside}: not readable ({error.strerror})") from error
    except (DecodeError, ValueError) as error:
        raise EngineError(f"{beside}: damaged ({error})") from error
    if stem(manifest.key) != path.stem:
        raise EngineError(f"{beside}: its key is that of {stem(manifest.key)}, not of this file")
    return manifest


def verify(path: Path) -> Found:
    """Return whether an engine is what was built, whatever it was built from.

    valid, truncated, tampered (also for a manifest that is missing or damaged), or wrong: as it
    was built, but its answers were too far from the graph's.
    """
    try:
        manifest = read_manifest(path)
        size = path.stat().st_size
        if size != manifest.plan_bytes:
            state: State = "truncated" if size < manifest.plan_bytes else "tampered"
            return Found(state, f"{path}: {size} bytes, built with {manifest.plan_bytes}", path)
        seen = file_sha256(path)
    except EngineError as error:
        return Found("tampered", str(error), path)
    except OSError as error:
        return Found("tampered", f"{path}: not readable ({error.strerror})", path)
    if seen != manifest.plan_sha256:
        return Found("tampered", f"{path}: sha256 {seen}, built as {manifest.plan_sha256}", path)
    parity = manifest.parity
    if parity is not None and not parity.passed:
        far = f"{parity.max_error:.1e} from fp32, {parity.max_allowed:.1e} allowed"
        return Found("wrong", f"{path}: its answers on {parity.gpu} were {far}", path)
    return Found("valid", f"{path}: as it was built", path, manifest)


def judge(
    bundle_dir: Path,
    path: Path,
    manifest: Manifest,
    gpu: Gpu | None,
    versions: Mapping[str, str],
) -> Found:
    """Return whether an engine file may be run for the bundle as it is now.

    gpu: of this machine, None leaves what the engine was made for out of the question; versions:
    of the libraries that are installed, by name.
    """
    found = verify(path)
    key = found.manifest.key if found.manifest else None
    if key is None:
        mend = f"run: diffusionact build {Path(bundle_dir)}"
        return replace(found, reason=f"{found.reason}; {mend}")
    part = manifest.components.get(key.component)
    wanted = replace(
        key,
        onnx_sha256=part.sha256 if part else "",
        recipe=RECIPE,
        version=versions.get(key.library, key.version),
    )
    if gpu is not None:
        wanted = replace(wanted, targets=(gpu.target,), gpu=gpu.name, driver_major=gpu.driver_major)
    problem = _mismatch(key, wanted)
    if problem is None:
        return found
    state, why = problem
    return Found(state, f"{path}: {why}; run: {build_command(bundle_dir, wanted)}", path)


def engine_paths(bundle_dir: Path, component: str = "*") -> Iterator[Path]:
    """Yield the engines of a bundle, of one component or of all."""
    for folder in folders(bundle_dir):
        yield from sorted(folder.glob(f"{component}-{'[0-9a-f]' * 16}{SUFFIX}"))


def find(bundle_dir: Path, wanted: EngineKey) -> Found:
    """Return the best engine that answers to `wanted`, or the reason why none does.

    An engine made ahead of time for several architectures serves each of them; one made on a GPU
    serves that GPU under that driver. A higher level is better, then one made on this GPU.
    """
    usable: list[tuple[int, bool, Path]] = []
    others: list[Found] = []
    for path in engine_paths(bundle_dir, wanted.component):
        try:
            key = read_manifest(path).key
        except EngineError as error:
            others.append(Found("tampered", str(error), path))
            continue
        problem = _mismatch(key, wanted)
        if problem is None:
            usable.append((key.level, key.gpu != "", path))
        else:
            others.append(Found(problem[0], f"{path}: {problem[1]}", path))
    for _, _, path in sorted(usable, reverse=True):
        found = verify(path)
        if found.state == "valid":
            return found
        others.append(found)
    command = f"run: {build_command(bundle_dir, wanted)}"
    if not others:
        what = f"no engine of {wanted.component} for {', '.join(wanted.targets)}"
        return Found("missing", f"{Path(bundle_dir)}: {what}; {command}")
    worst = min(others, key=lambda found: _ORDER.index(found.state))
    return replace(worst, reason=f"{worst.reason}; {command}")


def require(bundle_dir: Path, wanted: EngineKey) -> tuple[Path, EngineManifest]:
    """Return the plan of `find` and its manifest.

    Raises: EngineError when there is no valid one, saying what is there and what to run.
    """
    found = find(bundle_dir, wanted)
    if found.path is None or found.manifest is None:
        raise EngineError(found.reason)
    return found.path, found.manifest


def build_command(bundle_dir: Path, wanted: EngineKey) -> str:
    """Return the command that builds this engine."""
    words = ["diffusionact", "build", str(bundle_dir)]
    if not wanted.gpu:
        words += ["--gpu", ",".join(wanted.targets)]
    if wanted.component not in ONCE and wanted.precision != "fp16":
        words += ["--precision", wanted.precision]
    return " ".join(words)


def _mismatch(key: EngineKey, wanted: EngineKey) -> tuple[State, str] | None:
    """Why an engine of `key` does not serve `wanted`; None when it does."""
    for name, what in _SOURCES.items():
        seen, due = getattr(key, name), getattr(wanted, name)
        if seen != due:
            return "stale", f"made for {what} {_brief(seen)}, wanted {_brief(due)}"
    if key.level < wanted.level:
        return "stale", f"made at level {key.level}, wanted {wanted.level}"
    if not set(wanted.targets) <= set(key.targets):
        return "foreign", f"made for {', '.join(key.targets)}, wanted {', '.join(wanted.targets)}"
    if key.gpu and (key.gpu, key.driver_major) != (wanted.gpu, wanted.driver_major):
        here = f"{wanted.gpu}, driver {wanted.driver_major}" if wanted.gpu else "any GPU"
        return "foreign", f"made for {key.gpu}, driver {key.driver_major}, wanted {here}"
    return None


def _brief(value: object) -> str:
    return value[:12] if isinstance(value, str) else str(value)


def _shape(spec: TensorSpec, sizes: Mapping[str, int]) -> tuple[int, ...]:
    missing = [size for size in spec.shape if isinstance(size, str) and size not in sizes]
    if missing:
        raise SettingsError(f"tensor {spec.name!r}: give a number for size {missing[0]!r}")
    return tuple(sizes[size] if isinstance(size, str) else size for size in spec.shape)


def _sm(target: str) -> int:
    digits = target.removeprefix("sm_")
    if not target.startswith("sm_") or not digits.isdigit():
        raise SettingsError(f"GPU architecture {target!r}; wanted such as sm_89")
    return int(digits)


# What is told first when several engines do not fit.
_ORDER: tuple[State, ...] = ("truncated", "tampered", "wrong", "foreign", "stale")
_SOURCES = {
    "onnx_sha256": "the ONNX file",
    "recipe": "recipe",
    "precision": "precision",
    "shapes": "shapes",
    "library": "library",
    "version": "its version",
}
