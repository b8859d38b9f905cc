"""The command line: what it prints where, and its exit status."""

from __future__ import annotations

import json
import logging
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from diffusionact import cli
from diffusionact.errors import SettingsError
from diffusionact.landmarks import Landmarks, Track
from diffusionact.progress import Progress, StageProgress

Portrait = tuple["np.ndarray[Any, np.dtype[np.uint8]]", Landmarks]
FRAMES = 5
FRAME_NS = 40_000_000
ROOT = Path(cli.__file__).parents[1]
STARTED_S = 60  # for Python to start, or to end, on a busy machine


@pytest.fixture(autouse=True)
def the_log_as_it_was(monkeypatch: pytest.MonkeyPatch) -> None:
    """Commands set the level of the package's log; tests must not see each other's."""
    monkeypatch.delenv(cli.LOG_VARIABLE, raising=False)
    monkeypatch.setattr(logging, "basicConfig", lambda **_: None)
    monkeypatch.setattr(logging.getLogger("diffusionact"), "level", logging.WARNING)


def track(face: Landmarks, frames: int, size: tuple[int, int]) -> Track:
    """A face that slides to the right, a pixel a frame."""
    moved = [face.transformed(np.array([[1.0, 0, i], [0, 1.0, 0]])) for i in range(frames)]
    return Track(
        np.stack([m.points for m in moved]),
        np.stack([m.gaze for m in moved]),
        np.arange(frames, dtype=np.int64) * FRAME_NS,
        size,
    )


@pytest.fixture
def files(portrait: Portrait, tmp_path: Path) -> tuple[Path, Path]:
    """A portrait with its landmarks beside it, and a driver that is a landmark track."""
    image, face = portrait
    size = (image.shape[1], image.shape[0])
    cv2.imwrite(str(tmp_path / "portrait.png"), image)
    track(face, 1, size).save(tmp_path / "portrait.landmarks.npz")
    track(face, FRAMES, size).save(tmp_path / "driver.npz")
    return tmp_path / "portrait.png", tmp_path / "driver.npz"


def run(bundle: Path, files: tuple[Path, Path], out: Path, *more: str) -> int:
    source, driver = map(str, files)
    return cli.main(
        ["run", "-s", source, "-d", driver, "-o", str(out), "--bundle", str(bundle), *more]
    )


def message(capsys: pytest.CaptureFixture[str]) -> str:
    """What stderr says; stdout must be empty, and there must be no trace."""
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("diffusionact: ") and "Traceback" not in err
    return err


