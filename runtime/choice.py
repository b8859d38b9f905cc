"""Which backend and precision run a bundle here: what was asked for, and what "auto" means.

On a CPU "auto" is measured, once for a bundle, a number of threads and a machine: the candidates
render the same frame in turn, in a process of its own, so that a library that crashes takes nobody
along. A precision below fp32 is a candidate only if its frame is close enough to fp32's. What was
found is remembered in the cache directory.
"""

from __future__ import annotations

import hashlib
import importlib.metadata
import importlib.util
import json
import logging
import signal
import subprocess
import sys
from dataclasses import asdict, dataclass
from pathlib import Path

from diffusionact import machine
from diffusionact.decode import DecodeError, decode
from diffusionact.engine_files import cache_root
from diffusionact.errors import SettingsError
from diffusionact.files import write_whole
from diffusionact.manifest import Manifest
from diffusionact.runtime.gpu_choice import gpu_backend
from diffusionact.runtime.loop import Approximation
from diffusionact.runtime.trial import CANDIDATES, REFERENCE, Measured, is_large

LEAST_PSNR_DB = 40.0  # of a frame against fp32: below, an eye that looks for it may see it
WORTH_IT = 1.1  # how much faster a lower precision must be
TRIAL = "diffusionact.runtime.trial"
FOLDER = "choice"  # of the cache directory
FORMAT = 2
TIMEOUT_S = 300.0
_CRASHES = (signal.SIGSEGV, signal.SIGABRT, signal.SIGILL, signal.SIGFPE)
_log = logging.getLogger("diffusionact")


@dataclass(frozen=True)
class Choice:
    """What runs the networks. precision: "auto" is the backend's best."""

    backend: str
    precision: str


@dataclass(frozen=True)
class Key:
    """All that a measurement depends on."""

    cpu: str
    cores: int
    threads: int
    versions: tuple[str, ...]  # of the candidates' libraries and of this file's format
    unet_step_sha256: str


@dataclass(frozen=True)
class Record:
    """What is remembered."""

    key: Key
    candidates: tuple[Measured, ...]


def choose(
    bundle_dir: Path,
    manifest: Manifest,
    *,
    backend: str = "auto",
    precision: str = "auto",
    device: str = "auto",
    threads: int = 0,
    approximate: Approximation | None = None,
) -> Choice:
    """Return the backend and precision for a bundle on this machine.

    What the caller names is taken. backend "auto" is TensorRT or PyTorch where a GPU is here and
    they can use it, unless device is "cpu"; else the fastest on this CPU, measured now if it
    is not remembered, in a precision that is as good as fp32 to the eye, or in that of the caller;
    what an approximation of these costs in quality is logged.

    Raises: SettingsError when no backend has the precision or the approximation here, DeviceError
    when a GPU was asked for and none can be used.
    """
    if backend != "auto":
        return Choice(backend, precision)
    if device != "cpu" and not approximate:
        on_gpu = gpu_backend(bundle_dir, manifest, precision, asked=device != "auto")
        if on_gpu is not None:
            return Choice(on_gpu, precision)
    if not installed("openvino"):
        return Choice(REFERENCE[0], precision)
    best = _best(record := _record(bundle_dir, manifest, threads), precision)
    if approximate:
        best = _approximate(record, best, approximate)
    return Choice(best.backend, best.precision)


def explain(bundle_dir: Path, manifest: Manifest, *, threads: int = 0) -> str:
    """Return what "auto" is for a bundle on this CPU, and why, in lines; measures if need be."""
    if not installed("openvino"):
        return "ort fp32: the only backend for CPUs that is installed; openvino may be faster"
    record = _record(bundle_dir, manifest, threads)
    best = _best(record, "auto")
    lines = [f"{best.name}: the fastest whose frame is {LEAST_PSNR_DB:.0f} dB from fp32 or nearer"]
    ranked = sorted(record.candidates, key=lambda c: (c.approximate, c.error != "", c.step_ms))
    for one in ranked:
        if one.error:
            lines.append(f"  {one.name}: not usable ({one.error})")
            continue
        near = (
            "the reference"
            if (one.backend, one.precision) == REFERENCE
            else (f"{one.psnr_db:.1f} dB, worst value off by {one.worst:.0f} of 255")
        )
        took = f"{one.step_ms:.1f} ms a step" if one.step_ms else "not timed"
        lines.append(f"  {one.name}: {took}, {near}")
    return "\n".join([*lines, f"  remembered in {_path(record.key)}"])


def good(one: Measured) -> bool:
    """Return whether a candidate works, and nobody sees the difference."""
    return not one.error and (one.precision == "fp32" or one.psnr_db >= LEAST_PSNR_DB)


