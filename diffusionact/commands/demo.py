"""`diffusionact demo`: something to see, from what is in the package."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffusionact.commands.exits import DONE
from diffusionact.commands.model import load_reenactor
from diffusionact.commands.output import report_times

HELP = "Shipped portrait, shipped driver -> a video and a picture."


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o",
        "--output",
        default="out",
        metavar="DIR",
        help="where demo.mp4 and demo.png go (default: out)",
    )
    parser.set_defaults(crop=False, absolute_pose=False, smoothing=1.0, tracker="auto", compat=None)


def run(arguments: argparse.Namespace) -> int:
    """Move the shipped portrait with the shipped clip."""
    from diffusionact.progress import StageProgress
    from diffusionact.runtime.demo import run_demo

    with load_reenactor(arguments) as act, StageProgress(quiet=arguments.quiet) as progress:
        report = run_demo(act, Path(arguments.output), progress)
    report_times(
        arguments, report, f"wrote {report.video} and {report.sheet}: {report.frames} frames"
    )
    return DONE
