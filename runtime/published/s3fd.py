"""Faces out of the detector's maps: decoding, non-maximum suppression, the choice."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TypeAlias

import numpy as np
import numpy.typing as npt

Float32Array: TypeAlias = npt.NDArray[np.float32]
FloatArray: TypeAlias = npt.NDArray[np.floating]

FIRST_STRIDE_PX = 4  # of the first head; each further one has twice the last's
PRIOR_STRIDES = 4  # side of a prior box, strides
CENTRE_VARIANCE, SIZE_VARIANCE = 0.1, 0.2
CANDIDATE, CERTAIN, OVERLAP = 0.05, 0.5, 0.3


def detect(heads: Iterable[tuple[Float32Array, Float32Array]]) -> Float32Array:
    """Return the faces, float32 [N,5]: left, top, right, bottom px and score, the surest first.

    heads: the finest first, of two logits [1,2,h,w] (no face, face) and four offsets [1,4,h,w].
    Source: S3FD; thresholds of DiffusionAct's copy.
    """
    found = candidates(heads)
    kept = found[suppress(found[:, :4], found[:, 4], OVERLAP)]
    return kept[kept[:, 4] > CERTAIN]


def candidates(heads: Iterable[tuple[Float32Array, Float32Array]]) -> Float32Array:
    """Return every box above the lower threshold, float32 [N,5], in the order of the maps."""
    found = [np.zeros((0, 5), np.float32)]
    for level, (logits, offsets) in enumerate(heads):
        stride = FIRST_STRIDE_PX << level
        background, face = logits[0].astype(np.float32)
        # softmax over two classes, without overflow
        score = np.exp(face - np.logaddexp(background, face))
        rows, columns = np.nonzero(score > CANDIDATE)
        centres = stride / 2 + stride * np.stack([columns, rows], axis=1)
        priors = np.concatenate([centres, np.full_like(centres, PRIOR_STRIDES * stride)], axis=1)
        boxes = decode(offsets[0, :, rows, columns], priors.astype(np.float32))
        found.append(np.concatenate([boxes, score[rows, columns, None]], axis=1))
    return np.concatenate(found).astype(np.float32)


def decode(offsets: FloatArray, priors: FloatArray) -> FloatArray:
    """Return boxes [N,4]: left, top, right, bottom px.

    offsets: [N,4], of centre and size; priors: [N,4], centre x, y and size, px.
    Source: S3FD, as SSD.
    """
    centres = priors[:, :2] + offsets[:, :2] * CENTRE_VARIANCE * priors[:, 2:]
    sizes = priors[:, 2:] * np.exp(offsets[:, 2:] * SIZE_VARIANCE)
    corners = centres - sizes / 2
    return np.concatenate([corners, corners + sizes], axis=1)


def suppress(boxes: FloatArray, scores: FloatArray, overlap: float) -> npt.NDArray[np.intp]:
    """Return the indices of boxes that no surer one covers, the surest first.

    boxes: [N,4], px, both corners inside (areas count one pixel more); overlap: intersection over
    union from which two boxes are one face. Source: Fast R-CNN, greedy suppression.
    """
    low, high = boxes[:, :2], boxes[:, 2:]
    areas = (high - low + 1).prod(axis=1)
    order = np.argsort(scores)[::-1]
    kept: list[int] = []
    while order.size:
        first, rest = order[0], order[1:]
        kept.append(int(first))
        shared = np.minimum(high[first], high[rest]) - np.maximum(low[first], low[rest]) + 1
        common = np.maximum(shared, 0.0).prod(axis=1)
        order = rest[common / (areas[first] + areas[rest] - common) <= overlap]
    return np.array(kept, np.intp)
