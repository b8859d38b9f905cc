"""`diffusionact export`: weights as ONNX files."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffusionact.commands.exits import DONE
from diffusionact.commands.extras import extra
from diffusionact.commands.output import say

HELP = "Weights -> a bundle of ONNX files."


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "weights",
        metavar="WEIGHTS",
        help="a .safetensors file of training, or the folder that `import` wrote",
    )
    parser.add_argument("-o", "--output", required=True, metavar="BUNDLE", help="the new folder")
    parser.set_defaults(log="info")


def run(arguments: argparse.Namespace) -> int:
    """Make a bundle from weights."""
    with extra("export"):
        from diffusionact.export.bundle import export_bundle

        made = export_bundle(Path(arguments.weights), Path(arguments.output))
    told = {"bundle": arguments.output, "name": made.name, "weights_sha256": made.weights_sha256}
    say(arguments, told, f"wrote {arguments.output}; `diffusionact check` tries it")
    return DONE
