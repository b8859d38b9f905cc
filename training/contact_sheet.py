"""A picture to look at: prepared faces with what was read off them drawn on top."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt

from diffusionact.files import write_whole
from diffusionact.training.shards import Shards

U8 = npt.NDArray[np.uint8]

COLUMNS, MOST_ROWS = 8, 16
CELL_PX, TEXT_PX = 192, 20
GREEN, RED, BLUE = (80, 255, 80), (60, 60, 255), (255, 160, 60)  # BGR: points, irises, mask
FINE = 4  # bits of OpenCV's fixed-point coordinates


def write_contact_sheet(shards: Shards, path: Path) -> None:
    """Returns nothing; writes the PNG: a row for each of some takes, evenly chosen, and in it some
    of its frames: landmarks in green, irises in red, the mask's edge in blue; the last of a row is
    the drawing that the networks see of the one before."""
    count = min(len(shards.takes), MOST_ROWS)
    chosen = np.linspace(0, len(shards.takes) - 1, count).round().astype(int)
    rows = [_row(shards, int(number)) for number in chosen]
    write_whole(path, cv2.imencode(".png", np.concatenate(rows))[1].tobytes())


def _row(shards: Shards, number: int) -> U8:
    take = shards.takes[number]
    identity = shards.people.index(take.person)
    frames = shards.frames_of_take(number)
    picks = np.linspace(0, len(frames) - 1, min(len(frames), COLUMNS - 1)).round().astype(int)
    who, at = np.full(len(picks), identity), frames[picks]
    found = shards.gather(who, at)
    cells = [
        _cell(found.images[i], found.points[i], found.gaze[i], None if found.mask is None else
              found.mask[i])
        for i in range(len(picks))
    ]  # fmt: skip
    cells.append(_resized(shards.draw(who[-1:], at[-1:])[0]))
    cells += [np.full_like(cells[0], 255)] * (COLUMNS - len(cells))
    strip = np.concatenate(cells, axis=1)
    title = np.full((TEXT_PX, strip.shape[1], 3), 255, np.uint8)
    text = f"{take.person}  {take.clip}  take {take.number}, {take.frames} frames"
    ascii_text = text.encode("ascii", "replace").decode()
    cv2.putText(title, ascii_text, (4, 14), cv2.FONT_HERSHEY_SIMPLEX, 0.42, (0, 0, 0), 1,
                cv2.LINE_AA)  # fmt: skip
    return np.concatenate([title, strip])


def _cell(image: U8, points: npt.NDArray[np.float32], gaze: npt.NDArray[np.float32],
          mask: U8 | None) -> U8:  # fmt: skip
    cell, zoom = _resized(image), CELL_PX / len(image)
    if mask is not None:
        edges, _ = cv2.findContours(
            cv2.resize(mask, (CELL_PX, CELL_PX), interpolation=cv2.INTER_NEAREST),
            cv2.RETR_EXTERNAL, cv2.CHAIN_APPROX_NONE,
        )  # fmt: skip
        cv2.drawContours(cell, edges, -1, BLUE, 1, cv2.LINE_AA)
    for places, colour, radius in ((points[:, :2], GREEN, 1.2), (gaze, RED, 2.0)):
        centres = ((places + 0.5) * zoom - 0.5) * (1 << FINE)
        for x, y in np.rint(np.nan_to_num(centres)).astype(int).tolist():
            cv2.circle(cell, (x, y), round(radius * (1 << FINE)), colour, cv2.FILLED, cv2.LINE_AA,
                       FINE)  # fmt: skip
    return cell


def _resized(image: U8) -> U8:
    """The picture as BGR, CELL_PX wide."""
    small = cv2.resize(image, (CELL_PX, CELL_PX), interpolation=cv2.INTER_AREA)
    return np.ascontiguousarray(small[..., ::-1])
