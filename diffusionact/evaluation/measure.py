"""Every measure of every frame of a clip, with the instruments that are there."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from diffusionact.errors import MediaError
from diffusionact.evaluation import metrics
from diffusionact.evaluation.columns import FRAME_COLUMNS, PSNR_CEILING_DB
from diffusionact.evaluation.compared import Clip, Frame, Image, Load
from diffusionact.evaluation.reading import Reading
from diffusionact.evaluation.temporal import Flicker, IdentityDrift, Jitter
from diffusionact.image import resize_area

Embedding: TypeAlias = npt.NDArray[np.floating]
Row: TypeAlias = dict[str, Any]
LEAST_SSIM_PX = 11


@dataclass(frozen=True)
class Instruments:
    """What measures; None where it is not there, and then `absent` says why for each measure.

    read: BGR picture -> what its face shows, None where no face is found. lpips, perceptual:
    two BGR pictures of one size -> their distance. embed: BGR picture and its face -> embedding.
    described: what each of them is, for the head of a run.
    """

    read: Callable[[Image], Reading | None] | None = None
    lpips: Callable[[Image, Image], float] | None = None
    perceptual: Callable[[Image, Image], float] | None = None
    embed: Callable[[Image, Reading], Embedding] | None = None
    absent: Mapping[str, str] = field(default_factory=dict)
    described: Mapping[str, str] = field(default_factory=dict)


class ClipMeasure:
    """The measures of one clip, frame by frame in constant memory."""

    def __init__(self, instruments: Instruments, clip: Clip) -> None:
        self._with = instruments
        self._clip = clip
        self._source: Embedding | None = None
        self._source_known = False
        self.seen: tuple[Image | None, Image | None] = (None, None)  # last reference and result
        self.drift, self.drift_real = IdentityDrift(), IdentityDrift()
        self.flicker, self.jitter, self.jitter_real = Flicker(), Jitter(), Jitter()

    @property
    def running(self) -> Mapping[str, object]:
        """What the clip's measures remember, to be kept over an interruption."""
        names = ("drift", "drift_real", "flicker", "jitter", "jitter_real")
        return {name: getattr(self, name) for name in names}

    def frame(self, frame: Frame) -> Row:
        """Return the line of a frame: key, what is wrong with it, and its measures, None where
        one cannot be taken."""
        row: Row = {"clip": self._clip.name, "identity": self._clip.identity, "frame": frame.key}
        row |= {"damage": frame.unpaired, "resized": False, "no_face": None}
        row |= dict.fromkeys(FRAME_COLUMNS)
        reference, bad_reference = _loaded(frame.reference, "unreadable_reference")
        result, bad_result = _loaded(frame.result, "unreadable_result")
        self.seen = reference, result
        row["damage"] = row["damage"] or bad_result or bad_reference
        if row["damage"] or result is None:
            self._gap()
            return row
        if reference is not None and result.shape != reference.shape:
            row["resized"] = True
            result = resize_area(result, reference.shape[1], reference.shape[0])
        if reference is not None:
            row |= self._pictures(frame, reference, result)
        row |= self._faces(frame, reference, result)
        return {key: _plain(value) for key, value in row.items()}

    def end(self) -> Row:
        """Return the line of the clip as a whole."""
        row: Row = {"clip": self._clip.name, "identity": self._clip.identity, "end": True}
        if self._clip.unusable is not None:
            return row | {"unusable": self._clip.unusable}
        if not self._clip.follows:
            return row
        row |= {"tl_id": self.drift.tl_id, "tg_id": self.drift.tg_id}
        row["tl_id_ratio"] = _ratio(self.drift.tl_id, self.drift_real.tl_id)
        row["tg_id_ratio"] = _ratio(self.drift.tg_id, self.drift_real.tg_id)
        row |= {"flicker": self.flicker.value, "jitter": self.jitter.value}
        row["jitter_real"] = self.jitter_real.value
        return {key: _plain(value) for key, value in row.items()}

    def _pictures(self, frame: Frame, reference: Image, result: Image) -> Row:
        made: Row = {
            "psnr": min(metrics.psnr(reference, result), PSNR_CEILING_DB),
            "l1": metrics.l1(reference, result),
            "brightness": metrics.brightness_shift(reference, result),
        }
        if min(reference.shape[:2]) >= LEAST_SSIM_PX:
            made["ssim"] = metrics.ssim(reference, result)
        if frame.face is not None and frame.face.any():
            inside = metrics.psnr(reference[frame.face], result[frame.face])
            made["psnr_face"] = min(inside, PSNR_CEILING_DB)
        if self._with.lpips is not None:
            made["lpips"] = self._with.lpips(reference, result)
        if self._with.perceptual is not None:
            made["perceptual_rendered"] = self._with.perceptual(reference, result)
        self.flicker.add(reference, result)
        return made

    def _faces(self, frame: Frame, reference: Image | None, result: Image) -> Row:
        read = self._with.read
        seen = frame.found
        if seen is None and read is not None:
            seen = read(result)
        wanted = frame.truth
        if wanted is None and read is not None and reference is not None:
            wanted = read(reference)
        made: Row = {"no_face": None if read is None else seen is None}
        if read is not None and frame.truth is None and reference is not None:
            made["no_face_reference"] = wanted is None
        self._follow(self.jitter, seen)
        self._follow(self.jitter_real, wanted)
        if seen is not None and wanted is not None:
            made |= _face_errors(seen, wanted)
        return made | self._identities(reference, result, seen, wanted)

    def _identities(
        self, reference: Image | None, result: Image, seen: Reading | None, wanted: Reading | None
    ) -> Row:
        embed = self._with.embed
        if embed is None or self._with.read is None:
            return {}
        own = None if seen is None else embed(result, seen)
        real = None if wanted is None or reference is None else embed(reference, wanted)
        for drift, embedding in ((self.drift, own), (self.drift_real, real)):
            drift.gap() if embedding is None else drift.add(embedding)
        beside = real if self._clip.source is None else self._of_source(self._clip.source)
        if own is None or beside is None:
            return {}
        return {"csim": metrics.cosine_similarity(own, beside)}

    def _of_source(self, source: Load) -> Embedding | None:
        if not self._source_known and self._with.read and self._with.embed:
            self._source_known = True
            picture = source()
            face = self._with.read(picture)
            self._source = None if face is None else self._with.embed(picture, face)
        return self._source

    @staticmethod
    def _follow(jitter: Jitter, face: Reading | None) -> None:
        jitter.gap() if face is None else jitter.add(face.points)

    def _gap(self) -> None:
        for measure in (self.drift, self.drift_real, self.flicker, self.jitter, self.jitter_real):
            measure.gap()


def _face_errors(seen: Reading, wanted: Reading) -> Row:
    made: Row = {
        "nme": metrics.landmark_nme(seen.points, wanted.points),
        "gaze_px": metrics.gaze_error(seen.gaze, seen.points, wanted.gaze, wanted.points),
        "apd": metrics.pose_error(seen.pose, wanted.pose),
    }
    if seen.expression is not None and wanted.expression is not None:
        made["aed"] = metrics.expression_error(seen.expression, wanted.expression)
    return made


def _loaded(load: Load | None, name: str) -> tuple[Image | None, str | None]:
    if load is None:
        return None, None
    try:
        return load(), None
    except MediaError:
        return None, name


def _ratio(value: float, real: float) -> float:
    return value / real if real else math.nan


def _plain(value: Any) -> Any:
    """A value as JSON has it: what is not finite becomes None."""
    if isinstance(value, (bool, str)) or value is None:
        return value
    number = float(value)
    return number if math.isfinite(number) else None
