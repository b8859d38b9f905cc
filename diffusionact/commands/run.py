"""`diffusionact run`: a whole clip."""

from __future__ import annotations

import argparse

from diffusionact.commands.exits import DONE
from diffusionact.commands.model import load_reenactor
from diffusionact.commands.output import report_times

HELP = "Move a portrait with the face in a picture, video or track."


def options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-s", "--source", required=True, metavar="PORTRAIT", help="the face to move, a picture")
    add(
        "-d",
        "--driver",
        required=True,
        metavar="DRIVER",
        help="the motion: a picture, folder, video or landmark track (.npz)",
    )
    add(
        "-o",
        "--output",
        required=True,
        metavar="OUT",
        help="a video (the driver's sound is kept), picture, landmark track, or folder",
    )
    add("--crop", action="store_true", help="the bare face, not pasted into the portrait")
    add("--face", type=int, metavar="N", help="which face of the portrait, from 1, largest first")
    add(
        "--absolute-pose",
        action="store_true",
        help="the driver's head pose as it is, not its change from rest",
    )
    add(
        "--smoothing",
        type=float,
        default=1.0,
        metavar="X",
        help="of the driver's motion: 0 is off, 2 twice as strong (default: 1)",
    )
    kinds = ("auto", "mediapipe", "published")
    add("--tracker", default="auto", choices=kinds, help="auto: the bundle's own where it has one")
    add("--fresh", action="store_true", help="start anew where an interrupted run would go on")
    add("--compat", choices=("published",), help="the authors' results, surprises included")


def run(arguments: argparse.Namespace) -> int:
    """Move a portrait with a driver."""
    from diffusionact.progress import StageProgress
    from diffusionact.runtime.clip import run_clip
    from diffusionact.runtime.parts import forget_parts

    if arguments.fresh:
        forget_parts(arguments.output)
    with load_reenactor(arguments) as act, StageProgress(quiet=arguments.quiet) as progress:
        report = run_clip(
            act,
            arguments.source,
            arguments.driver,
            arguments.output,
            face=arguments.face,
            progress=progress,
        )
    faces = f"{report.frames} frames, {report.seen} with a face"
    if report.resumed:
        faces += f", {report.resumed} from an interrupted run"
    report_times(arguments, report, f"wrote {report.output}: {faces}")
    return DONE
