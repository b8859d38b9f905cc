"""`diffusionact bench-compare`: two measurements, and whether they differ by more than noise."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path

from diffusionact.commands.exits import DONE, FAILED
from diffusionact.commands.output import say

HELP = "Two files of `bench --out`: what changed, and whether it is more than noise."


def options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("before", type=Path, metavar="A.json", help="lines of one variant are repeats")
    add("after", type=Path, metavar="B.json")
    add(
        "--fail-above",
        type=share,
        metavar="5%",
        help="exit with 1 when frames take longer by more than this and more than noise",
    )
    add("--force", action="store_true", help="though the machines differ")


def share(text: str) -> float:
    """Return 0.05 for "5%" or "0.05". Raises: argparse.ArgumentTypeError."""
    try:
        value = float(text.removesuffix("%")) / (100.0 if text.endswith("%") else 1.0)
    except ValueError:
        value = -1.0
    if not 0.0 <= value < float("inf"):
        raise argparse.ArgumentTypeError(f"{text!r}; wanted a share such as 5% or 0.05")
    return value


def run(arguments: argparse.Namespace) -> int:
    """Compare two measurements."""
    from diffusionact.bench import records
    from diffusionact.bench.compare import FEWEST_ROUNDS, compare

    before, after = records.read(arguments.before), records.read(arguments.after)
    found = compare(before, after, arguments.force)
    for note in found.notes:
        say(arguments, {"note": note}, f"note: {note}")
    for name in found.unmatched:
        say(arguments, {"unmatched": name}, f"only in one file: {name}")
    last = ""
    for change in found.changes:
        if change.variant != last:
            last = change.variant
            head = f"{'':<12}{'A ms':>10}{'B ms':>10}{'B / A':>8}  {'95 % interval':<16}"
            say_text(arguments, f"{last}\n{head}")
        verdict = "slower" if change.ratio > 1 else "faster"
        if not change.real:
            verdict = "noise" if change.rounds >= FEWEST_ROUNDS else "cannot be told"
        interval = f"{change.low:.3f} to {change.high:.3f}"
        text = (
            f"{change.stage:<12}{change.before_ms:>10.3f}{change.after_ms:>10.3f}"
            f"{change.ratio:>8.3f}  {interval:<16}  {verdict}"
        )
        say(arguments, {**dataclasses.asdict(change), "real": change.real}, text)
    too_slow = [] if arguments.fail_above is None else found.slower_than(arguments.fail_above)
    for change in too_slow:
        text = f"FAILED: {change.variant}: frames take {change.ratio - 1.0:.1%} longer"
        say(arguments, {"failed": change.variant, "ratio": change.ratio}, text)
    return FAILED if too_slow else DONE


def say_text(arguments: argparse.Namespace, text: str) -> None:
    """Print what is for people only."""
    if not arguments.json and not arguments.quiet:
        print(text)
