"""Convolutions in 8 bits, int8 or fp8, on top of the fp16 graph: opt-in, and behind a gate.

The ranges of activations come from inputs recorded from the runtime; who calls brings a runner of
ONNX graphs (ONNX Runtime on the CPU will do), and gets a calibration only if the quantised graph
keeps close enough to the fp32 one on inputs that it was not calibrated on.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import ml_dtypes
import numpy as np
import numpy.typing as npt
import onnx
from onnx import helper, numpy_helper

from diffusionact.decode import DecodeError, decode
from diffusionact.engines import precision
from diffusionact.errors import EngineError, SettingsError
from diffusionact.files import write_whole

Array: TypeAlias = npt.NDArray[Any]
Feed: TypeAlias = Mapping[str, Array]
Runner: TypeAlias = Callable[[onnx.ModelProto, Feed], Mapping[str, Array]]

FORMAT = 1
# type -> its largest value, and NumPy's name for it
KINDS: Mapping[str, tuple[float, Any]] = {
    "int8": (127.0, np.int8),
    "fp8": (448.0, ml_dtypes.float8_e4m3fn),
}
# Thin layers, the first and the last above all, gain nothing and lose most.
# Source: NVIDIA's rules for fp8 convolutions (modelopt).
MIN_CHANNELS, MAX_AREA = 17, 32
PERCENTILE = 99.99  # of magnitudes; the few above it are clipped
LEAST_PSNR_DB = 35.0  # of the network's output against fp32, peak to peak


@dataclass(frozen=True)
class Calibration:
    """The ranges of a component's activations, and how good the quantised graph was with them."""

    onnx_sha256: str
    kind: str
    ranges: Mapping[str, float]  # output of the convolution -> magnitude of its input
    samples: int
    psnr_db: float
    format: int = FORMAT


def calibrate(
    model: onnx.ModelProto,
    onnx_sha256: str,
    kind: str,
    feeds: Sequence[Feed],
    run: Runner,
    least_psnr_db: float = LEAST_PSNR_DB,
) -> Calibration:
    """Return the calibration of a graph from recorded inputs; every fourth is kept for the gate.

    Raises: SettingsError for an unknown kind or fewer than four inputs, EngineError when the
    quantised graph does not pass, or when nothing in the graph can be quantised.
    """
    _check_kind(kind)
    if len(feeds) < 4:
        raise SettingsError(f"{len(feeds)} recorded inputs; calibration takes at least 4")
    held = list(feeds[3::4])
    watched = _watched(model)
    ranges: dict[str, float] = {}
    for feed in (feed for i, feed in enumerate(feeds) if i % 4 != 3):
        seen = run(watched, feed)
        for name, source in _sources(watched).items():
            size = float(np.percentile(np.abs(seen[source].astype(np.float32)), PERCENTILE))
            ranges[name] = max(ranges.get(name, 0.0), size)
    if not ranges:
        raise EngineError("no convolution of this graph is wide enough for 8 bits")
    made = quantized(model, ranges, kind)
    psnr_db = min(_psnr_db(run(model, feed), run(made, feed)) for feed in held)
    if not psnr_db >= least_psnr_db:
        raise EngineError(
            f"{kind} is {psnr_db:.1f} dB from fp32, {least_psnr_db:.1f} dB is the least; "
            "build with --precision fp16"
        )
    return Calibration(onnx_sha256, kind, ranges, len(feeds), psnr_db)


def quantized(model: onnx.ModelProto, ranges: Mapping[str, float], kind: str) -> onnx.ModelProto:
    """Return the fp16 graph with its wide convolutions in 8 bits: weights stored so, one scale for
    each output channel; inputs rounded on the way in, one scale for each.

    Raises: as `to_fp16`; EngineError for a convolution without a range.
    """
    _check_kind(kind)
    plain = precision.folded(model)
    weights = {t.name: t for t in plain.graph.initializer}
    wide = {node.output[0]: weights[node.input[1]] for node in _wide(plain)}
    made = precision.to_fp16(model)
    nodes = list(made.graph.node)
    del made.graph.node[:]
    for node in nodes:
        name = node.output[0].removesuffix(".float16")
        if name in wide:
            if name not in ranges:
                raise EngineError(f"convolution {name!r} has no range; calibrate again")
            node.input[0] = _rounded(made, name, node.input[0], ranges[name], kind)
            node.input[1] = _stored(made, name, wide[name], kind)
        made.graph.node.append(node)
    used = {name for node in made.graph.node for name in node.input}
    kept = [t for t in made.graph.initializer if t.name in used]
    del made.graph.initializer[:]
    made.graph.initializer.extend(kept)
    onnx.checker.check_model(made)
    return made


