"""`diffusionact bench-compare`: real changes are found, noise is not, machines are not mixed."""

from __future__ import annotations

import copy
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusionact import cli
from diffusionact.bench import records
from diffusionact.bench.compare import ONE_RUN, TOO_FEW, compare, ratio_of_medians
from diffusionact.errors import MediaError, SettingsError

MACHINE = {
    "cpu": "Abacus", "cpu_id": None, "cores": 4, "flags": ["avx2"], "memory_gib": 8, "gpus": [],
    "system": "Linux x86_64",
}  # fmt: skip


def record(
    median_ms: float, seed: int, noise: float = 0.03, backend: str = "ort", **fields: Any
) -> dict[str, Any]:
    """A record whose rounds differ by noise as well as the frames in them."""
    rng = np.random.default_rng(seed)
    rounds = []
    for _ in range(8):
        mood = median_ms * (1 + noise * rng.standard_normal())
        rounds.append((mood * (1 + noise * np.abs(rng.standard_normal(20)))).tolist())
    stages = {"render": rounds, "total": rounds}
    made: dict[str, Any] = {
        "kind": records.KIND,
        "format": records.FORMAT,
        "variant": {
            "backend": backend,
            "precision": "auto",
            "steps": 4,
            "threads": 0,
            "approximate": None,
            "batch": 1,
        },
        "ran": {
            "backend": backend,
            "precision": "fp32",
            "steps": 4,
            "threads": 4,
            "device": "cpu",
            "approximate": None,
            "batch": 1,
        },
        "bundle": {"name": "toy", "weights_sha256": "0" * 64, "image_size": 32},
        "frame": "render",
        "machine": MACHINE,
        "versions": {"numpy": "2.0"},
        "commit": "abc",
        "warnings": [],
        "samples_ms": stages,
        "stages": {name: records.spread(values) for name, values in stages.items()},
    }
    return {**made, **fields}


def test_a_tenth_is_found_and_its_size_told() -> None:
    (change,) = [
        c for c in compare([record(10.0, 1)], [record(11.0, 2)]).changes if c.stage == "total"
    ]
    assert change.real and change.low <= 1.1 <= change.high
    assert change.ratio == pytest.approx(1.1, abs=0.05)
    assert change.after_ms / change.before_ms == pytest.approx(change.ratio)


def test_two_rounds_tell_nothing() -> None:
    short = [record(ms, 1) for ms in (10.0, 20.0)]
    for one in short:
        one["samples_ms"] = {"total": one["samples_ms"]["total"][:2]}
    found = compare(short[:1], short[1:])
    assert TOO_FEW in found.notes
    assert not found.changes[0].real and not found.slower_than(0.05)


def test_frames_at_once_and_devices_keep_variants_apart() -> None:
    plain = record(10.0, 1)
    others = [{**plain, "variant": {**plain["variant"], **how}} for how in (
        {"batch": 2}, {"device": "cuda"})]  # fmt: skip
    found = compare([plain, others[0]], [plain, *others])
    names = {change.variant for change in found.changes}
    assert names == {"toy: ort auto, 4 steps", "toy: ort auto, 4 steps, 2 at once"}
    assert found.unmatched == ("toy: ort auto, 4 steps",)


def test_noise_is_called_noise_nineteen_times_in_twenty() -> None:
    """Of pairs of runs of the same software, whose rounds differ as those of a machine do."""
    pairs = [(record(10.0, 2 * i), record(10.0, 2 * i + 1)) for i in range(100)]
    found = [
        ratio_of_medians([a["samples_ms"]["total"]], [b["samples_ms"]["total"]], draws=400)
        for a, b in pairs
    ]
    wrong = sum(not low <= 1.0 <= high for _, low, high in found)
    assert wrong <= 12, "more false alarms than 5 in 100 and their own spread explain"


def test_what_changes_from_run_to_run_widens_the_interval() -> None:
    runs = [record(ms, i)["samples_ms"]["total"] for i, ms in enumerate((9.0, 10.0, 11.0))]
    _, low, high = ratio_of_medians(runs, runs)
    _, low_one, high_one = ratio_of_medians(runs[1:2], runs[1:2])
    assert high - low > 2 * (high_one - low_one)


