"""The training loop: stages, learning rate, averages, checkpoints, curves and sample sheets."""

from __future__ import annotations

import argparse
import contextlib
import logging
import math
import signal
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from diffusionact.errors import DeviceError, DiffusionActError, SettingsError
from diffusionact.schedule import inversion_timesteps
from diffusionact.training import savepoints
from diffusionact.training.config import Recipe, StageRecipe, load_recipe
from diffusionact.training.critics import open_critics
from diffusionact.training.curves import Curves
from diffusionact.training.data import Batch, PairSampler, Prefetcher
from diffusionact.training.dataset import Dataset, training_people
from diffusionact.training.diffusion import invert, to_batch
from diffusionact.training.distill import check_students
from diffusionact.training.finish import finish, weights_path
from diffusionact.training.gather import gathered
from diffusionact.training.inversions import AHEAD, InversionCache
from diffusionact.training.inverted_sources import inverted_sources
from diffusionact.training.losses import HeadTargets, head_targets
from diffusionact.training.memory import forget_peak
from diffusionact.training.models import fused_norm
from diffusionact.training.objective import Objective
from diffusionact.training.optimizers import make_optimizer
from diffusionact.training.pace import Clock, fraction, rate
from diffusionact.training.shards import open_dataset
from diffusionact.training.share import Share
from diffusionact.training.sheets import held_out_pairs, scores, write_sheet
from diffusionact.training.stages import STAGES, begin_stage, trained
from diffusionact.training.stages.sample import Sample, part_of, to_sample
from diffusionact.training.state import State
from diffusionact.training.world import World, alone, join_world

log = logging.getLogger(__name__)

STATISTICS_FRAMES = 4096  # how many frames set the mean and scale of the heads' targets
INVERSION_STREAM = 1 << 20  # keeps the random streams of batches and of inverted sources apart


def train(
    recipe_path: str | Path, *, resume: bool = False, out: str | Path | None = None,
    device: str = "auto", minutes: float | None = None,
) -> Path:  # fmt: skip
    """Returns the folder of the run, after training all stages of the recipe, or up to a stop
    signal; `resume` goes on from its last checkpoint. With `minutes` it ends after them with a
    checkpoint, and the same call goes on, `resume` or not. Under torchrun every process works on its
    part of each batch, and all take the mean of their gradients.

    Raises:
        SettingsError: the recipe, pool or checkpoint does not fit, or the folder is another run's.
        DeviceError: the device is not there.
    """
    recipe = load_recipe(recipe_path)
    folder = _folder(recipe, out)
    ends_s = math.inf if minutes is None else time.monotonic() + 60 * minutes
    if minutes is not None:
        resume = savepoints.newest(folder) is not None
    if not resume and (found := savepoints.newest(folder)):
        raise SettingsError(
            f"{found} is the checkpoint of another run, which a new one would overwrite; go on "
            "with it by --resume, or name another folder with -o"
        )
    with join_world(choose_device(device), bf16=recipe.loop.bf16) as world:
        trainer = Trainer(recipe, folder, world)
        trainer.ends_s = ends_s
        if resume:
            trainer.resume()
        if trainer.run() and world.first:
            finish(trainer.state, recipe, weights_path(recipe, folder))
    return folder


def finish_early(recipe_path: str | Path, out: str | Path | None = None) -> Path:
    """Returns the weights file of a run that was cut short, written from its last checkpoint.

    Raises:
        SettingsError: there is no checkpoint, or the last stage has not begun in it.
    """
    recipe = load_recipe(recipe_path)
    folder = _folder(recipe, out)
    trainer = Trainer(recipe, folder, alone(torch.device("cpu")))
    trainer.resume()
    progress, last = trainer.state.progress, len(recipe.stages) - 1
    if (progress.stage, progress.step) <= (last, 0):
        raise SettingsError(
            f"{folder}: the checkpoint is at stage {progress.stage + 1} of {last + 1}, step "
            f"{progress.step}: some networks are not trained at all; go on with --resume"
        )
    path = weights_path(recipe, folder)
    finish(trainer.state, recipe, path)
    return path


def _folder(recipe: Recipe, out: str | Path | None) -> Path:
    return Path(out) if out is not None else Path("runs") / recipe.name


def choose_device(name: str) -> torch.device:
    """Returns the device for 'auto', 'cpu' or 'cuda'."""
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name == "cuda" and not torch.cuda.is_available():
        raise DeviceError("device 'cuda' asked for, but torch sees no GPU; use --device cpu")
    return torch.device(name)


class TrainingDiverged(DiffusionActError):
    """A loss or gradient is no longer a finite number."""


