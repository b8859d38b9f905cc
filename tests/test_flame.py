"""FLAME: read without executing anything, cut down to 68 landmarks, evaluated as published."""

from __future__ import annotations

import itertools
import pickle
import sys
import types
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from diffusionact.errors import BundleError, SettingsError
from diffusionact.morphable import axis_angle, flame_from, flame_pixels, load_flame
from diffusionact.training.models.frozen import flame
from tests.golden import rule

pytestmark = pytest.mark.torch

GOLDEN = Path(__file__).parent / "golden" / "flame.npz"
PIXELS = 1e-4  # px at coordinates of some hundred: a few float32 roundings
METRES = 1e-6
EXACT = 1e-7  # float64 arithmetic on a model stored as float32

Arrays = dict[str, NDArray[Any]]


def golden() -> Arrays:
    """The published class's inputs and outputs, and the synthetic model under published names."""
    with np.load(GOLDEN) as data:
        arrays = {name: data[name] for name in data.files}
    vertices = arrays["weights"].shape[0]
    shapes = {"v_template": (vertices, 3), "shapedirs": (vertices, 3, 400)}
    shapes["posedirs"] = (vertices, 3, 36)
    for name, shape in shapes.items():
        scale = 0.1 if name == "v_template" else 0.01
        arrays[name] = rule.tensor(f"flame/{name}", shape, "image") * scale
    for name, shape in {"in_shape": (5, 100), "in_exp": (5, 50)}.items():
        arrays[name] = rule.tensor(f"flame/{name}", shape, "image")
    return arrays


def golden_codes() -> tuple[NDArray[Any], ...]:
    arrays = golden()
    return tuple(arrays[f"in_{name}"] for name in ("shape", "exp", "pose", "cam"))


def synthetic(seed: int = 0, vertices: int = 60, faces: int = 90) -> Arrays:
    """A model of random numbers in the published form."""
    rng = np.random.default_rng(seed)
    corners = [rng.choice(vertices, 3, replace=False) for _ in range(faces)]
    return {
        "v_template": rng.normal(0, 0.1, (vertices, 3)),
        "shapedirs": rng.normal(0, 0.01, (vertices, 3, 400)),
        "posedirs": rng.normal(0, 0.01, (vertices, 3, 36)),
        "J_regressor": rng.dirichlet(np.ones(vertices), 5),
        "weights": rng.dirichlet(np.ones(5), vertices),
        "f": np.array(corners, np.uint32),
        "kintree_table": np.array([[2**32 - 1, 0, 1, 1, 1], range(5)], np.int64),
        "static_lmk_faces_idx": rng.integers(0, faces, 51),
        "static_lmk_bary_coords": rng.dirichlet(np.ones(3), 51),
        "dynamic_lmk_faces_idx": rng.integers(0, faces, (79, 17)),
        "dynamic_lmk_bary_coords": rng.dirichlet(np.ones(3), (79, 17)),
    }


def matrix_of(axis: NDArray[Any]) -> NDArray[Any]:
    """The rotation as the power series of its generator."""
    x, y, z = axis
    generator = np.array([[0, -z, y], [z, 0, -x], [-y, x, 0]])
    term, total = np.eye(3), np.eye(3)
    for n in range(1, 30):
        term = term @ generator / n
        total = total + term
    return total


