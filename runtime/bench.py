"""How fast a bundle is here: stages and whole frames, start, memory, variant against variant.

Every variant is a process of its own (runtime/contest.py). They are warmed up and then take turns,
A B A B, so that a busy moment of the machine meets all of them; medians and quartiles are told.
"""

from __future__ import annotations

import importlib
import itertools
import json
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from diffusionact import machine
from diffusionact import manifest as manifest_file
from diffusionact.bench import records
from diffusionact.errors import SettingsError
from diffusionact.landmarks import Track
from diffusionact.runtime.choice import choose
from diffusionact.runtime.component import BACKENDS
from diffusionact.runtime.component import precisions as precisions_on
from diffusionact.runtime.contest import Contestant, contest, peak_memory_mib
from diffusionact.runtime.loop import Approximation
from diffusionact.runtime.media import FRAME_NS, open_reader, read_image
from diffusionact.runtime.motion import driver_motion
from diffusionact.runtime.reenactor import Reenactor, Settings
from diffusionact.runtime.sidecar import Sidecar
from diffusionact.runtime.source import Source
from diffusionact.runtime.timing import StopWatch
from diffusionact.runtime.trace import faults, record, spent_ms

Progress: TypeAlias = Callable[[str, int, "int | None"], None]
Record: TypeAlias = dict[str, Any]

SECONDS = 10.0  # of frames for each variant, where their number is not given
FEWEST, MOST = 5, 300  # frames
ROUNDS = 8
WARM_UP_S, WARM_UP_FRAMES = 1.0, 3
PREPARE_S = 20.0  # an inversion that takes longer is told as an estimate
TRACED_FRAMES = 3


@dataclass(frozen=True)
class Task:
    """What is rendered. frame: "render", the driver's landmarks are known; or "whole", each
    picture of the driver is read, and tracked where no track lies beside it."""

    bundle: Path
    portrait: Path
    driver: Path
    device: str = "auto"
    frame: str = "render"


@dataclass(frozen=True)
class Variant:
    """How it is rendered; fields as those of Settings."""

    backend: str = "auto"
    precision: str = "auto"
    steps: int | tuple[int, ...] | None = None
    threads: int = 0
    approximate: Approximation | None = None


@dataclass(frozen=True)
class Round:
    """Some frames. times: stage -> milliseconds of each; wall_s: of a stopwatch around them all;
    cpu_s: of the whole process."""

    times: Mapping[str, list[float]]
    wall_s: float
    cpu_s: float


