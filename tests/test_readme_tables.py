"""The README's tables are what benchmarks/results says, and are made right."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from benchmarks import readme_tables
from diffusionact.bench import records
from diffusionact.errors import MediaError
from tests.test_bench_compare import MACHINE, record

MEASURED = {
    "date": "2026-11-22T21:00:00Z",
    "load_average": 0.1,
    "commit": "abc",
    "versions": {"openvino": "2026.4"},
    "machine": MACHINE,
}
FRESH = {
    "first_load_ms": 2e3, "load_ms": 1e3, "first_frame_ms": 9.0, "prepare_ms": 1.0,
    "prepare_measured": True,
}  # fmt: skip


@pytest.fixture
def results(tmp_path: Path) -> Path:
    """A folder of results: two peers, and two variants after an older run."""
    peers: dict[str, Any] = {
        **MEASURED,
        "network": "ffhq256",
        "command": "python -m benchmarks.peers",
        "rows": [
            {
                "name": name, "how": how, "frame_s": frame_s, "ratio": ratio,
                "ratio_95": [ratio * 0.9, ratio * 1.1] if ratio != 1 else [1.0, 1.0],
                "peak_mib": 1024.0, "load_s": 2.5,
            }
            for name, how, frame_s, ratio in (("base", "eager", 60.0, 1), ("ours", "bf16", 12.0, 5))
        ],
    }  # fmt: skip
    (tmp_path / "peers.json").write_text(json.dumps(peers))
    known = {**MEASURED, "fps": 20.0, "start": FRESH, "memory": {"peak_mib": 230.4}}
    old = record(99.0, 1, **{**known, "date": "2026-11-01T00:00:00Z"})
    new = [record(10.0, 2, **known), record(5.0, 3, backend="openvino", **known)]
    records.append(tmp_path / "bench.json", [old, *new])
    return tmp_path


def place(name: str, content: str = "stale") -> str:
    begin, end = readme_tables.marks(name)
    return f"{begin}\n{content}\n{end}"


def test_the_readme_says_what_was_measured() -> None:
    text = readme_tables.README.read_text(encoding="utf-8")
    assert readme_tables.with_tables(text) == text, "run: python -m benchmarks.readme_tables"


def test_places_are_filled_and_the_rest_is_left(results: Path) -> None:
    text = f"# Title\n\n{place('peers')}\n\nbetween\n\n{place('shipped')}\n\nend\n"
    made = readme_tables.with_tables(text, results)
    assert "stale" not in made
    assert made.startswith("# Title\n\n") and made.endswith("\n\nend\n") and "\n\nbetween\n" in made
    assert "| ours (bf16) | 12.0 | 5.00 (4.50–5.50) | 1.0 | 2.5 |" in made
    assert "| base (eager) | 60.0 | 1 | 1.0 | 2.5 |" in made
    assert "4 cores of Abacus, 8 GiB, 2026-11-22, load average 0.1 before, openvino 2026.4" in made
    assert "`python -m benchmarks.peers`" in made
    assert made.count("| ort, fp32, 4 steps |") == 1, "of the last run only"
    assert "`diffusionact bench --backend ort,openvino --steps 4`" in made
    assert readme_tables.with_tables(made, results) == made


def test_a_readme_without_places_stays_as_it_is(tmp_path: Path) -> None:
    assert readme_tables.with_tables("# Title\n", tmp_path) == "# Title\n"


def test_half_a_place_and_missing_results_are_refused(tmp_path: Path) -> None:
    begin, _ = readme_tables.marks("peers")
    with pytest.raises(MediaError, match="add the other"):
        readme_tables.with_tables(begin, tmp_path)
    with pytest.raises(MediaError, match="peers.json: missing"):
        readme_tables.with_tables(place("peers"), tmp_path)
