"""A portrait that follows a face: loads a bundle, prepares a portrait, renders frame by frame.

The order of the stages stands here; no threads, no camera, no files but the bundle's.
"""

from __future__ import annotations

import logging
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

from diffusionact import manifest as manifest_file
from diffusionact.condition import draw_condition
from diffusionact.errors import BundleError, NoFace, SettingsError
from diffusionact.image import bgr_to_rgb, check_image, to_tensor, to_uint8, warp_crop
from diffusionact.landmarks import Landmarks, Track, crop_matrix
from diffusionact.manifest import Manifest
from diffusionact.runtime.choice import choose
from diffusionact.runtime.component import frames_at_once
from diffusionact.runtime.frames import Foreign, picture
from diffusionact.runtime.graph import GraphLoop
from diffusionact.runtime.loop import AnyLoop, open_loop
from diffusionact.runtime.paste import on_whole_pixels
from diffusionact.runtime.pool import Pool
from diffusionact.runtime.published.ranges import stretched_uint8
from diffusionact.runtime.published.tracker import PublishedTracker
from diffusionact.runtime.retarget import Retargeter, RetargetSettings
from diffusionact.runtime.session import Session
from diffusionact.runtime.settings import Settings
from diffusionact.runtime.source import Source
from diffusionact.runtime.timing import StopWatch
from diffusionact.runtime.tracker import (
    Tracker,
    open_tracker,
    open_tracker_of,
    portrait_face,
)

UInt8Array: TypeAlias = npt.NDArray[np.uint8]
Float32Array: TypeAlias = npt.NDArray[np.float32]

SYNTHETIC_DOMAIN = "rendered faces"
_log = logging.getLogger("diffusionact")


@dataclass(frozen=True)
class Result:
    """One frame, its arrays its own.

    frame: uint8 [H,W,3], BGR, the portrait with the new face, or the crop when pasting is off;
    crop: uint8 [S,S,3], BGR; landmarks: the ones it was drawn from, crop px;
    times: stage -> nanoseconds, in order; seen: whether the driver showed a face; steps: that
    rendering took.
    """

    frame: UInt8Array
    crop: UInt8Array
    landmarks: Landmarks
    times: Mapping[str, int]
    seen: bool = True
    steps: int = 0


