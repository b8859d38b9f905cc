"""A pool of small pictures out of one of large ones, by averaging squares of pixels: what the
renderer would make at that size, in seconds.

    python -m benchmarks.small_pool runs/pool runs/pool32 --side 32 --identities 3064
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from diffusionact.errors import SettingsError
from diffusionact.training.data import FIELDS, FORMAT, Pool


def shrink_pool(source: str | Path, folder: str | Path, side: int, identities: int) -> Pool:
    """Returns the pool in `folder`: the last `identities` of `source`, so that who is held out
    there is held out here, at `side` px; made where it is not there yet.

    Raises: SettingsError when the source has fewer identities, or its side is no multiple.
    """
    folder, pool = Path(folder), Pool.open(source)
    request = {"format": FORMAT, "identities": identities, "frames": pool.frames, "size": side,
               "seed": 0, "of": str(source)}  # fmt: skip
    if (folder / "meta.json").exists():
        if json.loads((folder / "meta.json").read_text(encoding="utf-8")) != request:
            raise SettingsError(f"{folder} holds another pool, wanted {request}; remove it")
        return Pool.open(folder)
    if identities > pool.identities or pool.size % side:
        raise SettingsError(
            f"{source} has {pool.identities} identities of {pool.size} px, wanted at least "
            f"{identities} and a multiple of {side} px"
        )
    partial = folder.with_name(folder.name + ".partial")
    partial.mkdir(parents=True, exist_ok=True)
    factor, first = pool.size // side, pool.identities - identities
    for name in FIELDS:
        if name not in ("images", "labels", "points", "gaze"):
            np.save(partial / f"{name}.npy", getattr(pool, name)[first:])
    # The middle of pixel 0 lies at 0: at half a small pixel less half a large one.
    points = np.array(pool.points[first:])
    points[..., :2] = (points[..., :2] + 0.5) / factor - 0.5
    points[..., 2] /= factor
    np.save(partial / "points.npy", points)
    np.save(partial / "gaze.npy", (pool.gaze[first:] + 0.5) / factor - 0.5)
    _pictures(pool, partial, side, first)
    (partial / "meta.json").write_text(json.dumps(request), encoding="utf-8")
    os.replace(partial, folder)
    return Pool.open(folder)


def _pictures(pool: Pool, folder: Path, side: int, first: int) -> None:
    rows = (pool.identities - first, pool.frames, side, side)
    images = np.lib.format.open_memmap(folder / "images.npy", "w+", np.dtype(np.uint8), (*rows, 3))
    labels = np.lib.format.open_memmap(folder / "labels.npy", "w+", np.dtype(np.uint8), rows)
    for row in tqdm(range(rows[0]), desc="shrink", unit="identity"):
        for frame in range(pool.frames):
            image, label = pool.images[first + row, frame], pool.labels[first + row, frame]
            images[row, frame] = cv2.resize(image, (side, side), interpolation=cv2.INTER_AREA)
            labels[row, frame] = cv2.resize(label, (side, side), interpolation=cv2.INTER_NEAREST)
    images.flush()
    labels.flush()


def main() -> None:
    parser = argparse.ArgumentParser(
        description="Make a pool of small pictures out of a large one."
    )
    parser.add_argument("source", type=Path)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--side", type=int, default=32)
    parser.add_argument("--identities", type=int, default=3064)
    arguments = parser.parse_args()
    shrink_pool(arguments.source, arguments.folder, arguments.side, arguments.identities)


if __name__ == "__main__":
    main()
