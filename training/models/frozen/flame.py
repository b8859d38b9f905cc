"""FLAME's published files -> the small model of its 68 landmarks that `morphable.Flame` evaluates.

What to call: `read(*paths)` for the makers' pickle and landmark file, or `from_emoca(state_dict)`
for the copy that EMOCA's checkpoint carries; `reduced(arrays)` for the small model's arrays; then
`numpy.savez(weights / "flame.npz", **arrays)`. Nothing in the files is executed.
"""

from __future__ import annotations

import io
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from diffusionact.errors import SettingsError
from diffusionact.morphable import (
    CONTOUR_POINTS,
    CONTOUR_ROWS,
    FLAME_FORMAT,
    FLAME_JOINTS,
    flame_from,
)
from diffusionact.training.models.frozen import inert

Arrays = Mapping[str, NDArray[Any]]

IDENTITY, EXPRESSION = 100, 50  # directions that EMOCA gives codes for
FIRST_EXPRESSION = 300  # column of the published basis; identity has those before it
STATIC_POINTS = 51
ROOT = 2**32 - 1  # the root's parent in the published table
# array -> its shape, with V vertices, F triangles, and B directions of shape
MODEL = {
    "v_template": ("V", 3),
    "shapedirs": ("V", 3, "B"),
    "posedirs": ("V", 3, 9 * (FLAME_JOINTS - 1)),
    "J_regressor": (FLAME_JOINTS, "V"),
    "weights": ("V", FLAME_JOINTS),
    "f": ("F", 3),
    "kintree_table": (2, FLAME_JOINTS),
}
LANDMARKS = {
    "static_lmk_faces_idx": (STATIC_POINTS,),
    "static_lmk_bary_coords": (STATIC_POINTS, 3),
    "dynamic_lmk_faces_idx": (CONTOUR_ROWS, CONTOUR_POINTS),
    "dynamic_lmk_bary_coords": (CONTOUR_ROWS, CONTOUR_POINTS, 3),
}
REST_POSE = {"neck_pose": (3,), "eye_pose": (6,)}  # only in EMOCA's copy; zeros otherwise
HEADERS = {
    (1, 0): np.lib.format.read_array_header_1_0,
    (2, 0): np.lib.format.read_array_header_2_0,
}
# EMOCA's names, below `deca.flame.`, where they differ
EMOCA_PREFIX = "deca.flame."
EMOCA_NAMES = {
    "weights": "lbs_weights",
    "f": "faces_tensor",
    "static_lmk_faces_idx": "lmk_faces_idx",
    "static_lmk_bary_coords": "lmk_bary_coords",
}


def read(*paths: Path | str) -> dict[str, NDArray[Any]]:
    """The arrays of FLAME's files taken together, under their published names.

    paths: the model (generic_model.pkl) and the landmarks (landmark_embedding.npy), in any order.
    Raises: SettingsError: a file is missing, is something else, or an array is in none of them.
    """
    arrays: dict[str, NDArray[Any]] = {}
    for path in map(Path, paths):
        content = _content(path)
        known = {key: content[key] for key in (*MODEL, *LANDMARKS) if key in content}
        if not known:
            raise SettingsError(
                f"{path} holds none of FLAME's arrays, only {sorted(map(str, content))[:6]}; give "
                "generic_model.pkl or landmark_embedding.npy"
            )
        arrays |= known
    _check(arrays, " and ".join(map(str, paths)))
    return arrays


def from_emoca(state: Mapping[str, Any]) -> dict[str, NDArray[Any]]:
    """The arrays of the FLAME in EMOCA's checkpoint, under their published names.

    state: the Lightning checkpoint's `state_dict`.
    Raises: SettingsError: one is missing, or has another shape.
    """
    held = {
        str(name).removeprefix(EMOCA_PREFIX): value.detach().cpu().numpy()
        for name, value in state.items()
        if str(name).startswith(EMOCA_PREFIX) and isinstance(value, Tensor)
    }
    names = {name: EMOCA_NAMES.get(name, name) for name in (*MODEL, *LANDMARKS, *REST_POSE)}
    arrays = {ours: held[theirs] for ours, theirs in names.items() if theirs in held}
    if "parents" in held:
        arrays["kintree_table"] = np.stack([held["parents"], np.arange(len(held["parents"]))])
    if "posedirs" in arrays:  # there [36, V * 3], as its sum wants it
        basis = arrays["posedirs"]
        arrays["posedirs"] = basis.reshape(len(basis), -1, 3).transpose(1, 2, 0)
    arrays |= {name: arrays[name].reshape(-1) for name in REST_POSE if name in arrays}
    _check(arrays, "EMOCA's checkpoint")
    return arrays


