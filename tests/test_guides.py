"""The guide: its readings and their gradients, its file, what its training sees, that it learns."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from diffusionact.errors import SettingsError
from diffusionact.training import data, faces, guides
from diffusionact.training.critics import Critics
from diffusionact.training.data import Pool
from diffusionact.training.models import face_reader
from diffusionact.training.models import guide as network
from diffusionact.training.models.judge import load_judge

pytestmark = pytest.mark.torch

ROOT = Path(__file__).parents[1] / "training"
SHIPPED = ROOT / "checkpoints" / "guide.safetensors"
TINY = network.GuideConfig(32, 1, (8, 8, 12, 16), (4, 8), eye_px=8.0, eye_cells=8, embed=16)
READINGS = ("features", "identity", "style", "landmarks", "gaze", "head_pose")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A pool of eight people, rendered in this process: a second one takes seconds to start."""
    folder = tmp_path_factory.mktemp("guides")
    rows = [data._frame(identity, 5, 2, 32) for identity in range(8)]
    for name in data.FIELDS:
        np.save(folder / f"{name}.npy", np.array([[f[name] for f in frames] for frames in rows]))
    meta = {"format": data.FORMAT, "identities": 8, "frames": 2, "size": 32, "seed": 5}
    (folder / "meta.json").write_text(json.dumps(meta))
    return folder


@pytest.fixture
def pool(folder: Path) -> Pool:
    return Pool.open(folder)


def tiny(dtype: torch.dtype = torch.float32) -> network.Guide:
    """A guide whose norms are those of no picture in particular, as after some training."""
    torch.manual_seed(0)
    guide = network.Guide(TINY)
    with torch.no_grad():
        for name, value in guide.named_buffers():
            if "running_mean" in name:
                value.normal_(0, 0.1)
            elif "running_var" in name or "gain" in name:
                value.uniform_(0.5, 1.5)
    return guide.eval().to(dtype)


def pictures(count: int = 2) -> torch.Tensor:
    torch.manual_seed(1)
    return F.avg_pool2d(torch.rand(count, 3, 34, 34) * 2 - 1, 3, stride=1)


def test_readings_have_the_promised_shapes_and_lengths() -> None:
    guide, x = tiny(), pictures(3)
    shapes = [tuple(m.shape) for m in guide.features(x)]
    assert shapes == [(3, 8, 32, 32), (3, 8, 16, 16), (3, 12, 8, 8), (3, 16, 4, 4)]
    assert guide.landmarks(x).shape == (3, 68, 2)
    assert guide.gaze(x).shape == (3, 2) and guide.head_pose(x).shape == (3, 3)
    assert guide.identity(x).shape == (3, 16) and guide.style(x).shape == (3, 2 * 44)
    for unit in (guide.identity(x), guide.style(x)):
        torch.testing.assert_close(unit.norm(dim=1), torch.ones(3))


def test_one_pass_reads_what_the_single_methods_read() -> None:
    guide, x = tiny(), pictures()
    seen = guide(x)
    for a, b in zip(guide.scaled(seen.maps), guide.features(x), strict=True):
        torch.testing.assert_close(a, b)
    torch.testing.assert_close(F.normalize(seen.person, dim=1), guide.identity(x))
    torch.testing.assert_close(guide.style_of(seen.maps), guide.style(x))
    torch.testing.assert_close(seen.points, guide.landmarks(x))
    torch.testing.assert_close(seen.gaze, guide.gaze(x))
    torch.testing.assert_close(seen.pose, guide.head_pose(x))


def _weighted_sum(read: torch.Tensor | list[torch.Tensor]) -> torch.Tensor:
    """A number that depends on every value: a sum of squares would not, where the length is 1."""
    values = read if isinstance(read, list) else [read]
    return torch.stack([(v * torch.linspace(-1, 2, v.numel()).view_as(v)).sum() for v in values]
                       ).sum()  # fmt: skip


@pytest.mark.parametrize("reading", READINGS)
def test_every_reading_has_a_gradient_towards_the_picture_and_none_into_the_guide(
    reading: str, tmp_path: Path
) -> None:
    network.save_guide(tmp_path / "guide.safetensors", tiny(), {})
    guide = network.load_guide(tmp_path / "guide.safetensors")
    x = pictures().requires_grad_()
    _weighted_sum(getattr(guide, reading)(x)).backward()
    assert x.grad is not None and bool((x.grad.flatten(1).norm(dim=1) > 0).all())
    assert not any(p.requires_grad for p in guide.parameters())


