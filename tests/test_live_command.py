"""`diffusionact live` as it is typed: one line at the end, files that are whole, plain refusals."""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import numpy as np
import pytest

from diffusionact import portrait_paths
from diffusionact.cli import main
from diffusionact.landmarks import Landmarks
from diffusionact.runtime import live
from diffusionact.runtime.clip import prepare_portrait
from diffusionact.runtime.control import Goal
from diffusionact.runtime.live import LiveSettings
from diffusionact.runtime.media import NS, open_reader
from diffusionact.runtime.reenactor import Reenactor
from diffusionact.runtime.settings import Settings
from tests.clips import grey, write, write_portrait


def test_the_command_ends_with_one_line(
    toy_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    portrait = portrait_paths()[0]
    track = Path(__file__).parent / "golden" / "driver_nod.npz"
    words = f"live -s {portrait} --camera {track} --realtime --loop --bundle {toy_bundle}".split()
    words += ["--sink", str(tmp_path / "out.mp4"), "--json", "--seconds", "2", "--backend", "ort"]
    begun_ns = time.monotonic_ns()
    assert main(words) == 0
    out, err = capsys.readouterr()
    (line,) = out.splitlines()
    seen = json.loads(line)
    assert seen["faces_per_second"] > 5 and set(seen["latency_ms"]) == {"p50", "p95", "p99"}
    assert {"track", "render", "show", "total"} <= set(seen["drops"])
    assert {"read", "render", "show", "total"} <= set(seen["stages_ms"])
    frames = list(open_reader(tmp_path / "out.mp4"))
    assert len(frames) == seen["shown"] + 1
    assert frames[-1].pts_ns < time.monotonic_ns() - begun_ns
    assert frames[-1].pts_ns > 1.5 * NS


@pytest.mark.parametrize(("words", "rate"), [(["--realtime"], 25.0), ([], None)])
def test_a_camera_s_rate_is_kept_to_and_a_clip_waits(
    toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    words: list[str], rate: float | None,
) -> None:  # fmt: skip
    manifest = json.loads((toy_bundle / "manifest.json").read_text())
    manifest["render"] = {"steps": 4, "choices": [2]}
    bundle = Path(shutil.copytree(toy_bundle, tmp_path / "face.bundle"))
    (bundle / "manifest.json").write_text(json.dumps(manifest))
    goals: list[Goal | None] = []

    def seen(settings: LiveSettings) -> LiveSettings:
        goals.append(settings.goal)
        return settings

    monkeypatch.setattr(live, "LiveSettings", lambda *given: seen(LiveSettings(*given)))
    track = Path(__file__).parent / "golden" / "driver_gaps.npz"
    line = f"live -s {portrait_paths()[0]} --camera {track} --bundle {bundle} --backend ort -q"
    assert main([*line.split(), *words, "--sink", str(tmp_path / "out.mp4")]) == 0
    assert goals == [None if rate is None else Goal(fps=rate)]


@pytest.mark.skipif(sys.platform == "win32", reason="Windows has other signals")
@pytest.mark.parametrize(("number", "status"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_ends_the_session_and_keeps_its_file(
    toy_bundle: Path, tmp_path: Path, number: signal.Signals, status: int
) -> None:
    track = Path(__file__).parent / "golden" / "driver_nod.npz"
    command = [sys.executable, "-m", "diffusionact.cli", "live", "-s", str(portrait_paths()[0])]
    command += ["--camera", str(track), "--realtime", "--loop", "--bundle", str(toy_bundle)]
    command += ["--backend", "ort", "--sink", str(tmp_path / "out.mp4"), "--json"]
    live = subprocess.Popen(
        command, cwd=Path(__file__).parents[1], text=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE,
    )  # fmt: skip
    assert live.stderr is not None
    for line in live.stderr:
        if "keys:" in line:  # it runs
            break
    time.sleep(0.5)
    live.send_signal(number)
    out, _ = live.communicate(timeout=30.0)
    assert live.returncode == status
    assert len(list(open_reader(tmp_path / "out.mp4"))) == json.loads(out)["shown"] + 1


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["--camera", "77"], "camera 77 cannot be opened"),
        (["--camera", "clip.mp4"], "no such file"),
        (["--camera", "0", "--loop"], "for clips"),
        (["--sink", "screen"], "wanted window"),
        (["--latency", "100ms", "--fps", "20"], "one of them"),
        (["--sink", "twice.mp4", "--sink", "./twice.mp4"], "twice"),
        (["--camera", "{clip}", "--sink", "{clip}"], "would overwrite"),
        (["--camera", "{clip}", "-s", "{clip}"], "clip.mkv"),  # no picture: found with sinks open
    ],
)
def test_what_cannot_be_is_refused(
    toy_bundle: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str],
    tmp_path: Path, face: Landmarks,
) -> None:  # fmt: skip
    base = ["live", "-s", str(portrait_paths()[0]), "--bundle", str(toy_bundle), "--backend", "ort"]
    if "--sink" not in words:
        base += ["--sink", str(tmp_path / "out.mp4")]
    clip = tmp_path / "clip.mkv"
    write(clip, [grey(9), grey(90)], [0, NS], face)
    before = clip.read_bytes()
    assert main([*base, *(word.format(clip=clip) for word in words)]) == 2
    assert message in capsys.readouterr().err
    assert list(tmp_path.glob("*.mp4")) == [] and clip.read_bytes() == before


def test_a_large_portrait_is_made_smaller_with_its_face(
    toy_bundle: Path, tmp_path: Path, portrait: tuple[np.ndarray, Landmarks]
) -> None:
    image, face = portrait
    path = tmp_path / "large.png"
    grown = cv2.resize(image, (8 * image.shape[1], 8 * image.shape[0]))
    write_portrait(path, grown, face.transformed(np.array([[8.0, 0, 3.5], [0, 8.0, 3.5]])))
    with Reenactor.load(toy_bundle, settings=Settings(backend="ort", threads=1)) as act:
        whole = prepare_portrait(act, path)
        small = prepare_portrait(act, path, most_side=200)
    assert max(whole.portrait.shape) == 720 and small.portrait.shape == (200, 178, 3)
    np.testing.assert_allclose(small.landmarks.points, whole.landmarks.points, atol=0.2)
    assert np.abs(small.crop.astype(int) - whole.crop).mean() < 6.0
