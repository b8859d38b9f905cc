"""The pool of rendered faces on disk, and the batches drawn from it.

A pool is a folder of `.npy` arrays, one row per identity, and `meta.json`. The frames of an
identity share its looks, camera, light and background, and differ in motion: that makes pairs.
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import queue
import threading
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Generic, TypeVar

import numpy as np
import numpy.typing as npt
from tqdm import tqdm

from diffusionact.condition import Drawing, draw_condition
from diffusionact.errors import SettingsError
from diffusionact.landmarks import Landmarks
from diffusionact.training.config import PoolRecipe, ShardsRecipe, StageRecipe, load_recipe
from diffusionact.training.crossing import crossed
from diffusionact.training.dataset import Dataset, Frames, Ints
from diffusionact.training.inversions import AHEAD, InversionCache
from diffusionact.training.share import WHOLE, Share

FORMAT = 1
FIELDS = ("images", "labels", "points", "gaze", "pose", "expression", "gaze_angles", "parameters")
DRAWING = Drawing(thickness_px=1, disc_radius_px=1.5, antialias=True)

F32 = npt.NDArray[np.float32]
U8 = npt.NDArray[np.uint8]
T = TypeVar("T")


@dataclass(frozen=True)
class Pool:
    """A rendered pool, as memory maps over its files.

    images: uint8 [I,F,S,S,3] RGB; labels: uint8 [I,F,S,S]; points: float32 [I,F,68,3] px;
    gaze: float32 [I,F,2,2] px; pose: float32 [I,F,3] deg; expression: float32 [I,F,E];
    gaze_angles: float32 [I,F,2] deg; parameters: float32 [I,F,P], standardised.
    """

    images: U8
    labels: U8
    points: F32
    gaze: F32
    pose: F32
    expression: F32
    gaze_angles: F32
    parameters: F32

    @classmethod
    def open(cls, folder: str | Path) -> Pool:
        """Returns the pool in `folder`.

        Raises:
            SettingsError: there is no finished pool of this format there.
        """
        folder = Path(folder)
        try:
            meta = json.loads((folder / "meta.json").read_text(encoding="utf-8"))
        except OSError as error:
            raise SettingsError(
                f"no pool of rendered faces in {folder}; render it with "
                "`python -m diffusionact.training.data RECIPE`"
            ) from error
        if meta["format"] != FORMAT:
            raise SettingsError(f"{folder}: pool format {meta['format']}, wanted {FORMAT}")
        return cls(**{name: np.load(folder / f"{name}.npy", mmap_mode="r") for name in FIELDS})

    @property
    def identities(self) -> int:
        return int(self.images.shape[0])

    @property
    def frames(self) -> int:
        return int(self.images.shape[1])

    @property
    def size(self) -> int:
        return int(self.images.shape[2])

    def count(self, identity: Ints) -> int:
        """Returns how many frames each person has."""
        return self.frames

    def span(self, identity: Ints, frame: Ints) -> tuple[int, int]:
        """Returns (first, count) of the frames that make pairs with these: all of the person's."""
        return 0, self.frames

    def gather(self, identity: Ints, frame: Ints) -> Frames:
        """Returns the frames; their masks are told by the labels."""
        return Frames(
            images=self.images[identity, frame],
            points=self.points[identity, frame],
            gaze=self.gaze[identity, frame],
            labels=self.labels[identity, frame],
            parameters=self.parameters[identity, frame],
        )

    def pictures(self, identity: Ints, frame: Ints) -> U8:
        """Returns uint8 [B,S,S,3] RGB, the frames' images alone."""
        return self.images[identity, frame]

    def known(self, identity: Ints, frame: Ints) -> tuple[F32, F32, F32]:
        """Returns points, gaze and parameters of the frames, as in `Frames`."""
        at = identity, frame
        return self.points[at], self.gaze[at], self.parameters[at]

    def draw(self, identity: Ints, frame: Ints) -> U8:
        """Returns the condition drawings: uint8 [B,S,S,3] RGB of the frames' landmarks."""
        faces = map(self._landmarks, identity, frame)
        return np.stack([draw_condition(face, self.size, DRAWING) for face in faces])

    def cross(self, source: tuple[Ints, Ints], driver: tuple[Ints, Ints]) -> U8:
        """Returns the drawings of the sources' faces with the drivers' motion."""
        faces = map(crossed, map(self._landmarks, *source), map(self._landmarks, *driver))
        return np.stack([draw_condition(face, self.size, DRAWING) for face in faces])

    def _landmarks(self, identity: int, frame: int) -> Landmarks:
        return Landmarks(self.points[identity, frame], self.gaze[identity, frame])


# Rendering


