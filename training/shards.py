"""Prepared faces for training: an index of memory maps beside the shards, and frames by number."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import cv2
import numpy as np
import numpy.typing as npt

from diffusionact.condition import Drawing, draw_condition
from diffusionact.errors import SettingsError
from diffusionact.landmarks import Landmarks
from diffusionact.training.config import PoolRecipe, ShardsRecipe
from diffusionact.training.crossing import crossed
from diffusionact.training.data import Pool
from diffusionact.training.dataset import F32, U8, Dataset, Frames, Ints
from diffusionact.training.shard_files import read_shard

FORMAT = 1
META, INDEX, NAMES = "meta.json", "index", "names.json"
PLACES = {"shard": "<i4", "take": "<i4", "picture": "<i8", "mask": "<i8"}
DECODERS = 4  # threads: OpenCV decodes without Python's lock

Pairs = Literal["take", "person"]


@dataclass(frozen=True)
class Take:
    """A piece of a clip without a cut: its frames make pairs."""

    person: str
    clip: str
    number: int
    frames: int


def open_dataset(recipe: PoolRecipe | ShardsRecipe) -> Dataset:
    """Returns the faces that a recipe names. Raises: SettingsError when they are not there."""
    if isinstance(recipe, PoolRecipe):
        return Pool.open(recipe.folder)
    return Shards.open(recipe.folder, recipe.pairs)


def origin_of(recipe: PoolRecipe | ShardsRecipe) -> dict[str, Any]:
    """Returns what weights that were trained on these faces say of them: `data` and, of prepared
    ones, `crop` and `drawing`, as in a bundle's manifest: it is to be run on faces cut alike."""
    if isinstance(recipe, PoolRecipe):
        return {"data": "rendered faces"}
    meta = _meta(Path(recipe.folder))
    data = f"{meta['frames']} prepared frames of {meta['people']} people"
    return {"data": data, "crop": meta["crop"], "drawing": meta["drawing"]}


