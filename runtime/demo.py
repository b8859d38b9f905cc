"""The shipped portrait moved by the shipped clip: a video, a contact sheet, a table of times.

Both come with their landmarks, so no tracker is needed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

import cv2
import numpy as np

from diffusionact.assets import driver_path, portrait_paths
from diffusionact.condition import Drawing, draw_condition
from diffusionact.errors import MediaError
from diffusionact.landmarks import Landmarks
from diffusionact.progress import TimedCallback, TimeLeft
from diffusionact.runtime.clip import prepare_portrait
from diffusionact.runtime.media import Image, VideoReader, open_reader
from diffusionact.runtime.motion import driver_motion
from diffusionact.runtime.reenactor import Reenactor
from diffusionact.runtime.rendering import render_motion
from diffusionact.runtime.sheet import contact_sheet, fit_square, panels
from diffusionact.runtime.source import Source
from diffusionact.runtime.timing import StageTimes
from diffusionact.runtime.writer import Writer, open_writer

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
    progress: TimedCallback | None = None,
    *,
    portrait: Path | None = None,
    driver: Path | None = None,
) -> DemoReport:
    """Return what was done; folder holds demo.mp4 and demo.png.

    progress: of the stages "track" and "render"; portrait, driver: instead of the shipped ones.
    Raises: MediaError when they are missing or the folder cannot be written.
    """
    begun_s = time.monotonic()
    reader = open_reader(driver or driver_path())
    if not isinstance(reader, VideoReader):
        raise MediaError(f"{reader.name}: the demo shows its driver; wanted a video")
    source = prepare_portrait(act, portrait or _first_portrait())
    left = TimeLeft(progress)
    motion = driver_motion(act, reader, left.stage("track", total=reader.length))
    session = act.session(source)
    session.start(motion.track)
    video, sheet = folder / "demo.mp4", folder / "demo.png"
    count = len(motion.track)
    shown = set(np.linspace(0, count - 1, MOMENTS).round().astype(int).tolist())
    with open_writer(sheet) as picture:
        writer = open_writer(video, time_base=reader.time_base, audio_from=reader.path)
        with _Film(source, reader, shown, writer) as film:
            tally = render_motion(act, session, motion, film, left=left)
        rows = [list(row) for row in zip(*film.moments, strict=True)]
        made = contact_sheet(source.portrait, rows, ("driver", "drawing", "result"), SHEET_PX)
        picture.write(made, 0, 0, source.landmarks)
    return DemoReport(video, sheet, count, time.monotonic() - begun_s, tally.summary())


class _Film:
    """A writer of portrait, driver and result side by side; moments: driver, drawing and result
    of the frames that the sheet shows."""

    wants_pictures = True

    def __init__(
        self, source: Source, reader: VideoReader, shown: set[int], writer: Writer
    ) -> None:
        self.moments: list[tuple[Image, Image, Image]] = []
        self._portrait = fit_square(source.portrait, PANEL_PX)
        self._side = len(source.crop)
        self._driver = iter(reader)
        self._shown = shown
        self._writer = writer
        self._count = 0

    def write(
        self, image_bgr: Image | None, pts_ns: int, duration_ns: int, landmarks: Landmarks
    ) -> None:
        driver = next(self._driver).image_bgr
        if driver is None or image_bgr is None:
            raise TypeError("a film is made of pictures")
        squares = [self._portrait, *(fit_square(x, PANEL_PX) for x in (driver, image_bgr))]
        self._writer.write(panels(squares, CAPTIONS, PANEL_PX), pts_ns, duration_ns, landmarks)
        if self._count in self._shown:
            self.moments.append((driver, _drawn(landmarks, self._side), image_bgr))
        self._count += 1

    def __enter__(self) -> _Film:
        self._writer.__enter__()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._writer.__exit__(kind, error, trace)


def _drawn(landmarks: Landmarks, crop_px: int) -> Image:
    """The condition of a frame, drawn finely, BGR."""
    side, scale = SHEET_PX * 2, SHEET_PX * 2 / crop_px
    half = (scale - 1.0) / 2.0
    large: Landmarks = landmarks.transformed(np.array([[scale, 0, half], [0, scale, half]]))
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
