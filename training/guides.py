"""Trains the guide on a pool of rendered faces, and measures it on people it never saw.

    python -m diffusionact.training.guides training/recipes/guide128.toml

One core and twelve minutes. The frames of a person share the room, the clothes and the light; so
that these are not taken for the person, they are painted over now and then.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn

from diffusionact.evaluation import metrics
from diffusionact.training.data import Pool
from diffusionact.training.face_shape import EXPRESSION, IDENTITY
from diffusionact.training.judges import (
    Truth,
    augment,
    gather,
    held_out,
    load_flat,
    pace,
    trained_identities,
)
from diffusionact.training.models.guide import Guide, GuideConfig, Seen, open_guide, save_guide

LOG = logging.getLogger(__name__)

BACKGROUND_LABEL, CLOTHES_LABEL = 0, 6
CALIBRATION_FRAMES = 512
# Columns of a picture's parameters (faces.parameters) that say who it is: shape, the colours of
# skin, hair, irises and lips, glasses' colour, hair style, glasses, hair's shape, beard and skin.
_SHAPE = 3 + 2 + len(EXPRESSION) + 2
_COLOURS = _SHAPE + len(IDENTITY)
_STYLE = _COLOURS + 30
PERSON_COLUMNS = np.concatenate([
    np.arange(_SHAPE, _COLOURS + 12), np.arange(_COLOURS + 18, _COLOURS + 21),
    np.arange(_STYLE, _STYLE + 13), np.arange(_STYLE + 18, _STYLE + 26),
])  # fmt: skip


@dataclass(frozen=True)
class GuideRecipe:
    """How the guide is trained. It ends after `images` or `minutes`, whichever comes first; the
    learning rate falls to zero by the same measure."""

    pool: str
    weights: str = "training/checkpoints/guide.safetensors"
    held_out: int = 64  # people at the pool's end, for measuring only
    images: int = 96_000
    minutes: float = 12.0
    batch: int = 64  # two frames each of half as many people
    lr: float = 3e-3
    weight_decay: float = 1e-3
    warmup: float = 0.02  # share of the run
    irises: float = 2.0  # weight of a pixel of an iris against a pixel of landmarks
    pose: float = 0.2  # weight of a degree against a pixel of landmarks
    gaze: float = 0.15  # the same
    contrast: float = 1.0  # weight of telling people apart
    person: float = 0.5  # weight of reading their looks
    temperature: float = 0.1  # of the contrast
    painted_over: float = 0.7  # share of the pictures whose room, or room and clothes, change
    eye_shift_px: float = 1.5  # how far the windows of the eyes are moved at most
    sizes: dict[str, Any] = field(default_factory=dict)  # what is not as GuideConfig has it
    threads: int = 1
    seed: int = 20

    @classmethod
    def load(cls, path: str | Path) -> GuideRecipe:
        """The recipe in a TOML file. Raises: SettingsError as `judges.load_flat`."""
        return load_flat(cls, path)


@dataclass(frozen=True)
class Lesson:
    """Two frames each of N/2 people, one person's side by side.

    truth: of N pictures; gaze: float32 [N,2] yaw, pitch, radians; looks: float32 [N,L], the
    parameters that say who it is
    """

    truth: Truth
    gaze: NDArray[np.float32]
    looks: NDArray[np.float32]


def draw_lesson(
    pool: Pool, identities: int, recipe: GuideRecipe, rng: np.random.Generator
) -> Lesson:
    """A batch of the first `identities` people of the pool, spoilt and painted over."""
    people = rng.integers(identities, size=recipe.batch // 2)
    frames = rng.random((len(people), pool.frames)).argsort(1)[:, :2]
    identity, frame = np.repeat(people, 2), frames.ravel()
    truth, labels = gather(pool, identity, frame), pool.labels[identity, frame]
    images = painted_over(truth.images, labels, recipe.painted_over, rng)
    return Lesson(
        truth=augment(dataclasses.replace(truth, images=images), rng),
        gaze=np.deg2rad(pool.gaze_angles[identity, frame]),
        looks=pool.parameters[identity, frame][:, PERSON_COLUMNS],
    )


def painted_over(
    images: NDArray[np.uint8], labels: NDArray[np.uint8], share: float, rng: np.random.Generator
) -> NDArray[np.uint8]:
    """The pictures, in a `share` of them another picture of the batch behind the person, and in
    half of these in place of the clothes as well.

    images: uint8 [N,S,S,3]; labels: uint8 [N,S,S], the renderer's regions
    """
    count = len(images)
    others = images[rng.permutation(count)][:, :, ::-1]
    room = labels == BACKGROUND_LABEL
    clothes = (labels == CLOTHES_LABEL) & (rng.random(count) < 0.5)[:, None, None]
    replaced = (room | clothes) & (rng.random(count) < share)[:, None, None]
    return np.where(replaced[..., None], others, images)


def loss(seen: Seen, looks: Tensor, lesson: Lesson, recipe: GuideRecipe) -> Tensor:
    """The mean absolute errors of points, angles and looks, and the contrast of people, summed."""
    truth = lesson.truth
    points, irises = torch.from_numpy(truth.points), torch.from_numpy(truth.gaze)
    shown = torch.isfinite(irises)
    open_eyed = shown.all(-1).any(-1)
    landmarks = F.l1_loss(seen.coarse, points)
    eyes = F.l1_loss(seen.points[:, 36:48], points[:, 36:48])
    places = F.l1_loss(seen.irises[shown], irises[shown]) if shown.any() else seen.gaze.sum() * 0
    pose = F.l1_loss(seen.pose, torch.from_numpy(truth.pose))
    wanted = torch.from_numpy(lesson.gaze)
    gaze = (seen.gaze - wanted).abs().mean(1).rad2deg() * open_eyed
    person = F.l1_loss(looks, torch.from_numpy(lesson.looks))
    return (
        landmarks + eyes + recipe.irises * places + recipe.pose * pose
        + recipe.gaze * gaze.sum() / open_eyed.sum().clamp_min(1)
        + recipe.contrast * contrast(seen.person, recipe.temperature) + recipe.person * person
    )  # fmt: skip


def contrast(person: Tensor, temperature: float) -> Tensor:
    """How badly the two frames of each person (rows 2i and 2i+1 of [N,E]) find each other among
    all rows: the mean cross-entropy of cosines over the temperature.

    Source: Chen et al. 2020, SimCLR, Eq. 1.
    """
    unit = F.normalize(person, dim=1)
    cosines = unit @ unit.T / temperature
    cosines = cosines.masked_fill(torch.eye(len(unit), dtype=torch.bool), -torch.inf)
    partner = torch.arange(len(unit), device=person.device) ^ 1
    return F.cross_entropy(cosines, partner)


def train(recipe: GuideRecipe, pool: Pool) -> Guide:
    """A guide trained by the recipe on all but the held-out people of the pool.

    Raises: SettingsError when the pool has no more people than are held out.
    """
    identities = trained_identities(recipe.pool, pool, recipe.held_out)
    torch.manual_seed(recipe.seed)
    rng = np.random.default_rng(recipe.seed)
    sizes: dict[str, Any] = {"image_size": pool.size}
    sizes |= {name: tuple(v) if isinstance(v, list) else v for name, v in recipe.sizes.items()}
    guide = Guide(GuideConfig(**sizes))
    looks = nn.Linear(guide.config.embed, len(PERSON_COLUMNS))  # only to learn from
    both = nn.ModuleList([guide, looks])
    both.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.AdamW(both.parameters(), lr=recipe.lr, weight_decay=recipe.weight_decay)

    def step() -> float:
        return _step(both, optimizer, draw_lesson(pool, identities, recipe, rng), recipe, rng)

    pace(recipe, optimizer, step, "guide")
    picked = rng.integers(identities, size=CALIBRATION_FRAMES)
    guide.calibrate(_tensor(pool.images[picked, rng.integers(pool.frames, size=len(picked))]))
    return guide.eval()


def _step(
    both: nn.ModuleList,
    optimizer: torch.optim.Optimizer,
    lesson: Lesson,
    recipe: GuideRecipe,
    rng: np.random.Generator,
) -> float:
    guide, looks = both
    both.train()
    image, limit = _tensor(lesson.truth.images), recipe.eye_shift_px
    shift = torch.from_numpy(rng.uniform(-limit, limit, (len(image), 2, 2)).astype(np.float32))
    with torch.autocast("cpu", torch.bfloat16):
        seen = guide(image, shift)
    value = loss(seen, looks(seen.person), lesson, recipe)
    optimizer.zero_grad(set_to_none=True)
    value.backward()  # type: ignore[no-untyped-call]
    torch.nn.utils.clip_grad_norm_(both.parameters(), 5.0)
    optimizer.step()
    return value.item()


def _tensor(images: NDArray[np.uint8]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(images)).permute(0, 3, 1, 2).float() / 127.5 - 1


@torch.inference_mode()
def errors(guide: Guide, pool: Pool, count: int) -> dict[str, float]:
    """What the guide gets wrong on the last `count` people of the pool: points in pixels, angles
    in degrees; whether two pictures show one person, as they are and with other rooms and
    clothes (area under the curve, equal error rate)."""
    truth = held_out(pool, count)
    labels, angles = pool.labels[-count:], pool.gaze_angles[-count:]
    rng = np.random.default_rng(0)
    moved = painted_over(truth.images, labels.reshape(-1, *labels.shape[2:]), 1.0, rng)
    seen = [_read(guide, images) for images in (truth.images, moved)]
    points, irises, gaze, pose, plain = seen[0]
    open_eyed = np.isfinite(truth.gaze).all(-1).any(-1)
    gaze_error = np.abs(np.rad2deg(gaze) - angles.reshape(-1, 2))[open_eyed]
    rows = {
        "landmark_px": metrics.landmark_error(points, truth.points),
        "gaze_px": metrics.gaze_error(irises, points, truth.gaze, truth.points),
        "gaze_deg": float(gaze_error.mean()),
        "pose_deg": metrics.pose_error(pose, truth.pose),
    }
    for name, person in (("", plain), ("_other_room", seen[1][-1])):
        auc, eer = verification(person, np.repeat(np.arange(count), pool.frames))
        rows |= {f"identity_auc{name}": auc, f"identity_eer{name}": eer}
    return rows


def _read(guide: Guide, images: NDArray[np.uint8]) -> list[NDArray[np.float32]]:
    """Points, irises, gaze, pose and identity of the pictures."""
    parts = [guide.eval()(_tensor(images[i : i + 32])) for i in range(0, len(images), 32)]
    names = ("points", "irises", "gaze", "pose", "person")
    rows = [torch.cat([getattr(part, name) for part in parts]) for name in names]
    rows[-1] = F.normalize(rows[-1], dim=1)
    return [row.numpy() for row in rows]


def verification(person: NDArray[Any], names: NDArray[np.int64]) -> tuple[float, float]:
    """How well cosines of identities [N,E] tell whether two pictures show the same name [N]:
    the area under the curve of true over false accepts, and the rate at which false accepts
    and false rejects are equal."""
    one, two = np.triu_indices(len(person), 1)
    cosines = (person @ person.T)[one, two]
    same = (names[one] == names[two])[np.argsort(-cosines, kind="stable")]
    accepted = np.concatenate([[0.0], np.cumsum(same) / same.sum()])
    mistaken = np.concatenate([[0.0], np.cumsum(~same) / (~same).sum()])
    area = float(np.sum(np.diff(mistaken) * (accepted[1:] + accepted[:-1]) / 2))
    at = int(np.argmin(np.abs(mistaken - (1 - accepted))))
    return area, float((mistaken[at] + 1 - accepted[at]) / 2)


def main() -> None:
    parser = argparse.ArgumentParser(description="Train the guide that training listens to.")
    parser.add_argument("recipe", type=Path)
    recipe = GuideRecipe.load(parser.parse_args().recipe)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    torch.set_num_threads(recipe.threads)
    cv2.setNumThreads(recipe.threads)
    pool = Pool.open(recipe.pool)
    start = time.monotonic()
    guide = train(recipe, pool)
    notes: dict[str, Any] = {
        "recipe": dataclasses.asdict(recipe), "seconds": round(time.monotonic() - start)
    }  # fmt: skip
    save_guide(recipe.weights, guide, notes)
    # Measured as it was saved: in half precision.
    guide, _ = open_guide(recipe.weights)
    notes["own_errors"] = errors(guide, pool, recipe.held_out)
    save_guide(recipe.weights, guide, notes)
    LOG.info("%s: %s", recipe.weights, json.dumps(notes["own_errors"]))


if __name__ == "__main__":
    main()
