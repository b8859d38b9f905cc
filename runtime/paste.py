"""Puts the crop back into the portrait it was cut from."""

from __future__ import annotations

import math
from typing import TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

from diffusionact.image import resize_area, warp_crop
from diffusionact.landmarks import invert_affine
from diffusionact.runtime.rim import RimMatch

UInt8Array: TypeAlias = npt.NDArray[np.uint8]
Float32Array: TypeAlias = npt.NDArray[np.float32]
Float64Array: TypeAlias = npt.NDArray[np.float64]
FloatArray: TypeAlias = npt.NDArray[np.floating]
Where: TypeAlias = tuple[slice, slice]  # rows and columns

FEATHER = 0.12  # of the crop's side, from nothing at its edge to full
SAME_PX = 1e-2  # of the crop: too little to be seen


class Paster:
    """The way back of one crop, with map and mask made once.

    Only the bounding rectangle of the crop is touched; every other pixel of the portrait stays
    what it was.
    """

    def __init__(self, portrait: UInt8Array, matrix: FloatArray, side: int) -> None:
        """portrait: uint8 [H,W,3]; matrix: [2,3], portrait px -> crop px; side: of the crop, px."""
        height, width = portrait.shape[:2]
        corners = np.array([[-0.5, -0.5, 1], [side - 0.5, -0.5, 1]])
        corners = np.concatenate([corners, corners + (0, side, 0)])
        box = corners @ invert_affine(matrix).T
        left, top = (max(math.ceil(v), 0) for v in box.min(axis=0))
        right, bottom = (math.floor(v) + 1 for v in box.max(axis=0))
        self._where = (slice(top, max(bottom, top)), slice(left, max(right, left)))
        self._portrait = portrait
        self._patch = portrait[self._where]
        # A crop finer than the portrait is averaged down first, so that it does not alias.
        scale = math.hypot(matrix[0, 0], matrix[1, 0])
        self._side = max(round(side / scale), 1) if scale > 1.0 else side
        to_crop = np.array(matrix, np.float64)
        to_crop[:, 2] += to_crop[:, :2] @ (left, top)
        ratio = self._side / side
        to_crop *= ratio
        to_crop[:, 2] += (ratio - 1.0) / 2.0
        rows, columns = self._patch.shape[:2]
        grid = np.stack(np.meshgrid(np.arange(columns), np.arange(rows)), axis=-1)
        places = (grid @ to_crop[:, :2].T + to_crop[:, 2]).astype(np.float32)
        self._empty = self._patch.size == 0
        self._around = _around(self._where, portrait.shape[:2])
        mask = _feathered(places, self._side)
        places_of_both = _around(_full_box(mask), mask.shape)
        self._strips = [(at, mask[at].copy(), 1.0 - mask[at]) for at in places_of_both]
        if not self._empty:
            self._map = None
            if not _is_resize(places, self._side):
                columns_px, rows_px = np.ascontiguousarray(places.transpose(2, 0, 1))
                self._map = cv2.convertMaps(columns_px, rows_px, cv2.CV_16SC2)
            own = warp_crop(portrait, matrix, side)
            if self._side != side:
                own = resize_area(own, self._side, self._side)
            self._rim = RimMatch(own)

    @property
    def where(self) -> Where:
        """The rows and columns of the portrait that may change."""
        return self._where

    def paste(self, crop: UInt8Array, out: UInt8Array | None = None) -> UInt8Array:
        """Return a portrait of its own, uint8 [H,W,3], with the crop in its place; written to `out`
        when given.

        crop: uint8 [side,side,3], in the portrait's colour order. Not for two threads at once.
        """
        frame = np.empty_like(self._portrait) if out is None else out
        if self._empty:
            np.copyto(frame, self._portrait)
            return frame
        for at in self._around:
            np.copyto(frame[at], self._portrait[at])
        if self._side != len(crop):
            crop = resize_area(crop, self._side, self._side)
        face = frame[self._where]
        matched = self._rim.matched(crop)
        if self._map is None:
            cv2.resize(matched, face.shape[1::-1], dst=face, interpolation=cv2.INTER_LINEAR)
        else:
            cv2.remap(
                matched,
                self._map[0],
                self._map[1],
                interpolation=cv2.INTER_LINEAR,
                dst=face,
                borderMode=cv2.BORDER_REPLICATE,
            )
        for at, weight, rest in self._strips:  # in place: pixels do not look at each other
            cv2.blendLinear(face[at], self._patch[at], weight, rest, dst=face[at])
        return frame


def on_whole_pixels(matrix: Float64Array, side: int) -> Float64Array:
    """Return an upright crop moved, and made larger or smaller, by half a portrait pixel at most,
    so that its edges are those of pixels: its way back is then a resize, which takes a quarter of
    the time. One that is turned stays as it is.

    matrix: [2,3], portrait px -> crop px; side: of the crop, px.
    """
    if matrix[0, 1] != 0.0 or matrix[1, 0] != 0.0:
        return matrix
    size = max(round(side / matrix[0, 0]), 1)  # portrait px
    scale = side / size
    centre = ((side - 1) / 2.0 - matrix[:, 2]) / matrix[0, 0]
    first = np.rint(centre - (size - 1) / 2.0)  # its left and top pixel
    offset = scale * (0.5 - first) - 0.5
    return np.array([[scale, 0.0, offset[0]], [0.0, scale, offset[1]]])


def _is_resize(places: Float32Array, side: int) -> bool:
    """Whether crop px `places` [h,w,2] are those that a resize of the whole crop reads."""
    size = len(places)
    along = (np.arange(size) + 0.5) * (side / size) - 0.5
    resized = np.stack(np.meshgrid(along, along), axis=-1)
    return places.shape == resized.shape and bool(np.allclose(places, resized, atol=SAME_PX))


def _around(box: Where, shape: tuple[int, ...]) -> list[Where]:
    """Return the strips above, beside and below a box that together with it cover `shape`; those
    that are empty are left out."""
    rows, columns = box
    above, below = slice(0, rows.start), slice(rows.stop, shape[0])
    left, right = slice(0, columns.start), slice(columns.stop, shape[1])
    across = slice(0, shape[1])
    strips = ((above, across), (rows, left), (rows, right), (below, across))
    return [(r, c) for r, c in strips if r.start < r.stop and c.start < c.stop]


def _full_box(mask: Float32Array) -> Where:
    """Return the box around where the mask is 1, made smaller on all sides until it is nothing
    else; at worst an empty one."""
    full = mask == 1.0
    rows, columns = np.flatnonzero(full.any(axis=1)), np.flatnonzero(full.any(axis=0))
    if not len(rows):
        return slice(0, 0), slice(0, 0)
    top, bottom, left, right = rows[0], rows[-1] + 1, columns[0], columns[-1] + 1
    while top < bottom and left < right and not full[top:bottom, left:right].all():
        top, bottom, left, right = top + 1, bottom - 1, left + 1, right - 1
    return slice(top, max(top, bottom)), slice(left, max(left, right))


def _feathered(places: Float32Array, side: int) -> Float32Array:
    """Return the weight of the crop at crop px `places` [h,w,2]: smooth from 0 at its edge to 1."""
    inside = np.minimum(places, side - 1 - places).min(axis=-1, initial=np.inf) + 0.5
    ramp = np.clip(inside / (FEATHER * side), 0.0, 1.0)
    return np.asarray(ramp * ramp * (3.0 - 2.0 * ramp), np.float32)