def test_run_writes_and_tells(
    toy_bundle: Path,
    files: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    out = tmp_path / "frames"
    assert run(toy_bundle, files, out) == 0
    assert len(list(out.glob("*.png"))) == FRAMES
    printed = capsys.readouterr().out
    assert f"wrote {out}: {FRAMES} frames, {FRAMES} with a face" in printed
    assert "render" in printed and "p95" in printed


def test_json_is_one_object_a_line_and_nothing_else(
    toy_bundle: Path,
    files: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(toy_bundle, files, tmp_path / "frames", "--json", "--crop") == 0
    (line,) = capsys.readouterr().out.splitlines()
    report = json.loads(line)
    assert report["frames"] == FRAMES
    assert report["times"]["total"]["p50_ms"] > 0
    assert ": " not in line


def test_quiet_prints_nothing(
    toy_bundle: Path,
    files: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(toy_bundle, files, tmp_path / "frames", "-q") == 0
    assert capsys.readouterr() == ("", "")


def test_a_damaged_bundle_is_refused(
    toy_bundle: Path,
    files: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    damaged = tmp_path / "damaged.bundle"
    shutil.copytree(toy_bundle, damaged)
    whole = (damaged / "unet_step.onnx").read_bytes()
    (damaged / "unet_step.onnx").write_bytes(whole[: len(whole) // 2])
    assert run(damaged, files, tmp_path / "frames") == 2
    assert "unet_step.onnx" in message(capsys)
    assert not (tmp_path / "frames").exists()


@pytest.mark.parametrize("missing", ["source", "driver", "bundle"])
def test_a_missing_file_is_named(
    missing: str,
    toy_bundle: Path,
    files: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    nowhere = tmp_path / "nowhere.png"
    source, driver = (nowhere if missing == name else path
                      for name, path in zip(("source", "driver"), files, strict=True))  # fmt: skip
    bundle = nowhere if missing == "bundle" else toy_bundle
    assert run(bundle, (source, driver), tmp_path / "frames") == 2
    assert str(nowhere) in message(capsys)


def test_an_empty_video_is_refused(
    toy_bundle: Path,
    files: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "empty.mp4").touch()
    assert run(toy_bundle, (files[0], tmp_path / "empty.mp4"), tmp_path / "out.mp4") == 2
    assert "empty" in message(capsys)
    assert not (tmp_path / "out.mp4").exists()


def test_an_unwritable_output_is_refused_before_the_work(
    toy_bundle: Path,
    files: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    (tmp_path / "file").touch()
    assert run(toy_bundle, files, tmp_path / "file" / "out.mp4") == 2
    assert "out.mp4" in message(capsys)


@pytest.mark.parametrize("steps", ["37", "500,250", "0"])
def test_impossible_steps_are_refused(
    steps: str,
    toy_bundle: Path,
    files: tuple[Path, Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert run(toy_bundle, files, tmp_path / "frames", "--steps", steps) == 2
    said = message(capsys)
    assert steps.split(",")[0] in said and ("wanted" in said or "nearest" in said)


@pytest.mark.parametrize("line", [[], ["swim"], ["run", "-s", "a.png"], ["demo", "--steps", "x"]])
def test_a_wrong_line_shows_the_usage(line: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stopped:
        cli.main(line)
    assert stopped.value.code == 2
    assert "usage: diffusionact" in capsys.readouterr().err


def test_a_wrong_log_level_is_refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv(cli.LOG_VARIABLE, "loud")
    assert cli.main(["check"]) == 2
    assert "loud" in message(capsys)


def test_a_bug_keeps_its_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(_: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("diffusionact.runtime.check.findings", broken)
    with pytest.raises(ZeroDivisionError):
        cli.main(["check"])


def test_control_c_is_130(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def interrupted(_: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("diffusionact.runtime.check.findings", interrupted)
    assert cli.main(["check"]) == 130
    assert "interrupted" in message(capsys)


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGTERM to send")
def test_a_terminated_run_cleans_up(
    toy_bundle: Path, files: tuple[Path, Path], tmp_path: Path, portrait: Portrait
) -> None:
    source, driver = files
    track(portrait[1], 20_000, (80, 90)).save(driver)  # far more than it can do in this time
    out = tmp_path / "out"
    words = ["run", "-s", source, "-d", driver, "-o", out / "out.mp4", "--bundle", toy_bundle]
    with subprocess.Popen(
        [sys.executable, "-m", "diffusionact.cli", *map(str, words)],
        cwd=ROOT,
        stderr=subprocess.PIPE,
        text=True,
    ) as process:
        begun_s = time.monotonic()
        while not (out.is_dir() and any(out.iterdir())):
            assert process.poll() is None and time.monotonic() - begun_s < STARTED_S
            time.sleep(0.05)
        process.send_signal(signal.SIGTERM)
        _, said = process.communicate(timeout=STARTED_S)
    assert process.returncode == 143, said
    assert "diffusionact: terminated" in said and "Traceback" not in said
    assert list(out.iterdir()) == []


@pytest.mark.parametrize("command", [["export", "w", "-o", "b"], ["train", "r.toml"]])
def test_a_missing_extra_is_named(command: list[str]) -> None:
    hide = "import sys; sys.modules.update(torch=None, onnx=None, numba=None)\n"
    code = hide + f"from diffusionact.cli import main; sys.exit(main({command!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, "PYTHONPATH": str(ROOT)},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 2, done.stderr
    assert f"pip install 'diffusionact[{command[0]}]'" in done.stderr
    assert "Traceback" not in done.stderr


@pytest.mark.torch
def test_train_refuses_a_recipe_that_is_not_there(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["train", "nowhere.toml"]) == 2
    assert "nowhere.toml" in message(capsys)


def test_progress_is_lines_where_there_is_no_terminal(capsys: pytest.CaptureFixture[str]) -> None:
    with Progress("work") as progress:
        for done in range(1, 4):
            progress(done, 3)
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("work: 3 of 3 frames") and err.count("\n") == 1


def test_stages_of_progress_follow_one_another(capsys: pytest.CaptureFixture[str]) -> None:
    with StageProgress() as progress:
        for stage in ("track", "render"):
            for done in range(1, 3):
                progress(stage, done, 2)
    lines = capsys.readouterr().err.splitlines()
    assert [line.split(",")[0] for line in lines] == [
        "track: 2 of 2 frames",
        "render: 2 of 2 frames",
    ]
    with StageProgress(quiet=True) as progress:
        progress("track", 1, 2)
    assert capsys.readouterr() == ("", "")


def test_progress_says_nothing_after_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SettingsError), Progress("work") as progress:
        progress(1, 3)
        raise SettingsError("no")
    assert capsys.readouterr() == ("", "")


def test_the_demo_with_the_shipped_model(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(["demo", "-o", str(tmp_path), "--steps", "2", "--json", "-q"]) == 0
    report = json.loads(capsys.readouterr().out)
    assert report["frames"] >= 60
    assert {path.name for path in tmp_path.iterdir()} == {"demo.mp4", "demo.png"}
