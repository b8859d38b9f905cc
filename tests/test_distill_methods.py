"""Consistency and progressive distillation: their targets against the teacher's own steps, the
exact few-step map of a linear toy as their fixed point, and a gradient into the student alone."""

from __future__ import annotations

import itertools
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, cast

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffusionact.errors import SettingsError
from diffusionact.schedule import Prediction, prediction_target
from diffusionact.training.config import Recipe, load_recipe, parse_recipe
from diffusionact.training.diffusion import TABLE, invert, render
from diffusionact.training.distill import consistency, progressive
from diffusionact.training.distill.counts import inversion_steps
from diffusionact.training.distill.segments import (
    Denoiser,
    Segments,
    divided,
    moved,
    one_step_target,
    segments,
    start_state,
)
from diffusionact.training.distill.sides import Side
from diffusionact.training.models import FACE128, UNet
from diffusionact.training.stages.sample import Sample, part_of

pytestmark = pytest.mark.torch

RECIPES = Path(__file__).parents[1] / "training" / "recipes"
KINDS: tuple[Prediction, ...] = ("x0", "v", "eps")
TINY = replace(FACE128, image_size=16, channels=8, channel_mult=(1, 2), encoder_mult=(1, 2),
               attention_at=(4,), embed=16)  # fmt: skip
DOWN, UP = [150, 300, 550, 980], [150, 300, 550, 800]
FLOAT32_TOLERANCE = 1e-5
EXACT = 1e-12  # a squared error that float32 rounds to nothing
SPREAD = 0.3  # standard deviation of the toy's pictures: nothing of them is clipped


class Linear(nn.Module):
    """Sees the picture gain(t) x in x_t, whatever it has to predict."""

    def __init__(self, kind: Prediction, gains: dict[int, float]) -> None:
        super().__init__()
        table = torch.zeros(1000, dtype=torch.float64)
        for t, gain in gains.items():
            table[t] = gain
        self.kind, self.gain = kind, nn.Parameter(table)

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        level = torch.from_numpy(TABLE)[t].view(-1, 1, 1, 1)
        x_0 = self.gain[t].view(-1, 1, 1, 1) * x
        eps = (x - level.sqrt() * x_0) / (1 - level).sqrt()
        predicted: Tensor = prediction_target(self.kind, x_0, eps, level)
        return predicted


def optimal_gain(level: float) -> float:
    """Of x_0 ~ N(0, SPREAD^2): E[x_0 | x_t] = gain x_t."""
    return float(np.sqrt(level) * SPREAD**2 / (level * SPREAD**2 + 1 - level))


def factor(gain: float, level: float, level_to: float) -> float:
    """What a step multiplies x by. Source: DDIM, Eq. 12."""
    noise = (1 - np.sqrt(level) * gain) / np.sqrt(1 - level)
    return float(np.sqrt(level_to) * gain + np.sqrt(1 - level_to) * noise)


def gain_for(wanted: float, level: float, level_to: float) -> float:
    """The gain with which one step multiplies x by `wanted`."""
    none, one = factor(0.0, level, level_to), factor(1.0, level, level_to)
    return (wanted - none) / (one - none)


def exact_gains(table: Segments) -> dict[int, float]:
    """For every teacher's timestep, what a student has to see there to reach the end of its segment
    in one step, where the teacher sees the optimal gain."""
    gains: dict[int, float] = {}
    t, level, level_to = (part.tolist() for part in (table.t, table.level, table.level_to))
    for row in range(len(t)):
        product = 1.0
        for k in reversed(range(len(t[row]))):
            product *= factor(optimal_gain(level[row][k]), level[row][k], level_to[row][k])
            gains[t[row][k]] = gain_for(product, level[row][k], level_to[row][-1])
    return gains


