"""A student's run: from the teacher's weights to weights that say how the student is run."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from diffusionact.errors import SettingsError
from diffusionact.manifest import file_sha256
from diffusionact.training import loop, state, weights
from diffusionact.training.config import Recipe, parse_recipe
from diffusionact.training.models import FACE128, ReenactmentEncoder, SemanticEncoder, UNet
from diffusionact.training.world import alone
from tests.test_training import stop_after, write_pool

pytestmark = pytest.mark.torch

TINY = replace(FACE128, image_size=16, channels=8, channel_mult=(1, 2), encoder_mult=(1, 2),
               attention_at=(4,), embed=16)  # fmt: skip
STAGE = """
[[stages]]
kind = "student"
method = "{method}"
images = 8
batch = 4
cached_noise = 0.5
cached_from = 0.0
inverter = {inverter}
"""
RECIPE = """
name = "tiny"
network = "tiny"
weights = "student.safetensors"
start = "teacher.safetensors"
[pool]
folder = "pool"
identities = 6
held_out = 2
size = 16
[inversions]
steps = [150, 550]
capacity = 8
fill = 4
batch = 4
[student]
of = "teacher.safetensors"
steps = 2
render = { "2" = [150, 550], "1" = [550] }
shares = [0.6, 0.4]
substeps = 2
teacher = 0.5
teacher_steps = 4
[loop]
log_every_steps = 1
fused_norm = false
bf16 = false
evaluation_pairs = 2
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(state, "PRESETS", {"tiny": TINY})
    monkeypatch.chdir(tmp_path)
    write_pool(tmp_path / "pool", side=16)
    torch.manual_seed(0)
    parts = {"render": UNet(TINY), "encoder": SemanticEncoder(TINY),
             "reenactment": ReenactmentEncoder(TINY)}  # fmt: skip
    weights.save("teacher.safetensors", TINY, parts, provenance={})
    return tmp_path


def recipe(method: str, *, inverter: bool = False, rounds: str = "") -> Recipe:
    stage = STAGE.format(method=method, inverter=str(inverter).lower())
    return parse_recipe(RECIPE + stage + rounds)


@pytest.mark.parametrize(
    ("method", "inverter"), [("sampler", False), ("consistency", True), ("progressive", True)]
)
def test_a_run_ends_in_weights_that_say_how_the_student_is_run(
    folder: Path, method: str, inverter: bool
) -> None:
    described = recipe(method, inverter=inverter)
    run = loop.Trainer(described, folder / "run", alone(torch.device("cpu")))
    assert run.run()
    loop.finish(run.state, described, Path(described.weights))
    made, teacher = weights.load("student.safetensors"), weights.load("teacher.safetensors")
    assert made.student is not None
    assert made.student.of == file_sha256(Path("teacher.safetensors"))
    assert made.student.render.at(1).tolist() == [550]
    assert made.student.render.at().tolist() == made.student.invert.at().tolist() == [150, 550]
    assert ("invert" in made.parts) == inverter
    before = {"invert": teacher.parts["render"], **teacher.parts}
    moved = {name for name in made.parts for key, value in made.parts[name].items()
             if not torch.equal(value, before[name][key])}  # fmt: skip
    still = {"sampler": {"encoder"}}.get(method, {"encoder", "reenactment"})
    assert moved == set(made.parts) - still


def test_a_round_that_is_taken_up_again_has_the_teacher_it_began_with(folder: Path) -> None:
    described = recipe("progressive", rounds=STAGE.format(method="progressive", inverter="false")
                       + "render = [550]\n")  # fmt: skip
    run = loop.Trainer(described, folder / "run", alone(torch.device("cpu")))
    run.state.progress.stage = 1
    run._begin(described.stages[1])
    began = {key: value.clone() for key, value in run.state.ema["unet"].state_dict().items()}
    with torch.no_grad():
        for parameter in run.state.ema["unet"].parameters():
            parameter.add_(1)
    run.state.progress.step = 1
    run.save()
    again = loop.Trainer(described, folder / "run", alone(torch.device("cpu")))
    again.resume()
    again._begin(described.stages[1])
    assert again.state.before is not None
    for key, value in again.state.before["unet"].state_dict().items():
        assert torch.equal(value, began[key]), key


@pytest.mark.parametrize("method", ["sampler", "consistency", "progressive"])
def test_a_student_of_fine_tuned_weights_is_taken_up_again(folder: Path, method: str) -> None:
    """They have an inverter of their own, which the student puts away and no checkpoint holds."""
    parts = {name: weights.load("teacher.safetensors").network(name)
             for name in ("render", "encoder", "reenactment")}  # fmt: skip
    weights.save("teacher.safetensors", TINY, {**parts, "invert": UNet(TINY)}, provenance={})
    described, alone_here = recipe(method), alone(torch.device("cpu"))
    whole = loop.Trainer(described, folder / "whole", alone_here)
    assert whole.state.invert is not None
    assert whole.run()
    first = loop.Trainer(described, folder / "run", alone_here)
    stop_after(first, 1)
    assert not first.run()
    again = loop.Trainer(described, folder / "run", alone_here)
    again.resume()
    assert again.run() and again.state.invert is None
    for name, value in whole.state.ema.state_dict().items():
        assert torch.equal(again.state.ema.state_dict()[name], value), name


def test_a_student_of_nobody_is_refused(folder: Path) -> None:
    nobody = replace(recipe("sampler"), start="")
    with pytest.raises(SettingsError, match="no start, .*begin from random weights"):
        loop.Trainer(nobody, folder / "run", alone(torch.device("cpu")))


def test_a_teacher_that_is_not_there_ends_the_run_before_it_begins(folder: Path) -> None:
    described = recipe("consistency")
    wrong = replace(described, student=replace(described.student, of="nobody.safetensors"))
    with pytest.raises(SettingsError, match=r"nobody\.safetensors"):
        loop.Trainer(wrong, folder / "run", alone(torch.device("cpu")))