def by_hand(arrays: Arrays, shape: NDArray[Any], exp: NDArray[Any], axes: Any) -> NDArray[Any]:
    """The landmarks by the textbook: all vertices, 4x4 transforms, joints from the vertices."""
    basis = np.concatenate([arrays["shapedirs"][..., :100], arrays["shapedirs"][..., 300:350]], -1)
    vertices = arrays["v_template"] + basis @ np.concatenate([shape, exp])
    joints = arrays["J_regressor"] @ vertices
    turns = [matrix_of(axis) for axis in axes]
    bent = np.concatenate([(turn - np.eye(3)).ravel() for turn in turns[1:]])
    vertices = vertices + arrays["posedirs"] @ bent
    world: list[NDArray[Any]] = []
    for i, parent in enumerate((-1, 0, 1, 1, 1)):
        local = np.eye(4)
        local[:3, :3] = turns[i]
        local[:3, 3] = joints[i] - (joints[parent] if i else 0)
        world.append(world[parent] @ local if i else local)
    away = [np.block([[np.eye(3), -joint[:, None]], [np.zeros((1, 3)), 1]]) for joint in joints]
    blend = np.einsum("vj,jab->vab", arrays["weights"], np.stack(world) @ np.stack(away))
    whole = np.concatenate([vertices, np.ones((len(vertices), 1))], 1)
    vertices = np.einsum("vab,vb->va", blend, whole)[:, :3]
    head = turns[0] @ turns[1]
    yaw = np.degrees(np.arctan2(-head[2, 0], np.hypot(head[0, 0], head[1, 0])))
    degrees = [*range(40), *range(-1, -40, -1)]
    row = degrees.index(int(np.clip(np.round(yaw), -39, 39)))
    points = []
    for triangle, weights in itertools.chain(
        zip(
            arrays["dynamic_lmk_faces_idx"][row],
            arrays["dynamic_lmk_bary_coords"][row],
            strict=True,
        ),
        zip(arrays["static_lmk_faces_idx"], arrays["static_lmk_bary_coords"], strict=True),
    ):
        points.append(weights @ vertices[arrays["f"][triangle]])
    return np.array(points)


@pytest.mark.parametrize("kind", ["float32", "float64", "torch"])
def test_landmarks_are_those_of_the_published_class(kind: str) -> None:
    convert: Any = torch.as_tensor if kind == "torch" else lambda x: x.astype(kind)
    model = flame_from(flame.reduced(golden())).map(convert)
    shape, expression, pose, camera = map(convert, golden_codes())
    points = model.landmarks(shape, expression, pose)
    pixels = flame_pixels(points, camera)
    assert str(pixels.dtype).endswith("float64" if kind == "float64" else "float32")
    assert abs(np.asarray(pixels[..., :2]) - golden()["out_landmarks2d_px224"]).max() < PIXELS
    one = flame_pixels(model.landmarks(shape[1], expression[1], pose[1]), camera[1])
    assert np.allclose(np.asarray(one), np.asarray(pixels[1]), atol=PIXELS)


def test_kept_vertices_are_those_of_the_published_class() -> None:
    arrays = golden()
    shape, expression, pose, _ = golden_codes()
    vertices = flame_from(flame.reduced(arrays)).vertices(shape, expression, pose)
    used = [arrays["f"][arrays[f"{k}_lmk_faces_idx"]].ravel() for k in ("dynamic", "static")]
    kept = np.unique(np.concatenate(used))
    assert vertices.shape == (5, len(kept), 3)
    assert abs(vertices - arrays["out_verts"][:, kept]).max() < METRES


@pytest.mark.parametrize("yaw_deg", [0, 0.6, -0.6, 17, -17, 39.4, -39.4, 75, -75, -130])
def test_landmarks_follow_the_textbook_at_every_yaw(yaw_deg: float) -> None:
    arrays, rng = synthetic(), np.random.default_rng(3)
    model = flame_from(flame.reduced(arrays)).map(lambda x: np.asarray(x, np.float64))
    shape, expression, jaw = rng.normal(size=100), rng.normal(size=50), rng.normal(0, 0.3, 3)
    head = np.array([0.05, np.radians(yaw_deg), 0.02])
    axes = [head, np.zeros(3), jaw, np.zeros(3), np.zeros(3)]
    found = model.landmarks(shape, expression, np.concatenate([head, jaw]))
    assert abs(found - by_hand(arrays, shape, expression, axes)).max() < METRES


def test_leading_axes_broadcast_as_eq_8_needs_them() -> None:
    model = flame_from(flame.reduced(golden()))
    shape, expression, pose, camera = golden_codes()
    mixed = model.landmarks(shape[0], expression, pose)  # one source, many driving frames
    assert mixed.shape == (5, 68, 3)
    for i in range(5):
        alone = model.landmarks(shape[0], expression[i], pose[i])
        assert np.allclose(mixed[i], alone, atol=METRES)
    faces = model.landmarks(shape, expression[2], pose[2])
    assert np.allclose(faces[3], model.landmarks(shape[3], expression[2], pose[2]), atol=METRES)
    grid = model.landmarks(shape[:, None], expression[None], pose[None])
    assert np.allclose(grid[0], mixed, atol=METRES) and grid.shape == (5, 5, 68, 3)
    assert flame_pixels(grid, camera).shape == grid.shape