def toy(kind: Prediction, *, up: bool, gains: dict[int, float] | None = None) -> Side:
    """Student and average with these gains, by default the exact ones; the optimal teacher."""
    steps = UP if up else DOWN
    table = segments(steps, divided(steps, 3, up=up), up=up)
    z = torch.zeros(1, 1)
    student = Linear(kind, exact_gains(table) if gains is None else gains)
    teacher = Linear(kind, {int(t): optimal_gain(TABLE[t]) for t in table.t.flatten()})
    return Side(*(Denoiser(net, kind, z) for net in (student, student, teacher)), table)


def drawn(count: int, scale: float = 0.05) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(0)
    picture, eps = torch.randn(2, count, 3, 4, 4, generator=generator, dtype=torch.float64) * scale
    return picture, eps, torch.ones(count, 1, 4, 4, dtype=torch.float64)


def network(kind: Prediction, seed: int = 0) -> UNet:
    torch.manual_seed(seed)
    unet = UNet(replace(TINY, prediction=kind))
    for parameter in unet.parameters():  # zeroed outputs would make every picture grey
        torch.nn.init.normal_(parameter, std=0.1)
    return unet.requires_grad_(False).eval()


# Segments


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("up", [False, True])
def test_the_finer_steps_are_the_walk_of_the_sampler(kind: Prediction, up: bool) -> None:
    steps = UP if up else DOWN
    finer = sorted({*divided(steps, 2, up=up), 330})  # one segment is longer than the others
    table = segments(steps, finer, up=up)
    assert table.shape == (4, 3)
    x, z, unet = torch.randn(2, 3, 16, 16), torch.randn(2, 16), network(kind)
    walked, denoiser = x, Denoiser(unet, kind, z)
    for step, k in itertools.product(range(4), range(3)):
        place = table.at(torch.full((2,), step), k)
        walked = denoiser.move(walked, place, place.level_to)
    with torch.no_grad():
        expected = (invert if up else render)(unet, kind, x, z, finer)
    torch.testing.assert_close(walked, expected, rtol=0, atol=1e-4)  # still steps round twice


def test_a_run_begins_with_noise_alone_or_the_picture_alone() -> None:
    picture, eps, _ = drawn(2)
    for up, begin in ((False, eps), (True, picture)):
        steps = UP if up else DOWN
        table = segments(steps, divided(steps, 3, up=up), up=up)
        first = start_state(picture, eps, table.at(torch.tensor([0, 1]), 0), up=up)
        assert torch.equal(first[0], begin[0])
        level = TABLE[steps[1] if up else steps[-2]]
        mixed = np.sqrt(level) * picture[1] + np.sqrt(1 - level) * eps[1]
        torch.testing.assert_close(first[1], mixed)


def test_a_teacher_that_passes_over_a_step_is_refused() -> None:
    for finer in ([150, 300, 980], [*DOWN, 990]):
        with pytest.raises(SettingsError, match="no part of"):
            segments(DOWN, finer, up=False)
    assert divided([0, 500], 2, up=False) == [0, 250, 500]
    assert divided([150, 575], 2, up=True) == [150, 362, 575, 788]


# Progressive


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("up", [False, True])
def test_one_step_with_the_target_leads_where_the_teacher_leads(kind: Prediction, up: bool) -> None:
    """Salimans & Ho, Algorithm 2: exactly two of the teacher's steps, in either direction."""
    steps = UP if up else DOWN
    table, unet = segments(steps, divided(steps, 2, up=up), up=up), network(kind)
    x, teacher = torch.randn(4, 3, 16, 16), Denoiser(unet, kind, torch.randn(4, 16))
    first, second = table.at(torch.arange(4), 0), table.at(torch.arange(4), 1)
    reached = teacher.move(teacher.move(x, first, first.level_to), second, second.level_to)
    target = one_step_target(x, reached, first.level, first.end)
    again = moved(x, target, first.level, first.end)
    torch.testing.assert_close(again, reached, rtol=FLOAT32_TOLERANCE, atol=FLOAT32_TOLERANCE)
    assert not torch.allclose(target, teacher.estimate(x, first), atol=1e-3), "one step would do"


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("up", [False, True])
def test_a_round_learns_the_exact_map_of_the_toy(kind: Prediction, up: bool) -> None:
    side = toy(kind, up=up, gains=dict.fromkeys(UP if up else DOWN, 0.1))
    picture, eps, weight = drawn(32)
    spread = (torch.arange(32) + 0.5) / 32
    student = cast(Linear, side.live.unet)
    error = progressive.step_error(side, 3 * picture, 3 * eps, spread, weight)
    (slope,) = torch.autograd.grad(error, student.gain, create_graph=True)
    (curvature,) = torch.autograd.grad(slope.sum(), student.gain)
    best = (student.gain - slope / curvature).tolist()  # the error is a parabola in each gain
    exact = exact_gains(side.segments)
    for t in UP if up else DOWN:
        assert best[t] == pytest.approx(exact[t], rel=1e-4), t


