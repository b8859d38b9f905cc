"""One ONNX graph to one TensorRT plan: all calls to the builder of either library.

It runs in a process of its own (`child.py`), so that a crash, and the memory of a build, stay
there.
"""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import onnx

from diffusionact import trt_library
from diffusionact.engine_files import Census
from diffusionact.engines import precision, quantize
from diffusionact.errors import BundleError, EngineError
from diffusionact.manifest import file_sha256

MIB = 1 << 20
PERCENT = 100
MAX_MESSAGES = 8  # of the library's own, in an error


@dataclass(frozen=True)
class Request:
    """What to build and where to put it."""

    onnx: str
    plan: str  # the file to write
    shapes: Mapping[str, tuple[int, ...]]
    precision: str
    library: str
    targets: tuple[str, ...]
    gpu: str  # empty: ahead of time
    level: int
    workspace_mib: int
    timing_cache: str | None = None
    calibration: str | None = None  # of 8 bits


@dataclass(frozen=True)
class Result:
    """What was built."""

    plan_sha256: str
    plan_bytes: int
    graph: Census
    network: Census
    engine: Census | None
    build_s: float


class Cancelled(Exception):
    """The build was stopped on request."""


def make_plan(
    request: Request, report: Callable[[int], None], cancelled: Callable[[], bool]
) -> Result:
    """Return what was built; the plan is in its file.

    report: called with percent done; cancelled: asked after every step of the builder.

    Raises: BackendMissing, BundleError for a graph that TensorRT does not read, EngineError when
    it builds none, Cancelled, OSError when a file cannot be written.
    """
    library = trt_library.find(request.library)
    model = _graph(request)
    start_s = time.monotonic()
    trt = library.module
    log = _logger(trt)
    builder = trt.Builder(log)
    network = _network(trt, builder, log, model, request)
    config = _config(trt, builder, request)
    config.progress_monitor = monitor = _monitor(trt, report, cancelled)
    plan = builder.build_serialized_network(network, config)
    if plan is None and monitor.cancelled:
        raise Cancelled
    if plan is None:
        raise EngineError(
            f"{library.name} {library.version} built no engine of {request.onnx}: {log.text()}; "
            "try more --workspace or a lower --level"
        )
    digest = hashlib.sha256(plan).hexdigest()
    _write(Path(request.plan), plan)
    _save_timing_cache(config, request)
    report(PERCENT)
    counts = _network_census(network)
    engine = _engine_census(trt, log, plan) if request.gpu else None
    seconds = time.monotonic() - start_s
    return Result(digest, plan.nbytes, precision.census(model), counts, engine, seconds)


def _graph(request: Request) -> onnx.ModelProto:
    """The graph that the engine is made of: in its precision, all sizes fixed."""
    try:
        model = onnx.load(request.onnx)
    except Exception as error:  # protobuf's own class
        raise BundleError(
            f"{request.onnx}: not an ONNX file ({error}); export the bundle again"
        ) from error
    made = _in_precision(model, request)
    precision.fix_sizes(made, request.shapes)
    return made


def _in_precision(model: onnx.ModelProto, request: Request) -> onnx.ModelProto:
    """Never fp32 for want of something else.

    Raises: EngineError for anything but fp32 and fp16 without a calibration; as `quantize`.
    """
    if request.precision == "fp32":
        return precision.folded(model)
    if request.precision == "fp16":
        return precision.to_fp16(model)
    if request.calibration is None:
        raise EngineError(f"precision {request.precision!r} needs a calibration: docs/engines.md")
    digest, kind = file_sha256(Path(request.onnx)), request.precision
    return quantize.quantized(
        model, quantize.read(Path(request.calibration), digest, kind).ranges, kind
    )


def _network(trt: Any, builder: Any, log: Any, model: onnx.ModelProto, request: Request) -> Any:
    network = builder.create_network(0)
    parser = trt.OnnxParser(network, log)
    if not parser.parse(model.SerializeToString(), request.onnx):
        problems = "; ".join(parser.get_error(i).desc() for i in range(parser.num_errors))
        raise BundleError(f"{request.onnx}: TensorRT does not read it: {problems or log.text()}")
    tensors = [network.get_input(i) for i in range(network.num_inputs)]
    tensors += [network.get_output(i) for i in range(network.num_outputs)]
    seen = {tensor.name: tuple(tensor.shape) for tensor in tensors}
    if seen != dict(request.shapes) or any(t.dtype != trt.DataType.FLOAT for t in tensors):
        raise BundleError(f"{request.onnx}: tensors {seen}, wanted {dict(request.shapes)}")
    return network