def installed(library: str) -> bool:
    """Return whether a library is there; it is not loaded."""
    return importlib.util.find_spec(library) is not None


def _best(record: Record, precision: str) -> Measured:
    """The fastest of the good ones, or of those in the precision that was asked for."""
    asked = precision != "auto"
    plain = [c for c in record.candidates if not c.approximate]
    able = [c for c in plain if (not c.error if asked else good(c))]
    able = [c for c in able if not asked or c.precision == precision]
    if asked and not able:
        raise SettingsError(f"no backend on this CPU computes in {precision!r}; leave it 'auto'")
    if not able:
        return Measured(*REFERENCE)
    best = min(able, key=lambda c: c.step_ms)
    full = min((c for c in able if c.precision == "fp32"), key=lambda c: c.step_ms, default=best)
    return best if best.step_ms * WORTH_IT <= full.step_ms else full


def _approximate(record: Record, best: Measured, how: Approximation) -> Measured:
    """What approximates the best in the way that was asked for; its price is logged."""
    found = [c for c in record.candidates if c.approximate == how and not c.error]
    if not found:
        raise SettingsError(
            f"no backend on this CPU can approximate by {how!r}; install openvino, or leave it out"
        )
    one = found[0]
    _log.warning(
        "approximating by %s: frames %.1f dB from exact ones (%s alone %.1f dB), %.1f times as fast",
        how, one.psnr_db, best.precision, best.psnr_db, best.step_ms / one.step_ms,
    )  # fmt: skip
    return one


def _record(bundle_dir: Path, manifest: Manifest, threads: int) -> Record:
    """What is remembered of this bundle here, measured now if it is not."""
    key = _key(manifest, threads)
    try:
        found = decode(Record, json.loads(_path(key).read_bytes()))
        known = {one.backend for one in found.candidates} <= set(CANDIDATES)
        if found.key == key and found.candidates and known:
            return found
    except (OSError, ValueError) as problem:
        if not isinstance(problem, FileNotFoundError):
            _log.info("%s: not usable (%s), measured again", _path(key), problem)
    long = is_large(bundle_dir, manifest)  # then the wait wants a word
    _log.log(
        logging.WARNING if long else logging.INFO,
        "measuring which backend is the fastest here, once for this model%s",
        ": a minute or two" if long else "",
    )
    candidates, lasting = _measured_apart(bundle_dir, threads)
    record = Record(key, candidates)
    if lasting:
        _remember(record)
    return record


def _key(manifest: Manifest, threads: int) -> Key:
    about = machine.cpu()
    name = " ".join(str(about[what]) for what in ("cpu", "cpu_id") if about[what])
    versions = [f"format {FORMAT}"]
    for library in ("openvino", "onnxruntime"):
        try:
            versions.append(f"{library} {importlib.metadata.version(library)}")
        except importlib.metadata.PackageNotFoundError:
            versions.append(f"no {library}")
    sha256 = manifest.components["unet_step"].sha256
    return Key(
        f"{name} {' '.join(about['flags'])}", about["cores"], threads, tuple(versions), sha256
    )


def _path(key: Key) -> Path:
    mark = hashlib.sha256(json.dumps(asdict(key), sort_keys=True).encode()).hexdigest()[:16]
    return cache_root() / FOLDER / f"{mark}.json"


def _remember(record: Record) -> None:
    path = _path(record.key)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, json.dumps(asdict(record), indent=1) + "\n")
    except OSError as error:
        _log.info("%s: not remembered (%s)", path, error.strerror)


def _measured_apart(bundle_dir: Path, threads: int) -> tuple[tuple[Measured, ...], bool]:
    """The candidates, measured in another process, and whether the result is worth remembering.

    A crash is: the library would crash again.
    """
    command = [sys.executable, "-m", TRIAL, str(Path(bundle_dir).resolve()), str(threads)]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=TIMEOUT_S)
    except (OSError, subprocess.SubprocessError) as error:
        return _without(f"could not be measured: {type(error).__name__}"), False
    try:
        if done.returncode == 0:
            line = done.stdout.splitlines()[-1]
            return tuple(decode(Measured, values) for values in json.loads(line)), True
    except (IndexError, ValueError, DecodeError):
        pass
    if -done.returncode in _CRASHES:
        return _without(f"crashed: {signal.Signals(-done.returncode).name}"), True
    why = (done.stderr.strip().splitlines() or [f"exit status {done.returncode}"])[-1]
    return _without(f"could not be measured: {why}"), False


def _without(reason: str) -> tuple[Measured, ...]:
    """The candidates when only the fallback is left."""
    _log.warning("openvino %s; ONNX Runtime is used, which is slower", reason)
    return Measured("openvino", "auto", error=reason), Measured(*REFERENCE)
