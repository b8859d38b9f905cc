"""How good the networks are on held-out people: PSNR by kind of picture, and a sheet to look at."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor

from diffusionact.evaluation.metrics import psnr
from diffusionact.training.config import Recipe
from diffusionact.training.dataset import Dataset, Frames
from diffusionact.training.diffusion import from_z_alone, invert, render, to_batch, to_pixels
from diffusionact.training.state import State

U8 = npt.NDArray[np.uint8]

INVERSION_STEPS = 20
COLUMNS = 8
LABEL_PX = 190
FEATURES = (2, 3, 4)  # eyes, mouth, brows in the renderer's labels
FEATURE_POINTS = (slice(17, 22), slice(22, 27), slice(36, 42), slice(42, 48), slice(48, 60))


@dataclass(frozen=True)
class Pairs:
    """Fixed held-out pairs: source, target, their drawings own and condition uint8 [N,S,S,3] RGB;
    features bool [N,S,S], where the target has eyes, mouth and brows; noise float32 [N,3,S,S]."""

    source: U8
    target: U8
    own: U8
    condition: U8
    features: npt.NDArray[np.bool_]
    noise: npt.NDArray[np.float32]


def held_out_pairs(pool: Dataset, held_out: int, count: int) -> Pairs:
    """Returns `count` pairs of different frames, of one clip, of the last `held_out` people."""
    rng = np.random.default_rng(0)
    identity = pool.identities - held_out + np.arange(count) % held_out
    source = rng.integers(pool.count(identity), size=count)
    first, length = pool.span(identity, source)
    step = rng.integers(1, np.maximum(length, 2), size=count)
    target = first + (source - first + step) % length
    noise = rng.standard_normal((count, 3, pool.size, pool.size), dtype=np.float32)
    frames = pool.gather(identity, target)
    return Pairs(
        source=pool.pictures(identity, source),
        target=frames.images,
        own=pool.draw(identity, source),
        condition=pool.draw(identity, target),
        features=_features(frames),
        noise=noise,
    )


def _features(frames: Frames) -> npt.NDArray[np.bool_]:
    """Where eyes, mouth and brows are: by the labels, else within their landmarks."""
    if frames.labels is not None:
        return np.isin(frames.labels, FEATURES)
    masks = np.zeros(frames.images.shape[:3], np.uint8)
    for mask, points in zip(masks, frames.points, strict=True):
        for part in FEATURE_POINTS:
            outline = np.rint(points[part, :2]).astype(np.int32)
            cv2.fillConvexPoly(mask, cv2.convexHull(outline), 1)
    return masks > 0


@torch.no_grad()
def teacher_pictures(
    state: State, pairs: Pairs, device: torch.device, *, reenact: bool
) -> dict[str, U8]:
    """Returns the rows of a teacher's sheet by name, each uint8 [N,S,S,3] RGB."""
    unet, kind = state.ema["unet"], state.config.prediction
    source, target = to_batch(pairs.source, device), to_batch(pairs.target, device)
    noise = torch.from_numpy(pairs.noise).to(device)
    z_s, z_t = state.ema["encoder"](source).float(), state.ema["encoder"](target).float()
    x_T = invert(unet, kind, source, z_s, INVERSION_STEPS)
    rows: dict[str, Tensor] = {}
    for steps in (20, 8, 4):
        rows[f"reconstruction T={steps}"] = render(unet, kind, x_T, z_s, steps)
    rows["random x_T T=20"] = render(unet, kind, noise, z_s, 20)
    rows["z only"] = from_z_alone(unet, kind, noise, z_t)
    for steps in (20, 4):
        rows[f"oracle T={steps}"] = render(unet, kind, x_T, z_t, steps)
    if reenact:
        condition = to_batch(pairs.condition, device)
        z_r = state.ema["reenactment"](source, condition).float()
        for steps in (20, 4):
            rows[f"reenactment T={steps}"] = render(unet, kind, x_T, z_r, steps)
    return {name: to_pixels(row) for name, row in rows.items()}


@torch.no_grad()
def runtime_pictures(
    state: State, pairs: Pairs, device: torch.device, recipe: Recipe,
    runs: Mapping[str, int | Sequence[int]],
) -> dict[str, U8]:  # fmt: skip
    """Returns the rows of a sheet inverted and rendered as the runtime will do it, for each run: its
    name, and its count of steps or timesteps."""
    unet, kind = state.ema["unet"], state.config.prediction
    encode = state.ema["reenactment"]
    source = to_batch(pairs.source, device)
    z_s = encode(source, to_batch(pairs.own, device)).float()
    z_r = encode(source, to_batch(pairs.condition, device)).float()
    x_T = invert(state.inverter, kind, source, z_s, recipe.inversions.steps)
    rows: dict[str, Tensor] = {}
    for name, z in (("reconstruction", z_s), ("reenactment", z_r)):
        for count, steps in runs.items():
            rows[f"{name} T={count}"] = render(unet, kind, x_T, z, steps)
    return {name: to_pixels(row) for name, row in rows.items()}


def scores(rows: dict[str, U8], pairs: Pairs) -> dict[str, float]:
    """Returns mean PSNR in dB by row, against the source for reconstructions and the target for
    the rest; `... features` counts only eyes, mouth and brows of the target."""
    result = {}
    for name, row in {"copy": pairs.source, **rows}.items():
        from_source = name.startswith(("reconstruction", "random"))
        wanted = pairs.source if from_source else pairs.target
        result[name] = float(np.mean([psnr(a, b) for a, b in zip(wanted, row, strict=True)]))
        if not from_source:
            error = (wanted.astype(np.float64) - row) ** 2
            mean = error[pairs.features].mean() if pairs.features.any() else np.nan
            result[f"{name} features"] = float(10 * np.log10(255**2 / max(mean, 1e-9)))
    return {name: round(value, 2) for name, value in result.items()}


def write_sheet(path: Path, rows: dict[str, U8], pairs: Pairs, psnrs: dict[str, float]) -> U8:
    """Returns the sheet, uint8 [H,W,3] RGB, written as a PNG: one row per kind of picture, its name
    and PSNR at the left."""
    strips = []
    for name, row in {"source": pairs.source, **rows, "target": pairs.target,
                      "condition": pairs.condition}.items():  # fmt: skip
        label = np.full((row.shape[1], LABEL_PX, 3), 255, np.uint8)
        cv2.putText(label, name, (4, 30), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1, cv2.LINE_AA)
        if name in psnrs:
            text = f"{psnrs[name]:.1f} dB"
            cv2.putText(label, text, (4, 55), cv2.FONT_HERSHEY_SIMPLEX, 0.5, (0, 0, 0), 1,
                        cv2.LINE_AA)  # fmt: skip
        strips.append(np.concatenate([label, *row[:COLUMNS]], axis=1))
    sheet = np.concatenate(strips)
    part = path.with_name(f".part-{path.name}")
    cv2.imwrite(str(part), cv2.cvtColor(sheet, cv2.COLOR_RGB2BGR))
    os.replace(part, path)
    return sheet
