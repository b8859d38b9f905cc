"""A driver's motion on a source's face: the source's shape with the driver's pose and expression.

What moves is measured from the driver's neutral face and added to the source's own (relative
motion), so that the source keeps its identity and its place in the picture.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from diffusionact.landmarks import Landmarks
from diffusionact.morphable import Morphable, angles, rendered_face, rotation
from diffusionact.runtime.expression import Expression, FreeExpression, ModelExpression
from diffusionact.runtime.headpose import FloatArray, Head, take_apart
from diffusionact.runtime.neutral import (
    CALM_LIVE,
    INNER_LIPS,
    LID_CORNERS,
    LID_PAIRS,
    calmest,
    calmest_of,
    lid_openings,
    lip_gap,
    mouth_width,
)
from diffusionact.runtime.smoothing import OneEuro

NECK_PIVOT = np.array([0.0, 1.0, 0.45])  # head units: where a head turns, top of the spine
STEP_NS = 40_000_000  # between frames whose times nobody gives
LONG_AGO_NS = -(1 << 62)
# Of a neutral face found live; no clock that hardly moves makes it gather more.
LIVE_NEUTRAL_NS, LEAST_HEADS, MOST_HEADS = 1_000_000_000, 5, 300
MOUTH_SCALE_RANGE = (0.6, 1.6)
LID_RATIO_RANGE = (0.0, 1.15)  # beyond the upper end eyes look startled
LIPS_APART = 0.08  # of the mouth's width: not a mouth at rest
LEAST_LID_OPENING = 0.12  # of its width, an eye that is open; less was a blink or a bad fit
USUAL_LID_OPENING = 0.28
LOWER_LID_SHARE = 0.07  # of a closing eye, what the lower lid does
IRIS_RANGE = (0.58, 0.34)  # half eye widths from the eye's middle, sideways and up or down
SHIFT_RANGE = 0.1  # head units that a head moves without turning
SOFT_FROM = 0.8  # of a limit, where it begins to be felt

# The parts of a motion vector; the expression follows.
TURN, SHIFT, LIDS, GAZE, EXPRESSION = (
    slice(0, 3), slice(3, 5), slice(5, 7), slice(7, 9), slice(9, None),
)  # fmt: skip
# One-Euro per part: cut-off at rest, Hz; its growth, Hz per unit (degree, head unit, ...) a second;
# and the speed that the tracker's noise feigns before a webcam, which is rest.
FILTERS = (
    (TURN, 0.8, 0.9, 2.0),
    (SHIFT, 0.7, 36.0, 0.045),
    (LIDS, 1.5, 9.0, 0.15),
    (GAZE, 1.2, 15.0, 0.05),
    (EXPRESSION, 1.2, 28.0, 0.1),
)


@dataclass(frozen=True)
class RetargetSettings:
    """absolute_pose: the driver's head pose as it is, not its change from neutral.
    expression: 'model' or 'free', see `runtime.expression`. smoothing: 1 the usual filter, 0 none.
    hold_s: how long the last motion of a lost face is held; ease_s: how long it then takes to
    come to rest; return_s: and to move again. pose_range_deg: yaw, pitch, roll of the training.
    """

    absolute_pose: bool = False
    expression: Literal["model", "free"] = "model"
    smoothing: float = 1.0
    hold_s: float = 0.6
    ease_s: float = 1.2
    return_s: float = 0.5
    pose_range_deg: tuple[float, float, float] = (45.0, 25.0, 25.0)


class Retargeter:
    """One session's way from driver landmarks to landmarks of the source."""

    def __init__(
        self,
        source: Landmarks,
        settings: RetargetSettings | None = None,
        face: Morphable | None = None,
    ) -> None:
        """source: the portrait's landmarks, crop px; face: whose mean and expressions are used."""
        self.settings = settings or RetargetSettings()
        face = face or rendered_face()
        self._mean = np.asarray(face.landmarks(face.template), np.float64)
        model = self.settings.expression == "model"
        self._source = take_apart(source, self._mean)
        self._expression: Expression = (
            ModelExpression(face, self._source.points) if model else FreeExpression()
        )
        at_rest = self._expression.without_expression(self._source.points)
        self._mouth_width = mouth_width(at_rest)
        self._angles_deg = np.asarray(angles(self._source.rotation), np.float64)
        self._limit_deg = np.maximum(
            self.settings.pose_range_deg, np.abs(self._angles_deg) / SOFT_FROM
        )
        self._rest = np.zeros(EXPRESSION.start + self._expression.size)
        self._rest[LIDS] = 1.0
        self._rest[GAZE] = iris_place(self._source)
        self._filter = _filter(len(self._rest), self.settings.smoothing)
        self._neutral: Head | None = None
        self._first_second: list[Head] | None = None
        self._second_begins_ns = 0
        self.reset()

    def reset(self, forget_neutral: bool = False) -> None:
        """Forget the motion so far, and the neutral face if asked: then it is guessed from each
        frame alone."""
        if forget_neutral:
            self._neutral = self._first_second = None
        self._filter.reset()
        self._shown = self._from = self._rest
        self._now_ns = -STEP_NS
        self._switched_ns, self._blend_s = LONG_AGO_NS, self.settings.return_s
        self._seen: bool | None = None  # None: before the first frame

    @property
    def calibrating(self) -> bool:
        """Whether the neutral face is still being looked for, and the source rests."""
        return self._first_second is not None

    def calibrate(self, driver: Iterable[Landmarks | None] | None = None) -> None:
        """Return nothing; the neutral face is found in a whole clip (say a Track), or, without
        one, in the first second of what comes, during which the source rests.

        Raises: NoFace when the clip has no face.
        """
        if driver is not None:
            self._neutral = self._closed(calmest(driver, self._mean))
            self._first_second = None
        else:
            self._neutral, self._first_second = None, []
        self.reset()

    def recalibrate(self) -> None:
        """Return nothing; the neutral face is found anew in the next second, while the source
        goes on from where it is, towards rest."""
        self._neutral, self._first_second = None, []

    def follow_on(self, other: Retargeter) -> None:
        """Return nothing; takes over what another source's session knows of the same driver."""
        self._neutral, self._first_second = other._neutral, other._first_second
        self._second_begins_ns = other._second_begins_ns
        self.reset()

    def target(self, driver: Landmarks | None, pts_ns: int | None = None) -> Landmarks:
        """Return the source's landmarks moved as the driver's, crop px.

        driver: px of its own picture, None where no face was seen, and points that are no face
        count as that; pts_ns: its time.
        """
        now_ns = self._now_ns + STEP_NS if pts_ns is None else pts_ns
        step_s = max(now_ns - self._now_ns, 1_000_000) / 1e9
        self._now_ns = now_ns
        motion = self._motion(driver) if driver is not None and driver.is_face else None
        self._shown = self._follow(motion, step_s)
        return self._posed(self._shown)

    def _follow(self, motion: FloatArray | None, step_s: float) -> FloatArray:
        """The motion to show: filtered, held and eased, so that nothing jumps."""
        seen = motion is not None
        if seen != self._seen:
            self._switch(seen)
        since_s = (self._now_ns - self._switched_ns) / 1e9
        if motion is None:
            share = (since_s - self.settings.hold_s) / self.settings.ease_s
            return _eased(self._from, self._rest, share)
        if self.settings.smoothing > 0.0:
            motion = self._filter(motion, step_s)
        return _eased(self._from, motion, since_s / self._blend_s)

    def _switch(self, seen: bool) -> None:
        """A face came or went: ease from what is shown now."""
        self._from = self._shown
        if seen:
            self._filter.reset()
            # After a short loss there is little to catch up with.
            lost_s = (self._now_ns - self._switched_ns) / 1e9
            self._blend_s = min(max(lost_s, 1e-3), self.settings.return_s)
        # A clip that begins with a face begins in motion: there is nothing to ease from.
        self._switched_ns = LONG_AGO_NS if self._seen is None else self._now_ns
        self._seen = seen

    def _motion(self, driver: Landmarks) -> FloatArray | None:
        """What the driver does; None while the neutral face is being looked for."""
        neutral = self._neutral
        head = take_apart(driver, self._mean if neutral is None else neutral.points)
        if self._first_second is not None:
            self._collect(head)
            return None
        if neutral is None:
            neutral = self._guessed_neutral(head)
        # Per axis, so that what the camera sees as nodding, turning or tilting stays just that.
        turned = angles(head.rotation) - angles(neutral.rotation)
        if self.settings.absolute_pose:
            turned = angles(head.rotation) - self._angles_deg
        mouth_scale = self._mouth_width / mouth_width(neutral.points)
        motion = np.empty_like(self._rest)
        motion[TURN] = turned
        shift = (head.at(NECK_PIVOT) - neutral.at(NECK_PIVOT))[:2] / neutral.scale
        motion[SHIFT] = soft_limit(shift, SHIFT_RANGE)
        usual = np.maximum(lid_openings(neutral.points), LEAST_LID_OPENING)
        motion[LIDS] = np.clip(lid_openings(head.points) / usual, *LID_RATIO_RANGE)
        gaze = iris_place(head)
        # How high an iris sits between its lids at rest is the eye's form, not its gaze.
        gaze[1] += self._rest[GAZE][1] - iris_place(neutral)[1]
        motion[GAZE] = soft_limit(gaze, IRIS_RANGE)
        motion[EXPRESSION] = self._expression.fit(
            head.points - neutral.points, float(np.clip(mouth_scale, *MOUTH_SCALE_RANGE))
        )
        return motion

    def _collect(self, head: Head) -> None:
        """Gather the first second, then take the middle of its calm frames as neutral."""
        heads = self._first_second or []
        if not heads:
            self._second_begins_ns = self._now_ns
        self._first_second = heads = [*heads, head]
        long_enough = self._now_ns - self._second_begins_ns >= LIVE_NEUTRAL_NS
        if len(heads) >= (LEAST_HEADS if long_enough else MOST_HEADS):
            self._neutral, self._first_second = self._closed(calmest_of(heads, CALM_LIVE)), None

    def _closed(self, neutral: Head) -> Head:
        """A neutral face; the expression taken out of one that smiled or talked all the time."""
        if lip_gap(neutral.points) <= LIPS_APART:
            return neutral
        return replace(neutral, points=self._expression.without_expression(neutral.points))

    def _guessed_neutral(self, head: Head) -> Head:
        """A neutral face for a driver of whom one frame is known: upright, and in its place."""
        points = self._expression.without_expression(head.points)
        for corners, pairs in zip(LID_CORNERS, LID_PAIRS, strict=True):
            width = np.linalg.norm(points[corners[1]] - points[corners[0]])
            for up, low in pairs:
                points[up] = points[low] - (0.0, USUAL_LID_OPENING * width, 0.0)
        middles = np.stack([points[list(corners)].mean(axis=0) for corners in LID_CORNERS])
        upright = Head(points, middles, head.scale, np.eye(3), np.zeros(3))
        return Head(
            points, middles, head.scale, np.eye(3), head.at(NECK_PIVOT) - upright.at(NECK_PIVOT)
        )

    def _posed(self, motion: FloatArray) -> Landmarks:
        """The source with a motion, crop px."""
        source = self._source
        points = source.points + self._expression.offsets(motion[EXPRESSION])
        for pairs, ratio in zip(LID_PAIRS, motion[LIDS], strict=True):
            for up, low in pairs:
                gap = source.points[up] - source.points[low]
                points[low] += LOWER_LID_SHARE * max(1.0 - ratio, 0.0) * gap
                points[up] = points[low] + ratio * gap
        gaze = source.gaze.copy()
        for iris, corners in zip(gaze, LID_CORNERS, strict=True):
            half_width = (source.points[corners[1], 0] - source.points[corners[0], 0]) / 2.0
            iris[:2] += half_width * (motion[GAZE] - self._rest[GAZE])
        turn = rotation(soft_limit(self._angles_deg + motion[TURN], self._limit_deg))
        shift = np.array([*motion[SHIFT], 0.0]) * source.scale
        place = source.at(NECK_PIVOT) - source.scale * turn @ NECK_PIVOT + shift
        return _uncrossed(Head(points, gaze, source.scale, turn, place))


