"""The shipped model does not get worse: measured anew, compared with what was stored.

After a retraining that is meant to be measured differently, store the new lines:

    diffusionact eval self --identities 6 --steps 4 --backend ort --json -q > \
        tests/golden/eval_baseline.jsonl
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from diffusionact.cli import main
from diffusionact.evaluation.runfile import read_rows
from diffusionact.evaluation.statistics import changes

BASELINE = Path(__file__).parent / "golden" / "eval_baseline.jsonl"
# Another processor rounds otherwise, alike on all people, so that a bootstrap finds no noise in
# it; what is less than this nobody sees. Two processors' float32 differ by about 1e-3 of these.
LEAST = {"psnr": 0.05, "ssim": 0.002, "l1": 0.0005, "perceptual_rendered": 0.003,
         "psnr_face": 0.05, "nme": 0.001, "gaze_px": 0.05, "apd": 0.1, "aed": 0.002,
         "brightness": 0.001}  # fmt: skip


def worse(before: list[dict[str, object]], after: list[dict[str, object]]) -> dict[str, float]:
    """The measures that are worse by more than noise and more than rounding."""
    found, counts = changes(before, after)
    assert counts["both"] == len(before) and not counts["only_a"]
    return {
        name: change.change
        for name, change in found.items()
        if change.verdict == "worse" and abs(change.change) > LEAST[name]
    }


def test_the_shipped_model_is_no_worse_than_stored(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["self", "--identities", "6", "--steps", "4", "--backend", "ort", "--json", "-q"]
    assert main(["eval", *arguments]) == 0
    rows = [json.loads(line) for line in capsys.readouterr().out.splitlines()][:-1]
    before = list(read_rows(BASELINE))
    assert {name for name in LEAST if before[0].get(name) is not None} == set(LEAST)
    assert worse(before, rows) == {}


def test_a_worse_model_would_be_found() -> None:
    """The same lines, with half a decibel less and half a degree more, are told apart."""
    before = list(read_rows(BASELINE))
    after = [
        {**row, "psnr": row["psnr"] - 0.5, "apd": row["apd"] + 0.5} if "psnr" in row else row
        for row in before
    ]
    assert set(worse(before, after)) == {"psnr", "apd"}
    assert worse(after, before) == {}
