"""The judge as one small component, for `diffusionact eval`: weights stored in 8 bits.

    python -m diffusionact.export.judge training/checkpoints/judge.safetensors

Weights are rounded to 8 bits a channel and given back as float32 when the file is loaded, so that
the graph computes as before from weights half the size of the checkpoint's. What rounding does to
the reading is measured in tests/test_eval_judge.py.
"""

from __future__ import annotations

import argparse
from pathlib import Path

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from diffusionact.assets import judge_path
from diffusionact.evaluation.judge import judge_tensors
from diffusionact.export.to_onnx import store_as_float16, strip, trace
from diffusionact.files import write_whole
from diffusionact.training.models.judge import Judge, load_judge

LEAST_WEIGHTS = 1024  # smaller tensors are not worth the rounding


class _WithFeatures(nn.Module):
    """The judge's reading, and the features that a perceptual distance compares."""

    def __init__(self, judge: Judge) -> None:
        super().__init__()
        self.judge = judge

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        found = self.judge(image)
        return found.points, found.gaze, found.pose, *self.judge.features(image)


def export_judge(judge: Judge, path: Path) -> None:
    """Nothing; writes the judge to `path`, whole or not at all."""
    inputs, outputs = judge_tensors(judge.config.image_size, judge.config.channels)
    model = trace(_WithFeatures(judge).eval(), inputs, outputs)
    strip(model)
    store_as_int8(model)
    store_as_float16(model)
    onnx.checker.check_model(model, full_check=True)
    write_whole(path, model.SerializeToString(deterministic=True))


def store_as_int8(model: onnx.ModelProto) -> None:
    """Nothing; stores each large float32 weight as int8 with one scale for each of its first
    axis, behind a DequantizeLinear that runtimes fold away."""
    made, nodes, kept = [], [], []
    for initializer in model.graph.initializer:
        values = numpy_helper.to_array(initializer)
        if initializer.data_type != TensorProto.FLOAT or values.ndim < 2:
            kept.append(initializer)
            continue
        if values.size < LEAST_WEIGHTS:
            kept.append(initializer)
            continue
        rows = np.abs(values).reshape(len(values), -1).max(axis=1)
        scale = (np.maximum(rows, 1e-12) / 127).astype(np.float32)
        shaped = scale.reshape(-1, *[1] * (values.ndim - 1))
        name = initializer.name
        made.append(
            numpy_helper.from_array(np.rint(values / shaped).astype(np.int8), f"{name}.int8")
        )
        made.append(numpy_helper.from_array(scale, f"{name}.scale"))
        nodes.append(
            helper.make_node(
                "DequantizeLinear", [f"{name}.int8", f"{name}.scale"], [name], axis=0,
                name=f"{name}.dequantize",
            )
        )  # fmt: skip
    nodes.extend(model.graph.node)
    del model.graph.node[:], model.graph.initializer[:]
    model.graph.node.extend(nodes)
    model.graph.initializer.extend([*kept, *made])


def main() -> None:
    parser = argparse.ArgumentParser(description="Export the judge for `diffusionact eval`.")
    parser.add_argument("weights", type=Path)
    parser.add_argument("-o", "--output", type=Path, default=judge_path())
    arguments = parser.parse_args()
    judge, _ = load_judge(arguments.weights)
    with torch.no_grad():
        export_judge(judge, arguments.output)
    print(f"{arguments.output}: {arguments.output.stat().st_size} bytes")


if __name__ == "__main__":
    main()