@pytest.mark.parametrize("reading", ["features", "identity", "style"])
def test_gradients_are_those_of_finite_differences(reading: str) -> None:
    guide, x = tiny(torch.float64), pictures(1).double().requires_grad_()

    def value(image: torch.Tensor) -> torch.Tensor:
        return _weighted_sum(getattr(guide, reading)(image))

    (gradient,) = torch.autograd.grad(value(x), x)
    steepest, step = gradient / gradient.norm(), 1e-2
    with torch.no_grad():
        difference = (value(x + step * steepest) - value(x - step * steepest)) / (2 * step)
    # Readings end in float32, and a ReLU has a kink here and there.
    assert float(difference) == pytest.approx(float(gradient.norm()), rel=0.05)


def test_coordinates_keep_their_precision_under_autocast() -> None:
    guide, x = tiny(), pictures()
    with torch.autocast("cpu", torch.bfloat16):
        seen = guide(x)
    for value in (seen.points, seen.irises, seen.gaze, seen.pose):
        assert value.dtype == torch.float32


def test_critics_enlarge_small_pictures_for_the_guide() -> None:
    guide, small = tiny(), F.avg_pool2d(pictures(), 2)
    large = F.interpolate(small, scale_factor=2, mode="bicubic", align_corners=False)
    seen = Critics({"guide": guide})
    torch.testing.assert_close(seen.landmarks(small), guide.landmarks(large))
    torch.testing.assert_close(seen.identity(small), guide.identity(large))
    with pytest.raises(SettingsError, match="32 px, these have 24"):
        seen.landmarks(pictures()[..., :24, :24])


def test_calibration_brings_every_channel_to_unit_size() -> None:
    guide, x = tiny(), pictures(16)
    guide.calibrate(x)
    for features, raw in zip(guide.features(x), guide(x).maps, strict=True):
        lives = raw.square().mean((0, 2, 3)).sqrt() > network.FLAT
        sizes = features.square().mean((0, 2, 3)).sqrt()
        torch.testing.assert_close(sizes[lives], torch.ones(int(lives.sum())))
        assert bool((sizes[~lives] <= 1).all())


def test_folded_norms_compute_the_same() -> None:
    guide, x = tiny(), pictures()
    wanted = guide(x)
    face_reader.fold_norms(guide)
    assert not any(isinstance(m, nn.BatchNorm2d) for m in guide.modules())
    seen = guide(x)
    torch.testing.assert_close(seen.points, wanted.points, atol=1e-3, rtol=0)
    torch.testing.assert_close(seen.person, wanted.person, atol=1e-4, rtol=1e-4)


def test_file_keeps_sizes_weights_and_notes(tmp_path: Path) -> None:
    path = tmp_path / "deep" / "guide.safetensors"
    network.save_guide(path, tiny(), {"own_errors": {"pose_deg": 0.5}})
    guide, notes = network.open_guide(path)
    assert guide.config == TINY and notes == {"own_errors": {"pose_deg": 0.5}}
    torch.testing.assert_close(guide(pictures()).pose, tiny()(pictures()).pose, atol=0.3, rtol=0.02)


def test_what_is_no_guide_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"is no guide .*training\.guides"):
        network.load_guide(tmp_path / "guide.safetensors")
    with pytest.raises(SettingsError, match="is no guide"):
        network.load_guide(ROOT / "checkpoints" / "judge.safetensors")


def test_who_it_is_does_not_depend_on_motion_room_or_clothes() -> None:
    """The columns of the looks, against the renderer's own order of parameters."""
    rng = np.random.default_rng(3)
    person = faces.sample_identity(rng)
    elsewhere = dataclasses.replace(
        person, clothes=person.clothes[::-1], trim=person.trim[::-1], neckline=0.3, stripes=22.0,
        backdrop=(person.backdrop + 1) % 5, backdrop_colours=person.backdrop_colours[::-1],
        light_deg=person.light_deg + 9, light=person.light * 0.9,
    )  # fmt: skip
    rows = [faces.parameters(who, faces.sample_motion(rng), faces.sample_camera(rng))
            for who in (person, elsewhere)]  # fmt: skip
    looks = [row[guides.PERSON_COLUMNS] for row in rows]
    np.testing.assert_array_equal(*looks)
    for name in ("shape", "skin", "hair", "iris", "lips", "hair_shape"):
        other = dataclasses.replace(person, **{name: getattr(person, name) * 0.5})
        row = faces.parameters(other, faces.sample_motion(rng), faces.sample_camera(rng))
        assert np.sum(row[guides.PERSON_COLUMNS] != looks[0]) == len(getattr(person, name))
    for name in ("beard", "freckles", "lipstick", "lines"):
        other = dataclasses.replace(person, **{name: 0.123})
        row = faces.parameters(other, faces.sample_motion(rng), faces.sample_camera(rng))
        assert np.sum(row[guides.PERSON_COLUMNS] != looks[0]) == 1


