"""Trains the judge on a pool of rendered faces, and measures it on identities it never saw.

    python -m diffusionact.training.judges training/recipes/judge128.toml

One core and a few minutes. Pictures are blurred, shrunk, compressed and made noisy now and then,
so that the judge stays right on what a generator with such faults makes.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor
from tqdm import tqdm

from diffusionact.errors import SettingsError
from diffusionact.evaluation import metrics
from diffusionact.evaluation.rendered import visible_gaze
from diffusionact.training.data import Pool
from diffusionact.training.models.judge import (
    Judge,
    JudgeConfig,
    Prediction,
    Reading,
    load_judge,
    save_judge,
)

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

LOG = logging.getLogger(__name__)

FloatArray = NDArray[np.floating[Any]]
T = TypeVar("T")

MOVED = 5 / 128  # of the side, how far pictures are moved at most


class Pace(Protocol):
    """What sets the length and the learning rate of a run."""

    @property
    def images(self) -> int: ...
    @property
    def minutes(self) -> float: ...
    @property
    def batch(self) -> int: ...
    @property
    def lr(self) -> float: ...
    @property
    def warmup(self) -> float: ...


@dataclass(frozen=True)
class JudgeRecipe:
    """How the judge is trained. It ends after `images` or `minutes`, whichever comes first; the
    learning rate falls to zero by the same measure."""

    pool: str
    weights: str = "training/checkpoints/judge.safetensors"
    held_out: int = 64  # identities at the pool's end, for measuring only
    images: int = 80_000
    minutes: float = 12.0
    batch: int = 32
    lr: float = 2e-3
    weight_decay: float = 1e-4
    warmup: float = 0.02  # share of the run
    gaze: float = 2.0  # weight of a pixel of gaze against a pixel of landmarks
    pose: float = 0.2  # weight of a degree against a pixel of landmarks
    eye_shift_px: float = 1.5  # how far the windows of the eyes are moved at most
    threads: int = 1
    seed: int = 1

    @classmethod
    def load(cls, path: str | Path) -> JudgeRecipe:
        """The recipe in a TOML file. Raises: SettingsError as `load_flat`."""
        return load_flat(cls, path)


def load_flat(cls: type[T], path: str | Path) -> T:
    """The dataclass whose fields are the settings of a TOML file without tables.

    Raises: SettingsError when it cannot be read or has an unknown or missing setting.
    """
    try:
        return cls(**tomllib.loads(Path(path).read_text(encoding="utf-8")))
    except (OSError, tomllib.TOMLDecodeError, TypeError) as error:
        known = ", ".join(field.name for field in dataclasses.fields(cls))  # type: ignore[arg-type]
        raise SettingsError(f"{path}: {error}; known settings: {known}") from error


@dataclass(frozen=True)
class Truth:
    """What N pictures show, and the pictures.

    images: uint8 [N,S,S,3] RGB; points: float32 [N,68,2] px; gaze: float32 [N,2,2] px, NaN where
    the eye cannot be seen; pose: float32 [N,3] degrees
    """

    images: NDArray[np.uint8]
    points: NDArray[np.float32]
    gaze: FloatArray
    pose: NDArray[np.float32]


def gather(pool: Pool, identity: NDArray[np.int64], frame: NDArray[np.int64]) -> Truth:
    """The pictures of a pool at (identity, frame), with what they show."""
    points, gaze = pool.points[identity, frame][..., :2], pool.gaze[identity, frame]
    return Truth(
        images=pool.images[identity, frame],
        points=points,
        gaze=visible_gaze(gaze, points, pool.labels[identity, frame]),
        pose=pool.pose[identity, frame],
    )


def augment(truth: Truth, rng: np.random.Generator) -> Truth:
    """The pictures moved, scaled and spoilt as a generator or a codec might; truth follows."""
    side = truth.images.shape[1]
    images = np.empty_like(truth.images)
    points, gaze = truth.points.copy(), truth.gaze.copy()
    for i, image in enumerate(truth.images):
        scale, shift = rng.uniform(0.92, 1.08), rng.uniform(-MOVED, MOVED, 2) * side
        middle = (side - 1) / 2
        offset = (1 - scale) * middle + shift
        matrix = np.array([[scale, 0, offset[0]], [0, scale, offset[1]]])
        points[i] = points[i] * scale + offset
        gaze[i] = gaze[i] * scale + offset
        image = cv2.warpAffine(image, matrix, (side, side), borderMode=cv2.BORDER_REFLECT_101)
        images[i] = _spoil(np.asarray(image, np.uint8), rng)
    return Truth(images, points, gaze, truth.pose)


def _spoil(image: NDArray[np.uint8], rng: np.random.Generator) -> NDArray[np.uint8]:
    side = image.shape[0]
    gain = rng.uniform(0.85, 1.15, 3)
    spoilt: Any = np.clip(image * gain + rng.uniform(-15, 15), 0, 255).astype(np.uint8)
    fault = rng.random()
    if fault < 0.25:
        spoilt = cv2.GaussianBlur(spoilt, (0, 0), rng.uniform(0.4, 1.6))
    elif fault < 0.4:
        small = int(rng.integers(side // 2, side))
        spoilt = cv2.resize(spoilt, (small, small), interpolation=cv2.INTER_AREA)
        spoilt = cv2.resize(spoilt, (side, side), interpolation=cv2.INTER_LINEAR)
    elif fault < 0.55:
        quality = [cv2.IMWRITE_JPEG_QUALITY, int(rng.integers(30, 90))]
        spoilt = cv2.imdecode(cv2.imencode(".jpg", spoilt, quality)[1], cv2.IMREAD_COLOR)
    if rng.random() < 0.3:
        noise: NDArray[np.int16] = np.empty(spoilt.shape, np.int16)
        cv2.setRNGSeed(int(rng.integers(2**31)))
        cv2.randn(noise, np.zeros(3), np.full(3, rng.uniform(1, 8)))
        spoilt = np.clip(spoilt + noise, 0, 255).astype(np.uint8)
    return np.asarray(spoilt, np.uint8)


def loss(seen: Prediction, truth: Truth, recipe: JudgeRecipe) -> Tensor:
    """The mean absolute errors of landmarks (both readings), visible irises and angles, summed."""
    points = torch.from_numpy(truth.points)
    gaze = torch.from_numpy(truth.gaze)
    shown = torch.isfinite(gaze)
    landmarks = F.l1_loss(seen.coarse, points)
    eyes = F.l1_loss(seen.points[:, 36:48], points[:, 36:48])
    irises = F.l1_loss(seen.gaze[shown], gaze[shown]) if shown.any() else gaze.new_zeros(())
    angles = F.l1_loss(seen.pose, torch.from_numpy(truth.pose))
    return landmarks + eyes + recipe.gaze * irises + recipe.pose * angles


def errors(seen: Reading, truth: Truth) -> dict[str, float]:
    """The judge's own errors: landmarks and gaze in pixels, angles in degrees."""
    return {
        "landmark_px": metrics.landmark_error(seen.points, truth.points),
        "gaze_px": metrics.gaze_error(seen.gaze, seen.points, truth.gaze, truth.points),
        "pose_deg": metrics.pose_error(seen.pose, truth.pose),
        "mouth_opening_r": metrics.correlation(
            metrics.mouth_opening(seen.points), metrics.mouth_opening(truth.points)
        ),
        "eye_opening_r": metrics.correlation(
            metrics.eye_opening(seen.points).ravel(), metrics.eye_opening(truth.points).ravel()
        ),
    }


