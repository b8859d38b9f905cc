"""Linear 3-D face model (DiffusionAct, Eq. 7): identity and expression bases, then a rigid pose.

One implementation serves NumPy and torch arrays: it uses operators both share, so that the same
equation gives the runtime its landmarks and training a differentiable one. Axes follow the
picture: x to the right, y down, z away from the camera; the unit is half the width of a head.
FLAME keeps its makers' axes and unit (y up, z towards the camera, metres) up to its projection.
"""

from __future__ import annotations

import io
import sys
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np

from diffusionact.errors import BundleError

# NumPy or torch array of floats. Typed loosely because torch may be absent.
Array = Any

RENDERED_FACE_FILE = Path(__file__).parent / "assets" / "face68.npz"

FLAME_FORMAT = "1"
FLAME_JOINTS = 5  # the head's root, neck, jaw, two eyes
CONTOUR_ROWS, CONTOUR_POINTS = 79, 17  # one row per degree of yaw: 0..39, then -1..-39
FLAME_CROP_PX = 224  # side of the picture whose pixels its camera speaks of


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


@dataclass(frozen=True)
class Flame:
    """FLAME's head: Eq. 7's linear shape, then joints that turn. Cut down to its 68 landmarks.

    face: V vertices and, after them, the joints, which are as linear in the codes. Its landmarks
        are the contour's 79 rows of 17 points, then the 51 other ones.
    pose_basis: float [36, V, 3], displacement per entry of the turns of all joints but the root.
    skinning: float [V, 5], each vertex' shares in the joints.
    parents: the joint each one hangs on; the root's is -1.
    rest_pose: float [5, 3], axis-angle, radians; neck and eyes keep it.

    Source: Li et al., "Learning a model of facial shape and expression from 4D scans", 2017.
    """

    face: Morphable
    pose_basis: Array
    skinning: Array
    parents: tuple[int, ...]
    rest_pose: Array

    def landmarks(self, shape: Array, expression: Array, pose: Array) -> Array:
        """The 68 landmarks: float [..., 68, 3], metres, x right, y up, z towards the camera.

        shape: float [..., 100]; expression: float [..., 50]; pose: float [..., 6], axis-angle of
        the head and of the jaw, radians; leading axes broadcast. The source's shape with the
        driver's expression and pose is Eq. 8.
        """
        xp = _namespace(shape)
        turns = self._turns(pose)
        points = self.face.landmarks(self._turned(shape, expression, turns))
        split, lead = CONTOUR_ROWS * CONTOUR_POINTS, points.shape[:-2]
        table = points[..., :split, :].reshape(-1, CONTOUR_ROWS, CONTOUR_POINTS, 3)
        row = xp.broadcast_to(_contour_row(turns), lead).reshape(-1)
        contour = table[xp.arange(table.shape[0]), row].reshape(*lead, CONTOUR_POINTS, 3)
        return xp.concatenate([contour, points[..., split:, :]], -2)

    def vertices(self, shape: Array, expression: Array, pose: Array) -> Array:
        """The vertices that the landmarks lie between: float [..., V, 3], as in `landmarks`."""
        return self._turned(shape, expression, self._turns(pose))

    def map(self, convert: Callable[[Array], Array]) -> Flame:
        """The same model with every float array converted, say by `torch.as_tensor`."""
        return Flame(
            self.face.map(convert),
            convert(self.pose_basis),
            convert(self.skinning),
            self.parents,
            convert(self.rest_pose),
        )

    def _turns(self, pose: Array) -> Array:
        """The joints' rotations: float [..., 5, 3, 3]."""
        xp = _namespace(pose)
        given = {0: pose[..., :3], 2: pose[..., 3:]}
        rest = [xp.broadcast_to(axes, pose[..., :3].shape) for axes in self.rest_pose]
        return axis_angle(xp.stack([given.get(i, axes) for i, axes in enumerate(rest)], -2))

    def _turned(self, shape: Array, expression: Array, turns: Array) -> Array:
        """The vertices under the joints' rotations `turns`, float [..., 5, 3, 3]."""
        xp = _namespace(shape)
        # the turns less the identity, which is that of no angle, in their own dtype and place
        bent = turns[..., 1:, :, :] - axis_angle(xp.zeros_like(turns[..., 1:, :, 0]))
        bent = bent.reshape(*bent.shape[:-3], -1)
        correctives = bent @ self.pose_basis.reshape(self.pose_basis.shape[0], -1)
        solid = self.face.shape(shape, expression)
        vertices = solid[..., :-FLAME_JOINTS, :]
        vertices = vertices + correctives.reshape(*bent.shape[:-1], *vertices.shape[-2:])
        return self._skin(vertices, solid[..., -FLAME_JOINTS:, :], turns)

    def _skin(self, vertices: Array, joints: Array, turns: Array) -> Array:
        """Vertices moved by the joints they hang on, each by its share: float [..., V, 3].

        joints: float [..., 5, 3], where they are before the turns; turns: float [..., 5, 3, 3].
        """
        moved = 0.0
        turned: list[Array] = []
        placed: list[Array] = []
        for i, parent in enumerate(self.parents):
            turn, joint = turns[..., i, :, :], joints[..., i, :]
            place = joint
            if parent >= 0:
                bone = (joint - joints[..., parent, :])[..., None]
                place = placed[parent] + (turned[parent] @ bone)[..., 0]
                turn = turned[parent] @ turn
            turned.append(turn)
            placed.append(place)
            moved = moved + self.skinning[:, i, None] * pose(vertices, turn, joint, place - joint)
        return moved