def write(path: Path, calibration: Calibration) -> None:
    """Return nothing; the calibration is in its file, whole or not at all."""
    write_whole(path, json.dumps(asdict(calibration), indent=2) + "\n")


def read(path: Path, onnx_sha256: str, kind: str) -> Calibration:
    """Return the calibration of this graph and kind.

    Raises: EngineError for a file that is missing, damaged, or of another graph or kind.
    """
    try:
        found = decode(Calibration, json.loads(path.read_bytes()))
    except OSError as error:
        raise EngineError(f"{path}: not readable ({error.strerror}); calibrate first") from error
    except (DecodeError, ValueError) as error:
        raise EngineError(f"{path}: damaged ({error}); calibrate again") from error
    if (found.format, found.onnx_sha256, found.kind) != (FORMAT, onnx_sha256, kind):
        raise EngineError(
            f"{path}: {found.kind} of the ONNX file {found.onnx_sha256[:12]}, wanted {kind} of "
            f"{onnx_sha256[:12]}; calibrate again"
        )
    return found


def _check_kind(kind: str) -> None:
    if kind not in KINDS:
        raise SettingsError(f"8-bit kind {kind!r}; choose from: {', '.join(KINDS)}")


def _wide(folded: onnx.ModelProto) -> list[onnx.NodeProto]:
    """The convolutions that are worth 8 bits."""
    shapes = {t.name: tuple(t.dims) for t in folded.graph.initializer}
    found = []
    for node in folded.graph.node:
        shape = shapes.get(node.input[1], ()) if node.op_type == "Conv" else ()
        if shape and min(shape[:2]) >= MIN_CHANNELS and int(np.prod(shape[2:])) <= MAX_AREA:
            found.append(node)
    return found


def _sources(folded: onnx.ModelProto) -> dict[str, str]:
    """Output of a wide convolution -> its input."""
    return {node.output[0]: node.input[0] for node in _wide(folded)}


def _watched(model: onnx.ModelProto) -> onnx.ModelProto:
    """The graph that gives the inputs of its wide convolutions too."""
    made = precision.folded(model)
    known = {value.name for value in (*made.graph.input, *made.graph.output)}
    for name in dict.fromkeys(_sources(made).values()):
        if name not in known:
            made.graph.output.append(helper.make_empty_tensor_value_info(name))
    return made


def _rounded(made: onnx.ModelProto, name: str, source: str, size: float, kind: str) -> str:
    """The name of a convolution's input, through 8 bits and back."""
    largest, dtype = KINDS[kind]
    scale = np.float16(max(size / largest, float(np.finfo(np.float16).tiny)))
    pair = [f"{name}.in.scale", f"{name}.in.zero"]
    _add(made, pair[0], np.array(scale))
    _add(made, pair[1], np.zeros((), dtype))
    bits, back = f"{name}.in.{kind}", f"{name}.in.back"
    made.graph.node.append(helper.make_node("QuantizeLinear", [source, *pair], [bits], bits))
    made.graph.node.append(helper.make_node("DequantizeLinear", [bits, *pair], [back], back))
    return back


def _stored(made: onnx.ModelProto, name: str, tensor: onnx.TensorProto, kind: str) -> str:
    """The name of a convolution's weights, stored in 8 bits with a scale for each channel."""
    largest, dtype = KINDS[kind]
    values = numpy_helper.to_array(tensor).astype(np.float32)
    rows = np.abs(values.reshape(len(values), -1)).max(axis=1) / largest
    scale = np.maximum(rows, np.finfo(np.float16).tiny).astype(np.float16)
    scaled = values / scale.astype(np.float32).reshape(-1, *[1] * (values.ndim - 1))
    bits = np.clip(scaled, -largest, largest)
    stored = [f"{name}.weight.{kind}", f"{name}.weight.scale", f"{name}.weight.zero"]
    _add(made, stored[0], (np.rint(bits) if kind == "int8" else bits).astype(dtype))
    _add(made, stored[1], scale)
    _add(made, stored[2], np.zeros(len(values), dtype))
    back = f"{name}.weight.back"
    made.graph.node.append(helper.make_node("DequantizeLinear", stored, [back], back, axis=0))
    return back


def _add(made: onnx.ModelProto, name: str, values: Array) -> None:
    made.graph.initializer.append(numpy_helper.from_array(values, name))


def _psnr_db(due: Mapping[str, Array], seen: Mapping[str, Array]) -> float:
    """The least over the outputs: 20 log10(peak to peak / root mean square error)."""
    found = []
    for name, values in due.items():
        error = float(np.sqrt(np.mean((seen[name].astype(np.float64) - values) ** 2)))
        found.append(20 * np.log10(max(float(np.ptp(values)), 1e-12) / max(error, 1e-12)))
    return float(min(found))
