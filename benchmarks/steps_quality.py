"""Steps against quality on people that no network saw: the teacher by three solvers, the student.

    python -m benchmarks.steps_quality --people 200
    python -m benchmarks.steps_text          # its table and its plot

Every person gives a source and a target picture; the frame under the target's drawing is compared
with the target's own render. The teacher inverts in 50 steps and renders by DDIM, DPM-Solver++ (2M)
and UniPC at the same timesteps; the student inverts and renders in its own few. Networks run in
torch, in batches and full precision; milliseconds are the runtime's, default backend of this CPU.
"""

from __future__ import annotations

import argparse
import json
import logging
import math
import statistics
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn
from tqdm import tqdm

from benchmarks import model_card
from benchmarks.card_text import Scores, means, standard_errors
from benchmarks.solvers import SOLVERS
from benchmarks.solvers import walk as solve
from diffusionact import bundle_path, driver_path, machine, portrait_paths
from diffusionact.assets import judge_path
from diffusionact.commands.eval.instruments import open_network
from diffusionact.condition import draw_condition
from diffusionact.evaluation.judge import RenderedJudge, judge_tensors
from diffusionact.export.bundle import FACE128_CARD, Card, export_bundle
from diffusionact.files import write_whole
from diffusionact.landmarks import Track
from diffusionact.manifest import Sampling, file_sha256
from diffusionact.runtime.reenactor import Reenactor
from diffusionact.runtime.settings import Settings
from diffusionact.schedule import (
    alpha_bars,
    inversion_run,
    inversion_timesteps,
    x0_from_prediction,
)
from diffusionact.training import weights
from diffusionact.training.diffusion import to_batch, to_pixels
from diffusionact.training.models.guide import Guide, load_guide
from diffusionact.training.models.judge import load_judge

LOG = logging.getLogger(__name__)

ROOT = Path(__file__).parents[1]
CHECKPOINTS = ROOT / "training" / "checkpoints"
RESULTS = ROOT / "benchmarks" / "results" / "steps_quality.json"
COUNTS = (2, 4, 8, 10, 20, 50, 100)
TEACHER_INVERTS, TEACHER_RENDERS = 50, 20
GOALS = {4: 0.03, 2: 0.06}  # of the gap from copying to the teacher, what a student may give up
HIGHER = ("psnr_db", "ssim", "identity")  # is better; of `detail` 1, of all else lower
TIMED_FRAMES = 15
Pictures = NDArray[np.uint8]


@dataclass(frozen=True)
class Model:
    """Networks of one weights file and how it is run. invert: timesteps; render: count -> them."""

    unet: nn.Module
    inverter: nn.Module
    reenactment: nn.Module
    kind: Any
    invert: Sequence[int]
    render: Mapping[int, Sequence[int]]
    solvers: Sequence[str] = ("ddim",)


def teacher_of(path: Path, counts: Sequence[int] = COUNTS) -> Model:
    """The teacher; its four steps are those of its card, other counts have a constant stride."""
    found = weights.load(path)
    kind = found.config.prediction
    render = {n: FACE128_CARD.render.at(n).tolist() for n in counts}
    inverts = inversion_timesteps(kind, TEACHER_INVERTS).tolist()
    return _model(found, inverts, render, SOLVERS)


def student_of(path: Path) -> Model:
    """The student of a weights file or bundle.

    Raises: SystemExit if it is none.
    """
    found = weights.load(path)
    if found.student is None:
        raise SystemExit(f"{path}: no student; wanted weights, or a bundle, of a few-step student")
    render = {n: found.student.render.at(n).tolist() for n in found.student.render.counts}
    return _model(found, found.student.invert.at().tolist(), render, ("ddim",))


def _model(
    found: weights.Weights,
    invert: Sequence[int],
    render: Mapping[int, Sequence[int]],
    solvers: Sequence[str],
) -> Model:
    parts = {part: found.network(part) for part in found.parts if part != "encoder"}
    for network in parts.values():
        network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    unet = parts["render"]
    inverter = parts.get("invert", unet)
    kind = found.config.prediction
    return Model(unet, inverter, parts["reenactment"], kind, invert, render, solvers)


