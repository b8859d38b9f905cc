"""Data sets by name, pairs of people, published rows, pages and studies."""

from __future__ import annotations

import base64
import json
from collections import Counter
from pathlib import Path

import cv2
import numpy as np
import pytest

from diffusionact.errors import MediaError, SettingsError
from diffusionact.evaluation import study
from diffusionact.evaluation.compared import Clip, Frame
from diffusionact.evaluation.layouts import footage
from diffusionact.evaluation.measure import Instruments
from diffusionact.evaluation.page import page, plot
from diffusionact.evaluation.protocols import far_apart, random_pairs
from diffusionact.evaluation.published import published
from diffusionact.evaluation.report import write_report
from diffusionact.evaluation.run import run_clips


def tree(root: Path, *names: str) -> Path:
    """Files of these names, empty: layouts are read by name only."""
    for name in names:
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.touch()
    return root


LAYOUTS = {
    "voxceleb": (
        ("test/id10280/Ab-1/00001.mp4", "test/id10280/Ab-1/00002.mp4", "test/id10281/x/00001.mp4"),
        [
            ("id10280/Ab-1/00001", "id10280"),
            ("id10280/Ab-1/00002", "id10280"),
            ("id10281/x/00001", "id10281"),
        ],
    ),
    "voxceleb (HyperReenact)": (
        ("id10280/Ab-1/frames_cropped/00_000025.png", "id10280/Ab-1/frames/00_000025.png",
         "id10280/Ab-1/chunk_videos/Ab-1#00001#257-396.mp4",
         "id10283/Cd/chunk_videos/Cd#00001#1-9.mp4", "id10283/Cd/chunk_videos/Cd#00002#10-19.mp4"),
        [("id10280/Ab-1", "id10280"), ("id10283/Cd/Cd#00001#1-9", "id10283"),
         ("id10283/Cd/Cd#00002#10-19", "id10283")],
    ),
    "voxceleb-flat": (
        ("id10280#NX#001093#001192.mp4", "test/id10281#Q#1#2/0.png"),
        [("id10280#NX#001093#001192", "id10280"), ("id10281#Q#1#2", "id10281")],
    ),
    "hdtf": (
        ("WDA_JohnDoe_000.mp4", "WDA_JohnDoe_001.mp4", "RD_Radio1_000.mp4"),
        [("RD_Radio1_000", "Radio1"), ("WDA_JohnDoe_000", "JohnDoe"),
         ("WDA_JohnDoe_001", "JohnDoe")],
    ),
    "vfhq": (
        ("Clip+abc+P0+C0+F1-99/00000.png", "Clip+abc+P0+C1+F1-99/00000.png",
         "Clip+abc+P1+C0+F1-99/00000.png"),
        [("Clip+abc+P0+C0+F1-99", "abc+P0"), ("Clip+abc+P0+C1+F1-99", "abc+P0"),
         ("Clip+abc+P1+C0+F1-99", "abc+P1")],
    ),
    "folder": (
        ("anna/walk.mp4", "anna/talk.mp4", "berta.mov"),
        [("anna/talk", "anna"), ("anna/walk", "anna"), ("berta", "berta")],
    ),
}  # fmt: skip


def test_each_picture_is_a_person_where_one_says_so(tmp_path: Path) -> None:
    root = tree(tmp_path, "00000/00001.png", "00000/00000.png", "01000/01000.JPG", "LICENSE.txt")
    found = footage(root, "pictures")
    assert [each.name for each in found] == ["00000/00000", "00000/00001", "01000/01000"]
    assert [each.identity for each in found] == [each.name for each in found]
    assert all(each.path.is_file() for each in found)
    assert {each.identity for each in footage(root)} == {"00000", "01000"}  # guessed: two clips


@pytest.mark.parametrize("name", LAYOUTS)
@pytest.mark.parametrize("automatic", [True, False])
def test_layouts(name: str, automatic: bool, tmp_path: Path) -> None:
    files, wanted = LAYOUTS[name]
    root = tree(tmp_path, *files)
    found = footage(root, "auto" if automatic else name.split(" ")[0])
    assert [(each.name, each.identity) for each in found] == wanted
    assert all(each.path.exists() for each in found)


