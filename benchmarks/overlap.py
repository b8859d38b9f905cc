"""What it brings a clip to decode while tracking and to encode while rendering.

    python -m benchmarks.overlap --json benchmarks/results/overlap.json

The shipped clip on the shipped portrait, each pass of `diffusionact run` with a thread beside it
and without, in turns. A ratio below 1 means that the overlap pays. On a CPU the networks use all
cores already, so there is little to win; where a GPU renders, all of the decoding and encoding is.
"""

from __future__ import annotations

import argparse
import json
import shutil
import statistics
import tempfile
import time
from collections.abc import Callable, Generator, Iterable, Mapping
from pathlib import Path
from typing import Any, TypeVar
from unittest import mock

from diffusionact import machine
from diffusionact.assets import bundle_path, driver_path, portrait_paths
from diffusionact.files import write_whole
from diffusionact.runtime.clip import prepare_portrait
from diffusionact.runtime.media import open_reader
from diffusionact.runtime.motion import Motion, driver_motion
from diffusionact.runtime.reenactor import Reenactor
from diffusionact.runtime.rendering import render_motion
from diffusionact.runtime.session import Session
from diffusionact.runtime.settings import Settings
from diffusionact.runtime.writer import open_writer

T = TypeVar("T")


def serially(items: Iterable[T]) -> Generator[tuple[T, int], None, None]:
    """Yield what `read_ahead` yields, without its thread."""
    begun_ns = time.monotonic_ns()
    for item in items:
        yield item, time.monotonic_ns() - begun_ns
        begun_ns = time.monotonic_ns()


def one_by_one(items: Iterable[T], write: Callable[[T], None]) -> None:
    """Do what `write_behind` does, without its thread."""
    for item in items:
        write(item)


def spent_s(work: Callable[[], object], overlap: bool) -> tuple[float, float]:
    """Return the seconds on the wall and of all cores."""
    wall_s, cpu_s = time.monotonic(), time.process_time()
    if overlap:
        work()
    else:
        with (
            mock.patch("diffusionact.runtime.motion.read_ahead", serially),
            mock.patch("diffusionact.runtime.rendering.write_behind", one_by_one),
        ):
            work()
    return time.monotonic() - wall_s, time.process_time() - cpu_s


def compare(work: Callable[[], object], frames: int, repeats: int) -> Mapping[str, Any]:
    """Return milliseconds a frame of both ways and their ratio, medians over the repeats."""
    spent_s(work, overlap=True)  # warm-up
    ratios: list[float] = []
    table: dict[bool, list[tuple[float, float]]] = {True: [], False: []}
    for i in range(repeats):
        for overlap in (True, False) if i % 2 else (False, True):
            table[overlap].append(spent_s(work, overlap))
        ratios.append(table[True][-1][0] / table[False][-1][0])

    def median_ms(overlap: bool, which: int) -> float:
        return round(statistics.median(row[which] for row in table[overlap]) * 1000 / frames, 2)

    return {
        "frames": frames,
        "repeats": repeats,
        "ratio": round(statistics.median(ratios), 3),
        "ratios": [round(ratio, 3) for ratio in sorted(ratios)],
        "ms_a_frame": {"overlapped": median_ms(True, 0), "serial": median_ms(False, 0)},
        "core_ms_a_frame": {"overlapped": median_ms(True, 1), "serial": median_ms(False, 1)},
    }


def rendering(act: Reenactor, session: Session, motion: Motion, output: Path) -> None:
    """The second pass, into a video with the driver's sound."""
    session.start(motion.track)
    with open_writer(output) as writer:
        render_motion(act, session, motion, writer)


def shortened(motion: Motion, frames: int) -> Motion:
    """The first frames of a motion."""
    track = motion.track
    few = type(track)(
        track.landmarks[:frames], track.gaze[:frames], track.pts_ns[:frames], track.size
    )
    times = {stage: values[:frames] for stage, values in motion.times.items()}
    return Motion(few, motion.spans_ns[:frames], times)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--frames", type=int, default=40, help="of the second pass")
    parser.add_argument("--backend", default="auto")
    parser.add_argument("--steps", type=int)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    settings = Settings(steps=arguments.steps, backend=arguments.backend)
    with (
        tempfile.TemporaryDirectory() as folder,
        Reenactor.load(bundle_path(), settings=settings) as act,
    ):
        clip = Path(shutil.copy(driver_path(), folder))  # away from its landmarks
        source = prepare_portrait(act, portrait_paths()[0])
        motion = driver_motion(act, open_reader(clip))
        session = act.session(source)
        few = shortened(motion, arguments.frames)
        results = {
            "track": compare(
                lambda: driver_motion(act, open_reader(clip)),
                len(motion.spans_ns),
                arguments.repeats,
            ),
            "render": compare(
                lambda: rendering(act, session, few, Path(folder) / "out.mp4"),
                len(few.spans_ns),
                arguments.repeats,
            ),
        }
    report = {
        "command": "python -m benchmarks.overlap",
        "when": machine.now(),
        "commit": machine.commit(),
        "load_average": machine.load_average(),
        "machine": machine.describe(),
        "versions": machine.versions(),
        **results,
    }
    print(json.dumps(report))
    if arguments.json:
        write_whole(arguments.json, json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
