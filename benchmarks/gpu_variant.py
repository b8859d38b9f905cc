"""One way to run the networks, measured in a process of its own: see benchmarks/gpu.py.

python -m benchmarks.gpu_variant REQUEST.json RESULT.json
"""

from __future__ import annotations

import json
import statistics
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.gpu_floor import clocks
from diffusionact import manifest as manifest_file
from diffusionact import schedule
from diffusionact.condition import Drawing
from diffusionact.files import write_whole
from diffusionact.manifest import Crop, Manifest, Sampling, Schedule, Training
from diffusionact.runtime import torch as torch_backend
from diffusionact.runtime.component import Component, fixed
from diffusionact.runtime.loop import Loop, Pass
from diffusionact.training.models import FFHQ256, NetworkConfig, ReenactmentEncoder, UNet
from tests.golden import rule

TINY = NetworkConfig(32, 16, (1, 2), (1, 2, 2), res_blocks=1, attention_at=(16,), embed=32)
CONFIGS: Mapping[str, NetworkConfig] = {"ffhq256": FFHQ256, "tiny": TINY}
PARTS = {"encoder": (ReenactmentEncoder, "state_dict_net/"),
         "render": (UNet, "state_dict_diff/model.")}  # fmt: skip
INVERT_STEPS = 4  # of the pass that is prepared and not timed
LEVELS = 127.5


@dataclass(frozen=True)
class Request:
    """What to measure. weights: of `make_weights`; bundle: its ONNX files, for other backends."""

    backend: str
    precision: str
    compiled: bool
    modes: tuple[str, ...]
    device: str
    network: str
    steps: int
    frames: int
    weights: str
    picture: str = ""  # of the reference, compared with; written by who comes first
    bundle: str = ""


def make_weights(network: str, path: Path) -> None:
    """Nothing; the weights of the encoder and of the U-Net, made by the rule, are in the file."""
    made = {}
    for part, (kind, prefix) in PARTS.items():
        with torch.device("meta"):
            keys = {
                f"{prefix}{n}": tuple(t.shape)
                for n, t in kind(CONFIGS[network]).state_dict().items()
            }
        made[part] = {n: torch.from_numpy(a) for n, a in rule.part(keys, prefix).items()}
    torch.save(made, path)


def bare_manifest(network: str, steps: int) -> Manifest:
    """The sizes and the schedule of the network; there are no files."""
    config = CONFIGS[network]
    with torch.device("meta"):
        channels = UNet(config).modulation_size
    return Manifest(
        name=f"rule-{network}",
        image_size=config.image_size,
        z_size=config.embed,
        modulation_size=channels,
        time_row_size=2 * channels,
        prediction=config.prediction,
        schedule=Schedule(),
        render=Sampling(steps),
        invert=Sampling(INVERT_STEPS),
        crop=Crop(rotate=True),
        drawing=Drawing(),
        landmark_layout="ibug68+gaze2",
        training=Training("weights made by a rule", "none", "noise"),
        licence="none",
        weights_sha256="0" * 64,
        components={},
    )


class Opener:
    """Makes the components of a request, each over its own part of the networks."""

    def __init__(self, request: Request, stream: int | None) -> None:
        self._request = request
        self._stream = stream
        self.manifest = bare_manifest(request.network, request.steps)
        self._weights = torch.load(request.weights, mmap=True, weights_only=True)

    def __call__(self, name: str, count: int) -> Component:
        request, rows = self._request, name in ("time", "modulation")
        inputs, outputs = (
            fixed(specs, {"N": count})
            for specs in manifest_file.component_tensors(self.manifest)[name]
        )
        part = "encoder" if name == "encoder" else "render"
        with torch.device("meta"):
            network = PARTS[part][0](CONFIGS[request.network])
        network.load_state_dict(self._weights[part], assign=True)
        return torch_backend.component_of(
            name,
            network.eval().requires_grad_(False),
            (inputs, outputs),
            device=request.device,
            precision="fp32" if rows else request.precision,
            stream=self._stream,
            compiled=request.compiled and not rows,
        )


