"""`diffusionact eval compare`, `report` and `study`: of what was measured before."""

from __future__ import annotations

import argparse
from dataclasses import asdict
from pathlib import Path

from diffusionact.commands.output import say
from diffusionact.errors import SettingsError
from diffusionact.evaluation import study as studies
from diffusionact.evaluation.columns import COLUMNS, text_of
from diffusionact.evaluation.report import write_report
from diffusionact.evaluation.runfile import read_rows
from diffusionact.evaluation.statistics import Change, changes


def compare(arguments: argparse.Namespace) -> bool:
    """Return whether B is worse in any measure by more than noise; tell all changes."""
    found, counts = changes(read_rows(arguments.a), read_rows(arguments.b))
    if not counts["both"]:
        raise SettingsError(
            f"{arguments.a} and {arguments.b} have no frame in common; compare runs on the same "
            "data, with the same names of clips"
        )
    for name, change in found.items():
        say(arguments, {"measure": name, **asdict(change)}, _line(name, change))
    only = f"{counts['both']} in both, {counts['only_a']} only in A, {counts['only_b']} only in B"
    worse = sorted(name for name, change in found.items() if change.verdict == "worse")
    better = sorted(name for name, change in found.items() if change.verdict == "better")
    text = f"worse: {', '.join(worse) or 'nothing'}; better: {', '.join(better) or 'nothing'}"
    say(
        arguments,
        {"summary": True, **counts, "worse": worse, "better": better},
        f"{text} (lines: {only})",
    )
    return bool(worse)


def report(arguments: argparse.Namespace) -> None:
    """Write the page of runs."""
    shown = write_report(arguments.output, arguments.runs, arguments.published)
    say(
        arguments,
        {"wrote": str(arguments.output), "runs": shown},
        f"wrote {arguments.output}: {len(shown)} runs",
    )


def study(arguments: argparse.Namespace) -> None:
    """Write the page of a study, or count what was chosen."""
    if arguments.count:
        for share in studies.count(arguments.count):
            percent = 100 * share.chosen / share.shown
            text = (
                f"{share.method:<24}{percent:>5.1f} %  ({share.chosen} of {share.shown}; "
                f"{100 * share.low:.1f} to {100 * share.high:.1f} %)"
            )
            say(arguments, asdict(share), text)
        return
    methods = {}
    for word in arguments.methods:
        name, equals, folder = word.partition("=")
        if not equals or not name or not folder:
            raise SettingsError(f"{word!r}; wanted NAME=DIR, such as ours=out/ours")
        methods[name] = Path(folder)
    shown = [arguments.source, arguments.driver]
    folders = [*methods.values(), *(folder for folder in shown if folder is not None)]
    names = studies.common_names(folders)
    asked = studies.questions(names, list(methods), arguments.questions, arguments.seed)
    studies.write_study(arguments.output, methods, asked, shown)
    say(
        arguments,
        {"wrote": str(arguments.output), "questions": len(asked), "methods": list(methods)},
        f"wrote {arguments.output}: {len(asked)} pairs of {len(methods)} methods",
    )


def _line(name: str, change: Change) -> str:
    ends = ""
    if change.low is not None and change.high is not None:
        ends = f"  [{change.low:+.4g}, {change.high:+.4g}]"
    a, b = text_of(name, change.a), text_of(name, change.b)
    title = COLUMNS[name].title
    return f"{title:<22}{a:>10} -> {b:<10}{change.change:>+11.4g}{ends:<29}{change.verdict}"
