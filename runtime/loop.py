"""The diffusion loop in NumPy: one encoder pass, then T steps of the network and of DDIM.

The reference for every faster loop. All memory is bound when the loop is made; a frame allocates
nothing, looks up no names and branches on no setting.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Literal, TypeAlias, Union

import numpy as np
import numpy.typing as npt

from diffusionact import schedule
from diffusionact.engine_files import ONCE
from diffusionact.errors import SettingsError
from diffusionact.manifest import Manifest, TensorSpec
from diffusionact.runtime.component import Component, device_of, open_component, open_reusing
from diffusionact.schedule import Run, Step

if TYPE_CHECKING:
    from diffusionact.runtime.graph import GraphLoop

AnyLoop: TypeAlias = Union["Loop", "GraphLoop"]
Float32Array: TypeAlias = npt.NDArray[np.float32]
Approximation: TypeAlias = Literal["reuse"]

APPROXIMATIONS: tuple[Approximation, ...] = ("reuse",)
WHOLE_EVERY = 3  # steps, of which one runs the whole network and two reuse its deep features


def ddim_step(x: Float32Array, prediction: Float32Array, scratch: Float32Array, step: Step) -> None:
    """Return nothing; moves x one step, in place: schedule.ddim_step to the last bit.

    x, prediction, scratch: float32, one shape; the last two hold nothing of use afterwards.
    Memory decides its speed, for a network has just pushed all of it out of the cache: each array
    is touched only where it must be.
    Source: DDIM, Eq. 12; clipping and eps derived anew are DiffAE code.
    """
    # x_0 = clip(a x + b prediction); a network that predicts x_0 has a = 0, b = 1
    if step.x0_on_x != 0.0:
        np.multiply(prediction, step.x0_on_prediction, out=prediction)
        np.multiply(x, step.x0_on_x, out=scratch)
        np.add(scratch, prediction, out=prediction)
    np.maximum(prediction, -1.0, out=prediction)  # np.clip is slow to call
    if step.to_noise == 0.0:  # the last step of a render leads to x_0 itself
        np.minimum(prediction, 1.0, out=x)
        return
    x_0 = np.minimum(prediction, 1.0, out=prediction)
    # eps = (sqrt(1 / alpha_bar) x - x_0) / sqrt(1 / alpha_bar - 1)
    np.multiply(x, step.sqrt_recip, out=x)
    np.subtract(x, x_0, out=x)
    np.divide(x, step.sqrt_recip_minus_one, out=x)
    # x = sqrt(alpha_bar_to) x_0 + sqrt(1 - alpha_bar_to) eps
    np.multiply(x, step.to_noise, out=x)
    np.multiply(x_0, step.to_signal, out=x_0)
    np.add(x, x_0, out=x)


@dataclass(frozen=True)
class Pass:
    """One direction: its schedule, and the networks that serve it.

    time_rows: float32 [T,Kt], a row for each timestep of the run.
    """

    run: Run
    time_rows: Float32Array
    modulation: Component
    unet_step: Component
    shallow: Component | None = None  # the step network on features of its last whole run


class _BoundStep:
    """A step network and its buffers; both directions share it when they share their weights."""

    def __init__(self, unet_step: Component, shallow: Component | None = None) -> None:
        self.whole = unet_step
        self.shallow = shallow or unet_step
        self.x = _buffer(unet_step.inputs["x_t"])
        self.scale = _buffer(unet_step.inputs["scale"])
        self.shift = _buffer(unet_step.inputs["shift"])
        self._prediction = _buffer(unet_step.outputs["prediction"])
        self._scratch = np.zeros_like(self.x)
        for network in (unet_step, shallow):
            if network is not None:
                network.bind(
                    x_t=self.x, scale=self.scale, shift=self.shift, prediction=self._prediction
                )

    def __call__(self, network: Component, step: Step) -> None:
        network.run()
        ddim_step(self.x, self._prediction, self._scratch, step)


class _Sampler:
    """A pass with its buffers bound."""

    def __init__(self, direction: Pass, bound_step: _BoundStep) -> None:
        self.steps = len(direction.run.timesteps)
        self._bound_step = bound_step
        self._modulation = direction.modulation
        self._z = _buffer(self._modulation.inputs["z"])
        scale = _buffer(self._modulation.outputs["scale"])
        shift = _buffer(self._modulation.outputs["shift"])
        self._modulation.bind(z=self._z, time_rows=direction.time_rows, scale=scale, shift=shift)
        self._scale, self._shift = scale, shift
        self.run = direction.run
        # A row is copied to where the step network reads: 1 us, where binding anew takes 5 to 12.
        last = self.steps - 1
        self._rows = tuple(
            (
                bound_step.shallow
                if direction.shallow and i % WHOLE_EVERY and i != last
                else bound_step.whole,
                step,
                scale[step.row : step.row + 1],
                shift[step.row : step.row + 1],
            )
            for i, step in enumerate(direction.run.steps)
        )

    def sample(self, start: Float32Array, z: Float32Array) -> Float32Array:
        """Return the end of the run; the memory is the step's, valid until the next call."""
        bound_step = self._bound_step
        np.copyto(bound_step.x, start)
        np.copyto(self._z, z)
        self._modulation.run()
        for network, step, scale, shift in self._rows:
            np.copyto(bound_step.scale, scale)
            np.copyto(bound_step.shift, shift)
            bound_step(network, step)
        return bound_step.x

    def modulate(self, z: Float32Array) -> tuple[Float32Array, Float32Array]:
        """Return scale and shift of a code for all timesteps, float32 [T,K]; valid until the next
        call."""
        np.copyto(self._z, z)
        self._modulation.run()
        return self._scale, self._shift


