"""What is written on a live picture: the label that marks it, and the figures for its user."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from diffusionact.runtime.media import Image

LABEL = "AI-generated"
FONT = cv2.FONT_HERSHEY_SIMPLEX
LETTERS_PER_SIDE = 46.0  # of the picture's shorter side, in the label: small, and legible
SMALLEST_PX = 9.0
CAPITAL_PX = 22.0  # of this font at scale 1
SHADE = 0.45  # of what lies under the letters


def labelled(image_bgr: Image) -> Image:
    """Return the same picture, which now says in its lower right corner that it was generated."""
    _write(image_bgr, [LABEL], left=False, top=False)
    return image_bgr


def overlaid(image_bgr: Image, lines: Sequence[str]) -> Image:
    """Return a copy with lines of text in its upper left corner."""
    picture = image_bgr.copy()
    _write(picture, lines, left=True, top=True)
    return picture


def _write(image: Image, lines: Sequence[str], *, left: bool, top: bool) -> None:
    height, width = image.shape[:2]
    letter_px = max(min(height, width) / LETTERS_PER_SIDE, SMALLEST_PX)
    scale, stroke = letter_px / CAPITAL_PX, max(round(letter_px / 11.0), 1)
    pad, step = round(0.6 * letter_px), round(1.8 * letter_px)
    wide = max(cv2.getTextSize(line, FONT, scale, stroke)[0][0] for line in lines) + 2 * pad
    high = step * len(lines) + pad // 2
    x, y = 0 if left else max(width - wide, 0), 0 if top else max(height - high, 0)
    box = image[y : y + high, x : x + wide]
    np.copyto(box, cv2.convertScaleAbs(box, alpha=SHADE))
    for i, line in enumerate(lines):
        base = y + step * i + round(1.4 * letter_px)
        cv2.putText(
            image, line, (x + pad, base), FONT, scale, (255, 255, 255), stroke, cv2.LINE_AA
        )  # fmt: skip
