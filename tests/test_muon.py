"""Muon: what it does to a matrix, what it leaves to AdamW, and that it learns."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from diffusionact.training.muon import BETAS, Muon, is_matrix, orthogonalised

pytestmark = pytest.mark.torch


@pytest.mark.parametrize("shape", [(64, 64), (48, 200), (200, 48)])
def test_the_direction_is_nearly_orthogonal(shape: tuple[int, int]) -> None:
    torch.manual_seed(0)
    matrix = torch.randn(shape)
    direction = orthogonalised(matrix).float()
    values = torch.linalg.svdvals(direction)
    assert direction.shape == shape
    # the iteration stops near 1, not at it; the smallest of a square matrix are still on their way
    assert values.max() < 1.3 and values.median() > 0.6
    assert (direction * matrix).sum() > 0.8 * torch.linalg.svdvals(matrix).sum() * values.mean()


def test_kernels_are_matrices_and_norms_and_maps_are_not() -> None:
    assert is_matrix(nn.Conv2d(64, 48, 3).weight)
    assert is_matrix(nn.Linear(64, 48).weight)
    assert not is_matrix(nn.Linear(64, 8).weight)
    assert not is_matrix(nn.GroupNorm(8, 64).weight)
    assert not is_matrix(nn.Parameter(torch.zeros(1, 64, 32, 32)))


def test_the_rest_moves_as_under_adamw() -> None:
    torch.manual_seed(0)
    ours, theirs = nn.Linear(64, 64), nn.Linear(64, 64)
    theirs.load_state_dict(ours.state_dict())
    group = {"params": list(ours.parameters()), "lr": 1e-2, "matrices": False}
    mine = Muon([group], matrix_lr=1.0, weight_decay=0.1)
    adamw = torch.optim.AdamW(theirs.parameters(), lr=1e-2, betas=BETAS, weight_decay=0.1)
    for _ in range(3):
        x = torch.randn(8, 64)
        for network, optimizer in ((ours, mine), (theirs, adamw)):
            optimizer.zero_grad()
            (network(x) - x).square().mean().backward()
            optimizer.step()
    torch.testing.assert_close(ours.weight, theirs.weight)
    torch.testing.assert_close(ours.bias, theirs.bias)


def test_a_convolution_learns_and_its_step_follows_the_rate() -> None:
    torch.manual_seed(0)
    network, wanted = nn.Conv2d(48, 64, 3), nn.Conv2d(48, 64, 3)
    optimizer = Muon([{"params": list(network.parameters()), "lr": 1e-3}], matrix_lr=0.02)
    errors = []
    for _ in range(60):
        x = torch.randn(4, 48, 6, 6)
        error = (network(x) - wanted(x).detach()).square().mean()
        optimizer.zero_grad()
        error.backward()
        optimizer.step()
        errors.append(error.item())
    assert errors[-1] < 0.5 * errors[0]
    before = network.weight.detach().clone()
    optimizer.param_groups[0]["lr"] = 0.0
    optimizer.step()
    assert torch.equal(network.weight, before)
