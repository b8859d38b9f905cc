"""Runs every golden vector of a directory through our code.

    python tests/golden_check.py DIR

DIR has the form of ../shared/golden: networks (NAME.json and NAME.npz), schedules and images, their
tolerances in manifest.json, and the rule of weights and inputs in regen.py, which is executed.
Names, sizes, timesteps and tolerances are the directory's. Every vector of a network goes through
PyTorch; those that a bundle can give, through its exported graphs in ONNX Runtime as well; the
whole flow, through Reenactor too. Images go through tests/golden_images.py.

Prints a line for each vector. Exit status 1 if one fails or none ran.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import re
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from fnmatch import fnmatch
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt
import torch

from diffusionact import schedule
from diffusionact.errors import SettingsError
from diffusionact.manifest import Sampling, Schedule
from diffusionact.runtime.reenactor import Reenactor
from diffusionact.runtime.settings import Settings

if __name__ == "__main__":  # run as a script, only tests/ is on the path
    sys.path.insert(0, str(Path(__file__).resolve().parents[1]))

from tests import golden_images, golden_networks  # noqa: E402
from tests.golden_vectors import MEAN, Answers, Case, find_rule, names  # noqa: E402

Array: TypeAlias = npt.NDArray[Any]

MANIFEST, RULE, SCHEDULES, IMAGES = "manifest", "regen.py", "schedules", "image"
NO_LEVEL = 1e-17  # what a table of the schedule may be off where it is zero


class Row(NamedTuple):
    """One comparison; of the schedule's tables the differences are relative."""

    name: str
    max_abs: float
    mean_abs: float
    tolerance: float
    ok: bool


def compare(
    name: str, seen: Array, due: Array, tolerance: float, mean_tolerance: float = np.inf
) -> Row:
    """The row of an array and the stored one.

    Raises:
        ValueError: their shapes differ.
    """
    if seen.shape != due.shape:
        raise ValueError(f"shape {list(seen.shape)}, stored {list(due.shape)}")
    apart = np.abs(np.asarray(seen, np.float64) - due)
    largest, mean = float(apart.max()), float(apart.mean())
    return Row(name, largest, mean, tolerance, largest <= tolerance and mean <= mean_tolerance)


def attempted(make: Callable[..., Row], name: str, *rest: Any) -> Row:
    """make(name, ...), or a failed row where it raises, with the reason on stderr."""
    try:
        return make(name, *rest)
    except Exception as error:  # whatever is wrong with one vector, the others are still run
        print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
        return Row(name, np.nan, np.nan, np.nan, False)


class Directory:
    """The files of a directory of golden vectors.

    Raises:
        SettingsError: a JSON file is not readable, or the manifest or the rule is missing.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.json = {path.stem: _read_json(path) for path in sorted(folder.glob("*.json"))}
        if MANIFEST not in self.json:
            raise SettingsError(f"{folder}: no {MANIFEST}.json; give a directory of golden vectors")
        self.tolerances: Mapping[str, Any] = self.json[MANIFEST].get("tolerances_float32", {})
        self.networks = [name for name, spec in self.json.items() if {"keys", "config"} <= {*spec}]
        betas = self.arrays(SCHEDULES).get("base_betas")
        self.plan = Schedule()
        if betas is not None:
            self.plan = Schedule(len(betas), float(betas[0]), float(betas[-1]))

    def arrays(self, name: str) -> dict[str, Array]:
        """The arrays of NAME.npz; none if it is not there."""
        path = self.folder / f"{name}.npz"
        if not path.is_file():
            return {}
        with path.open("rb") as file, np.load(file) as arrays:
            return dict(arrays)

    def case(self, name: str, regen: ModuleType) -> Case:
        """One network of the directory, with the stored inputs, and the rule's where none are."""
        spec, stored = self.json[name], self.arrays(name)
        kept = {k.removeprefix("in_"): v for k, v in stored.items() if k.startswith("in_")}
        inputs = {**golden_networks.inputs_by(regen, spec), **kept}
        listed = self.json.get(SCHEDULES, {}).get("timesteps", {})
        return Case(name, spec, stored, inputs, self.tolerances, self.plan, listed)

    def rule(self) -> ModuleType:
        """The module DIR/regen.py."""
        path = self.folder / RULE
        place = importlib.util.spec_from_file_location("golden_rule", path)
        if place is None or place.loader is None or not path.is_file():
            raise SettingsError(f"{path}: missing; it makes the weights and the inputs")
        module = importlib.util.module_from_spec(place)
        place.loader.exec_module(module)
        return module


