"""An independent stopwatch for `diffusionact live`: a mouth that opens at known times.

    python -m benchmarks.stopwatch --json out/stopwatch.json

A face that we render opens and shuts its mouth at known frames of a clip. The clip is the camera,
a video the display. The delay is read from the mouth in that video alone, and compared with the
latency that the session reports. They differ by what the session cannot know: the mouth moves
between two frames that are rendered, and smoothing takes its part.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffusionact.assets import bundle_path, portrait_paths
from diffusionact.files import write_whole
from diffusionact.image import bgr_to_rgb
from diffusionact.landmarks import Landmarks, invert_affine
from diffusionact.runtime.camera import ClipCamera
from diffusionact.runtime.clip import prepare_portrait
from diffusionact.runtime.live import LiveReport, LiveSession, LiveSettings
from diffusionact.runtime.media import NS, Frame, open_reader
from diffusionact.runtime.reenactor import Reenactor
from diffusionact.runtime.settings import Settings
from diffusionact.runtime.sinks import FileSink, SeveralSinks
from diffusionact.runtime.source import Source
from diffusionact.runtime.writer import open_writer
from diffusionact.training.faces import Camera, Motion, render, sample_identity

FPS, SIDE = 30, 320
STILL_S = 1.7  # while the session finds the neutral face
SHORTEST_S, LONGEST_S = 0.5, 0.9  # that the mouth stays as it is
JAW_OPEN = 0  # in the face model's expressions
OPENING = 0.8
LATEST_S = 0.45  # after which a change of the mouth belongs to no event


@dataclass(frozen=True)
class Reading:
    """delay_ms: median over `events` changes of the mouth, from the clip's frame to the video;
    reported_ms: the session's median; frame_ms: between two new faces."""

    events: int
    delay_ms: float
    reported_ms: float
    frame_ms: float
    delays_ms: tuple[float, ...]

    @property
    def agrees(self) -> bool:
        """Whether both clocks agree within one frame."""
        return abs(self.delay_ms - self.reported_ms) <= self.frame_ms


@dataclass(frozen=True)
class _Noted(ClipCamera):
    """A clip that remembers when each of its frames was taken."""

    taken_ns: list[int] = field(default_factory=list)

    def __iter__(self) -> Iterator[Frame]:
        for frame in super().__iter__():
            self.taken_ns.append(frame.pts_ns)
            yield frame


def mouth_times(seconds: float, seed: int = 0) -> list[float]:
    """Return the times at which the mouth opens, shuts, opens ..., each on a frame of the clip."""
    rng = np.random.default_rng(seed)
    times, now_s = [], STILL_S
    while now_s < seconds - LONGEST_S:
        times.append(round(now_s * FPS) / FPS)
        now_s += rng.uniform(SHORTEST_S, LONGEST_S)
    return times


def write_driver(path: Path, seconds: float, times_s: list[float]) -> None:
    """Write the clip: one rendered person, looking straight, whose mouth opens and shuts."""
    identity = sample_identity(np.random.default_rng(3))
    camera = Camera(3.4, np.zeros(2, np.float32))
    pictures = []
    for opening in (0.0, OPENING):
        expression = np.zeros(13, np.float32)
        expression[JAW_OPEN] = opening
        still = np.zeros(3, np.float32)
        motion = Motion(still, expression, np.zeros(2, np.float32), still)
        made = render(identity, motion, camera, SIDE)
        pictures.append((bgr_to_rgb(made.image), made.landmarks))
    with open_writer(path) as writer:
        for i in range(round(seconds * FPS)):
            image, face = pictures[sum(t <= i / FPS + 1e-9 for t in times_s) % 2]
            writer.write(image, round(i * NS / FPS), round(NS / FPS), face)


def measure(act: Reenactor, source: Source, seconds: float, folder: Path) -> Reading:
    """Return what the stopwatch and the session say of one run of this many seconds."""
    times_s = mouth_times(seconds)
    write_driver(folder / "mouth.mp4", seconds, times_s)
    camera = _Noted(open_reader(folder / "mouth.mp4"))
    sink = FileSink(folder / "shown.mp4")
    session = LiveSession(act, [source], camera, SeveralSinks([sink]), LiveSettings(label=False))
    report = session.run()
    moments_s, openings = read_mouth(folder / "shown.mp4", source)
    began_ns = camera.taken_ns[0]
    offset_s = (sink.begun_ns - began_ns) / NS
    # Of each change its own frame's time: the clip's clock may have been held.
    taken_s = [(camera.taken_ns[round(time_s * FPS)] - began_ns) / NS for time_s in times_s]
    return reading_of(moments_s + offset_s, openings, taken_s, report)


def read_mouth(path: Path, source: Source) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Return the times of a video's frames, s, and how far the mouth's pixels are from shut,
    0 to 1."""
    face = source.landmarks.transformed(invert_affine(source.matrix))
    where = _mouth_box(face)
    frames = list(open_reader(path))
    pixels = np.stack([f.image_bgr[where] for f in frames if f.image_bgr is not None])
    far = np.abs(pixels.astype(np.float64) - pixels[0]).mean(axis=(1, 2, 3))
    shut, wide = np.percentile(far, (10, 90))
    times = np.array([frame.pts_ns for frame in frames]) / NS
    return times, np.clip((far - shut) / (wide - shut), 0.0, 1.0)


def _mouth_box(face: Landmarks) -> tuple[slice, slice]:
    low, high = face.points[48:68, :2].min(axis=0), face.points[48:68, :2].max(axis=0)
    margin = 0.4 * (high[0] - low[0])
    left, top = (low - (0.0, 0.2 * margin)).astype(int)
    right, bottom = (high + (0.0, margin)).astype(int)
    return slice(top, bottom), slice(left, right)


def reading_of(
    moments_s: NDArray[np.float64],
    openings: NDArray[np.float64],
    times_s: list[float],
    report: LiveReport,
) -> Reading:
    delays_ms = []
    for i, time_s in enumerate(times_s):
        moved = openings > 0.5 if i % 2 == 0 else openings < 0.5
        after = np.flatnonzero((moments_s >= time_s) & (moments_s < time_s + LATEST_S) & moved)
        if len(after):
            delays_ms.append(1000.0 * (moments_s[after[0]] - time_s))
    reported_ms = 0.0 if report.latency is None else report.latency.p50_ms
    return Reading(
        len(times_s),
        float(np.median(delays_ms)) if delays_ms else float("nan"),
        reported_ms,
        1000.0 / max(report.faces_per_second, 1e-9),
        tuple(round(float(delay_ms), 1) for delay_ms in delays_ms),
    )


def main() -> None:
    parser = argparse.ArgumentParser(description="Read a live session's delay from a mouth.")
    parser.add_argument("--bundle", type=Path, default=bundle_path())
    parser.add_argument("--portrait", type=Path, default=portrait_paths()[0])
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--steps", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    settings = Settings(steps=arguments.steps)
    with Reenactor.load(arguments.bundle, settings=settings) as act:
        source = prepare_portrait(act, arguments.portrait)
        with tempfile.TemporaryDirectory() as folder:
            reading = measure(act, source, arguments.seconds, Path(folder))
    values = {**asdict(reading), "agrees": reading.agrees}
    for name, value in values.items():
        print(f"{name:14} {value:.1f}" if isinstance(value, float) else f"{name:14} {value}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_whole(arguments.json, json.dumps(values) + "\n")


if __name__ == "__main__":
    main()
