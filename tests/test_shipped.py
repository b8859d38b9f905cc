"""What ships: the model is whole, is the one whose weights are kept, and fits what it was trained
on; portraits, driver and card are there; all of it is small."""

from __future__ import annotations

import json
import shutil
import subprocess
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import card_text
from diffusionact import bundle_path, driver_path, manifest, open_reader, portrait_paths
from diffusionact.landmarks import Track
from diffusionact.manifest import Manifest
from diffusionact.runtime.media import read_image
from diffusionact.runtime.reenactor import Reenactor
from diffusionact.schedule import inversion_timesteps

ROOT = Path(__file__).parent.parent
ASSETS = ROOT / "diffusionact" / "assets"
CHECKPOINTS = ROOT / "training" / "checkpoints"
# Of the shipped model itself, or of the teacher that it is a student of.
WEIGHTS, TEACHER = CHECKPOINTS / "face.safetensors", CHECKPOINTS / "teacher.safetensors"
CARD = ASSETS / "MODEL_CARD.md"

MB = 1_000_000
# The tree holds networks twice, for training and for running, and must be quick to copy.
MAX_BUNDLE, MAX_ASSETS, MAX_TREE = 20 * MB, 26 * MB, 58 * MB
LEAST_PORTRAITS, LEAST_FRAMES = 6, 60
# What ONNX Runtime's frames may differ from PyTorch's: T steps magnify the rounding where a pixel
# is close to the clip, and inversion once more; the mean shows that it is pixels, not pictures.
FRAME_MAX, REENACTED_MAX, FRAME_MEAN = 2e-3, 2e-2, 1e-4
# The network was trained on noise of deviation 1. An x_T far from it has kept the picture (below)
# or has been blown up by steps at low noise (above).
X_T_STD = (0.1, 1.6)
MOST_STUDENT_STEPS = 4
PTS_TOLERANCE_NS = 1_000_000  # of a frame that lasts 40 ms


@pytest.fixture(scope="module")
def bundle() -> Path:
    """The shipped bundle."""
    path = bundle_path()
    if not path.is_dir():
        pytest.fail(
            f"{path} is missing: `diffusionact export {WEIGHTS.relative_to(ROOT)} "
            f"-o {path.relative_to(ROOT)}` makes it"
        )
    return path


@pytest.fixture(scope="module")
def shipped(bundle: Path) -> Manifest:
    """Its manifest; reading it checks the hash of every component."""
    return manifest.read(bundle)


def size(folder: Path) -> int:
    """The bytes of all files in a folder, without what Python and `diffusionact build` leave."""
    files = [path for path in folder.rglob("*") if not {"__pycache__", "engines"} & {*path.parts}]
    return sum(path.stat().st_size for path in files if path.is_file())


def track_of(media: Path) -> Track:
    return Track.load(media.with_suffix(".landmarks.npz"))


# The bundle


def test_the_bundle_is_whole(bundle: Path, shipped: Manifest) -> None:
    known = {part.file for part in shipped.components.values()}
    assert {path.name for path in bundle.iterdir()} - {"engines"} == known | {
        "manifest.json",
        "parity.json",
    }


def test_the_weights_that_it_is_made_of_are_kept(shipped: Manifest) -> None:
    kept, due = (WEIGHTS, shipped.weights_sha256)
    if shipped.student_of is not None:
        kept, due = TEACHER, shipped.student_of
    if not kept.is_file():
        pytest.fail(f"{kept} is missing: `diffusionact train` writes it")
    assert manifest.file_sha256(kept) == due


@pytest.mark.torch
def test_its_weights_come_back_out_of_it(bundle: Path, shipped: Manifest, tmp_path: Path) -> None:
    from diffusionact.export.restore import restore_weights
    from diffusionact.training import weights

    made = restore_weights(bundle, tmp_path / "back.safetensors")
    if shipped.student_of is not None:
        assert made.same, "nothing but the bundle keeps them"
        return
    kept, back = weights.load(WEIGHTS), weights.load(made.path)
    for part, tensors in back.parts.items():
        for name, tensor in tensors.items():
            np.testing.assert_array_equal(tensor, kept.parts[part][name])