class _Together:
    """A step network of several frames and its buffers, for runs of any length up to the longest."""

    def __init__(self, unet_step: Component, longest: int) -> None:
        self._bound_step = _BoundStep(unet_step)
        self._scale = np.zeros((longest, *self._bound_step.scale.shape), np.float32)
        self._shift = np.zeros_like(self._scale)

    def sample(self, sampler: _Sampler, start: Float32Array, codes: Float32Array) -> Float32Array:
        """Return the ends of a run with the same start and other codes; memory as of a sampler."""
        bound_step, count = self._bound_step, sampler.steps
        for i in range(len(codes)):
            scale, shift = sampler.modulate(codes[i : i + 1])
            np.copyto(self._scale[:count, i], scale)
            np.copyto(self._shift[:count, i], shift)
        np.copyto(bound_step.x, start)
        for step in sampler.run.steps:
            np.copyto(bound_step.scale, self._scale[step.row])
            np.copyto(bound_step.shift, self._shift[step.row])
            bound_step(bound_step.whole, step)
        return bound_step.x


class Loop:
    """Encoder, render and inversion over components of any backend."""

    def __init__(
        self,
        encoder: Component,
        render: Pass,
        invert: Pass | Callable[[], Pass],
        others: Sequence[Pass] = (),
        together: Callable[[], Component] | None = None,
    ) -> None:
        """invert: or what opens it, where it has weights of its own: memory that is only taken
        while a portrait is inverted; others: further ways to render, over the step network of the
        first, for `set_steps`; together: opens the step network of several frames.
        """
        self._encoder = encoder
        self._image = _buffer(encoder.inputs["image"])
        self._kept: Float32Array | None = None  # the image that is in it and cannot have changed
        self.condition = _buffer(encoder.inputs["condition"])
        self._z = _buffer(encoder.outputs["z"])
        encoder.bind(image=self._image, condition=self.condition, z=self._z)
        bound_step = _BoundStep(render.unet_step, render.shallow)
        samplers = [_Sampler(one, bound_step) for one in (render, *others)]
        self._render = samplers[0]
        self._prepared = {sampler.steps: sampler for sampler in reversed(samplers)}
        self._inverter = _inverter(invert, bound_step, render.unet_step)
        self._open_together = together
        self._together: _Together | None = None

    @property
    def steps(self) -> int:
        """The number of steps that `render` takes."""
        return self._render.steps

    @property
    def prepared(self) -> tuple[int, ...]:
        """The numbers of steps that `set_steps` may choose, ascending."""
        return tuple(sorted(self._prepared))

    def set_steps(self, steps: int) -> None:
        """Return nothing; from the next call on, `render` takes this many steps. Costs nothing.

        Raises: SettingsError for a number that is not prepared.
        """
        if steps not in self._prepared:
            known = ", ".join(map(str, self.prepared))
            raise SettingsError(f"steps={steps}: prepared are {known}; open the loop with more")
        self._render = self._prepared[steps]

    def encode(self, image: Float32Array, condition: Float32Array) -> Float32Array:
        """Return the semantic code z, float32 [1,Z]; valid until the next call.

        image, condition: float32 [1,3,S,S] in [-1, 1], RGB. An image that cannot be written to is
        copied once, however often it comes; a condition that was written into `self.condition`,
        not at all.
        Source: DiffusionAct, the reenactment encoder.
        """
        if image is not self._kept:
            np.copyto(self._image, image)
            self._kept = None if image.flags.writeable else image
        if condition is not self.condition:
            np.copyto(self.condition, condition)
        self._encoder.run()
        return self._z

    def render(self, x_T: Float32Array, z: Float32Array) -> Float32Array:
        """Return the picture x_0, float32 [1,3,S,S] in [-1, 1]; valid until the next call.

        x_T: float32 [1,3,S,S]; z: float32 [1,Z]. Source: DiffusionAct, Eq. 1-3.
        """
        return self._render.sample(x_T, z)

    def open_together(self) -> None:
        """Return nothing; `render_together` is ready. Live frames never need it, so that its network
        takes no memory before. Raises: SettingsError, BundleError."""
        if self._open_together is None:
            raise SettingsError("this loop renders one frame at a time")
        if self._together is None:
            self._together = _Together(self._open_together(), max(self.prepared))

    def render_together(self, x_T: Float32Array, codes: Float32Array) -> Float32Array:
        """Return the pictures of several codes, float32 [B,3,S,S]; valid until the next call.

        x_T: float32 [1,3,S,S], of all; codes: float32 [B,Z], a row for each z of `render`, as many
        as open_loop was told.
        """
        if self._together is None:
            raise SettingsError("call open_together before")
        return self._together.sample(self._render, x_T, codes)

    def invert(self, x_0: Float32Array, z: Float32Array) -> Float32Array:
        """Return the stochastic code x_T of a picture, float32 [1,3,S,S], a copy of its own.

        x_0: float32 [1,3,S,S] in [-1, 1]; z: float32 [1,Z]. Source: DiffusionAct, Eq. 1-3.
        """
        return self._inverter().sample(x_0, z).copy()


