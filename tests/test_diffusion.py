"""The diffusion process on tensors: noising, both directions of the sampler, and one estimate."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffusionact.schedule import inversion_timesteps
from diffusionact.training.diffusion import (
    TABLE,
    draw_timesteps,
    from_z_alone,
    invert,
    noised,
    render,
    to_batch,
    to_pixels,
)

pytestmark = pytest.mark.torch

SIDE = 8
FLOAT32_TOLERANCE = 1e-5  # a few roundings of values of about 1
WALK_TOLERANCE = 2e-3  # at t = 0 one rounding of x is multiplied by sqrt(1 / abar - 1) twice


class Oracle(nn.Module):
    """Predicts v of a known picture exactly, whatever the noise."""

    def __init__(self, picture: Tensor) -> None:
        super().__init__()
        self.picture = picture
        self.asked: list[int] = []

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        self.asked.append(int(t[0]))
        level = torch.from_numpy(TABLE)[t].view(-1, 1, 1, 1)
        eps = (x - level.sqrt() * self.picture) / (1 - level).sqrt()
        return (level.sqrt() * eps - (1 - level).sqrt() * self.picture).float()


@pytest.fixture
def picture() -> Tensor:
    return torch.rand(2, 3, SIDE, SIDE, generator=torch.Generator().manual_seed(0)) * 1.8 - 0.9


def test_pixels_survive_the_way_there_and_back() -> None:
    images = np.arange(256, dtype=np.uint8).reshape(1, 16, 16, 1).repeat(3, axis=-1)
    batch = to_batch(images, torch.device("cpu"))
    assert batch.shape == (1, 3, 16, 16)
    assert float(batch.min()) == -1 and float(batch.max()) == 1
    np.testing.assert_array_equal(to_pixels(batch), images)


def test_low_power_prefers_high_noise() -> None:
    t = draw_timesteps(20_000, 0.5, torch.Generator().manual_seed(0)).double()
    assert t.min() >= 0 and t.max() <= 999
    # The density 2t has its mean at two thirds; 20,000 draws leave a deviation of 1.7 steps.
    assert float(t.mean()) == pytest.approx(999 * 2 / 3, abs=10)


def test_v_and_x_t_give_back_picture_and_noise(picture: Tensor) -> None:
    eps = torch.randn(picture.shape, generator=torch.Generator().manual_seed(1))
    t = torch.tensor([10, 900])
    x_t, v = noised("v", picture, eps, t)
    level = torch.from_numpy(TABLE)[t].float().view(-1, 1, 1, 1)
    torch.testing.assert_close(
        level.sqrt() * x_t - (1 - level).sqrt() * v, picture, atol=FLOAT32_TOLERANCE, rtol=0
    )
    torch.testing.assert_close(
        (1 - level).sqrt() * x_t + level.sqrt() * v, eps, atol=FLOAT32_TOLERANCE, rtol=0
    )


def test_render_with_a_perfect_network_ends_at_the_picture(picture: Tensor) -> None:
    oracle = Oracle(picture)
    x_T = torch.randn(picture.shape, generator=torch.Generator().manual_seed(2))
    rendered = render(oracle, "v", x_T, torch.zeros(2, 4), 4)
    torch.testing.assert_close(rendered, picture, atol=WALK_TOLERANCE, rtol=0)
    assert oracle.asked == [750, 500, 250, 0]


def test_inversion_asks_upwards_and_ends_in_pure_noise(picture: Tensor) -> None:
    class Zero(nn.Module):
        def forward(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
            return torch.zeros_like(x)

    # v = 0 everywhere: x0 = sqrt(abar) x, eps = sqrt(1 - abar) x; so x only turns and shrinks.
    x_T = invert(Zero(), "v", picture, torch.zeros(2, 4), 10)
    angles = np.arccos(np.sqrt(TABLE[::100]))  # the angle of each level asked
    turns = np.append(np.diff(angles), np.pi / 2 - angles[-1])
    expected = picture * float(np.prod(np.cos(turns)))
    torch.testing.assert_close(x_T, expected, atol=FLOAT32_TOLERANCE * 10, rtol=0)


def test_inversion_by_x0_asks_where_its_error_is_not_blown_up(picture: Tensor) -> None:
    asked: list[int] = []

    class Knows(nn.Module):
        def forward(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
            asked.append(int(t[0]))
            return picture

    invert(Knows(), "x0", picture, torch.zeros(2, 4), 4)
    assert asked == inversion_timesteps("x0", 4).tolist() and asked[0] > 0


def test_the_estimate_from_pure_noise_sees_only_the_prediction(picture: Tensor) -> None:
    class Says(nn.Module):
        def forward(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
            assert int(t[0]) == 999
            return -picture

    noise = torch.randn(picture.shape, generator=torch.Generator().manual_seed(3))
    estimate = from_z_alone(Says(), "v", noise, torch.zeros(2, 4))
    leak = float(np.sqrt(TABLE[-1])) * float(noise.abs().max())
    torch.testing.assert_close(estimate, picture, atol=leak + FLOAT32_TOLERANCE, rtol=0)
