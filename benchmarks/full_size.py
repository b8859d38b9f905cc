"""The published network at its full size, on weights made by a rule: import, export, render.

    python -m benchmarks.full_size --json benchmarks/results/full_size.json

Measures the time and the peak memory of each stage, the sizes of the files, and how far a whole
flow (inversion, then render) in ONNX Runtime is from PyTorch. Every stage is a process of its own,
so that its peak is its own. The pictures are noise: the weights have seen nothing.

The exporter compares every bundle with PyTorch over the published 50 and 20 steps; with fewer
`--invert` and `--render` it compares over that many, which a busy machine can do in minutes.
"""

from __future__ import annotations

import argparse
import gzip
import json
import multiprocessing
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import torch
from numpy.typing import NDArray

from diffusionact import cli
from diffusionact.errors import SettingsError
from diffusionact.export import parity
from diffusionact.export.bundle import PUBLISHED_CARD, export_bundle
from diffusionact.manifest import Sampling
from diffusionact.runtime.reenactor import Reenactor
from diffusionact.runtime.settings import Settings
from diffusionact.training import diffusion, weights, weights_folder
from tests.golden import rule

ROOT = Path(__file__).parents[1]
TABLE = ROOT / "tests" / "golden" / "networks.json.gz"
MEMORY_LIMIT_BYTES = 16 * 10**9  # what an export may take
KIB = 1024  # the unit of ru_maxrss on Linux

Pictures = NDArray[np.float32]


@dataclass(frozen=True)
class Plan:
    """Where everything lies, and the step counts of the flow."""

    folder: Path
    render: int
    invert: int
    threads: int

    @property
    def checkpoint(self) -> Path:
        return self.folder / "diffusionact_model.pt"

    @property
    def weights(self) -> Path:
        return self.folder / "weights"

    @property
    def bundle(self) -> Path:
        return self.folder / "full.bundle"


@dataclass(frozen=True)
class Flow:
    """What a whole flow gave, and the seconds of loading, inversion and render."""

    x_T: Pictures
    frame: Pictures
    load_s: float
    invert_s: float
    render_s: float


def make_checkpoint(plan: Plan) -> None:
    """Nothing; a file of the published form, both weight sets of the U-Net in it, is written."""
    keys = json.loads(gzip.decompress(TABLE.read_bytes()))["full"]["keys"]
    content: dict[str, Any] = {"best_val_loss": 0.0}
    for part in ("state_dict_diff", "state_dict_net"):
        arrays = rule.part(keys, f"{part}/")
        content[part] = {name: torch.from_numpy(array) for name, array in arrays.items()}
    torch.save(content, plan.checkpoint)


def import_checkpoint(plan: Plan) -> None:
    """Nothing; the folder of weights is made by the command."""
    status = cli.main(["import", str(plan.checkpoint), "-o", str(plan.weights)])
    if status:
        raise SettingsError(f"diffusionact import ended with status {status}")


def export(plan: Plan) -> None:
    """Nothing; the bundle is there, and passed the exporter's own comparison."""
    torch.set_num_threads(plan.threads)
    parity.RENDER_STEPS, parity.INVERT_STEPS = plan.render, plan.invert
    card = replace(
        PUBLISHED_CARD,
        name="rule-ffhq256",
        render=Sampling(plan.render),
        invert=Sampling(plan.invert),
        licence="none",
    )
    export_bundle(plan.weights, plan.bundle, card)


def torch_flow(plan: Plan) -> Flow:
    """The flow through the networks that were exported."""
    torch.set_num_threads(plan.threads)
    start = time.monotonic()
    loaded = weights.load(plan.weights / weights_folder.MODEL_FILE)
    encoder, model, ema = map(loaded.network, ("reenactment", "render", "invert"))
    image, of_source, of_target = map(torch.from_numpy, parity.pictures(loaded.config.image_size))
    ready = time.monotonic()
    with torch.inference_mode():
        x_T = diffusion.invert(ema, "eps", image, encoder(image, of_source), plan.invert)
        inverted = time.monotonic()
        frame = diffusion.render(model, "eps", x_T, encoder(image, of_target), plan.render)
    done = time.monotonic()
    return Flow(x_T.numpy(), frame.numpy(), ready - start, inverted - ready, done - inverted)


