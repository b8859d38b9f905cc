"""`diffusionact eval time`: seconds as the paper's tables count them, and as a live user feels."""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from fractions import Fraction
from functools import cache
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from diffusionact.assets import driver_path, portrait_paths
from diffusionact.commands.eval.methods import Setup, backends_here
from diffusionact.commands.output import say
from diffusionact.errors import BackendMissing
from diffusionact.landmarks import Landmarks, Track, sidecar_path
from diffusionact.manifest import read as read_manifest
from diffusionact.progress import Progress
from diffusionact.runtime.clip import prepare_portrait, run_clip
from diffusionact.runtime.media import FRAME_NS, Frame, Image, open_reader
from diffusionact.runtime.reenactor import Reenactor
from diffusionact.runtime.settings import Settings
from diffusionact.runtime.stream import stream
from diffusionact.runtime.tracker import open_tracker
from diffusionact.runtime.writer import open_writer


def run_time(arguments: argparse.Namespace) -> None:
    """Measure every configuration in turn; one line each."""
    bundle = Path(arguments.bundle)
    steps = arguments.steps or (read_manifest(bundle, verify=False).render.steps,)
    setups = [
        Setup(bundle, count, backend, precision)
        for backend, precision in backends_here(arguments.backend, arguments.device)
        for count in steps
    ]
    for setup in setups:
        measured: dict[str, Any] = {"run": setup.name, "steps": setup.steps}
        measured |= {"backend": setup.backend, "precision": setup.precision}
        with Progress(setup.name, quiet=arguments.quiet) as progress:
            for frames in arguments.frames:
                measured |= _whole(setup, frames, arguments, progress)
        measured["tracker"] = "mediapipe" if _tracker_here() else "none, landmarks beside the clip"
        if arguments.live_seconds > 0 and _tracker_here():
            measured |= _live(setup, arguments)
        say(arguments, measured, _line(measured))


def _whole(
    setup: Setup, frames: int, arguments: argparse.Namespace, progress: Progress
) -> dict[str, Any]:
    """Seconds from nothing to a finished video of so many frames: the model read, the portrait
    inverted, every frame read, tracked, rendered, pasted and written."""
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        driver = _driver(place, frames)
        begun = time.monotonic()
        with _open(setup, arguments) as act:
            loaded = time.monotonic()
            report = run_clip(act, portrait_paths()[0], driver, place / "out.mp4")
        spent = time.monotonic() - begun
    progress(frames, frames)
    return {
        f"seconds_{frames}": round(spent, 3),
        f"load_s_{frames}": round(loaded - begun, 3),
        f"frames_per_second_{frames}": round(report.frames / spent, 3),
    }


def _live(setup: Setup, arguments: argparse.Namespace) -> dict[str, Any]:
    """The picture rate, and from capture to picture, of a camera of 25 frames a second."""
    with _open(setup, arguments) as act:
        source = prepare_portrait(act, portrait_paths()[0])
        act.rest(source)  # the first frame of a session is not what a user waits for each time
        report = stream(act, source, Camera(arguments.live_seconds), Nowhere())
    made: dict[str, Any] = {"live_frames_per_second": round(report.frames / report.seconds, 2)}
    if report.latency is not None:
        made["live_latency_p50_ms"] = round(report.latency.p50_ms, 1)
        made["live_latency_p95_ms"] = round(report.latency.p95_ms, 1)
    return made


@dataclass(frozen=True)
class Camera:
    """The shipped driver as a camera would show it: frames by the clock, over and over."""

    seconds: float
    name: str = "the shipped driver, live"
    live: bool = True
    length: int | None = None
    time_base: Fraction | None = None

    def __iter__(self) -> Iterator[Frame]:
        images = [frame.image_bgr for frame in open_reader(driver_path())]
        begun_ns = time.monotonic_ns()
        for i in range(round(self.seconds * 1e9 / FRAME_NS)):
            due_ns = begun_ns + i * FRAME_NS
            time.sleep(max(due_ns - time.monotonic_ns(), 0) / 1e9)
            yield Frame(images[i % len(images)], time.monotonic_ns(), FRAME_NS)


class Nowhere:
    """A sink that keeps nothing."""

    wants_pictures = True

    def write(
        self, image_bgr: Image | None, pts_ns: int, duration_ns: int, landmarks: Landmarks
    ) -> None:
        """Return nothing."""

    def __enter__(self) -> Nowhere:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Nothing is held."""


def _driver(folder: Path, frames: int) -> Path:
    """The shipped driver, over and over, as a video of so many frames; where no tracker is
    installed its landmarks lie beside it."""
    path = folder / "driver.mp4"
    images = [frame.image_bgr for frame in open_reader(driver_path())]
    track = Track.load(sidecar_path(driver_path()))
    order = np.arange(frames) % len(images)
    pts_ns = np.arange(frames, dtype=np.int64) * FRAME_NS
    looped = Track(track.landmarks[order], track.gaze[order], pts_ns, track.size)
    with open_writer(path) as writer:
        for i, index in enumerate(order):
            face = Landmarks(looped.landmarks[i], looped.gaze[i])
            writer.write(images[index], int(pts_ns[i]), FRAME_NS, face)
    if not _tracker_here():
        looped.save(sidecar_path(path))
    return path


@cache
def _tracker_here() -> bool:
    try:
        open_tracker().close()
    except BackendMissing:
        return False
    return True


def _open(setup: Setup, arguments: argparse.Namespace) -> Reenactor:
    settings = Settings(
        steps=setup.steps,
        backend=setup.backend,
        precision=setup.precision,
        threads=arguments.threads,
    )
    return Reenactor.load(setup.bundle, device=arguments.device, settings=settings)


def _line(measured: Mapping[str, Any]) -> str:
    parts = [
        f"{name.removeprefix('seconds_')} frames {value:.2f} s"
        for name, value in measured.items()
        if name.startswith("seconds_")
    ]
    if "live_frames_per_second" in measured:
        live = f"live {measured['live_frames_per_second']:.1f} a second"
        if "live_latency_p50_ms" in measured:
            live += (
                f", {measured['live_latency_p50_ms']:.0f} ms from capture (p95 "
                f"{measured['live_latency_p95_ms']:.0f})"
            )
        parts.append(live)
    return f"{measured['run']:<20} {'; '.join(parts)}; tracker: {measured['tracker']}"