def test_shape_has_the_gradient_of_its_torch_landmarks() -> None:
    model = flame_from(flame.reduced(golden())).map(
        lambda x: torch.as_tensor(x, dtype=torch.float64)
    )
    codes = [torch.as_tensor(c, dtype=torch.float64) for c in golden_codes()[:3]]
    codes[2][4] = 0.0  # no turn at all: the angle's root must not give NaN
    for code in codes:
        code.requires_grad_(True)
    model.landmarks(*codes).sum().backward()
    assert all(code.grad is not None and torch.isfinite(code.grad).all() for code in codes)
    step, grad = 1e-6, codes[0].grad
    moved = codes[0].detach().clone()
    moved[0, 3] += step
    with torch.no_grad():
        slope = (model.landmarks(moved, *codes[1:]) - model.landmarks(*codes)).sum() / step
    assert grad is not None and float(slope) == pytest.approx(float(grad[0, 3]), rel=1e-4)


def test_axis_angle_turns_about_its_axis() -> None:
    rng = np.random.default_rng(5)
    vectors = rng.normal(size=(20, 3))
    vectors[0] = 0
    matrices = axis_angle(vectors)
    assert np.allclose(matrices, [matrix_of(vector) for vector in vectors], atol=EXACT)
    assert np.array_equal(axis_angle(np.zeros(3, np.float32)), np.eye(3))


def test_pixels_are_the_crop_s_with_y_down_and_depth_away() -> None:
    points = np.array([[0.0, 0.0, 0.0], [0.1, 0.0, 0.0], [0.0, 0.1, 0.0], [0.0, 0.0, 0.1]])
    pixels = flame_pixels(points, np.array([5.0, 0.02, 0.03]))
    assert np.allclose(pixels[0], [112 + 11.2, 112 - 16.8, 0])
    assert np.allclose(pixels[1] - pixels[0], [56, 0, 0])
    assert np.allclose(pixels[2] - pixels[0], [0, -56, 0])
    assert np.allclose(pixels[3] - pixels[0], [0, 0, -56])


# Files


class Ch:
    """Named as chumpy's array below; kept only where pickle looks for it while writing."""

    def __init__(self, x: NDArray[Any]) -> None:
        self.x = x


class csc_matrix:  # noqa: N801
    def __init__(self, dense: NDArray[Any]) -> None:
        rows, columns = np.nonzero(dense.T)[::-1]
        self._shape = dense.shape
        self.data = dense[rows, columns]
        self.indices = rows.astype(np.int32)
        counts = np.bincount(columns, minlength=dense.shape[1])
        self.indptr = np.concatenate([[0], np.cumsum(counts)]).astype(np.int32)


@pytest.fixture
def files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> tuple[Path, Path]:
    """The two files as published: chumpy and scipy objects in one, torch tensors in the other."""
    arrays = synthetic()
    model: dict[str, Any] = {name: arrays[name] for name in flame.MODEL}
    regressor = np.where(model["J_regressor"] < 0.01, 0, model["J_regressor"])
    model["shapedirs"], model["J_regressor"] = Ch(model["shapedirs"]), csc_matrix(regressor)
    model["posedirs"] = np.asfortranarray(model["posedirs"])
    model |= {"bs_type": "lrotmin", "J": np.zeros((5, 3))}
    points: dict[str, Any] = {name: arrays[name] for name in flame.LANDMARKS}
    for name in ("dynamic_lmk_faces_idx", "dynamic_lmk_bary_coords"):
        points[name] = torch.as_tensor(points[name])
    points["dynamic_lmk_bary_coords"] = points["dynamic_lmk_bary_coords"].transpose(0, 1)
    points["dynamic_lmk_bary_coords"] = (
        points["dynamic_lmk_bary_coords"].contiguous().transpose(0, 1)
    )
    paths = tmp_path / "generic_model.pkl", tmp_path / "landmark_embedding.npy"
    with monkeypatch.context() as patch:  # pickle looks for both under their published names
        for cls, module in ((Ch, "chumpy.ch"), (csc_matrix, "scipy.sparse.csc")):
            patch.setattr(cls, "__module__", module)
            for parent in itertools.accumulate(module.split("."), "{}.{}".format):
                patch.setitem(sys.modules, parent, types.ModuleType(parent))
            setattr(sys.modules[module], cls.__name__, cls)
        paths[0].write_bytes(pickle.dumps(model, protocol=2))
    np.save(paths[1], np.array(points, dtype=object), allow_pickle=True)
    return paths


