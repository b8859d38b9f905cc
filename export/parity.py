"""The exported graphs against the networks they came from, piece by piece and whole frames."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import onnxruntime
import torch
from torch import nn

from diffusionact import schedule
from diffusionact.manifest import ComponentSpec, Manifest

Array: TypeAlias = npt.NDArray[Any]
Runner: TypeAlias = Callable[..., list[Array]]  # (component name, inputs in order) -> outputs

VERSIONS = {"onnxruntime": onnxruntime.__version__, "torch": torch.__version__}

RENDER_STEPS = 20  # the published counts
INVERT_STEPS = 50

# A float32 sum in another order: some 1e-6 of the largest value after a hundred layers.
COMPONENT_MAX = 1e-4
# T steps magnify that where a pixel is close to the clip; inversion and render, once more.
FRAME_MAX = 2e-3
REENACTED_MAX = 2e-2
FRAME_MEAN = 1e-4


@dataclass(frozen=True)
class Row:
    """One comparison: differences of ONNX Runtime from PyTorch, and what they may be."""

    what: str
    max_error: float
    mean_error: float
    max_allowed: float
    mean_allowed: float

    @property
    def passed(self) -> bool:
        return self.max_error <= self.max_allowed and self.mean_error <= self.mean_allowed


def measure(
    bundle_dir: Path, manifest: Manifest, modules: Mapping[str, nn.Module]
) -> tuple[Row, ...]:
    """One row for each component, one for a render and one for inversion and render, and one for
    each network of the tracker.

    Args:
        modules: component name -> the module that was exported.
    """
    runners = torch_runner(modules), onnx_runner(bundle_dir, manifest)
    rng = np.random.default_rng(0)
    rows = [_component_row(name, manifest, runners, rng) for name in manifest.components]
    side = manifest.image_size
    x_T = rng.standard_normal((1, 3, side, side)).astype(np.float32)
    z = rng.standard_normal((1, manifest.z_size)).astype(np.float32)
    due, seen = (render(run, manifest, x_T, z) for run in runners)
    rendered, inverted = counts(manifest)
    rows.append(_row(f"render, T={rendered}", due, seen, FRAME_MAX, FRAME_MEAN))
    due, seen = (reenact(run, manifest, *pictures(side)) for run in runners)
    what = f"inversion, T={inverted}, and render, T={rendered}"
    rows.append(_row(what, due, seen, REENACTED_MAX, FRAME_MEAN))
    rows += [_component_row(name, manifest, runners, rng) for name in manifest.tracker]
    return tuple(rows)


def counts(manifest: Manifest) -> tuple[int, int]:
    """The steps of the render and of the inversion that are compared: a student has its own."""
    if manifest.student_of:
        return manifest.render.steps, manifest.invert.steps
    return RENDER_STEPS, INVERT_STEPS


def table(rows: tuple[Row, ...]) -> str:
    """The rows as text."""
    lines = [f"{'ONNX Runtime - PyTorch':36} {'max':>9} {'mean':>9}   allowed"]
    for row in rows:
        lines.append(
            f"{row.what:36} {row.max_error:9.1e} {row.mean_error:9.1e}   "
            f"{row.max_allowed:.0e}, {row.mean_allowed:.0e}{'' if row.passed else '   TOO LARGE'}"
        )
    return "\n".join(lines)


def torch_runner(modules: Mapping[str, nn.Module]) -> Runner:
    """A runner of the modules."""

    def run(name: str, *inputs: Array) -> list[Array]:
        with torch.inference_mode():
            outputs = modules[name](*map(torch.from_numpy, inputs))
        return [o.numpy() for o in (outputs if isinstance(outputs, tuple) else (outputs,))]

    return run


def onnx_runner(bundle_dir: Path, manifest: Manifest) -> Runner:
    """A runner of the bundle's graphs on the CPU."""
    sessions = {
        name: onnxruntime.InferenceSession(
            str(bundle_dir / part.file), providers=["CPUExecutionProvider"]
        )
        for name, part in _networks(manifest).items()
    }

    def run(name: str, *inputs: Array) -> list[Array]:
        specs = _networks(manifest)[name].inputs
        feed = {spec.name: array for spec, array in zip(specs, inputs, strict=True)}
        wanted = [spec.name for spec in _networks(manifest)[name].outputs]
        outputs: list[Array] = sessions[name].run(wanted, feed)
        return outputs

    return run


