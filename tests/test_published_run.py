"""Published files to a moving portrait, all the way: import, export, run with the bundle's tracker.

The weights are made by the golden rule, so the pictures are noise; the detector's last layers are
set so that it sees one face in every picture.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from diffusionact import cli
from diffusionact import manifest as manifest_file
from diffusionact.assets import portrait_paths
from diffusionact.landmarks import Track
from diffusionact.runtime.published.tracker import PublishedTracker
from diffusionact.runtime.reenactor import Reenactor
from diffusionact.runtime.settings import Settings
from tests.golden import rule

pytestmark = [pytest.mark.torch, pytest.mark.slow, pytest.mark.timeout(3000)]
torch = pytest.importorskip("torch")

HERE = Path(__file__).parent
MEDIA = HERE.parent.parent / "shared" / "media" / "source"
CAMERA = slice(206, 209)  # of EMOCA's codes
LAST_STRIDE_PX, BOX_PX = 128, 160  # of the detector's last head; of the box that is found


def tensors(name: str, shapes: Mapping[str, Any]) -> dict[str, Any]:
    """The weights of a helper network by the rule; variances are positive."""
    made = {}
    for key, value in shapes.items():
        full = f"{name}/{key}" + (".weight" if key.endswith("running_var") else "")
        made[key] = torch.from_numpy(rule.tensor(full, value.shape))
    return made


def one_face(state: dict[str, Any]) -> dict[str, Any]:
    """The detector's weights with one box, in the middle of every picture.

    The last map is one number everywhere; a 3x3 convolution that ends at the map's edge sums nine
    of it in the middle cell and six at most elsewhere.
    """
    for key, value in state.items():
        if "_mbox_conf" in key:
            value.zero_()
            if key.endswith("bias"):
                value[-1] = -9.0
        elif "_mbox_loc" in key:
            value.zero_()
    state["conv7_2.weight"].zero_()
    state["conv7_2.bias"].fill_(1.0)
    features = state["conv7_2.bias"].numel()
    state["conv7_2_mbox_conf.weight"][1] = 4.0 / features
    state["conv7_2_mbox_conf.bias"][1] = -4.0 * 7.5
    middle = -LAST_STRIDE_PX / 2 / (0.1 * 4 * LAST_STRIDE_PX)
    size = np.log(BOX_PX / (4 * LAST_STRIDE_PX)) / 0.2
    state["conv7_2_mbox_loc.bias"][:] = torch.tensor([middle, middle, size, size])
    return state


def write_files(folder: Path) -> list[str]:
    """The published files, and the arguments that name them."""
    from diffusionact.training.models import NetworkConfig
    from diffusionact.training.models.frozen import FAN, S3FD, Emoca, Gaze

    tables = json.loads(gzip.decompress((HERE / "golden" / "networks.json.gz").read_bytes()))
    model: dict[str, Any] = {"best_val_loss": 0.0}
    for full, shape in tables["small"]["keys"].items():
        top, key = full.split("/", 1)
        model.setdefault(top, {})[key] = torch.from_numpy(rule.tensor(full, shape))
    torch.save(model, folder / "diffusionact_model.pt")
    small = NetworkConfig(64, 32, (1, 2, 2), (1, 2, 2, 2), embed=64)
    (folder / "sizes.json").write_text(json.dumps(small.to_dict()))
    with torch.device("meta"):
        shapes = {kind.NAME: kind().state_dict() for kind in (S3FD, FAN, Emoca, Gaze)}
    torch.save(one_face(tensors("s3fd", shapes["s3fd"])), folder / "s3fd.pth")
    torch.save(tensors("fan", shapes["fan"]), folder / "fan.tar")
    torch.save({"model_state": tensors("gaze", shapes["gaze"])}, folder / "gaze.tar")
    at = folder / "EMOCA" / "detail" / "checkpoints"
    at.mkdir(parents=True)
    (folder / "EMOCA" / "cfg.yaml").write_text("detail:\n  exp_deca_jaw_pose: true\n")
    emoca = tensors("emoca", shapes["emoca"])
    emoca["E_flame.layers.2.weight"][CAMERA] = 0.0  # a head that fills the crop
    emoca["E_flame.layers.2.bias"][CAMERA] = torch.tensor([8.0, 0.0, 0.0])
    state = {f"deca.{key}": value for key, value in emoca.items()}
    torch.save({"state_dict": {**state, **face_model()}}, at / "deca-val=2.5.ckpt")
    files = {"s3fd": "s3fd.pth", "fan": "fan.tar", "gaze": "gaze.tar", "emoca": "EMOCA"}
    given = [word for name, file in files.items() for word in (f"--{name}", str(folder / file))]
    sizes = ["--network", str(folder / "sizes.json")]
    return [str(folder / "diffusionact_model.pt"), *sizes, *given]


def face_model() -> dict[str, Any]:
    """A FLAME of random numbers, as EMOCA's checkpoint carries it."""
    rng = np.random.default_rng(0)
    faces = rng.permuted(np.tile(np.arange(60), (90, 1)), axis=1)[:, :3]
    arrays = {
        "v_template": rng.normal(0, 0.06, (60, 3)),
        "shapedirs": rng.normal(0, 0.004, (60, 3, 150)),
        "posedirs": rng.normal(0, 0.001, (36, 180)),
        "J_regressor": np.full((5, 60), 1 / 60),
        "lbs_weights": np.full((60, 5), 0.2),
        "faces_tensor": faces,
        "parents": np.array([-1, 0, 1, 1, 1]),
        "lmk_faces_idx": rng.integers(0, 90, 51),
        "lmk_bary_coords": np.full((51, 3), 1 / 3),
        "dynamic_lmk_faces_idx": rng.integers(0, 90, (79, 17)),
        "dynamic_lmk_bary_coords": np.full((79, 17, 3), 1 / 3),
    }
    floats = {n: a.astype(np.float32) if a.dtype == float else a for n, a in arrays.items()}
    return {f"deca.flame.{name}": torch.tensor(array) for name, array in floats.items()}


