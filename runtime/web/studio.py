"""What all visitors share: one reenactor and the thread that renders, one that tracks, one that
encodes. Frames queue for the renderer in the order they come, one of each visitor at most."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias, TypeVar

import cv2
import numpy as np
import numpy.typing as npt

from diffusionact.assets import portrait_paths
from diffusionact.errors import BackendMissing, NoFace
from diffusionact.landmarks import Landmarks, Track, sidecar_path
from diffusionact.runtime.control import Goal, control_for
from diffusionact.runtime.overlay import labelled
from diffusionact.runtime.reenactor import Reenactor, Result
from diffusionact.runtime.session import Session
from diffusionact.runtime.source import Source
from diffusionact.runtime.tracker import Tracker, open_tracker
from diffusionact.runtime.web.pictures import FRAME_SIDE, PORTRAIT_SIDE, decode, encode

UInt8Array: TypeAlias = npt.NDArray[np.uint8]
T = TypeVar("T")

MOVING_NS = 1_000_000_000  # since its last frame, of a session that counts as moving
FACE_MARGIN = 0.35  # around a face's box, of its size, in the picture that asks which one


@dataclass(frozen=True)
class Upload:
    """A user's portrait: uint8 [H,W,3] BGR, and the faces in it."""

    image: UInt8Array
    faces: tuple[Landmarks, ...]

    def boxes(self) -> list[list[int]]:
        """Return left, top, width, height of every face, px, with some hair and chin."""
        return [_box(face, self.image.shape) for face in self.faces]


@dataclass(frozen=True)
class Rendered:
    """A frame, and when (monotonic ns): handed over, begun, done; and since when the renderer had
    nothing else to do, if it had not."""

    result: Result
    ready_ns: int
    begun_ns: int
    done_ns: int
    free_ns: int