def test_the_bundle_answers_as_its_weights_do(bundle: Path) -> None:
    rows: list[dict[str, Any]] = json.loads((bundle / "parity.json").read_text())["rows"]
    frames = [row for row in rows if "render" in row["what"]]
    inverted = [row for row in frames if "inversion" in row["what"]]
    assert len(frames) == 2 and len(inverted) == 1
    for row in rows:
        assert row["max_error"] <= row["max_allowed"], row
        assert row["mean_error"] <= row["mean_allowed"], row
    for row in frames:
        assert row["max_error"] <= (REENACTED_MAX if row in inverted else FRAME_MAX), row
        assert row["mean_error"] <= FRAME_MEAN, row


def test_inversion_takes_the_timesteps_of_its_rule(shipped: Manifest) -> None:
    """A bundle exported before the rule, or by another, would invert otherwise than trained; a
    student inverts at the timesteps of its own training."""
    if shipped.student_of is not None:
        assert shipped.invert.steps <= MOST_STUDENT_STEPS >= shipped.render.steps
        assert shipped.invert.at()[0] > 0, "a network that predicts x_0 knows no noise at 0"
        return
    total = shipped.schedule.total
    for count in {shipped.invert.steps, *shipped.invert.choices}:
        wanted = inversion_timesteps(shipped.prediction, count, total)
        np.testing.assert_array_equal(shipped.invert.at(count, total), wanted)


@pytest.mark.torch
def test_the_bundle_says_what_training_did(shipped: Manifest) -> None:
    from diffusionact.export.bundle import FACE128_CARD
    from diffusionact.training.data import DRAWING
    from diffusionact.training.faces import POSE_RANGE_DEG

    assert shipped.drawing == DRAWING
    assert shipped.crop == FACE128_CARD.crop  # tests/test_faces.py holds it to the renderer
    wanted = zip(("yaw", "pitch", "roll"), POSE_RANGE_DEG, strict=True)
    assert shipped.training.pose_range_deg == {name: (-end, end) for name, end in wanted}


def test_inverted_portraits_are_noise(bundle: Path) -> None:
    path = portrait_paths()[0]
    with Reenactor.load(bundle) as act:
        source = act.prepare(read_image(path), landmarks=track_of(path)[0])
    assert X_T_STD[0] < float(source.x_T.std()) < X_T_STD[1]


# What lies beside it


@pytest.mark.parametrize("path", portrait_paths(), ids=lambda path: path.stem)
def test_a_portrait_has_its_landmarks(path: Path) -> None:
    track, image = track_of(path), read_image(path)
    assert len(track) == 1 and track.size == (image.shape[1], image.shape[0])
    face = track[0]
    assert face is not None
    assert ((face.points[:, :2] >= 0) & (face.points[:, :2] < track.size)).all()


def test_there_are_portraits() -> None:
    assert len(portrait_paths()) >= LEAST_PORTRAITS


def test_the_driver_has_its_track() -> None:
    times = [frame.pts_ns for frame in open_reader(driver_path())]
    track = track_of(driver_path())
    assert len(times) >= LEAST_FRAMES and len(track) == len(times)
    np.testing.assert_allclose(track.pts_ns, times, rtol=0, atol=PTS_TOLERANCE_NS)
    assert all(track[i] is not None for i in range(len(track)))


def test_the_card_measures_this_model(shipped: Manifest) -> None:
    if not CARD.is_file():
        pytest.fail(f"{CARD} is missing: `python -m benchmarks.model_card` measures and writes it")
    text = CARD.read_text(encoding="utf-8")
    measured = text.partition(card_text.BEGIN)[2].partition(card_text.END)[0]
    assert "| copy |" in measured and "| oracle T=" in measured, "nothing is measured yet"
    assert shipped.weights_sha256[:12] in measured, "what is measured is another model"


# Size


def test_the_package_is_small(bundle: Path) -> None:
    assert size(bundle) < MAX_BUNDLE
    assert size(ASSETS) < MAX_ASSETS


def test_the_checkout_is_small() -> None:
    if shutil.which("git") is None or not (ROOT / ".git").exists():
        pytest.skip("not a git checkout")
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, capture_output=True, check=False)
    if listing.returncode:
        pytest.skip(f"git cannot list its files: {listing.stderr.decode().strip()}")
    paths = [ROOT / name for name in listing.stdout.decode().split("\0") if name]
    # lstat: the links to sub-packages are not what they lead to; a file may be gone, uncommitted
    sizes = [path.lstat().st_size for path in paths if path.is_symlink() or path.exists()]
    assert sum(sizes) < MAX_TREE