def train(recipe: JudgeRecipe, pool: Pool) -> Judge:
    """A judge trained by the recipe on all but the held-out identities of the pool.

    Raises: SettingsError when the pool has no more identities than are held out.
    """
    identities = trained_identities(recipe.pool, pool, recipe.held_out)
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    judge = Judge(JudgeConfig(image_size=pool.size))
    judge.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(
        judge.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay
    )

    def step() -> float:
        identity = rng.integers(identities, size=recipe.batch)
        frame = rng.integers(pool.frames, size=recipe.batch)
        truth = augment(gather(pool, identity, frame), rng)
        return _step(judge, optimizer, truth, recipe, rng)

    pace(recipe, optimizer, step, "judge")
    return judge.eval()


def trained_identities(folder: str, pool: Pool, count: int) -> int:
    """How many identities of the pool are for training, `count` at its end held out.

    Raises: SettingsError when there is none.
    """
    if pool.identities <= count:
        raise SettingsError(
            f"{folder} has {pool.identities} identities, {count} of them held out; "
            "render more or hold out fewer"
        )
    return pool.identities - count


def pace(
    recipe: Pace, optimizer: torch.optim.Optimizer, step: Callable[[], float], name: str
) -> None:
    """Nothing; calls `step`, which trains on a batch and returns its loss, until the images or
    the minutes of the recipe are over. The learning rate warms up and falls to zero."""
    start, average = time.monotonic(), 0.0
    with tqdm(total=recipe.images, unit="image", desc=name, smoothing=0.05) as bar:
        while (progress := _progress(bar.n, start, recipe)) < 1:
            rate = recipe.lr * min(1.0, progress / recipe.warmup) * (1 - progress)
            for group in optimizer.param_groups:
                group["lr"] = rate
            value = step()
            average = value if bar.n == 0 else 0.98 * average + 0.02 * value
            bar.set_postfix(loss=f"{average:.3f}", refresh=False)
            bar.update(recipe.batch)


