"""A run that was killed goes on: its result is that of one which nothing disturbed."""

from __future__ import annotations

import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import av
import cv2
import numpy as np
import numpy.typing as npt
import pytest

from diffusionact.errors import MediaError
from diffusionact.landmarks import Landmarks, sidecar_path
from diffusionact.runtime import parts as parts_module
from diffusionact.runtime.clip import ClipReport, run_clip
from diffusionact.runtime.journal import Journal
from diffusionact.runtime.loop import Loop
from diffusionact.runtime.media import FRAME_NS
from diffusionact.runtime.parts import Parts, forget_parts, parts_folder
from diffusionact.runtime.reenactor import Reenactor
from diffusionact.runtime.settings import Settings
from diffusionact.runtime.writer import make_track
from tests.clips import moving, write_portrait
from tests.test_audio import beep_time_s, write_sound

UInt8Array = npt.NDArray[np.uint8]
ROOT = Path(__file__).parents[1]
COUNT, LOST, KILL_AT = 30, range(10, 14), 17  # frames; without a face; where the kill comes
SETTINGS = Settings(backend="ort")  # not the fastest, which is measured anew in every test
TOGETHER = Settings(backend="openvino", precision="fp32", at_once=4)
CHILD_S = 60.0  # to start, load and work; longer means that it hangs
RunClip = Callable[..., ClipReport]


@pytest.fixture(autouse=True)
def keep_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """A second's work counts as much as a minute's."""
    monkeypatch.setattr(parts_module, "KEPT_FROM_S", 0.0)


@pytest.fixture
def portrait_file(tmp_path: Path, portrait: tuple[UInt8Array, Landmarks]) -> Path:
    return write_portrait(tmp_path / "portrait.png", *portrait)


@pytest.fixture
def driver_file(tmp_path: Path, face: Landmarks) -> Path:
    """A video with sound, frames of any length, and its track; a while it shows no face."""
    steps = np.random.default_rng(1).integers(20, 70, COUNT)
    times = ((np.cumsum(steps) - steps[0]) * 1_000_000).tolist()
    path = tmp_path / "driver.mp4"
    write_sound(path, "aac", 0.5, times)
    faces = moving(face, COUNT)
    for i in LOST:
        faces[i] = None
    make_track(faces, times, (64, 48)).save(sidecar_path(path))
    return path


@pytest.fixture
def run(toy_bundle: Path, portrait_file: Path, driver_file: Path, tmp_path: Path) -> RunClip:
    """A run of the clip into a folder and file of tmp_path, as one process does it."""

    def made(output: str, settings: Settings = SETTINGS, **options: Any) -> ClipReport:
        with Reenactor.load(toy_bundle, settings=settings) as act:
            return run_clip(act, portrait_file, driver_file, tmp_path / output, **options)

    return made


@pytest.fixture
def stopped(monkeypatch: pytest.MonkeyPatch) -> Callable[[int], None]:
    """Stops the next run at the rendering of its n-th frame; 0: not any more."""
    real = Reenactor.reenact

    def stop_at(number: int) -> None:
        count = 0

        def reenact(*arguments: Any) -> Any:
            nonlocal count
            count += 1
            if count == number:
                raise KeyboardInterrupt
            return real(*arguments)

        monkeypatch.setattr(Reenactor, "reenact", reenact)

    return stop_at


def contents(path: Path) -> Any:
    """What a result holds: bytes of an mp4, a track or a folder's files; packets of an mkv, whose
    header has a random number."""
    if path.is_dir():
        return {file.name: file.read_bytes() for file in path.iterdir()}
    if path.suffix == ".mkv":
        with av.open(str(path)) as container:
            return [(p.stream_index, p.pts, p.duration, bytes(p)) for p in container.demux()]
    return path.read_bytes()


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