def sample(run: Runner, direction: schedule.Run, suffix: str, x: Array, z: Array) -> Array:
    """The end of a run of the sampler from x [1,3,S,S] under z [1,Z]."""
    (rows,) = run("time" + suffix, direction.timesteps.astype(np.float32))
    scale, shift = run("modulation" + suffix, z, rows)
    for step in direction.steps:
        row = slice(step.row, step.row + 1)
        (prediction,) = run("unet_step" + suffix, x, scale[row], shift[row])
        levels = (float(direction.alpha_bar[step.row]), float(direction.alpha_bar_to[step.row]))
        x = schedule.ddim_step(direction.prediction, x, prediction, *levels)
    return x


def render(run: Runner, manifest: Manifest, x_T: Array, z: Array) -> Array:
    """The picture [1,3,S,S] of x_T and z."""
    steps = manifest.render_at(counts(manifest)[0])
    direction = schedule.render_run(manifest.prediction, steps, _alpha_bars(manifest))
    return sample(run, direction, "", x_T, z)


def reenact(
    run: Runner, manifest: Manifest, image: Array, of_source: Array, of_target: Array
) -> Array:
    """The frame [1,3,S,S]: the image is inverted under one drawing and rendered under another."""
    steps = manifest.invert_at(counts(manifest)[1])
    direction = schedule.inversion_run(manifest.prediction, steps, _alpha_bars(manifest))
    suffix = "_invert" if "unet_step_invert" in manifest.components else ""
    x_T = sample(run, direction, suffix, image, run("encoder", image, of_source)[0])
    return render(run, manifest, x_T, run("encoder", image, of_target)[0])


def pictures(side: int) -> tuple[Array, Array, Array]:
    """A smooth picture and two drawings of a disc, float32 [1,3,S,S] in [-1,1]."""
    y, x = np.mgrid[0:side, 0:side] / side
    image = np.stack([np.sin(4 * x + 1), np.cos(3 * y), np.sin(5 * (x + y))])
    drawings = [
        np.broadcast_to(np.where(np.hypot(x - 0.5, y - centre) < 0.1, 1.0, -0.99), image.shape)
        for centre in (0.4, 0.6)
    ]
    of_source, of_target = (np.ascontiguousarray(d[None], np.float32) for d in drawings)
    return image[None].astype(np.float32), of_source, of_target


def _networks(manifest: Manifest) -> dict[str, ComponentSpec]:
    return {**manifest.components, **manifest.tracker}


def _alpha_bars(manifest: Manifest) -> schedule.Float64Array:
    plan = manifest.schedule
    return schedule.alpha_bars(plan.total, plan.beta_start, plan.beta_end)


def _component_row(
    name: str, manifest: Manifest, runners: tuple[Runner, Runner], rng: np.random.Generator
) -> Row:
    inputs = []
    for spec in _networks(manifest)[name].inputs:
        shape = [RENDER_STEPS if isinstance(size, str) else size for size in spec.shape]
        values = (
            rng.standard_normal(shape) if spec.range is None else rng.uniform(*spec.range, shape)
        )
        inputs.append(values.astype(spec.dtype))
    due, seen = (np.concatenate([o.ravel() for o in run(name, *inputs)]) for run in runners)
    allowed = COMPONENT_MAX * max(1.0, float(np.abs(due).max()))
    return _row(name, due, seen, allowed, allowed / 10)


def _row(what: str, due: Array, seen: Array, max_allowed: float, mean_allowed: float) -> Row:
    difference = np.abs(seen.astype(np.float64) - due)
    return Row(what, float(difference.max()), float(difference.mean()), max_allowed, mean_allowed)
