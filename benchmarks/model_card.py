"""Measures the shipped model on rendered people it never saw, and writes its card.

    python -m benchmarks.model_card --identities 200 --seed 2026

Every identity gives a source and a target picture. The generated frame is read by the judge
(landmarks, gaze, pose) and compared with the exact truth of the target's render, beside three
yardsticks: copying the source; the oracle, which decodes the target's own semantic code from the
source's x_T; and the mean face. Networks run in torch, in batches and full precision; one frame
is made again through the bundle to show that the runtime gives the same.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import platform
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks.card_text import Scores, section, write_section
from diffusionact import manifest as bundles
from diffusionact.condition import Drawing, draw_condition
from diffusionact.evaluation import metrics
from diffusionact.evaluation.rendered import visible_gaze
from diffusionact.files import write_whole
from diffusionact.image import to_tensor
from diffusionact.landmarks import Landmarks
from diffusionact.runtime.loop import open_loop, runs
from diffusionact.schedule import Run, alpha_bars, ddim_step, inversion_run, render_run
from diffusionact.training import faces, weights
from diffusionact.training.diffusion import to_batch, to_pixels
from diffusionact.training.judges import Truth, errors
from diffusionact.training.models.judge import Judge, Reading, load_judge

LOG = logging.getLogger(__name__)

T_INVERT, T_RENDER = 50, 20  # the published step counts, for reconstruction; a student has its own
SHEET_COLUMNS = 12
Pictures = NDArray[np.uint8]


@dataclass(frozen=True)
class Pairs:
    """A source and a target of N people, and the landmarks to draw them from."""

    source: Truth
    target: Truth
    source_landmarks: Sequence[Landmarks]
    target_landmarks: Sequence[Landmarks]


@dataclass(frozen=True)
class Networks:
    """What is measured. `invert` is the U-Net that inverts, often the one that renders."""

    unet: nn.Module
    invert: nn.Module
    encoder: nn.Module
    reenactment: nn.Module


@dataclass(frozen=True)
class Plan:
    """The schedules: the runtime's own, and the published ones for reconstruction."""

    invert: Run
    render: Mapping[int, Run]
    published_invert: Run
    published_render: Run
    drawing: Drawing
    batch: int = 32
    bf16: bool = False  # half the time, for a look

    @property
    def inverts_as_published(self) -> bool:
        """Whether one inversion serves reconstruction and reenactment."""
        return bool(np.array_equal(self.invert.timesteps, self.published_invert.timesteps))


def held_out_pairs(count: int, seed: int, size: int) -> Pairs:
    """Renders `count` people in two motions each. Person i has the random stream (seed, i), as in
    the training pool, whose seed must be another."""
    columns: tuple[list[faces.Rendering], list[faces.Rendering]] = ([], [])
    for index in tqdm(range(count), desc="render", unit="person"):
        rng = np.random.default_rng((seed, index))
        person, camera = faces.scene(faces.sample_identity(rng)), faces.sample_camera(rng)
        for column in columns:
            column.append(faces.render(person, faces.sample_motion(rng), camera, size))
    source, target = (_truth(column) for column in columns)
    landmarks = [[rendering.landmarks for rendering in column] for column in columns]
    return Pairs(source, target, *landmarks)


def _truth(renderings: Sequence[faces.Rendering]) -> Truth:
    points = np.stack([r.landmarks.points[:, :2] for r in renderings])
    gaze = np.stack([r.landmarks.gaze for r in renderings])
    return Truth(
        images=np.stack([r.image for r in renderings]),
        points=points,
        gaze=visible_gaze(gaze, points, np.stack([r.labels for r in renderings])),
        pose=np.stack([r.pose for r in renderings]),
    )


