"""Triangles to pixels: a z-buffer compiled by numba, and the paint of each material.

The picture is drawn in two passes. `rasterize` leaves, per pixel, the nearest surface's material
and its interpolated attributes; `shade` turns those into colour. Occlusion is therefore exact at
every pose: no part is drawn over another by order.
"""

from __future__ import annotations

import math
from typing import Any, NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float32]

# Materials 0 to 6 are those of training.face_shape.
HAIR, NECK, CLOTHES, FRAMES, EAR = 7, 8, 9, 10, 11
EMPTY = 255
ATTRIBUTES = 10  # normal 3, template position 3, uv 2, place in the eye 2


class Look(NamedTuple):
    """What the materials are painted with. Colours: float32 [3], linear RGB in 0..1."""

    skin: Floats
    blush: Floats
    lips: Floats
    iris: Floats
    hair: Floats
    brow: Floats
    clothes: Floats
    trim: Floats
    frames: Floats
    light_colour: Floats
    light: Floats  # [3], towards the light, picture axes
    sky: Floats
    ground: Floats
    beard: float  # 0..1
    freckles: float
    lipstick: float
    lines: float  # 0..1, creases of age
    gloss: float
    neckline: float  # depth of the collar, head units
    stripes: float  # 0 plain, else stripes a unit
    iris_a: Floats  # [2], place of the iris in either eye, head units
    iris_b: Floats
    hairline: float  # y of the hair's edge at the forehead, for its shadow
    seed: float


@njit(cache=True, fastmath=True)
def vertex_normals(points: Any, triangles: Any) -> Any:
    """Unit normals towards the viewer's side of each surface, float32 [V, 3]."""
    normals = np.zeros(points.shape, np.float32)
    for t in range(len(triangles)):
        i, j, k = triangles[t]
        ax, ay, az = (
            points[j, 0] - points[i, 0], points[j, 1] - points[i, 1], points[j, 2] - points[i, 2],
        )  # fmt: skip
        bx, by, bz = (
            points[k, 0] - points[i, 0], points[k, 1] - points[i, 1], points[k, 2] - points[i, 2],
        )  # fmt: skip
        nx, ny, nz = ay * bz - az * by, az * bx - ax * bz, ax * by - ay * bx
        for v in (i, j, k):
            normals[v, 0] += nx
            normals[v, 1] += ny
            normals[v, 2] += nz
    for v in range(len(normals)):
        length = np.sqrt(normals[v, 0] ** 2 + normals[v, 1] ** 2 + normals[v, 2] ** 2) + 1e-12
        for c in range(3):
            normals[v, c] /= length
    return normals


@njit(cache=True, fastmath=True)
def rasterize(
    points: Any, triangles: Any, attributes: Any, material: Any, side: Any, pixels: Any, kind: Any
) -> None:
    """Fill pixels [H, W, ATTRIBUTES] and kind uint8 [H, W, 2] (material, side + 1).

    points: float32 [V, 3] in pixels, depth growing away from the viewer.
    """
    height, width = kind.shape[:2]
    depth = np.full((height, width), np.float32(1e9))
    for t in range(len(triangles)):
        i, j, k = triangles[t]
        x0, y0, x1, y1, x2, y2 = (
            points[i, 0], points[i, 1], points[j, 0], points[j, 1], points[k, 0], points[k, 1],
        )  # fmt: skip
        area = (x1 - x0) * (y2 - y0) - (x2 - x0) * (y1 - y0)
        if abs(area) < 1e-6:
            continue
        left = max(int(np.ceil(min(x0, x1, x2) - 0.5)), 0)
        right = min(int(np.floor(max(x0, x1, x2) - 0.5)), width - 1)
        top = max(int(np.ceil(min(y0, y1, y2) - 0.5)), 0)
        bottom = min(int(np.floor(max(y0, y1, y2) - 0.5)), height - 1)
        for y in range(top, bottom + 1):
            for x in range(left, right + 1):
                px, py = x + 0.5, y + 0.5
                wj = ((px - x0) * (y2 - y0) - (x2 - x0) * (py - y0)) / area
                wk = ((x1 - x0) * (py - y0) - (px - x0) * (y1 - y0)) / area
                wi = 1 - wj - wk
                if wi < -1e-4 or wj < -1e-4 or wk < -1e-4:
                    continue
                z = wi * points[i, 2] + wj * points[j, 2] + wk * points[k, 2]
                if z >= depth[y, x]:
                    continue
                depth[y, x] = z
                kind[y, x, 0] = material[i]
                kind[y, x, 1] = side[i] + 1
                for c in range(attributes.shape[1]):
                    pixels[y, x, c] = (
                        wi * attributes[i, c] + wj * attributes[j, c] + wk * attributes[k, c]
                    )