def _meta(folder: Path) -> dict[str, Any]:
    """What prepared faces say of themselves. Raises: SettingsError."""
    try:
        meta: dict[str, Any] = json.loads((folder / META).read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise SettingsError(
            f"no prepared faces in {folder}, or not finished; make them, or go on, with "
            f"`diffusionact prepare DATASET -o {folder}`"
        ) from error
    if meta.get("format") != FORMAT:
        raise SettingsError(
            f"{folder}: prepared faces of format {meta.get('format')}, wanted {FORMAT}; "
            "prepare them again in another folder"
        )
    return meta


class Shards:
    """Prepared faces: a `Dataset`. Frames are numbered by person, clip, take and time."""

    def __init__(self, folder: Path, meta: dict[str, Any], pairs: Pairs) -> None:
        self.folder, self.meta, self.pairs = folder, meta, pairs
        index = folder / INDEX
        names = json.loads((index / NAMES).read_text(encoding="utf-8"))
        self.people: list[str] = names["people"]
        self.takes = [Take(*take) for take in names["takes"]]
        self.columns: dict[str, npt.NDArray[Any]] = {
            path.stem: np.load(path, mmap_mode="r") for path in sorted(index.glob("*.npy"))
        }
        lengths = np.array([take.frames for take in self.takes], np.int64)
        number = {person: i for i, person in enumerate(self.people)}
        of_person = np.array([number[take.person] for take in self.takes], np.int64)
        self._take_first, self._take_length = np.cumsum(lengths) - lengths, lengths
        self._counts = np.bincount(of_person, lengths, len(self.people)).astype(np.int64)
        self._first = np.cumsum(self._counts) - self._counts
        self._files = [folder / name for name, _ in meta["shards"]]
        self._drawing = Drawing(**meta["drawing"])
        self._threads = ThreadPoolExecutor(min(DECODERS, os.cpu_count() or 1), "decode")

    @classmethod
    def open(cls, folder: str | Path, pairs: Pairs = "take") -> Shards:
        """Returns the prepared faces in `folder`; pairs: of frames of one take, or of all that the
        person has.

        Raises: SettingsError: they are not there, not finished, not whole, or of another format.
        """
        folder = Path(folder)
        meta = _meta(folder)
        for name, size in meta["shards"]:
            path = folder / name
            seen = path.stat().st_size if path.exists() else 0
            if seen != size:
                raise SettingsError(
                    f"{path}: {seen} bytes, wanted {size}; delete it and its .json, and run the "
                    "same `diffusionact prepare` again: it makes only what is missing"
                )
        return cls(folder, meta, pairs)

    def __len__(self) -> int:
        return int(self._counts.sum())

    @property
    def identities(self) -> int:
        return len(self.people)

    @property
    def size(self) -> int:
        return int(self.meta["size"])

    def count(self, identity: Ints) -> Ints:
        """Returns how many frames each of the people has."""
        return np.asarray(self._counts[identity])

    def span(self, identity: Ints, frame: Ints) -> tuple[Ints, Ints]:
        """Returns (first, count) of the frames that make pairs with these."""
        if self.pairs == "person":
            return np.zeros_like(identity), self.count(identity)
        take = np.asarray(self.columns["take"][self._rows(identity, frame)])
        return self._take_first[take] - self._first[identity], self._take_length[take]

    def frames_of_take(self, number: int) -> Ints:
        """Returns the numbers, among the person's frames, of those of a take."""
        person = self.people.index(self.takes[number].person)
        first = self._take_first[number] - self._first[person]
        return np.asarray(first + np.arange(self._take_length[number]))

    def gather(self, identity: Ints, frame: Ints) -> Frames:
        """Returns the frames, with masks, without labels and parameters."""
        rows = self._rows(identity, frame)
        return Frames(
            images=self.pictures(identity, frame),
            points=self.column("points", identity, frame),
            gaze=self.column("gaze", identity, frame),
            mask=np.stack(list(self._threads.map(self._mask, rows))),
        )

    def pictures(self, identity: Ints, frame: Ints) -> U8:
        """Returns uint8 [B,S,S,3] RGB, the frames' images alone."""
        return np.stack(list(self._threads.map(self._picture, self._rows(identity, frame))))

    def known(self, identity: Ints, frame: Ints) -> tuple[F32, F32, None]:
        """Returns points and gaze of the frames, and that no parameters are known."""
        points, gaze = (self.column(name, identity, frame) for name in ("points", "gaze"))
        return points, gaze, None

    def column(self, name: str, identity: Ints, frame: Ints) -> npt.NDArray[Any]:
        """Returns what is known of frames under a name of `record_dtype`. Raises: SettingsError."""
        if name not in self.columns:
            known = ", ".join(sorted(set(self.columns) - set(PLACES)))
            raise SettingsError(f"{self.folder} has no {name}; it has {known}")
        return np.asarray(self.columns[name][self._rows(identity, frame)])

    def draw(self, identity: Ints, frame: Ints) -> U8:
        """Returns the condition drawings: uint8 [B,S,S,3] RGB, as the runtime draws the frame when
        it is its own driver."""
        return self._drawn(self._face(row, "drawn") for row in self._rows(identity, frame))

    def cross(self, source: tuple[Ints, Ints], driver: tuple[Ints, Ints]) -> U8:
        """Returns the drawings of the sources' faces with the drivers' motion. Raises:
        SettingsError: they were prepared with the published tracker, which draws FLAME's face."""
        if "codes" in self.columns:
            raise SettingsError(
                f"{self.folder} is drawn from FLAME, of which training has no copy: pairs across "
                "people want faces prepared with --tracker mediapipe"
            )
        faces = (
            [self._face(row, "points") for row in self._rows(*who)] for who in (source, driver)
        )
        return self._drawn(map(crossed, *faces))

    def _drawn(self, faces: Any) -> U8:
        return np.stack([draw_condition(face, self.size, self._drawing) for face in faces])

    def _face(self, row: int, points: str) -> Landmarks:
        if points == "points":
            return Landmarks(self.columns["points"][row], self.columns["gaze"][row])
        drawn: F32 = np.asarray(self.columns["drawn"][row])
        depth = np.full((len(drawn), 1), np.nan, np.float32)
        return Landmarks(np.concatenate([drawn, depth], axis=1)[:68], drawn[68:])

    def _rows(self, identity: Ints, frame: Ints) -> Ints:
        return np.asarray(self._first[identity] + frame)

    def _picture(self, row: int) -> U8:
        picture = cv2.imdecode(self._content(row, "picture"), cv2.IMREAD_COLOR_RGB)
        return np.asarray(picture, np.uint8)

    def _mask(self, row: int) -> U8:
        return np.asarray(cv2.imdecode(self._content(row, "mask"), cv2.IMREAD_GRAYSCALE), np.uint8)

    def _content(self, row: int, what: str) -> U8:
        offset, size = (int(number) for number in self.columns[what][row])
        with self._files[self.columns["shard"][row]].open("rb", buffering=0) as file:
            file.seek(offset)
            return np.frombuffer(file.read(size), np.uint8)


def write_index(
    folder: Path, shards: Sequence[Path], takes: Sequence[Sequence[Take]], dtype: np.dtype[np.void]
) -> None:
    """Returns nothing; the index is complete or not there.

    shards: files, in order; takes: of each of them, in the order of its frames; dtype: of the
    frames' records. Frames are read one at a time: memory does not grow with the data.
    """
    order = sorted(
        (take.person, shard, number)
        for shard, of_shard in enumerate(takes)
        for number, take in enumerate(of_shard)
        if take.frames
    )
    sorted_takes = [takes[shard][number] for _, shard, number in order]
    lengths = np.array([take.frames for take in sorted_takes], np.int64)
    firsts = np.cumsum(lengths) - lengths
    place = {(s, n): (i, int(firsts[i])) for i, (_, s, n) in enumerate(order)}
    part = folder / f".part-{INDEX}"
    shutil.rmtree(part, ignore_errors=True)
    part.mkdir()
    columns = _columns(part, int(lengths.sum()), dtype)
    for shard, path in enumerate(shards):
        stored = read_shard(path)
        for number, take in enumerate(takes[shard]):
            for offset in range(take.frames):
                take_number, first = place[shard, number]
                frame = next(stored)
                row = first + offset
                for name in dtype.names or ():
                    columns[name][row] = frame.numbers[name]
                columns["shard"][row], columns["take"][row] = shard, take_number
                columns["picture"][row], columns["mask"][row] = frame.picture, frame.mask
    for column in columns.values():
        column.flush()
    people = list(dict.fromkeys(take.person for take in sorted_takes))
    names = {
        "people": people,
        "takes": [(t.person, t.clip, t.number, t.frames) for t in sorted_takes],
    }
    (part / NAMES).write_text(json.dumps(names), encoding="utf-8")
    shutil.rmtree(folder / INDEX, ignore_errors=True)
    os.replace(part, folder / INDEX)


def _columns(
    folder: Path, rows: int, dtype: np.dtype[np.void]
) -> dict[str, np.memmap[Any, np.dtype[Any]]]:
    made = {}
    for name in dtype.names or ():
        kind = dtype[name]
        made[name] = np.lib.format.open_memmap(
            folder / f"{name}.npy", "w+", kind.base, (rows, *kind.shape)
        )
    for name, code in PLACES.items():
        shape = (rows, 2) if name in ("picture", "mask") else (rows,)
        made[name] = np.lib.format.open_memmap(folder / f"{name}.npy", "w+", np.dtype(code), shape)
    return made