def _progress(images: int, start: float, recipe: Pace) -> float:
    return max(images / recipe.images, (time.monotonic() - start) / (60 * recipe.minutes))


def _step(
    judge: Judge,
    optimizer: torch.optim.Optimizer,
    truth: Truth,
    recipe: JudgeRecipe,
    rng: np.random.Generator,
) -> float:
    judge.train()
    image = torch.from_numpy(truth.images).permute(0, 3, 1, 2).float() / 127.5 - 1
    limit = recipe.eye_shift_px
    shift = torch.from_numpy(rng.uniform(-limit, limit, (len(image), 2, 2)).astype(np.float32))
    with torch.autocast("cpu", torch.bfloat16):
        seen = judge(image, shift)
    value = loss(seen, truth, recipe)
    optimizer.zero_grad(set_to_none=True)
    value.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(judge.parameters(), 5.0)
    optimizer.step()
    return value.item()


def held_out(pool: Pool, count: int) -> Truth:
    """Every frame of the last `count` identities of the pool."""
    identity, frame = np.divmod(np.arange(count * pool.frames), pool.frames)
    return gather(pool, identity + pool.identities - count, frame)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the judge that measures generated faces.")
    parser.add_argument("recipe", type=Path)
    recipe = JudgeRecipe.load(parser.parse_args().recipe)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(recipe.threads)
    cv2.setNumThreads(recipe.threads)
    pool = Pool.open(recipe.pool)
    start = time.monotonic()
    judge = train(recipe, pool)
    notes = {"recipe": dataclasses.asdict(recipe), "seconds": round(time.monotonic() - start)}
    save_judge(recipe.weights, judge, notes)
    # Measured as it was saved: in half precision.
    judge, _ = load_judge(recipe.weights)
    truth = held_out(pool, recipe.held_out)
    notes["own_errors"] = errors(judge.read(truth.images), truth)
    save_judge(recipe.weights, judge, notes)
    LOG.info("%s: %s", recipe.weights, json.dumps(notes["own_errors"]))


if __name__ == "__main__":
    main()
