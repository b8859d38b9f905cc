"""`diffusionact import`: what others published, as our weights."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from diffusionact.commands.exits import DONE
from diffusionact.commands.extras import extra
from diffusionact.commands.output import say

HELP = "Published checkpoints -> a folder of weights."


def options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("diffusionact", nargs="?", metavar="diffusionact_model.pt", help="DiffusionAct's file")
    add("-o", "--output", required=True, metavar="DIR", help="the folder; one there is added to")
    add(
        "--diffae",
        metavar="last.ckpt",
        help="DiffAE's file, for what the first one lacks, or alone to train from",
    )
    add("--s3fd", metavar="FILE", help="the face detector's file")
    add("--fan", metavar="FILE", help="the landmark detector's file")
    add("--emoca", metavar="DIR", help="EMOCA_v2_lr_mse_20, the face encoder's folder")
    add("--gaze", metavar="FILE", help="the gaze estimator's file")
    add("--flame", nargs="+", metavar="FILE", help="generic_model.pkl and landmark_embedding.npy")
    add("--network", metavar="NAME", help="its sizes: ffhq256, ffhq128, ffhq64 or a JSON file")


def run(arguments: argparse.Namespace) -> int:
    """Read published checkpoints into a folder of weights."""
    with extra("import", "export"):
        from diffusionact.training.imports import Request, import_published
        from diffusionact.training.published import load_network

        given = {
            name: Path(value)
            for name in ("diffusionact", "diffae", "s3fd", "fan", "emoca", "gaze")
            if (value := getattr(arguments, name)) is not None
        }
        flame = tuple(Path(file) for file in arguments.flame or ())
        network = load_network(arguments.network) if arguments.network else None
        report = import_published(
            Request(**given, flame=flame, network=network), Path(arguments.output)
        )
    say(arguments, dataclasses.asdict(report), "\n".join(report.lines()))
    return DONE