class Trainer:
    """One run in a folder: checkpoints, curves, sheets."""

    def __init__(self, recipe: Recipe, folder: Path, world: World) -> None:
        self.recipe, self.folder, self.world, self.device = recipe, folder, world, world.device
        self.pool = open_dataset(recipe.pool)
        self.identities = training_people(self.pool, recipe.pool.held_out)
        self.state = State(recipe, _statistics(self.pool, self.identities), self.device)
        check_students(recipe, self.state.config.prediction)
        if isinstance(steps := recipe.inversions.steps, int):
            # An impossible count is an error now, not in stage (c).
            inversion_timesteps(self.state.config.prediction, steps)
        if any(STAGES[stage.kind].CRITICS for stage in recipe.stages):
            first = self.pool.gather(np.zeros(1, np.int64), np.zeros(1, np.int64))
            masks = first.labels is not None or first.mask is not None
            self.state.critics = open_critics(recipe.critics, recipe.criteria, self.device, masks)
        self.pairs = held_out_pairs(self.pool, recipe.pool.held_out, recipe.loop.evaluation_pairs)
        self.stop = self.asked_to_stop = False
        self.ends_s = math.inf  # when to stop, on the monotonic clock
        self._resumed: dict[str, Any] = {}  # the record of the checkpoint, until its stage begins
        folder.mkdir(parents=True, exist_ok=True)
        self.curves: Curves | None = None
        self.cache = self._empty_ring()
        if recipe.loop.fused_norm and self.device.type == "cpu":
            fused_norm.enable()
        if recipe.loop.compile:
            for name in ("unet", "encoder", "reenactment"):
                self.state.live[name].compile(dynamic=False)

    def resume(self) -> None:
        """Goes back to the last checkpoint of the folder."""
        path = savepoints.newest(self.folder)
        if path is None:
            raise SettingsError(f"no checkpoint in {self.folder} to resume; run without --resume")
        self._resumed = self.state.load(path, self.recipe)

    def run(self) -> bool:
        """Trains the stages that are left; True when all are done, False when stopped."""
        with self._signals(), contextlib.ExitStack() as stack:
            if self.world.first:
                self.curves = stack.enter_context(self._open_curves())
            while self.state.progress.stage < len(self.recipe.stages):
                stage = self.recipe.stages[self.state.progress.stage]
                self._begin(stage)
                self._run_stage(stage)
                if self.stop:
                    self.save()
                    done = fraction(stage, self.state)
                    log.info(
                        "stopped in stage %d of %d, %.0f %% of it done; --resume goes on",
                        self.state.progress.stage + 1, len(self.recipe.stages), 100 * done,
                    )  # fmt: skip
                    return False
                self.sheet(stage)
                if self.curves is not None:
                    self.curves.stage_is_over(stage.kind, self.state.progress)
                self.state.restart_from_average()
                self.state.progress.next_stage()
                self.state.optimizer, self.cache = None, self._empty_ring()
                self.save()
        return True

    def _begin(self, stage: StageRecipe) -> None:
        self._check_split("batch", stage.batch, self.world.size * stage.accumulate)
        self._check_split("[inversions] batch", self.recipe.inversions.batch, self.world.size)
        if STAGES[stage.kind].PAIRS and not self.state.has_reenactment:
            self.state.start_reenactment(stage.drawing_gain)
        begin_stage(self.state, self.recipe, stage)
        optimizer = make_optimizer(self.state, stage)
        self.state.optimize_with(optimizer)
        objective = Objective(self.state, self.recipe, stage)
        self.objective, self.optimizer = self.world.wrap(objective, optimizer)
        self.cache = self._empty_ring()
        ring = self._resumed.get("ring", savepoints.NO_RING)
        savepoints.restore_ring(self.folder, self.state.progress.stage, ring, self.cache)
        self._resumed = {}
        self.sources = None
        if STAGES[stage.kind].NOISE == "sources":
            self.sources = inverted_sources(self.state, self.recipe, self.folder, self.device)

    def _check_split(self, name: str, batch: int, parts: int) -> None:
        if batch % (2 * parts) and parts > 1:
            raise SettingsError(
                f"{name} = {batch}, wanted a multiple of {2 * parts}: it is split into {parts} "
                f"parts of even length, for {self.world.size} processes"
            )

    def _run_stage(self, stage: StageRecipe) -> None:
        seed, share = (self.recipe.seed, self.state.progress.stage), self.world.share
        sampler = PairSampler(self.pool, self.identities, stage, self.cache, seed, share)
        batches = Prefetcher(sampler, self.state.progress.step)
        clock = Clock(self.state.progress.seconds)
        forget_peak(self.device)
        if self.curves is not None:
            self.curves.begin(self.state.progress.seen)
        saved = sheeted = time.monotonic()
        try:
            while not self.stop and fraction(stage, self.state) < 1:
                self._refresh(stage)
                parts = self._step(stage, next(batches), clock)
                if self.curves is not None:
                    over = fraction(stage, self.state)
                    self.curves.add(stage.kind, self.state.progress, over, parts)
                now = time.monotonic()
                if now - sheeted > 60 * self.recipe.loop.sheet_minutes:
                    self.sheet(stage)
                    sheeted = time.monotonic()
                if now - saved > 60 * self.recipe.loop.checkpoint_minutes:
                    self.save()
                    saved = time.monotonic()
        finally:
            batches.close()

    def _step(self, stage: StageRecipe, batch: Batch, clock: Clock) -> dict[str, float]:
        """Returns the parts of the loss, after one step of the optimiser on the whole batch."""
        state, progress, optimizer = self.state, self.state.progress, self.optimizer
        share_of_lr = rate(stage, state)
        for group in optimizer.param_groups:
            group["lr"] = group["base_lr"] * share_of_lr
        over, generator = fraction(stage, state), self._generator()
        if self.sources is not None:
            assert batch.source is not None
            batch = replace(batch, noise=self.sources(batch.source))
        sample = to_sample(batch, self.recipe, stage, generator, over, self.world.share)
        optimizer.zero_grad(set_to_none=True)
        losses = self._gradients(stage, sample)
        asked = float(self.asked_to_stop or time.monotonic() > self.ends_s)
        parts = self.world.mean({**losses, "seconds": clock.seconds(), "stop": asked})
        progress.seconds, self.stop = parts.pop("seconds"), self.stop or parts.pop("stop") > 0
        parts["lr"] = stage.lr * share_of_lr
        parts["gradient"] = float(self.world.clip(self.objective, optimizer, stage.clip))
        self._finite(parts)
        optimizer.step()
        progress.step += 1
        progress.images += stage.batch
        progress.seen += stage.batch
        decay = min(stage.ema, (1 + progress.step) / (10 + progress.step))
        state.average(decay, trained(stage))
        return parts

    def _gradients(self, stage: StageRecipe, sample: Sample) -> dict[str, Tensor]:
        """Returns the parts of the loss; the gradient of the batch is now in the networks. It is
        worked through in `accumulate` turns, the last of which tells it to the other processes."""
        sums: dict[str, Tensor] = {}
        for turn in range(stage.accumulate):
            rows = Share(turn, stage.accumulate).rows(len(sample.target))
            torch.manual_seed(self._seed(self.world.share.index, turn))  # of dropout
            with self.world.apart(self.objective, turn + 1 < stage.accumulate):
                loss, parts = self.objective(part_of(sample, rows))
                self.world.fabric.backward(loss / stage.accumulate)
            for name, value in parts.items():
                sums[name] = sums.get(name, 0) + value / stage.accumulate
        return sums

    def _finite(self, parts: dict[str, float]) -> None:
        """Ends the run before a bad step spoils the weights or the checkpoint."""
        if not all(math.isfinite(value) for value in parts.values()):
            raise TrainingDiverged(
                f"step {self.state.progress.step}: {parts}, wanted finite numbers; "
                f"the checkpoint in {self.folder} is from before: go on with --resume, lower lr, or "
                "set fused_norm = false in [loop]"
            )

    def _refresh(self, stage: StageRecipe) -> None:
        """Fills and renews the cache of inverted sources, when the stage has come to use it."""
        if STAGES[stage.kind].NOISE != "ring" or stage.cached_noise == 0:
            return
        if fraction(stage, self.state) < stage.cached_from:
            return
        recipe = self.recipe.inversions
        while len(self.cache) < min(recipe.fill, recipe.capacity):
            self._invert(stage, len(self.cache))
        if self.state.progress.step % recipe.every == 0:
            self._invert(stage, self.state.progress.step + recipe.capacity)

    @torch.no_grad()
    def _invert(self, stage: StageRecipe, index: int) -> None:
        recipe, pool, ema = self.recipe.inversions, self.pool, self.state.ema
        stream = (self.recipe.seed, self.state.progress.stage, INVERSION_STREAM + index)
        rng = np.random.default_rng(stream)
        identity = rng.integers(self.identities, size=recipe.batch)
        frame = rng.integers(pool.count(identity), size=recipe.batch)
        mine = self.world.share.rows(recipe.batch)
        source = to_batch(pool.pictures(identity[mine], frame[mine]), self.device)
        with self._autocast():
            if STAGES[stage.kind].PAIRS:
                drawing = to_batch(pool.draw(identity[mine], frame[mine]), self.device)
                z = ema["reenactment"](source, drawing).float()
            else:
                z = ema["encoder"](source).float()
            unet = ema["inverter" if "inverter" in ema else "unet"]
            x_T = invert(unet, self.state.config.prediction, source, z, recipe.steps)
        noise = gathered(x_T.half()).cpu().numpy()
        self.cache.add(noise, identity, frame, self.state.progress.step)

    def sheet(self, stage: StageRecipe) -> dict[str, float]:
        """Writes a sample sheet, logs its PSNRs and returns them; one process does it for all."""
        if not self.world.first or self.recipe.loop.sheet_minutes <= 0:
            return {}
        with self._autocast():
            rows = STAGES[stage.kind].pictures(self.state, self.pairs, self.device, self.recipe)
        if not rows:
            return {}
        psnrs = scores(rows, self.pairs)
        name = f"{self.state.progress.stage}-{stage.kind}-{self.state.progress.images:08d}"
        picture = write_sheet(self.folder / f"sheet-{name}.png", rows, self.pairs, psnrs)
        if self.curves is not None:
            self.curves.sheet(name, psnrs, picture, self.state.progress.seen)
        return psnrs

    def save(self) -> None:
        """Writes a checkpoint, and what the inversions' ring took in since the one before."""
        if not self.world.first:
            return
        record, progress = self.state.record(self.recipe), self.state.progress
        record["curves"] = self.curves.record() if self.curves else None
        record["ring"] = savepoints.save_ring(self.folder, progress.stage, self.cache)
        path = savepoints.path_of(self.folder, progress.stage, progress.step)
        savepoints.write(path, self.state.tensors(), record)
        savepoints.thin_out(self.folder, self.recipe.loop.keep_checkpoints)

    def _open_curves(self) -> Curves:
        loop = self.recipe.loop
        curves = Curves(self.folder, loop.log_every_steps, self.device, board=loop.tensorboard)
        if self._resumed:
            curves.resume(self._resumed["curves"], self.state.progress.seen)
        return curves

    def _empty_ring(self) -> InversionCache:
        recipe = self.recipe.inversions
        spare = min(recipe.fill, recipe.capacity) + (AHEAD + 1) * recipe.batch
        return InversionCache(recipe.capacity, self.pool.size, spare)

    def _generator(self) -> torch.Generator:
        """The random numbers of this step, the same in an unbroken and a resumed run."""
        return torch.Generator(self.device).manual_seed(self._seed())

    def _seed(self, *more: int) -> int:
        key = (self.recipe.seed, self.state.progress.stage, self.state.progress.step, *more)
        return int(np.random.SeedSequence(key).generate_state(1, np.uint32)[0])

    def _autocast(self) -> contextlib.AbstractContextManager[None]:
        return self.world.fabric.autocast()

    @contextlib.contextmanager
    def _signals(self) -> Iterator[None]:
        """Turns SIGTERM and SIGINT into a checkpoint and a clean end."""

        def ask(number: int, frame: object) -> None:
            self.asked_to_stop = True

        before = {s: signal.signal(s, ask) for s in (signal.SIGTERM, signal.SIGINT)}
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)


