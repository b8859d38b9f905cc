"""Eq. 7 and the rigid pose: linear, the same in NumPy and torch, and equal to the dense face."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffusionact.errors import BundleError
from diffusionact.morphable import Morphable, angles, pose, project, rendered_face, rotation

EXACT = 1e-9  # float64 arithmetic of a few terms
FLOAT32 = 1e-5  # the shipped model is stored as float32


def tiny_model(seed: int = 0) -> Morphable:
    rng = np.random.default_rng(seed)
    vertices = rng.integers(0, 9, (68, 3))
    weights = rng.dirichlet(np.ones(3), 68)
    return Morphable(
        rng.normal(size=(9, 3)),
        rng.normal(size=(4, 9, 3)),
        rng.normal(size=(5, 9, 3)),
        vertices,
        weights,
    )


def test_rotation_and_angles_are_inverses() -> None:
    rng = np.random.default_rng(1)
    wanted = rng.uniform(-80, 80, (50, 3))
    matrix = rotation(wanted)
    assert np.allclose(angles(matrix), wanted, atol=1e-6)
    assert np.allclose(matrix @ matrix.swapaxes(-1, -2), np.eye(3), atol=EXACT)
    assert np.allclose(np.linalg.det(matrix), 1)


def test_signs_of_the_angles() -> None:
    face, top = np.array([0, 0, -1.0]), np.array([0, -1.0, 0])
    assert (rotation(np.array([30.0, 0, 0])) @ face)[0] > 0.4, "yaw turns to the picture's right"
    assert (rotation(np.array([0, 20.0, 0])) @ face)[1] > 0.3, "pitch lowers the face"
    assert (rotation(np.array([0, 0, 20.0])) @ top)[0] > 0.3, "roll tilts the top to the right"


def test_shape_is_linear_in_both_bases() -> None:
    model = tiny_model()
    a, b = np.arange(4.0), np.arange(5.0)
    zero_a, zero_b = np.zeros(4), np.zeros(5)
    sum_of_parts = model.shape(a, zero_b) + model.shape(zero_a, b) - model.shape(zero_a, zero_b)
    assert np.allclose(model.shape(a, b), sum_of_parts, atol=EXACT)
    by_hand = model.template + np.tensordot(a, model.identity_basis, 1)
    assert np.allclose(model.shape(a, zero_b), by_hand, atol=EXACT)
    batch = model.shape(np.stack([a, zero_a]), np.stack([b, zero_b]))
    assert batch.shape == (2, 9, 3)
    assert np.allclose(batch[1], model.template)


def test_pose_keeps_distances_and_moves_the_pivot_by_the_translation() -> None:
    rng = np.random.default_rng(2)
    points, pivot, shift = rng.normal(size=(9, 3)), rng.normal(size=3), rng.normal(size=3)
    moved = pose(points, rotation(np.array([20.0, -10, 5])), pivot, shift)
    before = np.linalg.norm(points[:, None] - points, axis=-1)
    assert np.allclose(np.linalg.norm(moved[:, None] - moved, axis=-1), before, atol=EXACT)
    assert np.allclose(
        pose(pivot[None], rotation(np.array([20.0, -10, 5])), pivot, shift)[0], pivot + shift
    )


def test_projection_scales_depth_too() -> None:
    px = project(np.array([[1.0, 2.0, 3.0]]), 10.0, np.array([5.0, 7.0]))
    assert np.allclose(px, [[15, 27, 30]])


@pytest.mark.torch
def test_torch_agrees_and_has_gradients() -> None:
    import torch

    model = tiny_model()
    other = model.map(torch.as_tensor)
    a, b = np.linspace(-1, 1, 4), np.linspace(0, 1, 5)
    turn = np.array([12.0, -7.0, 3.0])
    zero = np.zeros(3)
    wanted = model.landmarks(pose(model.shape(a, b), rotation(turn), zero, zero))
    coefficients = torch.tensor(a, requires_grad=True)
    shape = other.shape(coefficients, torch.tensor(b))
    flat = torch.zeros(3, dtype=torch.float64)
    seen = other.landmarks(pose(shape, rotation(torch.tensor(turn)), flat, flat))
    assert np.allclose(seen.detach().numpy(), wanted, atol=EXACT)
    seen.square().sum().backward()
    assert coefficients.grad is not None and bool((coefficients.grad != 0).all())
    assert np.allclose(angles(rotation(torch.tensor(turn))).numpy(), turn, atol=1e-6)


@pytest.mark.torch
def test_shipped_landmark_model_is_the_dense_face() -> None:
    from diffusionact.training.face_shape import EXPRESSION, IDENTITY, face_shape

    dense, shipped = face_shape().model, rendered_face()
    rng = np.random.default_rng(3)
    identity, expression = rng.normal(size=len(IDENTITY)), rng.random(len(EXPRESSION))
    wanted = dense.landmarks(dense.shape(identity, expression))
    assert (
        np.abs(shipped.landmarks(shipped.shape(identity, expression)) - wanted).max() < FLOAT32
    ), "the shape changed: run `python -m diffusionact.training.assets`"


def test_a_package_without_its_data_file_says_so(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    from diffusionact import morphable

    monkeypatch.setattr(morphable, "RENDERED_FACE_FILE", tmp_path / "face68.npz")
    morphable.rendered_face.cache_clear()
    with pytest.raises(BundleError, match="reinstall"):
        morphable.rendered_face()
    morphable.rendered_face.cache_clear()