def _inverter(
    invert: Pass | Callable[[], Pass], bound_step: _BoundStep, unet_step: Component
) -> Callable[[], _Sampler]:
    """What gives the sampler of inversion: always the same, or each time one of its own."""
    if isinstance(invert, Pass):
        shared = invert.unet_step is unet_step
        sampler = _Sampler(invert, bound_step if shared else _BoundStep(invert.unet_step))
        return lambda: sampler

    def opened() -> _Sampler:
        direction = invert()
        return _Sampler(direction, _BoundStep(direction.unet_step))

    return opened


def open_loop(
    bundle_dir: Path,
    manifest: Manifest,
    *,
    steps: int | Sequence[int] | None = None,
    also: Sequence[int] = (),
    backend: str = "ort",
    device: str = "auto",
    precision: str = "auto",
    threads: int = 0,
    approximate: Approximation | None = None,
    at_once: int = 1,
    wrap: Callable[[str, Component], Component] | None = None,
) -> AnyLoop:
    """Return the loop of a bundle: on device "cuda" the one of `graph.py`.

    steps: of render, a count or the timesteps themselves; None takes the manifest's choice;
    also: counts to prepare besides, between which `Loop.set_steps` changes at no cost;
    backend, precision: as of open_component, which knows no choice between backends; for that see
    runtime/choice.py; approximate: "reuse" runs the deep part of the step network in the first,
    the last and every third step only; at_once: the frames of `Loop.render_together`, on a CPU;
    wrap: makes of a component, by its name, the one that is used.

    Raises: what open_component raises, and SettingsError for steps that no schedule gives.
    """
    if device_of(backend, device) == "cuda":
        if approximate:
            raise SettingsError(
                f"approximate={approximate!r} is for the CPU; leave it out on a GPU"
            )
        from diffusionact.runtime import cuda, graph  # only who has a GPU needs them

        return graph.open_graph_loop(
            bundle_dir, manifest, cuda.Device(),
            steps=steps, also=also, backend=backend, precision=precision, wrap=wrap,
        )  # fmt: skip

    def component(name: str, count: int, frames: int = 1) -> Component:
        opened = open_component(
            bundle_dir,
            manifest,
            name,
            backend=backend,
            device=device,
            precision="fp32" if name in ONCE else precision,
            threads=threads,
            sizes={"N": count},
            frames=frames,
        )
        return wrap(name, opened) if wrap else opened

    def direction(
        run: Run, suffix: str, unet_step: Component, shallow: Component | None = None
    ) -> Pass:
        count = len(run.timesteps)
        time = component("time" + suffix, count)
        time_rows = _buffer(time.outputs["time_rows"])
        time.bind(t=run.timesteps.astype(np.float32), time_rows=time_rows)
        time.run()
        return Pass(run, time_rows, component("modulation" + suffix, count), unet_step, shallow)

    render_run, inversion_run = runs(manifest, steps)
    shallow = None
    if approximate == "reuse":
        step, shallow = open_reusing(
            bundle_dir, manifest,
            backend=backend, device=device, precision=precision, threads=threads,
        )  # fmt: skip
        if wrap:
            step, shallow = wrap("unet_step", step), wrap("unet_step_shallow", shallow)
    else:
        step = component("unet_step", 1)
    own = "unet_step_invert" in manifest.components
    render = direction(render_run, "", step, shallow)

    def own_inversion() -> Pass:
        return direction(inversion_run, "_invert", component("unet_step_invert", 1))

    invert = own_inversion if own else direction(inversion_run, "", step)
    counts = sorted(set(also) - {len(render_run.timesteps)})
    others = [direction(runs(manifest, count)[0], "", step, shallow) for count in counts]
    together = partial(component, "unet_step", 1, at_once) if at_once > 1 else None
    return Loop(component("encoder", 1), render, invert, others, together)


def runs(manifest: Manifest, steps: int | Sequence[int] | None = None) -> tuple[Run, Run]:
    """Return the schedules of render and of inversion; `steps` as in open_loop.

    A count for which the manifest lists timesteps takes those.
    """
    plan, kind = manifest.schedule, manifest.prediction
    table = schedule.alpha_bars(plan.total, plan.beta_start, plan.beta_end)
    down = schedule.render_run(kind, manifest.render_at(steps), table)
    return down, schedule.inversion_run(kind, manifest.invert_at(), table)


def _buffer(spec: TensorSpec) -> Float32Array:
    return np.zeros([int(size) for size in spec.shape], np.float32)