@njit(cache=True, fastmath=True)
def _hash(x: float, y: float) -> float:
    h = np.uint32(np.int32(x)) * np.uint32(0x9E3779B1)
    h ^= np.uint32(np.int32(y)) * np.uint32(0x85EBCA77)
    h = np.uint32((h ^ (h >> np.uint32(15))) * np.uint32(0x2C1B3C6D))
    h = np.uint32((h ^ (h >> np.uint32(12))) * np.uint32(0x297A2D39))
    share: float = (h >> np.uint32(8)) / 16777216.0
    return share


@njit(cache=True, fastmath=True)
def _noise(x: float, y: float) -> float:
    """Smooth value noise in 0..1."""
    i, j = np.floor(x), np.floor(y)
    u, v = x - i, y - j
    u, v = u * u * (3 - 2 * u), v * v * (3 - 2 * v)
    low = _hash(i, j) * (1 - u) + _hash(i + 1, j) * u
    high = _hash(i, j + 1) * (1 - u) + _hash(i + 1, j + 1) * u
    noise: float = low * (1 - v) + high * v
    return noise


@njit(cache=True, fastmath=True)
def _ramp(v: float, low: float, high: float) -> float:
    t = min(max((v - low) / (high - low), 0.0), 1.0)
    return t * t * (3 - 2 * t)


@njit(cache=True, fastmath=True)
def _bump(x: float, y: float, cx: float, cy: float, sx: float, sy: float) -> float:
    return math.exp(-(((x - cx) / sx) ** 2) - ((y - cy) / sy) ** 2)


@njit(cache=True, fastmath=True)
def _skin_paint(a: Any, look: Look, colour: Any) -> float:
    """Colour of the skin at template position a[3:6]; returns its gloss."""
    x, y, z = a[3], a[4], a[5]
    ax = abs(x)
    front = _ramp(-z, 0.1, 0.5)
    red = 0.75 * _bump(ax, y, 0.56, 0.45, 0.24, 0.2) + 0.55 * _bump(ax, y, 0, 0.5, 0.17, 0.14)
    spots = look.freckles * front * _bump(ax, y, 0.3, 0.36, 0.42, 0.22)
    spots *= 1.0 if _noise(x * 34 + look.seed, y * 34) > 0.72 else 0.0
    shade = 1.0 - front * (
        0.30 * _bump(ax, y, 0.36, -0.06, 0.25, 0.17)
        + 0.62 * min(1.3 * _bump(ax, y, 0.085, 0.605, 0.05, 0.022), 1.0)
        + 0.22 * _bump(ax, y, 0.215, 0.56, 0.03, 0.075)
        + 0.22 * _bump(ax, y, 0, 1.085, 0.2, 0.04)
        + 0.12 * _bump(ax, y, 0, 0.72, 0.035, 0.07)
        + 0.2 * _bump(ax, y, 0.37, 0.91, 0.035, 0.04)
        + look.lines * 0.3 * np.exp(-(((ax - 0.24 - 0.38 * (y - 0.58)) / 0.028) ** 2))
        * _bump(0, y, 0, 0.76, 1, 0.17)
        + look.lines * 0.18 * _bump(ax, y, 0.41, 0.2, 0.2, 0.03)
        + look.lines * 0.13 * _ramp(-y, 0.4, 0.5) * (0.5 + 0.5 * np.cos(y * 46))
        * _ramp(y, -0.85, -0.7)
    )  # fmt: skip
    shade *= 1 - 0.35 * (1 - _ramp(y - look.hairline, 0.0, 0.22)) * front
    for c in range(3):
        colour[c] = look.skin[c] * (1 - 0.55 * red) + look.blush[c] * 0.55 * red
        colour[c] *= shade * (1 - 0.4 * spots)
    jaw = 0.58 + 0.75 * max(0.0, 0.62 - ax)
    chin = _ramp(y, jaw, jaw + 0.2) * _ramp(-z, -0.1, 0.12)
    below = max(_ramp(y, 0.62, 0.68) * _ramp(ax, 0.46, 0.28), chin)
    below *= 1 - 0.8 * _bump(ax, y, 0.0, 1.06, 0.15, 0.05)
    cover = look.beard * below * (0.72 + 0.28 * _noise(x * 60, y * 25 + look.seed))
    for c in range(3):
        colour[c] = (
            colour[c] * (1 - cover) + look.brow[c] * (0.7 + 0.5 * _noise(x * 45, y * 18)) * cover
        )
    return look.gloss * (1 - cover) * (0.5 + 0.8 * _bump(ax, y, 0, 0.4, 0.15, 0.25))