def render_pool(
    folder: str | Path,
    *,
    identities: int,
    frames: int,
    size: int = 128,
    seed: int = 1,
    workers: int | None = None,
) -> Pool:
    """Returns the pool in `folder`, rendering what is not there yet.

    Identity `i` has the random stream (seed, i), so a pool does not depend on the number of
    workers, and a larger one begins with the smaller one. An interrupted call is taken up again.
    """
    folder = Path(folder)
    request = {"format": FORMAT, "identities": identities, "frames": frames, "size": size,
               "seed": seed}  # fmt: skip
    if (folder / "meta.json").exists():
        _check_request(folder / "meta.json", request)
        return Pool.open(folder)
    partial = folder.with_name(folder.name + ".partial")
    done = _prepare(partial, request)
    todo = [int(i) for i in np.flatnonzero(done == 0)]
    tasks = [(str(partial), i, frames, size, seed) for i in todo]
    count = workers or os.cpu_count() or 1
    with multiprocessing.get_context("spawn").Pool(count) as processes:
        for i in tqdm(
            processes.imap_unordered(_render_identity, tasks, chunksize=2),
            total=identities, initial=identities - len(todo), desc="faces", unit="identity",
        ):  # fmt: skip
            done[i] = 1
    done.flush()
    (partial / "done.npy").unlink()
    os.replace(partial / "request.json", partial / "meta.json")
    os.replace(partial, folder)
    return Pool.open(folder)


def render_faces(pool: PoolRecipe | ShardsRecipe, workers: int | None = None) -> None:
    """Returns nothing; the rendered faces of a recipe are there. Prepared ones are there already,
    or are missed by who opens them."""
    if isinstance(pool, PoolRecipe):
        render_pool(
            pool.folder, identities=pool.identities, frames=pool.frames, size=pool.size,
            seed=pool.seed, workers=workers,
        )  # fmt: skip


def _check_request(path: Path, request: dict[str, int]) -> None:
    seen = json.loads(path.read_text(encoding="utf-8"))
    if {name: seen.get(name) for name in request} != request:  # a pool may say where it came from
        raise SettingsError(f"{path.parent} holds {seen}, wanted {request}; remove it or rename")


def _prepare(partial: Path, request: dict[str, int]) -> np.memmap[Any, np.dtype[np.uint8]]:
    """Returns the map of finished identities, after making the arrays where they are missing."""
    if (partial / "request.json").exists():
        _check_request(partial / "request.json", request)
        return np.lib.format.open_memmap(partial / "done.npy", mode="r+")
    partial.mkdir(parents=True, exist_ok=True)
    for name, example in _frame(0, request["seed"], 1, request["size"])[0].items():
        shape = (request["identities"], request["frames"], *example.shape)
        np.lib.format.open_memmap(partial / f"{name}.npy", "w+", example.dtype, shape).flush()
    done = np.lib.format.open_memmap(
        partial / "done.npy", "w+", np.dtype(np.uint8), (request["identities"],)
    )
    (partial / "request.json").write_text(json.dumps(request), encoding="utf-8")
    return done


def _frame(identity: int, seed: int, frames: int, size: int) -> list[dict[str, npt.NDArray[Any]]]:
    from diffusionact.training import faces

    rng = np.random.default_rng((seed, identity))
    person = faces.scene(faces.sample_identity(rng))
    camera = faces.sample_camera(rng)
    rows: list[dict[str, npt.NDArray[Any]]] = []
    for _ in range(frames):
        picture = faces.render(person, faces.sample_motion(rng), camera, size=size)
        rows.append({
            "images": picture.image, "labels": picture.labels,
            "points": picture.landmarks.points, "gaze": picture.landmarks.gaze,
            "pose": picture.pose, "expression": picture.expression,
            "gaze_angles": picture.gaze_angles, "parameters": picture.parameters,
        })  # fmt: skip
    return rows


def _render_identity(task: tuple[str, int, int, int, int]) -> int:
    folder, identity, frames, size, seed = task
    for index, row in enumerate(_frame(identity, seed, frames, size)):
        for name, value in row.items():
            array = np.lib.format.open_memmap(Path(folder) / f"{name}.npy", mode="r+")
            array[identity, index] = value
    return identity


# Batches