def test_lines_of_the_same_commit_are_repeats_and_others_are_not() -> None:
    before = [record(50.0, 0, commit="old"), record(10.0, 1), record(10.2, 2)]
    change = compare(before, [record(10.1, 3)]).changes[-1]
    assert change.before_ms == pytest.approx(10.1, rel=0.1)
    assert ONE_RUN in compare(before, [record(10.1, 3)]).notes
    assert ONE_RUN not in compare(before, [record(10.1, 3), record(10.1, 4)]).notes


def test_variants_belong_together_by_what_was_asked_for() -> None:
    before = [record(10.0, 1), record(5.0, 2, backend="openvino")]
    after = [record(5.0, 3, backend="openvino"), record(7.0, 4, backend="torch")]
    found = compare(before, after)
    assert {change.variant.split()[1] for change in found.changes} == {"openvino"}
    assert [name.split()[1] for name in found.unmatched] == ["ort", "torch"]
    with pytest.raises(SettingsError, match="no variant in common"):
        compare(before, after[1:])


def test_a_single_variant_on_each_side_may_be_another() -> None:
    found = compare([record(10.0, 1)], [record(5.0, 2, backend="openvino")])
    assert found.changes[-1].ratio == pytest.approx(0.5, abs=0.05)
    assert "backend ort -> openvino" in found.notes


def test_machines_are_not_compared_unless_told_to() -> None:
    other = record(10.0, 2, machine={**MACHINE, "cpu": "Slide rule", "cores": 2})
    with pytest.raises(SettingsError, match="cpu: Abacus there, Slide rule here.*--force"):
        compare([record(10.0, 1)], [other])
    notes = compare([record(10.0, 1)], [other], force=True).notes
    assert "cores: 4 there, 2 here" in notes


def test_what_else_differs_is_told() -> None:
    other = record(10.0, 2, versions={"numpy": "2.1"}, commit="def", warnings=["it was busy"])
    notes = compare([record(10.0, 1)], [other]).notes
    assert {"numpy 2.0 -> 2.1", "commit abc -> def", "B: it was busy"} <= set(notes)


@pytest.mark.parametrize(
    "after_ms, limit, status",
    [(11.0, "5%", 1), (11.0, "0.05", 1), (11.0, "30%", 0), (9.0, "5%", 0), (10.0, "0", 0)],
)
def test_the_exit_status_is_for_scripts(
    after_ms: float, limit: str, status: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(cli, "_start_log", lambda arguments: None)
    before, after = tmp_path / "a.json", tmp_path / "b.json"
    records.append(before, [record(10.0, 1)])
    same = copy.deepcopy(record(10.0, 1)) if after_ms == 10.0 else record(after_ms, 2)
    records.append(after, [same])
    assert cli.main(["bench-compare", str(before), str(after), "--fail-above", limit]) == status
    shown = capsys.readouterr().out
    assert ("FAILED" in shown) == bool(status)
    assert "noise" in shown or "slower" in shown or "faster" in shown


def test_json_is_one_object_a_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.json"
    records.append(file, [record(10.0, 1)])
    assert cli.main(["bench-compare", str(file), str(file), "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert [line["stage"] for line in lines if "stage" in line] == ["render", "total"]
    assert all(line["ratio"] == 1.0 and not line["real"] for line in lines if "stage" in line)


@pytest.mark.parametrize("limit", ["-1%", "much", "nan"])
def test_limits_that_make_no_sense_are_refused(limit: str, tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        cli.main(["bench-compare", "a", "b", f"--fail-above={limit}"])
    assert ended.value.code == 2


def test_a_broken_last_line_may_go_and_another_kind_of_file_may_stay(tmp_path: Path) -> None:
    lines = tmp_path / "runs.json"
    lines.write_text(json.dumps(record(10.0, 1)) + "\n{broken\n")
    with pytest.raises(MediaError, match=f"sed -i 2d {lines}"):
        records.read(lines)
    lines.write_text("# Notes\n")
    with pytest.raises(MediaError, match="wanted a file of `diffusionact bench --out`") as refused:
        records.read(lines)
    assert "sed" not in str(refused.value)