def test_published_files_are_read_in_either_order(files: tuple[Path, Path]) -> None:
    arrays, wanted = flame.read(*files), synthetic()
    wanted["J_regressor"] = np.where(wanted["J_regressor"] < 0.01, 0, wanted["J_regressor"])
    assert set(arrays) == set(wanted)
    assert all(np.array_equal(arrays[name], wanted[name]) for name in wanted)
    assert set(flame.read(*files[::-1])) == set(wanted)


def test_flame_npz_gives_the_same_landmarks(files: tuple[Path, Path], tmp_path: Path) -> None:
    arrays = flame.reduced(flame.read(*files))
    np.savez(tmp_path / "flame.npz", **arrays)
    loaded, made = load_flame(tmp_path / "flame.npz"), flame_from(arrays)
    codes = [np.full(n, 0.3, np.float32) for n in (100, 50, 6)]
    assert loaded.landmarks(*codes).dtype == np.float32
    assert np.array_equal(loaded.landmarks(*codes), made.landmarks(*codes))


def emoca_state(arrays: Arrays) -> dict[str, Any]:
    """The same model as EMOCA's checkpoint carries it."""
    basis = np.concatenate([arrays["shapedirs"][..., :100], arrays["shapedirs"][..., 300:350]], -1)
    held = {
        "v_template": arrays["v_template"],
        "shapedirs": basis,
        "posedirs": arrays["posedirs"].reshape(-1, 36).T,
        "J_regressor": arrays["J_regressor"],
        "parents": np.array([-1, 0, 1, 1, 1]),
        "lbs_weights": arrays["weights"],
        "faces_tensor": arrays["f"].astype(np.int64),
        "lmk_faces_idx": arrays["static_lmk_faces_idx"],
        "lmk_bary_coords": arrays["static_lmk_bary_coords"],
        "dynamic_lmk_faces_idx": arrays["dynamic_lmk_faces_idx"],
        "dynamic_lmk_bary_coords": arrays["dynamic_lmk_bary_coords"],
        "full_lmk_faces_idx": np.zeros((1, 68), np.int64),
        "neck_pose": np.zeros((1, 3)),
        "eye_pose": np.zeros((1, 6)),
    }
    state = {f"deca.flame.{name}": torch.tensor(values) for name, values in held.items()}
    return {"deca.E_flame.layers.0.bias": torch.zeros(3), **state}


def test_emoca_s_copy_is_the_same_model() -> None:
    arrays = synthetic()
    ours, theirs = flame.reduced(arrays), flame.reduced(flame.from_emoca(emoca_state(arrays)))
    assert set(ours) == set(theirs)
    assert all(np.array_equal(ours[name], theirs[name]) for name in ours)


def test_emoca_s_neck_and_eyes_keep_their_pose() -> None:
    arrays, neck, eyes = synthetic(), np.array([0.1, 0.3, -0.2]), np.linspace(-0.2, 0.3, 6)
    state = emoca_state(arrays)
    state["deca.flame.neck_pose"] = torch.tensor(neck[None])
    state["deca.flame.eye_pose"] = torch.tensor(eyes[None])
    model = flame_from(flame.reduced(flame.from_emoca(state)))
    model = model.map(lambda x: np.asarray(x, np.float64))
    shape, expression, pose = np.zeros(100), np.zeros(50), np.array([0, 0.2, 0, 0.1, 0, 0])
    axes = [pose[:3], neck, pose[3:], eyes[:3], eyes[3:]]
    found = model.landmarks(shape, expression, pose)
    assert abs(found - by_hand(arrays, shape, expression, axes)).max() < METRES


