"""The paper's ablations, and the choice of a distillation method, on small pictures.

    python -m benchmarks.small_pool runs/pool runs/pool32
    python -m benchmarks.ablations --seeds 1,2,3        # goes on where it was stopped
    python -m benchmarks.ablations --table              # of what is there, in docs/ablations.md

Each run is a recipe that `diffusionact train` takes as well; finished ones are kept.
"""

from __future__ import annotations

import argparse
import functools
import json
import logging
import math
import sys
import time
from pathlib import Path
from typing import Any

import torch

from benchmarks import ablation_table
from benchmarks.ablation_plan import (
    METHODS,
    Run,
    protocol,
    scaled,
    students,
    to_toml,
    weights_of,
)
from benchmarks.ablation_scores import Trial, made_by, scores, trial
from diffusionact.errors import DiffusionActError
from diffusionact.files import write_whole
from diffusionact.training.data import Pool
from diffusionact.training.loop import train
from diffusionact.training.models.judge import Judge, load_judge
from diffusionact.training.savepoints import PATTERN, newest

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

TEACHER_STEPS = (20, 4, 2)  # one step is a student's: no stride gives it
LOG = logging.getLogger(__name__)
ROOT = Path(__file__).parents[1]
RECIPES = ROOT / "training" / "recipes"
JUDGE = ROOT / "training" / "checkpoints" / "judge.safetensors"


def plan(folder: Path, seeds: list[int], scale: float, minutes: float | None) -> list[Run]:
    """All runs in order, each once: whole seeds first, so that a run cut short has some."""
    base = settings("ablation32")
    ways = {method: settings(f"student32_{method}") for method in METHODS}
    found: dict[str, Run] = {}
    for seed in seeds:
        for run in [*protocol(base, folder, seed), *students(ways, folder, seed)]:
            found.setdefault(run.name, scaled(run, scale, minutes))
    return list(found.values())


def settings(name: str) -> dict[str, Any]:
    """The settings of a recipe of training."""
    return tomllib.loads((RECIPES / f"{name}.toml").read_text(encoding="utf-8"))


def carry_out(run: Run, folder: Path) -> None:
    """Nothing; trains the run, or goes on with it, where it has not left its weights.

    Raises: Stopped when a signal ended it; called again it goes on.
    """
    place, wanted = folder / run.name, weights_of(folder, run.name)
    if wanted.exists():
        return
    start = weights_of(folder, run.start) if run.start else None
    recipe = run.recipe | ({"start": str(start)} if start else {})
    place.mkdir(parents=True, exist_ok=True)
    path = place / "recipe.toml"
    write_whole(path, to_toml(recipe))
    begun, spent = time.monotonic(), time.process_time()
    train(path, resume=newest(place) is not None, out=place)
    if not wanted.exists():
        raise Stopped
    seconds = {"wall": time.monotonic() - begun, "cpu": time.process_time() - spent}
    write_whole(place / "seconds.json", json.dumps(seconds))
    for checkpoint in place.glob(PATTERN):  # 20 MB each
        checkpoint.unlink()


class Stopped(Exception):
    """A signal ended a run, which has saved where it was."""


@functools.cache
def instruments(pool: str, held_out: int) -> tuple[Judge, Trial]:
    """The judge, and the people that are measured on. Raises: SettingsError."""
    judge, _ = load_judge(JUDGE)
    return judge, trial(Pool.open(pool), held_out, judge.config.image_size)


def score(run: Run, folder: Path) -> None:
    """Nothing; writes what a finished run is worth beside its weights."""
    path = folder / run.name / "scores.json"
    if path.exists() or not run.part:
        return
    pool = run.recipe["pool"]
    judge, given = instruments(pool["folder"], pool["held_out"])
    weights_file = weights_of(folder, run.name)
    if run.part == "distillation":
        back, student = run.recipe["inversions"]["steps"], run.recipe["student"]
        table = {count: scores(judge, given, made_by(weights_file, given, back, steps))
                 for count, steps in student["render"].items()}  # fmt: skip
    else:
        table = {"20": scores(judge, given, made_by(weights_file, given))}
    write_whole(path, json.dumps(table, indent=1) + "\n")
    LOG.info("%s: %s", run.name, json.dumps(table))


def yardsticks(folder: Path, judge: Judge, given: Trial, teacher: str) -> None:
    """Nothing; writes what copies of the source, true pictures, and the teacher in few steps are
    worth."""
    source, target = given.source.images, given.target.images
    table = {"copy of the source": {"0": scores(judge, given, (source, source))},
             "true pictures": {"0": scores(judge, given, (source, target))}}  # fmt: skip
    of_teacher = weights_of(folder, teacher)
    if of_teacher.exists():
        table["teacher"] = {
            str(count): scores(judge, given, made_by(of_teacher, given, steps=count))
            for count in TEACHER_STEPS
        }
    for rows in table.values():  # a picture has no finite distance from itself
        for row in rows.values():
            for name in ("reconstruction_psnr_db", "psnr_db"):
                if not math.isfinite(row[name]):
                    row[name] = None  # type: ignore[assignment]
    write_whole(folder / "yardsticks.json", json.dumps(table, indent=1) + "\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--runs", type=Path, default=Path("runs/ablations"))
    parser.add_argument("--seeds", default="1,2,3", help="separated by commas")
    parser.add_argument("--scale", type=float, default=1.0, help="times the recipe's pictures")
    parser.add_argument("--minutes", type=float, help="of each run at most")
    parser.add_argument("--only", default="", help="runs whose name holds this")
    parser.add_argument("--part", default="", choices=("", "protocol", "distillation"))
    parser.add_argument("--table", action="store_true", help="only write what is there")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", datefmt="%H:%M:%S")
    torch.set_num_threads(1)
    seeds = [int(seed) for seed in arguments.seeds.split(",")]
    folder = arguments.runs
    runs = plan(folder, seeds, arguments.scale, arguments.minutes)
    for run in runs:
        of_students = run.part == "distillation"
        left_out = arguments.part and of_students != (arguments.part == "distillation")
        if arguments.table or arguments.only not in run.name or left_out:
            continue
        try:
            carry_out(run, folder)
            score(run, folder)
        except DiffusionActError as error:
            LOG.error("%s: not run: %s", run.name, error)
        except Stopped:
            LOG.error("%s: stopped; the same command goes on with it", run.name)
            return 1
    if not (arguments.only or arguments.part or arguments.table):
        pool = runs[0].recipe["pool"]
        yardsticks(folder, *instruments(pool["folder"], pool["held_out"]), "full-joint-1")
    LOG.info("%s", ablation_table.write(runs, folder, ROOT))
    return 0


if __name__ == "__main__":
    sys.exit(main())
