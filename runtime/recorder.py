"""What the runtime really feeds the networks of a bundle, recorded: to calibrate and to compare."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TypeAlias

import cv2
import numpy as np

from diffusionact import driver_path, portrait_paths
from diffusionact import manifest as manifest_file
from diffusionact.errors import SettingsError
from diffusionact.landmarks import Landmarks, Track
from diffusionact.manifest import Manifest, TensorSpec
from diffusionact.progress import ProgressCallback
from diffusionact.runtime.component import Array, Component
from diffusionact.runtime.loop import open_loop
from diffusionact.runtime.reenactor import Reenactor
from diffusionact.runtime.settings import Settings
from diffusionact.runtime.source import Source

Feed: TypeAlias = dict[str, Array]

PORTRAITS = 2  # each is inverted, which takes many steps
DRIVER_FRAME = 40  # of the shipped track: the head is turned, the mouth open


@dataclass
class Recorder:
    """Stands between a loop and its components (`open_loop(wrap=recorder.wrap)`).

    feeds: component -> the inputs of each run, copies, in order.
    """

    feeds: dict[str, list[Feed]] = field(default_factory=dict)

    def wrap(self, name: str, component: Component) -> Component:
        """Return the component, recorded under its name."""
        return _Recorded(component, self.feeds.setdefault(name, []))


class _Recorded:
    """A component that writes down what it is given."""

    def __init__(self, component: Component, feeds: list[Feed]) -> None:
        self._component = component
        self._feeds = feeds
        self._given: Feed = {}

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        return self._component.inputs

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        return self._component.outputs

    def bind(self, **arrays: Array) -> None:
        self._component.bind(**arrays)
        self._given = {name: arrays[name] for name in self.inputs}

    def run(self) -> None:
        self._feeds.append({name: array.copy() for name, array in self._given.items()})
        self._component.run()


def record(
    bundle_dir: Path, frames: int, progress: ProgressCallback | None = None
) -> dict[str, list[Feed]]:
    """Return what the networks are fed while shipped portraits follow the shipped driver, in
    inversion and in every step: component -> inputs in order.

    frames: spread over the driver, the portraits in turn.

    Raises: SettingsError for fewer than one frame; as `Reenactor.load`.
    """
    if frames < 1:
        raise SettingsError(f"frames={frames}; wanted at least 1")
    recorder, manifest = Recorder(), manifest_file.read(bundle_dir)
    loop = open_loop(bundle_dir, manifest, backend="ort", device="cpu", wrap=recorder.wrap)
    with Reenactor(manifest, loop, Settings(paste=False)) as act:
        sources = [_source(act, path) for path in portrait_paths()[:PORTRAITS]]
        for i, driver in enumerate(_drivers(frames)):
            act.reenact(driver, sources[i % len(sources)])
            if progress:
                progress(i + 1, frames)
    return recorder.feeds


def record_step(bundle_dir: Path, manifest: Manifest, timestep: int = 500) -> dict[str, Feed]:
    """Return what each network is fed in one step of a stored frame: a shipped portrait under a
    frame of the shipped driver, from fixed noise, on the CPU; the quickest real inputs."""
    recorder = Recorder()
    loop = open_loop(
        bundle_dir,
        manifest,
        steps=(timestep,),
        backend="ort",
        device="cpu",
        wrap=recorder.wrap,
    )
    shape = (1, 3, manifest.image_size, manifest.image_size)
    noise = np.random.default_rng(0).standard_normal(shape, np.float32)
    act = Reenactor(manifest, loop, Settings(paste=False))
    source = _source(act, portrait_paths()[0], x_T=noise)
    driver = Track.load(driver_path().with_suffix(".landmarks.npz"))[DRIVER_FRAME]
    act.reenact(driver, source)
    return {name: feeds[-1] for name, feeds in recorder.feeds.items() if feeds}


def _source(act: Reenactor, path: Path, x_T: Array | None = None) -> Source:
    picture = cv2.imread(str(path))
    face = Track.load(path.with_suffix(".landmarks.npz"))[0]
    assert picture is not None and face is not None, "shipped files"
    return act.prepare(np.asarray(picture, np.uint8), landmarks=face, x_T=x_T)


def _drivers(frames: int) -> Iterator[Landmarks | None]:
    track: Track = Track.load(driver_path().with_suffix(".landmarks.npz"))
    chosen: Sequence[int] = np.linspace(0, len(track) - 1, frames).round().astype(int).tolist()
    for index in chosen:
        yield track[index]
