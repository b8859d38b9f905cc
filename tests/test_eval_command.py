"""`diffusionact eval` as it is called: what it prints, keeps, counts and refuses."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from diffusionact import manifest
from diffusionact.assets import benchmark_path, bundle_path, driver_path
from diffusionact.cli import main
from diffusionact.commands.exits import DONE, FAILED, REFUSED
from diffusionact.evaluation.columns import COLUMNS
from diffusionact.evaluation.rendered import Person, load_people
from diffusionact.evaluation.runfile import read_rows, read_run

KEYS = {"psnr", "ssim", "l1", "lpips", "csim", "nme", "apd", "aed", "tl_id", "tg_id", "no_face"}
MODEL = ["--steps", "2", "--backend", "ort", "--threads", "1"]


@pytest.fixture(scope="module")
def crowd() -> list[Person]:
    return load_people(benchmark_path())


def told(capsys: pytest.CaptureFixture[str], *arguments: object) -> list[dict[str, Any]]:
    assert main(["eval", *map(str, arguments), "--json", "-q"]) == DONE
    out = capsys.readouterr().out
    return [json.loads(line, parse_constant=pytest.fail) for line in out.splitlines()]


def write(folder: Path, **pictures: np.ndarray) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for name, picture in pictures.items():
        cv2.imwrite(str(folder / f"{name}.png"), picture)
    return folder


def numbered(crowd: list[Person], count: int = 4) -> dict[str, np.ndarray]:
    return {f"{i:04d}": crowd[i].target.image for i in range(count)}


def test_identical_folders(
    tmp_path: Path, crowd: list[Person], capsys: pytest.CaptureFixture[str]
) -> None:
    a, b = (write(tmp_path / name, **numbered(crowd)) for name in "ab")
    lines = told(capsys, "pairs", a, b, "--reader", "judge")
    summary = lines[-1]
    assert summary["summary"] and [line["frame"] for line in lines[:4]] == sorted(numbered(crowd))
    assert KEYS <= set(summary) and set(COLUMNS) <= set(summary) and KEYS - {
        "tl_id", "tg_id"} <= set(lines[0])  # fmt: skip
    assert (summary["psnr"], summary["ssim"], summary["l1"]) == (100, 1, 0)
    assert (summary["nme"], summary["apd"], summary["aed"], summary["no_face"]) == (0, 0, 0, 0)
    assert summary["perceptual_rendered"] == 0
    for name in ("lpips", "csim", "tl_id", "tg_id"):
        assert summary[name] is None and "--networks" in summary["why_null"][name]


def test_every_damage_of_a_folder_is_counted(
    tmp_path: Path, crowd: list[Person], capsys: pytest.CaptureFixture[str]
) -> None:
    pictures = numbered(crowd, 5)
    a = write(tmp_path / "a", **pictures)
    b = write(tmp_path / "b", **pictures, extra9=pictures["0000"])
    (b / "0001.png").unlink()
    (b / "0002.png").write_bytes((b / "0002.png").read_bytes()[:99])
    cv2.imwrite(str(b / "0003.png"), cv2.resize(pictures["0003"], (200, 160)))
    lines = told(capsys, "pairs", a, b, "--reader", "none")
    damage = {line["frame"]: line["damage"] for line in lines if "frame" in line}
    assert damage == {
        "0000": None, "0001": "missing", "0002": "unreadable_result", "0003": None,
        "0004": None, "extra9": "extra",
    }  # fmt: skip
    summary = lines[-1]
    counted = {name: summary[name] for name in ("missing", "extra", "unreadable_result", "resized")}
    assert counted == dict.fromkeys(counted, 1)
    assert summary["frames"] == 6 and summary["compared"] == 3
    assert main(["eval", "pairs", str(a), str(b), "--reader", "none"]) == DONE
    text = capsys.readouterr()
    assert "missing 1" in text.out and "0002: unreadable_result" in text.err


def test_a_face_that_no_tracker_finds(
    tmp_path: Path, crowd: list[Person], capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("google.protobuf", reason="no face tracker for this platform")
    large = cv2.resize(crowd[0].source.image, (256, 256), interpolation=cv2.INTER_CUBIC)
    noise = np.random.default_rng(0).integers(0, 256, (256, 256, 3)).astype(np.uint8)
    a = write(tmp_path / "a", x=large, y=large)
    b = write(tmp_path / "b", x=large, y=noise)
    summary = told(capsys, "pairs", a, b)[-1]
    assert summary["no_face"] == 1 and summary["no_face_reference"] == 0
    assert summary["count"]["psnr"] == 2 and summary["count"]["nme"] == 1
    assert summary["nme"] == 0


def test_clips_in_folders_are_paired_and_a_missing_one_is_counted(
    tmp_path: Path, crowd: list[Person], capsys: pytest.CaptureFixture[str]
) -> None:
    for name in ("anna", "berta"):
        write(tmp_path / "a" / name, **numbered(crowd, 2))
    write(tmp_path / "b" / "anna", **numbered(crowd, 2))
    write(tmp_path / "b" / "carla", **numbered(crowd, 3))
    summary = told(capsys, "pairs", tmp_path / "a", tmp_path / "b", "--reader", "none")[-1]
    assert (summary["clips"], summary["missing"], summary["extra"]) == (3, 2, 3)
    assert summary["compared"] == 2


def test_a_video_against_the_pictures_of_it(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    from diffusionact.runtime.media import open_reader

    frames = [frame.image_bgr for frame in open_reader(driver_path())][:5]
    folder = write(tmp_path / "b", **{f"{i + 1:06d}": f for i, f in enumerate(frames) if i != 2})
    summary = told(capsys, "pairs", driver_path(), folder, "--reader", "none")[-1]
    assert (summary["psnr"], summary["compared"]) == (100, 4)
    assert summary["missing"] == 96 and summary["frames"] == 100


def test_self_on_rendered_people_is_kept_resumed_and_compared(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = ["self", "--identities", "2", "--methods", "ours,true,copy,mean,oracle", *MODEL]
    lines = told(capsys, *run, "-o", tmp_path)
    last = lines[-1]
    assert last["summary"] and set(last["runs"]) == {
        "ours-T2-ort", "oracle-T2-ort", "true", "copy", "mean"
    }  # fmt: skip
    runs = last["runs"]
    assert runs["true"]["psnr"] == 100 and runs["true"]["apd"] < runs["copy"]["apd"]
    assert runs["copy"]["nme"] > 3 * runs["ours-T2-ort"]["nme"]
    assert runs["ours-T2-ort"]["psnr"] > runs["copy"]["psnr"] > runs["mean"]["psnr"]
    head, summary = read_run(tmp_path / "ours-T2-ort")
    assert head["steps"] == 2 and head["backend"] == "ort" and summary["frames"] == 2
    assert "judge" in head["instruments"]["reader"]
    before = (tmp_path / "ours-T2-ort" / "frames.jsonl").read_bytes()
    assert told(capsys, *run, "-o", tmp_path)[-1]["runs"] == runs  # nothing is rendered again
    assert (tmp_path / "ours-T2-ort" / "frames.jsonl").read_bytes() == before
    page = (tmp_path / "report.html").read_text()
    assert page.count("<tr>") >= 6 and "data:image/jpeg" in page
    assert not re.search(r"(src|href)=['\"]?(https?:)?//", page)

    ours, copy = (str(tmp_path / name) for name in ("ours-T2-ort", "copy"))
    found = told(capsys, "compare", copy, ours)
    by_name = {line["measure"]: line["verdict"] for line in found[:-1]}
    assert by_name["psnr"] == "better" and by_name["apd"] == "better"
    assert main(["eval", "compare", ours, copy, "--fail"]) == FAILED
    assert main(["eval", "compare", ours, ours, "--fail"]) == DONE
    assert "equal" in capsys.readouterr().out
    assert main(["eval", "compare", ours, str(tmp_path / "nothing")]) == REFUSED

    again = tmp_path / "again.html"
    assert next(iter(told(capsys, "report", tmp_path, "-o", again)[0]["runs"])) == "ours-T2-ort"
    assert main(["eval", *run[:2], "3", *run[3:], "-o", str(tmp_path), "-q"]) == REFUSED
    assert "other settings (identities)" in capsys.readouterr().err


def test_cross_subject_knows_where_landmarks_should_be(capsys: pytest.CaptureFixture[str]) -> None:
    many = ["cross", "--identities", "3", "--pairs", "2", *MODEL]
    eq8 = told(capsys, *many)
    detector = told(capsys, *many, "--landmarks", "detector")
    assert [line.get("clip") for line in eq8] == [line.get("clip") for line in detector]
    assert eq8[-1]["psnr"] is None and eq8[-1]["why_null"]["psnr"].startswith("no true picture")
    assert eq8[-1]["clips"] == 2 and eq8[-1]["apd"] < 6
    assert eq8[-1]["nme"] < detector[-1]["nme"]  # another's shape is drawn, and shows


def test_steps_ablates_both_directions_and_the_noise(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundle = shutil.copytree(bundle_path(), tmp_path / "any.bundle")
    manifest.write(bundle, replace(manifest.read(bundle), student_of=None))  # takes any count
    lines = told(
        capsys, "steps", "--identities", "1", "--steps", "2,4", "--invert-steps", "5", "--random",
        "--bundle", str(bundle), *MODEL[2:],
    )  # fmt: skip
    assert set(lines[-1]["runs"]) == {
        f"ours-T{n}{how}-ort" for n in (2, 4) for how in ("", "-inv5", "-random")
    }
    by_name = {name: run["psnr"] for name, run in lines[-1]["runs"].items()}
    assert len(set(by_name.values())) == 6  # none is another in disguise


def test_bundles_of_one_name_are_measured_side_by_side(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    bundles = []
    for name in ("full", "without_gaze"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "face.bundle").symlink_to(bundle_path(), target_is_directory=True)
        bundles.append(str(tmp_path / name / "face.bundle"))
    run = ["self", "--identities", "1", *MODEL, "--bundle"]
    last = told(capsys, *run, ",".join(bundles))[-1]
    assert len(last["runs"]) == 2 and len({run["psnr"] for run in last["runs"].values()}) == 1
    assert main(["eval", *run, ",".join([bundles[0]] * 2)]) == REFUSED
    assert "two runs would both be" in capsys.readouterr().err


def test_a_clip_of_the_users_is_moved_by_its_own_frames(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    lines = told(
        capsys, "self", driver_path(), "--frames", "3", "--reader", "judge", "--methods",
        "ours,true,copy", *MODEL, "-o", tmp_path,
    )  # fmt: skip
    runs = lines[-1]["runs"]
    assert all(run["frames"] == 3 and run["compared"] == 3 for run in runs.values())
    assert runs["true"]["flicker"] == 0 and runs["true"]["psnr"] == 100
    assert runs["ours-T2-ort"]["flicker"] > 0 and runs["copy"]["jitter"] == 0
    assert runs["true"]["jitter"] == runs["true"]["jitter_real"] > 0
    frames = [row["frame"] for row in read_rows(tmp_path / "true") if "frame" in row]
    assert frames == ["1", "2", "3"]  # the first is the source


def test_one_persons_clip_moves_another(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """The same clip as two people: landmarks as detected are the driver's own, drawn exactly."""
    for name in ("anna", "berta"):
        for suffix in (".mp4", ".landmarks.npz"):
            shutil.copy(driver_path().with_suffix(suffix), tmp_path / f"{name}{suffix}")
    run = ["cross", tmp_path, "--frames", "2", "--pairs", "1", "--reader", "judge", *MODEL]
    eq8, detector = told(capsys, *run)[-1], told(capsys, *run, "--landmarks", "detector")[-1]
    for summary in (eq8, detector):
        assert summary["frames"] == summary["count"]["apd"] == 2
        assert summary["psnr"] is None and summary["nme"] is None
    assert detector["apd"] < 8


