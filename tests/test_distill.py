"""Few-step students: the walk they practise is the runtime's, and counts are practised by share."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch

from diffusionact.errors import SettingsError
from diffusionact.training.config import CriteriaRecipe, StudentRecipe, parse_recipe
from diffusionact.training.critics import Critics
from diffusionact.training.diffusion import render
from diffusionact.training.distill.counts import step_count
from diffusionact.training.distill.sampler import last_terms, rollout
from diffusionact.training.losses import texture_distance
from diffusionact.training.models import FACE128, UNet

pytestmark = pytest.mark.torch

TINY = replace(FACE128, image_size=16, channels=8, channel_mult=(1, 2), encoder_mult=(1, 2),
               attention_at=(4,), embed=16)  # fmt: skip
STEPS = [150, 300, 550, 980]
FLOAT32_TOLERANCE = 1e-5
RECIPE = """
name = "tiny"
network = "face128"
[pool]
folder = "nowhere"
[student]
steps = 2
render = {{ "2" = [300, 980], "1" = {one} }}
shares = {shares}
[[stages]]
kind = "student"
images = 8
"""


@pytest.fixture
def state() -> Any:
    torch.manual_seed(0)
    unet = UNet(TINY)
    for parameter in unet.parameters():  # zeroed outputs would make every picture grey
        torch.nn.init.normal_(parameter, std=0.05)
    return cast(Any, SimpleNamespace(live={"unet": unet}, config=TINY))


def test_the_walk_ends_at_the_picture_that_the_sampler_renders(state: Any) -> None:
    x_T, z = torch.randn(2, 3, 16, 16), torch.randn(2, 16)
    with torch.no_grad():
        estimates = rollout(state, x_T, z, STEPS)
        rendered = render(state.live["unet"], TINY.prediction, x_T, z, STEPS)
    assert len(estimates) == len(STEPS)
    last = estimates[-1].clamp(-1, 1)
    torch.testing.assert_close(last, rendered, rtol=0, atol=FLOAT32_TOLERANCE)
    assert not torch.allclose(estimates[0], estimates[-1], atol=1e-3), "the steps do nothing"


def test_a_step_learns_from_its_own_estimate_alone(state: Any) -> None:
    """The gradient of the last estimate is that of the last step with its x_t given."""
    x_T, z = torch.randn(1, 3, 16, 16), torch.randn(1, 16, requires_grad=True)
    unet = state.live["unet"]
    seen: list[torch.Tensor] = []
    unet.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    last = rollout(state, x_T, z, STEPS)[-1]
    assert not any(x.requires_grad for x in seen)
    (through,) = torch.autograd.grad(last.square().sum(), z)
    alone = z.detach().clone().requires_grad_()
    again = unet(seen[-1], torch.tensor([STEPS[0]]), alone)
    (expected,) = torch.autograd.grad(again.square().sum(), alone)
    torch.testing.assert_close(through, expected)


def test_texture_counts_missing_detail_and_forgives_a_shift() -> None:
    """Against NumPy on one picture; a blurred picture is farther from the truth than a moved one,
    which is what the squared error gets the other way round."""
    generator = torch.Generator().manual_seed(0)
    target = torch.rand(1, 3, 24, 24, generator=generator) - 0.5
    blurred = torch.nn.functional.avg_pool2d(target, 3, 1, 1, count_include_pad=False)
    weight = torch.ones(1, 1, 24, 24)
    assert texture_distance(target, target, weight).item() == 0
    moved = target.roll(1, dims=3)
    assert texture_distance(moved, target, weight) < 0.5 * texture_distance(blurred, target, weight)
    assert (moved - target).square().mean() > (blurred - target).square().mean()

    def strength(picture: np.ndarray[Any, Any], side: int) -> np.ndarray[Any, Any]:
        near = np.pad(picture, 1, mode="edge")
        fine = picture - (near[:-2, 1:-1] + near[2:, 1:-1] + near[1:-1, :-2] + near[1:-1, 2:]) / 4
        half, rows = side // 2, range(24)
        return np.array([
            [np.sqrt((fine[max(i - half, 0):i + half + 1, max(j - half, 0):j + half + 1] ** 2).mean()
                     + 1e-4) for j in rows] for i in rows
        ])  # fmt: skip

    expected = np.mean([
        np.abs(strength(blurred[0, c].numpy(), side) - strength(target[0, c].numpy(), side)).mean()
        for side in (3, 7) for c in range(3)
    ])  # fmt: skip
    assert texture_distance(blurred, target, weight).item() == pytest.approx(expected, rel=1e-4)


def test_counts_are_practised_in_their_shares_and_evenly() -> None:
    student = StudentRecipe(
        render={"4": STEPS, "2": [300, 980], "1": [980]}, shares=[0.6, 0.3, 0.1]
    )
    drawn = [step_count(student, step) for step in range(1000)]
    assert Counter(drawn) == pytest.approx({"4": 600, "2": 300, "1": 100}, abs=6)
    assert len(set(drawn[:12])) == 3, "every count comes early"


def test_a_student_recipe_is_read_and_a_wrong_one_is_refused() -> None:
    recipe = parse_recipe(RECIPE.format(one="[980]", shares="[0.5, 0.5]"))
    assert recipe.student.render == {"2": [300, 980], "1": [980]}
    with pytest.raises(SettingsError, match="which are 2 steps"):
        parse_recipe(RECIPE.format(one="[300, 980]", shares="[0.5, 0.5]"))
    with pytest.raises(SettingsError, match="shares"):
        parse_recipe(RECIPE.format(one="[980]", shares="[1.0]"))
    good = RECIPE.format(one="[980]", shares="[0.5, 0.5]")
    for line, message in (('method = "magic"', "wanted one of 'sampler'"),
                          ("[[stages]]\nkind = 'student'\nimages = 8\ninverter = true",
                           "in all or in none")):  # fmt: skip
        with pytest.raises(SettingsError, match=message):
            parse_recipe(f"{good}\n{line}")
    with pytest.raises(SettingsError, match="no render"):
        parse_recipe(
            RECIPE.split("[student]")[0].format() + '[[stages]]\nkind = "student"\nimages = 1'
        )


def test_the_last_estimate_is_held_against_the_teachers_picture_and_the_losses(state: Any) -> None:
    """Each with its own weight, and no gradient into the teacher."""
    torch.manual_seed(1)
    unet, code = UNet(TINY), torch.randn(2, 16)
    for parameter in unet.parameters():
        torch.nn.init.normal_(parameter, std=0.05)
    state.teacher = SimpleNamespace(unet=unet, prediction="x0", code=lambda source, drawing: code)
    state.critics = Critics({})
    last, target, eps = torch.randn(3, 2, 3, 16, 16)
    weight = torch.rand(2, 1, 16, 16)
    sample = cast(Any, SimpleNamespace(target=target, source=target, condition=target, eps=eps,
                                       weight=weight, labels=None, source_points=None,
                                       keypoints=torch.zeros(2, 70, 2)))  # fmt: skip
    plain = parse_recipe(RECIPE.format(one="[980]", shares="[0.5, 0.5]"))
    none = CriteriaRecipe(**dict.fromkeys(vars(CriteriaRecipe()), 0.0))
    only_pixels = replace(plain, criteria=replace(none, pixel=20.0))
    assert last_terms(state, sample, plain, last) == (torch.zeros(()), {})
    asked = replace(only_pixels, student=replace(plain.student, teacher=0.5, criteria=2.0))
    last.requires_grad_()
    total, parts = last_terms(state, sample, asked, last)
    with torch.no_grad():
        taught = render(unet, "x0", eps, code, plain.student.teacher_steps)
        squares = (weight * (last - taught) ** 2).mean()
        pixels = (last.clamp(-1, 1) - target).abs().mean()
    assert parts["teacher"].item() == pytest.approx(squares.item(), rel=1e-5)
    assert total.item() == pytest.approx((0.5 * squares + 2.0 * 20.0 * pixels).item(), rel=1e-5)
    total.backward()
    assert last.grad is not None and bool(last.grad.any())
    assert all(p.grad is None for p in unet.parameters())