class CpuRig:
    """The loop over NumPy arrays."""

    def __init__(self, request: Request) -> None:
        self._open = Opener(request, None)
        self.manifest = self._open.manifest
        self._step = self._open("unet_step", 1)
        self._encoder = self._open("encoder", 1)
        self.gpu = ""

    def start(self, mode: str) -> str:
        """The mode that is measured from now on: here there is one."""
        invert, render = (self._pass(n) for n in (INVERT_STEPS, self.manifest.render.steps))
        self._loop = Loop(self._encoder, render, invert)
        self._x_T, self._image, self._condition = inputs(self.manifest)
        return "eager"

    def _pass(self, steps: int) -> Pass:
        time_part = self._open("time", steps)
        run, t = run_of(self.manifest, steps)
        rows = np.zeros((steps, self.manifest.time_row_size), np.float32)
        time_part.bind(t=t, time_rows=rows)
        time_part.run()
        return Pass(run, rows, self._open("modulation", steps), self._step)

    def frame(self) -> Any:
        z = self._loop.encode(self._image, self._condition)
        return self._loop.render(self._x_T, z)

    def networks(self) -> dict[str, Callable[[], object]]:
        """What one encoder pass and one step take by themselves."""
        return {"encoder": self._encoder.run, "step": self._step.run}

    def picture(self) -> Any:
        return self.frame().copy()

    def free_bytes(self) -> int | None:
        """Not told of the host's memory."""
        return None


class GpuRig:
    """The graph loop on the GPU."""

    def __init__(self, request: Request) -> None:
        from diffusionact.runtime import cuda

        self._device = cuda.Device()
        self.gpu = self._device.gpu.name
        self._request = request
        self._open: Opener | None = None
        self._parts: dict[str, Component] = {}
        self.manifest = bare_manifest(request.network, request.steps)
        if request.backend == "torch":
            self._open = Opener(request, self._device.stream)
            self._parts = {n: self._open(n, 1) for n in ("unet_step", "encoder")}

    def start(self, mode: str) -> str:
        from diffusionact.runtime import graph

        if self._open is None:
            bundle = Path(self._request.bundle)
            self._parts = {}
            self._loop: Any = graph.open_graph_loop(
                bundle, manifest_file.read(bundle), self._device,
                steps=self._request.steps, backend=self._request.backend,
                precision=self._request.precision, wrap=self._noted, mode=mode,  # type: ignore[arg-type]
            )  # fmt: skip
        else:
            invert, render = (self._pass(n) for n in (INVERT_STEPS, self.manifest.render.steps))
            self._loop = graph.GraphLoop(
                self._device, self._parts["encoder"], render, invert, (), mode  # type: ignore[arg-type]
            )  # fmt: skip
        x_T, image, condition = inputs(self.manifest)
        self._condition = as_picture(condition)
        self._loop.set_source(as_picture(image), x_T)
        return str(self._loop.mode)

    def _pass(self, steps: int) -> Any:
        from diffusionact.runtime.device_run import DevicePass

        assert self._open is not None
        device, part = self._device, self._open("time", steps)
        run, t = run_of(self.manifest, steps)
        there, rows = device.empty((steps,), "float32"), device.empty(
            (steps, self.manifest.time_row_size), "float32"
        )  # fmt: skip
        part.bind(t=there, time_rows=rows)
        device.upload(there, t)
        part.run()
        device.synchronize()
        return DevicePass(run, rows, self._open("modulation", steps), self._parts["unet_step"])

    def frame(self) -> Any:
        return self._loop.frame(self._condition)

    def networks(self) -> dict[str, Callable[[], object]]:
        """One encoder pass and one step, captured by themselves where they can be, waited for."""
        made = {}
        for name, part in (("encoder", "encoder"), ("step", "unet_step")):
            if part in self._parts:
                made[name] = self._captured(self._parts[part])
        return made

    def _noted(self, name: str, part: Component) -> Component:
        self._parts.setdefault(name, part)
        return part

    def _captured(self, part: Component) -> Callable[[], object]:
        from diffusionact.runtime.graph import NOT_RECORDABLE

        part.run()
        self._device.synchronize()
        launch = part.run
        if self._request.backend not in NOT_RECORDABLE:
            launch = self._device.capture(part.run).launch

        def run() -> None:
            launch()
            self._device.synchronize()

        return run

    def picture(self) -> Any:
        picture = self.frame().astype(np.float32) / LEVELS - 1.0
        return np.ascontiguousarray(picture.transpose(2, 0, 1)[None])

    def free_bytes(self) -> int | None:
        """Of the GPU's memory, once it has nothing to do."""
        from diffusionact.runtime import cuda

        self._device.synchronize()
        return cuda.free_bytes()


