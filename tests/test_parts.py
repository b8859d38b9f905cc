"""What an interrupted run leaves, piece by piece: recipe, motion, and a journal of pictures."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from diffusionact.errors import MediaError
from diffusionact.landmarks import Landmarks
from diffusionact.runtime.journal import Journal
from diffusionact.runtime.media import open_reader
from diffusionact.runtime.motion import Motion
from diffusionact.runtime.parts import Parts
from diffusionact.runtime.recipe import differences, recipe_of
from diffusionact.runtime.reenactor import Reenactor
from diffusionact.runtime.settings import Settings
from diffusionact.runtime.writer import make_track
from tests.clips import folder_of

UInt8Array = npt.NDArray[np.uint8]


def test_differences_are_told_in_words() -> None:
    before = {"driver": "a1", "steps": "4", "face": "None", "version of av": "1"}
    now = {"driver": "b2", "steps": "8", "face": "None", "version of torch": "2"}
    told = differences(before, now).split(", ")
    assert sorted(told) == [
        "driver changed",
        "steps was 4 and is 8",
        "version of av was 1 and is None",
        "version of torch was None and is 2",
    ]
    assert differences(now, now) == ""


def test_the_recipe_of_a_folder_holds_every_picture(toy_bundle: Path, tmp_path: Path) -> None:
    folder = folder_of(tmp_path / "driver", 3)
    with Reenactor.load(toy_bundle) as act:
        seen = set()
        for _ in range(2):
            seen.add(recipe_of(act, folder / "000.png", open_reader(folder), None)["driver"])
            cv2.imwrite(str(folder / "002.png"), np.full((40, 40, 3), 77, np.uint8))
            seen.add(recipe_of(act, folder / "000.png", open_reader(folder), None)["driver"])
    assert len(seen) == 2


def test_libraries_that_do_nothing_are_no_part_of_a_recipe(
    toy_bundle: Path, tmp_path: Path
) -> None:
    reader = open_reader(folder_of(tmp_path / "driver", 1))
    with Reenactor.load(toy_bundle, settings=Settings(backend="ort")) as act:
        made = recipe_of(act, tmp_path / "driver" / "000.png", reader, None)
    assert {"version of diffusionact", "version of av", "version of onnxruntime"} <= made.keys()
    assert {"version of openvino", "version of torch"}.isdisjoint(made)


def test_parts_that_cannot_begin_leave_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("diffusionact.runtime.parts.write_whole", full)
    with pytest.raises(MediaError, match=r"out.mp4: cannot be written \(No space left"):
        Parts(tmp_path / "out.mp4", {})
    assert list(tmp_path.iterdir()) == []


def test_a_motion_round_trips(tmp_path: Path, face: Landmarks) -> None:
    track = make_track([face, None, face], [0, 5, 90], (64, 48))
    motion = Motion(track, (5, 85, 7), {"read": np.arange(3), "track": np.arange(3, 6)})
    motion.save(tmp_path / "motion.npz")
    back = Motion.load(tmp_path / "motion.npz")
    assert back.spans_ns == motion.spans_ns
    np.testing.assert_equal(back.times, motion.times)
    np.testing.assert_array_equal(back.track.landmarks, track.landmarks)
    track.save(tmp_path / "track.npz")
    with pytest.raises(MediaError, match="not a driver's motion"):
        Motion.load(tmp_path / "track.npz")


@pytest.fixture
def pictures() -> list[UInt8Array]:
    rng = np.random.default_rng(3)
    return [rng.integers(0, 256, (16, 16, 3)).astype(np.uint8) for _ in range(5)]


def test_a_journal_gives_back_what_it_was_given(tmp_path: Path, pictures: list[UInt8Array]) -> None:
    for image in pictures:
        with Journal(tmp_path / "crops.bin") as journal:
            journal.append(image)
    with Journal(tmp_path / "crops.bin") as journal:
        assert journal.count == 5
        assert all(np.array_equal(a, b) for a, b in zip(journal.pictures(), pictures, strict=True))


def cut(content: bytes) -> Iterator[tuple[bytes, int]]:
    """The content of a journal of five, damaged, and how many are whole before that."""
    yield content[:-1], 4
    yield content[:-900], 3
    yield content[:5], 0
    yield content + b"\0" * 4096, 5
    yield content[:-1] + bytes([content[-1] ^ 1]), 4
    yield b"", 0


def test_a_damaged_journal_is_cut_where_the_damage_is(
    tmp_path: Path, pictures: list[UInt8Array]
) -> None:
    path = tmp_path / "crops.bin"
    with Journal(path) as journal:
        for image in pictures:
            journal.append(image)
    for content, whole in cut(path.read_bytes()):
        path.write_bytes(content)
        with Journal(path) as journal:
            assert journal.count == whole
            journal.append(pictures[0])
        with Journal(path) as journal:
            back = list(journal.pictures())
        assert len(back) == whole + 1
        np.testing.assert_array_equal(back[-1], pictures[0])