def _statistics(pool: Dataset, identities: int) -> HeadTargets:
    """The heads' targets of a sample of the training frames."""
    rng = np.random.default_rng(0)
    identity = rng.integers(identities, size=STATISTICS_FRAMES)
    frame = rng.integers(pool.count(identity), size=STATISTICS_FRAMES)
    return head_targets(*pool.known(identity, frame))


def main() -> None:
    parser = argparse.ArgumentParser(description=train.__doc__)
    parser.add_argument("recipe")
    parser.add_argument("--resume", action="store_true")
    parser.add_argument("--finish", action="store_true", help=finish_early.__doc__)
    parser.add_argument("--dry-run", action="store_true")
    parser.add_argument("-o", "--out")
    parser.add_argument("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.add_argument("--slice", type=float, metavar="MINUTES")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    if arguments.dry_run:
        from diffusionact.training.dry_run import dry_run

        if (cost := dry_run(arguments.recipe, device=arguments.device)) is not None:
            print(cost.table())
    elif arguments.finish:
        finish_early(arguments.recipe, out=arguments.out)
    else:
        train(
            arguments.recipe, resume=arguments.resume, out=arguments.out, device=arguments.device,
            minutes=arguments.slice,
        )  # fmt: skip


if __name__ == "__main__":
    main()
