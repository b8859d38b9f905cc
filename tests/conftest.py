"""Fixtures of the runtime tests: a toy bundle of real ONNX files, small enough to check by hand."""

from __future__ import annotations

import hashlib
import importlib.util
import logging
import signal
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
import numpy.typing as npt
import pytest

from diffusionact import manifest as manifest_file
from diffusionact.condition import Drawing
from diffusionact.landmarks import Landmarks

if TYPE_CHECKING:
    import onnx

TOY_SIDE, TOY_Z, TOY_K = 32, 8, 4


@pytest.fixture(scope="session", autouse=True)
def own_cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The cache directory of this run of the tests, for child processes too."""
    folder = tmp_path_factory.mktemp("cache")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("DIFFUSIONACT_CACHE", str(folder))
        yield folder


@pytest.fixture
def interruptible() -> Iterator[None]:
    """Children hear SIGINT, also where a shell started these tests in the background: it leaves
    them the signal ignored, and so would they their children."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.fixture(autouse=True)
def the_log_is_as_loud_as_before() -> Iterator[None]:
    """A command sets the level of the package's log: the next test must not hear of it."""
    log = logging.getLogger("diffusionact")
    before = log.level
    yield
    log.setLevel(before)


@pytest.fixture(autouse=True)
def onnx_runtime_is_the_default(
    request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Backend "auto" is ONNX Runtime in the tests' own process, on any machine and however busy
    it is; test_choice.py, and every command that is run as a program, get the measured one."""
    if importlib.util.find_spec("cv2") is None:
        return  # a GPU machine's own Python, perhaps: its tests choose by name
    if "measured_choice" not in request.fixturenames:
        monkeypatch.setattr("diffusionact.runtime.choice.installed", lambda library: False)


@pytest.fixture
def measured_choice() -> None:
    """The product's own choice of a backend."""


def _toy_weights() -> dict[str, npt.NDArray[np.float32]]:
    """The toy networks' weights; everything in them is linear but one tanh and one product."""
    rng = np.random.default_rng(7)

    def normal(*shape: int, scale: float = 1.0) -> npt.NDArray[np.float32]:
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    return {
        "encode": normal(3 * TOY_SIDE**2, TOY_Z, scale=0.02),
        "time": normal(1, 2 * TOY_K, scale=0.5),
        "time_bias": normal(2 * TOY_K) + 1.0,
        "code": normal(TOY_Z, TOY_K, scale=0.3),
        "first": normal(TOY_K, 3, 3, 3, scale=0.3),
        "last": normal(3, TOY_K, 1, 1, scale=0.6),
    }


def _frontal_face(side: int = TOY_SIDE) -> Landmarks:
    """A plain frontal face that fills a picture of side x side px, depth included."""
    angle = np.linspace(np.pi, 0.0, 17)
    jaw = np.stack([0.5 + 0.34 * np.cos(angle), 0.5 + 0.38 * np.sin(angle)], axis=1)
    brows = [(x, 0.36) for x in (*np.linspace(0.25, 0.42, 5), *np.linspace(0.58, 0.75, 5))]
    nose = [(0.5, y) for y in (0.45, 0.5, 0.55, 0.6)]
    nose += [(x, 0.63) for x in np.linspace(0.44, 0.56, 5)]
    turn = np.pi * np.array([1.0, 0.66, 0.33, 0.0, -0.33, -0.66])
    eyes = [(x + 0.06 * np.cos(a), 0.44 - 0.02 * np.sin(a)) for x in (0.37, 0.63) for a in turn]
    outer = np.linspace(np.pi, -np.pi, 13)[:-1]
    lips = [(0.5 + 0.1 * np.cos(a), 0.72 - 0.04 * np.sin(a)) for a in outer]
    inner = np.linspace(np.pi, -np.pi, 9)[:-1]
    lips += [(0.5 + 0.07 * np.cos(a), 0.72 - 0.01 * np.sin(a)) for a in inner]
    xy = np.array([*jaw, *brows, *nose, *eyes, *lips]) * side
    depth = side * 1.2 * ((xy[:, :1] / side - 0.5) ** 2)
    points = np.concatenate([xy, depth], axis=1).astype(np.float32)
    gaze = np.stack([points[36:42, :2].mean(axis=0), points[42:48, :2].mean(axis=0)])
    return Landmarks(points, gaze.astype(np.float32))


def _frontal_portrait(
    height: int = 90, width: int = 80, seed: int = 0
) -> tuple[npt.NDArray[np.uint8], Landmarks]:
    """A smooth picture, BGR, and a face of 64 px in the middle of it."""
    rng = np.random.default_rng(seed)
    coarse = rng.integers(0, 256, (height // 10, width // 10, 3)).astype(np.uint8)
    picture = coarse.repeat(10, axis=0).repeat(10, axis=1)
    shift = np.array([[1.0, 0.0, (width - 64) / 2], [0.0, 1.0, (height - 64) / 2]])
    return picture, _frontal_face(64).transformed(shift)


def _toy_models() -> dict[str, onnx.ModelProto]:
    import onnx
    from onnx import TensorProto, helper, numpy_helper

    weights = _toy_weights()
    picture, n = (1, 3, TOY_SIDE, TOY_SIDE), "N"

    def value(name: str, *shape: int | str) -> onnx.ValueInfoProto:
        return helper.make_tensor_value_info(name, TensorProto.FLOAT, shape)

    def model(
        inputs: list[onnx.ValueInfoProto],
        outputs: list[onnx.ValueInfoProto],
        used: dict[str, npt.NDArray[np.generic]],
        nodes: list[tuple[str, str, str, dict[str, object]]],
    ) -> onnx.ModelProto:
        graph = helper.make_graph(
            [
                helper.make_node(kind, into.split(), out.split(), **attributes)
                for kind, into, out, attributes in nodes
            ],
            "toy",
            inputs,
            outputs,
            [numpy_helper.from_array(array, name) for name, array in used.items()],
        )
        made = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
        onnx.checker.check_model(made, full_check=True)
        return made

    half = {"cuts": np.array([TOY_K, TOY_K], np.int64)}
    column = {"column": np.array([1, TOY_K, 1, 1], np.int64)}
    return {
        "encoder": model(
            [value("image", *picture), value("condition", *picture)],
            [value("z", 1, TOY_Z)],
            {"encode": weights["encode"]},
            [
                ("Add", "image condition", "sum", {}),
                ("Flatten", "sum", "flat", {}),
                ("MatMul", "flat encode", "z", {}),
            ],
        ),
        "time": model(
            [value("t", n)],
            [value("time_rows", n, 2 * TOY_K)],
            {
                "time": weights["time"] / np.float32(1000.0),
                "bias": weights["time_bias"],
                "last": np.array([1], np.int64),
            },
            [
                ("Unsqueeze", "t last", "t_column", {}),
                ("MatMul", "t_column time", "product", {}),
                ("Add", "product bias", "time_rows", {}),
            ],
        ),
        "modulation": model(
            [value("z", 1, TOY_Z), value("time_rows", n, 2 * TOY_K)],
            [value("scale", n, TOY_K), value("shift", n, TOY_K)],
            {"code": weights["code"], **half},
            [
                ("MatMul", "z code", "factor", {}),
                ("Split", "time_rows cuts", "rows_a rows_b", {"axis": 1}),
                ("Mul", "rows_a factor", "scale", {}),
                ("Mul", "rows_b factor", "shift", {}),
            ],
        ),
        "unet_step": model(
            [value("x_t", *picture), value("scale", 1, TOY_K), value("shift", 1, TOY_K)],
            [value("prediction", *picture)],
            {"first": weights["first"], "last": weights["last"], **column},
            [
                ("Conv", "x_t first", "h", {"pads": [1, 1, 1, 1]}),
                ("Reshape", "scale column", "a", {}),
                ("Reshape", "shift column", "b", {}),
                ("Mul", "h a", "scaled", {}),
                ("Add", "scaled b", "moved", {}),
                ("Tanh", "moved", "bent", {}),
                ("Conv", "bent last", "prediction", {}),
            ],
        ),
    }


def _write_toy_bundle(folder: Path, own_inversion: bool = False) -> Path:
    """A complete bundle: v prediction, 4 render steps, 5 inversion steps."""
    import onnx

    folder.mkdir(parents=True)
    models = _toy_models()
    if own_inversion:
        own = {f"{name}_invert": models[name] for name in ("time", "modulation", "unet_step")}
        models.update(own)
    blank = manifest_file.Manifest(
        name="toy",
        image_size=TOY_SIDE,
        z_size=TOY_Z,
        modulation_size=TOY_K,
        time_row_size=2 * TOY_K,
        prediction="v",
        schedule=manifest_file.Schedule(),
        render=manifest_file.Sampling(4, (2, 4), {"2": (200, 700)}),
        invert=manifest_file.Sampling(5),
        crop=manifest_file.Crop(rotate=False, scale=1.1),
        drawing=Drawing(thickness_px=1, disc_radius_px=1.0, antialias=True),
        landmark_layout="ibug68+gaze2",
        training=manifest_file.Training("toy", "MIT", "rendered faces"),
        licence="MIT",
        weights_sha256=hashlib.sha256(b"toy").hexdigest(),
        components={},
    )
    tensors = manifest_file.component_tensors(blank)
    components = {}
    for name, made in models.items():
        path = folder / f"{name}.onnx"
        onnx.save(made, path)
        inputs, outputs = tensors[name.removesuffix("_invert")]
        components[name] = manifest_file.ComponentSpec(
            path.name, manifest_file.file_sha256(path), inputs, outputs
        )
    manifest_file.write(folder, replace(blank, components=components))
    return folder


@pytest.fixture(scope="session")
def toy_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle whose networks are a few lines of NumPy; read only."""
    return _write_toy_bundle(tmp_path_factory.mktemp("bundles") / "toy.bundle")


@pytest.fixture(scope="session")
def own_inversion_bundle(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same networks, once more for inversion; read only."""
    folder = tmp_path_factory.mktemp("bundles") / "own.bundle"
    return _write_toy_bundle(folder, own_inversion=True)


@pytest.fixture(scope="session")
def toy_weights() -> dict[str, npt.NDArray[np.float32]]:
    """The weights of the toy bundle's networks."""
    return _toy_weights()


@pytest.fixture
def face() -> Landmarks:
    """A frontal face that fills a picture of TOY_SIDE px."""
    return _frontal_face()


@pytest.fixture
def portrait() -> tuple[npt.NDArray[np.uint8], Landmarks]:
    """A picture of 90 x 80 px, BGR, and the landmarks of the face in it."""
    return _frontal_portrait()