def _config(trt: Any, builder: Any, request: Request) -> Any:
    config = builder.create_builder_config()
    config.builder_optimization_level = request.level
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, request.workspace_mib * MIB)
    if request.precision == "fp32":  # it is asked for where 10 bits of mantissa are too few
        config.clear_flag(trt.BuilderFlag.TF32)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # the census reads it
    if hasattr(trt, "ComputeCapability"):
        capabilities = _capabilities(trt, request)
        config.num_compute_capabilities = len(capabilities)
        for index, capability in enumerate(capabilities):
            if not config.set_compute_capability(capability, index):
                raise EngineError(f"{request.library} does not build for {request.targets[index]}")
    if request.timing_cache is not None:
        path = Path(request.timing_cache)
        content = path.read_bytes() if path.is_file() else b""
        cache = config.create_timing_cache(content)
        if not config.set_timing_cache(cache, False):  # of another version or GPU
            config.set_timing_cache(config.create_timing_cache(b""), False)
    return config


def _capabilities(trt: Any, request: Request) -> list[Any]:
    """The library's names of the targets.

    Raises: EngineError for one that it does not know.
    """
    if request.gpu:
        return [trt.ComputeCapability.CURRENT]
    found = []
    for target in request.targets:
        name = target.replace("sm_", "SM")
        if not hasattr(trt.ComputeCapability, name):
            known = sorted((n for n in dir(trt.ComputeCapability) if n.startswith("SM")), key=len)
            raise EngineError(
                f"{request.library} does not build for {target} ahead of time, only for "
                f"{', '.join(n.replace('SM', 'sm_') for n in known)}; build on that GPU"
            )
        found.append(getattr(trt.ComputeCapability, name))
    return found


def _logger(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]  # the module is found at run time
        """Keeps the warnings and errors, for the message of a failure."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._kept: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self._kept.append(message.strip())

        def text(self) -> str:
            return "; ".join(self._kept[-MAX_MESSAGES:]) or "it gave no reason"

    return Log()


def _monitor(trt: Any, report: Callable[[int], None], cancelled: Callable[[], bool]) -> Any:
    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]  # as above
        """Percent of the work from phases that contain one another; and the way out."""

        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self.cancelled = False
            self._phases: dict[str, list[int]] = {}  # name -> steps done, of how many
            self._shown = -1

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            self._phases[phase_name] = [0, max(1, num_steps)]

        def step_complete(self, phase_name: str, step: int) -> bool:
            if phase_name in self._phases:
                self._phases[phase_name][0] = step + 1
            self._show()
            self.cancelled = self.cancelled or cancelled()
            return not self.cancelled

        def phase_finish(self, phase_name: str) -> None:
            self._phases.pop(phase_name, None)
            self._show()

        def _show(self) -> None:
            done, share = 0.0, 1.0
            for step, steps in self._phases.values():
                share /= steps
                done += share * min(step, steps)
            percent = min(PERCENT, int(PERCENT * done))
            if percent > self._shown:
                self._shown = percent
                report(percent)

    return Monitor()


def _write(path: Path, content: Any) -> None:
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def _save_timing_cache(config: Any, request: Request) -> None:
    if request.timing_cache is None:
        return
    path = Path(request.timing_cache)
    part = path.with_name(f".part-{os.getpid()}-{path.name}")
    try:
        _write(part, config.get_timing_cache().serialize())
        os.replace(part, path)
    finally:
        part.unlink(missing_ok=True)


def _network_census(network: Any) -> Census:
    """Layer -> type of its output -> count, constants left out."""
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for i in range(network.num_layers):
        layer = network.get_layer(i)
        if layer.num_outputs and layer.type.name != "CONSTANT":
            counts[layer.type.name][layer.get_output(0).dtype.name] += 1
    return {name: dict(sorted(counts[name].items())) for name in sorted(counts)}


def _engine_census(trt: Any, log: Any, plan: Any) -> Census | None:
    """The same of the finished engine; None if it cannot be opened here."""
    engine = trt.Runtime(log).deserialize_cuda_engine(plan)
    if engine is None:
        return None
    inspector = engine.create_engine_inspector()
    return layer_census(inspector.get_engine_information(trt.LayerInformationFormat.JSON))


def layer_census(text: str) -> Census:
    """Return layer -> type of its first output -> count, from the inspector's JSON.

    Layers or types that the library does not tell are counted as "untold".
    """
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    for layer in json.loads(text).get("Layers", []):
        told = layer if isinstance(layer, dict) else {}
        output: dict[str, str] = next(iter(told.get("Outputs") or []), {})
        words = output.get("Datatype") or output.get("Format/Datatype") or "untold"
        counts[told.get("LayerType", "untold")][words] += 1
    return {name: dict(sorted(counts[name].items())) for name in sorted(counts)}
