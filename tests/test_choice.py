"""What "auto" means: measured once, quality first, remembered, and not brought down by a crash."""

from __future__ import annotations

import json
import logging
import shutil
import subprocess
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusionact import bundle_path
from diffusionact import manifest as manifest_file
from diffusionact.errors import SettingsError
from diffusionact.manifest import Manifest
from diffusionact.runtime import choice, trial
from diffusionact.runtime.choice import Choice, choose, explain
from diffusionact.runtime.loop import open_loop
from diffusionact.runtime.reenactor import Reenactor
from diffusionact.runtime.settings import Settings
from diffusionact.runtime.trial import Measured

pytestmark = pytest.mark.usefixtures("measured_choice")

FAST = Measured("openvino", "bf16", "", 8.0, 53.0, 9.0)
REUSING = Measured("openvino", "bf16", "reuse", 4.0, 43.0, 20.0)
EXACT = Measured("openvino", "fp32", "", 16.0, 134.0, 0.0)
PLAIN = Measured("ort", "fp32", "", 25.0, 999.0, 0.0)
ALL = (FAST, REUSING, EXACT, PLAIN)


@pytest.fixture
def manifest(toy_bundle: Path) -> Manifest:
    return manifest_file.read(toy_bundle)


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("DIFFUSIONACT_CACHE", str(folder))
    return folder


@pytest.fixture
def trials(monkeypatch: pytest.MonkeyPatch, cache_dir: Path) -> list[list[str]]:
    """Every start of the measuring process, which answers with `ALL` at once."""
    return answered(monkeypatch, 0, json.dumps([asdict(one) for one in ALL]))


def answered(monkeypatch: pytest.MonkeyPatch, status: int, line: str = "") -> list[list[str]]:
    started: list[list[str]] = []

    def run(command: list[str], **_: Any) -> subprocess.CompletedProcess[str]:
        started.append(command)
        return subprocess.CompletedProcess(command, status, line + "\n", "Trace:\nso it is\n")

    monkeypatch.setattr(choice, "installed", lambda library: True)
    monkeypatch.setattr(choice.subprocess, "run", run)
    return started


def judged(*candidates: Measured, monkeypatch: pytest.MonkeyPatch, precision: str = "auto") -> str:
    answered(monkeypatch, 0, json.dumps([asdict(one) for one in candidates]))
    bundle = Path(bundle_path())
    made = choose(bundle, manifest_file.read(bundle, verify=False), precision=precision)
    return f"{made.backend} {made.precision}"


@pytest.mark.parametrize(
    ("candidates", "wanted"),
    [
        (ALL, "openvino bf16"),
        ((replace(FAST, psnr_db=39.9), EXACT, PLAIN), "openvino fp32"),
        ((replace(FAST, step_ms=15.5), EXACT, PLAIN), "openvino fp32"),  # not worth the rounding
        ((FAST, replace(EXACT, step_ms=26.0), replace(PLAIN, step_ms=7.0)), "ort fp32"),
        ((replace(FAST, error="refused"), replace(EXACT, error="refused"), PLAIN), "ort fp32"),
    ],
)
def test_the_fastest_of_the_good_ones(
    candidates: tuple[Measured, ...], wanted: str, monkeypatch: pytest.MonkeyPatch, cache_dir: Path
) -> None:
    assert judged(*candidates, monkeypatch=monkeypatch) == wanted


def test_a_precision_that_is_asked_for_is_not_judged_but_must_be_there(
    monkeypatch: pytest.MonkeyPatch, cache_dir: Path
) -> None:
    poor = (replace(FAST, psnr_db=20.0), EXACT, PLAIN)
    assert judged(*poor, monkeypatch=monkeypatch, precision="bf16") == "openvino bf16"
    assert judged(*poor, monkeypatch=monkeypatch, precision="fp32") == "openvino fp32"
    with pytest.raises(SettingsError, match="'fp8'"):
        judged(*poor, monkeypatch=monkeypatch, precision="fp8")