def _read_json(path: Path) -> dict[str, Any]:
    try:
        values = json.loads(path.read_bytes())
    except (OSError, ValueError) as error:
        raise SettingsError(f"{path}: not readable JSON ({error})") from error
    if not isinstance(values, dict):
        raise SettingsError(f"{path}: {type(values).__name__}, wanted an object")
    return values


def rows(directory: Directory, only: str, threads: int) -> Iterator[Row]:
    """The rows of every file whose name is like `only`, each as soon as it is made."""
    files = {path.stem for path in directory.folder.glob("*.npz")} | {*directory.networks}
    files |= {SCHEDULES, IMAGES} & {*directory.json}
    size = {name: len(str(directory.json.get(name, {}).get("keys", ""))) for name in files}
    for name in sorted(files, key=lambda file: (size[file], file)):
        if not fnmatch(name, only):
            continue
        if name == SCHEDULES:
            yield from schedule_rows(directory)
        elif name == IMAGES:
            yield from image_rows(directory.folder)
        else:
            yield from network_rows(directory, name, threads)


def image_rows(folder: Path) -> Iterator[Row]:
    """The rows of the image pipeline, and a failed one where they end too early."""
    try:
        for name, *values in golden_images.rows(folder):
            yield Row(f"{IMAGES}/{name}", *values)
    except Exception as error:  # the networks are still run
        print(f"{IMAGES}: {type(error).__name__}: {error}", file=sys.stderr)
        yield Row(f"{IMAGES}.npz", np.nan, np.nan, np.nan, False)


def schedule_rows(directory: Directory) -> Iterator[Row]:
    """Timesteps and step counts, exact, and float64 tables."""
    plan, spec = directory.plan, directory.json.get(SCHEDULES, {})
    if "valid_T" in spec:
        valid = np.array(schedule.valid_steps(plan.total))
        yield attempted(compare, f"{SCHEDULES}/valid_T", valid, np.array(spec["valid_T"]), 0.0)
    for count, due in spec.get("timesteps", {}).items():
        yield attempted(_timesteps_row, f"{SCHEDULES}/timesteps.{count}", plan, count, due)
    for key, due in directory.arrays(SCHEDULES).items():
        if match := re.fullmatch(r"T(\d+)_timesteps", key):
            yield attempted(_timesteps_row, f"{SCHEDULES}/{key}", plan, match[1], due)
        else:
            yield attempted(_table_row, f"{SCHEDULES}/{key}", directory, key, due)


def _timesteps_row(name: str, plan: Schedule, count: str, due: Any) -> Row:
    return compare(name, schedule.timesteps(int(count), plan.total), np.asarray(due), 0.0)


def _table_row(name: str, directory: Directory, key: str, due: Array) -> Row:
    tolerance = directory.tolerances[SCHEDULES]
    if isinstance(tolerance, str):  # a sentence that says "rtol 1e-12"
        match = re.search(r"rtol\s*=?\s*([\d.]+(?:e[-+]?\d+)?)", tolerance)
        if match is None:
            raise ValueError(f"no 'rtol NUMBER' in tolerances_float32.schedules: {tolerance!r}")
        tolerance = float(match[1])
    scale = np.where(due == 0.0, NO_LEVEL / tolerance, np.abs(due))
    return compare(name, _table(key, directory.plan) / scale, due / scale, tolerance)


