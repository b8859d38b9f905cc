"""What a head wears and stands on: hair, ears, glasses, neck and clothes, as grids of vertices."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from diffusionact.training.face_shape import EYE_X, grid_triangles, ramp, skull
from diffusionact.training.rasterizer import CLOTHES, EAR, FRAMES, HAIR, NECK

Points = NDArray[np.float64]


@dataclass(frozen=True)
class Accessory:
    """A mesh that goes with the head.

    points: float64 [V, 3], head units; uv: float64 [V, 2]; triangles: int32 [T, 3];
    follow: float64 [V], 1 turns with the head, 0 stays with the body; fixed: identity's fields
    do not move it.
    """

    points: Points
    uv: Points
    triangles: NDArray[np.int32]
    material: NDArray[np.int32]
    side: NDArray[np.int32]
    follow: Points
    fixed: bool

    def moved(self, displacement: Points) -> Accessory:
        """The same mesh displaced, float64 [V, 3]."""
        return replace(self, points=self.points + displacement)


def _mesh(
    grid: Points, material: int, *, wrap: bool = True, follow: Points | float = 1.0,
    fixed: bool = False, uv: Points | None = None,
) -> Accessory:  # fmt: skip
    rows, columns = grid.shape[:2]
    if uv is None:
        down, around = np.mgrid[0:rows, 0:columns]
        uv = np.stack([around / columns * 2 * np.pi, down / max(rows - 1, 1)], -1)
    count = rows * columns
    return Accessory(
        grid.reshape(-1, 3),
        uv.reshape(-1, 2).astype(float),
        grid_triangles(rows, columns, 0, wrap=wrap),
        np.full(count, material, np.int32),
        np.zeros(count, np.int32),
        np.broadcast_to(np.asarray(follow, float), (rows, columns)).reshape(-1).copy(),
        fixed,
    )


def accessories(
    style: str, hair_shape: NDArray[np.float32], glasses: int, neckline: float, seed: int
) -> tuple[Accessory, ...]:
    """All meshes beside the face for one identity; hair_shape: [4] in 0..1."""
    parts = [_ear(-1), _ear(1), _neck(), _clothes(neckline)]
    parts += _hair(style, hair_shape, np.random.default_rng(seed))
    if glasses:
        parts += _glasses(square=glasses == 2)
    return tuple(parts)


def _ellipsoid(centre: Points, radii: Points, rows: int = 12, columns: int = 20) -> Points:
    polar, around = np.meshgrid(
        np.linspace(0, np.pi, rows),
        np.linspace(0, 2 * np.pi, columns, endpoint=False),
        indexing="ij",
    )
    unit = np.stack(
        [np.sin(polar) * np.sin(around), -np.cos(polar), -np.sin(polar) * np.cos(around)], -1
    )
    return np.asarray(centre + unit * radii, np.float64)


def _ear(side: int) -> Accessory:
    grid = _ellipsoid(np.array([side * 0.99, 0.17, 0.12]), np.array([0.085, 0.25, 0.15]))
    lean = (grid[..., 1] - 0.17) * -0.16
    grid[..., 0] += side * (0.07 * np.clip(grid[..., 2] - 0.05, 0, 1) + lean * 0.3)
    return _mesh(grid, EAR)


def _neck() -> Accessory:
    y = np.linspace(0.7, 2.6, 14)[:, None]
    around = np.linspace(0, 2 * np.pi, 32, endpoint=False)[None]
    wide = 0.52 + 0.05 * ramp(y, 1.5, 2.3)
    grid = np.stack(
        np.broadcast_arrays(wide * np.sin(around), y, 0.38 - 0.95 * wide * np.cos(around)), -1
    )
    return _mesh(grid.copy(), NECK, follow=1 - ramp(y, 1.0, 1.9), fixed=True)


def _clothes(neckline: float) -> Accessory:
    around = np.linspace(0, 2 * np.pi, 48, endpoint=False)[None]
    rows = np.array([0.0, 0.04, 0.1, 0.2, 0.35, 0.6, 0.9, 1.3])[:, None]
    facing = np.clip(np.cos(around), 0, 1) ** 2
    top = 1.62 + 0.75 * neckline * facing
    y = top + rows * 1.15
    spread = ramp(rows, 0.02, 0.95)
    width = 0.585 + 1.45 * spread * (0.55 + 0.45 * np.abs(np.sin(around)))
    depth = 0.6 + 0.45 * spread
    grid = np.stack(
        np.broadcast_arrays(width * np.sin(around), y, 0.38 - depth * np.cos(around)), -1
    )
    return _mesh(grid.copy(), CLOTHES, follow=0.0, fixed=True)


_EDGES = {  # azimuth from the face in degrees -> y where the hair ends
    "cropped": [(0, -0.86), (35, -0.84), (52, -0.62), (66, -0.12), (78, 0.1), (95, 0.12),
                (120, 0.62), (180, 0.75)],
    "bob": [(0, -0.86), (35, -0.80), (50, -0.5), (60, 0.35), (70, 0.95), (90, 1.05), (180, 1.1)],
    "long": [(0, -0.86), (35, -0.80), (50, -0.5), (60, 0.6), (70, 1.7), (90, 2.0), (180, 2.1)],
}  # fmt: skip
_STYLES = {  # edge, thickness, crown, fringe
    "buzz": ("cropped", 0.035, 0.0, 0.0),
    "short": ("cropped", 0.12, 0.10, 0.0),
    "swept": ("cropped", 0.15, 0.20, 0.0),
    "fringe": ("cropped", 0.13, 0.08, 1.0),
    "bob": ("bob", 0.17, 0.06, 0.4),
    "long": ("long", 0.16, 0.06, 0.0),
    "bun": ("cropped", 0.07, 0.03, 0.0),
    "curly": ("cropped", 0.26, 0.16, 0.0),
    "afro": ("cropped", 0.50, 0.34, 0.0),
}


def _hair(style: str, form: NDArray[np.float32], rng: np.random.Generator) -> list[Accessory]:
    if style == "bald":
        return []
    edge, thickness, crown, fringe = _STYLES[style]
    line, volume, length, parting = (float(v) for v in form)
    columns, rows = 96, 30
    around = np.linspace(-np.pi, np.pi, columns, endpoint=False)
    degrees = np.abs(np.rad2deg(around))
    ends = np.interp(degrees, *np.array(_EDGES[edge], float).T)
    facing = ramp(60 - degrees, 0, 22)
    lowered = np.maximum(fringe - (0 if parting < 0.5 else 0.2), 0) * 0.36 * facing
    if style in ("swept", "bob", "long", "short"):  # a parting lifts one side of the forehead
        lean = 1 if parting > 0.5 else -1
        lowered = lowered + 0.20 * facing * ramp(lean * np.rad2deg(around), -12, 30)
    jag = np.interp(np.arange(columns), np.arange(0, columns, 2), rng.normal(0, 1, columns // 2))
    ends = ends - 0.12 * line * facing + lowered + jag * (0.012 + 0.02 * (fringe > 0))
    if edge != "cropped":
        ends = (
            ends + ramp(degrees, 55, 75) * (length - 0.5) * 0.7 + jag * 0.03 * ramp(degrees, 60, 75)
        )
    share = np.linspace(0, 1, rows)[:, None] ** 0.9
    y = -1.497 + share * (ends[None] + 1.497)
    base = skull(np.broadcast_to(around, y.shape), np.minimum(y, 0.12))
    out = base - np.array([0.0, -0.1, 0.12])
    out /= np.linalg.norm(out, axis=-1, keepdims=True) + 1e-9
    taper = 1 - 0.75 * ramp(share, 0.72, 1.0) * (1 if edge == "cropped" else facing)
    thick = thickness * (0.75 + 0.6 * volume) * taper * (0.55 + 0.45 * ramp(share, 0, 0.25))
    if style in ("curly", "afro"):
        bumps = np.sin(around * 11 + 3 * np.sin(y * 7)) * np.sin(y * 13 + 2 * np.sin(around * 5))
        thick = thick * (1 + 0.17 * bumps * ramp(share, 0.05, 0.2))
    grid = base + out * thick[..., None]
    grid[..., 1] = y + out[..., 1] * np.where(y < 0.12, thick, 0) * (y < 0.12)
    grid[..., 1] -= crown * (0.6 + 0.8 * volume) * (1 - ramp(share, 0.0, 0.55))
    hang = ramp(y, 0.1, 1.6)
    grid[..., 0] *= 1 + (0.06 + 0.1 * volume) * hang
    grid[..., 2] += 0.16 * hang * ramp(90 - degrees, 0, 30)
    body = ramp(y, 1.0, 2.0)
    parts = [_mesh(grid, HAIR, follow=1 - 0.75 * body)]
    if style == "bun":
        up = np.array([0.0, -1.62, 0.45]) if parting < 0.6 else np.array([0.0, -0.9, 1.35])
        size = 0.30 + 0.16 * volume
        parts.append(_mesh(_ellipsoid(up, np.array([size, size * 0.85, size])), HAIR))
    return parts


def _glasses(*, square: bool) -> list[Accessory]:
    parts = []
    n = 4.0 if square else 2.0
    around = np.linspace(0, 2 * np.pi, 36, endpoint=False)
    tube = np.linspace(0, 2 * np.pi, 6, endpoint=False)[:, None]

    def rim_point(angle: Points) -> tuple[Points, Points]:
        reach = (np.abs(np.cos(angle)) ** n + np.abs(np.sin(angle)) ** n) ** (-1 / n)
        return 0.31 * reach * np.cos(angle), 0.25 * reach * np.sin(angle)

    for side in (-1, 1):
        x, y = rim_point(around)
        grow = 1 + 0.085 * np.cos(tube)
        px = side * EYE_X + x * grow
        z = -1.16 + 0.22 * (px / 0.8) ** 2 + 0.03 * np.sin(tube)
        grid = np.stack(np.broadcast_arrays(px, 0.04 + y * grow, z), -1)
        parts.append(_mesh(np.concatenate([grid, grid[:1]]), FRAMES))
        arm = np.linspace(0, 1, 6)[None]
        ax = side * (EYE_X + 0.30 + 0.29 * arm)
        az = -1.03 + 1.1 * arm
        ring = 0.026 * np.stack([np.cos(tube), np.sin(tube)])
        grid = np.stack(np.broadcast_arrays(ax + ring[0], 0.0 + ring[1], az), -1)
        parts.append(_mesh(np.concatenate([grid, grid[:1]]), FRAMES, wrap=False))
    across = np.linspace(-0.11, 0.11, 7)[None]
    ring = 0.024 * np.stack([np.cos(tube), np.sin(tube)])
    arch = 0.0 - 0.045 * (1 - (across / 0.11) ** 2)
    grid = np.stack(np.broadcast_arrays(across, arch + ring[0], -1.17 + ring[1]), -1)
    parts.append(_mesh(np.concatenate([grid, grid[:1]]), FRAMES, wrap=False))
    return parts
