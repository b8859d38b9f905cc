"""A run of the sampler on a device: recorded once, then launched.

What a step depends on, its coefficients and its row of scale and shift, is in tables on the device
behind a counter. So one recorded step serves every step of every run, in both directions; another
step count or schedule writes the tables anew and records nothing.
"""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from diffusionact.errors import DeviceError
from diffusionact.manifest import TensorSpec
from diffusionact.runtime.component import Component
from diffusionact.runtime.device import Device, DeviceArray, Graph, Work
from diffusionact.schedule import Run

# How steps are done: one recorded step N times, all N in one graph, or nothing recorded.
Mode: TypeAlias = Literal["step", "turbo", "eager"]

COEFFICIENTS = 6  # of a step: the fields of schedule.Step after `row`
# Libraries choose their algorithms and allocate the first time, and what they chose the second.
WARM_UPS = 2
_log = logging.getLogger("diffusionact")


@dataclass(frozen=True)
class DevicePass:
    """One direction in one step count. time_rows: float32 [T,Kt], a row for each timestep."""

    run: Run
    time_rows: DeviceArray
    modulation: Component
    unet_step: Component


class Eager:
    """Work that could not be recorded: done again and again."""

    def __init__(self, work: Work) -> None:
        self.launch = work


class Recorder:
    """Records work, until something cannot be recorded: from then on all is done as it comes."""

    def __init__(self, device: Device, mode: Mode | None) -> None:
        self._device = device
        self.why_eager: str | None = "asked for" if mode == "eager" else None

    def __call__(self, work: Work, before: Work | None = None) -> Graph:
        """Return the work recorded, or as it is. before: what each time of doing it begins with."""
        for _ in range(WARM_UPS):
            if before is not None:
                before()
            work()
        self._device.synchronize()
        if self.why_eager is None:
            try:
                return self._device.capture(work)
            except DeviceError as error:
                self.why_eager = str(error)
                _log.warning("not recorded as a CUDA graph, which costs some speed: %s", error)
        return Eager(work)


class BoundStep:
    """A step network with its buffers and tables; runs that share the network share them."""

    def __init__(self, device: Device, unet_step: Component, most: int) -> None:
        """most: the steps of its longest run."""
        self._device = device
        self._network = unet_step
        self.x = like(device, unet_step.inputs["x_t"])
        scale = like(device, unet_step.inputs["scale"])
        shift = like(device, unet_step.inputs["shift"])
        prediction = like(device, unet_step.outputs["prediction"])
        unet_step.bind(x_t=self.x, scale=scale, shift=shift, prediction=prediction)
        width = scale.shape[1]
        self.scales = device.empty((most, width), "float32")
        self.shifts = device.empty((most, width), "float32")
        self._coefficients = device.empty((most, COEFFICIENTS), "float32")
        self._rows = device.empty((most,), "int32")
        self._step = device.empty((1,), "int32")
        self._take_row = device.kernel(
            "take_row", width, self.scales, self.shifts, self._rows, self._step, scale, shift
        )
        self._ddim_step = device.kernel(
            "ddim_step", count(self.x), self.x, prediction, self._coefficients, self._step
        )
        self._next_step = device.kernel("next_step", 1, self._step)
        self._loaded: Tables | None = None

    def start(self, x_T: DeviceArray) -> Work:
        """Return what begins a run there: x is x_T, and no step is done."""
        return self._device.kernel("start", count(self.x), self.x, x_T, self._step)

    def load(self, tables: Tables) -> None:
        """Return nothing; the tables of this run are on the device."""
        if self._loaded is not tables:
            steps = len(tables.rows)
            self._device.upload(self._coefficients.first(steps), tables.coefficients)
            self._device.upload(self._rows.first(steps), tables.rows)
            self._loaded = tables

    def do(self) -> None:
        """Return nothing; the step that the counter says, and the counter one further."""
        self._take_row()
        self._network.run()
        self._ddim_step()
        self._next_step()


class Tables:
    """A run as its steps read it, in host memory that the GPU copies from by itself."""

    def __init__(self, device: Device, run: Run) -> None:
        self.coefficients = device.pinned((len(run.steps), COEFFICIENTS), "float32")
        self.coefficients[...] = [step[1:] for step in run.steps]
        self.rows = device.pinned((len(run.steps),), "int32")
        self.rows[...] = [step.row for step in run.steps]


class Sampler:
    """A pass with its buffers bound and its work recorded."""

    def __init__(
        self, device: Device, direction: DevicePass, bound_step: BoundStep, z: DeviceArray
    ) -> None:
        self.steps = len(direction.run.steps)
        self.bound_step = bound_step
        self._tables = Tables(device, direction.run)
        self._modulation = direction.modulation
        self._modulation.bind(
            z=z,
            time_rows=direction.time_rows,
            scale=bound_step.scales.first(self.steps),
            shift=bound_step.shifts.first(self.steps),
        )
        self._unrolled: Graph | None = None

    @property
    def is_unrolled(self) -> bool:
        return self._unrolled is not None

    def sample(self, start: Work) -> None:
        """Return nothing; the run from z is on the stream, its end will be in the step's x.

        start: of `BoundStep.start`, where it begins.
        """
        self.bound_step.load(self._tables)
        start()
        self._modulate.launch()
        if self._unrolled is not None:
            self._unrolled.launch()
            return
        step = self._step
        for _ in range(self.steps):
            step.launch()

    def record(self, recorder: Recorder, start: Work, step: Graph | None) -> Graph:
        """Return the recorded step; the one of another run over the same network serves too."""
        self.bound_step.load(self._tables)
        self._modulate = recorder(self._modulation.run)
        self._step = step or recorder(self.bound_step.do, before=start)
        return self._step

    def unroll(self, recorder: Recorder, start: Work) -> None:
        """Return nothing; all steps are one graph, where that can be recorded."""
        self.bound_step.load(self._tables)
        self._modulate.launch()
        made = recorder(self._all_steps, before=start)
        self._unrolled = None if isinstance(made, Eager) else made

    def unroll_no_more(self) -> None:
        self._unrolled = None

    def _all_steps(self) -> None:
        for _ in range(self.steps):
            self.bound_step.do()


def bind_steps(device: Device, passes: Sequence[DevicePass]) -> dict[int, BoundStep]:
    """Network -> its buffers, with tables for its longest run."""
    most: dict[int, int] = {}
    for each in passes:
        key = id(each.unet_step)
        most[key] = max(most.get(key, 0), len(each.run.steps))
    networks = {id(each.unet_step): each.unet_step for each in passes}
    return {key: BoundStep(device, networks[key], most[key]) for key in networks}


def like(device: Device, spec: TensorSpec) -> DeviceArray:
    return device.empty([int(size) for size in spec.shape], spec.dtype)


def count(array: DeviceArray) -> int:
    return int(np.prod(array.shape))