class Rig:
    """One variant, loaded; lives in a process of its own."""

    def __init__(self, task: Task, variant: Variant) -> None:
        self._task = task
        begun_s = time.perf_counter()
        settings = Settings(**asdict(variant))
        self._act = Reenactor.load(task.bundle, device=task.device, settings=settings)
        self._load_s = time.perf_counter() - begun_s
        self._loaded_mib = peak_memory_mib()
        self._variant = variant
        self._frames: Iterator[tuple[Any, int]] | None = None

    def look(self) -> Track:
        """Return the driver's landmarks."""
        return driver_motion(self._act, open_reader(self._task.driver)).track

    def start(self, track: Track) -> Record:
        """Return what came before steady state, milliseconds, and what runs."""
        first_ms = self._begin(track)
        self._settle()
        return {
            "ran": self._ran(),
            "start": {
                "load_ms": self.load_ms(), "first_frame_ms": first_ms, **self._preparation()
            },
        }  # fmt: skip

    def _begin(self, track: Track) -> float:
        """Prepare the portrait with noise for its x_T, which takes the same time to render as any;
        milliseconds of the first frame."""
        side = self._act.manifest.image_size
        noise = np.random.default_rng(0).standard_normal((1, 3, side, side), np.float32)
        self._source = self._prepared(noise)
        self._act.start_session(self._source, track)
        self._frames = self._driver_frames(track)
        return self.round(1).wall_s * 1e3

    def warm_up(self) -> float:
        """Return seconds a frame, once it is steady."""
        return self._settle()

    def round(self, count: int) -> Round:
        """Return how long the next frames took."""
        times: dict[str, list[float]] = {}
        begun_s, cpu_begun_s = time.perf_counter(), time.process_time()
        for _ in range(count):
            for part in self._frame():
                for stage, spent_ns in part.items():
                    times.setdefault(stage, []).append(spent_ns / 1e6)
        return Round(times, time.perf_counter() - begun_s, time.process_time() - cpu_begun_s)

    def _frame(self) -> list[Mapping[str, int]]:
        """The stages of the next frame: those before the reenactor, where there are, and its own."""
        assert self._frames is not None, "start() comes first"
        watch = StopWatch()
        driver, pts_ns = next(self._frames)
        if self._task.frame == "whole":
            watch.lap("read")
        return [watch.times, self._act.reenact(driver, self._source, pts_ns).times]

    def load_ms(self) -> float:
        """Return how long the model took to load."""
        return self._load_s * 1e3

    def memory(self) -> dict[str, float | None]:
        """Return the most memory held, MiB: until the model was loaded, and until now."""
        return {"loaded_mib": self._loaded_mib, "peak_mib": peak_memory_mib()}

    def _prepared(self, x_T: Any = None) -> Source:
        image = read_image(self._task.portrait)
        known = Sidecar.beside(self._task.portrait)
        size = image.shape[1], image.shape[0]
        (landmarks,) = known.faces(1, size) if known else (None,)
        return self._act.prepare(image, landmarks=landmarks, x_T=x_T)

    def _preparation(self) -> dict[str, Any]:
        """How long a portrait takes, measured where the inversion's steps promise few seconds."""
        rendered = self.round(1).times["render"][0] / 1e3
        plan = self._act.manifest
        inverts = len(plan.invert.at(None, plan.schedule.total))
        expected_s = rendered / max(len(self._ran()["timesteps"]), 1) * inverts
        if expected_s > PREPARE_S:
            return {"prepare_ms": expected_s * 1e3, "prepare_measured": False}
        begun_s = time.perf_counter()
        self._source = self._prepared()
        return {"prepare_ms": (time.perf_counter() - begun_s) * 1e3, "prepare_measured": True}

    def _driver_frames(self, track: Track) -> Iterator[tuple[Any, int]]:
        """The driver for ever, its clock going on: landmarks, or pictures where they are tracked."""
        length_ns = int(track.pts_ns[-1] - track.pts_ns[0]) + FRAME_NS
        whole = self._task.frame == "whole"
        known = track if Sidecar.beside(self._task.driver) or not whole else None
        for turn in itertools.count():
            pictures = open_reader(self._task.driver) if whole else itertools.repeat(None)
            for i, picture in zip(range(len(track)), pictures, strict=False):
                face = track[i] if known is not None or picture is None else picture.image_bgr
                yield face, int(track.pts_ns[i]) + turn * length_ns

    def _settle(self) -> float:
        spent: list[float] = []
        while len(spent) < WARM_UP_FRAMES and sum(spent) < WARM_UP_S:
            spent.append(self.round(1).wall_s)
        return min(spent)

    def _ran(self) -> dict[str, Any]:
        """What the variant came to on this machine."""
        plan, variant = self._act.manifest, self._variant
        chosen = choose(
            self._task.bundle,
            plan,
            backend=variant.backend,
            precision=variant.precision,
            device=self._task.device,
            threads=variant.threads,
            approximate=variant.approximate,
        )
        device, known = _backend(chosen.backend, self._task.device)
        at = plan.render.at(variant.steps, plan.schedule.total)
        return {
            "backend": chosen.backend,
            "precision": known[0] if chosen.precision == "auto" else chosen.precision,
            "steps": len(at),
            "timesteps": [int(t) for t in at],
            "threads": variant.threads or machine.cores(),
            "approximate": variant.approximate,
            "device": device,
        }


