"""Both ends of a live session for tests: cameras and screens that do as they are told."""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from types import TracebackType

import numpy as np
import numpy.typing as npt

from diffusionact.errors import MediaError, NoFace
from diffusionact.landmarks import Landmarks, Track
from diffusionact.runtime.camera import Camera as AnyCamera
from diffusionact.runtime.camera import ClipCamera
from diffusionact.runtime.live import LiveReport, LiveSession, LiveSettings
from diffusionact.runtime.media import FRAME_NS, Frame, TrackReader
from diffusionact.runtime.reenactor import Reenactor, Result
from diffusionact.runtime.sinks import SeveralSinks
from diffusionact.runtime.source import Source

UInt8Array = npt.NDArray[np.uint8]


class Screen:
    """A sink that keeps what it is shown, and types what it is told to, by picture."""

    name = "screen"

    def __init__(self, keys: dict[int, str] | None = None, wants_overlay: bool = False) -> None:
        self.wants_overlay = wants_overlay
        self.pictures: list[UInt8Array] = []
        self.moments: list[int] = []
        self.open = 0
        self.failed: bool | None = None
        self._keys = dict(keys or {})

    def show(self, image_bgr: UInt8Array) -> int:
        self.pictures.append(image_bgr.copy())
        self.moments.append(time.monotonic_ns())
        return self.moments[-1]

    def keys(self) -> Sequence[str]:
        return [self._keys.pop(at) for at in sorted(self._keys) if at <= len(self.pictures)]

    def __enter__(self) -> Screen:
        self.open += 1
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.open -= 1
        self.failed = kind is not None


@dataclass
class Camera:
    """Frames at a steady rate: landmarks, or pictures for a tracker; `silent_s` after each count
    in `pauses`; ends by itself, or with an error."""

    faces: Sequence[Landmarks | None]
    period_s: float = 0.01
    image: UInt8Array | None = None
    pauses: dict[int, float] = field(default_factory=dict)
    fails: bool = False
    name: str = "camera"
    live: bool = True
    length: int | None = None
    time_base: Fraction | None = None
    closed: threading.Event = field(default_factory=threading.Event)

    def close(self) -> None:
        self.closed.set()

    def __iter__(self) -> Iterator[Frame]:
        for i, face in enumerate(self.faces):
            if self.closed.wait(self.pauses.get(i, self.period_s)):
                return
            yield Frame(self.image, time.monotonic_ns(), 0, face)
        if self.fails:
            raise MediaError("the camera is broken")


class Found:
    """A tracker that sees the same face in each picture, or none."""

    def __init__(self, face: Landmarks | None) -> None:
        self.face = face
        self.threads: set[int] = set()

    def detect(self, image_bgr: UInt8Array) -> list[Landmarks]:
        return []

    def track(self, image_bgr: UInt8Array) -> Landmarks:
        self.threads.add(threading.get_ident())
        if self.face is None:
            raise NoFace("no face in this frame")
        return self.face

    def close(self) -> None:
        pass


def moved(face: Landmarks, degrees: float = 25.0) -> Landmarks:
    """The face rolled about its middle."""
    turn = np.deg2rad(degrees)
    matrix = np.array([[np.cos(turn), -np.sin(turn)], [np.sin(turn), np.cos(turn)]])
    middle = face.points[:, :2].mean(axis=0)
    return face.transformed(np.column_stack([matrix, middle - matrix @ middle]))


def turning(face: Landmarks, degrees: float = 25.0, count: int = 15) -> list[Landmarks]:
    """A face on its way there, as fast as heads turn."""
    return [moved(face, degrees * (i + 1) / count) for i in range(count)]


def run(
    act: Reenactor,
    sources: Source | Sequence[Source],
    camera: AnyCamera,
    screen: Screen,
    stop: threading.Event | None = None,
    **settings: object,
) -> LiveReport:
    made = LiveSettings(**settings)  # type: ignore[arg-type]
    given = [sources] if isinstance(sources, Source) else sources
    return LiveSession(act, given, camera, SeveralSinks([screen]), made).run(stop)


def steps_px(results: Sequence[Result]) -> npt.NDArray[np.float64]:
    points = np.stack([result.landmarks.points[:, :2] for result in results])
    return np.asarray(np.abs(np.diff(points, axis=0)).max(axis=(1, 2)), np.float64)


def patient(faces: Sequence[Landmarks | None], size: int = 64) -> ClipCamera:
    """A recorded track of which every frame is rendered, however long that takes."""
    points = np.full((len(faces), 68, 3), np.nan, np.float32)
    gaze = np.full((len(faces), 2, 2), np.nan, np.float32)
    for i, face in enumerate(faces):
        if face is not None:
            points[i], gaze[i] = face.points, face.gaze
    pts_ns = np.arange(len(faces), dtype=np.int64) * FRAME_NS
    return ClipCamera(TrackReader("track", Track(points, gaze, pts_ns, (size, size))), False)
