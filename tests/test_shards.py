"""Shards on disk, their index, and the frames and pairs that training takes from them."""

from __future__ import annotations

import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path

import cv2
import numpy as np
import pytest

from diffusionact.condition import Drawing, draw_condition
from diffusionact.errors import SettingsError
from diffusionact.image import bgr_to_rgb, warp_crop
from diffusionact.landmarks import Landmarks, crop_matrix
from diffusionact.manifest import Crop
from diffusionact.training.config import PoolRecipe, ShardsRecipe, StageRecipe, parse_recipe
from diffusionact.training.cross_pairs import CrossSampler
from diffusionact.training.data import PairSampler, Pool
from diffusionact.training.inversions import InversionCache
from diffusionact.training.prepare import prepare
from diffusionact.training.prepare_clip import hull_mask
from diffusionact.training.shards import Shards, open_dataset, origin_of
from tests.readers import ScriptedReader, people, posed, request
from tests.test_data import write_pool

FRAMES = (5, 3, 4, 2)
JPEG_LEVELS = 6.0  # mean difference of a picture of noise, quality 95


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> tuple[Shards, ScriptedReader]:
    folder = tmp_path_factory.mktemp("shards") / "out"
    reader, clips = people(FRAMES)
    prepare(clips, folder, request(), lambda: reader)
    return Shards.open(folder), reader


def at(*numbers: int) -> np.ndarray:
    return np.array(numbers, np.int64)


def test_frames_are_numbered_by_person_clip_and_time(made: tuple[Shards, ScriptedReader]) -> None:
    shards, _ = made
    assert shards.people == ["id0", "id1", "id2"] and shards.identities == 3
    assert shards.size == 64 and len(shards) == sum(FRAMES)
    np.testing.assert_array_equal(shards.count(at(0, 1, 2)), [8, 4, 2])
    clips = shards.column("frame", np.zeros(8, np.int64), np.arange(8))
    np.testing.assert_array_equal(clips, [0, 1, 2, 3, 4, 0, 1, 2])
    first, count = shards.span(at(0, 0, 1), at(4, 5, 3))
    np.testing.assert_array_equal(first, [0, 5, 0])
    np.testing.assert_array_equal(count, [5, 3, 4])
    np.testing.assert_array_equal(shards.frames_of_take(1), [5, 6, 7])


def test_what_was_put_in_comes_out(made: tuple[Shards, ScriptedReader]) -> None:
    """Pictures, landmarks, masks and drawings of a frame, made again by hand."""
    shards, reader = made
    frames, drawings = shards.gather(at(1, 0), at(2, 6)), shards.draw(at(1, 0), at(2, 6))
    for i, (clip, number) in enumerate((("id1-2", 2), ("id0-1", 1))):
        image, faces = reader.clips[clip][number]
        assert image is not None
        matrix = crop_matrix(faces[0].points, 64, rotate=True)
        crop = bgr_to_rgb(warp_crop(image, matrix, 64))
        assert np.abs(frames.images[i].astype(int) - crop).mean() < JPEG_LEVELS
        placed = faces[0].transformed(matrix)
        np.testing.assert_allclose(frames.points[i], placed.points, atol=1e-4)
        np.testing.assert_allclose(frames.gaze[i], placed.gaze, atol=1e-4)
        assert frames.mask is not None
        np.testing.assert_array_equal(frames.mask[i], hull_mask(placed, 64))
        wanted = draw_condition(placed, 64, Drawing(1, 1.5, True))
        np.testing.assert_array_equal(drawings[i], wanted)
    assert frames.labels is None and frames.parameters is None


def test_codes_are_the_model_that_made_the_face(made: tuple[Shards, ScriptedReader]) -> None:
    shards, _ = made
    frames = np.arange(5)
    pose = shards.column("pose", np.zeros(5, np.int64), frames)
    np.testing.assert_allclose(pose[:, 0] - pose[0, 0], 2.0 * frames, atol=2.0)
    jaw = shards.column("expression", np.zeros(5, np.int64), frames)[:, 0]
    np.testing.assert_allclose(jaw - jaw[0], 0.1 * frames, atol=0.06)
    shape = shards.column("shape", np.zeros(8, np.int64), np.arange(8))
    np.testing.assert_array_equal(shape[0], shape[4])  # of one take
    with pytest.raises(SettingsError, match="has no codes; it has .*expression"):
        shards.column("codes", at(0), at(0))


