"""`diffusionact live`: a portrait moved by a camera, now."""

from __future__ import annotations

import argparse
import dataclasses
import os
import signal
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from diffusionact.commands.exits import DONE, INTERRUPTED, TERMINATED
from diffusionact.commands.model import (
    RATE,
    goal_options,
    goal_or_rate,
    load_reenactor,
    positive,
    warn_of_missing_label,
)
from diffusionact.commands.output import say
from diffusionact.errors import SettingsError

if TYPE_CHECKING:
    from diffusionact.runtime.live import LiveReport
    from diffusionact.runtime.timing import StageTimes

HELP = "Move a portrait with a camera, live, in a window, a virtual camera, a page or a file."
MOST_SIDE_PX = 1280  # of a portrait: a camera's. A phone's photo is shown small, and takes longer
EPILOG = (
    "keys, in the window or the terminal: r finds your neutral face anew, o shows or hides the "
    "figures, n or 1 to 9 changes the portrait, q ends"
)


def options(parser: argparse.ArgumentParser) -> None:
    parser.epilog = EPILOG
    add = parser.add_argument
    add(
        "-s",
        "--source",
        required=True,
        action="append",
        metavar="PORTRAIT",
        help="the face to move, a picture; give more to change between them",
    )
    add(
        "--camera", default="0", metavar="CAMERA", help="number, path, address or clip (default: 0)"
    )
    add("--realtime", action="store_true", help="a clip's frames come by its clock, as a camera's")
    add("--loop", action="store_true", help="begin the clip again when it ends")
    add(
        "--sink",
        action="append",
        metavar="SINK",
        help="window (default), virtual[:DEVICE], http[:[HOST:]PORT] or a video to write; "
        "give more to show it in several places",
    )
    goal_options(parser)
    add("--seconds", type=positive, metavar="N", help="end after this time")
    add("--no-label", action="store_true", help="without the mark AI-generated in the corner")
    add("--no-overlay", action="store_true", help="begin without the figures in the window")
    add("--crop", action="store_true", help="the bare face, not pasted into the portrait")
    add("--face", type=int, metavar="N", help="which face of the portrait, from 1, largest first")
    add(
        "--absolute-pose",
        action="store_true",
        help="your head pose as it is, not its change from rest",
    )
    add("--smoothing", type=float, default=1.0, metavar="X", help="of your motion: 0 is off")
    kinds = ("auto", "mediapipe", "published")
    add("--tracker", default="auto", choices=kinds, help="auto: the bundle's own where it has one")
    parser.set_defaults(compat=None, log="info")


def run(arguments: argparse.Namespace) -> int:
    """Move portraits with a camera until it ends."""
    from diffusionact.runtime.camera import open_camera
    from diffusionact.runtime.clip import prepare_portrait
    from diffusionact.runtime.live import LiveSession, LiveSettings
    from diffusionact.runtime.sinks import SeveralSinks, open_sink

    camera = open_camera(arguments.camera, realtime=arguments.realtime, loop=arguments.loop)
    goal = goal_or_rate(arguments, RATE if camera.live else None)
    specs = arguments.sink or ["window"]
    _check_sinks(specs, [arguments.camera, *arguments.source])
    sinks = SeveralSinks([open_sink(spec) for spec in specs])
    if arguments.no_label:
        warn_of_missing_label()
    settings = LiveSettings(
        not arguments.no_label, not arguments.no_overlay, goal, arguments.seconds
    )
    with load_reenactor(arguments) as act, _ended_by_signals() as ended:
        sources = [
            prepare_portrait(act, path, arguments.face, MOST_SIDE_PX) for path in arguments.source
        ]
        report = LiveSession(act, sources, camera, sinks, settings).run(ended.event)
    say(arguments, _values(report), _text(report, sinks.name))
    return ended.status


def _check_sinks(specs: Sequence[str], inputs: Sequence[str]) -> None:
    """Raises: SettingsError for a sink that is there twice, or that would overwrite an input."""
    places = [os.path.realpath(spec) for spec in specs]
    taken = {os.path.realpath(path) for path in inputs}
    for i, (spec, place) in enumerate(zip(specs, places, strict=True)):
        if place in places[:i]:
            raise SettingsError(f"--sink {spec}: is there twice; name another, or leave one out")
        if place in taken:
            raise SettingsError(f"--sink {spec}: would overwrite what is read; name another")


@dataclasses.dataclass
class _Ended:
    event: threading.Event
    status: int = DONE


@contextmanager
def _ended_by_signals() -> Iterator[_Ended]:
    """The first SIGINT or SIGTERM ends the session in order, so that its file is complete; a
    second one does what signals do."""
    ended = _Ended(threading.Event())
    statuses = {signal.SIGINT: INTERRUPTED, signal.SIGTERM: TERMINATED}

    def end(number: int, frame: object) -> None:
        ended.status = statuses[signal.Signals(number)]
        ended.event.set()
        restore()

    before = {number: signal.signal(number, end) for number in statuses}

    def restore() -> None:
        for number, handler in before.items():
            signal.signal(number, handler)

    try:
        yield ended
    finally:
        restore()


def _values(report: LiveReport) -> dict[str, Any]:
    return {
        "faces_per_second": round(report.faces_per_second, 2),
        "latency_ms": None if report.latency is None else _percentiles(report.latency),
        "drops": {**report.dropped, "total": sum(report.dropped.values())},
        "stages_ms": {stage: _percentiles(times) for stage, times in report.times.items()},
        "faces": report.faces,
        "shown": report.shown,
        "seconds": round(report.seconds, 2),
        "steps": report.steps,
        "clock_held_ms": round(report.clock_held_ms, 1),
        "step_changes": [dataclasses.asdict(change) for change in report.changes],
    }


def _percentiles(times: StageTimes) -> dict[str, float]:
    return {name: round(getattr(times, f"{name}_ms"), 2) for name in ("p50", "p95", "p99")}


def _text(report: LiveReport, where: str) -> str:
    lines = [
        f"{report.faces} faces in {report.seconds:.1f} s, {report.faces_per_second:.1f} a second, "
        f"{sum(report.dropped.values())} dropped, to {where}"
    ]
    if report.times:
        lines.append(f"{'ms a face':<18}{'p50':>9}{'p95':>9}{'p99':>9}")
    lines += [
        f"{stage:<18}{t.p50_ms:>9.1f}{t.p95_ms:>9.1f}{t.p99_ms:>9.1f}"
        for stage, t in report.times.items()
    ]
    return "\n".join(lines)