class Studio:
    """Shared by all visitors; every method may be called from the event loop only."""

    def __init__(
        self,
        act: Reenactor,
        new_tracker: Callable[[], Tracker] = open_tracker,
        goal: Goal | None = None,
        label: bool = True,
    ) -> None:
        """new_tracker: makes the tracker of one visitor's camera frames; goal: of the step
        control, None leaves the steps alone; label: the mark that says a picture was generated.

        Raises: SettingsError for a goal with one count of steps prepared.
        """
        self._act = act
        self._goal, self._label = goal, label
        self._control = control_for(goal, act.prepared_steps, act.steps)
        self._steps = act.steps
        self._moving: dict[Session, int] = {}  # and when (monotonic ns) each was last rendered
        self._new_tracker = new_tracker
        self._renderer = ThreadPoolExecutor(1, "renderer")
        self._tracking = ThreadPoolExecutor(1, "tracking")
        self._encoding = ThreadPoolExecutor(1, "encoding")
        self._shipped = {path.stem: path for path in portrait_paths()}
        self._sources: dict[str, Source] = {}
        self._free_ns = time.monotonic_ns()

    @property
    def model(self) -> str:
        """The bundle's name."""
        return self._act.manifest.name

    @property
    def portraits(self) -> dict[str, Path]:
        """Name -> picture of the shipped portraits."""
        return self._shipped

    async def shipped(self, name: str) -> Source:
        """Return a shipped portrait, prepared once for everyone."""

        def made() -> Source:
            if name not in self._sources:
                path = self._shipped[name]
                image = np.asarray(cv2.imread(str(path)), np.uint8)
                face = Track.load(sidecar_path(path))[0]
                self._sources[name] = self._act.prepare(image, landmarks=face)
            return self._sources[name]

        return await self._render(made)

    async def upload(self, encoded: bytes) -> Upload:
        """Return a user's portrait with its faces. Raises: BadPicture, BackendMissing."""

        def found() -> Upload:
            image = decode(encoded, PORTRAIT_SIDE)
            return Upload(image, tuple(self._act.tracker.detect(image)))

        return await _in(self._tracking, found)

    async def own(self, upload: Upload, face: int) -> Source:
        """Return a user's portrait made ready; face: which, from 0. Raises: NoFace."""
        return await self._render(
            lambda: self._act.prepare(upload.image, landmarks=upload.faces[face])
        )

    async def session(self, source: Source) -> Session:
        """Return a session that finds its neutral face in its first second."""
        session = self._act.session(source)
        session.start()
        return session

    async def recalibrate(self, session: Session) -> None:
        """Return nothing; the neutral face is looked for anew, while the portrait eases to rest
        from where it is."""

        def anew() -> None:
            session.forget()
            session.retargeter.recalibrate()

        await self._render(anew)

    async def rest(self, source: Source) -> UInt8Array:
        """Return the portrait with its own face, uint8 [H,W,3] BGR."""
        return (await self._render(lambda: self._act.rest(source))).frame

    async def frame(
        self,
        session: Session,
        driver: Landmarks | None,
        pts_ns: int,
        begun: Callable[[], None],
    ) -> Rendered:
        """Return the driver's motion on the session's portrait; `begun` is called in the event
        loop when the renderer takes the frame."""
        loop, ready_ns = asyncio.get_running_loop(), time.monotonic_ns()

        def rendered() -> Rendered:
            free_ns, begun_ns = self._free_ns, time.monotonic_ns()
            loop.call_soon_threadsafe(begun)
            if self._act.steps != self._steps:
                self._act.set_steps(self._steps)
            result = self._act.reenact(driver, session, pts_ns)
            return Rendered(result, ready_ns, begun_ns, time.monotonic_ns(), free_ns)

        return await self._render(rendered)

    def observe(self, session: Session, made: Rendered, total_ns: int) -> int:
        """Return how long a round of all who move takes, ns; the next frames take as many steps as
        the goal allows. total_ns: since the frame came. A rate is shared by all who move: it is
        judged by a round of them."""
        now_ns = time.monotonic_ns()
        self._moving[session] = now_ns
        self._moving = {s: at for s, at in self._moving.items() if now_ns - at < MOVING_NS}
        round_ns = len(self._moving) * (made.done_ns - made.begun_ns)
        if self._control is None or self._goal is None or not made.result.seen:
            return round_ns
        share = len(self._moving) if self._goal.fps else 1
        spent_ns = round_ns if self._goal.fps else total_ns
        render_ns = share * made.result.times.get("render", 0)
        self._steps = self._control.observe(now_ns, made.result.steps, spent_ns, render_ns)
        return round_ns

    def leave(self, session: Session) -> None:
        """Return nothing; the session counts no more, and nothing here holds it or its portrait."""
        self._moving.pop(session, None)

    async def tracker(self) -> Tracker | None:
        """Return a tracker for one visitor's camera, or None where none is installed."""
        try:
            return await _in(self._tracking, self._new_tracker)
        except BackendMissing:
            return None

    async def track(self, tracker: Tracker, jpeg: bytes) -> Landmarks | None:
        """Return the face in a camera picture, None unseen. Raises: BadPicture."""

        def tracked() -> Landmarks | None:
            try:
                return tracker.track(decode(jpeg, FRAME_SIDE))
            except NoFace:
                return None

        return await _in(self._tracking, tracked)

    async def release(self, tracker: Tracker) -> None:
        """Return nothing; closes a visitor's tracker."""
        await _in(self._tracking, tracker.close)

    async def jpeg(self, image_bgr: UInt8Array) -> bytes:
        """Return the JPEG of a picture, which says in a corner that it was generated."""

        def encoded() -> bytes:
            return encode(labelled(image_bgr) if self._label else image_bgr)

        return await _in(self._encoding, encoded)

    async def close(self) -> None:
        """Return when the threads have ended; what waits is not begun."""
        for pool in (self._encoding, self._tracking, self._renderer):
            await asyncio.to_thread(pool.shutdown, wait=True, cancel_futures=True)

    async def _render(self, work: Callable[[], T]) -> T:
        def alone() -> T:
            try:
                return work()
            finally:
                self._free_ns = time.monotonic_ns()

        return await _in(self._renderer, alone)


async def _in(pool: ThreadPoolExecutor, work: Callable[[], T]) -> T:
    return await asyncio.get_running_loop().run_in_executor(pool, work)


def _box(face: Landmarks, shape: tuple[int, ...]) -> list[int]:
    low, high = face.points[:, :2].min(axis=0), face.points[:, :2].max(axis=0)
    margin = FACE_MARGIN * (high - low)
    left, top = np.maximum(np.floor(low - margin), 0).astype(int)
    right, bottom = np.minimum(np.ceil(high + margin), (shape[1], shape[0])).astype(int)
    return [int(left), int(top), int(right - left), int(bottom - top)]