def test_a_split_takes_names_in_its_own_order(tmp_path: Path) -> None:
    root = tree(tmp_path / "d", *LAYOUTS["hdtf"][0])
    split = tmp_path / "split.txt"
    split.write_text("# test\nWDA_JohnDoe_001.mp4 25fps\n\nRD_Radio1_000\nRD_Radio1_000\n")
    assert [each.name for each in footage(root, split=split)] == [
        "WDA_JohnDoe_001", "RD_Radio1_000",
    ]  # fmt: skip
    split.write_text("WDA_Nobody_000\n")
    with pytest.raises(MediaError, match="1 of its 1 clips are not there, 'WDA_Nobody_000'"):
        footage(root, split=split)


def test_what_is_no_data_set_is_named(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="no clip of the layout hdtf"):
        footage(tree(tmp_path, "x.mp4"), "hdtf")
    with pytest.raises(SettingsError, match="choose from: auto, voxceleb-flat"):
        footage(tmp_path, "imagenet")


def test_pairs_are_fixed_different_and_of_different_people() -> None:
    people = [f"p{i // 2}" for i in range(12)]  # two clips each
    pairs = random_pairs(people)
    assert pairs == random_pairs(people) and pairs != random_pairs(people, seed=1)
    assert len(pairs) == len(set(pairs)) == 35
    assert all(people[p.source] != people[p.driver] for p in pairs)
    assert len(random_pairs(["a", "b"])) == 2
    with pytest.raises(SettingsError, match="1 person"):
        random_pairs(["a", "a"])


def test_large_pose_is_the_shorter_way_round() -> None:
    assert far_apart([0, 0, 0], [0, 16, 0]) and not far_apart([0, 0, 0], [14, 15, 0])
    assert not far_apart([179, 0, 0], [-179, 0, 0])
    assert far_apart([0, 0, 0], [0, 0, 0], 0)


def test_published_rows_are_checked(tmp_path: Path) -> None:
    assert all(row.read_in for row in published().rows) and published().note
    row = {"table": "Table 2", "method": "M", "protocol": "self", "data": "D", "read_in": "p. 6"}
    path = tmp_path / "rows.json"
    path.write_text(json.dumps({"paper": "P", "rows": [{**row, "values": {"csim": 0.5}}]}))
    assert published(path).rows[0].values == {"csim": 0.5}
    for broken in ({"values": {"fame": 1.0}}, {"values": {}, "read_in": ""}, {}):
        path.write_text(json.dumps({"paper": "P", "rows": [{**row, **broken}]}))
        with pytest.raises(MediaError, match="not rows of published tables"):
            published(path)


def test_pages_need_nothing_else_and_escape_names() -> None:
    made = page("a<b", plot({"x<y & a very long name of a run": np.array([1.0, 2, 3])}))
    assert "a&lt;b" in made and "x&lt;y &amp;" in made and "prefers-color-scheme: dark" in made
    assert "http" not in made
    assert plot({"flat": np.array([2.0, 2.0])}).count("NaN") == 0


def test_a_report_shows_damage_absence_and_published_rows(tmp_path: Path) -> None:
    good = np.full((16, 16, 3), 90, np.uint8)
    frames = [
        Frame("0", lambda: good, lambda: good + 9),
        Frame("1", None, lambda: good, unpaired="missing"),
    ]
    head = {"protocol": "self", "data": "mine"}
    for name in ("one", "two"):
        run_clips([Clip("c", "c", frames)], Instruments(absent={"nme": "no <tracker>"}), head,
                  folder=tmp_path / "runs" / name)  # fmt: skip
    row = {"table": "Table 2", "method": "Theirs", "protocol": "self", "read_in": "page 6"}
    rows = [
        {**row, "data": "VoxCeleb1", "values": {"psnr": 12.5}},
        {**row, "protocol": "cross", "data": "mine", "method": "Hidden", "values": {"psnr": 1.0}},
    ]
    (tmp_path / "rows.json").write_text(json.dumps({"paper": "P", "rows": rows}))
    out = tmp_path / "report.html"
    shown = write_report(out, [tmp_path / "runs"], tmp_path / "rows.json")
    assert list(shown) == ["one", "two"] and shown["one"]["frames"] == 2
    assert shown["one"]["l1"] == [pytest.approx(9 / 255, rel=1e-5), None, None]
    text = out.read_text()
    assert "the reference has this frame, the result does not" in text
    assert "no &lt;tracker&gt;" in text and "<tracker>" not in text
    assert "Theirs, Table 2" in text and "12.50" in text and "other data: VoxCeleb1" in text
    assert "Hidden" not in text and "page 6" in text
    assert "data:image/jpeg" in text


