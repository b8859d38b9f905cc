"""Linear 3-D face model (DiffusionAct, Eq. 7): identity and expression bases, then a rigid pose.

One implementation serves NumPy and torch arrays: it uses operators both share, so that the same
equation gives the runtime its landmarks and training a differentiable one. Axes follow the
picture: x to the right, y down, z away from the camera; the unit is half the width of a head.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from diffusionact.errors import BundleError

# NumPy or torch array of floats. Typed loosely because torch may be absent.
Array = Any

RENDERED_FACE_FILE = Path(__file__).parent / "assets" / "face68.npz"


@dataclass(frozen=True)
class Morphable:
    """A linear face model over V vertices, I identity and E expression directions.

    template: float [V, 3], head units, the mean shape.
    identity_basis: float [I, V, 3], displacement per unit coefficient.
    expression_basis: float [E, V, 3], displacement per unit coefficient.
    landmark_vertices: int [68, 3], the triangle each landmark lies on.
    landmark_weights: float [68, 3], its barycentric coordinates there.

    Source: DiffusionAct, Eq. 7; landmarks on triangles as in FLAME.
    """

    template: Array
    identity_basis: Array
    expression_basis: Array
    landmark_vertices: Array
    landmark_weights: Array

    def shape(self, identity: Array, expression: Array) -> Array:
        """Vertices in the head's own frame: float [..., V, 3], head units.

        identity: float [..., I]; expression: float [..., E]; leading axes broadcast.
        Source: DiffusionAct, Eq. 7, S = mean + S_id p_id + S_exp p_exp.
        """
        vertices = self.template
        for coefficients, basis in (
            (identity, self.identity_basis),
            (expression, self.expression_basis),
        ):
            flat = coefficients @ basis.reshape(basis.shape[0], -1)
            vertices = vertices + flat.reshape(*flat.shape[:-1], *basis.shape[1:])
        return vertices

    def landmarks(self, vertices: Array) -> Array:
        """The 68 landmarks on a shape: float [..., 68, 3] from float [..., V, 3]."""
        corners = vertices[..., self.landmark_vertices, :]
        return (corners * self.landmark_weights[..., None]).sum(-2)

    def map(self, convert: Callable[[Array], Array]) -> Morphable:
        """The same model with every float array converted, say by `torch.as_tensor`."""
        return Morphable(
            convert(self.template),
            convert(self.identity_basis),
            convert(self.expression_basis),
            self.landmark_vertices,
            convert(self.landmark_weights),
        )


def rotation(angles_deg: Array) -> Array:
    """Rotation matrices: float [..., 3, 3] from yaw, pitch, roll in degrees, float [..., 3].

    Applied as R = R_roll R_yaw R_pitch to column vectors. With the picture's axes, positive yaw
    turns the face to the picture's right, positive pitch lowers it, positive roll tilts the top
    of the head to the picture's right.
    """
    xp = _namespace(angles_deg)
    radians = angles_deg * (np.pi / 180)
    (cy, cp, cr), (sy, sp, sr) = ([f(radians[..., i]) for i in range(3)] for f in (xp.cos, xp.sin))
    rows = (
        (cr * cy, cr * sy * -sp - sr * cp, cr * -sy * cp - sr * -sp),
        (sr * cy, sr * sy * -sp + cr * cp, sr * -sy * cp + cr * -sp),
        (sy, cy * sp, cy * cp),
    )
    return xp.stack([xp.stack(row, -1) for row in rows], -2)


def angles(matrix: Array) -> Array:
    """Yaw, pitch, roll in degrees, float [..., 3]: the inverse of `rotation` for |yaw| < 90."""
    xp = _namespace(matrix)
    sy = xp.clip(matrix[..., 2, 0], -1.0, 1.0)
    yaw = xp.arcsin(sy)
    pitch = xp.arctan2(matrix[..., 2, 1], matrix[..., 2, 2])
    roll = xp.arctan2(matrix[..., 1, 0], matrix[..., 0, 0])
    return xp.stack([yaw, pitch, roll], -1) * (180 / np.pi)


def pose(vertices: Array, matrix: Array, pivot: Array, translation: Array) -> Array:
    """Vertices turned about a pivot and moved: float [..., V, 3].

    matrix: float [..., 3, 3]; pivot, translation: float [..., 3], same unit as the vertices.
    Source: DiffusionAct, Eq. 7 (its pose basis is the linearisation of this motion).
    """
    turned = (vertices - pivot[..., None, :]) @ _transpose(matrix)
    return turned + (pivot + translation)[..., None, :]


def project(vertices: Array, scale: Array, offset: Array) -> Array:
    """Weak perspective: px = scale * (x, y) + offset, and depth in the same scale; [..., V, 3]."""
    xp = _namespace(vertices)
    scaled = vertices * scale
    depth = scaled[..., 2:]
    return xp.concatenate([scaled[..., :2] + offset[..., None, :], depth], -1)


@cache
def rendered_face() -> Morphable:
    """The 68 landmarks of our own rendered face as a model of 68 vertices.

    Raises: BundleError if the package's data file is missing.
    """
    if not RENDERED_FACE_FILE.is_file():
        raise BundleError(
            f"{RENDERED_FACE_FILE} is missing from the installed package; reinstall it with "
            "`pip install --force-reinstall diffusionact`"
        )
    with np.load(RENDERED_FACE_FILE) as data:
        return Morphable(
            data["template"],
            data["identity_basis"],
            data["expression_basis"],
            np.arange(68)[:, None].repeat(3, 1),
            np.eye(3)[np.zeros(68, int)],
        )


def _namespace(array: Array) -> Any:
    return np if isinstance(array, np.ndarray) else sys.modules["torch"]


def _transpose(matrix: Array) -> Array:
    return matrix.swapaxes(-1, -2)
