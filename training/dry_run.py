"""What a run will take, told by a few steps of each stage: nothing is kept of them."""

from __future__ import annotations

import math
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import torch

from diffusionact.training.config import PoolRecipe, Recipe, StageRecipe, load_recipe
from diffusionact.training.data import PairSampler, Prefetcher, render_pool
from diffusionact.training.loop import Trainer, choose_device
from diffusionact.training.memory import (
    bytes_of,
    forget_peak,
    give_back,
    peak_bytes,
    used_bytes,
)
from diffusionact.training.pace import Clock
from diffusionact.training.stages import STAGES
from diffusionact.training.world import join_world

STEPS = 3  # timed, after one that is not
PAIRS = 2  # of a sample sheet
PEOPLE = 8  # rendered for it, where the recipe's faces are not there yet
FRAMES = 2


@dataclass(frozen=True)
class StageCost:
    """What one stage will take. Memory is of one process: `fixed_bytes` for networks, averages and
    optimiser, `sample_bytes` more for each of the `samples` that it works on at once; both None
    where the system does not tell. `seconds` is all of it: steps, inversions and sample sheets."""

    kind: str
    batch: int
    samples: int
    steps: int
    step_seconds: float
    images_per_s: float
    inversion_seconds: float
    sheet_seconds: float
    fixed_bytes: int | None
    sample_bytes: int | None
    seconds: float


@dataclass(frozen=True)
class RunCost:
    """What the run will take; `render_seconds` for the faces that are not rendered yet."""

    device: str
    processes: int
    stages: list[StageCost]
    render_seconds: float

    @property
    def seconds(self) -> float:
        """All of it."""
        return self.render_seconds + sum(stage.seconds for stage in self.stages)

    def table(self) -> str:
        """Returns it as text, a line a stage."""
        lines = [f"{'stage':<14}{'batch':>6}{'images/s':>10}{'steps':>9}{'fixed':>10}"
                 f"{'a sample':>10}{'a process':>11}{'time':>11}"]  # fmt: skip
        for s in self.stages:
            whole = None
            if s.fixed_bytes is not None and s.sample_bytes is not None:
                whole = s.fixed_bytes + s.samples * s.sample_bytes
            lines.append(
                f"{s.kind:<14}{s.batch:>6}{s.images_per_s:>10.1f}{s.steps:>9}"
                f"{_megabytes(s.fixed_bytes):>10}{_megabytes(s.sample_bytes):>10}"
                f"{_megabytes(whole):>11}{_duration(s.seconds):>11}"
            )
        if self.render_seconds:
            lines.append(f"the faces are not rendered yet: {_duration(self.render_seconds)}")
        lines.append(f"{_duration(self.seconds)} on {self.device}, processes: {self.processes}")
        return "\n".join(lines)


def dry_run(recipe_path: str | Path, *, device: str = "auto", steps: int = STEPS) -> RunCost | None:
    """Returns what the run of a recipe will take, measured on this machine as it is now; None in
    all but the first of several processes. Raises: as `train`."""
    recipe = load_recipe(recipe_path)
    bare = replace(
        recipe,
        loop=replace(
            recipe.loop,
            evaluation_pairs=min(PAIRS, recipe.loop.evaluation_pairs),
            tensorboard=False,
        ),
        inversions=replace(recipe.inversions, folder=""),
    )
    with (
        join_world(choose_device(device), bf16=recipe.loop.bf16) as world,
        TemporaryDirectory() as folder,
    ):
        bare, seconds = _with_faces(bare, Path(folder) / "pool")
        trainer = Trainer(bare, Path(folder) / "run", world)
        stages = [_stage_cost(trainer, place, recipe, steps) for place in range(len(bare.stages))]
        cost = RunCost(str(world.device), world.size, stages, seconds)
    return cost if world.first else None


def _with_faces(recipe: Recipe, folder: Path) -> tuple[Recipe, float]:
    """The recipe with faces that are there, and how long its own will take to render, if any."""
    pool = recipe.pool
    if not isinstance(pool, PoolRecipe) or (Path(pool.folder) / "meta.json").exists():
        return recipe, 0.0
    few = replace(pool, folder=str(folder), identities=PEOPLE, frames=FRAMES, held_out=1)
    start = time.monotonic()
    render_pool(folder, identities=few.identities, frames=few.frames, size=few.size, seed=few.seed)
    share = pool.identities * pool.frames / (few.identities * few.frames)
    return replace(recipe, pool=few), share * (time.monotonic() - start)