def score(images: NDArray[Any], reading: Reading | Truth, truth: Truth) -> Scores:
    """Every measure of every picture against the truth: name -> float64 [N]."""
    table: dict[str, list[float]] = {}
    for i, image in enumerate(images):
        points, gaze = reading.points[i], reading.gaze[i]
        row = {
            "psnr_db": metrics.psnr(truth.images[i], image),
            "ssim": metrics.ssim(truth.images[i], image),
            "landmark_px": metrics.landmark_error(points, truth.points[i]),
            "landmark_nme": metrics.landmark_nme(points, truth.points[i]),
            "gaze_px": metrics.gaze_error(gaze, points, truth.gaze[i], truth.points[i]),
            "pose_deg": metrics.pose_error(reading.pose[i], truth.pose[i]),
        }
        for name, value in row.items():
            table.setdefault(name, []).append(value)
    return {name: np.array(values) for name, values in table.items()}


def mean_face(seen: Truth, truth: Truth) -> Scores:
    """The scores of one answer for all: the mean picture, landmarks, gaze and pose of `seen`."""
    count = len(truth.images)
    mean = Truth(
        *(
            np.repeat(np.nanmean(column.astype(np.float64), 0, keepdims=True), count, 0)
            for column in (seen.images, seen.points, seen.gaze, seen.pose)
        )
    )
    return score(np.rint(mean.images).astype(np.uint8), mean, truth)


@torch.inference_mode()
def generate(networks: Networks, plan: Plan, pairs: Pairs, seed: int) -> dict[str, Pictures]:
    """Every kind of picture by name, each uint8 [N,S,S,3] RGB."""
    count, size = pairs.source.images.shape[:2]
    noise = np.random.default_rng(seed).standard_normal((count, 3, size, size), np.float32)
    rows: dict[str, list[Pictures]] = {}
    steps = 2 * len(plan.published_invert.steps) + 4 * len(plan.published_render.steps)
    steps += 2 * sum(len(run.steps) for run in plan.render.values())
    steps += 0 if plan.inverts_as_published else len(plan.invert.steps)
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=plan.bf16)
    with autocast, tqdm(total=count * steps, desc="generate", unit="step") as bar:
        for start in range(0, count, plan.batch):
            part = slice(start, start + plan.batch)
            made = _generate(networks, plan, pairs, part, torch.from_numpy(noise[part]), bar.update)
            for name, pictures in made.items():
                rows.setdefault(name, []).append(to_pixels(pictures))
    return {name: np.concatenate(parts) for name, parts in rows.items()}


def _generate(
    networks: Networks,
    plan: Plan,
    pairs: Pairs,
    part: slice,
    noise: Tensor,
    done: Callable[[int], Any],
) -> dict[str, Tensor]:
    device = torch.device("cpu")
    source, target = (to_batch(t.images[part], device) for t in (pairs.source, pairs.target))
    size = source.shape[-1]
    own = to_batch(_drawings(pairs.source_landmarks[part], size, plan.drawing), device)
    wanted = to_batch(_drawings(pairs.target_landmarks[part], size, plan.drawing), device)
    codes = {"semantic": networks.encoder(source), "reenactment": networks.reenactment(source, own)}
    z_t, z_r = networks.encoder(target), networks.reenactment(source, wanted)
    made = {}
    for name, z in codes.items():
        x_T = walk(networks.invert, plan.published_invert, source, z, done)
        for kind, x in (("inverted", x_T), ("random", noise)):
            row = walk(networks.unet, plan.published_render, x, z, done)
            made[f"reconstruction, {name} code, {kind} x_T"] = row
    z = codes["reenactment"]
    if not plan.inverts_as_published:
        x_T = walk(networks.invert, plan.invert, source, z, done)
    for steps, run in plan.render.items():
        made[f"reenactment T={steps}"] = walk(networks.unet, run, x_T, z_r, done)
        made[f"oracle T={steps}"] = walk(networks.unet, run, x_T, z_t, done)
    return made


