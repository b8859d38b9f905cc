"""A few-step student: what its weights file says, and a bundle that knows no other counts."""

from __future__ import annotations

import dataclasses
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusionact import cli, manifest
from diffusionact.commands.eval.methods import Models, Setup
from diffusionact.errors import BundleError, SettingsError
from diffusionact.manifest import Manifest, Sampling
from diffusionact.runtime.loop import open_loop, runs
from diffusionact.runtime.reenactor import Reenactor
from diffusionact.runtime.settings import Settings
from diffusionact.training import weights
from diffusionact.training.models import FACE128, UNet

pytestmark = pytest.mark.torch

TINY = dataclasses.replace(FACE128, image_size=32, channels=8, attention_at=(4,), embed=16)
TEACHER = "ab" * 32
RENDER = Sampling(4, (1, 2, 4), {"4": (300, 550, 800, 980), "2": (500, 980), "1": (980,)})
INVERT = Sampling(3, (3,), {"3": (200, 500, 800)})
STUDENT = weights.Student(TEACHER, RENDER, INVERT)


def save(path: Path, student: weights.Student | None) -> Path:
    torch.manual_seed(0)
    weights.save(path, TINY, {"render": UNet(TINY)}, provenance={}, student=student)
    return path


def test_the_weights_file_keeps_the_student(tmp_path: Path) -> None:
    loaded = weights.load(save(tmp_path / "w.safetensors", STUDENT))
    assert loaded.student == STUDENT and loaded.student is not None
    assert loaded.student.render.timesteps["2"] == (500, 980)
    assert weights.load(save(tmp_path / "t.safetensors", None)).student is None


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"of": "teacher.safetensors"}, "wanted the SHA-256 of the teacher's weights"),
        ({"render": Sampling(4, (2,), {"4": (1, 2, 3, 4)})}, r"render.timesteps.* not so of \[2\]"),
        ({"invert": Sampling(2, (), {"2": (1, 2, 3)})}, r"invert.timesteps.* not so of \[2\]"),
        ({"invert": Sampling(2, (), {"2": (9, 2)})}, "ascending"),
        ({"invert": Sampling(1, (), {"1": (1000,)})}, r"0\.\.999"),
    ],
)
def test_a_student_says_all_of_its_counts(change: dict[str, object], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        dataclasses.replace(STUDENT, **change)  # type: ignore[arg-type]


def test_damaged_metadata_is_named(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(weights, "asdict", lambda student: {"of": student.of})
    path = save(tmp_path / "w.safetensors", STUDENT)
    with pytest.raises(SettingsError, match=r"w\.safetensors: .* damaged .*render is missing"):
        weights.load(path)


# The bundle


@pytest.fixture(scope="module")
def bundle(toy_bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The toy bundle, as if it had been distilled."""
    made = tmp_path_factory.mktemp("student") / "student.bundle"
    shutil.copytree(toy_bundle, made)
    plan = dataclasses.replace(
        manifest.read(toy_bundle), student_of=TEACHER, render=RENDER, invert=INVERT
    )
    manifest.write(made, plan)
    return made


@pytest.fixture(scope="module")
def described(bundle: Path) -> Manifest:
    return manifest.read(bundle)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"student_of": "abc"}, "student_of 'abc': wanted the SHA-256"),
        ({"weights_sha256": TEACHER}, "the teacher's own weights"),
        ({"render": Sampling(4, (2,), RENDER.timesteps | {"3": (1, 2, 3)})}, ""),
        ({"render": dataclasses.replace(RENDER, choices=(8,))}, r"not so of \[8\]"),
        ({"invert": Sampling(20)}, r"invert.timesteps: .* not so of \[20\]"),
    ],
)
def test_a_bundle_that_contradicts_itself(
    described: Manifest, change: dict[str, object], message: str
) -> None:
    plan = dataclasses.replace(described, **change)  # type: ignore[arg-type]
    if not message:
        manifest.check(plan)
        return
    with pytest.raises(BundleError, match=message):
        manifest.check(plan)


def test_every_count_has_its_own_timesteps(bundle: Path, described: Manifest) -> None:
    """In one loop and in loops of their own, which give the same frames."""
    shape = (1, 3, described.image_size, described.image_size)
    x_T = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
    z = np.ones((1, described.z_size), np.float32)
    several = open_loop(bundle, described, also=described.render.choices, device="cpu")
    frames = {}
    for count, listed in RENDER.timesteps.items():
        assert runs(described, int(count))[0].timesteps.tolist() == list(listed)
        one = open_loop(bundle, described, steps=listed, device="cpu")
        several.set_steps(int(count))
        frames[count] = several.render(x_T, z).copy()
        np.testing.assert_array_equal(frames[count], one.render(x_T, z))
    assert not np.array_equal(frames["1"], frames["2"])
    up = runs(described)[1]
    assert up.timesteps.tolist() == [200, 500, 800] and up.alpha_bar_to[-1] == 0.0


@pytest.mark.parametrize(
    "words", [["bench"], ["eval", "self", "--identities", "1", "--bundle"]], ids=lambda w: w[0]
)
def test_another_count_is_refused_and_the_teacher_is_named(
    bundle: Path, capsys: pytest.CaptureFixture[str], words: list[str]
) -> None:
    assert cli.main([*words, str(bundle), "--backend", "ort", "--steps", "20", "-q"]) == 2
    told = capsys.readouterr().err
    assert "steps=20" in told and "renders in 1, 2, 4 steps alone" in told
    assert TEACHER[:12] in told and "diffusionact export TEACHER.safetensors" in told


def test_timesteps_of_ones_own_are_taken(described: Manifest) -> None:
    assert runs(described, (100, 980))[0].timesteps.tolist() == [100, 980]
    with pytest.raises(SettingsError, match="inverts in 3 steps alone"):
        described.invert_at(20)


def test_a_goal_has_the_students_counts_to_choose_from(bundle: Path) -> None:
    settings = Settings(backend="ort", threads=1, step_choices=None)
    with Reenactor.load(bundle, device="cpu", settings=settings) as act:
        assert act.prepared_steps == (1, 2, 4)


def test_the_evaluation_inverts_as_the_manifest_lists(bundle: Path) -> None:
    with Models((4,), threads=1) as models:
        with pytest.raises(SettingsError, match="inverts in 3 steps alone"):
            models.of(Setup(bundle, 4, "ort", invert_steps=10))
        act = models.of(Setup(bundle, 4, "ort", invert_steps=3)).act
        assert act.manifest.invert_at().tolist() == [200, 500, 800]
