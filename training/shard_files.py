"""Shards of prepared faces as files: WebDataset's layout, in tar, and how they are written.

A frame is a few members that follow one another and share their name up to the first dot:

    c000012t01f000345.jpg        the crop, RGB, JPEG 95 without colour subsampling
    c000012t01f000345.mask.png   255 where the face, or all that is not background, is
    c000012t01f000345.npy        what was read off it, one record of `record_dtype`
    c000012t01f000345.json       person, clip, take (a piece without a cut), place in the clip

Any reader of tar files, and every one of WebDataset, can read them without this package.
"""

from __future__ import annotations

import io
import json
import os
import tarfile
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diffusionact.errors import SettingsError

PICTURE, MASK, NUMBERS, ABOUT = "jpg", "mask.png", "npy", "json"
BLOCK = 512  # of tar: headers, and what contents are padded to


@dataclass(frozen=True)
class Entry:
    """One frame. key: its name; picture, mask: encoded; numbers: one record; about: for readers."""

    key: str
    picture: bytes
    mask: bytes
    numbers: npt.NDArray[np.void]
    about: dict[str, Any]


def record_dtype(shape: int, expression: int, codes: int = 0) -> np.dtype[np.void]:
    """Returns what is known of a frame, by name; lengths of codes as given.

    points: crop px, z NaN where unknown; gaze: crop px; gaze_angles: pitch, yaw in radians, NaN
    without a gaze network; shape, expression, pose (yaw, pitch, roll in degrees) and camera (px per
    head unit, x, y px): our face model, fitted; drawn: the points and irises that the condition is
    drawn from, canvas px; codes: what the published networks read; crop: picture px -> crop px;
    sharpness: as `prepare` measures it; side: of the crop in the picture, px; frame, pts_ns: where
    in the clip.
    """
    fields: list[tuple[str, str, tuple[int, ...]]] = [
        ("points", "<f4", (68, 3)),
        ("gaze", "<f4", (2, 2)),
        ("gaze_angles", "<f4", (2,)),
        ("shape", "<f4", (shape,)),
        ("expression", "<f4", (expression,)),
        ("pose", "<f4", (3,)),
        ("camera", "<f4", (3,)),
        ("drawn", "<f4", (70, 2)),
        ("codes", "<f4", (codes,)),
        ("crop", "<f8", (2, 3)),
        ("sharpness", "<f4", ()),
        ("side", "<f4", ()),
        ("frame", "<i4", ()),
        ("pts_ns", "<i8", ()),
    ]
    return np.dtype([field for field in fields if 0 not in field[2]])


def write_shard(path: Path, entries: Iterable[Entry]) -> Iterator[str]:
    """Yields the key of each frame that is written; at the end the shard is there, and before it
    is not. Its bytes depend on the entries alone: no times, no users."""
    part = path.with_name(f".part-{path.name}")
    with tarfile.open(part, "w", format=tarfile.USTAR_FORMAT) as tar:
        for entry in entries:
            numbers = io.BytesIO()
            np.save(numbers, entry.numbers, allow_pickle=False)
            for ending, content in (
                (PICTURE, entry.picture),
                (MASK, entry.mask),
                (NUMBERS, numbers.getvalue()),
                (ABOUT, json.dumps(entry.about).encode()),
            ):
                member = tarfile.TarInfo(f"{entry.key}.{ending}")
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))
            yield entry.key
    os.replace(part, path)


@dataclass(frozen=True)
class Stored:
    """One frame of a shard: its record, what it is of, and where its pictures lie, (offset, size)
    in bytes."""

    numbers: npt.NDArray[np.void]
    about: dict[str, Any]
    picture: tuple[int, int]
    mask: tuple[int, int]


def read_shard(path: Path) -> Iterator[Stored]:
    """Yields the frames of a shard, without their pictures. Raises: SettingsError for a shard that
    is damaged."""
    try:
        with tarfile.open(path, "r:") as tar, path.open("rb") as file:
            parts: dict[str, tuple[int, int]] = {}
            for member in tar:
                ending = member.name.partition(".")[2]
                parts[ending] = (member.offset_data, member.size)
                if ending == ABOUT:  # the last of a frame
                    numbers = np.load(io.BytesIO(_at(file, parts[NUMBERS])), allow_pickle=False)
                    about = json.loads(_at(file, parts[ABOUT]))
                    yield Stored(numbers, about, parts[PICTURE], parts[MASK])
                    parts = {}
    except (OSError, tarfile.TarError, KeyError, ValueError) as error:
        raise SettingsError(
            f"{path}: not a whole shard ({error}); delete it and its .json, and run the same "
            "`diffusionact prepare` again: it makes only what is missing"
        ) from error


def _at(file: Any, place: tuple[int, int]) -> bytes:
    file.seek(place[0])
    content: bytes = file.read(place[1])
    return content