def test_an_approximation_is_taken_only_when_asked_for_and_tells_its_price(
    toy_bundle: Path, manifest: Manifest, trials: list[list[str]],
    caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    assert choose(toy_bundle, manifest) == Choice("openvino", "bf16")
    assert not caplog.messages
    assert choose(toy_bundle, manifest, approximate="reuse") == Choice("openvino", "bf16")
    (told,) = caplog.messages
    assert "43.0 dB from exact" in told and "2.0 times as fast" in told
    assert "openvino bf16 reuse: 4.0 ms a step, 43.0 dB" in explain(toy_bundle, manifest)
    lost = replace(REUSING, error="no skip connection")
    answered(monkeypatch, 0, json.dumps([asdict(one) for one in (FAST, lost, EXACT, PLAIN)]))
    with pytest.raises(SettingsError, match="'reuse'"):
        choose(toy_bundle, manifest, approximate="reuse", threads=5)


def test_what_the_caller_names_is_not_measured(
    toy_bundle: Path, manifest: Manifest, trials: list[list[str]]
) -> None:
    assert choose(toy_bundle, manifest, backend="ort") == Choice("ort", "auto")
    assert choose(toy_bundle, manifest, backend="openvino", precision="fp32") == Choice(
        "openvino", "fp32"
    )
    assert trials == []


def test_it_is_measured_once_for_a_network_and_a_number_of_threads(
    toy_bundle: Path, manifest: Manifest, trials: list[list[str]]
) -> None:
    for _ in range(2):
        assert choose(toy_bundle, manifest) == Choice("openvino", "bf16")
    assert len(trials) == 1
    choose(toy_bundle, manifest, threads=1)
    other = replace(manifest.components["unet_step"], sha256="0" * 64)
    changed = replace(manifest, components={**manifest.components, "unet_step": other})
    choose(toy_bundle, changed)
    assert len(trials) == 3 and trials[1][-1] == "1"


@pytest.mark.parametrize(
    "damage", ["", "{", "[1]", '{"key": {}, "candidates": []}', "other key", "ort?"]
)
def test_memory_that_is_damaged_or_foreign_is_made_again(
    toy_bundle: Path, manifest: Manifest, trials: list[list[str]], cache_dir: Path, damage: str
) -> None:
    choose(toy_bundle, manifest)
    (path,) = (cache_dir / "choice").iterdir()
    whole = path.read_text()
    foreign = {"other key": ('"threads": 0', '"threads": 9'), "ort?": ('"ort"', '"abacus"')}
    path.write_text(whole.replace(*foreign[damage]) if damage in foreign else damage)
    assert choose(toy_bundle, manifest) == Choice("openvino", "bf16")
    assert len(trials) == 2 and path.read_text() == whole


def test_a_cache_that_cannot_be_written_is_no_error(
    toy_bundle: Path, manifest: Manifest, trials: list[list[str]], cache_dir: Path
) -> None:
    cache_dir.write_text("a file where the folder should be")
    assert choose(toy_bundle, manifest) == Choice("openvino", "bf16")


@pytest.mark.parametrize(("status", "starts"), [(-11, 1), (-9, 2), (1, 2)])
def test_a_crash_is_told_and_remembered_another_failure_only_told(
    toy_bundle: Path, manifest: Manifest, cache_dir: Path, status: int, starts: int,
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    trials = answered(monkeypatch, status)
    with caplog.at_level(logging.WARNING, logger="diffusionact"):
        assert choose(toy_bundle, manifest) == Choice("ort", "fp32")
    assert len(caplog.messages) == 1 and "ONNX Runtime is used" in caplog.messages[0]
    assert choose(toy_bundle, manifest) == Choice("ort", "fp32")
    assert len(trials) == starts
    assert ("so it is" in caplog.messages[0]) == (status != -11)
    if status == -11:
        assert "not usable (crashed: SIGSEGV)" in (told := explain(toy_bundle, manifest))
        assert "ort fp32: not timed" in told


def test_a_process_that_really_crashes_leaves_this_one_alone(
    toy_bundle: Path, manifest: Manifest, cache_dir: Path, tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    (tmp_path / "crashing.py").write_text("import os, signal\nos.kill(os.getpid(), 11)\n")
    monkeypatch.setattr(choice, "TRIAL", "crashing")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(choice, "installed", lambda library: True)
    assert choose(toy_bundle, manifest) == Choice("ort", "fp32")


def test_the_real_measurement_finds_a_candidate_that_works(
    toy_bundle: Path, manifest: Manifest, cache_dir: Path
) -> None:
    pytest.importorskip("openvino", reason="only one candidate without it")
    made = choose(toy_bundle, manifest, threads=1)
    assert made.backend in trial.CANDIDATES
    told = explain(toy_bundle, manifest, threads=1)
    assert told.startswith(f"{made.backend} {made.precision}: the fastest")
    assert "ort fp32:" in told and "the reference" in told and "ms a step" in told
    with Reenactor.load(toy_bundle, settings=Settings(threads=1)) as act:
        assert (act.settings.backend, act.settings.precision) == (made.backend, made.precision)


def test_measuring_sees_that_a_frame_is_wrong(
    toy_bundle: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch, cache_dir: Path
) -> None:
    def open_wrong(*arguments: Any, **options: Any) -> Any:
        loop = open_loop(*arguments, **{**options, "backend": "ort", "precision": "fp32"})
        if options["precision"] == "bf16":
            plain = loop.render
            loop.render = lambda x_T, z: plain(x_T, z) * np.float32(0.8)  # type: ignore[method-assign]
        return loop

    monkeypatch.setattr(trial, "open_loop", open_wrong)
    monkeypatch.setattr(
        trial, "candidates", lambda large: [("openvino", "bf16", None), ("ort", "fp32", None)]
    )
    wrong, plain = trial.measure(toy_bundle, 1)
    assert wrong.psnr_db < choice.LEAST_PSNR_DB and wrong.worst > 10
    assert plain.psnr_db == trial.EQUAL_DB and plain.step_ms > 0
    assert not choice.good(wrong) and choice.good(plain)


def test_a_bundle_that_moved_keeps_what_was_measured(
    toy_bundle: Path, manifest: Manifest, trials: list[list[str]], tmp_path: Path
) -> None:
    choose(toy_bundle, manifest)
    shutil.copytree(toy_bundle, tmp_path / "moved.bundle")
    choose(tmp_path / "moved.bundle", manifest)
    assert len(trials) == 1
