"""A steady stream of frames of the shipped model: how even it is, and what of it is not network.

    python -m benchmarks.steady --json benchmarks/results/steady.json
    python -m benchmarks.steady --backend openvino ort --threads 1

Frames are driven by the shipped track; the variants take turns, frame by frame, so that a busy
moment of the machine meets all of them. A frame is its stages 4 to 8: drawing, encoder, steps,
pasting. What is not network is all of it but the networks' own calls, in the processor's time: of
the clock's, a busy machine takes most from what lasts longest, the networks.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import cv2
import numpy as np

from diffusionact import machine
from diffusionact.assets import bundle_path, driver_path, portrait_paths
from diffusionact.files import write_whole
from diffusionact.landmarks import Track, sidecar_path
from diffusionact.runtime.loop import Loop
from diffusionact.runtime.reenactor import Reenactor
from diffusionact.runtime.session import Session
from diffusionact.runtime.settings import Settings
from diffusionact.runtime.source import Source

STAGES = ("condition", "encode", "render", "paste")
FRAMES, WARM = 500, 5
PERIOD_NS = 33_000_000


@dataclass(frozen=True)
class Timed:
    """One frame. whole_ns: of its stages, by the clock; cpu_ns: of the processor, in all threads;
    network_ns: of it inside the networks; calls: how many; stages_ns: by name, by the clock."""

    whole_ns: int
    cpu_ns: int
    network_ns: int
    calls: int
    stages_ns: Mapping[str, int]

    @property
    def share(self) -> float:
        """Of the frame, what is not network."""
        return 1.0 - self.network_ns / self.cpu_ns


@contextmanager
def network_times(act: Reenactor) -> Iterator[list[int]]:
    """Give a list to which every call of a network of this kind adds the processor's time, ns."""
    assert isinstance(act._loop, Loop), "a CPU's"
    (kind,) = {type(sampler._modulation) for sampler in act._loop._prepared.values()}
    run, inside_ns = kind.run, list[int]()

    def timed(component: Any) -> None:
        begun_ns = time.process_time_ns()
        run(component)
        inside_ns.append(time.process_time_ns() - begun_ns)

    kind.run = timed  # type: ignore[method-assign]
    try:
        yield inside_ns
    finally:
        kind.run = run  # type: ignore[method-assign]


def frame(act: Reenactor, session: Session, driver: Track, i: int, inside_ns: list[int]) -> Timed:
    """Return what frame `i` took; inside_ns: of `network_times`."""
    target = session.target(driver[i % len(driver)], i * PERIOD_NS)
    inside_ns.clear()
    begun_ns = time.process_time_ns()
    times = act.render(target, session.source).times
    cpu_ns = time.process_time_ns() - begun_ns
    stages = {stage: times[stage] for stage in STAGES}
    return Timed(sum(stages.values()), cpu_ns, sum(inside_ns), len(inside_ns), stages)


def shipped(act: Reenactor) -> tuple[Source, Track]:
    """Return a shipped portrait, with noise for its x_T, which takes the same time as any, and the
    shipped driver."""
    path, side = portrait_paths()[0], act.manifest.image_size
    noise = np.random.default_rng(0).standard_normal((1, 3, side, side), np.float32)
    portrait = np.asarray(cv2.imread(str(path)), np.uint8)
    face = Track.load(sidecar_path(path))[0]
    source = act.prepare(portrait, landmarks=face, x_T=noise)
    return source, Track.load(sidecar_path(driver_path()))


def summary(frames: Sequence[Timed]) -> dict[str, Any]:
    """Return percentiles, ms, the evenness of the stream, and the median share of what is not
    network."""
    whole_ms = np.array([one.whole_ns for one in frames]) / 1e6
    p50, p95, p99 = (float(v) for v in np.percentile(whole_ms, (50, 95, 99)))
    other_ms = np.array([one.cpu_ns - one.network_ns for one in frames]) / 1e6
    cpu_ms = np.array([one.cpu_ns for one in frames]) / 1e6
    stages = {s: float(np.median([one.stages_ns[s] for one in frames])) / 1e6 for s in STAGES}
    return {
        "frames": len(frames),
        "frame_ms": {"p50": round(p50, 2), "p95": round(p95, 2), "p99": round(p99, 2)},
        "p99_over_p50": round(p99 / p50, 2),
        "stages_ms": {stage: round(ms, 3) for stage, ms in stages.items()},
        "cpu_ms": round(float(np.median(cpu_ms)), 2),
        "not_network_ms": round(float(np.median(other_ms)), 3),
        "not_network_share": round(float(np.median([one.share for one in frames])), 4),
    }


def measure(variants: Sequence[Settings], frames: int, bundle: Path) -> list[dict[str, Any]]:
    """Return a record of each variant."""
    with ExitStack() as opened:
        acts = [
            opened.enter_context(Reenactor.load(bundle, device="cpu", settings=settings))
            for settings in variants
        ]
        seen: list[list[Timed]] = [[] for _ in acts]
        parts = [(act, *shipped(act)) for act in acts]
        driven = [(act, act.session(source), driver) for act, source, driver in parts]
        for i in range(WARM + frames):
            for (act, session, driver), timed in zip(driven, seen, strict=True):
                with network_times(act) as inside_ns:
                    timed.append(frame(act, session, driver, i, inside_ns))
        return [
            {
                "backend": act.settings.backend,
                "precision": act.settings.precision,
                "steps": act.steps,
                "threads": act.settings.threads or machine.cores(),
                **summary(timed[WARM:]),
            }
            for act, timed in zip(acts, seen, strict=True)
        ]


def main() -> None:
    parser = argparse.ArgumentParser(description="How even frames come, and what is not network.")
    parser.add_argument("--bundle", type=Path, default=bundle_path())
    parser.add_argument("--backend", nargs="+", default=["auto"])
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 0], help="0: one a core")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--frames", type=int, default=FRAMES)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    variants = [
        Settings(backend=backend, threads=threads, steps=arguments.steps)
        for backend in arguments.backend
        for threads in arguments.threads
    ]
    before = os.getloadavg()
    records = measure(variants, arguments.frames, arguments.bundle)
    kept = {
        "command": "python -m benchmarks.steady " + " ".join(sys.argv[1:]),
        "machine": machine.describe(),
        "versions": machine.versions(),
        "load_average": {"before": before, "after": os.getloadavg()},
        "variants": records,
    }
    for record in records:
        print(json.dumps(record))
    print("load average", *(f"{load:.1f}" for load in (*before, *os.getloadavg())))
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_whole(arguments.json, json.dumps(kept) + "\n")


if __name__ == "__main__":
    main()