def inputs(manifest: Manifest) -> tuple[Any, Any, Any]:
    """x_T, image and condition, float32 [1,3,S,S], by the rule."""
    shape = (1, 3, manifest.image_size, manifest.image_size)
    kinds = (("x_T", "noise"), ("image", "image"), ("condition", "image"))
    x_T, image, condition = (rule.tensor(f"input/{name}", shape, kind) for name, kind in kinds)
    # 8 bits are what the GPU's loop is given: both are to see the same.
    return x_T, *(
        np.rint((a + 1) * LEVELS).astype(np.float32) / np.float32(LEVELS) - 1
        for a in (image, condition)
    )


def as_picture(array: Any) -> Any:
    """uint8 [S,S,3] of float32 [1,3,S,S]."""
    return np.ascontiguousarray(
        np.rint((array[0] + 1) * LEVELS).astype(np.uint8).transpose(1, 2, 0)
    )


def run_of(manifest: Manifest, steps: int) -> tuple[schedule.Run, Any]:
    """The render run of a step count, and its timesteps, float32 [T]."""
    plan = manifest.schedule
    table = schedule.alpha_bars(plan.total, plan.beta_start, plan.beta_end)
    run = schedule.render_run(manifest.prediction, schedule.timesteps(steps, plan.total), table)
    return run, run.timesteps.astype(np.float32)


def timed(work: Callable[[], object], count: int) -> dict[str, float]:
    """Milliseconds of one call: median and 95th percentile, after a tenth of the calls."""
    for _ in range(max(2, count // 10)):
        work()
    spent = []
    for _ in range(count):
        start = time.perf_counter()
        work()
        spent.append(1e3 * (time.perf_counter() - start))
    spent.sort()
    return {
        "p50_ms": round(statistics.median(spent), 4),
        "p95_ms": round(spent[min(len(spent) - 1, int(0.95 * len(spent)))], 4),
    }


def measure(request: Request) -> Iterator[dict[str, Any]]:
    """A row for each mode that there is, as it is measured."""
    began = time.perf_counter()
    rig = CpuRig(request) if request.device == "cpu" else GpuRig(request)
    first: Any = None
    for mode in request.modes:
        seen = rig.start(mode)
        ready_s = time.perf_counter() - began
        picture = rig.picture()
        first = picture if first is None else first
        before = rig.free_bytes()
        row: dict[str, Any] = {
            "backend": request.backend,
            "precision": request.precision,
            "compiled": request.compiled,
            "asked": mode,
            "mode": seen,
            "ready_s": round(ready_s, 1),
            "finite": bool(np.isfinite(picture).all()),
            "as_first_mode": bool(np.array_equal(picture, first)),
            "frame": timed(rig.frame, request.frames),
        }
        row["clocks"] = clocks()
        if before is not None:
            row["allocated_bytes"] = before - (rig.free_bytes() or 0)
        row |= {name: timed(run, request.frames) for name, run in rig.networks().items()}
        if "step" in row:
            inside = request.steps * row["step"]["p50_ms"] + row["encoder"]["p50_ms"]
            row["outside_networks_ms"] = round(row["frame"]["p50_ms"] - inside, 3)
        row |= against(request, picture)
        row["gpu"] = rig.gpu
        yield row


def against(request: Request, picture: Any) -> dict[str, float]:
    """How far the picture is from the reference's, in levels of 255."""
    path = Path(request.picture)
    if not request.picture:
        return {}
    if not path.is_file():
        np.save(path, picture)
        return {}
    apart = np.abs(picture.astype(np.float64) - np.load(path)) * LEVELS
    return {
        "mean_levels": round(float(apart.mean()), 4),
        "max_levels": round(float(apart.max()), 3),
    }


def main() -> None:
    request = Request(**json.loads(Path(sys.argv[1]).read_text()))
    rows: list[dict[str, Any]] = []
    for row in measure(request):  # written one by one: the next may hang
        rows.append(row)
        write_whole(Path(sys.argv[2]), json.dumps({"request": asdict(request), "rows": rows}))


if __name__ == "__main__":
    main()
