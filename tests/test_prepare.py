"""`diffusionact prepare`: what is kept, what is dropped and why, and going on after a kill."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import cv2
import numpy as np
import pytest

from diffusionact.errors import MediaError, SettingsError
from diffusionact.evaluation.layouts import Footage
from diffusionact.landmarks import Landmarks
from diffusionact.training import prepare as module
from diffusionact.training.contact_sheet import write_contact_sheet
from diffusionact.training.prepare import prepare
from diffusionact.training.prepare_clip import (
    REASONS,
    chosen_frames,
    hull_mask,
    prepare_clip,
    sharpness_of,
)
from diffusionact.training.shards import Shards
from tests.readers import (
    HEIGHT,
    WIDTH,
    ScriptedReader,
    Shot,
    people,
    posed,
    request,
    scene,
    talking,
)

MEDIA = Path(__file__).parent.parent.parent / "shared" / "media"


def clip(shots: list[Shot], **promised: int | None) -> tuple[ScriptedReader, Footage]:
    reader = ScriptedReader({"x": shots}, dict(promised))
    return reader, Footage("x", "id0", Path("/nowhere/x"))


def moved(face: Landmarks, dx: float, dy: float, factor: float = 1.0) -> Landmarks:
    return face.transformed(np.array([[factor, 0.0, dx], [0.0, factor, dy]]))


def test_every_reason_to_drop_a_frame_is_found() -> None:
    """One frame for each reason among good ones; the counts say so, and nothing else is lost."""
    face, flat = posed(0, 0.0), np.full((HEIGHT, WIDTH, 3), 90, np.uint8)
    shots: list[Shot] = talking(0, 6)
    shots += [
        (None, []),
        (scene(0, 20), []),
        (scene(0, 21), [face, moved(face, -30.0, 5.0, 0.8)]),
        (scene(0, 22), [moved(face, 75.0, 0.0)]),
        (scene(0, 23), [moved(face, 70.0, 50.0, 0.1)]),
        (flat, [face]),
        *talking(0, 7)[6:],
        *talking(0, 7)[6:],  # the same again
        (scene(0, 31), [moved(face, 62.0, 60.0, 0.6)]),
    ]
    reader, footage = clip(shots)
    examples: list = []
    entries, report = prepare_clip(reader, footage, 3, request(), examples)
    assert report.seen == len(shots)
    assert dict(report.dropped) == dict.fromkeys(REASONS, 1)
    assert report.takes == [7] and len(entries) == 7
    assert {example.reason for example in examples} == set(REASONS) - {"unreadable"}
    assert entries[0].key == "c000003t00f000000"
    assert entries[-1].about == {
        "person": "id0", "clip": "x", "take": 0, "frame": 12, "pts_ns": 480_000_000,
    }  # fmt: skip


def test_a_small_face_in_the_background_does_not_disturb() -> None:
    face = posed(0, 0.0)
    shots = [(image, [faces[0], moved(face, 80.0, 10.0, 0.3)]) for image, faces in talking(0, 4)]
    reader, footage = clip(shots)
    assert prepare_clip(reader, footage, 0, request(), [])[1].takes == [4]


def test_a_cut_begins_a_new_take() -> None:
    """Two people one after the other in a clip make no pairs with each other."""
    reader, footage = clip(talking(0, 4) + talking(7, 3))
    entries, report = prepare_clip(reader, footage, 0, request(), [])
    assert report.takes == [4, 3]
    assert [entry.about["take"] for entry in entries] == [0] * 4 + [1] * 3
    assert entries[4].key == "c000000t01f000004"


def test_frames_are_spread_over_the_clip_whatever_its_header_says() -> None:
    assert chosen_frames(100, 5) == {0, 25, 50, 74, 99}
    assert chosen_frames(3, 9) == {0, 1, 2}
    for promised, wanted in ((12, [0, 4, 7, 11]), (None, [0, 4, 7, 11]), (24, [0, 8])):
        reader, footage = clip(talking(0, 12), x=promised)
        entries, _ = prepare_clip(reader, footage, 0, request(frames_per_clip=4), [])
        assert [entry.about["frame"] for entry in entries] == wanted


def test_the_mask_holds_the_face_and_not_the_background() -> None:
    face = posed(0, 0.0)
    mask = hull_mask(moved(face, -16.0, 4.0), 128)
    inside = face.points[27:68, :2] + (-16.0, 4.0)
    assert (mask[inside[:, 1].astype(int), inside[:, 0].astype(int)] == 255).all()
    brow = (face.points[17:27, :2] + (-16.0, 4.0)).mean(axis=0)
    assert mask[int(brow[1]) - 8, int(brow[0])] == 255  # the forehead
    assert mask[:, 0].max() == mask[0].max() == 0 and 0.1 < (mask > 0).mean() < 0.6


def test_sharpness_falls_with_blur() -> None:
    image = scene(1, 0)[:112, :112]
    values = [sharpness_of(cv2.GaussianBlur(image, (0, 0), s).astype(np.uint8)) for s in (1, 3, 8)]
    assert values[0] > 2 * values[1] > 4 * values[2]


def test_an_unreadable_clip_is_reported_and_the_rest_prepared(tmp_path: Path) -> None:
    reader, clips = people()
    clips.insert(1, Footage("id9-broken", "id9", Path("/nowhere/broken")))
    made = prepare(clips, tmp_path / "out", request(), lambda: reader)
    assert made.report["clips"] == 5 and made.report["clips_used"] == 4
    assert made.report["people"] == 3 and made.report["kept"] == 14
    assert made.report["unused_clips"] == [
        {"clip": "id9-broken", "error": "/nowhere/broken: cannot be read", "dropped": {}}
    ]
    text = (tmp_path / "out" / "report.txt").read_text()
    assert "14 of 14 frames kept, of 3 people; 4 of 5 clips" in text
    assert "id9-broken: /nowhere/broken: cannot be read" in text
    assert json.loads((tmp_path / "out" / "report.json").read_text()) == made.report
    assert Shards.open(tmp_path / "out").people == ["id0", "id1", "id2"]
    assert reader.closed == 1


def test_nothing_kept_is_an_error_that_says_why(tmp_path: Path) -> None:
    reader, footage = clip([(scene(0, i), []) for i in range(3)])
    with pytest.raises(SettingsError, match=r"none of 3 frames was kept; report\.txt"):
        prepare([footage], tmp_path / "out", request(), lambda: reader)
    assert "no face" in (tmp_path / "out" / "report.txt").read_text()
    assert list((tmp_path / "out" / "dropped" / "no_face").glob("*.jpg"))


def digest(folder: Path) -> dict[str, str]:
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }


class Killed(BaseException):
    """As SIGKILL: nothing catches it."""


@dataclass
class Dying(ScriptedReader):
    """Dies after it has read so many faces."""

    left: int = 0

    def faces(self, image_bgr: np.ndarray) -> list[Landmarks]:
        self.left -= 1
        if self.left < 0:
            raise Killed
        return super().faces(image_bgr)


def _given(reader: ScriptedReader) -> ScriptedReader:
    return reader


def test_a_run_that_was_cut_short_ends_with_the_same_bytes(tmp_path: Path) -> None:
    """At every frame that is shown, in turn: only the shard at hand is made again."""
    reader, clips = people()
    prepare(clips, tmp_path / "whole", request(), lambda: reader)
    wanted, folder = digest(tmp_path / "whole"), tmp_path / "broken"
    for last in range(1, 14, 3):
        broken = Dying(people()[0].clips, left=last)
        try:
            prepare(clips, folder, request(), partial(_given, broken))
        except Killed:
            assert not (folder / "meta.json").exists()
    again, _ = people()
    prepare(clips, folder, request(), lambda: again)
    assert digest(folder) == wanted
    assert again.shown == [] or len(again.shown) < 4
    prepare(clips, folder, request(), lambda: pytest.fail("nothing was left to do"))


def test_several_processes_make_the_same_bytes(tmp_path: Path) -> None:
    reader, clips = people()
    prepare(clips, tmp_path / "one", request(), lambda: reader)
    done: list[int] = []
    prepare(clips, tmp_path / "two", request(), _open_people, workers=2,
            progress=lambda n, total: done.append(n))  # fmt: skip
    assert digest(tmp_path / "one") == digest(tmp_path / "two")
    assert done == [2, 4]


def _open_people() -> ScriptedReader:
    return people()[0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"size": 32}, r"begun with size = 64, wanted 32"),
        ({"least_sharpness": 0.0}, r"begun with least_sharpness = 2\.0, wanted 0\.0"),
        ({"frames_per_clip": 5000}, r"--frames-per-clip 5000; wanted 1 to 1024"),
    ],
)
def test_other_settings_want_another_folder(
    tmp_path: Path, changes: dict[str, float], message: str
) -> None:
    reader, clips = people()
    prepare(clips, tmp_path / "out", request(), lambda: reader)
    with pytest.raises(SettingsError, match=message):
        prepare(clips, tmp_path / "out", request(**changes), lambda: reader)


def test_a_data_set_that_grew_wants_another_folder_and_files_are_not_mixed(tmp_path: Path) -> None:
    reader, clips = people()
    prepare(clips[:3], tmp_path / "out", request(), lambda: reader)
    with pytest.raises(SettingsError, match="begun with clips = 3, wanted 4"):
        prepare(clips, tmp_path / "out", request(), lambda: reader)
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "diary.txt").write_text("x")
    with pytest.raises(SettingsError, match="holds other files"):
        prepare(clips, tmp_path / "mine", request(), lambda: reader)


def test_the_contact_sheet_shows_faces_points_and_drawings(tmp_path: Path) -> None:
    reader, clips = people()
    prepare(clips, tmp_path / "out", request(), lambda: reader)
    shards = Shards.open(tmp_path / "out")
    write_contact_sheet(shards, tmp_path / "sheet.png")
    sheet = cv2.imread(str(tmp_path / "sheet.png"))
    assert sheet is not None and sheet.shape == (4 * 212, 8 * 192, 3)
    cell = sheet[20:212, :192].astype(int)
    place = (shards.columns["points"][0][:, :2] + 0.5) * 3 - 0.5
    marks = cell[np.rint(place[:, 1]).astype(int), np.rint(place[:, 0]).astype(int)]
    assert (marks[:, 1] > marks[:, 0] + 40).mean() > 0.8  # green
    assert (sheet[20:212, 6 * 192 :] == 255).all()  # a take of five frames and its drawing


def test_memory_does_not_grow_with_the_data(tmp_path: Path) -> None:
    """The frames of one clip at a time are pulled through the writer."""
    alive = 0

    class Counting(ScriptedReader):
        def pictures(self, path: Path):  # type: ignore[no-untyped-def]
            nonlocal alive
            alive += 1
            yield from super().pictures(path)

    reader, clips = people()
    counting = Counting(reader.clips)
    task = module._Task(tmp_path, request(clips_per_shard=4), 0, 0, clips)
    steps = module._make(task, counting)
    assert next(steps) == 1 and alive == 1
    assert next(steps) == 1 and alive == 2


# The command


def run(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "diffusionact.cli", "prepare", *arguments],
        capture_output=True, text=True, check=False,
    )  # fmt: skip


def real_clips(root: Path) -> Path:
    """Two people and a file that is none, laid out as VoxCeleb is."""
    if not MEDIA.is_dir():
        pytest.skip(f"{MEDIA} is not there: clips of people that are not shipped")
    if importlib.util.find_spec("mediapipe") is None:  # importing it would load its library twice
        pytest.skip("MediaPipe is not installed")
    for name, file in (
        ("id00001/again/00001.mkv", "driving/asl_A_again.mkv"),
        ("id00002/head/00001.gif", "driving/headpose_male.gif"),
    ):
        (root / name).parent.mkdir(parents=True)
        (root / name).symlink_to(MEDIA / file)
    (root / "id00003/x").mkdir(parents=True)
    (root / "id00003/x/00001.mp4").write_text("none")
    return root


def test_the_command_prepares_real_clips(tmp_path: Path) -> None:
    root = real_clips(tmp_path / "vox")
    options = ("--size", "64", "--frames-per-clip", "4", "--clips-per-shard", "1", "--json")
    done = run(str(root), "-o", str(tmp_path / "out"), *options)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["people"] == 2 and report["kept"] >= 6
    assert [clip["clip"] for clip in report["unused_clips"]] == ["id00003/x/00001"]
    assert Path(report["sheet"]).is_file()
    shards = Shards.open(tmp_path / "out")
    eyes = shards.columns["points"][:, 36:48, :2].mean(axis=1)
    np.testing.assert_allclose(eyes, [[31.5, 28.0]] * len(eyes), atol=6.0)  # where FFHQ has them


@pytest.mark.slow
def test_the_command_survives_a_kill(tmp_path: Path) -> None:
    root = real_clips(tmp_path / "vox")
    options = [str(root), "--size", "64", "--frames-per-clip", "30", "--clips-per-shard", "1"]
    assert run(*options, "-o", str(tmp_path / "whole")).returncode == 0
    command = [sys.executable, "-m", "diffusionact.cli", "prepare", *options,
               "-o", str(tmp_path / "cut")]  # fmt: skip
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    until = time.monotonic() + 60
    while not (tmp_path / "cut" / "shard-000000.json").exists() and time.monotonic() < until:
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "cut" / "meta.json").exists()
    assert run(*options, "-o", str(tmp_path / "cut")).returncode == 0
    assert digest(tmp_path / "whole") == digest(tmp_path / "cut")


def test_a_data_set_that_is_not_there_is_named(tmp_path: Path) -> None:
    from diffusionact.evaluation.layouts import footage

    with pytest.raises(MediaError, match="no such file"):
        footage(tmp_path / "none")


@pytest.mark.torch
def test_masks_of_a_network_take_the_hulls_place(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    torch = pytest.importorskip("torch")
    from diffusionact.training import masks

    class Halves:
        """Left of the middle is background, for sure; right of it by 49 %."""

        def background(self, x, labels):  # type: ignore[no-untyped-def]
            assert x.shape == (1, 3, 64, 64) and -1 <= x.min() < x.max() <= 1
            share = torch.full((1, 1, 64, 64), 0.49)
            share[..., :32] = 1.0
            return share

    asked = {}

    def opened(recipe, weights, device, masks):  # type: ignore[no-untyped-def]
        asked.update(recipe=recipe, weights=weights, masks=masks)
        return Halves()

    monkeypatch.setattr(masks, "open_critics", opened)
    reader, clips = people()
    reader.mask = masks.open_parser(tmp_path / "bisenet.pth")  # type: ignore[method-assign]
    assert asked["recipe"].bisenet.endswith("bisenet.pth") and not asked["masks"]
    assert asked["weights"].background == 1 and asked["weights"].pixel == 0
    prepare(clips, tmp_path / "out", request(), lambda: reader)
    frames = Shards.open(tmp_path / "out").gather(np.zeros(1, int), np.zeros(1, int))
    assert frames.mask is not None
    assert (frames.mask[..., :32] == 0).all() and (frames.mask[..., 32:] == 255).all()
