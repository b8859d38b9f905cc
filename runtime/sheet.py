"""Panels side by side and contact sheets: how a result is shown next to what made it."""

from __future__ import annotations

from collections.abc import Sequence

import cv2
import numpy as np

from diffusionact.runtime.media import Image

INK_BGR, PAPER_BGR = (222, 218, 214), (28, 25, 23)
MARGIN, CAPTION = 0.03, 0.085  # of a panel's side


def fit_square(image_bgr: Image, side: int) -> Image:
    """Return the middle square of a picture at a side, uint8 [side,side,3]."""
    height, width = image_bgr.shape[:2]
    edge = min(height, width)
    top, left = (height - edge) // 2, (width - edge) // 2
    square = image_bgr[top : top + edge, left : left + edge]
    method = cv2.INTER_AREA if edge > side else cv2.INTER_CUBIC
    return np.asarray(cv2.resize(square, (side, side), interpolation=method), np.uint8)


def panels(images_bgr: Sequence[Image], captions: Sequence[str], side: int) -> Image:
    """Return equal squares side by side with a caption under each, on dark paper; sides even."""
    margin, strip = round(MARGIN * side / 2) * 2, round(CAPTION * side / 2) * 2
    count = len(images_bgr)
    sheet = _paper(side + strip + margin, count * side + (count + 1) * margin)
    for i, (image, caption) in enumerate(zip(images_bgr, captions, strict=True)):
        left = margin + i * (side + margin)
        sheet[margin : margin + side, left : left + side] = fit_square(image, side)
        _write(sheet, caption, (left + side / 2, margin + side + strip * 0.45), strip * 0.5)
    return sheet


def contact_sheet(
    portrait_bgr: Image, rows: Sequence[Sequence[Image]], captions: Sequence[str], side: int
) -> Image:
    """Return the portrait and, to the right of it, rows of moments, one column a moment.

    rows: squares or pictures to be made square; captions: one a row.
    """
    gap, columns = max(round(MARGIN * side), 2), len(rows[0])
    strip = round(0.16 * side)
    tall = len(rows) * (side + strip) - strip
    sheet = _paper(tall + strip + 2 * gap, tall + (columns * side) + (columns + 2) * gap)
    sheet[gap : gap + tall, gap : gap + tall] = fit_square(portrait_bgr, tall)
    _write(sheet, "portrait", (gap + tall / 2, gap + tall + strip / 2), strip * 0.55)
    for j, (row, caption) in enumerate(zip(rows, captions, strict=True)):
        top = gap + j * (side + strip)
        for i, image in enumerate(row):
            left = 2 * gap + tall + i * (side + gap)
            sheet[top : top + side, left : left + side] = fit_square(image, side)
        middle = 2 * gap + tall + (columns * (side + gap) - gap) / 2
        _write(sheet, caption, (middle, top + side + strip / 2), strip * 0.55)
    return sheet


def _paper(height: int, width: int) -> Image:
    sheet = np.empty((height + height % 2, width + width % 2, 3), np.uint8)
    sheet[:] = PAPER_BGR
    return sheet


def _write(sheet: Image, text: str, centre: tuple[float, float], height_px: float) -> None:
    """Text with its middle at a point, in a font that every OpenCV build carries."""
    font, thick = cv2.FONT_HERSHEY_DUPLEX, 1
    scale = height_px / cv2.getTextSize("Ag", font, 1.0, thick)[0][1]
    width, height = cv2.getTextSize(text, font, scale, thick)[0]
    start = (round(centre[0] - width / 2), round(centre[1] + height / 2))
    cv2.putText(sheet, text, start, font, scale, INK_BGR, thick, cv2.LINE_AA)