def _stage_cost(trainer: Trainer, place: int, recipe: Recipe, steps: int) -> StageCost:
    """Runs a few steps of stage number `place` of the trainer's recipe, as the run would."""
    stage, progress = trainer.recipe.stages[place], trainer.state.progress
    trainer.state.optimizer = None
    progress.stage, progress.step, progress.images, progress.seconds = place, 0, 0, 0.0
    give_back(trainer.device)
    before = used_bytes(trainer.device)
    trainer._begin(stage)
    inversion = _inversion_seconds(trainer, stage)
    sampler = PairSampler(
        trainer.pool,
        trainer.identities,
        stage,
        trainer.cache,
        (recipe.seed, place),
        trainer.world.share,
    )
    batches = Prefetcher(sampler, 0)
    try:
        forget_peak(trainer.device)
        batch = next(batches)
        trainer._step(stage, batch, Clock(0.0))
        peak = peak_bytes(trainer.device)
        same = [batch] * steps if trainer.sources is not None else None  # their noise is made now
        times = [
            _timed(lambda: trainer._step(stage, same.pop() if same else next(batches), Clock(0.0)))
            for _ in range(steps)
        ]
    finally:
        batches.close()
    sheet = _sheet_seconds(trainer, recipe, stage)
    step = sorted(times)[len(times) // 2]
    count = math.ceil(stage.images / stage.batch)
    seconds = count * step + _inversions(trainer, stage, count) * inversion
    seconds += sheet * seconds / (60 * (recipe.loop.sheet_minutes or math.inf))
    if stage.minutes is not None:
        count = min(count, round(count * 60 * stage.minutes / seconds))
        seconds = min(seconds, 60 * stage.minutes)
    fixed, sample = _memory(trainer, stage, before, peak)
    return StageCost(
        kind=stage.kind, batch=stage.batch, samples=_at_once(trainer, stage), steps=count,
        step_seconds=step, images_per_s=stage.batch / step, inversion_seconds=inversion,
        sheet_seconds=sheet, fixed_bytes=fixed, sample_bytes=sample, seconds=seconds + sheet,
    )  # fmt: skip


def _timed(work: Callable[[], object]) -> float:
    start = time.monotonic()
    work()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.monotonic() - start


def _sheet_seconds(trainer: Trainer, recipe: Recipe, stage: StageRecipe) -> float:
    """Seconds of a sample sheet, by a few of its pairs; the first time a library makes its plans."""
    if recipe.loop.sheet_minutes <= 0:
        return 0.0
    pictures = STAGES[stage.kind].pictures
    seconds = [
        _timed(lambda: pictures(trainer.state, trainer.pairs, trainer.device, trainer.recipe))
        for _ in range(2)
    ]
    return seconds[-1] * recipe.loop.evaluation_pairs / trainer.recipe.loop.evaluation_pairs


def _inversion_seconds(trainer: Trainer, stage: StageRecipe) -> float:
    """Seconds of one inversion: of a batch for the ring, of one source where each has its own."""
    if trainer.sources is not None:
        one = np.zeros(1, np.int64)
        return _timed(lambda: trainer.sources(trainer.pool.pictures(one, one)))  # type: ignore[misc]
    if STAGES[stage.kind].NOISE != "ring" or stage.cached_noise == 0:
        return 0.0
    return _timed(lambda: trainer._invert(stage, 0))


def _inversions(trainer: Trainer, stage: StageRecipe, steps: int) -> float:
    """How many there will be in so many steps."""
    if trainer.sources is not None:
        people = np.arange(trainer.identities)
        frames = np.broadcast_to(trainer.pool.count(people), people.shape).sum()
        return float(min(frames, steps * stage.batch)) / trainer.world.size
    recipe = trainer.recipe.inversions
    fill = min(recipe.fill, recipe.capacity) / recipe.batch
    return fill + steps * (1 - stage.cached_from) / recipe.every


def _at_once(trainer: Trainer, stage: StageRecipe) -> int:
    return stage.batch // (trainer.world.size * stage.accumulate)


def _memory(
    trainer: Trainer, stage: StageRecipe, before: int | None, peak: int | None
) -> tuple[int | None, int | None]:
    """(fixed, of a sample): what was in use before the first step, with the gradients and the
    optimiser's memory, which came in it; and what the peak was above that, by samples."""
    optimizer = trainer.state.optimizer
    if before is None or peak is None or optimizer is None:
        return None, None
    moved = [p for group in optimizer.param_groups for p in group["params"] if p.requires_grad]
    memory = [v for kept in optimizer.state.values() for v in kept.values()]
    fixed = before + bytes_of(moved) + bytes_of(memory)
    return fixed, max(peak - fixed, 0) // _at_once(trainer, stage)


def _megabytes(count: int | None) -> str:
    return "-" if count is None else f"{count / 1e6:.0f} MB"


def _duration(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.0f} s"
    if seconds < 90 * 60:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
