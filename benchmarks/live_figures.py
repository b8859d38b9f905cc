"""What `live` and `serve` do on this machine, one after the other, and the table of docs/live.md.

    python -m benchmarks.live_figures --camera CLIP --chromium    # -> benchmarks/results/live.json
    python -m benchmarks.live_figures --again 10     # rows that the host stole over 10 % of
    python -m benchmarks.live_figures --table        # of what is there, in docs/live.md

Every row is a command of its own, as anybody would type it; its figures are the line that it ends
with. Beside them stands how much of the processor the host took away meanwhile: on a machine that is
shared, the rest says little without it. Linux.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from benchmarks.readme_tables import marks, placed
from diffusionact import machine
from diffusionact.assets import driver_path, portrait_paths
from diffusionact.errors import MediaError
from diffusionact.files import write_whole

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "live.json"
PAGE = ROOT / "docs" / "live.md"
STOLEN = 8  # the column of /proc/stat's first line
HEAD = ("", "faces a second", "p50 ms", "p95", "p99", "steps", "stolen")


@dataclass(frozen=True)
class Row:
    """title: in the table; command: its arguments after `python -m`, less where JSON goes."""

    title: str
    command: tuple[str, ...]


def rows(camera: Path, seconds: float, chromium: bool) -> list[Row]:
    """Return what is measured, in order."""
    portrait = os.path.relpath(portrait_paths()[0], ROOT)
    live = ("diffusionact.cli", "live", "-s", portrait, "--camera", str(camera), "--realtime",
            "--loop", "--seconds", f"{seconds:g}")  # fmt: skip
    load = ("benchmarks.serve_load", "--seconds", f"{seconds / 2:g}")
    found = [
        Row("live", live),
        *(Row(f"live --steps {count}", (*live, "--steps", str(count))) for count in (1, 2, 4)),
        Row("serve, 70 points", (*load, "--transport", "landmarks")),
        Row("serve, 4 pages of 5 pictures a second", (*load, "--clients", "4", "--fps", "5")),
    ]
    if chromium:
        found.append(Row("serve, camera pictures, with Chromium on the same cores",
                         (*load, "--chromium", "--transport", "frames")))  # fmt: skip
    return found


def measure(row: Row) -> dict[str, Any]:
    """Return what a command says at its end, and the share of the processor that was stolen.

    Raises: MediaError when it fails.
    """
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "said.json"
        is_live = "live" in row.command
        more = ("--sink", f"{folder}/out.mp4", "--json") if is_live else ("--json", str(file))
        before = _processor()
        done = subprocess.run(
            [sys.executable, "-m", *row.command, *more],
            cwd=ROOT, stdout=subprocess.PIPE, text=True, check=False,
        )  # fmt: skip
        spent = [b - a for a, b in zip(before, _processor(), strict=True)]
        if done.returncode != 0:
            raise MediaError(f"`{_typed(row)}` ended with {done.returncode}; see above")
        said = done.stdout.splitlines()[-1] if is_live else file.read_text(encoding="utf-8")
    return {
        "title": row.title, "command": _typed(row),
        "stolen_percent": round(100.0 * spent[STOLEN - 1] / max(sum(spent), 1), 1),
        **json.loads(said),
    }  # fmt: skip


def table(found: Mapping[str, Any]) -> str:
    """Return the rows in Markdown, and what they were measured on."""
    lines = [HEAD, *(_cells(row) for row in found["rows"])]
    texts = ["| " + " | ".join(line) + " |" for line in lines]
    texts.insert(1, "| --- |" + " ---: |" * (len(HEAD) - 1))
    commands = {row["title"]: row["command"] for row in found["rows"]}
    return "\n".join([
        *texts, "",
        f"Measured one after the other on {machine.describe_briefly(found['machine'])}, "
        f"{found['date'][:10]}, load average {found['load_average']:.2f} before, commit "
        f"`{found['commit']}`, by `{found['command']}`. Latency of `live`: from capture to display; of "
        "`serve`: from the sending of a frame until its picture is back. Steps: those of most "
        "pictures. Stolen: the processor's time that the host gave to others meanwhile.", "",
        *(f"- {title}: `{command}`" for title, command in commands.items()),
    ])  # fmt: skip


def _cells(row: Mapping[str, Any]) -> tuple[str, ...]:
    latency = row.get("latency_ms") or {}
    steps = row.get("steps", "")
    if isinstance(steps, Mapping):  # of each picture: how often
        steps = max(steps, key=lambda count: int(steps[count]))
    rate = f"{row['faces_per_second']:.1f}"
    if "each" in row and len(row["each"]) > 1:
        rate += f" ({min(row['each']):.1f} to {max(row['each']):.1f} each)"
    return (
        row["title"], rate,
        *(f"{latency[name]:.0f}" if name in latency else "" for name in ("p50", "p95", "p99")),
        str(steps), f"{row['stolen_percent']:.0f} %",
    )  # fmt: skip


def write_table(found: Mapping[str, Any], page: Path = PAGE) -> None:
    """Write the table into its place. Raises: MediaError where the page has none."""
    text = page.read_text(encoding="utf-8")
    begin, end = marks("live")
    if begin not in text or end not in text:
        raise MediaError(f"{page}: has no place for the table; wanted {begin} and {end}")
    write_whole(page, placed(text, "live", table(found)))


def _processor() -> list[int]:
    """Ticks since the start: user, nice, system, idle, iowait, irq, softirq, steal."""
    words = Path("/proc/stat").read_text(encoding="utf-8").splitlines()[0].split()
    return [int(word) for word in words[1 : STOLEN + 1]]


def _typed(row: Row) -> str:
    words = ["diffusionact", *row.command[1:]] if "live" in row.command else list(row.command)
    return ("" if words[0] == "diffusionact" else "python -m ") + " ".join(words)


def main(given: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Measure live and serve, one after the other.")
    parser.add_argument("--camera", type=Path, default=Path(os.path.relpath(driver_path(), ROOT)))
    parser.add_argument("--seconds", type=float, default=60.0, help="of live; serve takes half")
    parser.add_argument("--chromium", action="store_true", help="a real page, too")
    parser.add_argument("--again", type=float, metavar="PERCENT",
                        help="measure the rows again of which more was stolen")  # fmt: skip
    parser.add_argument("--table", action="store_true", help="only write what was measured")
    arguments = parser.parse_args(given)
    if not arguments.table:
        words = ["python -m benchmarks.live_figures", "--camera", str(arguments.camera)]
        words += ["--chromium"] if arguments.chromium else []
        done: dict[str, Any] = {}
        if arguments.again is not None:
            words += ["--again", f"{arguments.again:g}"]
            done = {row["title"]: row
                    for row in json.loads(RESULTS.read_text(encoding="utf-8"))["rows"]
                    if row["stolen_percent"] <= arguments.again}  # fmt: skip
        found = {
            "date": machine.now(),
            "commit": machine.commit(), "machine": machine.describe(),
            "load_average": machine.load_average() or 0.0, "command": " ".join(words),
            "rows": [],
        }  # fmt: skip
        for row in rows(arguments.camera, arguments.seconds, arguments.chromium):
            found["rows"].append(done.get(row.title) or measure(row))
            print(" | ".join(_cells(found["rows"][-1])), flush=True)
        write_whole(RESULTS, json.dumps(found, indent=1) + "\n")
    write_table(json.loads(RESULTS.read_text(encoding="utf-8")))


if __name__ == "__main__":
    main()
