"""`diffusionact bench`: how fast a bundle is here."""

from __future__ import annotations

import argparse
import logging
from pathlib import Path
from typing import TYPE_CHECKING

from diffusionact.assets import driver_path, portrait_paths
from diffusionact.commands.exits import DONE
from diffusionact.commands.model import bundle_argument, counts, words
from diffusionact.commands.output import say
from diffusionact.errors import MediaError
from diffusionact.files import check_place

if TYPE_CHECKING:
    from diffusionact.runtime.rig import Task, Variant

HELP = "How fast a bundle is here: stages, frames, start, memory."


def options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    bundle_argument(parser)
    add("-s", "--source", metavar="PORTRAIT", help="(default: the first shipped one)")
    add("-d", "--driver", metavar="DRIVER", help="(default: the shipped clip)")
    add("--backend", type=words, default=("auto",), metavar="NAME,...", help="(default: auto)")
    add("--precision", type=words, default=("auto",), metavar="NAME,...", help="(default: auto)")
    add(
        "--steps",
        type=counts,
        default=(None,),
        metavar="N,...",
        help="step counts, each a variant (default: the bundle's)",
    )
    add("--threads", type=counts, default=(0,), metavar="N,...", help="(default: one a core)")
    add(
        "--batch",
        type=counts,
        default=(1,),
        metavar="N,...",
        help="frames at once, each by networks and threads of its own (default: 1)",
    )
    add(
        "--approximate",
        type=ways,
        default=(None,),
        metavar="WAY,...",
        help="none or reuse (default: none)",
    )
    add("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    add(
        "--whole",
        action="store_true",
        help="read the driver's pictures, and track them where no track lies beside them",
    )
    add("--frames", type=int, metavar="N", help="of each variant (default: 10 s of them)")
    add("--rounds", type=int, default=8, metavar="N", help="turns that variants take (default: 8)")
    add("--out", type=Path, metavar="FILE", help="append a JSON line for each variant")
    add("--html", type=Path, metavar="FILE", help="write a page with plots")
    add(
        "--trace",
        type=Path,
        metavar="FILE",
        help="write a timeline of some frames of the first variant, for chrome://tracing or "
        "ui.perfetto.dev",
    )


def ways(text: str) -> tuple[str | None, ...]:
    """Return ways to approximate, None for "none"."""
    return tuple(None if word == "none" else word for word in words(text))


def run(arguments: argparse.Namespace) -> int:
    """Measure variants of a bundle against one another."""
    from diffusionact.bench import page, records
    from diffusionact.progress import StageProgress
    from diffusionact.runtime.bench import measure, variants_of
    from diffusionact.runtime.rig import Task

    for path in (arguments.out, arguments.html, arguments.trace):
        _check_place(path)
    task = Task(
        Path(arguments.bundle),
        Path(arguments.source or portrait_paths()[0]),
        Path(arguments.driver or driver_path()),
        arguments.device,
        "whole" if arguments.whole else "render",
    )
    variants = variants_of(
        arguments.backend,
        arguments.precision,
        arguments.steps,
        arguments.threads,
        arguments.approximate,
        arguments.batch,
        arguments.device,
    )
    with StageProgress(quiet=arguments.quiet, units={"load": "variant"}) as progress:
        made = measure(
            task, variants, frames=arguments.frames, rounds=arguments.rounds, progress=progress
        )
    for record in made:
        say(arguments, record, records.table(record, records.label(record, made)))
    for warning in records.warnings_of(made):
        logging.getLogger("diffusionact").warning(warning)
    if arguments.out:
        records.append(arguments.out, made)
    if arguments.html:
        page.write(arguments.html, made)
    if arguments.trace:
        _trace(arguments, task, variants[0])
    return DONE


def _check_place(path: Path | None) -> None:
    """Say now, not after minutes of measuring, that a file cannot be written."""
    try:
        if path is not None:
            check_place(path)
    except OSError as error:
        raise MediaError(
            f"{path}: cannot be written ({error.strerror}); name another place"
        ) from error


def _trace(arguments: argparse.Namespace, task: Task, variant: Variant) -> None:
    """Write the timeline, and say where the time goes in it."""
    from diffusionact.runtime.bench import write_trace

    shown = write_trace(task, variant, arguments.trace)
    layers = sorted(shown["layers_ms"].items(), key=lambda item: -item[1])[:5]
    most = ", ".join(f"{kind} {ms / shown['frames']:.1f} ms" for kind, ms in layers)
    text = (
        f"wrote {arguments.trace}: {shown['frames']} frames, "
        f"{shown['stopwatch_ms'] / shown['frames']:.1f} ms each with the profiler on"
        + (f"; most of it in {most}" if most else "")
    )
    say(arguments, {"trace": str(arguments.trace), **shown}, text)
