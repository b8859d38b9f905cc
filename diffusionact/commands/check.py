"""`diffusionact check`: what works here, and what to do about the rest."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from diffusionact.commands.exits import DONE, FAILED
from diffusionact.commands.model import bundle_argument
from diffusionact.commands.output import say

HELP = "Versions, devices, backends, tracker, and a bundle's health."


def options(parser: argparse.ArgumentParser) -> None:
    bundle_argument(parser)


def run(arguments: argparse.Namespace) -> int:
    """Report what works here."""
    from diffusionact.runtime.check import findings

    passed = True
    for finding in findings(Path(arguments.bundle)):
        passed = passed and finding.passed is not False
        mark = {True: "ok", False: "FAILED", None: "-"}[finding.passed]
        text = f"{mark:<7}{finding.subject:<28} {finding.detail}"
        if finding.command and finding.command not in finding.detail:
            text += f"\n{'':<36}run: {finding.command}"
        say(arguments, dataclasses.asdict(finding), text)
    return DONE if passed else FAILED
