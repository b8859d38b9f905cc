"""The diffusion loop on a GPU: the members of `loop.Loop`, and frames from end to end.

All that a frame needs is put on the device's one stream, and waited for once. It allocates
nothing, looks up no names and branches on no setting.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from diffusionact.engine_files import ONCE
from diffusionact.errors import SettingsError
from diffusionact.manifest import Manifest
from diffusionact.runtime.component import Component, open_component
from diffusionact.runtime.device import Device, DeviceArray, Graph, Work
from diffusionact.runtime.device_run import (
    DevicePass,
    Mode,
    Recorder,
    Sampler,
    bind_steps,
    like,
)
from diffusionact.runtime.loop import runs
from diffusionact.schedule import Run

Float32Array: TypeAlias = npt.NDArray[np.float32]
UInt8Array: TypeAlias = npt.NDArray[np.uint8]

REPEATS = 5  # of a run, when the two ways are timed
# Its sessions refuse to run while a graph is recorded around them, and may be left broken by it.
NOT_RECORDABLE = ("ort",)
WORTH = 0.98  # an unrolled graph takes memory and time to make: it must save two percent


class _Staged:
    """Memory of the device that the host writes and reads, through pinned memory."""

    def __init__(self, device: Device, there: DeviceArray) -> None:
        self._device = device
        self.there = there
        self._here: Float32Array = device.pinned(there.shape, "float32")
        device.upload(there, self._here)  # zeros: what is there by chance may be NaN

    def put(self, array: Float32Array) -> None:
        """Return nothing; `array` is on its way. Every call that puts ends in a `get`."""
        np.copyto(self._here, array)
        self._device.upload(self.there, self._here)

    def get(self) -> Float32Array:
        """Return what was there when all before was done; valid until the next `put` or `get`."""
        self._device.download(self._here, self.there)
        self._device.synchronize()
        return self._here


class _Slot:
    """A frame on its way: pinned memory in and out, and the mark behind it."""

    def __init__(self, device: Device, side: int) -> None:
        self.condition: UInt8Array = device.pinned((side, side, 3), "uint8")
        self.picture: UInt8Array = device.pinned((side, side, 3), "uint8")
        self.done = device.event()


class GraphLoop:
    """Encoder, render and inversion over components of a device, as `loop.Loop`; and frames.

    A frame is `submit`ted and its `result` fetched; two may be on their way, so that the CPU draws
    one while the GPU renders the other.

    mode: how steps are done; why_eager: why nothing is recorded, None if it is; seconds: what the
    ways took when they were compared.
    """

    def __init__(
        self,
        device: Device,
        encoder: Component,
        render: DevicePass,
        invert: DevicePass,
        others: Sequence[DevicePass] = (),
        mode: Mode | None = None,
    ) -> None:
        """others: further ways to render, for `set_steps`; mode: None takes the faster one.

        Raises: DeviceError for too little memory, or work that fails.
        """
        self._device = device
        device.activate()
        self._encoder = encoder
        self._image, self._condition = (
            _Staged(device, like(device, encoder.inputs[name])) for name in ("image", "condition")
        )
        self._z = _Staged(device, like(device, encoder.outputs["z"]))
        z = self._z.there
        encoder.bind(image=self._image.there, condition=self._condition.there, z=z)
        passes = (render, *others, invert)
        bound = bind_steps(device, passes)
        samplers = [Sampler(device, each, bound[id(each.unet_step)], z) for each in passes]
        self._render, self._invert = samplers[0], samplers[-1]
        self._prepared = {sampler.steps: sampler for sampler in reversed(samplers[:-1])}
        self._x, self._x_inverted = (
            _Staged(device, sampler.bound_step.x) for sampler in (self._render, self._invert)
        )
        self._bind_starts()
        self._bind_frames()
        self.seconds: Mapping[str, float] = {}
        self._record(Recorder(device, mode), samplers, mode)

    def encode(self, image: Float32Array, condition: Float32Array) -> Float32Array:
        """As `Loop.encode`."""
        self._device.activate()
        self._image.put(image)
        self._condition.put(condition)
        self._encode.launch()
        return self._z.get()

    def render(self, x_T: Float32Array, z: Float32Array) -> Float32Array:
        """As `Loop.render`."""
        self._device.activate()
        self._given.put(x_T)
        self._z.put(z)
        self._render.sample(self._from_given)
        return self._x.get()

    def invert(self, x_0: Float32Array, z: Float32Array) -> Float32Array:
        """As `Loop.invert`."""
        self._device.activate()
        self._given.put(x_0)
        self._z.put(z)
        self._invert.sample(self._inverted_from_given)
        return self._x_inverted.get().copy()

    @property
    def steps(self) -> int:
        """As `Loop.steps`."""
        return self._render.steps

    @property
    def prepared(self) -> tuple[int, ...]:
        """As `Loop.prepared`."""
        return tuple(sorted(self._prepared))

    def set_steps(self, steps: int) -> None:
        """As `Loop.set_steps`: two tables of a few hundred bytes go to the device."""
        if steps not in self._prepared:
            known = ", ".join(map(str, self.prepared))
            raise SettingsError(f"steps={steps}: prepared are {known}; open the loop with more")
        self._render = self._prepared[steps]

    def set_source(self, image: UInt8Array | DeviceArray, x_T: Float32Array | DeviceArray) -> None:
        """Return nothing; frames are of this portrait from now on.

        image: uint8 [S,S,3], RGB; x_T: float32 [1,3,S,S]; each on the host or on the device.
        """
        self._device.activate()
        for target, array in ((self._picture, image), (self._x_T, x_T)):
            if isinstance(array, np.ndarray):
                self._device.upload(target, np.ascontiguousarray(array))
            else:
                self._device.copy(target, array)
        self._device.synchronize()  # the caller's memory is the caller's again

    def submit(self, condition: UInt8Array | DeviceArray) -> int:
        """Return the number of a frame that is on its way now; the third waits for the first.

        condition: uint8 [S,S,3], RGB, the drawing; on the host it may be changed at once, on the
        device once the frame's `result` was asked for.
        """
        device = self._device
        device.activate()
        slot = self._slots[self._frames % len(self._slots)]
        slot.done.wait()
        if isinstance(condition, np.ndarray):
            np.copyto(slot.condition, condition)
            device.upload(self._drawing, slot.condition)
        else:
            device.copy(self._drawing, condition)
        self._pack_image()
        self._pack_condition()
        self._encode.launch()
        self._render.sample(self._from_x_T)
        self._unpack()
        device.download(slot.picture, self.device_picture)
        slot.done.record()
        self._frames += 1
        return self._frames - 1

    def result(self, frame: int) -> UInt8Array:
        """Return the picture of a submitted frame, uint8 [S,S,3], RGB; the memory is its slot's:
        valid until two more are submitted. On the device, the last one is in `device_picture`.

        Raises: SettingsError for a frame that is not one of the last two.
        """
        if not max(0, self._frames - len(self._slots)) <= frame < self._frames:
            raise SettingsError(
                f"frame {frame}: {self._frames} were submitted; wanted one of the last two"
            )
        self._device.activate()
        slot = self._slots[frame % len(self._slots)]
        slot.done.wait()
        return slot.picture

    def frame(self, condition: UInt8Array | DeviceArray) -> UInt8Array:
        """Return the picture under a drawing; both as of `submit` and `result`."""
        return self.result(self.submit(condition))

    def _bind_starts(self) -> None:
        """Where runs begin: what a call brings, and the x_T that frames begin with."""
        device, shape = self._device, self._x.there.shape
        self._given = _Staged(device, device.empty(shape, "float32"))
        self._x_T = device.empty(shape, "float32")
        self._from_x_T = self._render.bound_step.start(self._x_T)
        self._from_given = self._render.bound_step.start(self._given.there)
        self._inverted_from_given = self._invert.bound_step.start(self._given.there)

    def _bind_frames(self) -> None:
        device, side = self._device, self._image.there.shape[-1]
        self._frames = 0
        self._slots = (_Slot(device, side), _Slot(device, side))
        self._picture, self._drawing, self.device_picture = (
            device.empty((side, side, 3), "uint8") for _ in range(3)
        )
        pixels = side * side
        self._pack_image = device.kernel("pack", pixels, self._picture, self._image.there)
        self._pack_condition = device.kernel("pack", pixels, self._drawing, self._condition.there)
        self._unpack = device.kernel("unpack", pixels, self._x.there, self.device_picture)

    def _record(self, recorder: Recorder, samplers: Sequence[Sampler], mode: Mode | None) -> None:
        self._encode = recorder(self._encoder.run)
        recorded: dict[int, Graph] = {}
        for sampler in samplers:
            key = id(sampler.bound_step)
            recorded[key] = sampler.record(recorder, self._start_of(sampler), recorded.get(key))
        if recorder.why_eager is None and mode != "step":
            self._unroll(recorder, mode)
            recorder.why_eager = None  # what is not one graph is its recorded steps
        self.why_eager = recorder.why_eager
        how: Mode = "turbo" if self._render.is_unrolled else "step"
        self.mode: Mode = how if self.why_eager is None else "eager"
        self._device.synchronize()

    def _unroll(self, recorder: Recorder, mode: Mode | None) -> None:
        """Makes all steps of a run one graph where that is faster, or asked for."""
        one_by_one_s = self._timed(self._render)
        self._render.unroll(recorder, self._from_given)
        if not self._render.is_unrolled:
            return
        unrolled_s = self._timed(self._render)
        self.seconds = {"step": one_by_one_s, "turbo": unrolled_s}
        if mode is None and unrolled_s > WORTH * one_by_one_s:
            self._render.unroll_no_more()
            return
        for sampler in self._prepared.values():
            if sampler is not self._render:
                sampler.unroll(recorder, self._from_given)

    def _timed(self, sampler: Sampler) -> float:
        """The least seconds that a run took."""
        taken = []
        for _ in range(REPEATS):
            self._device.synchronize()
            start = time.perf_counter()
            sampler.sample(self._from_given)
            self._device.synchronize()
            taken.append(time.perf_counter() - start)
        return min(taken)

    def _start_of(self, sampler: Sampler) -> Work:
        return self._inverted_from_given if sampler is self._invert else self._from_given


def open_graph_loop(
    bundle_dir: Path,
    manifest: Manifest,
    device: Device,
    *,
    steps: int | Sequence[int] | None = None,
    also: Sequence[int] = (),
    backend: str,
    precision: str = "auto",
    wrap: Callable[[str, Component], Component] | None = None,
    mode: Mode | None = None,
) -> GraphLoop:
    """Return the loop of a bundle on a device; arguments as of `loop.open_loop`, and mode: None
    takes the faster one of those that the backend allows.

    Raises: what open_component raises, SettingsError for steps that no schedule gives, DeviceError.
    """

    def component(name: str, size: int) -> Component:
        opened = open_component(
            bundle_dir,
            manifest,
            name,
            backend=backend,
            device="cuda",
            precision="fp32" if name in ONCE else precision,
            sizes={"N": size},
            stream=device.stream,
        )
        return wrap(name, opened) if wrap else opened

    def direction(run: Run, suffix: str, unet_step: Component) -> DevicePass:
        size = len(run.timesteps)
        network = component("time" + suffix, size)
        t = device.empty((size,), "float32")
        time_rows = like(device, network.outputs["time_rows"])
        network.bind(t=t, time_rows=time_rows)
        device.upload(t, run.timesteps.astype(np.float32))
        network.run()
        device.synchronize()
        return DevicePass(run, time_rows, component("modulation" + suffix, size), unet_step)

    device.activate()
    render_run, inversion_run = runs(manifest, steps)
    step = component("unet_step", 1)
    own = "unet_step_invert" in manifest.components
    render = direction(render_run, "", step)
    step_invert = component("unet_step_invert", 1) if own else step
    invert = direction(inversion_run, "_invert" if own else "", step_invert)
    sizes = sorted(set(also) - {len(render_run.timesteps)})
    others = [direction(runs(manifest, size)[0], "", step) for size in sizes]
    if mode is None and backend in NOT_RECORDABLE:
        mode = "eager"
    return GraphLoop(device, component("encoder", 1), render, invert, others, mode)