@njit(cache=True, fastmath=True)
def _eye_paint(a: Any, side: int, look: Look, colour: Any) -> float:
    """Colour of the eyeball: white, limbus, iris, pupil, and the highlight of a window."""
    centre = look.iris_a if side < 0 else look.iris_b
    dx, dy = a[8] - centre[0], a[9] - centre[1]
    r = np.sqrt(dx * dx + dy * dy)
    lidded = 0.62 + 0.38 * _ramp(a[7], 0.0, 0.35)
    corner = 1 - 0.25 * a[6] ** 4
    for c in range(3):
        white = (0.86 - 0.05 * c * abs(a[6])) * corner
        angle = 0.85 + 0.3 * _noise(np.arctan2(dy, dx) * 5 + 9, r * 40)
        tint = look.iris[c] * angle * (0.55 + 0.9 * _ramp(r, 0.03, 0.1) + 0.5 * _ramp(dy, 0.0, 0.1))
        tint *= 1 - 0.75 * _ramp(r, 0.088, 0.108)
        pupil = 1 - _ramp(r, 0.040, 0.050)
        inside = 1 - _ramp(r, 0.106, 0.118)
        value = tint * (1 - pupil) + 0.008 * pupil
        colour[c] = (white * (1 - inside) + value * inside) * lidded
    hx, hy = dx - 0.04 * np.sign(look.light[0] + 1e-6), dy + 0.045
    glint = 1 - _ramp(np.sqrt(hx * hx + hy * hy), 0.02, 0.032)
    for c in range(3):
        colour[c] = colour[c] * (1 - glint) + 1.3 * glint
    return 0.25


@njit(cache=True, fastmath=True)
def _mouth_paint(a: Any, look: Look, colour: Any, opening: float) -> None:
    """Colour inside the mouth; a[6], a[7]: along and down, opening: its height in head units."""
    u, down = a[6], a[7] * opening
    up = (1 - a[7]) * opening
    arch = 1 - 0.45 * u * u
    teeth = (1 - _ramp(down, 0.095 * arch, 0.108 * arch)) * (1 - _ramp(abs(u), 0.80, 0.92))
    low = 0.85 * (1 - _ramp(up, 0.045 * arch, 0.06 * arch)) * (1 - _ramp(abs(u), 0.6, 0.75))
    low *= _ramp(opening, 0.2, 0.34)
    gaps = 1 - 0.2 * (1 - _ramp(abs((u * 5.5) - np.round(u * 5.5)), 0.02, 0.1))
    tongue = _bump(u, up, 0.0, 0.09, 0.55, 0.085) * _ramp(opening, 0.08, 0.3)
    for c in range(3):
        dark = (0.075, 0.012, 0.014)[c] * (0.6 + 0.4 * _ramp(up, 0.4, 0.0))
        pink = (0.5, 0.12, 0.12)[c]
        value = dark * (1 - tongue) + pink * tongue
        enamel = (0.86, 0.83, 0.76)[c] * gaps * (0.6 + 0.4 * (1 - abs(u)))
        value = value * (1 - low) + 0.8 * enamel * low
        colour[c] = value * (1 - teeth) + enamel * teeth


@njit(cache=True, fastmath=True)
def _hair_paint(a: Any, look: Look, colour: Any) -> float:
    strand = 0.55 * _noise(a[6] * 26 + look.seed, a[7] * 2.2) + 0.45 * _noise(
        a[6] * 60 + look.seed, a[7] * 4
    )
    band = np.exp(-(((a[4] + 0.85 + 0.1 * strand) / 0.2) ** 2))
    for c in range(3):
        colour[c] = look.hair[c] * (0.45 + 0.95 * strand) + 0.10 * band * strand * (
            0.35 + look.hair[c]
        )
    return 0.16 + 0.2 * strand


