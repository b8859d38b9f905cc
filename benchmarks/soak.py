"""A long session, watched: is memory flat, are threads and open files, is the latency?

    python -m benchmarks.soak --camera CLIP --seconds 1800 --json out/soak.json
    python -m benchmarks.soak --pid PID --seconds 1800      # of another process, such as serve

The first form runs `live` from a looped clip into an MJPEG page that one client watches; the
second watches the process only. Exit status 1 when something grew. Linux: figures are /proc's.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import threading
import time
import urllib.request
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from diffusionact.assets import bundle_path, driver_path, portrait_paths
from diffusionact.files import write_whole
from diffusionact.runtime.camera import open_camera
from diffusionact.runtime.clip import prepare_portrait
from diffusionact.runtime.live import LiveSession, LiveSettings
from diffusionact.runtime.mjpeg import HttpSink
from diffusionact.runtime.reenactor import Reenactor, Settings
from diffusionact.runtime.sinks import SeveralSinks

SAMPLES = 120  # of a session, at least one a second apart
SETTLED = 0.25  # of the session, after which nothing may grow any more
GROWTH_MB, GROWTH_SHARE = (
    8.0,
    0.03,
)  # allocators breathe; a picture a second would be 26 MB a minute
LATENCY_DRIFT = 1.3  # of the median, last quarter over second


@dataclass(frozen=True)
class Sample:
    """at_s: since the start; memory_mb: resident; latencies_ms: of faces since the last sample."""

    at_s: float
    memory_mb: float
    threads: int
    files: int
    latencies_ms: tuple[float, ...] = ()


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
        """Whether nothing grew."""
        early, late = self.memory_mb
        latency = not self.p50_ms or self.p50_ms[-1] <= LATENCY_DRIFT * self.p50_ms[1]
        return (
            late - early <= max(GROWTH_MB, GROWTH_SHARE * early)
            and self.threads[1] <= self.threads[0]
            and self.files[1] <= self.files[0]
            and latency
        )


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
) -> list[Sample]:
    """Return samples of a process until the time is up; recent: as `LiveSession.recent`."""
    begun_s, last_ns, samples = time.monotonic(), 0, []
    every_s = max(min(seconds / SAMPLES, 10.0), 0.5)
    polls = max(round(every_s / 0.5), 1)  # `recent` forgets after a second
    while (at_s := time.monotonic() - begun_s) < seconds:
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
    """Return samples of a live session in this process, from a looped clip to a watched page."""
    stop, samples = threading.Event(), list[Sample]()
    with Reenactor.load(bundle, settings=Settings(steps=steps)) as act:
        source = prepare_portrait(act, portrait)
        page = HttpSink(port=0)
        clip = open_camera(str(camera), realtime=True, loop=True)
        session = LiveSession(act, [source], clip, SeveralSinks([page]), LiveSettings())

        def observe() -> None:
            try:
                while not session.recent() and not stop.wait(0.1):
                    pass
                client = threading.Thread(target=_look, args=(page.name, stop))
                client.start()
                samples.extend(watch(os.getpid(), seconds, session.recent, quiet))
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
    return samples


def _look(address: str, stop: threading.Event) -> None:
    """A client of the page, as OBS is."""
    with urllib.request.urlopen(address + "stream.mjpg", timeout=30.0) as pictures:
        while not stop.is_set() and pictures.read(4096):
            pass


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
    verdict = judge(samples)
    for name, value in {**asdict(verdict), "flat": verdict.flat}.items():
        print(f"{name:12} {value}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        kept = {**asdict(verdict), "flat": verdict.flat}
        write_whole(arguments.json, json.dumps(kept) + "\n")
    sys.exit(0 if verdict.flat else 1)


if __name__ == "__main__":
    main()