class TracedRig(Rig):
    """The same with its components watched and their profilers on."""

    def __init__(self, task: Task, variant: Variant) -> None:
        begun_ns = time.monotonic_ns()
        with record() as self._recorder:
            super().__init__(task, variant)
        self._recorder.add("load", "start", begun_ns, time.monotonic_ns() - begun_ns)

    def trace(self, path: Path, count: int) -> Record:
        """Return what the file shows of so many frames after a first one: milliseconds by stage,
        call and kind of layer, and what a stopwatch around the frames says."""
        self._frame_span("first frame", lambda: self._begin(self.look()))
        begun_ns = time.monotonic_ns()
        for i in range(count):
            self._frame_span(f"frame {i}", self._traced_frame)
        stopwatch_ms = (time.monotonic_ns() - begun_ns) / 1e6
        about = {"machine": machine.describe(), "versions": machine.versions(), "ran": self._ran()}
        spans = [s for s in self._recorder.save(path, about) if s.begun_ns >= begun_ns]
        return {
            "frames": count,
            "stopwatch_ms": stopwatch_ms,
            "frames_ms": sum(spent_ms(spans, "frame").values()),
            "stages_ms": spent_ms(spans, "stage"),
            "calls_ms": spent_ms(spans, "call"),
            "layers_ms": spent_ms(spans, "layer", by="kind"),
        }

    def _traced_frame(self) -> None:
        for part in self._frame():
            self._recorder.stages(part)

    def _frame_span(self, name: str, work: Callable[[], object]) -> None:
        begun_ns = time.monotonic_ns()
        work()
        self._recorder.add(name, "frame", begun_ns, time.monotonic_ns() - begun_ns)


def write_trace(task: Task, variant: Variant, path: Path, frames: int = TRACED_FRAMES) -> Record:
    """Return what a trace of some frames shows, see `TracedRig.trace`; the trace is in the file.

    Raises: as `measure`, and MediaError when the file cannot be written.
    """
    with Contestant(TracedRig, task, variant) as rig:
        shown: Record = rig.ask("trace", path, frames)
    wrong = faults(json.loads(path.read_text(encoding="utf-8")))
    if wrong:
        raise RuntimeError(f"{path}: a trace that no viewer can show rightly: {wrong[:3]}")
    return shown


def variants_of(
    backends: Sequence[str],
    precisions: Sequence[str],
    steps: Sequence[int | None],
    threads: Sequence[int],
    approximations: Sequence[Approximation | None] = (None,),
    device: str = "auto",
) -> list[Variant]:
    """Return all combinations but those whose precision the backend does not have here.

    Raises: SettingsError when none is left, or a backend is not known; BackendMissing.
    """
    made = [
        Variant(*values)
        for values in itertools.product(backends, precisions, steps, threads, approximations)
        for backend, precision in [values[:2]]
        if "auto" in (backend, precision) or precision in _backend(backend, device)[1]
    ]
    if not made:
        had = "; ".join(f"{name}: {', '.join(_backend(name, device)[1])}" for name in backends)
        raise SettingsError(f"no backend computes in {', '.join(precisions)} here ({had})")
    return made


def _backend(name: str, device: str) -> tuple[str, tuple[str, ...]]:
    """The device that a backend takes, and its precisions there, the best first."""
    if name not in BACKENDS:
        known = ", ".join(("auto", *BACKENDS))
        raise SettingsError(f"backend {name!r} is not known; choose from: {known}")
    module = importlib.import_module(BACKENDS[name])
    chosen = module.DEVICES[0] if device == "auto" else device
    return chosen, precisions_on(module, chosen)