class Reenactor:
    """Networks of one bundle, opened and bound; not to be shared between threads."""

    def __init__(
        self,
        manifest: Manifest,
        loop: AnyLoop,
        settings: Settings,
        tracker: Tracker | None = None,
        open_tracker: Callable[[], Tracker] = open_tracker,
    ) -> None:
        self.manifest = manifest
        self.settings = settings
        self._loop = loop
        self._tracker = tracker
        self._open_tracker = open_tracker
        side = manifest.image_size
        self._canvas = np.zeros((side, side, 3), np.uint8)
        self._condition = np.zeros((1, 3, side, side), np.float32)
        if not isinstance(loop, GraphLoop):
            self._condition = loop.condition  # where the encoder reads it
        self._crops, self._frames = Pool(), Pool()
        self._session: Session | None = None  # of the one user who names no session
        self._on_device: Source | None = None  # the one that the GPU's frames are of

    @classmethod
    def load(
        cls,
        bundle: str | os.PathLike[str],
        device: str = "auto",
        settings: Settings | None = None,
        tracker: Tracker | None = None,
    ) -> Reenactor:
        """Return a reenactor of a bundle, its hashes checked and its networks bound.

        tracker: for pictures; None opens that of the settings when the first picture comes.

        Raises: BundleError, SettingsError, DeviceError, BackendMissing.
        """
        settings = settings or Settings()
        bundle_dir = Path(bundle)
        manifest = manifest_file.read(bundle_dir)
        chosen = choose(
            bundle_dir,
            manifest,
            backend=settings.backend,
            precision=settings.precision,
            device=device,
            threads=settings.threads,
            approximate=settings.approximate,
        )
        at_once = 1  # features that are reused are those of one frame
        if not settings.approximate:
            step = bundle_dir / manifest.components["unet_step"].file
            at_once = frames_at_once(
                step, chosen.backend, device, chosen.precision, settings.at_once
            )
        loop = open_loop(
            bundle_dir,
            manifest,
            steps=settings.steps,
            also=_step_choices(settings, manifest),
            backend=chosen.backend,
            device=device,
            precision=chosen.precision,
            threads=settings.threads,
            approximate=settings.approximate,
            at_once=at_once,
        )
        opener = partial(
            open_tracker_of,
            bundle_dir,
            manifest,
            settings.tracker,
            published=settings.compat == "published",
            # The tracker's networks read what the CPU cuts out.
            backend=chosen.backend if chosen.backend in ("ort", "openvino") else "ort",
            device="cpu",
            threads=settings.threads,
        )
        made_of = replace(
            settings, backend=chosen.backend, precision=chosen.precision, at_once=at_once
        )
        return cls(manifest, loop, made_of, tracker, opener)

    def prepare(
        self,
        portrait_bgr: UInt8Array | Foreign,
        face: int | None = None,
        landmarks: Landmarks | None = None,
        x_T: Float32Array | None = None,
    ) -> Source:
        """Return the portrait made ready: crop, landmarks, and x_T by inversion.

        portrait_bgr: uint8 [H,W,3], of any library as in `reenact`; face: which of several, from
        1; landmarks: of the face, in portrait px, when they are known and no tracker is wanted;
        x_T: float32 [1,3,S,S], when it is known and no inversion is wanted. A portrait without
        known landmarks counts as a photo, which a model of rendered faces was not trained on: a
        warning is logged.

        Raises: MediaError for no picture, NoFace, SettingsError, BackendMissing.
        Source: DiffusionAct, inversion with the source's own z.
        """
        portrait_bgr = picture(portrait_bgr, "portrait")
        check_image(portrait_bgr, "portrait")
        if landmarks is None and isinstance(self.tracker, PublishedTracker):
            made = self.tracker.portrait(portrait_bgr, face)
            return self._source_of(portrait_bgr, made.crop, made.landmarks, made.matrix, x_T)
        if landmarks is None:
            landmarks = portrait_face(self.tracker.detect(portrait_bgr), face)
            self._warn_of_photo()
        if not landmarks.is_face:
            raise NoFace(
                "the portrait's landmarks span no face, or are not finite; give all 68 points and "
                "both irises in pixels, or none, to have them tracked"
            )
        side, how = self.manifest.image_size, self.manifest.crop
        matrix = crop_matrix(landmarks.points, side, how.rotate, how.scale)
        matrix = on_whole_pixels(matrix, side)
        crop = warp_crop(bgr_to_rgb(portrait_bgr), matrix, side)
        # The landmarks drawn are the picture's own, not those of codes: these are forgotten.
        in_crop = replace(landmarks.transformed(matrix), codes=None)
        return self._source_of(portrait_bgr, crop, in_crop, matrix, x_T)

    def session(self, source: Source) -> Session:
        """Return a session of its own on this source: its motion is no other session's.

        Raises: SettingsError for a source of other weights.
        """
        source.check_made_by(self.manifest.weights_sha256)
        settings = RetargetSettings(
            absolute_pose=self.settings.absolute_pose,
            # The expressions of the rendered face are all that such a model has seen; one trained
            # on people follows the driver's points themselves.
            expression="model" if self._synthetic else "free",
            smoothing=self.settings.smoothing,
            pose_range_deg=_pose_range_deg(self.manifest),
        )
        return Session(source, settings, lambda: self.tracker)

    def reenact(
        self,
        driver: UInt8Array | Foreign | Landmarks | None,
        source: Source | Session,
        pts_ns: int | None = None,
    ) -> Result:
        """Return the portrait with the driver's motion.

        driver: a picture, uint8 [H,W,3] BGR, of NumPy or any library whose arrays speak DLPack or
        `__cuda_array_interface__` (one on a GPU is copied once, to be tracked), or its landmarks in
        its own px, or None where no face was seen (as points that are no face, or not finite);
        source: or a session on it;
        pts_ns: the frame's time, for smoothing. While no face is seen the portrait holds its last
        motion, then eases to rest. Motion is relative to the session's neutral face; a source
        without a session has one of its own until another source comes.

        Raises: MediaError for no picture, SettingsError for a source of other weights.
        """
        watch = StopWatch()
        if driver is not None and not isinstance(driver, Landmarks):
            driver = self._track(picture(driver, "driver frame"))
            watch.lap("track")
        session = self._session_of(source)
        target = session.target(driver, pts_ns)
        watch.lap("retarget")
        return self._render(target, session.source, watch, driver is not None and driver.is_face)

    def open_together(self) -> int:
        """Return how many frames `reenact_together` takes: what this needs is open then, or the
        number is 1, where one frame at a time is faster or all that the bundle's networks do."""
        at_once = self.settings.at_once or 1
        if at_once == 1 or isinstance(self._loop, GraphLoop):
            return 1
        try:
            self._loop.open_together()
        except BundleError as error:
            _log.info("one frame at a time: %s", error)
            return 1
        self._codes = np.zeros((at_once, self.manifest.z_size), np.float32)
        return at_once

    def reenact_together(
        self, drivers: Sequence[Landmarks | None], session: Session, pts_ns: Sequence[int]
    ) -> list[Result]:
        """Return what `reenact` returns for each, in order, rendered at once.

        drivers: as many as `open_together` said. Each result's time of "render" is its share.
        """
        if isinstance(self._loop, GraphLoop):
            raise SettingsError("on a GPU frames are rendered one at a time; call reenact")
        source, drawn = session.source, []
        for i, driver in enumerate(drivers):
            watch = StopWatch()
            target = session.target(driver, pts_ns[i])
            watch.lap("retarget")
            condition = self._draw(target)
            watch.lap("condition")
            np.copyto(self._codes[i], self._loop.encode(source.image, condition)[0])
            watch.lap("encode")
            drawn.append((target, watch, driver is not None and driver.is_face))
        together = StopWatch()
        pictures = self._loop.render_together(source.x_T, self._codes)
        together.lap("render")
        share = {"render": together.times["render"] // len(drawn)}
        results = []
        for i, (target, watch, seen) in enumerate(drawn):
            watch.take(share)
            crop = self._unpacked(pictures[i : i + 1])
            results.append(self._finished(crop, target, source, watch, seen))
        return results

    def target(
        self, driver: Landmarks | None, source: Source | Session, pts_ns: int | None = None
    ) -> Landmarks:
        """Return the landmarks to draw for a driver, crop px; see `Session.target`."""
        return self._session_of(source).target(driver, pts_ns)

    def render(self, target: Landmarks, source: Source) -> Result:
        """Return the portrait with exactly these landmarks, given in crop px: no retargeting.

        Raises: SettingsError for a source of other weights.
        """
        source.check_made_by(self.manifest.weights_sha256)
        return self._render(target, source, StopWatch())

    def invert(self, image: Float32Array, condition: Float32Array) -> Float32Array:
        """Return the stochastic code x_T of a picture and a drawing of its own face: what
        `prepare` does once both are there.

        image, condition, x_T: float32 [1,3,S,S]; the first two in [-1, 1], RGB.
        """
        return self._loop.invert(image, self._loop.encode(image, condition))

    def generate(
        self, x_T: Float32Array, image: Float32Array, condition: Float32Array
    ) -> Float32Array:
        """Return the picture x_0 under a drawing: what `render` does once it is drawn.

        x_T: of `invert`; image, condition, x_0: float32 [1,3,S,S] in [-1, 1], RGB.
        """
        return self._generate(x_T, image, condition, StopWatch()).copy()

    def rest(self, source: Source) -> Result:
        """Return the portrait with its own landmarks: what is shown before the first driver."""
        return self.render(source.landmarks, source)

    def retargeter(self, source: Source) -> Retargeter:
        """Return the session's retargeter for this source, to calibrate or recalibrate it; what
        was held of a lost face is forgotten."""
        session = self._session_of(source)
        session.forget()
        return session.retargeter

    def start_session(self, source: Source, track: Track) -> None:
        """Return nothing; motion starts anew, measured from the track: see `Session.start`."""
        self._session_of(source).start(track)

    def _session_of(self, source: Source | Session) -> Session:
        if isinstance(source, Session):
            return source
        if self._session is None or source is not self._session.source:
            self._session = self.session(source)
        return self._session

    @property
    def steps(self) -> int:
        """The number of steps that the next frame takes."""
        return self._loop.steps

    @property
    def prepared_steps(self) -> tuple[int, ...]:
        """The numbers of steps that `set_steps` may choose, ascending."""
        return self._loop.prepared

    def set_steps(self, steps: int) -> None:
        """Return nothing; frames take this many steps from the next one on, at no cost.

        Raises: SettingsError for a number that `Settings.step_choices` did not prepare.
        """
        self._loop.set_steps(steps)

    @property
    def tracker(self) -> Tracker:
        """The tracker in use, opened now if it was not. Raises: BackendMissing."""
        if self._tracker is None:
            self._tracker = self._open_tracker()
        return self._tracker

    def close(self) -> None:
        """Return nothing; the tracker is closed and the session forgotten."""
        if self._tracker is not None:
            self._tracker.close()
        self._tracker = self._session = self._on_device = None

    def __enter__(self) -> Reenactor:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _source_of(
        self,
        portrait_bgr: UInt8Array,
        crop: UInt8Array,
        landmarks: Landmarks,
        matrix: npt.NDArray[np.float64],
        x_T: Float32Array | None,
    ) -> Source:
        if x_T is None:
            x_T = self.invert(to_tensor(crop), self._draw(landmarks))
        sha256 = self.manifest.weights_sha256
        return Source(portrait_bgr.copy(), crop, landmarks, matrix, x_T, sha256)

    def _track(self, frame_bgr: UInt8Array) -> Landmarks | None:
        check_image(frame_bgr, "driver frame")
        try:
            return self.tracker.track(frame_bgr)
        except NoFace:
            return None

    def _render(
        self, target: Landmarks, source: Source, watch: StopWatch, seen: bool = True
    ) -> Result:
        self._sketch(target)
        if isinstance(self._loop, GraphLoop) and not self.settings.compat:
            watch.lap("condition")
            crop = self._frame(self._loop, source, watch)
        else:
            condition = to_tensor(self._canvas, self._condition)
            watch.lap("condition")
            crop = self._unpacked(self._generate(source.x_T, source.image, condition, watch))
        return self._finished(crop, target, source, watch, seen)

    def _unpacked(self, x_0: Float32Array) -> UInt8Array:
        """The crop in BGR; x_0, the loop's memory, holds nothing of use afterwards."""
        if self.settings.compat:
            return self._in_bgr(stretched_uint8(x_0))
        bgr = x_0[:, ::-1]
        return to_uint8(bgr, self._crops.take(self._canvas.shape), scratch=bgr)

    def _in_bgr(self, crop_rgb: UInt8Array) -> UInt8Array:
        return bgr_to_rgb(crop_rgb, self._crops.take(crop_rgb.shape))  # the same swap

    def _finished(
        self, crop: UInt8Array, target: Landmarks, source: Source, watch: StopWatch, seen: bool
    ) -> Result:
        frame = crop
        if self.settings.paste:
            frame = source.paster.paste(crop, self._frames.take(source.portrait.shape))
        watch.lap("paste")
        return Result(frame, crop, target, watch.times, seen, self._loop.steps)

    def _generate(
        self, x_T: Float32Array, image: Float32Array, condition: Float32Array, watch: StopWatch
    ) -> Float32Array:
        z = self._loop.encode(image, condition)
        watch.lap("encode")
        x_0 = self._loop.render(x_T, z)
        watch.lap("render")
        return x_0

    def _frame(self, loop: GraphLoop, source: Source, watch: StopWatch) -> UInt8Array:
        """The same on a GPU, from the drawing to the picture without coming back in between."""
        if source is not self._on_device:
            loop.set_source(source.crop, source.x_T)
            self._on_device = source
        crop = self._in_bgr(loop.frame(self._canvas))
        watch.lap("render")
        return crop

    def _draw(self, landmarks: Landmarks) -> Float32Array:
        self._sketch(landmarks)
        return to_tensor(self._canvas, self._condition)

    def _sketch(self, landmarks: Landmarks) -> None:
        draw_condition(landmarks, len(self._canvas), self.manifest.drawing, self._canvas)

    @property
    def _synthetic(self) -> bool:
        return self.manifest.training.domain == SYNTHETIC_DOMAIN

    def _warn_of_photo(self) -> None:
        if self._synthetic:
            _log.warning(
                "this model was trained on rendered faces: a photo lies outside its training, "
                "expect a poor likeness"
            )


def _step_choices(settings: Settings, manifest: Manifest) -> tuple[int, ...]:
    return manifest.render.choices if settings.step_choices is None else settings.step_choices


def _pose_range_deg(manifest: Manifest) -> tuple[float, float, float]:
    """Return the largest yaw, pitch and roll that the model was trained on, or the usual."""
    ranges, default = manifest.training.pose_range_deg, RetargetSettings().pose_range_deg
    yaw, pitch, roll = (
        max(abs(end) for end in ranges[name]) if name in ranges else usual
        for name, usual in zip(("yaw", "pitch", "roll"), default, strict=True)
    )
    return yaw, pitch, roll