@torch.inference_mode()
def generate(
    name: str, model: Model, pairs: model_card.Pairs, batch: int = 32, bf16: bool = False
) -> dict[str, Pictures]:
    """Every frame, uint8 [N,S,S,3] RGB, by "NAME SOLVER COUNT"."""
    rows: dict[str, list[Pictures]] = {}
    count = len(pairs.source.images)
    steps = len(model.invert) + len(model.solvers) * sum(map(len, model.render.values()))
    autocast = torch.autocast("cpu", torch.bfloat16, enabled=bf16)
    with autocast, tqdm(total=count * steps, desc=name, unit="step") as bar:
        for start in range(0, count, batch):
            part = slice(start, start + batch)
            for row, made in _frames(name, model, pairs, part, bar.update):
                rows.setdefault(row, []).append(to_pixels(made))
    return {row: np.concatenate(parts) for row, parts in rows.items()}


def _frames(
    name: str,
    model: Model,
    pairs: model_card.Pairs,
    part: slice,
    done: Callable[[int], Any],
) -> Iterator[tuple[str, Tensor]]:
    """Each row of pictures of some people."""
    device, table = torch.device("cpu"), alpha_bars()
    source = to_batch(pairs.source.images[part], device)
    own, wanted = (
        to_batch(
            np.stack([draw_condition(f, source.shape[-1], FACE128_CARD.drawing) for f in faces]),
            device,
        )
        for faces in (pairs.source_landmarks[part], pairs.target_landmarks[part])
    )
    z_s, z_r = model.reenactment(source, own).float(), model.reenactment(source, wanted).float()
    up = inversion_run(model.kind, model.invert, table)
    x_T = model_card.walk(model.inverter, up, source, z_s, done)
    for solver in model.solvers:
        for count, at in model.render.items():
            predict = _predictor(model, z_r, table, done)
            yield f"{name} {solver} {count}", solve(solver, predict, at, table, x_T)


def _predictor(
    model: Model, z: Tensor, table: NDArray[np.float64], done: Callable[[int], Any]
) -> Callable[[Tensor, int], Tensor]:
    def predict(x: Tensor, t: int) -> Tensor:
        done(len(x))
        made = model.unet(x, torch.full((len(x),), t), z).float()
        x_0: Tensor = x0_from_prediction(model.kind, x, made, float(table[t]))
        return x_0.clip(-1.0, 1.0)

    return predict


class Instruments:
    """What reads the pictures: the trained judge, evaluation's judge for the perceptual distance,
    and the guide, whose embedding tells people apart. Nothing was trained against the judges; a
    student may have been against the guide."""

    def __init__(self, judge: Path, guide: Path) -> None:
        self.judge, _ = load_judge(judge)
        inputs, outputs = judge_tensors()
        specs = ({s.name: s for s in inputs}, {s.name: s for s in outputs})
        self.perceptual = RenderedJudge(open_network(judge_path(), *specs))
        self.guide: Guide = load_guide(guide)

    def scores(self, images: Pictures, pairs: model_card.Pairs) -> Scores:
        """Every measure of every picture against the target: name -> float64 [N]."""
        truth = pairs.target
        table = dict(model_card.score(images, self.judge.read(images), truth))
        seen, due = self._people(images), self._people(truth.images)
        pictures = list(zip(truth.images, images, strict=True))
        table["perceptual"] = np.array(
            [self.perceptual.distance(_bgr(a), _bgr(b)) for a, b in pictures]
        )
        table["detail"] = np.array([detail(b) / detail(a) for a, b in pictures])
        table["identity"] = (seen * due).sum(axis=1)
        return table

    @torch.inference_mode()
    def _people(self, images: Pictures) -> NDArray[np.float64]:
        parts = [
            self.guide.identity(to_batch(images[i : i + 32], torch.device("cpu")))
            for i in range(0, len(images), 32)
        ]
        return torch.cat(parts).double().numpy()


