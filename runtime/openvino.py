"""OpenVINO on the CPU, in bfloat16 where the hardware has it.

Models come from the bundle's ONNX files and are changed as they are loaded, in memory only, by
`openvino_graph.py`. What was compiled is kept on disk (`_compiled`).
"""

from __future__ import annotations

import hashlib
import json
import logging
import mmap
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from diffusionact.engine_files import cache_root
from diffusionact.errors import BundleError
from diffusionact.files import write_whole
from diffusionact.manifest import TensorSpec, file_sha256
from diffusionact.runtime.component import check_bound
from diffusionact.runtime.openvino_graph import DEEP, Part, check_wide, cut, rewrite_norms, widen
from diffusionact.runtime.openvino_library import openvino
from diffusionact.runtime.trace import Layer, recording

Array: TypeAlias = npt.NDArray[Any]

DEVICES = ("cpu",)
# Frames of a clip that a network is fastest with at once: `python -m benchmarks.batch`.
AT_ONCE: Mapping[str, int] = {"bf16": 4, "fp32": 1}
# A larger model keeps the cores busy with one frame, and would take its memory twice.
AT_ONCE_BYTES = 100 * 10**6
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


def open_together(
    path: Path,
    inputs: Mapping[str, TensorSpec],
    outputs: Mapping[str, TensorSpec],
    *,
    frames: int,
    device: str,
    threads: int,
    precision: str,
) -> OpenvinoComponent:
    """Return a network that was made for one frame, for several: each has its own row of every
    tensor. inputs, outputs: of one frame; other arguments and errors as of open_model."""
    model = _compiled(path, inputs, outputs, _config(threads, precision), frames=frames)
    return _kind()(model, _wide(inputs, frames), _wide(outputs, frames))


def _wide(specs: Mapping[str, TensorSpec], frames: int) -> dict[str, TensorSpec]:
    """The specs of one frame, with that many rows for one."""
    shapes = {name: (int(spec.shape[0]) * frames, *spec.shape[1:]) for name, spec in specs.items()}
    return {name: replace(spec, shape=shapes[name]) for name, spec in specs.items()}


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
    frames: int = 1,
) -> _Compiled:
    """The model from the cache, or made from the .onnx file and put there.

    Raises: BundleError.
    """
    kept = _cache_file(path, _wide(inputs, frames), config["INFERENCE_PRECISION_HINT"], part)
    found = _from_cache(kept, config)
    if found is not None:
        return found
    try:
        model = _core().read_model(path)
        _check_model(path, "inputs", model.inputs, inputs)
        _check_model(path, "outputs", model.outputs, outputs)
        model.reshape({name: list(spec.shape) for name, spec in inputs.items()})
        if frames > 1:
            widen(model, frames)
        rewrite_norms(model)
        if frames > 1:
            check_wide(path, model, frames)
        made = _core().compile_model(cut(path, model, part) if part else model, "CPU", config)
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


def _first_line(error: Exception) -> str:
    lines = [line for line in str(error).splitlines() if line.strip()]
    return lines[-1].strip() if lines else type(error).__name__


_DIGEST_BYTES = hashlib.sha256().digest_size
_MEND = "Export the bundle again: diffusionact export WEIGHTS -o BUNDLE"