def walk(
    unet: nn.Module, run: Run, x: Tensor, z: Tensor, done: Callable[[int], Any] = bool
) -> Tensor:
    """The end [N,3,S,S] of a run from x under z, in either direction."""
    for step in run.steps:
        t = torch.full((len(x),), int(run.timesteps[step.row]))
        level, level_to = float(run.alpha_bar[step.row]), float(run.alpha_bar_to[step.row])
        x = ddim_step(run.prediction, x, unet(x, t, z).float(), level, level_to)
        done(len(x))
    return x


def _drawings(landmarks: Sequence[Landmarks], size: int, drawing: Drawing) -> Pictures:
    return np.stack([draw_condition(face, size, drawing) for face in landmarks])


def measure(rows: Mapping[str, Pictures], pairs: Pairs, judge: Judge) -> dict[str, Scores]:
    """The scores of every kind of picture and of the yardsticks; reconstructions against the
    source, all else against the target."""
    table = {
        "copy": score(pairs.source.images, judge.read(pairs.source.images), pairs.target),
        "mean face": mean_face(pairs.source, pairs.target),
    }
    for name, images in rows.items():
        truth = pairs.source if name.startswith("reconstruction") else pairs.target
        table[name] = score(images, judge.read(images), truth)
    return table


@torch.inference_mode()
def runtime_difference(bundle: Path, networks: Networks, plan: Plan, pairs: Pairs) -> float:
    """The largest difference in [-1, 1] units of the runtime's first frame from torch's, each
    from the same x_T."""
    description = bundles.read(bundle)
    size, steps = description.image_size, description.render.steps
    loop = open_loop(bundle, description, steps=steps, backend="ort", device="cpu")
    image = to_tensor(pairs.source.images[0])
    drawing = to_tensor(draw_condition(pairs.target_landmarks[0], size, plan.drawing))
    x_T = np.random.default_rng(0).standard_normal(image.shape, np.float32)
    frame = loop.render(x_T, loop.encode(image, drawing))
    z = networks.reenactment(torch.from_numpy(image), torch.from_numpy(drawing))
    run = runs(description, steps)[0]
    wanted = walk(networks.unet, run, torch.from_numpy(x_T), z)
    return float(np.abs(frame - wanted.numpy()).max())