@njit(cache=True, fastmath=True)
def _cloth_paint(a: Any, look: Look, colour: Any) -> None:
    stripe = 0.0
    if look.stripes > 0:
        stripe = 1.0 if np.sin(a[4] * look.stripes) > 0.25 else 0.0
    weave = 0.93 + 0.07 * _noise(a[3] * 40, a[4] * 40)
    folds = 0.9 + 0.1 * np.sin(a[3] * 7 + 2 * a[4] + look.seed)
    for c in range(3):
        colour[c] = (look.clothes[c] * (1 - stripe) + look.trim[c] * stripe) * weave * folds


@njit(cache=True, fastmath=True)
def _paint(a: Any, material: int, side: int, look: Look, opening: float, colour: Any) -> float:
    """Fill colour for one pixel and return its gloss."""
    if material == 0 or material == 2 or material == 11:
        gloss = _skin_paint(a, look, colour)
        if material == 2:
            edge = _ramp(a[7], 0.0, 0.12) * (1 - 0.6 * _ramp(a[7], 0.12, 0.5))
            for c in range(3):
                colour[c] = look.skin[c] * (1.02 - 0.28 * (1 - edge) - 0.2 * a[7])
        return gloss
    if material == 1:
        return _eye_paint(a, side, look, colour)
    if material == 3:
        for c in range(3):
            colour[c] = 0.012 + 0.12 * look.brow[c]
        return 0.0
    if material == 4:
        hairs = 0.6 + 0.7 * _noise(a[6] * 22 + a[7] * 4, a[7] * 3)
        for c in range(3):
            colour[c] = look.brow[c] * hairs
        return 0.02
    if material == 5:
        seam = min(abs(a[7] - 1.0), 1.0)
        pad = 0.75 + 0.25 * _ramp(seam, 0.0, 0.25)
        rim = _ramp(min(a[7], 2 - a[7]), 0.0, 0.16) * 0.6 + 0.4
        for c in range(3):
            colour[c] = (look.lips[c] * rim + look.skin[c] * 0.85 * (1 - rim)) * pad
        return 0.12 + 0.35 * look.lipstick
    if material == 6:
        _mouth_paint(a, look, colour, opening)
        return 0.08
    if material == 7:
        return _hair_paint(a, look, colour)
    if material == 8:
        for c in range(3):
            colour[c] = look.skin[c] * (0.55 + 0.45 * _ramp(a[4], 1.2, 1.75))
        return 0.05
    if material == 9:
        _cloth_paint(a, look, colour)
        return 0.02
    for c in range(3):
        colour[c] = look.frames[c]
    return 0.6


@njit(cache=True, fastmath=True)
def shade(pixels: Any, kind: Any, look: Look, opening: float, out: Any) -> None:
    """Paint and light every covered pixel of out, float32 [H, W, 3], linear RGB."""
    height, width = kind.shape[:2]
    colour = np.zeros(3, np.float32)
    light = look.light
    half = np.array([light[0], light[1], light[2] - 1.0])
    half /= np.sqrt((half**2).sum())
    for y in range(height):
        for x in range(width):
            material = kind[y, x, 0]
            if material == 255:
                continue
            a = pixels[y, x]
            length = np.sqrt(a[0] ** 2 + a[1] ** 2 + a[2] ** 2) + 1e-9
            if a[2] > 0:  # the inside of hair and clothes, seen from the front
                length = -length
            nx, ny, nz = a[0] / length, a[1] / length, a[2] / length
            gloss = _paint(a, material, int(kind[y, x, 1]) - 1, look, opening, colour)
            facing = nx * light[0] + ny * light[1] + nz * light[2]
            wrap = 0.32 if material in (0, 2, 5, 8, 11) else 0.12
            if material == 1 or material == 6:  # moist and set back: little shape of their own
                facing = 0.5 + 0.5 * facing
            diffuse = max((facing + wrap) / (1 + wrap), 0.0)
            up = 0.5 - 0.5 * ny
            edge = (1 + nz) ** 3
            spark = max(nx * half[0] + ny * half[1] + nz * half[2], 0.0) ** 22 * gloss
            for c in range(3):
                warm = diffuse
                if c == 0 and wrap > 0.3:  # light that comes back out of skin is red
                    warm = diffuse + 0.07 * (1 - abs(2 * min(diffuse, 1.0) - 1))
                ambient = look.sky[c] * up + look.ground[c] * (1 - up)
                value = colour[c] * (look.light_colour[c] * warm + ambient)
                value += look.light_colour[c] * spark * 0.5
                value += 0.10 * edge * look.sky[c] * (0.3 + colour[c])
                out[y, x, c] = value
