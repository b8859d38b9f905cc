"""`diffusionact train`: weights from a recipe."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from diffusionact.commands.exits import DONE
from diffusionact.commands.extras import extra
from diffusionact.commands.model import positive
from diffusionact.commands.output import say

HELP = "Train what a recipe says."


def options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("recipe", metavar="RECIPE.toml")
    add("--resume", action="store_true", help="go on from the run's last checkpoint")
    add(
        "--finish",
        action="store_true",
        help="write the weights of the run's last checkpoint, and train no further",
    )
    add(
        "--dry-run",
        action="store_true",
        help="run a few steps of each stage and tell speed, memory and time; nothing is written",
    )
    add(
        "--slice",
        type=positive,
        metavar="MINUTES",
        help="stop after so long, with a checkpoint; the same command goes on until all is done",
    )
    add("-o", "--output", metavar="DIR", help="the run's folder (default: runs/NAME)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.set_defaults(log="info")


def run(arguments: argparse.Namespace) -> int:
    """Train what a recipe says, rendering its faces first where they are not there yet."""
    with extra("train"):
        from diffusionact.training.config import load_recipe
        from diffusionact.training.data import render_faces
        from diffusionact.training.dry_run import dry_run
        from diffusionact.training.loop import finish_early
        from diffusionact.training.loop import train as train_recipe

        if arguments.finish:
            path = finish_early(arguments.recipe, out=arguments.output)
            say(arguments, {"weights": str(path)}, f"wrote {path}")
            return DONE
        if arguments.dry_run:
            cost = dry_run(arguments.recipe, device=arguments.device)
            if cost is not None:
                say(arguments, {**asdict(cost), "seconds": cost.seconds}, cost.table())
            return DONE
        render_faces(load_recipe(arguments.recipe).pool)
        folder = train_recipe(
            arguments.recipe, resume=arguments.resume, out=arguments.output,
            device=arguments.device, minutes=arguments.slice,
        )  # fmt: skip
    say(arguments, {"run": str(folder)}, f"the run is in {folder}")
    return DONE
