"""`diffusionact export`: weights as ONNX files, and the way back."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffusionact.commands.exits import DONE
from diffusionact.commands.extras import extra
from diffusionact.commands.output import say

HELP = "Weights -> a bundle of ONNX files; or a bundle -> its weights."


def options(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "weights",
        metavar="WEIGHTS",
        help="a .safetensors file of training, or the folder that `import` wrote; or a bundle, "
        "whose weights come out again",
    )
    parser.add_argument(
        "-o",
        "--output",
        required=True,
        metavar="BUNDLE",
        help="the new folder; of a bundle, the .safetensors file",
    )
    parser.set_defaults(log="info")


def run(arguments: argparse.Namespace) -> int:
    """Make a bundle from weights, or a weights file from a bundle."""
    from diffusionact.manifest import FILE_NAME

    given = Path(arguments.weights)
    return (_restore if (given / FILE_NAME).is_file() else _export)(arguments)


def _export(arguments: argparse.Namespace) -> int:
    with extra("export"):
        from diffusionact.export.bundle import export_bundle

        made = export_bundle(Path(arguments.weights), Path(arguments.output))
    told = {"bundle": arguments.output, "name": made.name, "weights_sha256": made.weights_sha256}
    say(arguments, told, f"wrote {arguments.output}; `diffusionact check` tries it")
    return DONE


def _restore(arguments: argparse.Namespace) -> int:
    with extra("export"):
        from diffusionact.export.restore import restore_weights

        made = restore_weights(Path(arguments.weights), Path(arguments.output))
    told = {
        "weights": arguments.output,
        "weights_sha256": made.sha256,
        "parts": made.parts,
        "same": made.same,
    }
    what = "the file that the bundle was made of" if made.same else "the bundle's networks"
    say(arguments, told, f"wrote {arguments.output}: {what} ({', '.join(made.parts)})")
    return DONE