CHILD = """
    import os, signal, sys
    from pathlib import Path
    from diffusionact.runtime.clip import run_clip
    from diffusionact.runtime.media import VideoReader
    from diffusionact.runtime.reenactor import Reenactor
    from diffusionact.runtime.settings import Settings
    bundle, portrait, driver, output, where, number = sys.argv[1:]
    left = int(number)

    def count():
        global left
        left -= 1
        if not left:
            os.kill(os.getpid(), signal.SIGKILL)

    reenact, read = Reenactor.reenact, VideoReader.__iter__

    def counted(*arguments):
        count()
        return reenact(*arguments)

    def frames(self):
        for frame in read(self):
            count()
            yield frame

    if where == "render":
        Reenactor.reenact = counted
    else:
        VideoReader.__iter__ = frames
    with Reenactor.load(bundle, settings=Settings(backend="ort")) as act:
        run_clip(act, portrait, driver, output)
"""


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGKILL to send")
@pytest.mark.parametrize("where", ["track", "render"])
def test_a_killed_run_goes_on(
    run: RunClip,
    toy_bundle: Path,
    portrait_file: Path,
    driver_file: Path,
    tmp_path: Path,
    where: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    output = tmp_path / "out" / "out.mp4"
    words = [toy_bundle, portrait_file, driver_file, output, where, KILL_AT]
    child = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(CHILD), *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, timeout=CHILD_S,
    )  # fmt: skip
    assert child.returncode == -signal.SIGKILL, child.stderr
    assert names(output.parent) == [parts_folder(output).name]

    report = run("out/out.mp4")
    done = report.resumed
    assert done in ((KILL_AT - 2, KILL_AT - 1, KILL_AT - 3) if where == "render" else (0,))
    assert (report.frames, report.seen) == (COUNT, COUNT - len(LOST))
    assert names(output.parent) == ["out.mp4"]
    said = f"going on after {done} of {COUNT} frames" if where == "render" else "not yet tracked"
    assert said in caplog.text

    run("whole.mp4")
    assert contents(output) == contents(tmp_path / "whole.mp4")
    assert beep_time_s(output) == pytest.approx(beep_time_s(driver_file), abs=0.001)


@pytest.mark.parametrize("name", ["out.mp4", "out.mkv", "frames"])
def test_a_run_may_be_stopped_again_and_again(
    run: RunClip,
    stopped: Callable[[int], None],
    tmp_path: Path,
    name: str,
    caplog: pytest.LogCaptureFixture,
) -> None:
    for number in (8, 1, 12):
        stopped(number)
        with pytest.raises(KeyboardInterrupt):
            run(f"out/{name}")
        assert names(tmp_path / "out") == [f".{name}.parts"]
        assert str(parts_folder(tmp_path / "out" / name)) in caplog.messages[-1]
    stopped(0)
    report = run(f"out/{name}")
    assert report.resumed == 7 + 0 + 11
    assert report.times["total"].count == COUNT - report.resumed
    assert names(tmp_path / "out") == [name]
    run(f"whole/{name}")
    assert contents(tmp_path / "out" / name) == contents(tmp_path / "whole" / name)


