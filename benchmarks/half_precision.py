"""How far half precision is from float32 on a real frame: our graphs, and PyTorch's own.

    python -m benchmarks.half_precision --json benchmarks/results/half_precision.json

The inputs are those that the runtime feeds the shipped model for one frame. Both are rounded as a
GPU does it: float16 in, sums in float32, float16 out of every operator. ONNX Runtime on the CPU
drops the rounding between operators, so that its number is told beside them and means little.
"""

from __future__ import annotations

import argparse
import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnx
import torch
from torch import nn

from diffusionact import bundle_path, manifest, schedule
from diffusionact.engines import precision
from diffusionact.export import wrap
from diffusionact.runtime.loop import ddim_step, runs
from diffusionact.training import weights
from tests import half

Array: TypeAlias = npt.NDArray[Any]
Network: TypeAlias = Callable[[dict[str, Array]], Array]

NAMES = ("encoder", "unet_step")
LEVELS = 127.5  # of 8 bits in a picture's [-1, 1]


def torch_network(module: nn.Module, names: list[str]) -> Network:
    """The module over arrays by name."""

    def run(feed: dict[str, Array]) -> Array:
        with torch.inference_mode():
            answer = module(*(torch.from_numpy(feed[name]) for name in names))
        values: Array = answer.float().numpy()
        return values

    return run


def halved(module: nn.Module) -> nn.Module:
    """A copy whose convolutions and linear layers are in half precision, as exporters do it."""
    made = copy.deepcopy(module)
    for layer in made.modules():
        if isinstance(layer, (nn.Conv1d, nn.Conv2d, nn.Linear)):
            layer.half()
            layer.register_forward_pre_hook(lambda _, given: tuple(x.half() for x in given))
    return made


def networks(name: str) -> dict[str, Network]:
    """The routes of a component, float32 first."""
    kept = weights.load(bundle_path())
    encoder: Any = kept.network("reenactment")
    render: Any = kept.network("render")
    modules = wrap.components(encoder, render, None)
    model = onnx.load(bundle_path() / f"{name}.onnx")
    made = precision.to_fp16(model)
    inputs = [value.name for value in model.graph.input]
    return {
        "float32": lambda feed: half.run(model, feed)[0],
        "our graph": lambda feed: half.run_rounded(made, feed)[0],
        "PyTorch half": torch_network(halved(modules[name]), inputs),
        "our graph, ONNX Runtime on the CPU": lambda feed: half.run(made, feed)[0],
    }


def frame(step: Network, feeds: list[dict[str, Array]]) -> Array:
    """The picture at the end of the run whose inputs were recorded, by this network."""
    found = manifest.read(bundle_path())
    run: schedule.Run = runs(found)[0]
    x = feeds[0]["x_t"].copy()
    for plan, feed in zip(run.steps, feeds, strict=True):
        prediction = step({**feed, "x_t": x}).copy()
        ddim_step(x, prediction, np.empty_like(x), plan)
    return x


def rows() -> list[dict[str, Any]]:
    """One row for each component and route, and for the whole frame."""
    recorded = half.record_frame(bundle_path())
    found = []

    def row(what: str, route: str, seen: Array, due: Array, unit: float = 1.0) -> None:
        far = np.abs(seen.astype(np.float64) - due) * unit
        found.append(
            {"what": what, "route": route, "max": float(far.max()), "mean": float(far.mean())}
        )

    for name in NAMES:
        routes = networks(name)
        feeds = [dict(feed) for feed in recorded[name]]
        due = routes["float32"](feeds[-1])
        for route in list(routes)[1:]:
            row(name, route, routes[route](feeds[-1]), due)
        if name == "unet_step":
            picture = frame(routes["float32"], feeds)
            for route in list(routes)[1:3]:
                what = f"a frame of {len(feeds)} steps, levels of 255"
                row(what, route, frame(routes[route], feeds), picture, LEVELS)
    return found


def main() -> None:
    form = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    found = rows()
    for entry in found:
        print(f"{entry['what']:36} {entry['route']:36} {entry['max']:9.2e} {entry['mean']:9.2e}")
    if arguments.json:
        head = {"bundle": manifest.read(bundle_path()).weights_sha256, "torch": torch.__version__}
        arguments.json.write_text(json.dumps({**head, "rows": found}, indent=2) + "\n")


if __name__ == "__main__":
    main()
