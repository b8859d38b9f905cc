"""ONNX graphs run with the rounding of half precision, and inputs recorded from the runtime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt
import onnx
import onnxruntime
from onnx import TensorProto, helper, numpy_helper

from diffusionact import driver_path, portrait_paths
from diffusionact import manifest as manifest_file
from diffusionact.landmarks import Track
from diffusionact.runtime.loop import open_loop
from diffusionact.runtime.recorder import Recorder
from diffusionact.runtime.reenactor import Reenactor
from diffusionact.runtime.settings import Settings

Array: TypeAlias = npt.NDArray[Any]
Feed: TypeAlias = Mapping[str, Array]

HALF = np.dtype(np.float16)


def run(model: onnx.ModelProto, feed: Feed) -> list[Array]:
    """The outputs by ONNX Runtime.

    Not a measure of float16: on the CPU it runs such operators in float32 and drops the rounding
    between two of them.
    """
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    content = model.SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    outputs: list[Array] = session.run(None, dict(feed))
    return outputs


def run_rounded(model: onnx.ModelProto, feed: Feed) -> list[Array]:
    """The outputs, one operator after the other: float16 in, sums in float32, float16 out.

    As a GPU's tensor cores do it.
    """
    values: dict[str, Array] = {**feed}
    values |= {tensor.name: numpy_helper.to_array(tensor) for tensor in model.graph.initializer}
    for node in model.graph.node:
        if node.op_type == "Cast":
            kind = next(a.i for a in node.attribute if a.name == "to")
            made = [values[node.input[0]].astype(helper.tensor_dtype_to_np_dtype(kind))]
        else:
            inputs = {name: values[name] for name in node.input if name}
            half = any(array.dtype == HALF for array in inputs.values())
            made = run(_alone(node, inputs), {n: _single(a) for n, a in inputs.items()})
            made = [a.astype(HALF) if half and a.dtype == np.float32 else a for a in made]
        values |= dict(zip(node.output, made, strict=True))
    return [values[output.name] for output in model.graph.output]


def _single(array: Array) -> Array:
    return array.astype(np.float32) if array.dtype == HALF else array


def _alone(node: onnx.NodeProto, inputs: Feed) -> onnx.ModelProto:
    """A model of one operator, in float32."""
    graph = helper.make_graph(
        [node],
        "one",
        [
            helper.make_tensor_value_info(
                name, helper.np_dtype_to_tensor_dtype(_single(a).dtype), a.shape
            )
            for name, a in inputs.items()
        ],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in node.output],
    )
    opset = helper.make_opsetid("", 21)
    return helper.make_model(graph, opset_imports=[opset], ir_version=10)


def record_frame(bundle: Path) -> dict[str, list[Feed]]:
    """The inputs of each network in one frame of the shipped driver on a shipped portrait, x_T by
    inversion."""
    portrait = portrait_paths()[0]
    face = Track.load(portrait.with_suffix(".landmarks.npz"))[0]
    driver = Track.load(driver_path().with_suffix(".landmarks.npz"))
    picture = cv2.imread(str(portrait))
    assert picture is not None
    recorder, manifest = Recorder(), manifest_file.read(bundle)
    loop = open_loop(bundle, manifest, backend="ort", device="cpu", wrap=recorder.wrap)
    with Reenactor(manifest, loop, Settings()) as act:
        source = act.prepare(picture, landmarks=face)
        for feeds in recorder.feeds.values():
            feeds.clear()
        act.reenact(driver[40], source)
    return {name: list(feeds) for name, feeds in recorder.feeds.items()}