def write_sheet(path: Path, pairs: Pairs, rows: Mapping[str, Pictures], steps: int) -> None:
    """Writes the PNG of the first people: source, target, reenactment, oracle, reconstruction."""
    strips = {
        "source": pairs.source.images,
        "target": pairs.target.images,
        f"reenactment {steps}": rows[f"reenactment T={steps}"],
        f"oracle {steps}": rows[f"oracle T={steps}"],
        "reconstruction": rows["reconstruction, reenactment code, inverted x_T"],
    }
    lines = []
    for name, images in strips.items():
        label = np.full((images.shape[1], 130, 3), 255, np.uint8)
        cv2.putText(label, name, (4, images.shape[1] // 2), cv2.FONT_HERSHEY_SIMPLEX, 0.45, 0, 1,
                    cv2.LINE_AA)  # fmt: skip
        lines.append(np.concatenate([label, *images[:SHEET_COLUMNS]], axis=1))
    path.parent.mkdir(parents=True, exist_ok=True)
    part = path.with_name(f".part-{path.name}")
    cv2.imwrite(str(part), cv2.cvtColor(np.concatenate(lines), cv2.COLOR_RGB2BGR))
    os.replace(part, path)


def load_networks(checkpoint: Path, teacher: Path | None = None) -> Networks:
    """The networks of a weights file or bundle, in full precision.

    teacher: where the semantic encoder is, which no bundle has and no student changes.
    """
    content = weights.load(checkpoint)
    parts = {part: content.network(part) for part in content.parts}
    if "encoder" not in parts and teacher is not None:
        parts["encoder"] = weights.load(teacher).network("encoder")
    for network in parts.values():
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Networks(
        unet=parts["render"],
        invert=parts.get("invert", parts["render"]),
        encoder=parts["encoder"],
        reenactment=parts["reenactment"],
    )


def plan_of(
    description: bundles.Manifest, steps: Sequence[int], batch: int = 32, bf16: bool = False
) -> Plan:
    """The schedules of a bundle at several step counts."""
    noise, kind = description.schedule, description.prediction
    table = alpha_bars(noise.total, noise.beta_start, noise.beta_end)
    few = description.student_of is not None
    inverts, renders = (None, None) if few else (T_INVERT, T_RENDER)
    return Plan(
        invert=runs(description)[1],
        render={count: runs(description, count)[0] for count in steps},
        published_invert=inversion_run(kind, description.invert_at(inverts), table),
        published_render=render_run(kind, description.render_at(renders), table),
        drawing=description.drawing,
        batch=batch,
        bf16=bf16,
    )


def _teacher(checkpoints: Path) -> Path:
    """The teacher's weights."""
    return checkpoints / "teacher.safetensors"


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description="Measure the shipped model on rendered people it never saw."
    )
    root = Path(__file__).parents[1]
    checkpoints = root / "training" / "checkpoints"
    assets = root / "diffusionact" / "assets"
    parser.add_argument("--bundle", type=Path, default=assets / "face.bundle")
    parser.add_argument("--checkpoint", type=Path, help="weights (default: those of the bundle)")
    parser.add_argument(
        "--teacher", type=Path, default=_teacher(checkpoints), help="has the semantic encoder"
    )
    parser.add_argument("--judge", type=Path, default=checkpoints / "judge.safetensors")
    parser.add_argument("--identities", type=int, default=200)
    parser.add_argument("--seed", type=int, default=2026, help="not the seed of the training pool")
    parser.add_argument("--steps", help="of a render, separated by commas (default: the bundle's)")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--bf16", action="store_true", help="half the time, less exact")
    parser.add_argument("-o", "--card", type=Path, default=assets / "MODEL_CARD.md")
    parser.add_argument(
        "--json", type=Path, default=root / "benchmarks" / "results" / "model_card.json"
    )
    parser.add_argument("--sheet", type=Path, default=root / "out" / "model_card.png")
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    start = time.monotonic()
    description = bundles.read(arguments.bundle)
    networks = load_networks(arguments.checkpoint or arguments.bundle, arguments.teacher)
    judge, notes = load_judge(arguments.judge)
    steps = [int(count) for count in arguments.steps.split(",")] if arguments.steps else []
    steps = steps or list(description.render.counts)
    plan = plan_of(description, steps, arguments.batch, arguments.bf16)
    pairs = held_out_pairs(arguments.identities, arguments.seed, description.image_size)
    difference = runtime_difference(arguments.bundle, networks, plan, pairs)
    rows = generate(networks, plan, pairs, arguments.seed)
    table = measure(rows, pairs, judge)
    facts = {
        "identities": arguments.identities,
        "seed": arguments.seed,
        "steps": steps,
        "precision": "bfloat16" if arguments.bf16 else "float32",
        "invert_steps": len(plan.invert.steps),
        "reconstruction_steps": [
            len(plan.published_invert.steps),
            len(plan.published_render.steps),
        ],
        "weights_sha256": description.weights_sha256,
        "judge_own_error": errors(judge.read(pairs.target.images), pairs.target),
        "judge_training": notes,
        "runtime_max_difference": difference,
        "machine": f"{platform.processor() or platform.machine()}, {os.cpu_count()} cores",
        "seconds": round(time.monotonic() - start),
    }
    text, results = section(table, facts)
    write_section(arguments.card, text)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    write_whole(arguments.json, json.dumps(results, indent=1) + "\n")
    write_sheet(arguments.sheet, pairs, rows, description.render.steps
                if description.render.steps in steps else steps[0])  # fmt: skip
    LOG.info("%s", text)


if __name__ == "__main__":
    main()