def test_a_lesson_has_two_frames_of_each_person(pool: Pool) -> None:
    recipe = guides.GuideRecipe(pool="", batch=12)
    lesson = guides.draw_lesson(pool, 4, recipe, np.random.default_rng(0))
    np.testing.assert_array_equal(lesson.looks[0::2], lesson.looks[1::2])
    assert (lesson.gaze[0::2] != lesson.gaze[1::2]).any(1).all()
    assert np.abs(lesson.gaze).max() <= np.deg2rad(max(faces.GAZE_RANGE_DEG)) + 1e-6


def test_painting_over_leaves_the_person(pool: Pool) -> None:
    images, labels = pool.images[:, 0], pool.labels[:, 0]
    made = guides.painted_over(images, labels, 1.0, np.random.default_rng(1))
    kept = (labels != guides.BACKGROUND_LABEL) & (labels != guides.CLOTHES_LABEL)
    np.testing.assert_array_equal(made[kept], images[kept])
    room = labels == guides.BACKGROUND_LABEL
    assert (made[room] != images[room]).any(1).mean() > 0.5
    again = guides.painted_over(images, labels, 0.0, np.random.default_rng(1))
    np.testing.assert_array_equal(again, images)


def test_contrast_falls_when_partners_meet() -> None:
    apart = torch.eye(6)
    together = torch.eye(6)[[0, 0, 2, 2, 4, 4]]
    assert guides.contrast(together, 0.1) < 0.01
    # Every row at right angles to all others: 5 that it could be, by chance.
    assert float(guides.contrast(apart, 0.1)) == pytest.approx(np.log(5))
    assert guides.contrast(together[[0, 2, 4, 1, 3, 5]], 0.1) > 5


def test_verification_against_counting() -> None:
    names = np.array([0, 0, 1, 1])
    angles = np.deg2rad([0, 40, 30, 100])
    person = np.c_[np.cos(angles), np.sin(angles)]
    # Cosines, nearest first: 1-2 (10, other), 0-2 (30, other), 0-1 (40, same), 1-3 (60, other),
    # 2-3 (70, same), 0-3 (100, other): of 2 * 4 pairs of pairs, 2 + 1 are in the right order.
    area, rate = guides.verification(person, names)
    assert area == pytest.approx(3 / 8) and rate == pytest.approx(0.5)
    assert guides.verification(np.eye(2)[names], names) == (1.0, 0.0)


def test_guide_learns_rendered_faces(pool: Pool) -> None:
    recipe = guides.GuideRecipe(pool="", batch=12, eye_shift_px=0.3)
    torch.manual_seed(0)
    rng = np.random.default_rng(0)
    both = nn.ModuleList([network.Guide(TINY), nn.Linear(16, len(guides.PERSON_COLUMNS))])
    optimizer = torch.optim.AdamW(both.parameters(), lr=4e-3)
    lesson = guides.draw_lesson(pool, 6, recipe, rng)
    values = [guides._step(both, optimizer, lesson, recipe, rng) for _ in range(12)]
    assert np.mean(values[-3:]) < 0.85 * values[0]


def test_command_writes_a_measured_guide(
    folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(
        f'pool = "{folder}"\nweights = "{tmp_path}/guide.safetensors"\nheld_out = 2\nimages = 8\n'
        "batch = 4\n[sizes]\nblock_size = 1\nchannels = [8, 8, 12, 16]\neye_px = 8.0\n"
    )
    monkeypatch.setattr("sys.argv", ["guides", str(recipe)])
    guides.main()
    guide, notes = network.open_guide(tmp_path / "guide.safetensors")
    assert guide.config.image_size == 32 and notes["recipe"]["images"] == 8
    assert {"landmark_px", "gaze_deg", "pose_deg", "identity_auc"} <= set(notes["own_errors"])
    json.dumps(notes, allow_nan=False)


def test_shipped_guide_is_small_reads_strangers_and_is_not_the_judge() -> None:
    guide, notes = network.open_guide(SHIPPED)
    judge, judged = load_judge(ROOT / "checkpoints" / "judge.safetensors")
    assert SHIPPED.stat().st_size < 1_500_000
    assert notes["recipe"]["seed"] != judged["recipe"]["seed"]
    assert not set(guide.config.channels) & set(judge.config.channels)
    errors = notes["own_errors"]
    assert errors["landmark_px"] < 2.5 and errors["pose_deg"] < 3 and errors["gaze_deg"] < 5
    assert errors["identity_auc"] > 0.98
