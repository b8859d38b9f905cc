"""The bundle's fp32 graph in half precision, and a count of what is computed in which type.

TensorRT 11 is strongly typed: an engine has the types of its ONNX graph, no more and no less.
Everything here is `onnx` alone.

Source: the types are those of PyTorch's own half precision with group norm in float32, and with
NumPy's promotion where the two meet.
"""

from __future__ import annotations

from collections import Counter, defaultdict
from collections.abc import Iterator, Mapping
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
from onnx import TensorProto, helper, numpy_helper

from diffusionact.engine_files import Census
from diffusionact.errors import BundleError, EngineError

Array: TypeAlias = npt.NDArray[Any]

FLOAT, HALF = TensorProto.FLOAT, TensorProto.FLOAT16
# Where the time goes; their sums are in fp32 inside the libraries.
IN_HALF = frozenset({"Conv", "ConvTranspose", "Gemm", "MatMul"})
# Computed in fp32, then back in the type of their input: sums over many values, and exponentials.
ISLANDS = frozenset(
    {"GroupNormalization", "InstanceNormalization", "LayerNormalization", "Softmax", "LogSoftmax"}
)
# In fp16 where all that flows in is; every operator that is in no list is computed in fp32.
FOLLOW = frozenset(
    {
        "Add", "Sub", "Mul", "Neg", "Abs", "Min", "Max", "Clip", "Where",
        "Sigmoid", "Relu", "LeakyRelu", "PRelu", "Tanh",
        "AveragePool", "MaxPool", "Resize", "DepthToSpace", "SpaceToDepth", "Pad",
        "Concat", "Split", "Slice", "Gather", "Expand", "Tile", "Identity",
        "Reshape", "Flatten", "Squeeze", "Unsqueeze", "Transpose",
    }
)  # fmt: skip


