"""Which runs the ablations need: a recipe for each, what each begins from, what it says.

Every run is one stage of `training/recipes/ablation32.toml`, as it stands or with a setting
changed, so that stages which variants have in common are trained once a seed; or a recipe
`student32_*.toml`. The Diffusion Autoencoder is trained once for all, as the paper's authors took
a published one.
"""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

AUTOENCODER, PRETRAIN, MAIN, JOINT = range(4)  # the stages of the recipe
METHODS = ("sampler", "consistency", "progressive")
STUDENT_SHARE = 0.2  # of the pictures of the students' own recipes

Table = dict[str, Any]


@dataclass(frozen=True)
class Run:
    """One training run. start: the run whose weights it begins from; scored: its result is one of
    a variant, named `variant`, of the experiment `part`."""

    name: str
    recipe: Table
    start: str = ""
    part: str = ""
    variant: str = ""
    seed: int = 0


@dataclass(frozen=True)
class Variant:
    """A way through the protocol. changes: settings of both sampler stages."""

    name: str
    pretrain: bool = True
    joint: bool = True
    changes: Table = field(default_factory=dict)


PROTOCOL = (
    Variant("full"),
    Variant("no pre-training", pretrain=False),
    Variant("no batch split", changes={"split": False}),
    Variant("no fine-tuning", joint=False),
    Variant("T_tr = 4", changes={"train_steps": 4}),
)


def protocol(base: Mapping[str, Any], folder: Path, seed: int) -> list[Run]:
    """The runs of Table 3 for one seed, each after those it begins from."""
    runs = [_stage(base, folder, "autoencoder", AUTOENCODER, seed=1),
            _stage(base, folder, f"pretrain-{seed}", PRETRAIN, seed, start="autoencoder")]  # fmt: skip
    runs[-1] = _scored(runs[-1], "protocol", "pre-training only", seed)
    for variant in PROTOCOL:
        start = f"pretrain-{seed}" if variant.pretrain else "autoencoder"
        short = _short(variant.name)
        if not variant.joint:  # the full protocol's run, before its last stage
            main = next(run for run in runs if run.name == f"full-main-{seed}")
            runs[runs.index(main)] = _scored(main, "protocol", variant.name, seed)
            continue
        main = _stage(base, folder, f"{short}-main-{seed}", MAIN, seed, start, variant.changes)
        joint = _stage(
            base, folder, f"{short}-joint-{seed}", JOINT, seed, main.name, variant.changes
        )
        runs += [main, _scored(joint, "protocol", variant.name, seed)]
    return runs


def students(recipes: Mapping[str, Mapping[str, Any]], folder: Path, seed: int) -> list[Run]:
    """The runs of all methods of distillation for one seed, from the full protocol's model of
    the first seed. recipes: by method; every method sees the same number of pictures."""
    teacher, runs = "full-joint-1", []
    for method in METHODS:
        name = f"student-{method}-{seed}"
        recipe = _recipe(recipes[method], folder, name, seed)
        recipe["student"]["of"] = str(weights_of(folder, teacher))
        recipe["stages"] = copy.deepcopy(recipes[method]["stages"])
        run = Run(name, recipe, teacher, "distillation", method, seed)
        runs.append(scaled(run, STUDENT_SHARE, None))
    return runs


def scaled(run: Run, factor: float, minutes: float | None) -> Run:
    """The run with `factor` times the pictures, and at most so many minutes."""
    recipe = copy.deepcopy(run.recipe)
    for stage in recipe["stages"]:
        stage["images"] = max(stage["batch"], round(stage["images"] * factor))
        if minutes is not None:
            stage["minutes"] = minutes / len(recipe["stages"])
    return Run(run.name, recipe, run.start, run.part, run.variant, run.seed)


def weights_of(folder: Path, name: str) -> Path:
    """Where a run leaves its weights."""
    return folder / name / "weights.safetensors"


def _stage(
    base: Mapping[str, Any], folder: Path, name: str, index: int, seed: int, start: str = "",
    changes: Mapping[str, Any] | None = None,
) -> Run:  # fmt: skip
    recipe = _recipe(base, folder, name, seed)
    recipe["stages"] = [base["stages"][index] | dict(changes or {})]
    return Run(name, recipe, start)


def _recipe(base: Mapping[str, Any], folder: Path, name: str, seed: int) -> Table:
    recipe: Table = copy.deepcopy({k: v for k, v in base.items() if k != "stages"})
    return recipe | {"name": name, "seed": seed, "weights": str(weights_of(folder, name))}


def _scored(run: Run, part: str, variant: str, seed: int) -> Run:
    return Run(run.name, run.recipe, run.start, part, variant, seed)


def _short(name: str) -> str:
    return name.replace(" ", "-").replace("_", "").replace("=", "").replace("--", "-")


def to_toml(table: Mapping[str, Any]) -> str:
    """The table as TOML: numbers, strings, booleans, lists of them, tables of those, and lists of
    tables at the top."""
    lines = [f"{k} = {_value(v)}" for k, v in table.items() if not _is_table(v)]
    for key, value in table.items():
        if isinstance(value, Mapping):
            lines += ["", f"[{key}]", *(f"{k} = {_value(v)}" for k, v in value.items())]
        elif _is_table(value):
            for row in value:
                lines += ["", f"[[{key}]]", *(f"{k} = {_value(v)}" for k, v in row.items())]
    return "\n".join(lines) + "\n"


def _is_table(value: Any) -> bool:
    listed = isinstance(value, Sequence) and not isinstance(value, str)
    return isinstance(value, Mapping) or (
        listed and bool(value) and all(isinstance(row, Mapping) for row in value)
    )


def _value(value: Any) -> str:
    if isinstance(value, Mapping):
        return "{ " + ", ".join(f"{json.dumps(k)} = {_value(v)}" for k, v in value.items()) + " }"
    if isinstance(value, (list, tuple)):
        return "[" + ", ".join(_value(row) for row in value) + "]"
    return json.dumps(value)
