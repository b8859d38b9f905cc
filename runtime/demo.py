"""The shipped portrait moved by the shipped clip: a video, a contact sheet, a table of times.

Both come with their landmarks, so no tracker is needed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np

from diffusionact.assets import driver_path, portrait_paths
from diffusionact.condition import Drawing, draw_condition
from diffusionact.errors import MediaError
from diffusionact.landmarks import Landmarks, Track
from diffusionact.progress import ProgressCallback
from diffusionact.runtime.clip import driver_motion, prepare_portrait
from diffusionact.runtime.media import Image, VideoReader, open_reader
from diffusionact.runtime.reenactor import Reenactor, Result
from diffusionact.runtime.sheet import contact_sheet, fit_square, panels
from diffusionact.runtime.source import Source
from diffusionact.runtime.timing import StageTimes, StopWatch, summarise
from diffusionact.runtime.writer import open_writer

PANEL_PX, SHEET_PX, MOMENTS = 384, 176, 8
CAPTIONS = ("portrait", "driver", "result")
DRAWING = Drawing(thickness_px=3, disc_radius_px=6.0, antialias=True)


@dataclass(frozen=True)
class DemoReport:
    """video, sheet: what was written; frames: how many; seconds: spent; times: percentiles a
    stage."""

    video: Path
    sheet: Path
    frames: int
    seconds: float
    times: Mapping[str, StageTimes]


def run_demo(
    act: Reenactor,
    folder: Path,
    progress: ProgressCallback | None = None,
    *,
    portrait: Path | None = None,
    driver: Path | None = None,
) -> DemoReport:
    """Return what was done; folder holds demo.mp4 and demo.png.

    portrait, driver: instead of the shipped ones.
    Raises: MediaError when they are missing or the folder cannot be written.
    """
    begun_s = time.monotonic()
    reader = open_reader(driver or driver_path())
    if not isinstance(reader, VideoReader):
        raise MediaError(f"{reader.name}: the demo shows its driver; wanted a video")
    source = prepare_portrait(act, portrait or _first_portrait())
    track = driver_motion(act, reader).track
    act.start_session(source, track)
    video, sheet = folder / "demo.mp4", folder / "demo.png"
    with open_writer(sheet) as picture:
        times, moments = _film(act, source, reader, track, video, progress)
        rows = [list(row) for row in zip(*moments, strict=True)]
        made = contact_sheet(source.portrait, rows, ("driver", "drawing", "result"), SHEET_PX)
        picture.write(made, 0, 0, source.landmarks)
    return DemoReport(video, sheet, len(times), time.monotonic() - begun_s, summarise(times))


def _film(
    act: Reenactor,
    source: Source,
    reader: VideoReader,
    track: Track,
    video: Path,
    progress: ProgressCallback | None,
) -> tuple[list[Mapping[str, int]], list[tuple[Image, Image, Image]]]:
    """Write the video; the times of its frames, and driver, drawing and result at some moments."""
    shown = set(np.linspace(0, len(track) - 1, MOMENTS).round().astype(int).tolist())
    times: list[Mapping[str, int]] = []
    moments = []
    watch = StopWatch()
    with open_writer(video, time_base=reader.time_base, audio_from=reader.path) as writer:
        for i, frame in enumerate(reader):
            if frame.image_bgr is None:
                raise TypeError("a video has pictures")
            watch.lap("read")
            result = act.reenact(track[i], source, frame.pts_ns)
            watch.lap("")  # reenact has its own stages
            squares = [fit_square(x, PANEL_PX) for x in (source.portrait, frame.image_bgr)]
            film = panels([*squares, fit_square(result.frame, PANEL_PX)], CAPTIONS, PANEL_PX)
            writer.write(film, frame.pts_ns, frame.duration_ns, result.landmarks)
            watch.lap("write")
            times.append(
                {"read": watch.times["read"], **result.times, "write": watch.times["write"]}
            )
            watch = StopWatch()
            if i in shown:
                moments.append((frame.image_bgr, _drawn(result), result.frame))
            if progress is not None:
                progress(i + 1, len(track))
    return times, moments


def _drawn(result: Result) -> Image:
    """The condition of a frame, drawn finely, BGR."""
    side, scale = SHEET_PX * 2, SHEET_PX * 2 / len(result.crop)
    half = (scale - 1.0) / 2.0
    large: Landmarks = result.landmarks.transformed(np.array([[scale, 0, half], [0, scale, half]]))
    drawn = draw_condition(large, side, DRAWING)
    return np.asarray(cv2.cvtColor(drawn, cv2.COLOR_RGB2BGR), np.uint8)


def _first_portrait() -> Path:
    paths = portrait_paths()
    if not paths:
        raise MediaError(
            "the shipped portraits are missing from the installed package; reinstall it with "
            "`pip install --force-reinstall diffusionact`"
        )
    return paths[0]
