"""`diffusionact bench`: its figures agree with a stopwatch, its files and its page hold together."""

from __future__ import annotations

import json
import re
import time
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from diffusionact import bundle_path, cli, machine
from diffusionact.bench import page, plots, records
from diffusionact.errors import DeviceError, MediaError, SettingsError
from diffusionact.landmarks import Landmarks, sidecar_path
from diffusionact.runtime import bench, rig
from diffusionact.runtime.contest import Contestant, contest, peak_memory_mib
from diffusionact.runtime.writer import make_track
from tests.counter import Counter

UInt8Array = npt.NDArray[np.uint8]
# What the loop around the frames may take beside their stages: of the whole, and at least, ms a
# frame; a toy frame takes half a millisecond.
OUTSIDE_SHARE, OUTSIDE_MS = 0.05, 0.3
STAGES = ["retarget", "condition", "encode", "render", "paste"]


@pytest.fixture(scope="module")
def media(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A portrait, and a driver that is a landmark track."""
    from tests.conftest import _frontal_portrait

    folder = tmp_path_factory.mktemp("media")
    image, face = _frontal_portrait()
    portrait, driver = folder / "face.png", folder / "driver.npz"
    cv2.imwrite(str(portrait), image)
    make_track([face], [0], (80, 90)).save(sidecar_path(portrait))
    moved = [face.transformed(np.array([[1.0, 0.0, i / 4], [0.0, 1.0, 0.0]])) for i in range(12)]
    make_track(moved, [i * 40_000_000 for i in range(12)], (80, 90)).save(driver)
    return portrait, driver


@pytest.fixture(scope="module")
def task(toy_bundle: Path, media: tuple[Path, Path]) -> rig.Task:
    return rig.Task(toy_bundle, *media, device="cpu")


@pytest.fixture(scope="module")
def made(task: rig.Task) -> list[rig.Record]:
    """Two variants, eleven frames each in four rounds."""
    variants = [rig.Variant("ort", "fp32", steps, 1) for steps in (2, 5)]
    return bench.measure(task, variants, frames=11, rounds=4)


def test_a_record_says_all_that_a_reader_needs(made: list[rig.Record], toy_bundle: Path) -> None:
    first = json.loads(json.dumps(made[0]))  # all of it is JSON
    assert first["bundle"]["name"] == "toy" and first["bundle"]["image_size"] == 32
    asked = {
        "backend": "ort",
        "precision": "fp32",
        "steps": 2,
        "threads": 1,
        "approximate": None,
        "batch": 1,
        "device": "cpu",
    }
    assert first["variant"] == asked
    assert first["ran"]["steps"] == 2 and first["ran"]["device"] == "cpu"
    assert list(first["stages"]) == [*STAGES, "total"]
    assert [len(one) for one in first["samples_ms"]["total"]] == [3, 3, 3, 2]
    assert first["stages"]["total"]["count"] == 11
    assert first["versions"]["onnxruntime"] and first["machine"]["cores"] == machine.cores()
    assert first["start"]["load_ms"] > 0 and first["start"]["first_frame_ms"] > 0
    assert first["start"]["prepare_measured"] and first["start"]["prepare_ms"] > 0
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ", first["date"])


def test_stages_add_up_to_frames_and_frames_to_the_stopwatch(made: list[rig.Record]) -> None:
    for record in made:
        rounds = record["samples_ms"]
        for turn, totals in enumerate(rounds["total"]):
            parts = np.sum([rounds[stage][turn] for stage in STAGES], axis=0)
            np.testing.assert_allclose(parts, totals, atol=1e-3)
        # The middle round, for the machine may have stopped one of them between two stages.
        outside_ms = [
            (wall_ms - sum(totals)) / len(totals)
            for wall_ms, totals in zip(record["rounds_ms"], rounds["total"], strict=True)
        ]
        allowed_ms = OUTSIDE_SHARE * record["stages"]["total"]["p50_ms"] + OUTSIDE_MS
        assert 0 <= min(outside_ms) and np.median(outside_ms) <= allowed_ms
        assert sum(record["rounds_ms"]) == pytest.approx(record["stopwatch_ms"], abs=0.01)
        count = record["stages"]["total"]["count"]
        assert record["fps"] == pytest.approx(1e3 * count / record["stopwatch_ms"])


def test_the_figures_are_those_of_a_stopwatch_around_the_work(task: rig.Task) -> None:
    """Time spent in a stage on purpose is found there, and in nothing else."""
    mine = rig.Rig(task, rig.Variant("ort", "fp32", 2, 1))
    mine.start(mine.look())
    plain, session = mine.round(5), mine._act._session
    assert session is not None
    target = session.target

    def slow(*arguments: Any) -> Any:
        time.sleep(0.02)
        return target(*arguments)

    session.target = slow  # type: ignore[method-assign]
    begun_s = time.perf_counter()
    slowed = mine.round(5)
    wall_s = time.perf_counter() - begun_s
    assert slowed.wall_s == pytest.approx(wall_s, rel=0.2)
    more_ms = np.median(slowed.times["retarget"]) - np.median(plain.times["retarget"])
    assert 19 <= more_ms < 60  # a busy machine sleeps longer
    assert np.median(slowed.times["render"]) < 19


def test_frames_at_once_are_frames_of_reenactors_at_work_together(task: rig.Task) -> None:
    mine = rig.Rig(task, rig.Variant("ort", "fp32", 2, 1, batch=2))
    assert mine.start(mine.look())["ran"]["batch"] == 2
    for act in mine._acts:
        session = act._session
        assert session is not None
        target = session.target

        def slow(*arguments: Any, target: Any = target) -> Any:
            time.sleep(0.05)
            return target(*arguments)

        session.target = slow  # type: ignore[method-assign]
    done = mine.round(5)
    frames = [sum(parts) for parts in zip(*done.times.values(), strict=True)]
    assert len(frames) == 6, "whole turns of two"
    assert min(frames) >= 50 and done.wall_s * 1e3 < 0.8 * sum(frames), "they sleep together"
    with pytest.raises(SettingsError, match="batch=0"):
        rig.Rig(task, rig.Variant(batch=0))


def test_each_variant_has_the_memory_of_a_process_of_its_own(made: list[rig.Record]) -> None:
    mine = peak_memory_mib()
    for record in made:
        memory = record["memory"]
        assert 20 < memory["loaded_mib"] <= memory["peak_mib"]
        assert mine is None or memory["peak_mib"] < mine + 200


@pytest.mark.parametrize(
    "backends, precisions, wanted",
    [(("ort",), ("fp32", "int8"), 1), (("auto",), ("int8",), 1), (("ort", "auto"), ("auto",), 2)],
)
def test_combinations_that_a_backend_lacks_are_left_out(
    backends: tuple[str, ...], precisions: tuple[str, ...], wanted: int
) -> None:
    assert len(bench.variants_of(backends, precisions, (None,), (0,), device="cpu")) == wanted


def test_what_cannot_be_measured_is_refused(task: rig.Task) -> None:
    with pytest.raises(SettingsError, match="ort: fp32"):
        bench.variants_of(("ort",), ("int8",), (None,), (0,), device="cpu")
    with pytest.raises(SettingsError, match="'abacus' is not known; choose from: auto, ort"):
        bench.variants_of(("abacus",), ("fp32",), (None,), (0,))
    with pytest.raises(DeviceError, match="'abacus'"):
        bench.variants_of(("ort",), ("fp32",), (None,), (0,), device="abacus")
    with pytest.raises(SettingsError, match="frames=0"):
        bench.measure(task, [rig.Variant()], frames=0)


def test_frames_are_shared_out_evenly_and_no_round_is_empty() -> None:
    assert bench._shares(11, 4) == [3, 3, 3, 2]
    assert bench._shares(2, 8) == [1, 1]


def test_contestants_keep_what_is_theirs() -> None:
    with contest(Counter, [(1,), (10,)]) as rivals:
        assert [rival.ask("add", 1) for rival in rivals * 2] == [2, 11, 3, 12]
        processes = [rival._process for rival in rivals]
    assert not any(process.is_alive() for process in processes)


def test_what_fails_in_a_contestant_is_told_where_it_was_asked() -> None:
    with pytest.raises(SettingsError, match="below nothing"):
        Contestant(Counter, -1)
    with Contestant(Counter, 1) as rival:
        with pytest.raises(MediaError, match="for people"):
            rival.ask("fail", "ours")
        with pytest.raises(RuntimeError, match="ZeroDivisionError"):
            rival.ask("fail", "bug")
        assert rival.ask("add", 1) == 2
        with pytest.raises(DeviceError, match="exit status 7"):
            rival.ask("fail", "exit")


def test_percentiles_are_those_of_all_rounds() -> None:
    told = records.spread([[1.0, 2.0], [3.0, 4.0], [100.0]])
    assert told["count"] == 5 and told["p50_ms"] == 3.0 and told["min_ms"] == 1.0
    assert (told["q25_ms"], told["q75_ms"], told["mad_ms"]) == (2.0, 4.0, 1.0)


def test_a_busy_machine_and_restless_frames_are_warned_of() -> None:
    calm, restless = records.spread([[10.0] * 9]), records.spread([[10.0, 20.0, 30.0, 40.0]])
    assert records.noise_warnings(calm, 0.2, 2) == []
    assert records.noise_warnings(calm, None, 2) == []
    (busy,) = records.noise_warnings(calm, 1.5, 2)
    assert "load average 1.5 on 2 cores" in busy
    (spread,) = records.noise_warnings(restless, 0.0, 2)
    assert "differ much" in spread


def test_warnings_name_the_variants_that_not_all_share(made: list[rig.Record]) -> None:
    first, second = (
        {**made[i], "warnings": ["busy", *more]} for i, more in ((0, ["odd"]), (1, []))
    )
    assert records.warnings_of([first, second]) == ["busy", "ort, fp32, 2 steps: odd"]


def test_records_are_appended_whole_and_read_again(made: list[rig.Record], tmp_path: Path) -> None:
    file = tmp_path / "deep" / "bench.json"
    records.append(file, made[:1])
    file.write_text(file.read_text().rstrip("\n"))  # as an editor may leave it
    records.append(file, made[1:])
    assert records.read(file) == [json.loads(json.dumps(record)) for record in made]


@pytest.mark.parametrize("text", ["", "{}", "[1]", '{"kind": "diffusionact bench", "format": 99}'])
def test_what_is_no_record_is_refused_by_its_line(text: str, tmp_path: Path) -> None:
    file = tmp_path / "bench.json"
    file.write_text(text)
    with pytest.raises(MediaError, match="bench.json"):
        records.read(file)


def test_names_of_variants_tell_them_apart(made: list[rig.Record]) -> None:
    names = [records.label(record, made) for record in made]
    assert names == ["ort, fp32, 2 steps", "ort, fp32, 5 steps"]
    other = {**made[0], "ran": {**made[0]["ran"], "threads": 4}}
    assert records.label(other, [made[0], other]) == "ort, fp32, 2 steps, 4 threads"
    asked = {**made[0], "variant": {**made[0]["variant"], "backend": "auto"}}
    assert records.label(asked) == "ort, fp32, 2 steps, default"
    rough = {**made[0], "ran": {**made[0]["ran"], "approximate": "reuse"}}
    assert records.label(rough) == "ort, fp32, 2 steps, approximate: reuse"


class Page(HTMLParser):
    """Tags that are open, texts, and what is loaded from elsewhere."""

    VOID = ("meta", "line", "rect", "circle", "polyline")

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.texts: list[str] = []
        self.sources: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.sources += [value or "" for name, value in attrs if name in ("src", "href")]
        if tag != "meta":
            self.open.append(tag)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        pass

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.texts.append(data)


def test_the_page_holds_the_figures_and_loads_nothing(
    made: list[rig.Record], tmp_path: Path
) -> None:
    warned = [{**made[0], "warnings": ["it <was> busy"]}, made[1]]
    page.write(tmp_path / "deep" / "page.html", warned)
    text = (tmp_path / "deep" / "page.html").read_text()
    parser = Page()
    parser.feed(text)
    assert (
        parser.open == []
        and parser.sources == []
        and "://" not in text.replace("http://www.w3.org/2000/svg", "")
    )
    told = " ".join(parser.texts)
    for record in made:
        total = record["stages"]["total"]
        assert f"{total['p50_ms']:.2f}" in told and f"{record['fps']:.2f}" in told
        assert f"{record['stages']['render']['p99_ms']:.3f}" in told
    assert "it <was> busy" in told and "prefers-color-scheme:dark" in text
    assert machine.describe_briefly(made[0]["machine"]) in told


def test_plots_are_in_the_figures_proportion() -> None:
    drawn = plots.stacks(["a", "b"], [{"x": 10.0, "y": 5.0}, {"x": 20.0, "y": 5.0}])
    widths = [float(w) for w in re.findall(r'width="([\d.]+)" height="24"', drawn)]
    assert np.array(widths) / widths[1] == pytest.approx([2.0, 1.0, 4.0, 1.0], abs=0.01)
    drawn = plots.boxes(["a"], [[[1.0, 2.0, 3.0], [4.0, 5.0]]])
    assert drawn.count("<circle") == 2 and "median 3.00 ms" in drawn


@pytest.mark.parametrize("value, wanted", [(0.93, 1.0), (1.0, 1.0), (1.01, 1.2), (350.0, 400.0)])
def test_axes_end_at_round_numbers(value: float, wanted: float) -> None:
    assert plots._ceiling(value) == wanted


def test_the_command_writes_what_it_is_asked_for(
    toy_bundle: Path,
    media: tuple[Path, Path],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(cli, "_start_log", lambda arguments: None)
    out, html = tmp_path / "a.json", tmp_path / "a.html"
    words = ["bench", str(toy_bundle), "-s", str(media[0]), "-d", str(media[1]), "--backend", "ort"]
    words += ["--steps", "2,4", "--threads", "1", "--frames", "4", "--rounds", "2", "--json"]
    assert cli.main([*words, "--out", str(out), "--html", str(html)]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert lines == records.read(out) and [line["ran"]["steps"] for line in lines] == [2, 4]
    assert html.stat().st_size > 5000
    assert cli.main(["bench-compare", str(out), str(out), "--fail-above", "0", "--json"]) == 0


@pytest.mark.parametrize("option", ["--out", "--html", "--trace"])
def test_a_file_that_cannot_be_written_is_told_before_the_work(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(bench, "measure", None)
    (tmp_path / "file").touch()
    assert cli.main(["bench", option, str(tmp_path / "file" / "x.json")]) == 2
    assert cli.main(["bench", option, str(tmp_path)]) == 2
    assert capsys.readouterr().err.count("cannot be written") == 2
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_an_empty_list_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        cli.main(["bench", "--backend", ","])
    assert "wanted a name" in capsys.readouterr().err


def test_the_shipped_bundle_needs_no_option(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    if not bundle_path().is_dir():
        pytest.skip("the shipped model is not in this checkout")
    monkeypatch.setattr(cli, "_start_log", lambda arguments: None)
    assert cli.main(["bench", "--frames", "2", "--rounds", "1", "--backend", "ort"]) == 0
    shown = capsys.readouterr().out
    assert all(re.search(rf"^  {stage} ", shown, re.MULTILINE) for stage in [*STAGES, "total"])


def test_whole_frames_read_pictures(toy_bundle: Path, tmp_path: Path, portrait: Any) -> None:
    image: UInt8Array
    face: Landmarks
    image, face = portrait
    still, driver = tmp_path / "face.png", tmp_path / "driver.png"
    for path in (still, driver):
        cv2.imwrite(str(path), image)
        make_track([face], [0], (80, 90)).save(sidecar_path(path))
    task = rig.Task(toy_bundle, still, driver, device="cpu", frame="whole")
    (record,) = bench.measure(task, [rig.Variant("ort", "fp32", 2, 1)], frames=3, rounds=1)
    assert list(record["stages"]) == ["read", *STAGES, "total"]
    assert record["stages"]["read"]["p50_ms"] > 0 and record["frame"] == "whole"
