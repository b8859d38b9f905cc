"""Whether a step network is faster a frame when it takes several frames of a clip at once.

    python -m benchmarks.batch --json benchmarks/results/batch.json
    python -m benchmarks.batch --bundle full.bundle --repeats 3 --json benchmarks/results/batch.json

The frames of a clip share x_T and the timesteps, so that they can be rendered together. Each
backend's network for a batch, or where it has none a copy of the bundle's that is made here, is
held to one frame at a time, and all sizes are timed in turns. A ratio below 1 means that the batch
pays. With --json the result is added to those that the file holds of other bundles.
"""

from __future__ import annotations

import argparse
import importlib
import json
import os
import statistics
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from numpy.typing import NDArray
from onnx import helper, numpy_helper

from diffusionact import machine, manifest
from diffusionact.assets import bundle_path
from diffusionact.files import write_whole
from diffusionact.manifest import TensorSpec
from diffusionact.runtime.component import BACKENDS, Component, fixed

# Largest difference to the frames one at a time, of predictions of about 1.
TOLERANCE = {"fp32": 1e-3, "bf16": 0.25}
STEP = "unet_step"

Specs = Mapping[str, TensorSpec]
Values = NDArray[np.float32]


@dataclass(frozen=True)
class Variant:
    """A step network for `batch` frames, bound to its arrays."""

    batch: int
    network: Component
    arrays: Mapping[str, Values]

    def run_ms(self) -> tuple[float, float]:
        """Milliseconds a frame, on the wall and of all cores."""
        wall_s, cores_s = time.perf_counter(), time.process_time()
        self.network.run()
        spent_s = time.perf_counter() - wall_s, time.process_time() - cores_s
        return spent_s[0] * 1000.0 / self.batch, spent_s[1] * 1000.0 / self.batch


def widened(model: onnx.ModelProto, batch: int) -> onnx.ModelProto:
    """Return a step network that was exported for one frame, for `batch` of them.

    What modulates one frame rides in the group norms' own scale and shift, one number a channel;
    several frames have one each, so these become a product and a sum behind the norm.
    """
    made = onnx.ModelProto()
    made.CopyFrom(model)
    if batch == 1:
        return made
    for value in (*made.graph.input, *made.graph.output):
        value.type.tensor_type.shape.dim[0].dim_value = batch
    constants = {initializer.name: initializer for initializer in made.graph.initializer}
    for node in made.graph.node:
        if node.op_type == "Reshape":
            shape = numpy_helper.to_array(constants[node.input[1]]).copy()
            shape[0] = batch if shape[0] == 1 else shape[0]
            constants[node.input[1]].CopyFrom(numpy_helper.from_array(shape, node.input[1]))
    makers = {name: node for node in made.graph.node for name in node.output}
    nodes, added = [], {"column": np.array([2, 3], np.int64)}
    for node in made.graph.node:
        nodes.append(node)
        rows = [makers.get(name) for name in node.input[1:]]
        if node.op_type != "GroupNormalization" or not all(
            row is not None and row.op_type == "Gather" for row in rows
        ):
            continue
        nodes += _modulated(node, [row.input[0] for row in rows if row is not None])
        split = makers[rows[0].input[0]]  # type: ignore[union-attr]
        sizes = numpy_helper.to_array(constants[split.input[1]])
        channels = int(sizes[list(split.output).index(rows[0].input[0])])  # type: ignore[union-attr]
        added[node.input[1]] = np.ones(channels, np.float32)
        added[node.input[2]] = np.zeros(channels, np.float32)
    del made.graph.node[:]
    made.graph.node.extend(nodes)
    made.graph.initializer.extend(numpy_helper.from_array(a, name) for name, a in added.items())
    return made


def _modulated(norm: onnx.NodeProto, rows: list[str]) -> list[onnx.NodeProto]:
    """The nodes behind a norm that scale and shift each frame's channels; rows: [batch,C]."""
    out = norm.output[0]
    norm.output[0] = f"{out}.plain"
    norm.input[1], norm.input[2] = f"{out}.ones", f"{out}.zeros"
    make = helper.make_node
    return [
        *(make("Unsqueeze", [row, "column"], [f"{out}.{row}"]) for row in rows),
        make("Mul", [norm.output[0], f"{out}.{rows[0]}"], [f"{out}.scaled"]),
        make("Add", [f"{out}.scaled", f"{out}.{rows[1]}"], [out]),
    ]


