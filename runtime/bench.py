"""How fast a bundle is here: stages and whole frames, start, memory, variant against variant.

Every variant is a process of its own (runtime/contest.py). They are warmed up and then take turns,
A B A B, so that a busy moment of the machine meets all of them; medians and quartiles are told.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Callable, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any, TypeAlias

from diffusionact import machine
from diffusionact import manifest as manifest_file
from diffusionact.bench import records
from diffusionact.errors import SettingsError
from diffusionact.runtime.contest import Contestant, contest
from diffusionact.runtime.loop import Approximation
from diffusionact.runtime.rig import Rig, Round, Task, TracedRig, Variant, of_backend
from diffusionact.runtime.trace import faults

Progress: TypeAlias = Callable[[str, int, "int | None"], None]
Record: TypeAlias = dict[str, Any]

SECONDS = 10.0  # of frames for each variant, where their number is not given
FEWEST, MOST = 5, 300  # frames
ROUNDS = 8
TRACED_FRAMES = 3


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
    batches: Sequence[int] = (1,),
    device: str = "auto",
) -> list[Variant]:
    """Return all combinations but those whose precision the backend does not have here.

    Raises: SettingsError when none is left, or a backend is not known; as `of_backend`.
    """
    made = [
        Variant(*values)
        for values in itertools.product(
            backends, precisions, steps, threads, approximations, batches
        )
        for backend, precision in [values[:2]]
        if "auto" in (backend, precision) or precision in of_backend(backend, device)[1]
    ]
    if not made:
        had = "; ".join(f"{name}: {', '.join(of_backend(name, device)[1])}" for name in backends)
        raise SettingsError(f"no backend computes in {', '.join(precisions)} here ({had})")
    return made


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
        asked = {**asdict(variant), "device": task.device}
        known = {"variant": asked, "ran": starts[i]["ran"], "start": start}
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
        "rounds_ms": [round(turn.wall_s * 1e3, 4) for turn in turns],
        "cpu_ms": sum(turn.cpu_s for turn in turns) * 1e3,
        "stages": stages,
        "samples_ms": samples,
    }