def test_a_clip_that_cannot_be_used_is_counted_and_the_others_are_measured(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for suffix in (".mp4", ".landmarks.npz"):
        shutil.copy(driver_path().with_suffix(suffix), tmp_path / f"anna{suffix}")
    (tmp_path / "berta.mp4").write_bytes(driver_path().read_bytes()[:500])
    run = ["self", tmp_path, "--frames", "1", "--reader", "judge", "--methods", "copy"]
    lines = told(capsys, *run)
    assert lines[-1]["unusable_clips"] == 1 and lines[-1]["compared"] == 1
    (line,) = (line for line in lines if "unusable" in line)
    assert line["clip"] == "berta" and "berta.mp4" in line["unusable"]
    shutil.copytree(tmp_path, tmp_path.parent / "b")
    same = told(capsys, "pairs", tmp_path, tmp_path.parent / "b", "--reader", "none")[-1]
    assert (same["unusable_clips"], same["compared"], same["psnr"]) == (1, 100, 100)


def test_mistakes_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for arguments, message in (
        (["self", "--methods", "theirs"], "choose from: ours"),
        (["self", "--backend", "abacus"], "choose from: auto, all, ort"),
        (["self", "--identities", "0"], "wanted 1"),
        (["self", str(tmp_path / "no")], "no such file"),
        (["self", str(tmp_path)], "no clip"),
        (["cross", str(driver_path())], "two or more people"),
        (["pairs", str(tmp_path / "no"), str(tmp_path)], "no such file"),
        (["pairs", str(tmp_path), str(tmp_path)], "no pictures"),
        (["report", str(tmp_path)], "no run"),
        (["study", "ours"], "NAME=DIR"),
        (["self", "--networks", str(tmp_path / "no")], "no such folder"),
    ):
        assert main(["eval", *arguments]) == REFUSED, arguments
        assert message in capsys.readouterr().err


def test_seconds_are_told_of_whole_clips_and_of_a_camera(
    capsys: pytest.CaptureFixture[str],
) -> None:
    (line,) = told(capsys, "time", "--frames", "2", "--live-seconds", "0.4", *MODEL)
    assert line["seconds_2"] > line["load_s_2"] > 0 and line["steps"] == 2
    if line["tracker"] == "mediapipe":
        assert line["live_latency_p50_ms"] > 0 and line["live_frames_per_second"] > 0


BLOCKED = """
import sys
for name in ("torch", "numba", "onnx", "skimage", "safetensors", "matplotlib"):
    sys.modules[name] = None
from diffusionact.cli import main
sys.exit(main(sys.argv[1:]))
"""


def test_it_works_in_the_environment_of_make_env(tmp_path: Path) -> None:
    run = ["eval", "self", "--identities", "1", *MODEL, "-o", str(tmp_path), "--pictures", "-q"]
    subprocess.run([sys.executable, "-c", BLOCKED, *run], check=True)
    assert (tmp_path / "report.html").exists()
    assert cv2.imread(str(tmp_path / "ours-T2-ort/pictures/2026-00000/target.png")) is not None
    more = [*run[:3], "9999", *run[4:6], "-q"]
    done = subprocess.run(
        [sys.executable, "-c", BLOCKED, *more], check=False, capture_output=True, text=True
    )
    assert done.returncode == REFUSED and "pip install numba" in done.stderr


def test_help_loads_no_numpy() -> None:
    code = (
        "import sys\nfrom diffusionact.cli import main\n"
        "try: main(['eval', 'self', '--help'])\nexcept SystemExit: pass\n"
        "assert not {'numpy', 'cv2', 'torch'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)
