"""The dense shape of our rendered face: meshes, identity and expression fields, 68 landmarks.

Every part of the head is a small grid of vertices. The skin is lofted from a profile; eyes, lids,
brows and lips are strips between two curves drawn on it. Identity and expression act through
fields, functions of the template position, so that skin, hair and glasses move together; lids and
lips add displacements of their own. All of it is linear in the coefficients (Eq. 7).

Axes and unit are those of `diffusionact.morphable`: x right, y down, z away, half a head's width.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import numpy as np
from numpy.typing import NDArray

from diffusionact.morphable import Morphable

Points = NDArray[np.float64]

EYE_X, EYE_Y, EYE_HALF_WIDTH, EYE_HALF_HEIGHT = 0.41, 0.0, 0.225, 0.115
BROW_Y = -0.29
NOSE_TIP_Y, NOSE_BASE_Y = 0.50, 0.58
MOUTH_Y, MOUTH_HALF_WIDTH = 0.90, 0.33
CHIN_Y = 1.42
NECK_PIVOT = np.array([0.0, 1.0, 0.45])  # where the head turns: top of the spine

IDENTITY = (
    "width", "length", "jaw", "cheeks", "chin", "forehead", "nose_length", "nose_width",
    "nose_bridge", "eye_spacing", "eye_size", "eye_height", "eye_tilt", "brow_height", "brow_tilt",
    "mouth_width", "mouth_height", "lip_fullness",
)  # fmt: skip
EXPRESSION = (
    "jaw_open", "smile", "frown", "pucker", "stretch", "lip_raise", "lip_drop", "brows_up",
    "brows_inner_up", "brows_down", "blink_a", "blink_b", "squint",
)  # fmt: skip
# "a" is the eye on the picture's left (landmarks 36-41), "b" the other (42-47).

SKIN, SCLERA, LID, LASH, BROW, LIPS, MOUTH = range(7)  # materials of the parts below


@dataclass(frozen=True)
class Part:
    """One grid of vertices and what it is painted with.

    points: float64 [R, C, 3]; uv: float64 [R, C, 2]; own: expression name -> [R, C, 3].
    """

    material: int
    points: Points
    uv: Points
    own: dict[str, Points]
    side: int = 0  # eye "a" -1, eye "b" +1


@dataclass(frozen=True)
class FaceShape:
    """The dense model with what the renderer needs besides Eq. 7's arrays.

    triangles: int32 [T, 3]; material: int32 [V]; side: int32 [V]; uv: float64 [V, 2];
    iris: int [2], the vertices at the centres of the eye openings.
    """

    model: Morphable
    triangles: NDArray[np.int32]
    material: NDArray[np.int32]
    side: NDArray[np.int32]
    uv: Points
    iris: NDArray[np.int64]


def _curve(y: Points, knots: list[tuple[float, float]]) -> Points:
    """A smooth curve through knots (Catmull-Rom in the knots' own spacing)."""
    x, v = np.array(knots, float).T
    slope = np.gradient(v, x)
    i = np.clip(np.searchsorted(x, y) - 1, 0, len(x) - 2)
    h = x[i + 1] - x[i]
    t = np.clip((y - x[i]) / h, 0, 1)
    rise = v[i + 1] - v[i]
    a, b = slope[i] * h, slope[i + 1] * h
    return np.asarray(v[i] + t * (a + t * (3 * rise - 2 * a - b + t * (a + b - 2 * rise))))


def _bump(p: Points, x: float, y: float, sx: float, sy: float) -> Points:
    return np.asarray(np.exp(-(((p[..., 0] - x) / sx) ** 2) - ((p[..., 1] - y) / sy) ** 2))


def _pair(p: Points, x: float, y: float, sx: float, sy: float) -> Points:
    return _bump(p, x, y, sx, sy) + _bump(p, -x, y, sx, sy)


def ramp(v: Points, low: float, high: float) -> Points:
    t = np.clip((v - low) / (high - low), 0, 1)
    return np.asarray(t * t * (3 - 2 * t))


def section(y: Points) -> tuple[Points, Points, Points]:
    """Half-width, depth in front and depth behind of the bare skull at height y."""
    width = _curve(
        y, [(-1.5, 0.0), (-1.46, 0.27), (-1.36, 0.5), (-1.1, 0.78), (-0.75, 0.94), (-0.35, 1.0),
            (0.05, 1.0), (0.4, 0.965), (0.7, 0.91), (0.95, 0.81), (1.15, 0.66), (1.32, 0.47),
            (1.43, 0.29), (1.48, 0.12), (1.49, 0.0)],
    )  # fmt: skip
    front = _curve(
        y, [(-1.5, 0.0), (-1.46, 0.25), (-1.36, 0.47), (-1.1, 0.75), (-0.75, 0.92), (-0.35, 1.0),
            (0.0, 0.98), (0.4, 0.97), (0.9, 0.97), (1.2, 0.93), (1.36, 0.83), (1.44, 0.66),
            (1.48, 0.4), (1.49, 0.0)],
    )  # fmt: skip
    back = _curve(
        y, [(-1.5, 0.0), (-1.46, 0.3), (-1.36, 0.56), (-1.1, 0.88), (-0.75, 1.1), (-0.3, 1.22),
            (0.1, 1.18), (0.5, 1.0), (0.8, 0.78), (1.1, 0.42), (1.4, 0.1), (1.49, 0.0)],
    )  # fmt: skip
    return width, front, back


def skull(azimuth: Points, y: Points) -> Points:
    """Points of the bare skull: float64 [..., 3]; azimuth 0 is the face, in radians."""
    width, front, back = section(y)
    sin, cos = np.sin(azimuth), np.cos(azimuth)
    depth = np.where(cos > 0, front, back)
    n = 2.35
    flat = np.maximum(depth, 1e-6), np.maximum(width, 1e-6)
    reach = (np.abs(cos / flat[0]) ** n + np.abs(sin / flat[1]) ** n) ** (-1 / n)
    return np.stack([reach * sin, np.broadcast_to(y, reach.shape), -reach * cos], -1)


def relief(p: Points) -> Points:
    """How far the face stands out of the skull at (x, y): nose, brows, sockets, lips, chin."""
    x, y = np.abs(p[..., 0]), p[..., 1]
    ridge = 0.16 * ramp(y, -0.15, 0.15) + 0.27 * ramp(y, 0.08, NOSE_TIP_Y - 0.02)
    ridge *= 1 - ramp(y, NOSE_TIP_Y + 0.02, NOSE_BASE_Y + 0.06)
    spread = 0.105 + 0.075 * ramp(y, 0.15, 0.5)
    nose = ridge * np.exp(-((x / spread) ** 2))
    return np.asarray(
        nose
        + 0.115 * _pair(p, 0.145, 0.53, 0.075, 0.075)
        + 0.05 * _pair(p, 0.38, BROW_Y + 0.05, 0.3, 0.1)
        - 0.10 * _pair(p, EYE_X, EYE_Y + 0.02, 0.22, 0.15)
        + 0.07 * _pair(p, 0.52, 0.42, 0.22, 0.2)
        + 0.07 * _bump(p, 0, MOUTH_Y, 0.3, 0.16)
        + 0.09 * _bump(p, 0, 1.28, 0.22, 0.13)
        - 0.035 * _bump(p, 0, 1.09, 0.22, 0.06)
    )


def skin(azimuth: Points, y: Points) -> Points:
    """Points of the skin: the skull with the face's relief, float64 [..., 3]."""
    p = skull(azimuth, y)
    facing = ramp(np.cos(azimuth), 0.0, 0.45)
    p[..., 2] -= relief(p) * facing
    return p


def on_skin(x: Points, y: Points, lift: float | Points = 0.0) -> Points:
    """Points of the front of the skin at picture positions (x, y), lifted towards the viewer."""
    x, y = np.broadcast_arrays(np.asarray(x, float), np.asarray(y, float))
    low, high = np.zeros(x.shape), np.full(x.shape, np.pi / 2)
    for _ in range(30):
        middle = (low + high) / 2
        inside = skull(middle, y)[..., 0] < np.abs(x)
        low, high = np.where(inside, middle, low), np.where(inside, high, middle)
    p = skin(low * np.where(x < 0, -1.0, 1.0), y)
    return np.stack([x, y, p[..., 2] - lift], -1)


def _strip(upper: Points, lower: Points, rows: int) -> tuple[Points, Points]:
    """Grid between two curves [C, 3] and its (along in -1..1, down in 0..1) coordinates."""
    down = np.linspace(0, 1, rows)[:, None]
    along = np.linspace(-1, 1, len(upper))[None]
    grid = upper * (1 - down[..., None]) + lower * down[..., None]
    uv = np.stack(np.broadcast_arrays(along, down), -1).astype(float)
    return grid, uv


def _lid_curves(side: int, count: int) -> tuple[Points, Points]:
    """Upper and lower lid edge [count, 2] from the picture's left to its right."""
    u = np.linspace(-1, 1, count)
    arch = (1 - u**2) ** 0.75
    inner = -side * u  # +1 at the corner by the nose
    x = side * EYE_X + EYE_HALF_WIDTH * u
    tilt = 0.022 * inner
    upper = EYE_Y + tilt - EYE_HALF_HEIGHT * arch * (1 + 0.12 * inner)
    lower = EYE_Y + tilt + 0.78 * EYE_HALF_HEIGHT * arch * (1 - 0.1 * inner)
    return np.stack([x, upper], -1), np.stack([x, lower], -1)


def _eye_lift(xy: Points, side: int) -> Points:
    r2 = ((xy[..., 0] - side * EYE_X) / 0.3) ** 2 + ((xy[..., 1] - EYE_Y) / 0.26) ** 2
    return np.asarray(0.05 + 0.085 * np.sqrt(np.clip(1 - r2, 0, 1)))


def _on_eye(xy: Points, side: int, lift: float = 0.0) -> Points:
    return on_skin(xy[..., 0], xy[..., 1], _eye_lift(xy, side) + lift)


def _eye_parts(side: int) -> list[Part]:
    blink, letter = f"blink_{'a' if side < 0 else 'b'}", 15
    upper2, lower2 = _lid_curves(side, letter)
    upper, lower = _on_eye(upper2, side), _on_eye(lower2, side)
    fall, rise = 0.93 * (lower - upper), 0.07 * (upper - lower)
    white, uv = _strip(upper, lower, 7)
    down = uv[..., 1:]
    closing = fall * (1 - down) + rise * down
    squint = 0.2 * (lower - upper) * (1 - down) + 0.22 * (upper - lower) * down
    parts = [Part(SCLERA, white, uv, {blink: closing, "squint": squint}, side)]
    crease2 = (
        upper2
        + np.stack([0.02 * np.linspace(-1, 1, letter), -0.075 * np.ones(letter)], -1)
        * np.sqrt(np.clip(1 - np.linspace(-1, 1, letter) ** 2, 0, 1))[:, None]
    )
    crease = on_skin(crease2[:, 0], crease2[:, 1], 0.045)
    lid, uv = _strip(crease, upper + [0, 0, -0.012], 4)
    down = uv[..., 1:]
    parts.append(
        Part(LID, lid, uv, {blink: fall * down, "squint": 0.2 * (lower - upper) * down}, side)
    )
    u = np.linspace(-1, 1, letter)
    outer = 0.5 + 0.5 * side * u
    thick = 0.006 + 0.03 * np.sqrt(np.clip(1 - u**2, 0, 1)) * (0.6 + 0.5 * outer)
    line2 = upper2 - np.stack([-side * 0.03 * outer**6, thick], -1)
    line, uv = _strip(_on_eye(line2, side, 0.03), _on_eye(upper2, side, 0.03), 3)
    parts.append(
        Part(LASH, line, uv, {blink: np.broadcast_to(fall, line.shape),
                              "squint": np.broadcast_to(0.2 * (lower - upper), line.shape)}, side)
    )  # fmt: skip
    return parts


def _brow_curves(side: int, count: int) -> tuple[Points, Points]:
    t = np.linspace(0, 1, count)  # 0 by the nose
    x = side * (0.17 + 0.52 * t)
    middle = BROW_Y + 0.015 - 0.085 * np.sin(np.pi * np.clip(t * 0.92 + 0.05, 0, 1)) + 0.075 * t**3
    thick = 0.052 * np.sqrt(np.clip(1 - t, 0, 1)) * (0.55 + 0.45 * np.minimum(1, 6 * t)) + 0.006
    upper, lower = np.stack([x, middle - thick], -1), np.stack([x, middle + thick], -1)
    order = slice(None) if side > 0 else slice(None, None, -1)
    return upper[order], lower[order]


def _brow_part(side: int) -> Part:
    upper, lower = (on_skin(c[:, 0], c[:, 1], 0.022) for c in _brow_curves(side, 13))
    grid, uv = _strip(upper, lower, 4)
    return Part(BROW, grid, uv, {}, side)


def _lip_curves(count: int) -> tuple[Points, Points, Points, Points]:
    """Outer upper, inner upper, inner lower, outer lower edge [count, 2], left to right."""
    u = np.linspace(-1, 1, count)
    x = MOUTH_HALF_WIDTH * u
    bow = 0.105 * (1 - np.abs(u) ** 1.6) - 0.028 * np.exp(-((u / 0.16) ** 2))
    corner = 0.012 * u**2
    inner_x = 0.9 * x
    seam = MOUTH_Y + 0.012 * (1 - u**2) + corner * 0.8
    upper = np.stack([x, MOUTH_Y + corner - bow], -1)
    lower = np.stack([x, MOUTH_Y + corner + 0.135 * (1 - np.abs(u) ** 2.2) ** 0.9], -1)
    closed = np.stack([inner_x, seam], -1)
    return upper, closed, closed.copy(), lower


def _mouth_own(u: Points, upper: Points, lower: Points) -> dict[str, Points]:
    """What opens the lips. upper, lower: 0..1, how far a row belongs to either lip's edge."""
    arch = np.clip(1 - u**2, 0, 1) ** 0.55
    own = {name: np.zeros((*u.shape, 3)) for name in ("jaw_open", "lip_raise", "lip_drop", "smile",
                                                       "pucker")}  # fmt: skip
    # The fields move both lips alike; what follows is where the lips part from each other.
    own["jaw_open"][..., 1] = 0.42 * arch * lower - 0.03 * arch * upper
    own["jaw_open"][..., 2] = 0.06 * arch * lower
    own["lip_raise"][..., 1] = -0.075 * arch * upper
    own["lip_drop"][..., 1] = 0.09 * arch * lower
    own["smile"][..., 1] = 0.02 * arch * lower
    own["pucker"][..., 1] = 0.07 * arch * lower - 0.035 * arch * upper
    own["pucker"][..., 2] = -0.04 * (upper + lower)
    return own


def _mouth_parts() -> list[Part]:
    count = 21
    top, seam_up, seam_down, bottom = (on_skin(c[:, 0], c[:, 1], 0.02) for c in _lip_curves(count))
    mid_up = (top + seam_up) / 2 - [0, 0, 0.05]
    mid_down = (bottom + seam_down) / 2 - [0, 0, 0.065]
    parts = []
    for curves, edges in (
        ((top, mid_up, seam_up), "upper"),
        ((seam_down, mid_down, bottom), "lower"),
    ):
        halves = [_strip(curves[0], curves[1], 3)[0][:-1], _strip(curves[1], curves[2], 3)[0]]
        grid = np.concatenate(halves)
        rows = np.linspace(0, 1, len(grid))[:, None] * np.ones((1, count))
        u = np.linspace(-1, 1, count) * np.ones((len(grid), 1))
        one, zero = np.ones_like(u), np.zeros_like(u)
        pull = (0.6 + 0.4 * rows, zero) if edges == "upper" else (zero, one)
        uv = np.stack([u, rows if edges == "upper" else 1 + rows], -1)
        parts.append(Part(LIPS, grid, uv, _mouth_own(u, *pull)))
    inside, uv = _strip(seam_up + [0, 0, 0.012], seam_down + [0, 0, 0.012], 9)
    down = uv[..., 1]
    parts.append(Part(MOUTH, inside, uv, _mouth_own(uv[..., 0], 1 - down, down)))
    return parts


def _skin_part() -> Part:
    front = np.linspace(-1, 1, 63)
    azimuth = np.concatenate([1.75 * front, np.linspace(1.75, 2 * np.pi - 1.75, 19)[1:]])
    rows = np.concatenate(
        [[-1.5, -1.48, -1.44], np.linspace(-1.38, 1.38, 58), [1.42, 1.45, 1.475, 1.49]]
    )
    grid = skin(azimuth[None], rows[:, None])
    return Part(SKIN, grid, np.stack(np.broadcast_arrays(azimuth[None], rows[:, None]), -1), {})


Field = Callable[[Points], Points]


def _move(weight: Points, x: float | Points = 0.0, y: float | Points = 0.0,
          z: float | Points = 0.0) -> Points:  # fmt: skip
    return np.stack([weight * x, weight * y, weight * z], -1)


def identity_field(p: Points) -> Points:
    """Displacement of template points per identity coefficient: [I, ..., 3] (order IDENTITY)."""
    x, y = p[..., 0], p[..., 1]
    side = np.tanh(x / 0.15)
    front = ramp(-p[..., 2], -0.1, 0.5)
    eyes = _pair(p, EYE_X, EYE_Y, 0.3, 0.2) * front
    local_x = x - np.sign(x) * EYE_X
    brows = _pair(p, 0.42, BROW_Y, 0.4, 0.14) * front
    mouth = _bump(p, 0, MOUTH_Y, 0.5, 0.24) * front
    nose = _bump(p, 0, 0.42, 0.2, 0.26) * front
    fields = {
        "width": _move(x, 0.075),
        "length": _move(np.ones_like(x), y=0.085 * np.clip(y - 0.1, 0, None)),
        "jaw": _move(ramp(y, 0.45, 1.1) * (1 - 0.5 * ramp(y, 1.2, 1.5)), x=0.14 * x),
        "cheeks": _move(_pair(p, 0.62, 0.42, 0.3, 0.3) * front, x=0.075 * side, z=-0.04),
        "chin": _move(_bump(p, 0, 1.36, 0.35, 0.22), y=0.06, z=-0.09),
        "forehead": _move(ramp(-y, 0.4, 1.3), y=-0.10, z=-0.03),
        "nose_length": _move(nose, y=0.05, z=-0.1),
        "nose_width": _move(_bump(p, 0, 0.52, 0.26, 0.15) * front, x=0.32 * x),
        "nose_bridge": _move(_bump(p, 0, 0.14, 0.12, 0.17) * front, z=-0.065),
        "eye_spacing": _move(eyes + 0.5 * brows, x=0.035 * side),
        "eye_size": _move(eyes, x=0.12 * local_x, y=0.2 * (y - EYE_Y)),
        "eye_height": _move(eyes + 0.6 * brows, y=0.035),
        "eye_tilt": _move(eyes, y=-0.10 * local_x * np.sign(x)),
        "brow_height": _move(brows, y=-0.045),
        "brow_tilt": _move(brows, y=-0.12 * local_x * np.sign(x)),
        "mouth_width": _move(mouth, x=0.15 * x),
        "mouth_height": _move(mouth, y=0.045),
        "lip_fullness": _move(_bump(p, 0, MOUTH_Y, 0.45, 0.17) * front,
                              y=0.32 * (y - MOUTH_Y - 0.012),
                              z=-0.02),
    }  # fmt: skip
    return np.stack([fields[name] for name in IDENTITY])


def expression_field(p: Points) -> Points:
    """Displacement of template points per expression coefficient: [E, ..., 3]."""
    x, y = p[..., 0], p[..., 1]
    side = np.tanh(x / 0.12)
    front = ramp(-p[..., 2], -0.1, 0.5)
    jaw = ramp(y, MOUTH_Y + 0.03, MOUTH_Y + 0.42) * ramp(-p[..., 2], -0.25, 0.5)
    corners = _pair(p, MOUTH_HALF_WIDTH, MOUTH_Y, 0.17, 0.17) * front
    cheeks = _pair(p, 0.52, 0.5, 0.2, 0.2) * front
    mouth = _bump(p, 0, MOUTH_Y, 0.42, 0.22) * front
    brows = _pair(p, 0.42, BROW_Y, 0.42, 0.16) * front
    inner = _pair(p, 0.17, BROW_Y, 0.2, 0.16) * front
    lower_lid = _pair(p, EYE_X, 0.15, 0.25, 0.09) * front
    zero = np.zeros((*x.shape, 3))
    fields = {
        "jaw_open": _move(jaw, x=-0.05 * x, y=0.36, z=0.10)
        + _move(corners, x=-0.04 * side, y=0.06),
        "smile": _move(corners, x=0.13 * side, y=-0.14, z=0.03)
        + _move(cheeks, y=-0.07, z=-0.06)
        + _move(lower_lid, y=-0.025),
        "frown": _move(corners, x=0.01 * side, y=0.12),
        "pucker": _move(mouth, x=-0.42 * x, z=-0.08),
        "stretch": _move(mouth, x=0.22 * x, z=0.02) + _move(corners, y=0.03),
        "lip_raise": _move(_bump(p, 0, 0.72, 0.3, 0.12) * front, y=-0.03),
        "lip_drop": _move(_bump(p, 0, 1.06, 0.3, 0.12) * front, y=0.03),
        "brows_up": _move(brows, y=-0.13),
        "brows_inner_up": _move(inner, y=-0.11),
        "brows_down": _move(brows, y=0.045) + _move(inner, x=-0.04 * side, y=0.05),
        "blink_a": zero,
        "blink_b": zero,
        "squint": _move(cheeks, y=-0.03, z=-0.02),
    }
    return np.stack([fields[name] for name in EXPRESSION])


def _landmark_points() -> tuple[Points, dict[str, Points]]:
    """Template positions of the 68 landmarks [68, 3] and their own displacements."""
    angle = np.linspace(-1, 1, 17)
    jaw_y = 0.02 + (CHIN_Y - 0.02) * np.sin(np.pi / 2 * (1 - np.abs(angle))) ** 1.05
    points = [skin(np.sign(angle) * 1.5 * np.abs(angle) ** 0.8, jaw_y)]
    own = {name: [np.zeros((17, 3))] for name in EXPRESSION}

    def add(block: Points, moves: dict[str, Points] | None = None) -> None:
        points.append(block)
        for name in EXPRESSION:
            own[name].append((moves or {}).get(name, np.zeros_like(block)))

    for side in (-1, 1):
        upper, _ = _brow_curves(side, 5)
        add(on_skin(upper[:, 0], upper[:, 1] + 0.01, 0.022))
    add(on_skin(np.zeros(4), np.array([0.02, 0.18, 0.34, NOSE_TIP_Y])))
    add(on_skin(np.array([-0.16, -0.08, 0, 0.08, 0.16]), np.array([0.575, 0.6, 0.615, 0.6, 0.575])))
    for side in (-1, 1):
        upper2, lower2 = _lid_curves(side, 13)
        upper, lower = _on_eye(upper2, side), _on_eye(lower2, side)
        block = np.stack([upper[0], upper[4], upper[8], upper[12], lower[8], lower[4]])
        gap = np.stack([*(lower - upper)[[0, 4, 8, 12]], *(upper - lower)[[8, 4]]])
        close = np.array([0, 0.93, 0.93, 0, 0.07, 0.07])[:, None] * gap
        squint = np.array([0, 0.2, 0.2, 0, 0.22, 0.22])[:, None] * gap
        add(block, {f"blink_{'a' if side < 0 else 'b'}": close, "squint": squint})
    top, seam, _, bottom = (on_skin(c[:, 0], c[:, 1], 0.02) for c in _lip_curves(25))
    u = np.linspace(-1, 1, 25)
    outer = np.array([0, 4, 8, 12, 16, 20, 24])
    inner = np.array([0, 6, 12, 18, 24])
    zero, one = np.zeros(25), np.ones(25)
    up, seam_up = _mouth_own(u, 0.6 * one, zero), _mouth_own(u, one, zero)
    low = _mouth_own(u, zero, one)
    add(top[outer], {k: v[outer] for k, v in up.items()})
    add(bottom[outer[5:0:-1]], {k: v[outer[5:0:-1]] for k, v in low.items()})
    add(seam[inner], {k: v[inner] for k, v in seam_up.items()})
    add(seam[inner[3:0:-1]], {k: v[inner[3:0:-1]] for k, v in low.items()})
    return np.concatenate(points), {k: np.concatenate(v) for k, v in own.items()}


def grid_triangles(rows: int, columns: int, start: int, wrap: bool = False) -> NDArray[np.int32]:
    index = np.arange(rows * columns, dtype=np.int32).reshape(rows, columns) + start
    if wrap:
        index = np.concatenate([index, index[:, :1]], 1)
    a, b, c, d = index[:-1, :-1], index[:-1, 1:], index[1:, :-1], index[1:, 1:]
    return np.concatenate(
        [np.stack([a, b, c], -1).reshape(-1, 3), np.stack([b, d, c], -1).reshape(-1, 3)]
    )


@cache
def face_shape() -> FaceShape:
    """The dense rendered face, built once per process (about 0.1 s)."""
    parts = [_skin_part()]
    for side in (-1, 1):
        parts += [*_eye_parts(side), _brow_part(side)]
    parts += _mouth_parts()
    landmark_points, landmark_own = _landmark_points()
    eye_centres = np.stack([_on_eye(np.array([s * EYE_X, EYE_Y - 0.012]), s) for s in (-1, 1)])
    flat = [part.points.reshape(-1, 3) for part in parts] + [landmark_points, eye_centres]
    starts = np.cumsum([0] + [len(f) for f in flat])
    points = np.concatenate(flat)
    expression = expression_field(points)
    for part, start in zip(parts, starts, strict=False):
        for name, move in part.own.items():
            count = part.points.shape[0] * part.points.shape[1]
            expression[EXPRESSION.index(name), start : start + count] += move.reshape(-1, 3)
    first = int(starts[len(parts)])
    for name, move in landmark_own.items():
        expression[EXPRESSION.index(name), first : first + 68] += move
    model = Morphable(
        points,
        identity_field(points),
        expression,
        (first + np.arange(68))[:, None].repeat(3, 1),
        np.eye(3)[np.zeros(68, int)],
    )
    triangles = [
        grid_triangles(part.points.shape[0], part.points.shape[1], int(start))
        for part, start in zip(parts, starts, strict=False)
    ]

    def spread(values: list[int]) -> NDArray[np.int32]:
        lengths = [len(f) for f in flat[: len(parts)]]
        return np.concatenate([np.repeat(np.array(values), lengths), np.zeros(70, int)]).astype(
            np.int32
        )

    uv = np.concatenate([part.uv.reshape(-1, 2) for part in parts] + [np.zeros((70, 2))])
    return FaceShape(
        model,
        np.concatenate(triangles).astype(np.int32),
        spread([part.material for part in parts]),
        spread([part.side for part in parts]),
        uv,
        first + 68 + np.arange(2),
    )
