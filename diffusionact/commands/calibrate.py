"""`diffusionact calibrate`: what 8-bit engines need to know of the networks' real inputs."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffusionact.commands.exits import DONE
from diffusionact.commands.extras import extra
from diffusionact.commands.model import bundle_argument
from diffusionact.commands.output import say

HELP = "Records what the networks are fed, and finds the ranges for 8-bit engines."
FRAMES = 8


def options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    bundle_argument(parser)
    add("-o", "--output", type=Path, required=True, metavar="DIR", help="for build --calibration")
    add("--kind", default="int8", choices=("int8", "fp8"))
    add(
        "--frames",
        type=int,
        default=FRAMES,
        metavar="N",
        help=f"of the shipped driver, every step of each is recorded (default: {FRAMES})",
    )


def run(arguments: argparse.Namespace) -> int:
    """Record inputs, and calibrate every component that 8 bits are for."""
    from diffusionact.progress import Progress
    from diffusionact.runtime.ort import run_graph
    from diffusionact.runtime.recorder import record

    with extra("calibrate", "rtx"):
        from diffusionact.engines.calibrate import calibrate
        from diffusionact.engines.quantize import LEAST_PSNR_DB

    bundle_dir = Path(arguments.bundle)
    with Progress("recording", quiet=arguments.quiet) as progress:
        feeds = record(bundle_dir, arguments.frames, progress)
    for made in calibrate(bundle_dir, arguments.kind, feeds, arguments.output, run_graph):
        found = made.calibration
        text = (
            f"{made.component:<18} {found.kind}: {found.psnr_db:.1f} dB from fp32, "
            f"{LEAST_PSNR_DB:.0f} dB is the least; {len(found.ranges)} convolutions, "
            f"{found.samples} recorded inputs; {made.path}"
        )
        values = {
            "component": made.component,
            "kind": found.kind,
            "psnr_db": found.psnr_db,
            "convolutions": len(found.ranges),
            "samples": found.samples,
            "path": str(made.path),
        }
        say(arguments, values, text)
    return DONE