def test_a_file_alone_or_another_one_is_refused(files: tuple[Path, Path], tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="static_lmk_faces_idx.*give both"):
        flame.read(files[0])
    with pytest.raises(SettingsError, match="give both"):
        flame.from_emoca({"deca.E_flame.layers.0.bias": torch.zeros(3)})
    with pytest.raises(SettingsError, match="cannot be read"):
        flame.read(tmp_path / "absent.pkl")
    other = tmp_path / "other"
    np.save(other, np.zeros(3))
    with pytest.raises(SettingsError, match="one array of float64"):
        flame.read(tmp_path / "other.npy")
    for content, said in (({"weights_only": 1}, "none of FLAME's"), ([1, 2], "a list")):
        other.write_bytes(pickle.dumps(content))
        with pytest.raises(SettingsError, match=said):
            flame.read(other)
    other.write_text("<!DOCTYPE html><html>sign in</html>")
    with pytest.raises(SettingsError, match="not a readable pickle.*fetch it again"):
        flame.read(other)


@pytest.mark.parametrize("part", [0, 1])
@pytest.mark.parametrize("kept", [0.02, 0.5, 0.999])
def test_a_cut_off_file_is_refused(files: tuple[Path, Path], part: int, kept: float) -> None:
    data = files[part].read_bytes()
    files[part].write_bytes(data[: int(kept * len(data))])
    with pytest.raises(SettingsError, match=r"fetch it again|not a readable"):
        flame.read(*files)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("weights", np.zeros((60, 24)), r"weights .* is \[60, 24\] instead of \['V', 5\]"),
        ("v_template", np.zeros((59, 3)), r"\['V', 3"),
        ("shapedirs", np.zeros((60, 3, 120)), "120 directions"),
        ("f", "triangles", "f .* is str"),
    ],
)
def test_arrays_of_another_shape_are_refused(
    name: str, value: Any, said: str, tmp_path: Path
) -> None:
    file = tmp_path / "model.pkl"
    file.write_bytes(pickle.dumps({**synthetic(), name: value}))
    with pytest.raises(SettingsError, match=said):
        flame.read(file)


@pytest.mark.parametrize(
    ("name", "value", "said"),
    [
        ("static_lmk_faces_idx", 90, "triangles 0 to 90, but it has 90"),
        ("f", 60, "vertices that it has not"),
        ("posedirs", np.nan, "pose_basis is not finite"),
        ("kintree_table", 3, "hang on"),
    ],
)
def test_arrays_that_make_no_model_are_refused(name: str, value: float, said: str) -> None:
    arrays = synthetic()
    arrays["static_lmk_faces_idx"][1] = 0
    arrays[name].reshape(-1)[0] = value
    with pytest.raises(SettingsError, match=said):
        flame.reduced(arrays)


def test_flame_npz_is_checked(tmp_path: Path) -> None:
    path, arrays = tmp_path / "flame.npz", flame.reduced(synthetic())
    with pytest.raises(BundleError, match="import --flame"):
        load_flame(path)
    for change, said in (
        ({"format": np.array("2")}, "format is '2'"),
        ({"skinning": arrays["skinning"][:-1]}, "skinning is"),
        ({"landmark_vertices": arrays["landmark_vertices"] + 1000}, "landmarks lie on"),
        ({"parents": np.array([-1, 0, 1, 4, 1])}, "no chain"),
        ({"template": np.array({"a": 1}, object)}, "allow_pickle=False"),
    ):
        np.savez(path, **{**arrays, **change})
        with pytest.raises(BundleError, match=said):
            load_flame(path)
    np.savez(path, **{name: value for name, value in arrays.items() if name != "skinning"})
    with pytest.raises(BundleError, match="skinning"):
        load_flame(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(BundleError, match="not a readable FLAME model"):
        load_flame(path)
