"""One component to one ONNX file: static shapes but for N, float32 operations, float16 storage."""

from __future__ import annotations

import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from diffusionact.files import write_whole
from diffusionact.graph_file import HALVED, SAME
from diffusionact.manifest import TensorSpec

OPSET = 21
EXAMPLE_ROWS = 3  # what N is while the graph is traced; any number but 1, which would be fixed
SHAPE_OPERATORS = ("Shape", "Size", "NonZero", "Range", "ConstantOfShape")


def export(
    module: nn.Module, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec], path: Path
) -> None:
    """Nothing; writes the module to `path`, whole or not at all.

    Raises:
        RuntimeError: the traced graph depends on shapes at run time, which no caller can mend.
    """
    model = trace(module, inputs, outputs)
    computed = sorted({n.op_type for n in model.graph.node if n.op_type in SHAPE_OPERATORS})
    if computed:
        raise RuntimeError(f"{path.name}: the graph computes shapes with {computed}")
    strip(model)
    note_merged(model, module)
    store_as_float16(model)
    onnx.checker.check_model(model, full_check=True)
    write_whole(path, model.SerializeToString(deterministic=True))


def trace(
    module: nn.Module, inputs: Sequence[TensorSpec], outputs: Sequence[TensorSpec]
) -> onnx.ModelProto:
    """The module's graph with the names and named sizes of the specs."""
    rows = torch.export.Dim("N", min=1)
    examples, dynamic = [], []
    for spec in inputs:
        shape = [EXAMPLE_ROWS if isinstance(size, str) else size for size in spec.shape]
        examples.append(torch.zeros(shape, dtype=getattr(torch, spec.dtype)))
        dynamic.append({i: rows for i, size in enumerate(spec.shape) if isinstance(size, str)})
    with _quiet(), torch.no_grad():  # with gradients on, training's own operators would be traced
        program = torch.onnx.export(
            module,
            tuple(examples),
            dynamo=True,
            opset_version=OPSET,
            external_data=False,
            input_names=[spec.name for spec in inputs],
            output_names=[spec.name for spec in outputs],
            dynamic_shapes=tuple(dynamic) if any(dynamic) else None,
            verbose=False,
        )
    if program is None:
        raise RuntimeError("torch.onnx.export returned no program")
    return program.model_proto


@contextmanager
def _quiet() -> Iterator[None]:
    """PyTorch warns of its own deprecated calls and of torchvision, which is not used; the
    optimiser of the graph reports every constant."""
    logs = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [log.level for log in logs]
    for log in logs:
        log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", FutureWarning)
            yield
    finally:
        for log, level in zip(logs, levels, strict=True):
            log.setLevel(level)


def strip(model: onnx.ModelProto) -> None:
    """Nothing; takes out what tracing left behind: source paths, stack traces, inner shapes."""
    del model.metadata_props[:], model.graph.metadata_props[:], model.graph.value_info[:]
    for node in model.graph.node:
        del node.metadata_props[:]
        node.doc_string = ""
    for value in (*model.graph.input, *model.graph.output):
        del value.metadata_props[:]


def note_merged(model: onnx.ModelProto, module: nn.Module) -> None:
    """Nothing; tracing keeps equal parameters once: the others' names are noted in the file, so
    that all weights can be had back out of it."""
    stored = {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    kept = {(values.shape, values.tobytes()): name for name, values in stored.items()}
    for name, parameter in module.named_parameters():
        values = parameter.detach().numpy()
        equal = kept.get((values.shape, values.tobytes()))
        if name not in stored and equal is not None:
            model.metadata_props.add(key=SAME + name, value=equal)


def store_as_float16(model: onnx.ModelProto) -> None:
    """Nothing; halves the file: every float32 initialiser that float16 holds exactly is stored so.

    A Cast gives it back as float32; runtimes fold it away when they load the graph. Nothing is
    rounded here: weights that are not exact in float16 stay as they are.
    """
    casts = []
    for initializer in model.graph.initializer:
        values = numpy_helper.to_array(initializer)
        if initializer.data_type != TensorProto.FLOAT or values.ndim == 0:
            continue
        with np.errstate(over="ignore"):
            half = values.astype(np.float16)
        if not np.array_equal(half.astype(np.float32), values):
            continue
        name = initializer.name
        initializer.CopyFrom(numpy_helper.from_array(half, name + HALVED))
        casts.append(
            helper.make_node("Cast", [name + HALVED], [name], f"{name}.cast", to=TensorProto.FLOAT)
        )
    nodes = [*casts, *model.graph.node]
    del model.graph.node[:]
    model.graph.node.extend(nodes)