@pytest.fixture(scope="module")
def published_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("published")
    weights, bundle = folder / "weights", folder / "small.bundle"
    assert cli.main(["import", *write_files(folder), "-o", str(weights)]) == 0
    assert cli.main(["export", str(weights), "-o", str(bundle)]) == 0
    return bundle


def test_the_bundle_has_the_whole_tracker(published_bundle: Path) -> None:
    manifest = manifest_file.read(published_bundle)
    assert set(manifest.tracker) == set(manifest_file.tracker_tensors())
    assert set(manifest.assets) == {"flame"} and manifest.image_size == 64
    with Reenactor.load(published_bundle, settings=Settings(threads=1)) as act:
        assert isinstance(act.tracker, PublishedTracker)
        image = cv2.imread(str(portrait_paths()[0]))
        (found,) = act.tracker.detect(np.asarray(image, np.uint8))
        assert found.score > 0.5 and found.codes is not None and len(found.codes) == 161
        middle = found.points[:, :2].mean(axis=0) / image.shape[1::-1]
        assert np.abs(middle - 0.5).max() < 0.25


@pytest.mark.parametrize("compat", [[], ["--compat", "published", "--crop"]])
def test_portraits_follow_a_picture(
    published_bundle: Path, tmp_path: Path, compat: list[str]
) -> None:
    shared = sorted(MEDIA.iterdir()) if MEDIA.is_dir() else []
    copies = [tmp_path / "source.png", tmp_path / "driver.png"]
    for path, copy in zip(portrait_paths()[1:3], copies, strict=True):
        copy.write_bytes(path.read_bytes())  # no landmarks lie beside it
    for source in (copies[0], *shared):
        out = tmp_path / f"{source.stem}.out.png"
        run = ["run", "-s", str(source), "-d", str(copies[1]), "-o", str(out), "--threads", "1"]
        assert cli.main([*run, "--bundle", str(published_bundle), "--steps", "10", *compat]) == 0
        made = cv2.imread(str(out))
        assert made.shape == ((64, 64, 3) if compat else cv2.imread(str(source)).shape)
        if compat:
            assert made.min() == 0 and made.max() == 255


def test_a_track_of_codes_gives_the_same_pictures(published_bundle: Path, tmp_path: Path) -> None:
    frames = [np.asarray(cv2.imread(str(path)), np.uint8) for path in portrait_paths()[:2]]
    settings = Settings(steps=10, threads=1, paste=False)
    with Reenactor.load(published_bundle, settings=settings) as act:
        source = act.prepare(frames[0])
        live = act.reenact(frames[1], source)
        (found,) = act.tracker.detect(frames[1])
        size = (frames[1].shape[1], frames[1].shape[0])
        codes = None if found.codes is None else found.codes[None]
        track = Track(found.points[None], found.gaze[None], np.zeros(1, np.int64), size, codes)
        track.save(tmp_path / "driver.npz")
        again = act.reenact(Track.load(tmp_path / "driver.npz")[0], source)
    np.testing.assert_array_equal(again.crop, live.crop)
    np.testing.assert_array_equal(again.landmarks.points, live.landmarks.points)