def _contour_row(turns: Array) -> Array:
    """Which row of FLAME's contour shows under its joints' rotations: int [...].

    The rows hold yaws of 0..39 degrees, then -1..-39.
    """
    xp = _namespace(turns)
    head = turns[..., 0, :, :] @ turns[..., 1, :, :]
    across = (head[..., 0, 0] ** 2 + head[..., 1, 0] ** 2) ** 0.5
    yaw_deg = xp.arctan2(-head[..., 2, 0], across) * (180 / np.pi)
    last = CONTOUR_ROWS // 2
    row = xp.round(xp.clip(yaw_deg, -last, last))
    row = xp.where(row < 0, last - row, row)
    return row.astype(np.int64) if xp is np else row.long()


def flame_pixels(points: Array, camera: Array) -> Array:
    """Landmarks in pixels of the 224-px crop, with depth away from the camera: float [..., 68, 3].

    points: float [..., 68, 3], as `Flame.landmarks` gives them; camera: float [..., 3], scale and
    shift right and up, half crops.
    """
    xp = _namespace(points)
    seen = xp.stack([points[..., 0], -points[..., 1], -points[..., 2]], -1)
    half = FLAME_CROP_PX / 2
    scale = camera[..., :1] * half
    shift = xp.stack([camera[..., 1], -camera[..., 2]], -1)
    return project(seen, scale[..., None], scale * shift + half)


def axis_angle(vector: Array) -> Array:
    """Rotation matrices: float [..., 3, 3] from axis times angle, radians, float [..., 3].

    Source: Rodrigues' formula. The addend keeps the axis defined where the angle is 0, and is
    FLAME's own.
    """
    xp = _namespace(vector)
    angle = ((vector + 1e-8) ** 2).sum(-1) ** 0.5
    x, y, z = (vector[..., i] / angle for i in range(3))
    s, c = xp.sin(angle), 1 - xp.cos(angle)
    rows = (
        (1 - c * (y * y + z * z), c * x * y - s * z, c * x * z + s * y),
        (c * x * y + s * z, 1 - c * (x * x + z * z), c * y * z - s * x),
        (c * x * z - s * y, c * y * z + s * x, 1 - c * (x * x + y * y)),
    )
    return xp.stack([xp.stack(row, -1) for row in rows], -2)


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


def load_flame(path: Path | str) -> Flame:
    """The model in a flame.npz, in float32.

    Raises: BundleError: there is no such file, or it is not one that `diffusionact import` wrote.
    """
    try:
        with np.load(io.BytesIO(Path(path).read_bytes()), allow_pickle=False) as data:
            arrays = {name: data[name] for name in data.files}
        if (found := str(arrays.get("format"))) != FLAME_FORMAT:
            raise ValueError(f"its format is {found!r}, this version reads {FLAME_FORMAT!r}")
        return flame_from(arrays)
    except (OSError, EOFError, ValueError, KeyError, AttributeError, zipfile.BadZipFile) as error:
        raise BundleError(
            f"{path} is not a readable FLAME model ({error}); write it anew with "
            "`diffusionact import --flame FILE`"
        ) from error


def flame_from(arrays: Mapping[str, Array]) -> Flame:
    """The model made of the arrays of a flame.npz.

    Raises: KeyError: one is missing. ValueError: shapes that do not belong together.
    """
    template, triangles = arrays["template"], arrays["landmark_vertices"]
    count = len(template) - FLAME_JOINTS
    wanted = {
        "template": (count + FLAME_JOINTS, 3),
        "identity_basis": (100, count + FLAME_JOINTS, 3),
        "expression_basis": (50, count + FLAME_JOINTS, 3),
        "landmark_vertices": (CONTOUR_ROWS * CONTOUR_POINTS + 51, 3),
        "landmark_weights": triangles.shape,
        "pose_basis": (9 * (FLAME_JOINTS - 1), count, 3),
        "skinning": (count, FLAME_JOINTS),
        "parents": (FLAME_JOINTS,),
        "rest_pose": (FLAME_JOINTS, 3),
    }
    for name, shape in wanted.items():
        if arrays[name].shape != shape:
            raise ValueError(f"{name} is {list(arrays[name].shape)} instead of {list(shape)}")
    parents = tuple(int(parent) for parent in arrays["parents"])
    if triangles.min() < 0 or triangles.max() >= count:
        raise ValueError(f"landmarks lie on vertices {triangles.min()} to {triangles.max()}")
    if parents[0] != -1 or any(not 0 <= parent < i for i, parent in enumerate(parents) if i):
        raise ValueError(f"its joints hang on {parents}, which is no chain from the root")
    face = Morphable(*(arrays[name] for name in list(wanted)[:5]))
    return Flame(face, arrays["pose_basis"], arrays["skinning"], parents, arrays["rest_pose"])


def _namespace(array: Array) -> Any:
    return np if isinstance(array, np.ndarray) else sys.modules["torch"]


def _transpose(matrix: Array) -> Array:
    return matrix.swapaxes(-1, -2)