# Consistency


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("up", [False, True])
def test_the_exact_leaps_of_the_toy_are_consistent_and_no_others(
    kind: Prediction, up: bool
) -> None:
    """Zero for the map that the teacher's many steps are, at every one of its steps; and that map
    renders and inverts in four steps as the teacher does in twelve."""
    side = toy(kind, up=up)
    steps = side.segments.shape[0] * side.segments.shape[1]
    picture, eps, weight = drawn(steps)
    spread = (torch.arange(steps) + 0.5) / steps
    error = consistency.leap_error(side, picture, eps, spread, weight).detach()
    assert float(error) < EXACT
    walk = invert if up else render
    student, teacher = side.live.unet, side.teacher.unet
    few = walk(student, kind, picture, side.live.z, UP if up else DOWN)
    many = walk(teacher, kind, picture, side.live.z, side.segments.t.flatten().sort()[0].tolist())
    torch.testing.assert_close(few, many)
    as_taught = replace(side, live=side.teacher, average=side.teacher)
    wrong = consistency.leap_error(as_taught, picture, eps, spread, weight).detach()
    assert float(wrong) > 1e4 * EXACT


def by_hand(unet: nn.Module, kind: Prediction, x: Tensor, t: int, ends: tuple[float, float]) -> Any:
    """One step of the sampler in NumPy, its picture clipped."""
    with torch.no_grad():
        said = unet(x.float(), torch.tensor([t]), torch.ones(1, 16)).double().numpy()
    alpha, sigma = np.sqrt(ends[0]), np.sqrt(1 - ends[0])
    x_t = x.double().numpy()
    x_0 = {"x0": said, "v": alpha * x_t - sigma * said, "eps": (x_t - sigma * said) / alpha}[kind]
    x_0 = np.clip(x_0, -1, 1)
    eps = (x_t - alpha * x_0) / sigma
    return np.sqrt(ends[1]) * x_0 + np.sqrt(1 - ends[1]) * eps


@pytest.mark.parametrize("kind", KINDS)
def test_the_consistency_error_against_a_computation_by_hand(kind: Prediction) -> None:
    """Rendering, from the middle of the segment 550 -> 300: 467 -> 383 by the teacher, then both
    leap to 300."""
    nets = [network(kind, seed) for seed in (1, 2, 3)]
    live, average, teacher = nets
    table = segments(DOWN, divided(DOWN, 3, up=False), up=False)
    assert table.t[1].tolist() == [550, 467, 383]
    z = torch.ones(1, 16)
    side = Side(*(Denoiser(net, kind, z) for net in nets), table)
    picture, eps = torch.rand(1, 3, 16, 16) - 0.5, torch.randn(1, 3, 16, 16)
    weight = torch.rand(1, 1, 16, 16)
    found = consistency.leap_error(side, picture, eps, torch.tensor([4.5 / 12]), weight)
    begin, here, after, end = (float(TABLE[t]) for t in (550, 467, 383, 300))
    x = np.sqrt(here) * picture + np.sqrt(1 - here) * eps
    leapt = by_hand(live, kind, x, 467, (here, end))
    nearer = torch.from_numpy(by_hand(teacher, kind, x, 467, (here, after)))
    wanted = by_hand(average, kind, nearer, 383, (after, end))
    unit = np.sqrt(end) - np.sqrt(begin) * np.sqrt((1 - end) / (1 - begin))
    expected = (weight.numpy() * ((leapt - wanted) / unit) ** 2).mean()
    assert float(found) == pytest.approx(float(expected), rel=1e-3)


