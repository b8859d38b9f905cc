"""The eight losses: their equations in NumPy, their gradients by differences, their zeros."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffusionact.training import criteria as losses
from diffusionact.training.config import CriteriaRecipe
from diffusionact.training.criteria import Goal, criteria, total
from diffusionact.training.critics import ASKS, Critics
from tests.small_critics import SIDE, guide_critics, pictures, published_critics, slope

pytestmark = pytest.mark.torch

EXACT = 1e-10  # float64, some hundred operations on values near 1
DIFFERENCE = 1e-5  # of a slope by central differences, relative
NAMES = tuple(asdict(CriteriaRecipe()))
NONE = CriteriaRecipe(**dict.fromkeys(NAMES, 0.0))


def only(*names: str) -> CriteriaRecipe:
    return replace(NONE, **dict.fromkeys(names, 1.0))


# The paper's weights, and 1 for a loss that is not the paper's.
ALL = CriteriaRecipe(**{name: weight or 1.0 for name, weight in asdict(CriteriaRecipe()).items()})


def rng_pair(*shape: int, seed: int = 0) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    rng = np.random.default_rng(seed)
    return rng.normal(size=shape), rng.normal(size=shape)


def torched(function: Callable[..., Tensor], *arrays: NDArray[np.float64]) -> float:
    return float(function(*(torch.from_numpy(a) for a in arrays)))


def goal(seed: int = 1) -> Goal:
    """A target with a face's points and labels, and a source."""
    rng = np.random.default_rng(seed)
    points = torch.from_numpy(rng.uniform(6, 26, (2, 68, 2)))
    labels = torch.from_numpy(rng.integers(0, 3, (2, SIDE, SIDE)).astype(np.uint8))
    return Goal(pictures(2, seed), pictures(2, seed + 1), labels, points, points + 1)


# The paper's weights and their sum.


def test_the_default_weights_are_the_paper_s() -> None:
    assert {name: weight for name, weight in asdict(CriteriaRecipe()).items() if weight} == {
        "pixel": 20, "perceptual": 20, "identity": 20, "style": 20,
        "background": 10, "shape": 0.5, "gaze": 2, "head_pose": 2,
    }  # fmt: skip


def test_the_total_is_the_weighted_sum_of_all_eight() -> None:
    critics, result, due = guide_critics(), pictures(2, 9), goal()
    parts = criteria(result, due, critics, ALL)
    assert set(parts) == set(NAMES) and all(part.ndim == 0 for part in parts.values())
    assert all(float(part) > 0 for part in parts.values())
    expected = sum(asdict(ALL)[name] * float(part) for name, part in parts.items())
    assert float(total(parts, ALL)) == pytest.approx(expected, rel=EXACT)


# The equations, written a second time.


def test_pixel_is_the_mean_absolute_difference() -> None:
    a, b = rng_pair(2, 3, 4, 4)
    assert torched(losses.pixel, a, b) == pytest.approx(np.abs(a - b).mean(), rel=EXACT)


def test_perceptual_weighs_every_map_alike() -> None:
    maps = [rng_pair(2, 3, 8, 8), rng_pair(2, 7, 2, 2, seed=1)]
    found, due = ([torch.from_numpy(pair[i]) for pair in maps] for i in (0, 1))
    expected = (np.abs(maps[0][0] - maps[0][1]).mean() + np.abs(maps[1][0] - maps[1][1]).mean()) / 2
    assert float(losses.perceptual(found, due)) == pytest.approx(expected, rel=EXACT)


def test_identity_is_one_less_the_cosine() -> None:
    a, b = (v / np.linalg.norm(v, axis=1, keepdims=True) for v in rng_pair(3, 6))
    angles = np.arccos([u @ v for u, v in zip(a, b, strict=True)])
    assert torched(losses.identity, a, b) == pytest.approx((1 - np.cos(angles)).mean(), rel=1e-9)
    assert torched(losses.identity, a, -a) == pytest.approx(2, rel=EXACT)
    right = np.array([[1.0, 0]]), np.array([[0, 1.0]])
    assert torched(losses.identity, *right) == pytest.approx(1, rel=EXACT)


def test_style_is_an_l1_distance_whatever_the_scale_of_the_embedding() -> None:
    a, b = rng_pair(3, 8)
    rows = [v / np.sqrt(np.square(v).mean(axis=1, keepdims=True)) for v in (a, b)]
    expected = np.abs(rows[0] - rows[1]).mean()
    assert torched(losses.style, a, b) == pytest.approx(expected, rel=EXACT)
    assert torched(losses.style, 40 * a, b / 9) == pytest.approx(expected, rel=EXACT)


def test_background_counts_behind_the_mask_only() -> None:
    a, b = rng_pair(2, 3, 4, 4)
    mask = np.random.default_rng(2).uniform(size=(2, 1, 4, 4))
    expected = (mask * np.abs(a - b)).sum() / a.size
    assert torched(losses.background, a, b, mask) == pytest.approx(expected, rel=EXACT)
    mask[:, :, :, 2:] = 0
    face = b.copy()
    face[..., 2:] += 5  # where the face is, nothing of it counts
    assert torched(losses.background, face, b, mask) == 0


EYES = [(36, 39), (37, 41), (38, 40), (42, 45), (43, 47), (44, 46)]
MOUTH = [(48, 54), (49, 59), (50, 58), (51, 57), (52, 56), (53, 55), (60, 64), (61, 67), (62, 66),
         (63, 65)]  # fmt: skip


def test_shape_is_points_and_the_openings_of_eyes_and_mouth() -> None:
    a, b = (10 * p for p in rng_pair(2, 68, 2))
    expected = np.abs(a - b).mean()
    for pairs in (EYES, MOUTH):
        gaps = [np.abs(np.abs(a[:, i] - a[:, j]) - np.abs(b[:, i] - b[:, j])) for i, j in pairs]
        expected += np.mean(gaps)
    assert torched(losses.shape, a, b) == pytest.approx(expected, rel=EXACT)


