"""A long session, watched: is memory flat, are threads and open files, is the latency?

    python -m benchmarks.soak --camera CLIP --seconds 1800 --json out/soak.json
    python -m benchmarks.soak --pid PID --seconds 1800      # of another process, such as serve

The first form runs `live` from a looped clip into an MJPEG page that one client watches; the
second watches the process only. `benchmarks/serve_load.py --soak` does the same to a server with
clients; both may run at once, in two shells. The record holds memory and threads at the start, the
end and by the hour, and latency interval by interval. Exit status 1 when something grew. Linux:
figures are /proc's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np

from diffusionact import machine, manifest
from diffusionact.assets import bundle_path, driver_path, portrait_paths
from diffusionact.commands.model import RATE
from diffusionact.files import write_whole
from diffusionact.runtime.camera import open_camera
from diffusionact.runtime.clip import prepare_portrait
from diffusionact.runtime.control import Goal
from diffusionact.runtime.live import LiveSession, LiveSettings
from diffusionact.runtime.mjpeg import HttpSink
from diffusionact.runtime.reenactor import Reenactor
from diffusionact.runtime.settings import Settings
from diffusionact.runtime.sinks import SeveralSinks

SAMPLES = 120  # of a session, at least one a second apart
INTERVALS = 12  # of the course that is told
SETTLED = 0.25  # of the session, after which nothing may grow any more
# Allocators breathe; a picture a second would be 26 MB a minute.
GROWTH_MB, GROWTH_SHARE = 8.0, 0.03
LATENCY_DRIFT, TAIL_DRIFT = 1.3, 2.0  # of the median and of p99, last quarter over second


@dataclass(frozen=True)
class Sample:
    """at_s: since the start; memory_mb: resident; latencies_ms: of faces since the last sample."""

    at_s: float
    memory_mb: float
    threads: int
    files: int
    latencies_ms: tuple[float, ...] = ()


@dataclass(frozen=True)
class Moment:
    """One interval of a session. at_s: its end, since the start; memory_mb, threads, files: medians;
    p50_ms, p99_ms: of the latency, None where no face was shown."""

    at_s: float
    memory_mb: float
    threads: int
    files: int
    faces: int
    p50_ms: float | None
    p99_ms: float | None


@dataclass(frozen=True)
class Verdict:
    """Medians of the second quarter and of the last; latency of all: p50 and p99 a quarter."""

    seconds: float
    faces: int
    memory_mb: tuple[float, float]
    threads: tuple[int, int]
    files: tuple[int, int]
    p50_ms: tuple[float, ...]
    p99_ms: tuple[float, ...]

    @property
    def flat(self) -> bool:
        """Whether nothing grew, and faces, where there were any, came to the end."""
        early, late = self.memory_mb
        latency = self.faces == 0 or (
            bool(self.p50_ms)
            and self.p50_ms[-1] <= LATENCY_DRIFT * self.p50_ms[1]
            and self.p99_ms[-1] <= TAIL_DRIFT * self.p99_ms[1]
        )
        return (
            late - early <= max(GROWTH_MB, GROWTH_SHARE * early)
            and self.threads[1] <= self.threads[0]
            and self.files[1] <= self.files[0]
            and latency
        )


def course(samples: Sequence[Sample], intervals: int = INTERVALS) -> list[Moment]:
    """Return how a session went, interval by interval."""
    parts = np.array_split(np.arange(len(samples)), min(intervals, len(samples)))
    return [_moment([samples[i] for i in part]) for part in parts]


def _moment(part: Sequence[Sample]) -> Moment:
    latencies = np.concatenate([one.latencies_ms for one in part])
    p50, p99 = np.percentile(latencies, (50, 99)) if len(latencies) else (None, None)
    return Moment(
        round(part[-1].at_s, 1),
        round(float(np.median([one.memory_mb for one in part])), 1),
        int(np.median([one.threads for one in part])),
        int(np.median([one.files for one in part])),
        len(latencies),
        None if p50 is None else round(float(p50), 1),
        None if p99 is None else round(float(p99), 1),
    )


def record(samples: Sequence[Sample]) -> dict[str, Any]:
    """Return what is kept of a session: the verdict, start, end and slope of memory and threads,
    the course of it, and the machine."""
    verdict = judge(samples)
    kept: dict[str, Any] = {**asdict(verdict), "flat": verdict.flat}
    hours = np.array([one.at_s for one in samples]) / 3600.0
    settled = hours >= SETTLED * hours[-1]
    for name in ("memory_mb", "threads"):
        values = np.array([getattr(one, name) for one in samples], float)
        slope = np.polyfit(hours[settled], values[settled], 1)[0]
        kept[f"{name}_start_end"] = [round(float(values[0]), 1), round(float(values[-1]), 1)]
        kept[f"{name}_an_hour"] = round(float(slope), 2)  # after the first quarter
    return {
        **kept,
        "load_average": [round(load, 2) for load in os.getloadavg()],
        "machine": machine.describe_briefly(machine.describe()),
        "course": [asdict(moment) for moment in course(samples)],
    }


def sample(pid: int, at_s: float, latencies_ms: Sequence[float] = ()) -> Sample:
    """Return what a process holds now. Raises: OSError when there is none, or no /proc."""
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    status = dict(line.split(":", 1) for line in lines if ":" in line)
    memory_mb = int(status["VmRSS"].split()[0]) / 1024.0
    files = len(os.listdir(f"/proc/{pid}/fd"))
    return Sample(at_s, memory_mb, int(status["Threads"]), files, tuple(latencies_ms))


def watch(
    pid: int,
    seconds: float,
    recent: Callable[[], Sequence[tuple[int, int]]] = lambda: (),
    quiet: bool = False,
    stop: threading.Event | None = None,
) -> list[Sample]:
    """Return samples of a process until the time is up or `stop` is set; recent: as
    `LiveSession.recent`."""
    begun_s, last_ns, samples = time.monotonic(), 0, []
    every_s = max(min(seconds / SAMPLES, 10.0), 0.5)
    polls = max(round(every_s / 0.5), 1)  # `recent` forgets after a second
    stop = stop or threading.Event()
    while (at_s := time.monotonic() - begun_s) < seconds and not stop.is_set():
        latencies_ms: list[float] = []
        for _ in range(polls):
            time.sleep(every_s / polls)
            new = [(shown, ns) for shown, ns in recent() if shown > last_ns]
            last_ns = new[-1][0] if new else last_ns
            latencies_ms += [ns / 1e6 for _, ns in new]
        samples.append(sample(pid, at_s, latencies_ms))
        if not quiet and len(samples) % (SAMPLES // 10) == 0:
            now = samples[-1]
            print(f"{at_s:.0f} s: {now.memory_mb:.1f} MB, {now.threads} threads", file=sys.stderr)
    return samples


def judge(samples: Sequence[Sample]) -> Verdict:
    """Return how the second quarter of a session compares with its last."""
    quarters = np.array_split(np.arange(len(samples)), 4)
    early, late = ([samples[i] for i in quarters[q]] for q in (1, 3))
    latencies = [np.concatenate([samples[i].latencies_ms for i in q]) for q in quarters]
    known = all(len(values) for values in latencies)

    def medians(name: str) -> tuple[float, float]:
        a, b = (float(np.median([getattr(s, name) for s in part])) for part in (early, late))
        return round(a, 1), round(b, 1)

    threads, files = medians("threads"), medians("files")
    return Verdict(
        samples[-1].at_s,
        sum(len(one.latencies_ms) for one in samples),
        medians("memory_mb"),
        (int(threads[0]), int(threads[1])),
        (int(files[0]), int(files[1])),
        tuple(round(float(np.percentile(v, 50)), 1) for v in latencies) if known else (),
        tuple(round(float(np.percentile(v, 99)), 1) for v in latencies) if known else (),
    )


def soak_live(
    bundle: Path, portrait: Path, camera: Path, seconds: float, steps: int | None = None,
    quiet: bool = False,
) -> list[Sample]:  # fmt: skip
    """Return samples of a live session in this process, from a looped clip to a watched page.

    steps: None is as the command `live`, which takes fewer where the machine is slow."""
    stop, samples, lost = threading.Event(), list[Sample](), list[OSError]()
    fewer = manifest.read(bundle).render.fewer if steps is None else ()
    live = LiveSettings(goal=Goal(fps=RATE) if fewer else None)
    with Reenactor.load(bundle, settings=Settings(steps=steps, step_choices=fewer)) as act:
        source = prepare_portrait(act, portrait)
        page = HttpSink(port=0)
        clip = open_camera(str(camera), realtime=True, loop=True)
        session = LiveSession(act, [source], clip, SeveralSinks([page]), live)

        def look(address: str) -> None:
            try:
                _look(address, stop)
            except OSError as error:  # nobody watches any more: not the session that was asked for
                if not stop.is_set():
                    lost.append(error)
                    stop.set()

        def observe() -> None:
            try:
                while not session.recent() and not stop.wait(0.1):
                    pass
                client = threading.Thread(target=look, args=(page.name,))
                client.start()
                samples.extend(watch(os.getpid(), seconds, session.recent, quiet, stop))
                stop.set()
                client.join()
            finally:
                stop.set()

        observer = threading.Thread(target=observe)
        observer.start()
        try:
            session.run(stop)
        finally:
            stop.set()
            observer.join()
    if lost:
        raise lost[0]
    return samples


def _look(address: str, stop: threading.Event) -> None:
    """A client of the page, as OBS is."""
    with urllib.request.urlopen(address + "stream.mjpg", timeout=30.0) as pictures:
        while not stop.is_set() and pictures.read(4096):
            pass


def tell(kept: Mapping[str, Any]) -> None:
    """Print a record."""
    for name, value in kept.items():
        if name != "course":
            print(f"{name:20} {value}")
    print(f"{'at s':>8}{'MB':>8}{'threads':>9}{'faces':>7}{'p50 ms':>8}{'p99 ms':>8}")
    for one in kept["course"]:
        p50, p99 = (one[name] if one[name] is not None else "-" for name in ("p50_ms", "p99_ms"))
        print(
            f"{one['at_s']:>8}{one['memory_mb']:>8}{one['threads']:>9}{one['faces']:>7}{p50:>8}{p99:>8}"
        )


def main() -> None:
    parser = argparse.ArgumentParser(description="Watch a long session for what grows.")
    parser.add_argument("--bundle", type=Path, default=bundle_path())
    parser.add_argument("--portrait", type=Path, default=portrait_paths()[0])
    parser.add_argument("--camera", type=Path, default=driver_path(), help="a clip, looped")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--pid", type=int, help="watch this process instead")
    parser.add_argument("--seconds", type=float, default=1800.0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    if arguments.pid is not None:
        samples = watch(arguments.pid, arguments.seconds)
    else:
        samples = soak_live(
            arguments.bundle, arguments.portrait, arguments.camera, arguments.seconds,
            arguments.steps,
        )  # fmt: skip
    kept = record(samples)
    tell(kept)
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_whole(arguments.json, json.dumps(kept) + "\n")
    sys.exit(0 if kept["flat"] else 1)


if __name__ == "__main__":
    main()