def test_inversion_that_undoes_rendering_is_preserved_and_no_other() -> None:
    kind: Prediction = "x0"
    down = toy(kind, up=False)
    pairs = consistency.shared(DOWN, UP)
    assert pairs == [(150, 300), (300, 550)]
    exact = exact_gains(down.segments)
    gains = {}
    for low, high in pairs:
        there = factor(exact[high], TABLE[high], TABLE[low])
        gains[low] = gain_for(1 / there, TABLE[low], TABLE[high])
    picture, eps, weight = drawn(8)
    spread = (torch.arange(8).double() + 0.5) / 8
    ends = consistency.ends(pairs, spread)
    for scale, kept in ((1.0, True), (1.02, False)):
        up = toy(kind, up=True, gains={t: scale * gain for t, gain in gains.items()})
        with torch.no_grad():
            both = consistency.preservation(up, down, picture, eps, ends, weight)
        assert all((float(error) < EXACT) == kept for error in both), (scale, both)


def test_preservation_moves_the_second_of_the_two_alone() -> None:
    up, down = toy("v", up=True), toy("v", up=False)
    picture, eps, weight = drawn(4)
    ends = consistency.ends(consistency.shared(DOWN, UP), torch.rand(4))
    rendering, inversion = consistency.preservation(up, down, picture, eps, ends, weight)
    for error, moving, still in ((rendering, down, up), (inversion, up, down)):
        moved_by, left = (cast(Linear, side.live.unet).gain for side in (moving, still))
        gradients = torch.autograd.grad(error, [moved_by, left], allow_unused=True)
        assert gradients[0] is not None and gradients[1] is None


# Both, as stages

RECIPE = """
name = "tiny"
network = "face128"
[pool]
folder = "nowhere"
[inversions]
steps = [150, 300, 550, 800]
[student]
render = { "4" = [150, 300, 550, 980], "2" = [300, 980], "1" = [980] }
shares = [0.5, 0.3, 0.2]
substeps = 2
[[stages]]
kind = "student"
method = "METHOD"
images = 8
inverter = true
[[stages]]
kind = "student"
method = "METHOD"
images = 8
inverter = true
render = [300, 980]
"""