def test_a_moved_face_has_its_openings_and_an_opened_mouth_has_not() -> None:
    face = np.random.default_rng(3).uniform(0, 100, (1, 68, 2))
    moved = face + (3.0, -1.0)
    assert torched(losses.shape, moved, face) == pytest.approx(2.0, rel=EXACT)
    opened = face.copy()
    opened[:, 57, 1] += np.sign(face[0, 57, 1] - face[0, 51, 1]) * 10.0
    # one of 136 numbers is off by 10, and one of 2 x 10 gaps
    assert torched(losses.shape, opened, face) == pytest.approx(10 / 136 + 10 / 20, rel=1e-9)


def test_gaze_and_head_pose_are_mean_absolute_angles_the_short_way_round() -> None:
    a, b = rng_pair(3, 2)
    assert torched(losses.gaze, a, b) == pytest.approx(np.abs(a - b).mean(), rel=EXACT)
    a, b = (30 * v for v in rng_pair(3, 3))
    assert torched(losses.head_pose, a, b) == pytest.approx(np.abs(a - b).mean(), rel=EXACT)
    near = np.array([[179.0, 0, 0]]), np.array([[-179.0, 0, 0]])
    assert torched(losses.head_pose, *near) == pytest.approx(2 / 3, rel=EXACT)


# What is measured against what.


@pytest.mark.parametrize("make", [guide_critics, published_critics])
def test_a_perfect_picture_of_the_source_itself_loses_nothing(make: Callable[[], Critics]) -> None:
    due = goal()
    due = replace(due, source=due.target, source_points=due.points)
    parts = criteria(due.target.clone(), due, make(), ALL)
    assert {name: abs(float(part)) < EXACT for name, part in parts.items()} == dict.fromkeys(
        NAMES, True
    )


@pytest.mark.parametrize("make", [guide_critics, published_critics])
def test_identity_is_the_source_s_and_all_else_the_target_s(make: Callable[[], Critics]) -> None:
    critics, due = make(), goal()
    at_target = criteria(due.target, due, critics, ALL)
    assert [name for name in NAMES if abs(float(at_target[name])) > EXACT] == ["identity"]
    result = pictures(2, 9)
    before = criteria(result, due, critics, ALL)
    other = criteria(result, replace(due, source=pictures(2, 33)), critics, ALL)
    assert [name for name in NAMES if not torch.equal(before[name], other[name])] == ["identity"]


def test_without_labels_the_mask_is_bisenet_s_of_the_target() -> None:
    critics, due, result = published_critics(), replace(goal(), labels=None), pictures(2, 9)
    part = criteria(result, due, critics, only("background"))["background"]
    mask = critics.background(due.target, None)
    expected = (mask * (result - due.target).abs()).mean()
    assert float(part) == pytest.approx(float(expected), rel=EXACT) and 0 < float(mask.mean()) < 1
    assert not torch.allclose(mask, critics.background(result, None))


@pytest.mark.parametrize("make", [guide_critics, published_critics])
@pytest.mark.parametrize("name", NAMES)
def test_gradients_are_those_of_finite_differences(name: str, make: Callable[[], Critics]) -> None:
    critics, due = make(), goal()
    by_autograd, by_difference = slope(
        lambda x: total(criteria(x, due, critics, only(name)), ALL), pictures(2, 9)
    )
    assert by_autograd == pytest.approx(by_difference, rel=DIFFERENCE) and by_autograd != 0


@pytest.mark.parametrize("make", [guide_critics, published_critics])
def test_the_gradient_reaches_the_result_and_nothing_else(make: Callable[[], Critics]) -> None:
    critics, due = make(), goal()
    due.target.requires_grad_(True)
    due.source.requires_grad_(True)
    result = pictures(2, 9).requires_grad_(True)
    critics.train()  # as a loop does to all that it holds
    parts = criteria(result, due, critics, ALL)
    read = {name: part for name, part in parts.items() if name not in ("pixel", "background")}
    total(read, ALL).backward()  # type: ignore[no-untyped-call]
    assert result.grad is not None and float(result.grad.abs().min()) > 0
    assert due.target.grad is None and due.source.grad is None
    assert all(p.grad is None and not p.requires_grad for p in critics.parameters())
    assert not any(module.training for module in critics.modules())


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_of_0_leaves_its_loss_out_and_asks_no_network(name: str) -> None:
    full, due, result = published_critics(), goal(), pictures(2, 9)
    weights = replace(ALL, **{name: 0.0})
    needed = {ASKS[other] for other in NAMES if other in ASKS and other != name}
    networks: dict[str, nn.Module] = {n: full.networks[n] for n in needed}
    parts = criteria(result, due, Critics(networks), weights)
    assert set(parts) == set(NAMES) - {name}
    expected = criteria(result, due, full, ALL)
    assert all(torch.equal(parts[n], expected[n]) for n in parts)


def test_half_precision_around_does_not_round_what_is_read() -> None:
    critics, due = guide_critics().float(), goal()
    single: dict[str, Any] = {
        "target": due.target.float(), "source": due.source.float(), "points": None,
        "source_points": None,
    }  # fmt: skip
    due, result = replace(due, **single), pictures(2, 9).float()
    expected = criteria(result, due, critics, ALL)
    with torch.autocast("cpu", torch.bfloat16):
        parts = criteria(result, due, critics, ALL)
    assert all(torch.equal(parts[n], expected[n]) for n in NAMES)
    assert all(part.dtype == torch.float32 for part in parts.values())