def test_any_reader_of_tar_files_reads_a_shard(made: tuple[Shards, ScriptedReader]) -> None:
    shards, _ = made
    with tarfile.open(shards.folder / "shard-000000.tar") as tar:
        names = tar.getnames()
        assert names[:4] == [
            f"c000000t00f000000.{ending}" for ending in ("jpg", "mask.png", "npy", "json")
        ]
        assert len(names) == 4 * (FRAMES[0] + FRAMES[1])
        assert all(member.mtime == 0 and member.uid == 0 for member in tar)
        picture = tar.extractfile(names[0])
        record = tar.extractfile(names[2])
        assert picture is not None and record is not None
        image = cv2.imdecode(np.frombuffer(picture.read(), np.uint8), cv2.IMREAD_COLOR)
        numbers = np.load(io.BytesIO(record.read()), allow_pickle=False)
    assert image is not None and image.shape == (64, 64, 3)
    np.testing.assert_array_equal(numbers["points"], shards.columns["points"][0])


def test_what_the_published_tracker_reads_is_kept_and_drawn(tmp_path: Path) -> None:
    """Its codes, its gaze angles, and the canvas that it draws on instead of the landmarks."""
    reader, clips = people()
    codes = np.arange(161, dtype=np.float32) / 161

    class Published(ScriptedReader):
        def faces(self, image_bgr: np.ndarray) -> list[Landmarks]:
            return [replace(face, codes=codes) for face in super().faces(image_bgr)]

        def drawn(self, face: Landmarks) -> Landmarks:
            assert face.codes is not None
            return posed(4, 10.0, units_px=12.0).transformed(np.eye(2, 3) * 0.5)

    published = Published(reader.clips)
    prepare(clips, tmp_path / "out", request(codes=161), lambda: published)
    shards = Shards.open(tmp_path / "out")
    np.testing.assert_array_equal(shards.column("codes", at(2), at(1))[0], codes)
    np.testing.assert_array_equal(shards.column("gaze_angles", at(2), at(1))[0], codes[-2:])
    wanted = posed(4, 10.0, units_px=12.0).transformed(np.eye(2, 3) * 0.5)
    drawing = draw_condition(wanted, 64, Drawing(1, 1.5, True))
    np.testing.assert_array_equal(shards.draw(at(2), at(1))[0], drawing)
    with pytest.raises(SettingsError, match="prepared with --tracker mediapipe"):
        shards.cross((at(0), at(0)), (at(1), at(1)))


def stage(**values: float) -> StageRecipe:
    return StageRecipe(kind="reenact", images=100, batch=32, **values)  # type: ignore[arg-type]


def test_pairs_are_of_one_take_and_of_people_in_training(
    made: tuple[Shards, ScriptedReader],
) -> None:
    shards, _ = made
    sampler = PairSampler(shards, 2, stage(same_frame=0.0), InversionCache(1, 64), (1, 0))
    for step in range(6):
        batch = sampler(step)
        assert batch.identity.max() < 2 and batch.source is not None
        first, count = shards.span(batch.identity, batch.source_frame)
        assert ((batch.frame >= first) & (batch.frame < first + count)).all()
        assert batch.labels is None and batch.parameters is None and batch.mask is not None
        assert batch.mask.shape == batch.target.shape[:3]
        again = sampler(step)
        np.testing.assert_array_equal(batch.target, again.target)
        np.testing.assert_array_equal(batch.source, again.source)
    everyone = Shards.open(shards.folder, "person")
    batch = PairSampler(everyone, 1, stage(same_frame=0.0), InversionCache(1, 64), (1,))(0)
    takes = np.where(np.stack([batch.source_frame, batch.frame]) < FRAMES[0], 0, 1)
    assert (takes[0] != takes[1]).any()  # dress and light may differ


def test_pairs_across_people_are_drawn_with_the_drivers_motion(
    made: tuple[Shards, ScriptedReader],
) -> None:
    shards, _ = made
    batch = CrossSampler(shards, 3, 8, (2,))(0)
    assert batch.driver is not None and (batch.driver != batch.identity).all()
    assert batch.condition is not None and batch.condition.shape == (8, 64, 64, 3)
    own = shards.draw(batch.identity, batch.source_frame)
    assert (batch.condition != own).any(axis=(1, 2, 3)).all()
    same = shards.cross((at(1), at(2)), (at(1), at(2)))
    assert np.abs(same.astype(int) - shards.draw(at(1), at(2))).mean() < 0.5


