"""Pairing, damage, lines and summaries, resuming, and statistics, on pictures made here."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from diffusionact.errors import MediaError, SettingsError
from diffusionact.evaluation import metrics
from diffusionact.evaluation.columns import COLUMNS, FRAME_COLUMNS
from diffusionact.evaluation.compared import Clip, Frame, Image
from diffusionact.evaluation.measure import Instruments
from diffusionact.evaluation.pairing import Side, paired, pairing_of
from diffusionact.evaluation.reading import Reading
from diffusionact.evaluation.run import run_clips
from diffusionact.evaluation.runfile import LINES, STATE, RunFile, read_rows, read_run
from diffusionact.evaluation.statistics import bootstrap, changes
from diffusionact.evaluation.worst import read_worst


def picture(seed: int, side: int = 24) -> Image:
    return np.random.default_rng(seed).integers(0, 256, (side, side, 3)).astype(np.uint8)


def loads(image: Image) -> Callable[[], Image]:
    return lambda: image


def broken() -> Image:
    raise MediaError("damaged")


def side(*names: str, named: bool = True) -> Side:
    return Side("side", [(name, loads(picture(i))) for i, name in enumerate(names)], named)


def keys(frames: Iterator[Frame]) -> list[tuple[str, str | None]]:
    return [(frame.key, frame.unpaired) for frame in frames]


def test_folders_are_paired_by_name_and_nothing_is_dropped() -> None:
    made = keys(paired(side("a", "b", "c"), side("c", "a", "z")))
    assert made == [("a", None), ("b", "missing"), ("c", None), ("z", "extra")]


def test_folders_named_otherwise_are_paired_by_number() -> None:
    a, b = side("frame_001", "frame_002", "frame_003"), side("3", "1")
    assert pairing_of(a, b) == "number"
    assert keys(paired(a, b)) == [
        ("frame_001", None), ("frame_002", "missing"), ("frame_003", None),
    ]  # fmt: skip


def test_unnumbered_folders_are_paired_by_order_only_when_their_counts_agree() -> None:
    assert keys(paired(side("a", "b"), side("x", "y"))) == [("a", None), ("b", None)]
    with pytest.raises(MediaError, match="2 pictures.*no name or number in common"):
        list(paired(side("a", "b"), side("x", "y", "w")))


def test_two_pictures_of_one_name_are_refused() -> None:
    with pytest.raises(MediaError, match="two pictures are named 'a'"):
        list(paired(side("a", "a"), side("a", "b")))


@pytest.mark.parametrize("first", [0, 1])
def test_a_video_finds_the_numbered_pictures_of_a_folder_with_a_hole(first: int) -> None:
    video = side("0", "1", "2", "3", named=False)
    folder = side(*(f"{i + first:06d}" for i in (0, 1, 3)))
    wanted = [("0", None), ("1", None), ("2", "missing"), ("3", None)]
    assert keys(paired(video, folder)) == wanted
    turned = [(key, damage and "extra") for key, damage in wanted]
    assert keys(paired(folder, video)) == turned


def test_videos_of_other_lengths_are_counted_to_the_longer_end() -> None:
    made = keys(paired(side("0", "1", "2", named=False), side("0", named=False)))
    assert made == [("0", None), ("1", "missing"), ("2", "missing")]


def test_identical_pictures(tmp_path: Path) -> None:
    lines: list[dict[str, object]] = []
    frames = [Frame(str(i), loads(picture(i)), loads(picture(i))) for i in range(3)]
    summary = run_clips(
        [Clip("a", "a", frames)], Instruments(absent={"nme": "no tracker"}), {}, tell=lines.append
    )
    assert (summary["psnr"], summary["ssim"], summary["l1"]) == (100.0, 1.0, 0.0)
    assert summary["brightness"] == 0 and summary["flicker"] == 0
    assert summary["lpips"] is None and summary["nme"] is None
    assert summary["why_null"]["nme"] == "no tracker"
    assert lines[-1] is summary and len(lines) == 5
    assert {*FRAME_COLUMNS, "no_face", "damage"} <= set(lines[0])
    assert set(COLUMNS) <= set(summary)
    json.dumps(lines, allow_nan=False)  # what JSON has no word for is null


def test_every_damage_is_counted_and_the_rest_is_measured() -> None:
    good = loads(picture(0))
    frames = [
        Frame("0", good, good),
        Frame("1", None, good, unpaired="missing"),
        Frame("2", good, None, unpaired="extra"),
        Frame("3", broken, good),
        Frame("4", good, broken),
        Frame("5", loads(picture(0, 48)), good),
    ]
    summary = run_clips([Clip("a", "a", frames)], Instruments(), {})
    assert summary["frames"] == 6 and summary["compared"] == 2
    for name in ("missing", "extra", "unreadable_result", "unreadable_reference", "resized"):
        assert summary[name] == 1, name
    assert summary["count"]["psnr"] == 2
    assert summary["no_face"] is None and {"csim", "no_face"} <= set(summary["why_null"])


def bright_face(image: Image) -> Reading | None:
    """A face in every picture that is not dark, its place told by one pixel."""
    if image.mean() < 5:
        return None
    points = np.random.default_rng(0).uniform(0, 20, (68, 2)) + float(image[0, 0, 0])
    return Reading(points, points[[36, 45]], np.array([float(image[0, 0, 1]), 0.0, 0.0]))


def with_place(x: int, yaw: int) -> Image:
    image = np.full((16, 16, 3), 90, np.uint8)
    image[0, 0] = (x, yaw, 0)
    return image


def test_faces_that_no_tracker_finds_are_counted_and_pictures_are_still_measured() -> None:
    dark = loads(np.zeros((16, 16, 3), np.uint8))
    frames = [
        Frame("0", dark, loads(with_place(0, 0))),
        Frame("1", loads(with_place(3, 6)), loads(with_place(0, 0))),
        Frame("2", loads(with_place(0, 0)), dark),
    ]
    lines: list[dict[str, object]] = []
    summary = run_clips(
        [Clip("a", "a", frames)], Instruments(read=bright_face), {}, tell=lines.append
    )
    assert (summary["no_face"], summary["no_face_reference"]) == (1, 1)
    assert summary["count"]["psnr"] == 3 and summary["count"]["apd"] == 1
    assert summary["apd"] == pytest.approx(2.0)
    face = bright_face(with_place(0, 0))
    assert face is not None
    eyes = np.linalg.norm(face.points[45] - face.points[36])
    assert summary["nme"] == pytest.approx(math.hypot(3, 3) / eyes)
    assert lines[0]["nme"] is None and lines[0]["psnr"] is not None


def test_identity_is_measured_against_the_source_and_a_swap_shows() -> None:
    """Embeddings by rule: the colour of the middle of the picture."""

    def embed(image: Image, face: Reading) -> np.ndarray:
        return image[8, 8].astype(float)

    def person(blue: int, green: int) -> Callable[[], Image]:
        image = with_place(0, 0)
        image[8, 8] = (blue, green, 0)
        return loads(image)

    anna, berta = person(200, 0), person(0, 200)
    who = Instruments(read=bright_face, embed=embed)
    kept = [Frame(str(i), anna, anna) for i in range(4)]
    swapped = [*kept[:2], *(Frame(str(i), berta, anna) for i in (2, 3))]
    same = run_clips([Clip("a", "a", kept, source=anna)], who, {})
    other = run_clips([Clip("a", "a", swapped, source=anna)], who, {})
    assert (same["csim"], same["tl_id"], same["tg_id"]) == (1, 1, 1)
    assert other["csim"] == pytest.approx(0.5)
    assert other["tl_id"] == pytest.approx(2 / 3) and other["tg_id"] == pytest.approx(1 / 3)
    assert other["tl_id_ratio"] == pytest.approx(2 / 3)
    unknown = run_clips([Clip("a", "a", swapped)], who, {})
    assert unknown["csim"] == pytest.approx(0.5)  # with the frame it should be


class Stop(Exception):
    pass


def moving(frames: int, stop_at: int | None = None) -> Clip:
    def made() -> Iterator[Frame]:
        for i in range(frames):
            if i == stop_at:
                raise Stop
            yield Frame(str(i), loads(with_place(i * i % 50, i)), loads(with_place(i, 2)))

    return Clip("long", "long", made())


def test_an_interrupted_run_goes_on_where_it_was(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusionact.evaluation.runfile.KEEP_SECONDS", 0.0)
    read: list[int] = []

    def counted(image: Image) -> Reading | None:
        read.append(int(image[0, 0, 0]))
        return bright_face(image)

    who = Instruments(read=counted, embed=lambda image, face: image[0, :4].ravel().astype(float))
    whole = run_clips([moving(30)], who, {"name": "x"}, folder=tmp_path / "whole")
    reads = len(read)
    with pytest.raises(Stop):
        run_clips([moving(30, stop_at=20)], who, {"name": "x"}, folder=tmp_path / "cut")
    with (tmp_path / "cut" / LINES).open("ab") as file:
        file.write(b'{"clip":"long","frame":"20","psn')  # cut in the middle of a line
    del read[:]
    lines: list[dict[str, object]] = []
    again = run_clips([moving(30)], who, {"name": "x"}, folder=tmp_path / "cut", tell=lines.append)
    assert len(read) == reads // 3  # the last ten of thirty, and no other
    assert again == whole
    assert len(lines) == 32 and lines[-1] == whole
    assert list(read_rows(tmp_path / "cut")) == list(read_rows(tmp_path / "whole"))
    assert read_run(tmp_path / "cut")[1] == whole
    assert not (tmp_path / "cut" / STATE).exists()


def test_a_finished_run_is_not_made_again(tmp_path: Path) -> None:
    first = run_clips([moving(5)], Instruments(), {"name": "x"}, folder=tmp_path)
    never = Clip("long", "long", iter(lambda: pytest.fail("measured again"), None))
    assert run_clips([never], Instruments(), {"name": "x"}, folder=tmp_path) == first


def test_a_run_of_other_settings_is_refused(tmp_path: Path) -> None:
    run_clips([moving(2)], Instruments(), {"name": "x", "steps": 4}, folder=tmp_path)
    with pytest.raises(SettingsError, match="other settings \\(steps\\)"):
        run_clips([moving(2)], Instruments(), {"name": "x", "steps": 8}, folder=tmp_path)
    with RunFile(tmp_path / "open", {}), pytest.raises(MediaError, match="interrupted"):
        read_run(tmp_path / "open")
    with pytest.raises(MediaError, match="no run"):
        read_run(tmp_path / "nothing")


def test_the_worst_frames_are_kept_as_pictures(tmp_path: Path) -> None:
    def clip(name: str, error: int) -> Clip:
        frames = [
            Frame(str(i), loads(np.full((16, 16, 3), error * i, np.uint8)), loads(picture(0, 16)))
            for i in range(4)
        ]
        return Clip(name, name, frames)

    clips = [clip(f"c{i}", i) for i in range(9)]
    run_clips(clips, Instruments(), {}, folder=tmp_path)
    cases = read_worst(tmp_path / "worst")
    assert len(cases) == 12 and max(sum(c.clip == d.clip for d in cases) for c in cases) == 2
    assert [c.value for c in cases] == sorted((c.value for c in cases), reverse=True)
    files = {path.name for path in (tmp_path / "worst").glob("*.jpg")}
    assert files == {case.file for case in cases}
    rows = [row["l1"] for row in read_rows(tmp_path) if row.get("l1") is not None]
    assert cases[0].value == max(rows)


def test_the_interval_is_over_identities_not_frames() -> None:
    """Copies of a frame narrow nothing; a wider spread of people widens."""
    people = np.array([1.0, 2, 3, 4])
    narrow = bootstrap(people, np.ones(4))
    assert narrow == bootstrap(people * 100, np.full(4, 100.0))
    wide = bootstrap(np.array([-3.0, 0, 5, 8]), np.ones(4))
    assert narrow and wide and wide[1] - wide[0] > 2 * (narrow[1] - narrow[0])
    assert bootstrap(people[:1], np.ones(1)) is None


def test_the_interval_covers_the_truth_as_often_as_it_says() -> None:
    rng = np.random.default_rng(11)
    hits = 0
    for _ in range(200):
        ends = bootstrap(rng.normal(3, 1, 30), np.ones(30))
        assert ends is not None
        hits += ends[0] <= 3 <= ends[1]
    # 95 % nominal; the percentile interval of 30 is a little short; 200 draws have 1.7 % of error
    assert 0.88 <= hits / 200 <= 0.99


def rows(psnr: np.ndarray, brightness: float = 0.0) -> list[dict[str, object]]:
    return [
        {"clip": str(i), "identity": str(i), "frame": "0", "psnr": value, "brightness": brightness}
        for i, value in enumerate(psnr)
    ]


def test_a_change_is_told_from_noise() -> None:
    rng = np.random.default_rng(4)
    first = rng.normal(20, 3, 40)
    better, counts = changes(rows(first), rows(first + rng.normal(0.5, 0.4, 40)))
    assert better["psnr"].verdict == "better" and counts == {"both": 40, "only_a": 0, "only_b": 0}
    worse, _ = changes(rows(first), rows(first - rng.normal(0.5, 0.4, 40), 0.1))
    assert worse["psnr"].verdict == "worse" and worse["brightness"].verdict == "worse"
    noise, _ = changes(rows(first), rows(first + rng.normal(0, 0.4, 40)))
    assert noise["psnr"].verdict == "noise"
    equal, _ = changes(rows(first), rows(first))
    assert equal["psnr"].verdict == "equal"
    one, counts = changes(rows(first[:1]), rows(first[:2] + 1))
    assert one["psnr"].verdict == "unknown" and counts["only_b"] == 1


def test_brightness_of_either_sign_is_a_distance() -> None:
    first = np.full(10, 20.0)
    made, _ = changes(rows(first, -0.2), rows(first, 0.1))
    assert made["brightness"].verdict == "better"
    assert (made["brightness"].a, made["brightness"].b) == (pytest.approx(0.2), pytest.approx(0.1))


def test_lines_that_are_no_run_are_refused(tmp_path: Path) -> None:
    (tmp_path / "x.jsonl").write_text('{"other": 1}\n')
    with pytest.raises(MediaError, match="not the lines of a run"):
        list(read_rows(tmp_path / "x.jsonl"))


def test_psnr_of_known_noise_through_a_run() -> None:
    """The closed form through every layer: uniform error of +-10 grey levels on half the pixels."""
    reference = np.full((200, 200, 3), 128, np.uint8)
    noisy = reference.copy()
    noisy[::2] += 10
    summary = run_clips(
        [Clip("a", "a", [Frame("0", loads(noisy), loads(reference))])], Instruments(), {}
    )
    assert summary["psnr"] == pytest.approx(20 * math.log10(255 / math.sqrt(50)), abs=1e-9)
    assert summary["l1"] == pytest.approx(5 / 255)
    assert summary["brightness"] == pytest.approx(5 / 255)
    assert summary["psnr"] == metrics.psnr(reference, noisy)