def reduced(arrays: Arrays) -> dict[str, NDArray[Any]]:
    """The arrays of flame.npz: only the vertices and directions that the landmarks depend on.

    arrays: as `read` or `from_emoca` gives them.
    Raises: SettingsError: they do not make a model.

    Source: the joints are linear in the vertices, and so in the codes: their regressor times the
    bases is a basis of their own (5 x 3 x 150 numbers).
    """
    kept, corners = _corners(arrays)
    regressor = np.asarray(arrays["J_regressor"], np.float64)

    def with_joints(directions: NDArray[Any]) -> NDArray[np.float32]:
        """[V, 3, ...] -> [kept + joints, 3, ...]."""
        whole = np.asarray(directions, np.float64)
        return np.concatenate([whole[kept], np.tensordot(regressor, whole, 1)]).astype(np.float32)

    shape = with_joints(arrays["shapedirs"]).transpose(2, 0, 1)
    first = FIRST_EXPRESSION if len(shape) > IDENTITY + EXPRESSION else IDENTITY
    weights = [np.reshape(arrays[f"{k}_lmk_bary_coords"], (-1, 3)) for k in ("dynamic", "static")]
    rest = {name: arrays.get(name, np.zeros(shape)) for name, shape in REST_POSE.items()}
    parents = np.asarray(arrays["kintree_table"][0], np.int64)
    model = {
        "template": with_joints(arrays["v_template"]),
        "identity_basis": shape[:IDENTITY],
        "expression_basis": shape[first : first + EXPRESSION],
        "landmark_vertices": corners,
        "landmark_weights": np.concatenate(weights).astype(np.float32),
        "pose_basis": np.asarray(arrays["posedirs"], np.float32)[kept].transpose(2, 0, 1),
        "skinning": np.asarray(arrays["weights"], np.float32)[kept],
        "parents": np.where(parents == ROOT, -1, parents).astype(np.int32),
        "rest_pose": _rest_pose(rest),
    }
    return _checked(model)


def _corners(arrays: Arrays) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """The vertices that landmarks lie between, and each landmark's three as indices into them.

    Raises: SettingsError: there are no such triangles or vertices.
    """
    faces = np.asarray(arrays["f"], np.int64)
    triangles = np.concatenate(
        [np.ravel(arrays[f"{kind}_lmk_faces_idx"]) for kind in ("dynamic", "static")]
    ).astype(np.int64)
    if triangles.min() < 0 or triangles.max() >= len(faces):
        raise SettingsError(
            f"FLAME's landmarks lie on triangles {triangles.min()} to {triangles.max()}, but it "
            f"has {len(faces)}; give a landmark file and a model that belong together"
        )
    if faces.min() < 0 or faces.max() >= len(arrays["v_template"]):
        raise SettingsError("FLAME's triangles name vertices that it has not; fetch the file again")
    kept, corners = np.unique(faces[triangles], return_inverse=True)
    return kept, corners.reshape(-1, 3).astype(np.int32)


def _rest_pose(rest: Arrays) -> NDArray[np.float32]:
    """Axis-angle of the five joints: float32 [5, 3]; head and jaw come from the codes."""
    still = np.zeros(3)
    axes = [still, rest["neck_pose"], still, *np.reshape(rest["eye_pose"], (2, 3))]
    return np.stack(axes).astype(np.float32)


def _checked(model: Arrays) -> dict[str, NDArray[Any]]:
    """The small model, contiguous and with its format, if it can be evaluated."""
    for name, values in model.items():
        if not np.isfinite(values).all():
            raise SettingsError(f"FLAME's {name} is not finite; fetch the file again")
    try:
        flame_from(model)
    except ValueError as error:
        raise SettingsError(f"FLAME's files make no model: {error}; fetch them again") from error
    whole = {name: np.ascontiguousarray(values) for name, values in model.items()}
    return {"format": np.array(FLAME_FORMAT), **whole}


def _content(path: Path) -> dict[Any, Any]:
    """The dictionary in a pickle, or in an array of objects that numpy.save wrote."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise SettingsError(f"{path} cannot be read: {error.strerror}") from error
    if data.startswith(np.lib.format.MAGIC_PREFIX):
        stream = io.BytesIO(data)
        try:
            version = np.lib.format.read_magic(stream)
            read_header = HEADERS[version]
            _, _, dtype = read_header(stream)
        except (ValueError, KeyError) as error:
            raise SettingsError(f"{path} is not a readable .npy file ({error})") from error
        if not dtype.hasobject:
            raise SettingsError(f"{path} holds one array of {dtype}, no landmarks of FLAME")
        data = data[stream.tell() :]
    content = inert.read(data, str(path))
    if isinstance(content, list) and len(content) == 1:
        content = content[0]
    if not isinstance(content, dict):
        raise SettingsError(
            f"{path} holds a {type(content).__name__} where a dictionary of arrays was wanted; "
            "give generic_model.pkl or landmark_embedding.npy"
        )
    return content


def _check(arrays: Mapping[str, Any], where: str) -> None:
    """Nothing; raises SettingsError unless every array is there, numbers, and of its shape."""
    missing = [name for name in (*MODEL, *LANDMARKS) if name not in arrays]
    if missing:
        raise SettingsError(
            f"FLAME's arrays {missing} are not in {where}; give both generic_model.pkl and "
            "landmark_embedding.npy"
        )
    sizes: dict[str, int] = {}
    for name, wanted in {**MODEL, **LANDMARKS, **REST_POSE}.items():
        if name not in arrays:
            continue
        value = arrays[name]
        seen = value.shape if isinstance(value, np.ndarray) else None
        fits = seen is not None and len(seen) == len(wanted)
        for size, want in zip(seen or (), wanted, strict=False):
            fits &= size == (sizes.setdefault(want, size) if isinstance(want, str) else want)
        if not fits or value.dtype.kind not in "iuf":
            shown = list(seen) if seen is not None else type(value).__name__
            raise SettingsError(
                f"FLAME's {name} in {where} is {shown} instead of {list(wanted)} numbers "
                f"({', '.join(f'{key} = {size}' for key, size in sizes.items())})"
            )
    if sizes["B"] < FIRST_EXPRESSION + EXPRESSION and sizes["B"] != IDENTITY + EXPRESSION:
        raise SettingsError(
            f"FLAME's shapedirs in {where} has {sizes['B']} directions; 400 are published, and "
            f"{FIRST_EXPRESSION + EXPRESSION} needed"
        )
