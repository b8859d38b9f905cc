"""The table of what live and serve do: made of what commands say, and nothing else."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pytest

from benchmarks.live_figures import PAGE, RESULTS, Row, measure, rows, table, write_table
from benchmarks.readme_tables import marks
from diffusionact.errors import MediaError

linux = pytest.mark.skipif(sys.platform != "linux", reason="figures are of /proc")


def found() -> dict[str, object]:
    latency = {"p50": 31.4, "p95": 75.6, "p99": 108.1}
    return {
        "date": "2026-11-23T03:40:00+00:00", "commit": "abc", "load_average": 0.5, "command": "x",
        "machine": {"cores": 2, "cpu": "A", "flags": [], "memory_gib": 24, "gpus": []},
        "rows": [
            {"title": "live", "command": "diffusionact live", "stolen_percent": 0.4,
             "faces_per_second": 27.91, "latency_ms": latency, "steps": 1},
            {"title": "four", "command": "python -m y", "stolen_percent": 12.0,
             "faces_per_second": 19.0, "latency_ms": latency, "each": [4.4, 4.9, 4.8, 4.9],
             "steps": {"1": 10, "2": 90}},
            {"title": "page", "command": "z", "stolen_percent": 0.0, "faces_per_second": 13.0},
        ],
    }  # fmt: skip


def test_rows_say_what_was_said() -> None:
    lines = table(found()).splitlines()
    assert lines[2] == "| live | 27.9 | 31 | 76 | 108 | 1 | 0 % |"
    assert lines[3] == "| four | 19.0 (4.4 to 4.9 each) | 31 | 76 | 108 | 2 | 12 % |"
    assert lines[4] == "| page | 13.0 |  |  |  |  | 0 % |"
    assert lines[1].count("|") == lines[0].count("|") == lines[4].count("|")
    assert "- four: `python -m y`" in lines


def test_the_table_has_a_place(tmp_path: Path) -> None:
    begin, end = marks("live")
    page = tmp_path / "live.md"
    page.write_text(f"before\n{begin}\nold\n{end}\nafter\n")
    write_table(found(), page)
    text = page.read_text()
    assert text.startswith("before\n") and text.endswith("after\n") and "old" not in text
    assert "27.9" in text
    page.write_text("nothing\n")
    with pytest.raises(MediaError, match="no place"):
        write_table(found(), page)


def test_the_page_holds_what_was_measured() -> None:
    assert table(json.loads(RESULTS.read_text(encoding="utf-8"))) in PAGE.read_text(
        encoding="utf-8"
    )


@linux
def test_a_command_that_fails_is_told() -> None:
    with pytest.raises(MediaError, match="--no-such-option` ended with 2"):
        measure(Row("a", ("benchmarks.serve_load", "--no-such-option")))


def test_every_row_is_a_command() -> None:
    titles = [row.title for row in rows(Path("clip.mkv"), 60.0, chromium=True)]
    assert len(set(titles)) == len(titles) == 7
    (live, *_) = rows(Path("clip.mkv"), 60.0, chromium=False)
    assert {"--realtime", "--loop", "clip.mkv", "60"} <= set(live.command)