class Code(nn.Module):
    """An encoder with a weight."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(16))

    def forward(self, source: Tensor, condition: Tensor) -> Tensor:
        return self.weight * (source + condition).mean(dim=(1, 2, 3))[:, None]


def student_state(step: int = 0, stage: int = 0) -> Any:
    def networks(seed: int, moving: bool) -> nn.ModuleDict:
        unet, inverter = (network("x0", seed + k).requires_grad_(moving) for k in (0, 1))
        return nn.ModuleDict({"unet": unet, "inverter": inverter, "reenactment": Code()})

    teacher = networks(4, True)
    frozen = SimpleNamespace(
        unet=teacher["unet"], inverter=teacher["inverter"], prediction="x0",
        code=lambda source, condition: teacher["reenactment"](source, condition).detach(),
    )  # fmt: skip
    return SimpleNamespace(
        live=networks(0, True), ema=networks(2, True), before=teacher, teacher=frozen,
        config=replace(TINY, prediction="x0"), progress=SimpleNamespace(step=step, stage=stage),
    )  # fmt: skip


def sample(count: int = 4) -> Sample:
    generator = torch.Generator().manual_seed(3)
    pictures = torch.rand(4, count, 3, 16, 16, generator=generator) - 0.5
    none = torch.zeros(count, 0)
    return Sample(
        target=pictures[0], source=pictures[1], condition=pictures[2], eps=4 * pictures[3],
        weight=torch.rand(count, 1, 16, 16, generator=generator), values=none, keypoints=none,
        true_keypoints=none, t=torch.linspace(0, 999, count).long(),
    )  # fmt: skip


def recipe(method: str) -> Recipe:
    return parse_recipe(RECIPE.replace("METHOD", method))


METHODS = pytest.mark.parametrize("method", [consistency, progressive], ids=lambda m: m.__name__)


@METHODS
def test_the_gradient_is_the_students_alone(method: Any) -> None:
    described = recipe(method.__name__.rsplit(".", 1)[1])
    state = student_state()
    total, parts = method.loss(state, sample(), described, described.stages[0])
    assert parts["render"] > 0 and parts["invert"] > 0
    total.backward()
    for name in method.moves(described.stages[0]):
        assert any(bool(p.grad.any()) for p in state.live[name].parameters() if p.grad is not None)
    frozen = [state.live["reenactment"], state.ema, state.before]
    assert all(p.grad is None for part in frozen for p in part.parameters())


@METHODS
def test_a_batch_in_two_halves_says_the_same(method: Any) -> None:
    """What every process and every turn of accumulation works on is a part of one batch."""
    described = recipe(method.__name__.rsplit(".", 1)[1])
    whole, stage, state = sample(), described.stages[0], student_state()
    with torch.no_grad():
        said = [
            method.loss(state, part, described, stage)[0]
            for part in (whole, part_of(whole, slice(0, 2)), part_of(whole, slice(2, 4)))
        ]
    assert float(said[0]) == pytest.approx(float(said[1] + said[2]) / 2, rel=1e-4)


def test_a_round_divides_the_round_before_and_keeps_what_that_learnt() -> None:
    first = progressive.round_of(recipe("progressive"), 0, "x0")
    four = (150, 300, 550, 980)
    assert first.render == ((four, (75, 150, 225, 300, 425, 550, 765, 980)),)  # 765: half to even
    assert first.invert[0] == (150, 300, 550, 800) and len(first.invert[1]) == 8
    second = progressive.round_of(recipe("progressive"), 1, "x0")
    assert second.render == (((300, 980), four), (four, four))
    assert second.shares == (0.3, 0.5) and second.invert == (first.invert[0],) * 2
    wrong = parse_recipe(RECIPE.replace("METHOD", "progressive").replace(
        "render = [300, 980]\n", "render = [400, 980]\n"))  # fmt: skip
    with pytest.raises(SettingsError, match="no part of"):
        progressive.round_of(wrong, 1, "x0")


@pytest.mark.parametrize("name", ["sampler", "consistency", "progressive"])
def test_the_shipped_recipes_of_students_can_be_run(name: str) -> None:
    described = load_recipe(RECIPES / f"student32_{name}.toml")
    back = inversion_steps(described, "x0")
    assert all(stage.method == name for stage in described.stages)
    if name == "consistency":
        assert consistency.shared(described.student.render["4"], back) == [(150, 300), (300, 550)]
    if name == "progressive":
        last = progressive.round_of(described, len(described.stages) - 1, "x0")
        lists = {tuple(steps) for steps in described.student.render.values()}
        assert {steps for steps, _ in last.render} == lists and last.invert[0] == tuple(back)


def test_what_a_round_keeps_is_what_its_teacher_says() -> None:
    """The target of a step that stays whole is the teacher's own: no error where none was made."""
    table = segments(DOWN, DOWN, up=False)
    unet, z = network("x0"), torch.randn(8, 16)
    side = Side(*[Denoiser(unet, "x0", z)] * 3, table)
    picture, eps = torch.rand(8, 3, 16, 16) - 0.5, torch.randn(8, 3, 16, 16)
    spread, weight = (torch.arange(8) + 0.5) / 8, torch.ones(8, 1, 16, 16)
    assert float(progressive.step_error(side, picture, eps, spread, weight)) < EXACT
    halved = replace(side, segments=segments([300, 980], DOWN, up=False))
    assert float(progressive.step_error(halved, picture, eps, spread, weight)) > 1e4 * EXACT