def iris_place(head: Head) -> FloatArray:
    """Return where the eyes look, [2]: mean place of both irises from their eye's middle, in half
    eye widths, right and down."""
    places = []
    for iris, corners in zip(head.gaze, LID_CORNERS, strict=True):
        first, second = head.points[corners[0], :2], head.points[corners[1], :2]
        half_width = max(float(np.linalg.norm(second - first)) / 2.0, 1e-6)
        places.append((iris[:2] - (first + second) / 2.0) / half_width)
    return np.asarray(np.mean(places, axis=0))


def soft_limit(values: FloatArray, limit: FloatArray | float | tuple[float, ...]) -> FloatArray:
    """Return values brought within +-limit, unchanged up to `SOFT_FROM` of it, and smoothly."""
    bound = np.asarray(limit, np.float64)
    start, room = SOFT_FROM * bound, (1.0 - SOFT_FROM) * bound
    over = np.maximum(np.abs(values) - start, 0.0)
    return np.asarray(
        np.clip(values, -start, start) + np.sign(values) * room * np.tanh(over / room)
    )


def _uncrossed(head: Head) -> Landmarks:
    """The landmarks, px, with lips and lids that would cross in the picture brought together."""
    face = head.landmarks()
    down = head.rotation[:2, 1] / max(float(np.linalg.norm(head.rotation[:2, 1])), 1e-6)
    for up, low in (*INNER_LIPS, *LID_PAIRS[0], *LID_PAIRS[1]):
        gap = float((face.points[low, :2] - face.points[up, :2]) @ down)
        if gap < 0.0:
            face.points[up, :2] += down * gap / 2.0
            face.points[low, :2] -= down * gap / 2.0
    return face


def _eased(start: FloatArray, end: FloatArray, share: float) -> FloatArray:
    t = min(max(share, 0.0), 1.0)
    return start + t * t * (3.0 - 2.0 * t) * (end - start)


def _filter(size: int, strength: float) -> OneEuro:
    cutoff_hz, beta, quiet = np.empty((3, size))
    for part, at_rest, growth, noise in FILTERS:
        cutoff_hz[part], beta[part], quiet[part] = at_rest, growth, noise
    weaker = 1.0 / max(strength, 1e-3)
    return OneEuro(cutoff_hz * weaker, beta * weaker, quiet)