def pictures(folder: Path, *names: str) -> Path:
    folder.mkdir()
    for i, name in enumerate(names):
        cv2.imwrite(str(folder / f"{name}.png"), np.full((8, 8, 3), 20 * i, np.uint8))
    return folder


def test_questions_are_blind_and_balanced() -> None:
    asked = study.questions([str(i) for i in range(40)], ["ours", "a", "b"], 40, seed=1)
    assert asked == study.questions([str(i) for i in range(40)], ["ours", "a", "b"], 40, seed=1)
    assert len({q.name for q in asked}) == 40
    assert all("ours" in (q.left, q.right) for q in asked)
    others = Counter(q.right if q.left == "ours" else q.left for q in asked)
    assert others == {"a": 20, "b": 20}
    assert 10 < sum(q.left == "ours" for q in asked) < 30
    with pytest.raises(SettingsError, match="1 methods"):
        study.questions(["x"], ["ours"], 20, 0)


def test_a_study_is_one_page_and_its_choices_are_counted(tmp_path: Path) -> None:
    a, b = pictures(tmp_path / "a", "x", "y", "z"), pictures(tmp_path / "b", "x", "y")
    names = study.common_names([a, b])
    assert names == ["x", "y"]
    asked = study.questions(names, ["ours", "theirs"], 20, 0)
    assert len(asked) == 2  # none is asked twice
    out = tmp_path / "study.html"
    study.write_study(out, {"ours": a, "theirs": b}, asked, [a, None])
    text = out.read_text()
    assert "ours" not in text and "theirs" not in text
    (line,) = (line for line in text.splitlines() if "const items = " in line)
    items = json.loads(line.split("const items = ")[1].rstrip(";"))
    shown = [data for item in items for data in (*item["above"], *item["sides"])]
    assert len(shown) == 6
    for data in shown:
        raw = np.frombuffer(
            base64.b64decode(data.removeprefix("data:image/webp;base64,")), np.uint8
        )
        assert cv2.imdecode(raw, cv2.IMREAD_COLOR).shape == (256, 256, 3)
    key = base64.b64encode(json.dumps([vars(q) for q in asked]).encode()).decode()
    assert key in text
    choices = [0 if q.left == "ours" else 1 for q in asked]
    choices[1] = None  # not answered
    saved = tmp_path / "choices.json"
    saved.write_text(json.dumps({"format": study.FORMAT, "key": key, "choices": choices}))
    first, second = study.count([saved, saved])
    assert (first.method, first.chosen, first.shown) == ("ours", 2, 2)
    assert (second.method, second.chosen, second.shown) == ("theirs", 0, 2)
    saved.write_text(json.dumps({"format": study.FORMAT, "key": key, "choices": [0]}))
    with pytest.raises(MediaError, match="1 choices for 2 questions"):
        study.count([saved])


def test_wilsons_interval() -> None:
    """Its ends solve |p - share| = z sqrt(p (1 - p) / n)."""
    for chosen, shown in ((5, 10), (1, 20), (30, 31)):
        for p in study.wilson(chosen, shown):
            spread = study.CONFIDENCE_Z * np.sqrt(p * (1 - p) / shown)
            assert abs(p - chosen / shown) == pytest.approx(spread)
    assert study.wilson(0, 10)[0] == 0 and study.wilson(10, 10)[1] == pytest.approx(1)