def open_variants(
    backend: str, precision: str, paths: Mapping[int, Path], specs: tuple[Specs, Specs]
) -> list[Variant]:
    """Return the networks of all batch sizes; each frame of a batch has values of its own."""
    module = importlib.import_module(BACKENDS[backend])
    values = np.random.default_rng(0)
    frames = {
        name: values.standard_normal((max(paths), *spec.shape[1:])).astype(np.float32)
        for name, spec in specs[0].items()
    }
    made = []
    for batch, path in paths.items():
        inputs, outputs = (
            {name: replace(spec, shape=(batch, *spec.shape[1:])) for name, spec in part.items()}
            for part in specs
        )
        how = {"device": "cpu", "threads": 0, "precision": precision}
        if hasattr(module, "open_together") and batch > 1:
            network = module.open_together(paths[1], *specs, frames=batch, **how)
        else:
            network = module.open_model(path, inputs, outputs, **how)
        arrays = {name: frames[name][:batch].copy() for name in inputs}
        arrays |= {name: np.zeros(spec.shape, np.float32) for name, spec in outputs.items()}
        network.bind(**arrays)
        made.append(Variant(batch, network, arrays))
    return made


def worst_difference(variants: list[Variant], specs: tuple[Specs, Specs]) -> float:
    """Return how far the frames of the largest batch are from the same frames one at a time."""
    one, many = variants[0], variants[-1]
    many.network.run()
    apart = []
    for i in range(many.batch):
        for name in specs[0]:
            one.arrays[name][:] = many.arrays[name][i : i + 1]
        one.network.run()
        for name in specs[1]:
            apart.append(np.abs(one.arrays[name][0] - many.arrays[name][i]).max())
            if not one.arrays[name].any():
                raise SystemExit(f"{name} is all zeros: nothing was computed")
    return float(np.max(apart))  # NaN where one is


def measure(variants: list[Variant], repeats: int) -> Mapping[str, Any]:
    """Return milliseconds a frame, on the wall and of all cores (which a busy machine disturbs
    less), and their ratios to one frame at a time, for each batch."""
    for variant in variants:
        variant.run_ms()
    rounds = []
    for i in range(repeats):
        order = variants if i % 2 else variants[::-1]
        rounds.append({variant.batch: variant.run_ms() for variant in order})

    def table(batch: int, which: int) -> Mapping[str, Any]:
        ratios = [row[batch][which] / row[1][which] for row in rounds]
        return {
            "ms_a_frame": round(statistics.median(row[batch][which] for row in rounds), 2),
            "ratio": round(statistics.median(ratios), 3),
            "quartiles": [round(q, 3) for q in np.quantile(ratios, (0.25, 0.75)).tolist()],
        }

    return {str(v.batch): {"wall": table(v.batch, 0), "cores": table(v.batch, 1)} for v in variants}


def main() -> None:
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--bundle", type=Path, default=bundle_path())
    parser.add_argument(
        "--batches", type=int, nargs="+", default=[1, 2, 4], help="1, and what is held to it"
    )
    parser.add_argument("--backends", nargs="+", default=["ort:fp32", "openvino:fp32"])
    parser.add_argument("--repeats", type=int, default=15)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    known = manifest.read(arguments.bundle)
    spec = known.components[STEP]
    specs = fixed(spec.inputs, {}), fixed(spec.outputs, {})
    report: dict[str, Any] = {
        "bundle": known.name,
        "side_px": known.image_size,
        "repeats": arguments.repeats,
        "when": machine.now(),
        "commit": machine.commit(),
        "load_average": machine.load_average(),
        "machine": machine.describe(),
        "versions": machine.versions(),
    }
    with tempfile.TemporaryDirectory() as folder:
        os.environ["DIFFUSIONACT_CACHE"] = folder  # these copies are nothing to keep
        model = onnx.load(arguments.bundle / spec.file)
        paths = {
            batch: Path(folder) / f"step_{batch}.onnx" for batch in sorted({1, *arguments.batches})
        }
        for batch, path in paths.items():
            onnx.save(widened(model, batch), path)
        for name in arguments.backends:
            backend, _, precision = name.partition(":")
            variants = open_variants(backend, precision, paths, specs)
            worst = worst_difference(variants, specs)
            if not worst <= TOLERANCE[precision]:
                raise SystemExit(f"{name}: a batch differs from its frames by {worst}")
            report[name] = {
                "worst_difference": worst,
                "batches": measure(variants, arguments.repeats),
            }
    print(json.dumps(report))
    if arguments.json:
        results = json.loads(arguments.json.read_text()) if arguments.json.exists() else {}
        results[known.name] = report
        write_whole(arguments.json, json.dumps(results, indent=1) + "\n")


if __name__ == "__main__":
    main()
