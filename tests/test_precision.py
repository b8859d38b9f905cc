"""The fp16 graphs: which operators are in which type, and how far the answers are from fp32."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto, helper, numpy_helper

from diffusionact import bundle_path, manifest
from diffusionact.engine_files import ONCE
from diffusionact.engines import precision
from diffusionact.errors import BundleError, EngineError
from tests import half

# Rounding to 11 bits after each of some 150 operators, sums in fp32. PyTorch's own half precision
# (`Conv2d.half()` and so on) is 8.0e-4 at most and 0.9e-4 in the mean from its fp32 on this frame,
# of pixels to 1.0; this is more than twice that, for weights that are trained anew.
MAX_ERROR, MEAN_ERROR = 2e-3, 3e-4
HEAVY = ("Conv", "ConvTranspose", "Gemm", "MatMul")
NAMES = tuple(name for name in manifest.REQUIRED if name not in ONCE)


@pytest.fixture(scope="module")
def frame() -> dict[str, list[half.Feed]]:
    return half.record_frame(bundle_path())


def shipped(name: str) -> onnx.ModelProto:
    return onnx.load(bundle_path() / f"{name}.onnx")


@pytest.mark.parametrize("name", manifest.REQUIRED)
def test_the_bundles_graphs_are_fp32(name: str) -> None:
    counts = precision.census(precision.folded(shipped(name)))
    assert {kind for count in counts.values() for kind in count} <= {"float32", "int64"}


@pytest.mark.parametrize("name", NAMES)
def test_who_is_in_which_type(name: str) -> None:
    before, after = precision.folded(shipped(name)), precision.to_fp16(shipped(name))
    plain, counts = precision.census(before), precision.census(after)
    for operator in HEAVY:
        assert counts.get(operator) == ({"float16": plain[operator]["float32"]}
                                        if operator in plain else None)  # fmt: skip
    for operator in set(counts) - precision.FOLLOW - set(HEAVY) - {"Cast"}:
        assert "float16" not in counts[operator], operator
    assert {"GroupNormalization", "Softmax"} <= set(counts)
    added = sum(counts["Cast"].values())
    assert len(after.graph.node) - added == len(before.graph.node), "Casts alone are added"


@pytest.mark.parametrize("name", NAMES)
def test_the_door_stays_fp32_and_weights_are_stored_once(name: str) -> None:
    model = precision.to_fp16(shipped(name))
    onnx.checker.check_model(model, full_check=True)
    for value in (*model.graph.input, *model.graph.output):
        assert value.type.tensor_type.elem_type == TensorProto.FLOAT
    part = manifest.read(bundle_path()).components[name]
    assert [v.name for v in model.graph.input] == [spec.name for spec in part.inputs]
    assert [v.name for v in model.graph.output] == [spec.name for spec in part.outputs]
    names = [tensor.name.removesuffix(".float16") for tensor in model.graph.initializer]
    assert len(names) == len(set(names))
    weights = {t.name: t for t in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type in HEAVY:
            kinds = {weights[n].data_type for n in node.input if n in weights}
            assert kinds <= {TensorProto.FLOAT16}, node.name
    assert model.ByteSize() < 1.01 * shipped(name).ByteSize()


@pytest.mark.parametrize("name", NAMES)
def test_the_error_on_a_real_frame(name: str, frame: dict[str, list[half.Feed]]) -> None:
    model = shipped(name)
    feed = frame[name][-1]  # of the step: the one that makes the picture
    (due,), (seen,) = half.run(model, feed), half.run_rounded(precision.to_fp16(model), feed)
    far, largest = np.abs(seen - due), max(1.0, float(np.abs(due).max()))
    print(f"{name}: max {far.max():.1e}, mean {far.mean():.1e}, values to {largest:.2f}")
    assert seen.dtype == np.float32
    assert 0 < far.max() < MAX_ERROR * largest and far.mean() < MEAN_ERROR * largest


def test_rounding_is_seen() -> None:
    """The measure itself: an fp32 graph comes out as it is, an fp16 one rounded."""
    model = keypoints()
    feed = {"x": np.linspace(-1, 1, 64, dtype=np.float32).reshape(1, 1, 8, 8),
            "place": np.array([[1.2345678]], np.float32)}  # fmt: skip
    (due,) = half.run(model, feed)
    assert np.abs(half.run_rounded(model, feed)[0] - due).max() < 1e-6
    (seen,) = half.run_rounded(precision.to_fp16(model), feed)
    assert 1e-5 < np.abs(seen - due).max() < 1e-2


def graph(
    nodes: list[onnx.NodeProto], weights: dict[str, Any], inputs: dict[str, list[int]], output: str
) -> onnx.ModelProto:
    rank = len(next(iter(inputs.values())))
    made = helper.make_graph(
        nodes, "made",
        [helper.make_tensor_value_info(n, TensorProto.FLOAT, s) for n, s in inputs.items()],
        [helper.make_tensor_value_info(output, TensorProto.FLOAT, [None] * rank)],
        [numpy_helper.from_array(np.asarray(w), n) for n, w in weights.items()],
    )  # fmt: skip
    return helper.make_model(made, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


def keypoints() -> onnx.ModelProto:
    """x + Conv(exp(-(grid - place)^2)), then Resize, MatMul, Softmax: places come in as fp32."""
    node = helper.make_node
    weights = {
        "grid": np.arange(8, dtype=np.float32), "sign": np.float32(-1.0),
        "w.float16": np.full((1, 1, 1, 1), 0.5, np.float16),
        "scales": np.array([1, 1, 2, 2], np.float32), "shape": np.array([1, 1, 1, 8], np.int64),
    }  # fmt: skip
    nodes = [
        node("Cast", ["w.float16"], ["w"], to=TensorProto.FLOAT),
        node("Sub", ["grid", "place"], ["off"]),
        node("Mul", ["off", "off"], ["square"]),
        node("Mul", ["square", "sign"], ["minus"]),
        node("Exp", ["minus"], ["dot"]),
        node("Reshape", ["dot", "shape"], ["dots"]),
        node("Conv", ["dots", "w"], ["map"]),
        node("Conv", ["x", "w"], ["stem"]),
        node("Add", ["stem", "map"], ["sum"]),
        node("Resize", ["sum", "", "scales"], ["large"], mode="nearest"),
        node("MatMul", ["large", "large"], ["product"]),
        node("Softmax", ["product"], ["y"]),
    ]
    return graph(nodes, weights, {"x": [1, 1, 8, 8], "place": [1, 1]}, "y")


def test_coordinates_stay_fp32_up_to_the_convolution() -> None:
    counts = precision.census(precision.to_fp16(keypoints()))
    assert counts["Exp"] == counts["Sub"] == {"float32": 1} and counts["Mul"] == {"float32": 2}
    assert counts["Reshape"] == counts["Softmax"] == {"float32": 1}
    assert counts["Add"] == counts["Resize"] == counts["MatMul"] == {"float16": 1}
    assert counts["Conv"] == {"float16": 2}


def test_what_tensors_do_when_they_have_two_uses() -> None:
    """A weight and a value that are needed in both types are there in both, once each."""
    node = helper.make_node
    weights = {"w": np.full((4, 4), 0.25, np.float32)}
    nodes = [
        node("MatMul", ["x", "w"], ["half"]),
        node("Exp", ["half"], ["a"]),
        node("Exp", ["half"], ["b"]),
        node("Add", ["a", "w"], ["c"]),
        node("Add", ["b", "c"], ["d"]),
        node("MatMul", ["d", "w"], ["e"]),
        node("Add", ["e", "half"], ["y"]),
    ]
    model = precision.to_fp16(graph(nodes, weights, {"x": [4, 4]}, "y"))
    assert [t.name for t in model.graph.initializer] == ["w.float16", "w"]
    assert precision.census(model)["Cast"] == {"float16": 2, "float32": 2}
    feed = {"x": np.eye(4, dtype=np.float32)}
    plain = half.run(graph(nodes, weights, {"x": [4, 4]}, "y"), feed)[0]
    assert np.abs(half.run_rounded(model, feed)[0] - plain).max() < 1e-2


def test_a_group_norm_in_pieces_is_fp32() -> None:
    """Its sums, and what follows from them, up to the next convolution."""
    node = helper.make_node
    weights = {"w": np.full((1, 1, 1, 1), 3.0, np.float32), "eps": np.float32(1e-5),
               "axes": np.array([2, 3], np.int64)}  # fmt: skip
    nodes = [
        node("Conv", ["x", "w"], ["h"]),
        node("ReduceMean", ["h", "axes"], ["mean"]),
        node("Sub", ["h", "mean"], ["off"]),
        node("Mul", ["off", "off"], ["square"]),
        node("ReduceMean", ["square", "axes"], ["variance"]),
        node("Add", ["variance", "eps"], ["safe"]),
        node("Sqrt", ["safe"], ["deviation"]),
        node("Div", ["off", "deviation"], ["normal"]),
        node("Conv", ["normal", "w"], ["y"]),
    ]
    model = precision.to_fp16(graph(nodes, weights, {"x": [1, 1, 4, 4]}, "y"))
    counts = precision.census(model)
    assert counts["Conv"] == {"float16": 2}
    for operator in ("ReduceMean", "Sub", "Mul", "Add", "Sqrt", "Div"):
        assert set(counts[operator]) == {"float32"}, operator
    feed = {"x": np.full((1, 1, 4, 4), 300.0, np.float32)}  # whose squares fp16 cannot hold
    feed["x"][0, 0, 0, 0] = 310.0
    assert np.isfinite(half.run_rounded(model, feed)[0]).all()


WRONG: dict[str, tuple[Callable[[], onnx.ModelProto], type[Exception], str]] = {
    "a weight that fp16 cannot hold": (
        lambda: graph([helper.make_node("MatMul", ["x", "w"], ["y"])],
                      {"w": np.full((2, 2), 1e5, np.float32)}, {"x": [2, 2]}, "y"),
        EngineError, "--precision fp32"),
    "an operator of somebody's own": (
        lambda: graph([helper.make_node("Swish", ["x"], ["y"], domain="some.body")],
                      {}, {"x": [2]}, "y"),
        BundleError, "some.body:Swish"),
    "a branch": (
        lambda: graph([helper.make_node("If", ["x"], ["y"], then_branch=keypoints().graph,
                                        else_branch=keypoints().graph)], {}, {"x": [1]}, "y"),
        BundleError, "graph of its own"),
}  # fmt: skip


@pytest.mark.parametrize("name", WRONG)
def test_what_cannot_be_converted_is_said(name: str) -> None:
    make, kind, message = WRONG[name]
    with pytest.raises(kind, match=message):
        precision.to_fp16(make())


def test_constants_are_folded() -> None:
    tensor = numpy_helper.from_array(np.float32([1, 2]), "any")
    nodes = [
        helper.make_node("Constant", [], ["c"], value=tensor),
        helper.make_node("Constant", [], ["d"], value_floats=[3.0, 4.0]),
        helper.make_node("Constant", [], ["unused"], value_int=7),
        helper.make_node("Add", ["x", "c"], ["s"]),
        helper.make_node("Add", ["s", "d"], ["y"]),
    ]
    made = precision.folded(graph(nodes, {"spare": np.float32(1)}, {"x": [2]}, "y"))
    assert [n.op_type for n in made.graph.node] == ["Add", "Add"]
    assert {t.name for t in made.graph.initializer} == {"c", "d"}
    assert half.run(made, {"x": np.float32([1, 1])})[0].tolist() == [5, 7]


def test_sizes_are_fixed() -> None:
    model = shipped("time")
    part = manifest.read(bundle_path()).components["time"]
    shapes = {s.name: tuple(4 if d == "N" else int(d) for d in s.shape)
              for s in (*part.inputs, *part.outputs)}  # fmt: skip
    precision.fix_sizes(model, shapes)
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    assert session.get_inputs()[0].shape == [4]
    assert session.get_outputs()[0].shape == list(shapes["time_rows"])
    with pytest.raises(BundleError, match="'t' has 1 sizes"):
        precision.fix_sizes(model, {})
