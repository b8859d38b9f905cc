"""Around the landmark network: the crop it sees, and the points in its heat maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from diffusionact.runtime.published.resample import resize_linear

Float32Array: TypeAlias = npt.NDArray[np.float32]
FloatArray: TypeAlias = npt.NDArray[np.floating]

UP = 0.12  # of the box's height, from its middle to the window's
BOX_PX = 195.0  # width plus height of a box of scale 1
WINDOW_PX = 200.0  # side of its window


@dataclass(frozen=True)
class Window:
    """A square of the picture: centre, px; scale: of a side of 200 px.

    Source: face-alignment (Bulat and Tzimiropoulos 2017).
    """

    centre: tuple[float, float]
    scale: float

    @classmethod
    def of_box(cls, box: FloatArray) -> Window:
        """Return the window of a face box, [>=4]: left, top, right, bottom px."""
        left, top, right, bottom = (float(value) for value in box[:4])
        width, height = right - left, bottom - top
        centre = (right - width / 2.0, bottom - height / 2.0 - UP * height)
        return cls(centre, (width + height) / BOX_PX)

    def to_picture(self, points: FloatArray, resolution: int) -> Float32Array:
        """Return points [...,2] of a map of resolution x resolution over the window, picture px.

        In float32, as the authors invert a matrix of this type: where a coordinate comes out just
        below a whole number decides what is cut off.
        """
        zoom = np.float32(resolution / (WINDOW_PX * self.scale))
        back = np.float32(1.0) / zoom
        sides = [np.float32(np.float32(c) / (WINDOW_PX * self.scale)) for c in self.centre]
        shift = np.array([np.float32(resolution * (0.5 - side)) for side in sides], np.float32)
        return np.asarray(points, np.float32) * back - shift * back


def crop(image: npt.NDArray[Any], window: Window, side: int, antialias: bool) -> Float32Array:
    """Return what the network sees, float32 [1,3,side,side]: black beyond the picture.

    image: [H,W,3], in the range that the network sees or any other; antialias: average where it shrinks, as torchvision since 0.17; the
    authors' 0.8 does not.
    """
    ends = window.to_picture(np.array([[1.0, 1.0], [side, side]]), side)
    first, last = np.trunc(ends).astype(int)
    last = np.maximum(last, first + 1)
    patch = np.zeros((last[1] - first[1], last[0] - first[0], 3), np.float32)
    height, width = image.shape[:2]
    low, high = np.clip(first, 0, (width, height)), np.clip(last, 0, (width, height))
    x, y = low - first, high - first
    patch[x[1] : y[1], x[0] : y[0]] = image[low[1] : high[1], low[0] : high[0]]
    seen = resize_linear(patch, side, antialias)
    return np.ascontiguousarray(seen.transpose(2, 0, 1))[None]


def peaks(heatmaps: Float32Array) -> Float32Array:
    """Return the points of the maps, float32 [N,K,2], map px.

    heatmaps: float32 [N,K,R,R]. A quarter of a pixel towards the higher neighbour; (0.5, 0.5) is
    the first pixel. Source: face-alignment, stacked hourglass decoding.
    """
    batch, count, resolution = heatmaps.shape[:3]
    flat = heatmaps.reshape(batch, count, -1)
    y, x = np.divmod(flat.argmax(axis=2), resolution)
    inner = (x > 0) & (x < resolution - 1) & (y > 0) & (y < resolution - 1)
    xi, yi = np.where(inner, x, 1), np.where(inner, y, 1)
    n, k = np.arange(batch)[:, None], np.arange(count)[None]
    dx = heatmaps[n, k, yi, xi + 1] - heatmaps[n, k, yi, xi - 1]
    dy = heatmaps[n, k, yi + 1, xi] - heatmaps[n, k, yi - 1, xi]
    towards = np.stack([np.sign(dx), np.sign(dy)], axis=-1) * inner[..., None]
    return np.asarray(np.stack([x, y], axis=-1) + 1.0 + 0.25 * towards - 0.5, np.float32)


def landmarks(heatmaps: Float32Array, window: Window, whole: bool) -> Float32Array:
    """Return the landmarks, float32 [68,2], picture px.

    heatmaps: float32 [1,68,R,R]; whole: cut off fractions, as the authors do.
    """
    points = window.to_picture(peaks(heatmaps)[0], heatmaps.shape[-1])
    return np.trunc(points) if whole else points
