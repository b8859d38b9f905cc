"""What commands print on stdout, and the options that say how."""

from __future__ import annotations

import argparse
import dataclasses
import json
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from diffusionact.runtime.clip import ClipReport
    from diffusionact.runtime.demo import DemoReport


def talk_options() -> argparse.ArgumentParser:
    """Return the options of every command: --json and --quiet."""
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--json",
        action="store_true",
        help="one JSON object a line on stdout, and nothing else there",
    )
    options.add_argument("-q", "--quiet", action="store_true", help="errors only")
    return options


def say(arguments: argparse.Namespace, values: Mapping[str, Any], text: str) -> None:
    """Print one result: as JSON, as text, or not at all."""
    if arguments.json:
        print(json.dumps(values, separators=(",", ":"), default=str), flush=True)
    elif not arguments.quiet:
        print(text, flush=True)


def report_times(
    arguments: argparse.Namespace, report: DemoReport | ClipReport, first: str
) -> None:
    """Print what was written, how fast, and milliseconds a stage."""
    lines = [f"{first}, in {report.seconds:.1f} s"]
    if report.times:
        lines.append(f"{'ms a frame':<12}{'p50':>9}{'p95':>9}{'p99':>9}")
    lines += [
        f"{stage:<12}{t.p50_ms:>9.1f}{t.p95_ms:>9.1f}{t.p99_ms:>9.1f}"
        for stage, t in report.times.items()
    ]
    say(arguments, dataclasses.asdict(report), "\n".join(lines))