def _table(key: str, plan: Schedule) -> Array:
    """Our table under the published one's name: base_betas, or T<count>_<table>."""
    if key == "base_betas":
        return schedule.betas(plan.total, plan.beta_start, plan.beta_end)
    match = re.fullmatch(r"T(\d+)_(\w+)", key)
    if match is None:
        raise KeyError(f"no table is called {key!r}")
    table = schedule.alpha_bars(plan.total, plan.beta_start, plan.beta_end)
    at = schedule.timesteps(int(match[1]), plan.total)
    down, up = schedule.render_run("eps", at, table), schedule.inversion_run("eps", at, table)
    on_x, on_prediction = schedule.x0_weights("eps", down.alpha_bar)
    tables: dict[str, Array] = {
        "betas": 1.0 - down.alpha_bar / down.alpha_bar_to,
        "alphas_cumprod": down.alpha_bar,
        "alphas_cumprod_prev": down.alpha_bar_to,
        "alphas_cumprod_next": up.alpha_bar_to,
        "sqrt_recip_alphas_cumprod": on_x,
        "sqrt_recipm1_alphas_cumprod": -on_prediction,
    }
    return tables[match[2]]


def network_rows(directory: Directory, name: str, threads: int) -> Iterator[Row]:
    """The rows of a network: its inputs, PyTorch, ONNX Runtime and Reenactor."""
    try:
        regen = directory.rule()
        case = directory.case(name, regen)
        networks = golden_networks.TorchNetworks(case.spec, regen)
    except Exception as error:  # nothing of this network can run; other files can
        print(f"{name}: {type(error).__name__}: {error}", file=sys.stderr)
        yield Row(f"{name}.json", np.nan, np.nan, np.nan, False)
        return
    made = golden_networks.inputs_by(regen, case.spec)
    for key, value in case.inputs.items():
        if f"in_{key}" in case.stored and key in made:
            yield attempted(compare, f"{name}/in_{key} rule", made[key], value, 0.0)
    yield from _vector_rows(case, Answers(case, networks), "torch")
    if any(_is_exported(vector) for vector in names(case)):
        with tempfile.TemporaryDirectory(prefix="golden-") as folder:
            _write_bundle(Path(folder), case, networks)
            onnx = golden_networks.OnnxNetworks(Path(folder), threads)
            yield from _vector_rows(case, Answers(case, onnx), "onnx")
            yield from _reenactor_rows(case, Path(folder), threads)


def _vector_rows(case: Case, answers: Answers, through: str) -> Iterator[Row]:
    """The rows of all vectors that these networks can give."""
    exported_only = through == "onnx"
    for vector in names(case):
        if exported_only and not _is_exported(vector):
            continue
        label = f"{case.name}/{vector}"
        yield attempted(_vector_row, f"{label} {through}", case, answers, vector)
        limit = vector.replace("_sample", "_first_step_sample")
        if limit != vector and limit in case.tolerances:
            yield attempted(_first_step_row, f"{label}[0] {through}", case, answers, vector, limit)
    for base, due in case.spec.get("stats", {}).items():
        if not exported_only or _is_exported(base):
            label = f"{case.name}/{base} statistics {through}"
            yield attempted(_statistics_row, label, case, answers, base, due)


def _vector_row(name: str, case: Case, answers: Answers, vector: str) -> Row:
    rule, _ = find_rule(vector.partition("/")[0])
    mean_tolerance = float(case.tolerances.get(MEAN, np.inf)) if rule.sampled else np.inf
    due = case.stored[vector]
    return compare(name, answers.of(vector), due, case.tolerance(rule.tolerance), mean_tolerance)


def _first_step_row(name: str, case: Case, answers: Answers, vector: str, limit: str) -> Row:
    tolerance = float(case.tolerances[limit])
    return compare(name, answers.of(vector)[0], case.stored[vector][0], tolerance)


