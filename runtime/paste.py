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
FloatArray: TypeAlias = npt.NDArray[np.floating]

FEATHER = 0.12  # of the crop's side, from nothing at its edge to full


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
        left, top = (max(math.floor(v), 0) for v in box.min(axis=0))
        right, bottom = (math.ceil(v) + 1 for v in box.max(axis=0))
        self._where = (slice(top, max(bottom, top)), slice(left, max(right, left)))
        self._portrait = portrait
        self._patch = np.ascontiguousarray(portrait[self._where])
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
        self._face = np.empty_like(self._patch)
        self._mask = _feathered(places, self._side)
        self._rest = 1.0 - self._mask
        if not self._empty:
            columns_px, rows_px = np.ascontiguousarray(places.transpose(2, 0, 1))
            self._map = cv2.convertMaps(columns_px, rows_px, cv2.CV_16SC2)
            own = warp_crop(portrait, matrix, side)
            if self._side != side:
                own = resize_area(own, self._side, self._side)
            self._rim = RimMatch(own)

    @property
    def where(self) -> tuple[slice, slice]:
        """The rows and columns of the portrait that may change."""
        return self._where

    def paste(self, crop: UInt8Array, out: UInt8Array | None = None) -> UInt8Array:
        """Return a portrait of its own, uint8 [H,W,3], with the crop in its place; written to `out`
        when given.

        crop: uint8 [side,side,3], in the portrait's colour order. Not for two threads at once.
        """
        frame = np.empty_like(self._portrait) if out is None else out
        np.copyto(frame, self._portrait)
        if self._empty:
            return frame
        if self._side != len(crop):
            crop = resize_area(crop, self._side, self._side)
        cv2.remap(
            self._rim.matched(crop),
            self._map[0],
            self._map[1],
            interpolation=cv2.INTER_LINEAR,
            dst=self._face,
            borderMode=cv2.BORDER_REPLICATE,
        )
        cv2.blendLinear(self._face, self._patch, self._mask, self._rest, dst=frame[self._where])
        return frame


def _feathered(places: Float32Array, side: int) -> Float32Array:
    """Return the weight of the crop at crop px `places` [h,w,2]: smooth from 0 at its edge to 1."""
    inside = np.minimum(places, side - 1 - places).min(axis=-1, initial=np.inf) + 0.5
    ramp = np.clip(inside / (FEATHER * side), 0.0, 1.0)
    return np.asarray(ramp * ramp * (3.0 - 2.0 * ramp), np.float32)
