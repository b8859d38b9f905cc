"""The README's tables of speed, made of benchmarks/results/, and their place in it.

    python -m benchmarks.readme_tables           # writes them
    python -m benchmarks.readme_tables --check   # 1 when the README says something else

Two places, each between two marks: the peers of benchmarks.peers at the published size, and the
shipped model as `diffusionact bench` found it. A place without marks is left out.
"""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from diffusionact import machine
from diffusionact.bench import records
from diffusionact.errors import MediaError
from diffusionact.files import write_whole

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results"
README = ROOT / "README.md"


def marks(name: str) -> tuple[str, str]:
    """What stands before and behind a place."""
    return f"<!-- measured: {name}: begin -->", f"<!-- measured: {name}: end -->"


def peers_text(path: Path) -> str:
    """The peers at the published size."""
    found = json.loads(path.read_text(encoding="utf-8"))
    rows = [
        (
            f"{row['name']} ({row['how']})",
            f"{row['frame_s']:.1f}",
            _ratio(row["ratio"], row["ratio_95"]),
            f"{row['peak_mib'] / 1024:.1f}",
            f"{row['load_s']:.1f}",
        )
        for row in found["rows"]
    ]
    return "\n".join(
        [
            _table(("", "s a frame", "times as fast", "peak GiB", "load s"), rows),
            "",
            f"Network: {found['network']}. {_measured(found)} by "
            f"`{found['command']}`; ratios are medians of rounds in which the rows took turns, "
            "with 95 % intervals.",
        ]
    )


def shipped_text(path: Path) -> str:
    """The shipped model, a row for each variant of the last run in the file."""
    found = records.read(path)
    last = [record for record in found if record["date"] == found[-1]["date"]]
    rows = [
        (
            records.label(record, last),
            f"{record['stages'][records.TOTAL]['p50_ms']:.1f}",
            f"{record['stages'][records.TOTAL]['p95_ms']:.1f}",
            f"{record['stages'][records.TOTAL]['p99_ms']:.1f}",
            f"{record['fps']:.1f}",
            f"{record['start']['load_ms'] / 1e3:.1f}",
            f"{record['memory']['peak_mib']:.0f}",
        )
        for record in last
    ]
    side = last[0]["bundle"]["image_size"]
    head = ("", "p50 ms a frame", "p95", "p99", "fps", "load s", "peak MiB")
    return "\n".join(
        [
            _table(head, rows),
            "",
            f"The shipped model ({side} px) from the driver's landmarks to the finished picture. "
            f"{_measured(last[0])} by `{_command(last)}`.",
        ]
    )


# place -> its results and what is made of them
PLACES: Mapping[str, tuple[str, Callable[[Path], str]]] = {
    "peers": ("peers.json", peers_text),
    "shipped": ("bench.json", shipped_text),
}


def with_tables(text: str, results: Path = RESULTS) -> str:
    """The README's text with every marked place filled anew.

    Raises: MediaError when only one of two marks is there, or a place has no results.
    """
    for name, (file, make) in PLACES.items():
        begin, end = marks(name)
        if (begin in text) != (end in text):
            raise MediaError(
                f"the README has one of the marks {begin!r} and {end!r}; add the other"
            )
        if begin not in text:
            continue
        if not (results / file).is_file():
            raise MediaError(f"{results / file}: missing, and the README has a place for it")
        text = placed(text, name, make(results / file))
    return text


def placed(text: str, name: str, made: str) -> str:
    """The text with what was made between the marks of a place, both of which it has."""
    begin, end = marks(name)
    before, rest = text.split(begin, 1)
    return f"{before}{begin}\n{made}\n{end}{rest.split(end, 1)[1]}"


# option of `diffusionact bench` -> its default, as `_command` writes values
DEFAULTS = {
    "backend": "auto",
    "precision": "auto",
    "steps": "none",
    "threads": "0",
    "batch": "1",
    "approximate": "none",
    "device": "auto",
}


def _command(found: Sequence[records.Record]) -> str:
    """The command that measures these variants again."""
    words = ["diffusionact bench"]
    for option, default in DEFAULTS.items():
        said = (str(record["variant"].get(option, default)).lower() for record in found)
        asked = list(dict.fromkeys(said))
        if asked != [default]:
            words.append(f"--{option} {','.join(asked)}")
    return " ".join(words)


def _measured(record: Mapping[str, Any]) -> str:
    versions = record["versions"]
    used = ", ".join(f"{n} {versions[n]}" for n in ("onnxruntime", "openvino") if n in versions)
    return (
        f"Measured on {machine.describe_briefly(record['machine'])}, {record['date'][:10]}, load "
        f"average {record['load_average']} before, {used}, commit `{record['commit']}`,"
    )


def _ratio(ratio: float, interval: Sequence[float]) -> str:
    low, high = interval
    return "1" if low == high == 1.0 else f"{ratio:.2f} ({low:.2f}–{high:.2f})"


def _table(head: Sequence[str], rows: Sequence[Sequence[str]]) -> str:
    lines = ["| " + " | ".join(line) + " |" for line in (head, *rows)]
    return "\n".join([lines[0], "| --- |" + " ---: |" * (len(head) - 1), *lines[1:]])


def main() -> int:
    """0, or 1 when the README is not what the results say."""
    form = argparse.RawTextHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    parser.add_argument("--check", action="store_true", help="write nothing")
    given = parser.parse_args()
    text = README.read_text(encoding="utf-8")
    wanted = with_tables(text)
    if given.check:
        if text != wanted:
            print("README.md differs from benchmarks/results; run without --check", file=sys.stderr)
        return int(text != wanted)
    write_whole(README, wanted)
    return 0


if __name__ == "__main__":
    sys.exit(main())