def _statistics_row(
    name: str, case: Case, answers: Answers, base: str, due: Mapping[str, Any]
) -> Row:
    """Those of a whole picture; the 2-norm as a root mean square, to be of the pixels' size."""
    picture = answers.of(base).astype(np.float64)
    if list(picture.shape) != list(due["shape"]):
        raise ValueError(f"shape {list(picture.shape)}, listed {due['shape']}")
    root = np.sqrt(picture.size)
    seen = {
        "mean": picture.mean(),
        "std": picture.std(),
        "min": picture.min(),
        "max": picture.max(),
        "absmax": np.abs(picture).max(),
        "l2": np.linalg.norm(picture) / root,
    }
    listed = {key: value for key, value in due.items() if key in seen}
    wanted = np.array([value / root if key == "l2" else value for key, value in listed.items()])
    rule, _ = find_rule(base)
    return compare(
        name, np.array([seen[key] for key in listed]), wanted, case.tolerance(rule.tolerance)
    )


def _is_exported(vector: str) -> bool:
    """Whether a bundle's graphs give this vector; a name that no rule knows fails in PyTorch."""
    try:
        return find_rule(vector.partition("/")[0])[0].exported
    except KeyError:
        return False


def _write_bundle(bundle_dir: Path, case: Case, networks: golden_networks.TorchNetworks) -> None:
    """Nothing; the folder is the case's bundle, with the step counts of its flow."""
    render = case.spec["T_render"]
    counts = render, case.spec.get("T_reverse", render)
    samplings = []
    for count in counts:
        listed = case.timesteps.get(str(count))
        samplings.append(Sampling(count, (), {str(count): tuple(listed)} if listed else {}))
    own_inversion = any(_is_exported(v) and ("ema" in v or "flow" in v) for v in names(case))
    golden_networks.write_bundle(
        bundle_dir, networks, case.plan, (samplings[0], samplings[1]), own_inversion
    )


def _reenactor_rows(case: Case, bundle_dir: Path, threads: int) -> Iterator[Row]:
    """The whole flow by the runtime's own order of stages, picture by picture."""
    if not {"flow_xT", "flow_out"} <= {*case.stored}:
        return
    made: dict[str, list[Array]] = {"flow_xT": [], "flow_out": []}
    images, drawings = case.picture("src"), (case.drawing("src"), case.drawing("tgt"))
    with Reenactor.load(bundle_dir, settings=Settings(threads=threads)) as act:
        for i in range(len(images)):
            image, of_source, of_target = (a[i : i + 1] for a in (images, *drawings))
            x_T = act.invert(image, of_source)
            made["flow_xT"].append(x_T)
            made["flow_out"].append(act.generate(x_T, image, of_target))
    mean_tolerance = float(case.tolerances.get(MEAN, np.inf))
    for vector, pictures in made.items():
        seen, due = np.concatenate(pictures), case.stored[vector]
        label, limit = f"{case.name}/{vector} reenactor", case.tolerance(vector)
        yield attempted(compare, label, seen, due, limit, mean_tolerance)


def main(arguments: list[str] | None = None) -> int:
    """The exit status."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("directory", type=Path, metavar="DIR")
    parser.add_argument("--only", default="*", metavar="NAME", help="files of DIR, such as small")
    parser.add_argument("--threads", type=int, default=0, help="0: one for each core")
    given = parser.parse_args(arguments)
    if given.threads:
        torch.set_num_threads(given.threads)
    start, done = time.monotonic(), []
    try:
        directory = Directory(given.directory)
        print(f"{'name':58} | max abs  | mean abs | tolerance | ok")
        for row in rows(directory, given.only, given.threads):
            done.append(row)
            print(
                f"{row.name:58} | {row.max_abs:8.1e} | {row.mean_abs:8.1e} "
                f"| {row.tolerance:9.2g} | {'yes' if row.ok else 'NO'}",
                flush=True,
            )
    except SettingsError as error:
        print(error, file=sys.stderr)
        return 1
    failed = [row.name for row in done if not row.ok]
    print(f"{len(done)} rows, {len(failed)} failed, {time.monotonic() - start:.0f} s")
    if not done:
        print(f"{given.directory}: no vector ran; wanted NAME.json and NAME.npz", file=sys.stderr)
    return 1 if failed or not done else 0


if __name__ == "__main__":
    sys.exit(main())