def onnx_flow(plan: Plan) -> Flow:
    """The flow through the runtime."""
    start = time.monotonic()
    with Reenactor.load(plan.bundle, settings=Settings(threads=plan.threads)) as act:
        image, of_source, of_target = parity.pictures(act.manifest.image_size)
        ready = time.monotonic()
        x_T = act.invert(image, of_source)
        inverted = time.monotonic()
        frame = act.generate(x_T, image, of_target)
        done = time.monotonic()
    return Flow(x_T, frame, ready - start, inverted - ready, done - inverted)


def staged(name: str, stage: Callable[[Plan], Any], plan: Plan) -> tuple[Any, dict[str, Any]]:
    """What the stage gave, in a process of its own, with its seconds and its peak of memory."""
    print(f"{name} ...", file=sys.stderr, flush=True)
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(1, mp_context=context) as pool:
        result, seconds, cpu_s, peak_bytes = pool.submit(_timed, stage, plan).result()
    told = {"seconds": round(seconds, 1), "cpu_s": round(cpu_s, 1), "peak_bytes": peak_bytes}
    print(f"{name}: {told}", file=sys.stderr, flush=True)
    return result, told


def _timed(stage: Callable[[Plan], Any], plan: Plan) -> tuple[Any, float, float, int]:
    start, cpu_start = time.monotonic(), time.process_time()
    result = stage(plan)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * KIB
    return result, time.monotonic() - start, time.process_time() - cpu_start, peak


def measure(plan: Plan) -> dict[str, Any]:
    """All figures, ready for JSON."""
    stages: dict[str, dict[str, Any]] = {}
    for name, stage in (
        ("make", make_checkpoint), ("import", import_checkpoint), ("export", export),
    ):  # fmt: skip
        _, stages[name] = staged(name, stage, plan)
    ours, stages["torch"] = staged("torch", torch_flow, plan)
    exported, stages["onnx"] = staged("onnx", onnx_flow, plan)
    for name, flow in (("torch", ours), ("onnx", exported)):
        stages[name] |= {
            "load_s": round(flow.load_s, 1),
            "invert_s_per_step": round(flow.invert_s / plan.invert, 2),
            "render_s_per_step": round(flow.render_s / plan.render, 2),
        }
    return {
        "network": "ffhq256, both weight sets, weights made by a rule",
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "threads": plan.threads,
        "load_average": [round(load, 1) for load in os.getloadavg()],
        "versions": {**parity.VERSIONS, "onnxruntime": onnxruntime.__version__},
        "steps": {"invert": plan.invert, "render": plan.render},
        "stages": stages,
        "export_within_16_GB": stages["export"]["peak_bytes"] < MEMORY_LIMIT_BYTES,
        "parity": {
            "x_T": _apart(ours.x_T, exported.x_T),
            "frame": _apart(ours.frame, exported.frame),
        },
        "export_parity": json.loads((plan.bundle / "parity.json").read_text())["rows"],
        "bytes": _sizes(plan),
    }


def _apart(a: Pictures, b: Pictures) -> dict[str, float]:
    apart = np.abs(a.astype(np.float64) - b)
    return {"max_abs": float(apart.max()), "mean_abs": float(apart.mean())}


def _sizes(plan: Plan) -> dict[str, int]:
    files = [plan.checkpoint, *plan.weights.iterdir(), *plan.bundle.iterdir()]
    found = {str(path.relative_to(plan.folder)): path.stat().st_size for path in sorted(files)}
    return {**found, "bundle": sum(path.stat().st_size for path in plan.bundle.iterdir())}


def main() -> None:
    parser = argparse.ArgumentParser(description="Import, export and render at full size.")
    add = parser.add_argument
    add("--render", type=int, default=parity.RENDER_STEPS, metavar="T")
    add("--invert", type=int, default=parity.INVERT_STEPS, metavar="T")
    add("--threads", type=int, default=os.cpu_count() or 1)
    add("--folder", type=Path, help="kept; otherwise a temporary one, 5 GB")
    add("--json", type=Path)
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="full-size-") as temporary:
        folder = given.folder or Path(temporary)
        folder.mkdir(parents=True, exist_ok=True)
        figures = measure(Plan(folder, given.render, given.invert, given.threads))
    text = json.dumps(figures, indent=1)
    print(text)
    if given.json:
        given.json.parent.mkdir(parents=True, exist_ok=True)
        given.json.write_text(text + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
