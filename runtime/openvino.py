"""OpenVINO on the CPU, in bfloat16 where the hardware has it; the only importer of openvino.

Models come from the bundle's ONNX files and are changed as they are loaded, in memory only: the
group norms become means over channels (`_rewrite_norms`), which the CPU plugin runs several times
faster than its own. What it compiled is kept on disk (`_compiled`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any, Literal, TypeAlias

import numpy as np
import numpy.typing as npt

from diffusionact.engine_files import cache_root
from diffusionact.errors import BackendMissing, BundleError
from diffusionact.files import write_whole
from diffusionact.manifest import TensorSpec, file_sha256
from diffusionact.runtime.component import check_bound
from diffusionact.runtime.trace import Layer, recording

# Importing openvino reports the import to its makers over the network, unless the package that
# does so cannot be imported: then openvino takes the empty one that it brings along.
_TELEMETRY = "openvino_telemetry"
_blocked = _TELEMETRY not in sys.modules
try:
    if _blocked:
        sys.modules[_TELEMETRY] = None  # type: ignore[assignment]
    import openvino
    import openvino.opset13 as op
except ImportError as error:
    raise BackendMissing(
        f"backend 'openvino' needs openvino ({error}); run: pip install 'diffusionact[openvino]'"
    ) from error
finally:
    if _blocked:
        sys.modules.pop(_TELEMETRY, None)

Array: TypeAlias = npt.NDArray[Any]

Part: TypeAlias = Literal["", "whole", "shallow"]  # of a network that is cut

DEVICES = ("cpu",)
DEEP = "deep"  # the tensor that a network is cut at
FOLDER = "openvino"  # of the cache directory
# Raised when other graphs are made of the same ONNX file: what was compiled before is stale.
RECIPE = 1
KEPT_BYTES = 3 * 10**9  # of compiled models on disk; those not used for longest go first
_HINTS: Mapping[str, str] = {"fp32": "f32", "bf16": "bf16"}
_log = logging.getLogger("diffusionact")


def __getattr__(name: str) -> tuple[str, ...]:
    """Return PRECISIONS: asking the processor takes a moment, which an import should not."""
    if name != "PRECISIONS":
        raise AttributeError(name)
    has_bf16 = "BF16" in _core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")
    return ("bf16", "fp32") if has_bf16 else ("fp32",)


@dataclass(frozen=True)
class _Compiled:
    """A compiled model, and the mapped cache file that its constants lie in, if any."""

    compiled: openvino.CompiledModel
    memory: mmap.mmap | None = None


class OpenvinoComponent:
    """One compiled model over bound NumPy memory: `run` copies nothing."""

    def __init__(
        self,
        model: _Compiled,
        inputs: Mapping[str, TensorSpec],
        outputs: Mapping[str, TensorSpec],
        deep: Array | None = None,
    ) -> None:
        """deep: of a network that was cut, what it passes on to its other half or gets from it."""
        self.inputs = inputs
        self.outputs = outputs
        self._model = model  # kept alive: its weights lie in the memory that comes with it
        self._request = model.compiled.create_infer_request()
        self._tensors: dict[str, openvino.Tensor] = {}
        if deep is not None:
            self._deep = openvino.Tensor(deep, shared_memory=True)
            self._request.set_tensor(DEEP, self._deep)

    def bind(self, **arrays: Array) -> None:
        check_bound({**self.inputs, **self.outputs}, arrays)
        # Kept alive: each tensor holds its array, the request holds bare addresses.
        self._tensors = {n: openvino.Tensor(a, shared_memory=True) for n, a in arrays.items()}
        for name, tensor in self._tensors.items():
            self._request.set_tensor(name, tensor)

    def run(self) -> None:
        # Not infer(): it returns the outputs too, as copies.
        self._request.start_async()
        self._request.wait()


class _ProfiledComponent(OpenvinoComponent):
    """The same, which knows what its layers took while a trace is recorded."""

    def __init__(
        self,
        model: _Compiled,
        inputs: Mapping[str, TensorSpec],
        outputs: Mapping[str, TensorSpec],
    ) -> None:
        super().__init__(model, inputs, outputs)
        self._calls = 0

    def run(self) -> None:
        super().run()
        self._calls += 1

    def layers(self) -> list[list[Layer]]:
        """Return the layers of every call, one behind the other: the profiler tells no more than
        the average duration of each over all calls, and their order."""
        begun_ns, layers = 0, []
        for node in self._request.get_profiling_info() if self._calls else ():
            spent_ns = round(node.real_time.total_seconds() * 1e9)
            kind = f"{node.node_type} {node.exec_type}"
            layers.append(Layer(node.node_name, kind, begun_ns, spent_ns, averaged=True))
            begun_ns += spent_ns
        return [layers] * self._calls


def open_model(
    path: Path,
    inputs: Mapping[str, TensorSpec],
    outputs: Mapping[str, TensorSpec],
    *,
    device: str,
    threads: int,
    precision: str,
) -> OpenvinoComponent:
    """Return the model of an .onnx file, held to its specs.

    threads: 0 means one for each physical core; precision: of the networks' inner arithmetic, what
    is bound stays float32. Raises: BundleError.
    """
    model = _compiled(path, inputs, outputs, _config(threads, precision))
    return _kind()(model, inputs, outputs)


def open_reusing(
    path: Path,
    inputs: Mapping[str, TensorSpec],
    outputs: Mapping[str, TensorSpec],
    *,
    device: str,
    threads: int,
    precision: str,
) -> tuple[OpenvinoComponent, OpenvinoComponent]:
    """Return a U-Net twice: whole, and the blocks before and after its last skip connection, which
    take the rest's result from the whole one's last run. Arguments and errors as of open_model.

    Source: Ma, Fang and Wang, "DeepCache: Accelerating Diffusion Models for Free", 2023.
    """
    config = _config(threads, precision)
    cut: tuple[Part, ...] = ("whole", "shallow")
    models = [_compiled(path, inputs, outputs, config, part) for part in cut]
    deep = np.zeros(list(models[0].compiled.output(DEEP).shape), np.float32)
    whole, shallow = (_kind()(model, inputs, outputs, deep) for model in models)
    return whole, shallow


def _kind() -> type[OpenvinoComponent]:
    return OpenvinoComponent if recording() is None else _ProfiledComponent


def _config(threads: int, precision: str) -> dict[str, Any]:
    return {
        "INFERENCE_PRECISION_HINT": _HINTS[precision],
        "INFERENCE_NUM_THREADS": threads,
        "PERFORMANCE_HINT": "LATENCY",
        "PERF_COUNT": recording() is not None,
    }


def _compiled(
    path: Path,
    inputs: Mapping[str, TensorSpec],
    outputs: Mapping[str, TensorSpec],
    config: Mapping[str, Any],
    part: Part = "",
) -> _Compiled:
    """The model from the cache, or made from the .onnx file and put there.

    Raises: BundleError.
    """
    kept = _cache_file(path, inputs, config["INFERENCE_PRECISION_HINT"], part)
    found = _from_cache(kept, config)
    if found is not None:
        return found
    try:
        model = _core().read_model(path)
        _check_model(path, "inputs", model.inputs, inputs)
        _check_model(path, "outputs", model.outputs, outputs)
        model.reshape({name: list(spec.shape) for name, spec in inputs.items()})
        _rewrite_norms(model)
        made = _core().compile_model(_cut(path, model, part) if part else model, "CPU", config)
    except RuntimeError as error:
        raise BundleError(
            f"{path}: OpenVINO {openvino.__version__} cannot open it ({_first_line(error)}). {_MEND}"
        ) from error
    _to_cache(kept, made)
    return _Compiled(made)


@cache
def _core() -> openvino.Core:
    return openvino.Core()


def _cache_file(path: Path, inputs: Mapping[str, TensorSpec], hint: str, part: Part) -> Path:
    """Where the compiled model lies, named by all that it was made from."""
    key = {
        "recipe": RECIPE,
        "onnx_sha256": file_sha256(path),
        "openvino": openvino.__version__,
        "cpu": _core().get_property("CPU", "FULL_DEVICE_NAME"),
        "capabilities": sorted(_core().get_property("CPU", "OPTIMIZATION_CAPABILITIES")),
        "precision": hint,
        "part": part,
        "shapes": {name: spec.shape for name, spec in inputs.items()},
    }
    mark = hashlib.sha256(json.dumps(key, sort_keys=True).encode()).hexdigest()[:16]
    return cache_root() / FOLDER / f"{path.stem}-{mark}.blob"


def _from_cache(kept: Path, config: Mapping[str, Any]) -> _Compiled | None:
    """The model of a cache file; None where there is none, or where it is damaged."""
    try:
        # Private, so that what is written to the file's name later changes nothing here.
        with open(kept, "rb") as file:
            memory = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_COPY)
        os.utime(kept)
    except (OSError, ValueError):  # ValueError: empty
        return None
    size = len(memory) - _DIGEST_BYTES
    content = memoryview(memory)
    if size <= 0 or hashlib.sha256(content[:size]).digest() != content[size:]:
        _log.info("%s: damaged, made again", kept)
        return None
    blob = np.frombuffer(memory, np.uint8, size)
    try:
        compiled = _core().import_model(
            openvino.Tensor(blob, shared_memory=True), "CPU", dict(config)
        )
    except RuntimeError as error:
        _log.info("%s: refused by OpenVINO (%s), made again", kept, _first_line(error))
        return None
    # The plugin has packed copies of the weights; the file is read again should it want more.
    if hasattr(memory, "madvise"):
        memory.madvise(mmap.MADV_DONTNEED)
    return _Compiled(compiled, memory)


def _to_cache(kept: Path, compiled: openvino.CompiledModel) -> None:
    """Write the model where it will be found; without a place for it, it is made every time."""
    try:
        kept.parent.mkdir(parents=True, exist_ok=True)
        blob = compiled.export_model().getvalue()
        write_whole(kept, blob + hashlib.sha256(blob).digest())
        _prune(kept.parent)
    except OSError as error:
        _log.info("%s: not kept (%s)", kept, error.strerror)


def _prune(folder: Path) -> None:
    total = 0
    files = [(path.stat(), path) for path in folder.glob("*.blob")]
    for status, path in sorted(files, key=lambda item: item[0].st_mtime_ns, reverse=True):
        total += status.st_size
        if total > KEPT_BYTES:
            path.unlink(missing_ok=True)


def _check_model(
    path: Path, side: str, seen: Sequence[Any], wanted: Mapping[str, TensorSpec]
) -> None:
    names = [port.get_any_name() for port in seen]
    if set(names) != set(wanted):
        raise BundleError(f"{path}: {side} {names}; the manifest says {list(wanted)}. {_MEND}")
    for name, port in zip(names, seen, strict=True):
        spec, shape = wanted[name], port.get_partial_shape()
        kind = port.get_element_type().to_dtype()
        if not shape.compatible(openvino.PartialShape(list(spec.shape))) or kind != spec.dtype:
            raise BundleError(
                f"{path}: {name!r} is {kind} {shape}; "
                f"the manifest says {spec.dtype} {list(spec.shape)}. {_MEND}"
            )


def _rewrite_norms(model: openvino.Model) -> None:
    """Put means over channels, then over the few numbers that are left, in the place of every
    group norm; the same values up to rounding.

    The plugin's own goes through a reshape to [N, groups, -1], which breaks the channels-last
    order that its convolutions want. Variances are of differences from the mean: E[x^2] - m^2
    would save nothing here, and cancels where a mean is large.
    """
    for norm in model.get_ordered_ops():
        if norm.get_type_name() != "GroupNormalization":
            continue
        made = _norm(norm)
        made.set_friendly_name(norm.get_friendly_name())
        for target in norm.output(0).get_target_inputs():
            target.replace_source_output(made.output(0))
    model.validate_nodes_and_infer_types()


def _norm(norm: Any) -> Any:
    """One group norm of [1, C, *sizes], as a graph of plain operators."""
    x, weight, bias = (port.get_source_output() for port in norm.inputs())
    shape, how = list(norm.get_output_shape(0)), norm.get_attributes()
    channels, groups = shape[1], how["num_groups"]
    column = _integers([1, channels, *[1] * (len(shape) - 2)])
    sizes = _integers(range(2, len(shape)))

    def by_group(values: Any) -> Any:
        rows = op.reshape(values, _integers([1, groups, channels // groups]), False)
        means = op.reduce_mean(rows, _integers([2]), keep_dims=True)
        spread = op.broadcast(means, _integers([1, groups, channels // groups]))
        return op.reshape(spread, column, False)

    mean = by_group(op.reduce_mean(x, sizes, keep_dims=True))
    apart = op.subtract(x, mean)
    variance = by_group(op.reduce_mean(op.multiply(apart, apart), sizes, keep_dims=True))
    epsilon = op.constant(np.float32(how["epsilon"]))
    deviation = op.sqrt(op.add(variance, epsilon))
    scale = op.divide(op.reshape(weight, column, False), deviation)
    return op.add(op.multiply(apart, scale), op.reshape(bias, column, False))


def _cut(path: Path, model: openvino.Model, part: Part) -> openvino.Model:
    """The whole model, which gives the features that meet its last skip connection too; or what
    is left of it when these are given."""
    joins = [
        node
        for node in model.get_ordered_ops()
        if node.get_type_name() == "Concat" and _joins_features(node)
    ]
    if not joins:
        raise BundleError(f"{path}: no skip connection to cut it at; approximate nothing")
    deep = joins[-1].input_value(0)
    parameters, results = model.get_parameters(), model.get_results()
    if part == "whole":
        deep.set_names({DEEP})
        return openvino.Model([*(r.input_value(0) for r in results), deep], parameters, part)
    given = op.parameter(deep.get_shape(), np.float32, DEEP)
    given.output(0).set_names({DEEP})
    for target in deep.get_target_inputs():
        target.replace_source_output(given.output(0))
    return openvino.Model([r.input_value(0) for r in results], [*parameters, given], part)


def _joins_features(node: Any) -> bool:
    return (
        node.get_input_size() == 2
        and len(node.get_output_shape(0)) == 4
        and node.get_attributes()["axis"] in (1, -3)
    )


def _integers(values: Any) -> Any:
    return op.constant(np.array(list(values), np.int64))


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


_DIGEST_BYTES = hashlib.sha256().digest_size
_MEND = "Export the bundle again: diffusionact export WEIGHTS -o BUNDLE"