def _bgr(image: Pictures) -> Pictures:
    return np.ascontiguousarray(image[..., ::-1])


def detail(image: Pictures) -> float:
    """The high-frequency energy of a picture: the mean square of its luma's Laplacian (the kernel
    0 1 0, 1 -4 1, 0 1 0), whose response grows with the square of the frequency."""
    luma = cv2.cvtColor(image, cv2.COLOR_RGB2GRAY).astype(np.float64)
    return float(np.square(cv2.Laplacian(luma, cv2.CV_64F)).mean())


def given_up(
    table: Mapping[str, Scores], teacher: str, student: str
) -> dict[str, dict[str, float | bool | None]]:
    """By measure: the share of the gap from copying to the teacher that the student gives up, with
    its standard error over people; None where copying is no worse than the teacher. And what the
    student is off the teacher, in the measure's own unit, above 0 where it is worse."""
    result = {}
    for name in table[teacher]:
        rows = (table[row][name] for row in ("copy", teacher, student))
        copy, taught, learnt = (_loss(name, values) for values in rows)
        known = np.isfinite(copy) & np.isfinite(taught) & np.isfinite(learnt)
        worse = (learnt - taught)[known]
        gap = float((copy - taught)[known].mean())
        error = float(worse.std(ddof=1)) / math.sqrt(len(worse)) if len(worse) > 1 else math.nan
        sure = gap > 0
        result[name] = {
            "worse_by": float(worse.mean()),
            "worse_by_error": error,
            "share": float(worse.mean()) / gap if sure else None,
            "share_error": error / gap if sure else None,
        }
    return result


def _loss(name: str, values: NDArray[np.float64]) -> NDArray[np.float64]:
    """A measure, turned so that lower is better."""
    if name == "detail":
        return np.abs(np.log(values))
    return -values if name in HIGHER else values


def frame_ms(bundle: Path, counts: Sequence[int]) -> dict[str, Any]:
    """Milliseconds of a frame (encoder and render) by count, medians; and of an inversion. Counts
    take turns, so that what disturbs the machine disturbs them alike."""
    driver = Track.load(driver_path().with_suffix(".landmarks.npz"))
    portrait = cv2.imread(str(portrait_paths()[0]))
    face = Track.load(portrait_paths()[0].with_suffix(".landmarks.npz"))[0]
    assert portrait is not None and face is not None
    settings = Settings(steps=counts[0], step_choices=tuple(counts), paste=False)
    spent: dict[int, list[float]] = {count: [] for count in counts}
    with Reenactor.load(bundle, device="cpu", settings=settings) as act:
        source = act.prepare(portrait.astype(np.uint8), landmarks=face)
        inverted = []
        for _ in range(3):
            times = _timed(lambda: act.prepare(portrait.astype(np.uint8), landmarks=face))
            inverted.append(times)
        session = act.session(source)
        for i in range(TIMED_FRAMES + 1):
            target = session.target(driver[i % len(driver)])
            for count in counts:
                act.set_steps(count)
                times_ns = act.render(target, source).times
                if i:  # the first warms up
                    spent[count].append((times_ns["encode"] + times_ns["render"]) / 1e6)
        ran = {"backend": act.settings.backend, "precision": act.settings.precision}
    frames = {str(count): round(statistics.median(each), 2) for count, each in spent.items()}
    return {**ran, "invert_ms": round(statistics.median(inverted), 1), "frame_ms": frames}


def _timed(make: Callable[[], Any]) -> float:
    begun_s = time.perf_counter()
    make()
    return (time.perf_counter() - begun_s) * 1e3