def measure(
    task: Task,
    variants: Sequence[Variant],
    *,
    frames: int | None = None,
    rounds: int = ROUNDS,
    progress: Progress | None = None,
) -> list[Record]:
    """Return one record for each variant, see diffusionact.bench.records.

    frames: of each variant; None takes as many as fit SECONDS. progress: of stages "load" and
    "measure".

    Raises: what loading and preparing raise; SettingsError for no frames or rounds.
    """
    if (frames is not None and frames < 1) or rounds < 1 or not variants:
        raise SettingsError(f"frames={frames}, rounds={rounds}: wanted at least one of each")
    tell = progress or (lambda stage, done, total: None)
    shared = _circumstances(task)
    first_loads = []
    for i, variant in enumerate(variants):  # from here on, caches of compiled models are warm
        with Contestant(Rig, task, variant) as rig:
            first_loads.append(rig.ask("load_ms"))
        tell("load", i + 1, len(variants))
    with contest(Rig, [(task, variant) for variant in variants]) as rigs:
        track = rigs[0].ask("look")
        starts = [rig.ask("start", track) for rig in rigs]
        counts = [frames or _fitting(rig.ask("warm_up")) for rig in rigs]
        turns = _take_turns(rigs, counts, rounds, tell)
        memories = [rig.ask("memory") for rig in rigs]
    made = []
    for i, variant in enumerate(variants):
        start = {"first_load_ms": first_loads[i], **starts[i]["start"]}
        known = {"variant": asdict(variant), "ran": starts[i]["ran"], "start": start}
        made.append(_record({**shared, **known, "memory": memories[i]}, turns[i]))
    return made


def _fitting(frame_s: float) -> int:
    return int(min(max(SECONDS / max(frame_s, 1e-6), FEWEST), MOST))


def _take_turns(
    rigs: Sequence[Contestant], counts: Sequence[int], rounds: int, tell: Progress
) -> list[list[Round]]:
    """The rounds of each rig: one of every rig, then the next of every rig."""
    shares = [_shares(count, rounds) for count in counts]
    turns: list[list[Round]] = [[] for _ in rigs]
    done = 0
    for turn in range(rounds):
        for rig, share, taken in zip(rigs, shares, turns, strict=True):
            if turn < len(share):
                taken.append(rig.ask("round", share[turn]))
                done += share[turn]
                tell("measure", done, sum(counts))
    return turns


def _shares(count: int, rounds: int) -> list[int]:
    """The frames of each round: as even as they can be, none empty."""
    used = min(count, rounds)
    return [count // used + (i < count % used) for i in range(used)]


def _circumstances(task: Task) -> Record:
    """What all records of one run share."""
    plan = manifest_file.read(task.bundle)
    return {
        "kind": records.KIND,
        "format": records.FORMAT,
        "date": machine.now(),
        "commit": machine.commit(),
        "versions": machine.versions(),
        "machine": machine.describe(),
        "load_average": machine.load_average(),
        "bundle": {
            "name": plan.name,
            "weights_sha256": plan.weights_sha256,
            "image_size": plan.image_size,
        },
        "frame": task.frame,
    }


def _record(known: Record, turns: Sequence[Round]) -> Record:
    """The record of one variant, with the percentiles of its rounds."""
    samples = {
        stage: [[round(ms, 4) for ms in turn.times[stage]] for turn in turns]
        for stage in turns[0].times
    }
    samples[records.TOTAL] = [
        [round(sum(parts), 4) for parts in zip(*turn.times.values(), strict=True)] for turn in turns
    ]
    stages = {stage: records.spread(values) for stage, values in samples.items()}
    count, wall_s = stages[records.TOTAL]["count"], sum(turn.wall_s for turn in turns)
    warnings = records.noise_warnings(
        stages[records.TOTAL], known["load_average"], known["machine"]["cores"]
    )
    return {
        **known,
        "warnings": warnings,
        "fps": count / wall_s,
        "stopwatch_ms": wall_s * 1e3,
        "cpu_ms": sum(turn.cpu_s for turn in turns) * 1e3,
        "stages": stages,
        "samples_ms": samples,
    }