def test_a_recipe_names_rendered_or_prepared_faces(
    made: tuple[Shards, ScriptedReader], tmp_path: Path
) -> None:
    shards, _ = made
    head = 'name = "x"\nnetwork = "y"\n[[stages]]\nkind = "reenact"\nimages = 9\n'
    recipe = parse_recipe(f'{head}[data]\nfolder = "{shards.folder}"\nheld_out = 1\n')
    assert recipe.pool == ShardsRecipe(str(shards.folder), 1)
    opened = open_dataset(recipe.pool)
    assert isinstance(opened, Shards) and opened.identities == 3
    write_pool(tmp_path / "pool")
    assert isinstance(open_dataset(PoolRecipe(str(tmp_path / "pool"))), Pool)
    for text, message in (
        ('[data]\nfolder = "a"\n[pool]\nfolder = "b"\n', "wanted rendered or prepared"),
        ('[data]\nfolder = "a"\nheld_out = 0\n', "held_out = 0"),
        ('[data]\nfolder = "a"\npairs = "clip"\n', "'take' or 'person'"),
    ):
        with pytest.raises(SettingsError, match=message):
            parse_recipe(head + text)


def test_shards_that_are_not_whole_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="diffusionact prepare DATASET"):
        Shards.open(tmp_path / "none")
    reader, clips = people()
    folder = tmp_path / "out"
    prepare(clips, folder, request(), lambda: reader)
    shard = folder / "shard-000001.tar"
    shard.write_bytes(shard.read_bytes()[:-512])
    with pytest.raises(SettingsError, match=r"shard-000001\.tar: \d+ bytes, wanted \d+"):
        Shards.open(folder)
    prepare(clips, folder, request(), lambda: reader)  # mends it
    assert len(Shards.open(folder)) == 14


def test_a_face_across_people_needs_no_depth(made: tuple[Shards, ScriptedReader]) -> None:
    shards, _ = made
    face = shards._face(0, "drawn")
    assert isinstance(face, Landmarks) and np.isnan(face.points[:, 2]).all()


RECIPE = """
name = "tiny"
network = "tiny"
weights = "{weights}"
[data]
folder = "{folder}"
held_out = 1
[inversions]
steps = 2
capacity = 8
fill = 2
every = 1
batch = 2
[loop]
log_every_steps = 1
fused_norm = false
bf16 = false
evaluation_pairs = 2
[[stages]]
kind = "autoencoder"
images = 8
batch = 4
cached_from = 0.4
[[stages]]
kind = "pretrain"
images = 8
batch = 4
[[stages]]
kind = "reenact"
images = 8
batch = 4
"""


@pytest.mark.torch
def test_weights_say_how_their_faces_were_cut_and_a_bundle_runs_alike(
    made: tuple[Shards, ScriptedReader],
) -> None:
    pytest.importorskip("torch")
    bundle = pytest.importorskip("diffusionact.export.bundle")
    from diffusionact.training.models.config import FACE128
    from diffusionact.training.weights import Weights

    shards, _ = made
    assert origin_of(PoolRecipe("x")) == {"data": "rendered faces"}
    origin = origin_of(ShardsRecipe(str(shards.folder)))
    assert origin["data"] == "14 prepared frames of 3 people"
    card = bundle._card_of(Weights(FACE128, {}, {"recipe": "mine", **origin}))
    assert card.name == "mine" and card.crop == Crop(rotate=True, scale=1.0)
    assert card.drawing == Drawing(1, 1.5, True) and "photographs" in card.training.domain
    assert card.render == bundle.FACE128_CARD.render
    plain = Weights(FACE128, {}, {"data": "rendered faces"})
    assert bundle._card_of(plain) is bundle.FACE128_CARD


@pytest.mark.torch
def test_stages_train_on_prepared_faces(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("torch")
    from diffusionact.training import loop, state
    from tests.test_training import TINY

    monkeypatch.setattr(state, "PRESETS", {"tiny": TINY})
    reader, clips = people()
    prepare(clips, tmp_path / "data", request(size=32), lambda: reader)
    recipe = tmp_path / "tiny.toml"
    recipe.write_text(RECIPE.format(folder=tmp_path / "data", weights=tmp_path / "w.safetensors"))
    folder = loop.train(recipe, out=tmp_path / "run", device="cpu")
    curves = [json.loads(line) for line in (folder / "curves.jsonl").read_text().splitlines()]
    kinds = [row["stage"] for row in curves if "stage" in row]
    assert kinds == ["autoencoder"] * 2 + ["pretrain"] * 2 + ["reenact"] * 2
    assert len(list(folder.glob("sheet-*.png"))) >= 2 and (tmp_path / "w.safetensors").is_file()