@dataclass(frozen=True)
class Batch:
    """One batch; the first len(noise) samples take their noise from the inverted source. None for
    what the data set does not have, and for the source of a stage without pairs.

    identity, frame, source_frame: int64 [B]; target, source: uint8 [B,S,S,3] RGB; labels, mask:
    uint8 [B,S,S], as in `Frames`; points: float32 [B,68,3] px; gaze: float32 [B,2,2] px;
    parameters: float32 [B,P]; condition: uint8 [B,S,S,3], drawing of the target's landmarks;
    noise: float16 or float32 [n,3,S,S]; driver: int64 [B], whose motion it is, where not the
    source's; source_points: float32 [B,68,3] px.
    """

    identity: Ints
    frame: Ints
    target: U8
    labels: U8 | None
    points: F32
    gaze: F32
    parameters: F32 | None
    source: U8 | None
    condition: U8 | None
    noise: npt.NDArray[np.floating[Any]]
    source_frame: Ints
    mask: U8 | None = None
    driver: Ints | None = None
    source_points: F32 | None = None


class PairSampler:
    """Draws batches of (source, target) frames of one clip; batch `step` has its own random
    stream, so a resumed run sees the batches that an unbroken run would have seen."""

    def __init__(
        self,
        pool: Dataset,
        identities: int,
        stage: StageRecipe,
        cache: InversionCache,
        seed: tuple[int, ...],
        share: Share = WHOLE,
    ) -> None:
        """identities: how many people, the first ones, are trained on; share: which part of each
        batch is made."""
        self.pool, self.identities, self.stage = pool, identities, stage
        self.cache, self.seed, self.share = cache, seed, share

    def __call__(self, step: int) -> Batch:
        rng = np.random.default_rng((*self.seed, step))
        count = self.stage.batch
        cached = round(self.stage.cached_noise * count) if self.cache.seen(step) else 0
        noise, identity, source = self.cache.pick(rng, cached, step)
        rest = count - cached
        people = rng.integers(self.identities, size=rest)
        identity = np.concatenate([identity, people])
        source = np.concatenate([source, rng.integers(self.pool.count(people), size=rest)])
        target = self._targets(rng, identity, source)
        mine = self.share.rows(count)
        return self._gather(identity[mine], source[mine], target[mine], noise[mine])

    def _targets(self, rng: np.random.Generator, identity: Ints, source: Ints) -> Ints:
        """The frames to make of the sources, of the same clip; "halves" and "other": another than
        the source wherever the clip has one, but in "halves" the source itself in odd places."""
        count = len(source)
        first, length = self.pool.span(identity, source)
        if self.stage.pairing == "share":
            target = first + rng.integers(length, size=count)
            return np.where(rng.random(count) < self.stage.same_frame, source, target)
        ahead = 1 + rng.integers(np.maximum(np.asarray(length) - 1, 1), size=count)
        target = first + (source - first + ahead) % length
        itself = (np.arange(count) % 2 == 1) & (self.stage.pairing == "halves")
        return np.where(itself, source, target)

    def _gather(
        self, identity: Ints, source: Ints, target: Ints, noise: npt.NDArray[np.float16]
    ) -> Batch:
        pool, pairs = self.pool, self.stage.kind != "autoencoder"
        frames = pool.gather(identity, target)
        before = pool.gather(identity, source) if pairs else None
        return Batch(
            identity=identity,
            frame=target,
            target=frames.images,
            labels=frames.labels,
            points=frames.points,
            gaze=frames.gaze,
            parameters=frames.parameters,
            source=before.images if before else None,
            condition=pool.draw(identity, target) if pairs else None,
            noise=noise,
            source_frame=source,
            mask=frames.mask,
            source_points=before.points if before else None,
        )


class Prefetcher(Generic[T]):
    """Calls `make(step)` for step, step + 1, ... in one thread, a few results ahead."""

    def __init__(self, make: Callable[[int], T], first: int, depth: int = AHEAD - 1) -> None:
        self._queue: queue.Queue[T | BaseException] = queue.Queue(depth)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._work, args=(make, first), daemon=True)
        self._thread.start()

    def _work(self, make: Callable[[int], T], step: int) -> None:
        while not self._stopped.is_set():
            try:
                item: T | BaseException = make(step)
            except BaseException as error:  # handed to the consumer, who raises it
                item = error
            while not self._stopped.is_set():
                try:
                    self._queue.put(item, timeout=0.2)
                    break
                except queue.Full:
                    continue
            if isinstance(item, BaseException):
                return
            step += 1

    def __next__(self) -> T:
        item = self._queue.get()
        if isinstance(item, BaseException):
            raise item
        return item

    def close(self) -> None:
        self._stopped.set()
        self._thread.join()


def main() -> None:
    parser = argparse.ArgumentParser(description="Render the pool of faces that a recipe names.")
    parser.add_argument("recipe")
    parser.add_argument("--workers", type=int)
    arguments = parser.parse_args()
    render_faces(load_recipe(arguments.recipe).pool, arguments.workers)


if __name__ == "__main__":
    main()
