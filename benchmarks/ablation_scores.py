"""What a small model of the ablations is worth: held-out people reconstructed and reenacted, and
read by the judge of the shipped model, which no training listens to, in pictures enlarged to its
size."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusionact.evaluation import metrics
from diffusionact.training import weights
from diffusionact.training.data import Pool
from diffusionact.training.diffusion import invert, render, to_batch, to_pixels
from diffusionact.training.judges import Truth, gather
from diffusionact.training.models.judge import Judge

CPU = torch.device("cpu")
BATCH = 64
INVERT_STEPS, RENDER_STEPS = 10, 20  # of models that are no students
Steps = int | list[int]

# Measure -> whether more is better; the unit stands in the name.
MEASURES = {
    "reconstruction_psnr_db": True, "reconstruction_perceptual": False, "psnr_db": True,
    "perceptual": False, "landmark_nme": False, "pose_deg": False, "gaze_px": False,
    "expression": False,
}  # fmt: skip


@dataclass(frozen=True)
class Trial:
    """Held-out people: a source and a target each, and the drawings of both; what is seen in
    them, in the pixels of pictures enlarged for the judge."""

    source: Truth
    target: Truth
    own: NDArray[np.uint8]
    wanted: NDArray[np.uint8]


def trial(pool: Pool, held_out: int, side: int) -> Trial:
    """Every held-out person twice: from the first frame to the second, from the third to the
    fourth. side: of the judge's pictures."""
    people = np.repeat(np.arange(pool.identities - held_out, pool.identities), 2)
    first = np.tile([0, 2], held_out)
    return Trial(
        source=_at(gather(pool, people, first), side),
        target=_at(gather(pool, people, first + 1), side),
        own=pool.draw(people, first),
        wanted=pool.draw(people, first + 1),
    )


def _at(truth: Truth, side: int) -> Truth:
    """The truth with points as in pictures enlarged to `side`."""
    factor = side / truth.images.shape[1]
    points, gaze = ((p + 0.5) * factor - 0.5 for p in (truth.points, truth.gaze))
    return dataclasses.replace(truth, points=points, gaze=gaze)


def enlarged(images: NDArray[np.uint8], side: int) -> NDArray[np.uint8]:
    """Pictures uint8 [N,side,side,3] of smaller ones."""
    large = [cv2.resize(image, (side, side), interpolation=cv2.INTER_CUBIC) for image in images]
    return np.asarray(large, np.uint8)


@torch.inference_mode()
def made_by(
    path: Path, given: Trial, inversion: Steps = INVERT_STEPS, steps: Steps = RENDER_STEPS
) -> tuple[NDArray[np.uint8], NDArray[np.uint8]]:
    """Reconstructions and reenactments, uint8 [N,S,S,3] each, by the weights in a file."""
    content = weights.load(path)
    parts = {name: content.network(name) for name in content.parts}
    unet, encoder, kind = parts["render"], parts["reenactment"], content.config.prediction
    rows: tuple[list[Any], list[Any]] = ([], [])
    for start in range(0, len(given.own), BATCH):
        part = slice(start, start + BATCH)
        source = to_batch(given.source.images[part], CPU)
        with torch.autocast("cpu", torch.bfloat16):
            z_s, z_r = (encoder(source, to_batch(drawing[part], CPU)).float()
                        for drawing in (given.own, given.wanted))  # fmt: skip
            x_T = invert(parts.get("invert", unet), kind, source, z_s, inversion)
            for row, z in zip(rows, (z_s, z_r), strict=True):
                row.append(to_pixels(render(unet, kind, x_T, z, steps)))
    return np.concatenate(rows[0]), np.concatenate(rows[1])


def scores(
    judge: Judge, given: Trial, made: tuple[NDArray[np.uint8], NDArray[np.uint8]]
) -> dict[str, float]:
    """Every measure of the pictures, the mean over the people. Pose is the mean error of the
    three angles (APD); expression the mean error of the openings of mouth and eyes."""
    again, moved = made
    target = given.target
    side = judge.config.image_size
    seen = judge.read(enlarged(moved, side))
    mouth = metrics.mouth_opening(seen.points) - metrics.mouth_opening(target.points)
    eyes = metrics.eye_opening(seen.points) - metrics.eye_opening(target.points)
    return {
        "reconstruction_psnr_db": _psnr(given.source.images, again),
        "reconstruction_perceptual": perceptual(judge, given.source.images, again),
        "psnr_db": _psnr(target.images, moved),
        "perceptual": perceptual(judge, target.images, moved),
        "landmark_nme": metrics.landmark_nme(seen.points, target.points),
        "pose_deg": metrics.pose_error(seen.pose, target.pose),
        "gaze_px": metrics.gaze_error(seen.gaze, seen.points, target.gaze, target.points),
        "expression": float((np.abs(mouth).mean() + np.abs(eyes).mean()) / 2),
    }


@torch.inference_mode()
def perceptual(judge: Judge, a: NDArray[np.uint8], b: NDArray[np.uint8]) -> float:
    """How far pictures are apart in the judge's features: the mean over depths and places of
    |u - v|^2 of feature vectors of length 1. Source: Zhang et al. 2018, Eq. 1, with w = 1."""
    judge.eval()
    rows = []
    for start in range(0, len(a), BATCH):
        part = [
            enlarged(images[start : start + BATCH], judge.config.image_size) for images in (a, b)
        ]
        maps: list[tuple[Tensor, ...]] = [judge.features(to_batch(p, CPU)) for p in part]
        apart = [
            (_unit(u) - _unit(v)).square().sum(1).mean((1, 2)) for u, v in zip(*maps, strict=True)
        ]
        rows.append(torch.stack(apart).mean(0))
    return float(torch.cat(rows).mean())


def _unit(features: Tensor) -> Tensor:
    return features / (features.norm(dim=1, keepdim=True) + 1e-10)


def _psnr(wanted: NDArray[np.uint8], made: NDArray[np.uint8]) -> float:
    return float(np.mean([metrics.psnr(a, b) for a, b in zip(wanted, made, strict=True)]))