def to_fp16(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph with its convolutions and linear layers in float16.

    Inputs, outputs, the sums of norms, softmax and whatever is computed from fp32 inputs before
    the first convolution stay in fp32. Weights are stored once, in the type they are used in.

    Raises: BundleError for an operator that is not understood, EngineError for a weight that
    float16 cannot hold.
    """
    return _Writer(folded(model)).write()


def folded(model: onnx.ModelProto) -> onnx.ModelProto:
    """Return the graph with the Casts of its stored weights carried out, and no Constant node."""
    made = _copy_without_nodes(model)
    constants = {tensor.name: tensor for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Constant":
            constants[node.output[0]] = _constant(node)
        elif node.op_type == "Cast" and node.input[0] in constants:
            values = numpy_helper.to_array(constants[node.input[0]])
            kind = helper.tensor_dtype_to_np_dtype(_attribute(node, "to"))
            constants[node.output[0]] = numpy_helper.from_array(values.astype(kind), node.output[0])
        else:
            made.graph.node.append(node)
    used = {name for node in made.graph.node for name in node.input}
    used |= {value.name for value in made.graph.output}
    made.graph.initializer.extend(tensor for name, tensor in constants.items() if name in used)
    return made


def fix_sizes(model: onnx.ModelProto, shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Return nothing; inputs and outputs have these shapes.

    Raises: BundleError for a tensor of another rank or name.
    """
    for value in (*model.graph.input, *model.graph.output):
        dims = value.type.tensor_type.shape.dim
        shape = shapes.get(value.name, ())
        if len(shape) != len(dims):
            raise BundleError(f"tensor {value.name!r} has {len(dims)} sizes, wanted {list(shape)}")
        for dim, size in zip(dims, shape, strict=True):
            dim.dim_value = size


def census(model: onnx.ModelProto) -> Census:
    """Return operator -> type of its output -> count, sorted by name; weights are not counted."""
    types = {value.name: value.type.tensor_type.elem_type for value in model.graph.input}
    types |= {tensor.name: tensor.data_type for tensor in model.graph.initializer}
    counts: dict[str, Counter[str]] = defaultdict(Counter)
    versions = _opsets(model)
    for node in model.graph.node:
        outputs = _output_types(node, versions, [types.get(name, 0) for name in node.input])
        types |= dict(zip(node.output, outputs, strict=True))
        counts[node.op_type][_word(outputs[0])] += 1
    return {name: dict(sorted(counts[name].items())) for name in sorted(counts)}


class _Writer:
    """One pass over a folded graph: each node gets its type, its inputs in it, and is written."""

    def __init__(self, model: onnx.ModelProto) -> None:
        self._model = model
        self._versions = _opsets(model)
        self._weights = {t.name: t for t in model.graph.initializer}
        # the type that a value flows on in, and the names of its versions by type
        self._types = {v.name: v.type.tensor_type.elem_type for v in model.graph.input}
        self._names: dict[tuple[str, int], str] = {(n, kind): n for n, kind in self._types.items()}
        self._types |= {name: tensor.data_type for name, tensor in self._weights.items()}
        self._whole: set[str] = set()  # weights that are no floats and are written already
        self._made = _copy_without_nodes(model)

    def write(self) -> onnx.ModelProto:
        for node in self._model.graph.node:
            self._node(node)
        for value in self._model.graph.output:
            if self._names.get((value.name, FLOAT)) != value.name:
                self._cast(self._name(value.name, HALF), value.name, FLOAT)
        onnx.checker.check_model(self._made)
        return self._made

    def _node(self, node: onnx.NodeProto) -> None:
        seen = [self._types.get(name, 0) for name in node.input]
        free = _free_inputs(node, self._versions)
        floats = [i for i, kind in enumerate(seen) if kind in (FLOAT, HALF)]
        flowing = {seen[i] for i in floats if free[i] and node.input[i] not in self._weights}
        kind = _kind(node.op_type, flowing)
        made = onnx.NodeProto()
        made.CopyFrom(node)
        given = [kind if i in floats and free[i] else seen[i] for i in range(len(seen))]
        for i, name in enumerate(node.input):
            if i in floats:
                made.input[i] = self._name(name, kind if free[i] else FLOAT)
            elif name in self._weights and name not in self._whole:
                self._whole.add(name)
                self._made.graph.initializer.append(self._weights[name])
        back = node.op_type in ISLANDS and seen[0] == HALF
        outputs = _output_types(node, self._versions, given)
        for i, (name, output) in enumerate(zip(node.output, outputs, strict=True)):
            self._types[name] = HALF if back and output == FLOAT else output
            if output == HALF and self._is_output(name):
                made.output[i] = f"{name}.float16"
            self._names[name, output] = made.output[i]
        self._made.graph.node.append(made)

    def _name(self, name: str, kind: int) -> str:
        """The name of a value in a type; it is made where it is not there yet."""
        if (name, kind) not in self._names:
            if name in self._weights:
                made = self._weight(self._weights[name], kind)
            else:
                source = self._names[name, HALF if kind == FLOAT else FLOAT]
                made = self._cast(source, f"{name}.{_word(kind)}", kind)
            self._names[name, kind] = made
        return self._names[name, kind]

    def _cast(self, source: str, name: str, kind: int) -> str:
        node = helper.make_node("Cast", [source], [name], f"{name}.cast", to=kind)
        self._made.graph.node.append(node)
        return name

    def _weight(self, tensor: onnx.TensorProto, kind: int) -> str:
        name = tensor.name if kind == FLOAT else f"{tensor.name}.float16"
        values = numpy_helper.to_array(tensor)
        with np.errstate(over="ignore"):
            made = values.astype(helper.tensor_dtype_to_np_dtype(kind))
        if not np.isfinite(made).all():
            raise EngineError(
                f"weight {tensor.name!r} reaches {np.abs(values).max():.3g}, float16 holds 65504; "
                "build with --precision fp32"
            )
        self._made.graph.initializer.append(numpy_helper.from_array(made, name))
        return name

    def _is_output(self, name: str) -> bool:
        return any(value.name == name for value in self._model.graph.output)


def _kind(operator: str, flowing: set[int]) -> int:
    """The type in which an operator is computed, given those of the values that flow into it."""
    if operator in IN_HALF:
        return HALF
    return HALF if operator in FOLLOW and flowing == {HALF} else FLOAT


def _copy_without_nodes(model: onnx.ModelProto) -> onnx.ModelProto:
    made = onnx.ModelProto()
    made.ir_version = model.ir_version
    made.opset_import.extend(model.opset_import)
    made.graph.name = model.graph.name
    made.graph.input.extend(model.graph.input)
    made.graph.output.extend(model.graph.output)
    return made


def _constant(node: onnx.NodeProto) -> onnx.TensorProto:
    (attribute,) = node.attribute
    if attribute.name != "value":
        values = np.array(helper.get_attribute_value(attribute))
        kind = np.float32 if "float" in attribute.name else np.int64
        return numpy_helper.from_array(values.astype(kind), node.output[0])
    made = onnx.TensorProto()
    made.CopyFrom(attribute.t)
    made.name = node.output[0]
    return made


def _attribute(node: onnx.NodeProto, name: str) -> Any:
    return next(helper.get_attribute_value(a) for a in node.attribute if a.name == name)


def _opsets(model: onnx.ModelProto) -> dict[str, int]:
    return {entry.domain: entry.version for entry in model.opset_import}


def _schema(node: onnx.NodeProto, versions: Mapping[str, int]) -> onnx.defs.OpSchema:
    try:
        if any(a.type in (onnx.AttributeProto.GRAPH, onnx.AttributeProto.GRAPHS)
               for a in node.attribute):  # fmt: skip
            raise BundleError(f"operator {node.op_type!r} has a graph of its own. {_MEND}")
        return onnx.defs.get_schema(node.op_type, versions[node.domain], node.domain)
    except (KeyError, onnx.defs.SchemaError) as error:
        raise BundleError(f"operator {node.domain}:{node.op_type} is not known. {_MEND}") from error


def _free_inputs(node: onnx.NodeProto, versions: Mapping[str, int]) -> list[bool]:
    """For each input, whether its type is the operator's choice, as `scales` of Resize is not."""
    schema = _schema(node, versions)
    return [len(_allowed(schema, _parameter(schema.inputs, i))) > 1 for i in range(len(node.input))]


def _output_types(
    node: onnx.NodeProto, versions: Mapping[str, int], inputs: list[int]
) -> list[int]:
    """The types of a node's outputs, given those of its inputs, 0 for one that is left out."""
    if node.op_type == "Cast":
        return [_attribute(node, "to")]
    schema = _schema(node, versions)
    bound = {_parameter(schema.inputs, i).type_str: kind for i, kind in enumerate(inputs) if kind}
    return list(_bind(node, schema, bound))


def _bind(
    node: onnx.NodeProto, schema: onnx.defs.OpSchema, bound: Mapping[str, int]
) -> Iterator[int]:
    for i in range(len(node.output)):
        parameter = _parameter(schema.outputs, i)
        allowed = _allowed(schema, parameter)
        if parameter.type_str in bound:
            yield bound[parameter.type_str]
        elif len(allowed) == 1:
            yield _kind_of(next(iter(allowed)))
        else:
            raise BundleError(f"operator {node.op_type!r}: the type of its output. {_MEND}")


def _parameter(parameters: Any, index: int) -> onnx.defs.OpSchema.FormalParameter:
    last = len(parameters) - 1  # it may be there many times
    parameter: onnx.defs.OpSchema.FormalParameter = parameters[min(index, last)]
    return parameter


def _allowed(
    schema: onnx.defs.OpSchema, parameter: onnx.defs.OpSchema.FormalParameter
) -> frozenset[str]:
    for constraint in schema.type_constraints:
        if constraint.type_param_str == parameter.type_str:
            return frozenset(constraint.allowed_type_strs)
    return frozenset({parameter.type_str})


def _kind_of(text: str) -> int:
    """The number of a type that a schema writes as "tensor(int64)"."""
    word = text.removeprefix("tensor(").removesuffix(")").upper()
    return int(TensorProto.DataType.Value(word))


def _word(kind: int) -> str:
    return "float32" if kind == FLOAT else TensorProto.DataType.Name(kind).lower()


_MEND = "No fp16 graph is made of it; build with --precision fp32, or export the bundle again"