def test_a_run_that_had_only_to_be_finished_is(
    run: RunClip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise MediaError("disk full")

    with monkeypatch.context() as patch, pytest.raises(MediaError, match="disk full"):
        patch.setattr("diffusionact.runtime.writer.VideoWriter.finish", full)
        run("out.mp4")
    report = run("out.mp4")
    assert (report.resumed, report.times) == (COUNT, {})
    run("whole.mp4")
    assert contents(tmp_path / "out.mp4") == contents(tmp_path / "whole.mp4")


def test_a_track_goes_on_from_the_drivers_track(
    run: RunClip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object, **__: object) -> None:
        raise MediaError("disk full")

    with monkeypatch.context() as patch, pytest.raises(MediaError):
        patch.setattr("diffusionact.runtime.writer.TrackWriter.write", full)
        run("out.npz")
    with monkeypatch.context() as patch:
        patch.setattr("diffusionact.runtime.clip.driver_motion", full)
        run("out.npz")
    run("whole.npz")
    assert contents(tmp_path / "out.npz") == contents(tmp_path / "whole.npz")


def test_what_is_stopped_early_leaves_nothing_behind(
    run: RunClip,
    stopped: Callable[[int], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(parts_module, "KEPT_FROM_S", CHILD_S)
    stopped(5)
    with pytest.raises(KeyboardInterrupt):
        run("out/out.mp4")
    assert names(tmp_path / "out") == []


@pytest.mark.skipif(os.name == "nt", reason="Windows has no SIGINT to send to a child")
@pytest.mark.usefixtures("interruptible")
def test_control_c_ends_all_threads_and_leaves_nothing(
    toy_bundle: Path, portrait_file: Path, face: Landmarks, tmp_path: Path
) -> None:
    driver, output = tmp_path / "long.npz", tmp_path / "out" / "out.mp4"
    count = 3_000  # more than it can do in this time
    make_track([face] * count, list(range(0, count * FRAME_NS, FRAME_NS)), (32, 32)).save(driver)
    words = ["run", "-s", portrait_file, "-d", driver, "-o", output, "--bundle", toy_bundle,
             "--backend", "ort"]  # fmt: skip
    with subprocess.Popen(
        [sys.executable, "-m", "diffusionact.cli", *map(str, words)],
        cwd=ROOT, stderr=subprocess.PIPE, text=True,
    ) as process:  # fmt: skip
        crops, begun_s = parts_folder(output) / "crops.bin", time.monotonic()
        while not (crops.exists() and crops.stat().st_size):
            assert process.poll() is None and time.monotonic() - begun_s < CHILD_S
            time.sleep(0.02)
        process.send_signal(signal.SIGINT)
        _, said = process.communicate(timeout=CHILD_S)
    assert process.returncode == 130, said
    assert "diffusionact: interrupted" in said and "Traceback" not in said
    assert names(output.parent) == []


def test_the_folder_one_is_in_has_parts_beside_it(
    run: RunClip, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert parts_folder(".") == tmp_path.with_name(f".{tmp_path.name}.parts")
    with pytest.raises(MediaError, match="the folder is not empty"):
        run(".")


def touched_portrait(portrait: Path, driver: Path) -> None:
    image = cv2.imread(str(portrait))
    assert image is not None
    image[0, 0] ^= 255
    cv2.imwrite(str(portrait), image)


def touched_driver(portrait: Path, driver: Path) -> None:
    driver.write_bytes(driver.read_bytes() + b"\0")


def touched_landmarks(portrait: Path, driver: Path) -> None:
    path = sidecar_path(driver)
    with np.load(path) as arrays:
        np.savez(path, **{**arrays, "gaze": arrays["gaze"] + np.float32(0.1)})


@pytest.mark.parametrize(
    ("change", "word"),
    [
        (touched_portrait, "portrait changed"),
        (touched_driver, "driver changed"),
        (touched_landmarks, "driver changed"),
        (replace(SETTINGS, steps=2), "steps was None and is 2"),
        (replace(SETTINGS, paste=False), "paste was True and is False"),
        ({"face": 1}, "face was None and is 1"),
        ("versions", "version of diffusionact was .* and is 99"),
        ("bundle", "bundle changed"),
    ],
)
def test_another_recipe_starts_afresh_and_says_why(
    change: Any,
    word: str,
    run: RunClip,
    toy_bundle: Path,
    portrait_file: Path,
    driver_file: Path,
    stopped: Callable[[int], None],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    stopped(5)
    with pytest.raises(KeyboardInterrupt):
        run("out.mp4")
    stopped(0)
    options: dict[str, Any] = {}
    if isinstance(change, Settings):
        options = {"settings": change}
    elif isinstance(change, dict):
        options = change
    elif change == "versions":
        monkeypatch.setattr("diffusionact.runtime.recipe.versions", lambda: {"diffusionact": "99"})
    elif change == "bundle":
        text = (toy_bundle / "manifest.json").read_text().replace('"toy"', '"tin"')
        other = Path(shutil.copytree(toy_bundle, tmp_path / "other.bundle"))
        (other / "manifest.json").write_text(text)
        monkeypatch.setattr(
            Reenactor, "load", lambda *a, load=Reenactor.load, **o: load(other, *a[1:], **o)
        )
    else:
        change(portrait_file, driver_file)
    report = run("out.mp4", **options)
    assert report.resumed == 0
    (said,) = [message for message in caplog.messages if "starting afresh" in message]
    assert re.search(word, said), said
    assert not parts_folder(tmp_path / "out.mp4").exists()


@pytest.mark.parametrize("kept", [3, 4, 6, 28, 29])
def test_where_a_run_was_killed_moves_no_frame_to_another_place_among_those_at_once(
    run: RunClip, tmp_path: Path, kept: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A backend may round by a frame's place: here each place has a brightness of its own."""
    pytest.importorskip("openvino", reason="no openvino; make dev has it")
    settings = replace(TOGETHER, threads=1)
    real_render, real_keep = Loop.render_together, Parts.keep_crop

    def shaded(*arguments: Any) -> Any:
        return real_render(*arguments) + np.linspace(0.0, 0.3, 4).reshape(4, 1, 1, 1)

    def keep(self: Parts, crop: UInt8Array) -> None:
        assert self._journal is not None
        if self._journal.count == kept:
            raise KeyboardInterrupt
        real_keep(self, crop)

    monkeypatch.setattr(Loop, "render_together", shaded)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(Parts, "keep_crop", keep)
        run("out.mp4", settings)
    report = run("out.mp4", settings)
    assert report.resumed == kept
    assert report.times["total"].count == COUNT - kept
    run("whole.mp4", settings)
    assert contents(tmp_path / "out.mp4") == contents(tmp_path / "whole.mp4")


def test_another_number_of_frames_at_once_is_another_recipe(
    run: RunClip, stopped: Callable[[int], None], caplog: pytest.LogCaptureFixture
) -> None:
    pytest.importorskip("openvino", reason="no openvino; make dev has it")
    stopped(1)  # the first of the last few, which are rendered one at a time
    with pytest.raises(KeyboardInterrupt):
        run("out.mp4", TOGETHER)
    assert run("out.mp4", replace(TOGETHER, at_once=1)).resumed == 0
    assert "at_once was 4 and is 1: starting afresh" in caplog.text


def test_parts_can_be_forgotten(
    run: RunClip,
    stopped: Callable[[int], None],
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
) -> None:
    forget_parts(tmp_path / "out.mp4")  # nothing there
    stopped(5)
    with pytest.raises(KeyboardInterrupt):
        run("out.mp4")
    stopped(0)
    forget_parts(tmp_path / "out.mp4")
    assert not parts_folder(tmp_path / "out.mp4").exists()
    assert run("out.mp4").resumed == 0


def test_two_runs_do_not_share_an_output(run: RunClip, tmp_path: Path) -> None:
    with Parts(tmp_path / "out.mp4", {}):
        with pytest.raises(MediaError, match=r"out.mp4: another run is writing it"):
            run("out.mp4")
        with pytest.raises(MediaError, match="another run"):
            forget_parts(tmp_path / "out.mp4")
    assert run("out.mp4").frames == COUNT


def test_damaged_parts_are_no_reason_to_fail(
    run: RunClip, stopped: Callable[[int], None], tmp_path: Path
) -> None:
    for name in ("source.npz", "motion.npz", "recipe.json", "crops.bin"):
        stopped(5)
        with pytest.raises(KeyboardInterrupt):
            run("out.mp4")
        stopped(0)
        path = parts_folder(tmp_path / "out.mp4") / name
        path.write_bytes(path.read_bytes()[:-7])
        assert run("out.mp4").resumed == (3 if name == "crops.bin" else 0)


def test_no_room_for_crops_ends_the_keeping_and_not_the_run(
    run: RunClip,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:
    real = Journal.append

    def full(self: Journal, image: UInt8Array) -> None:
        if self.count == 4:
            raise OSError(28, "No space left on device")
        real(self, image)

    with monkeypatch.context() as patch:
        patch.setattr(Journal, "append", full)
        run("out.mp4")
    assert [m for m in caplog.messages if "No space left on device" in m] == caplog.messages
    run("whole.mp4")
    assert contents(tmp_path / "out.mp4") == contents(tmp_path / "whole.mp4")


@pytest.mark.skipif(os.name == "nt", reason="Windows limits no file's size")
@pytest.mark.parametrize("name", ["out.mp4", "frames"])
def test_a_full_disk_is_named_and_nothing_stays(
    toy_bundle: Path, portrait_file: Path, driver_file: Path, tmp_path: Path, name: str
) -> None:
    code = """
        import resource, sys
        from diffusionact.cli import main
        resource.setrlimit(resource.RLIMIT_FSIZE, (9_000, 9_000))
        sys.exit(main(sys.argv[1:]))
    """
    output = tmp_path / "out" / name
    words = ["run", "-s", portrait_file, "-d", driver_file, "-o", output, "--bundle", toy_bundle]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, words)],
        cwd=ROOT, capture_output=True, text=True, timeout=CHILD_S,
    )  # fmt: skip
    assert done.returncode == 2, done.stderr
    assert "cannot be written" in done.stderr and "File too large" in done.stderr
    assert "Traceback" not in done.stderr
    assert names(output.parent) == []