def measure(arguments: argparse.Namespace) -> dict[str, Any]:
    """All figures as JSON values."""
    teacher = teacher_of(arguments.teacher, arguments.counts)
    students = {"student": student_of(arguments.student)} if arguments.student else {}
    pairs = model_card.held_out_pairs(arguments.people, arguments.seed, arguments.size)
    tools = Instruments(arguments.judge, arguments.guide)
    table = {"copy": tools.scores(pairs.source.images, pairs)}
    for name, model in {"teacher": teacher, **students}.items():
        made = generate(name, model, pairs, arguments.batch, arguments.bf16)
        for row, images in tqdm(made.items(), desc="read", unit="row"):
            table[row] = tools.scores(images, pairs)
    reference = f"teacher ddim {TEACHER_RENDERS}"
    lost = {
        str(count): given_up(table, reference, f"student ddim {count}")
        for model in students.values()
        for count in model.render
    }
    with tempfile.TemporaryDirectory() as folder:
        export_bundle(arguments.teacher, Path(folder) / "teacher.bundle", _any_count(arguments))
        speed = {"teacher": frame_ms(Path(folder) / "teacher.bundle", arguments.counts)}
    if students:
        speed["student"] = frame_ms(arguments.student, sorted(students["student"].render))
    return _facts(arguments, teacher, students) | {
        "mean": means(table),
        "standard_error": standard_errors(table),
        "given_up": lost,
        "goals": {str(count): share for count, share in GOALS.items()},
        "speed": speed,
    }


def _any_count(arguments: argparse.Namespace) -> Card:
    card = FACE128_CARD
    choices = tuple(sorted({*card.render.choices, *arguments.counts}))
    render = Sampling(card.render.steps, choices, card.render.timesteps)
    return replace(card, render=render, invert=replace(card.invert, steps=TEACHER_INVERTS))


def _facts(
    arguments: argparse.Namespace, teacher: Model, students: Mapping[str, Model]
) -> dict[str, Any]:
    timesteps = {
        name: {
            "invert": list(model.invert),
            "render": {str(n): at for n, at in model.render.items()},
        }
        for name, model in {"teacher": teacher, **students}.items()
    }
    return {
        "date": machine.now(),
        "commit": machine.commit(),
        "machine": machine.describe(),
        "versions": machine.versions(),
        "load_average": machine.load_average(),
        "people": arguments.people,
        "seed": arguments.seed,
        "precision": "bfloat16" if arguments.bf16 else "float32",
        "teacher_sha256": file_sha256(arguments.teacher),
        "guide_sha256": file_sha256(arguments.guide),
        "timesteps": timesteps,
    }


def _arguments() -> argparse.Namespace:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--teacher", type=Path, default=CHECKPOINTS / "teacher.safetensors")
    add("--student", type=Path, default=bundle_path(), help="a student's bundle")
    add("--no-student", dest="student", action="store_const", const=None)
    add("--judge", type=Path, default=CHECKPOINTS / "judge.safetensors")
    add("--guide", type=Path, default=CHECKPOINTS / "guide.safetensors")
    add("--people", type=int, default=200)
    add("--size", type=int, default=128, help="px")
    add("--seed", type=int, default=2026, help="not the seed of the training pool")
    add("--counts", type=lambda text: [int(n) for n in text.split(",")], default=list(COUNTS))
    add("--batch", type=int, default=32)
    add("--bf16", action="store_true", help="half the time, less exact")
    add("--json", type=Path, default=RESULTS)
    add("--times", action="store_true", help="only the student's times, again: the host was busy")
    return parser.parse_args()


def main() -> None:
    arguments = _arguments()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    if arguments.times:
        found = json.loads(arguments.json.read_text(encoding="utf-8"))
        counts = [int(count) for count in found["speed"]["student"]["frame_ms"]]
        found["speed"]["student"] = frame_ms(arguments.student, counts)
    else:
        found = measure(arguments)
    arguments.json.parent.mkdir(parents=True, exist_ok=True)
    write_whole(arguments.json, json.dumps(_finite(found), indent=1) + "\n")
    print(arguments.json)


def _finite(value: Any) -> Any:
    """The value with what JSON cannot hold, NaN and infinity, replaced by null."""
    if isinstance(value, Mapping):
        return {key: _finite(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


if __name__ == "__main__":
    main()
