"""Weights to bundle: the graphs, their agreement with PyTorch, and a folder that is whole."""

from __future__ import annotations

import collections
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn

from diffusionact import cli
from diffusionact import manifest as manifest_file
from diffusionact.condition import Drawing
from diffusionact.errors import BundleError, SettingsError
from diffusionact.export import bundle, parity, restore, to_onnx, wrap
from diffusionact.manifest import Crop, Sampling, TensorSpec
from diffusionact.schedule import inversion_timesteps
from diffusionact.training import weights, weights_folder
from diffusionact.training.faces import POSE_RANGE_DEG
from diffusionact.training.models import FACE128, ReenactmentEncoder, UNet
from diffusionact.training.models.frozen import NETWORKS, FrozenNetwork, flame

pytestmark = pytest.mark.torch

TINY = dataclasses.replace(
    FACE128,
    image_size=32,
    channels=8,
    channel_mult=(1, 2),
    encoder_mult=(1, 2),
    attention_at=(4,),
    embed=16,
)
ROUNDING = 1e-5  # float32 sums in another order, values of order 1


def networks(own_inversion: bool = False) -> dict[str, nn.Module]:
    """Networks without a zero parameter, so that every path of the graph counts."""
    torch.manual_seed(0)
    parts: dict[str, nn.Module] = {"render": UNet(TINY), "reenactment": ReenactmentEncoder(TINY)}
    if own_inversion:
        parts["invert"] = UNet(TINY)
    with torch.no_grad():
        for network in parts.values():
            for parameter in network.parameters():
                if not parameter.any():
                    parameter.normal_(0, 0.05)
    return parts


PROVENANCE = {"recipe": "tiny", "stages": [1, 2]}


def save_weights(
    folder: Path, own_inversion: bool = False, student: weights.Student | None = None
) -> Path:
    path = folder / "tiny.safetensors"
    weights.save(path, TINY, networks(own_inversion), provenance=PROVENANCE, student=student)
    return path


@pytest.fixture(scope="module")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("export")
    bundle.export_bundle(save_weights(folder), folder / "bundle")
    return folder / "bundle"


def graph(exported: Path, name: str) -> onnx.ModelProto:
    return onnx.load(exported / f"{name}.onnx")


def test_the_bundle_is_whole(exported: Path) -> None:
    manifest = manifest_file.read(exported)
    names = {f"{name}.onnx" for name in manifest_file.REQUIRED}
    assert {p.name for p in exported.iterdir()} == names | {"manifest.json", "parity.json"}
    assert list(exported.parent.glob(".part-*")) == []
    source = exported.parent / "tiny.safetensors"
    assert manifest.weights_sha256 == manifest_file.file_sha256(source)
    assert manifest.training.provenance == {"recipe": "tiny", "stages": "[1, 2]"}
    assert (manifest.image_size, manifest.z_size, manifest.prediction) == (32, 16, TINY.prediction)


def test_a_network_that_predicts_x0_lists_its_inversion(exported: Path) -> None:
    invert = manifest_file.read(exported).invert
    assert TINY.prediction == "x0" and set(invert.timesteps) == {"10", "20", "50"}
    for count, listed in invert.timesteps.items():
        assert listed == tuple(inversion_timesteps("x0", int(count)))
    card = dataclasses.replace(bundle.FACE128_CARD, invert=invert)
    assert bundle._with_timesteps(card, "v") is invert


def test_the_card_says_the_poses_that_the_renderer_draws() -> None:
    ranges = bundle.FACE128_CARD.training.pose_range_deg
    wanted = zip(("yaw", "pitch", "roll"), POSE_RANGE_DEG, strict=True)
    assert ranges == {name: (-limit, limit) for name, limit in wanted}


def test_a_bundle_is_as_readable_as_any_new_file(exported: Path, tmp_path: Path) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    assert exported.stat().st_mode == (tmp_path / "folder").stat().st_mode
    assert {p.stat().st_mode for p in exported.iterdir()} == {(tmp_path / "file").stat().st_mode}


def test_the_parity_table_covers_components_and_frames(exported: Path) -> None:
    rows = json.loads((exported / "parity.json").read_text())["rows"]
    assert [row["what"] for row in rows] == [
        "encoder", "time", "modulation", "unet_step",
        "render, T=20", "inversion, T=50, and render, T=20",
    ]  # fmt: skip
    assert all(0 <= row["mean_error"] <= row["max_error"] <= row["max_allowed"] for row in rows)
    assert [row["max_allowed"] for row in rows[-2:]] == [2e-3, 2e-2]


@pytest.mark.parametrize("name", manifest_file.REQUIRED)
def test_graphs_are_static_and_carry_their_weights(exported: Path, name: str) -> None:
    model = graph(exported, name)
    assert [(o.domain, o.version) for o in model.opset_import if not o.domain] == [("", 21)]
    kinds = collections.Counter(node.op_type for node in model.graph.node)
    assert not set(kinds) & set(to_onnx.SHAPE_OPERATORS)
    for tensor in model.graph.initializer:
        assert tensor.data_location == TensorProto.DEFAULT
        assert tensor.data_type != TensorProto.FLOAT or np.prod(tensor.dims) <= 64
    spec = manifest_file.read(exported).components[name]
    for values, specs in ((model.graph.input, spec.inputs), (model.graph.output, spec.outputs)):
        seen = [(v.name, [d.dim_param or d.dim_value for d in dims(v)]) for v in values]
        assert seen == [(s.name, list(s.shape)) for s in specs]


def dims(value: onnx.ValueInfoProto) -> Sequence[Any]:
    return value.type.tensor_type.shape.dim


@pytest.mark.parametrize("name", manifest_file.REQUIRED)
def test_graphs_tell_nothing_of_the_machine(exported: Path, name: str) -> None:
    content = (exported / f"{name}.onnx").read_bytes()
    assert b".py" not in content and b"stack_trace" not in content


def test_onnx_runtime_folds_the_casts_away(exported: Path, tmp_path: Path) -> None:
    options = onnxruntime.SessionOptions()
    options.graph_optimization_level = onnxruntime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    options.optimized_model_filepath = str(tmp_path / "folded.onnx")
    onnxruntime.InferenceSession(
        str(exported / "unet_step.onnx"), options, providers=["CPUExecutionProvider"]
    )
    before, after = graph(exported, "unet_step"), onnx.load(tmp_path / "folded.onnx")
    assert TensorProto.FLOAT16 in {i.data_type for i in before.graph.initializer}
    assert TensorProto.FLOAT16 not in {i.data_type for i in after.graph.initializer}


@pytest.mark.parametrize("count", [1, 7])
def test_any_number_of_timesteps(exported: Path, count: int) -> None:
    manifest = manifest_file.read(exported)
    run = parity.onnx_runner(exported, manifest)
    loaded = weights.load(exported.parent / "tiny.safetensors")
    unet = loaded.network("render")
    assert isinstance(unet, UNet)
    t, z = np.linspace(0, 999, count, dtype=np.float32), np.ones((1, 16), np.float32)
    (rows,) = run("time", t)
    due_rows = unet.time_rows(torch.from_numpy(t))
    np.testing.assert_allclose(rows, due_rows, atol=ROUNDING, rtol=ROUNDING)
    due = unet.modulation(torch.from_numpy(z), due_rows)
    for seen, expected in zip(run("modulation", z, rows), due, strict=True):
        np.testing.assert_allclose(seen, expected, atol=ROUNDING, rtol=ROUNDING)


def test_the_step_answers_as_the_whole_network(exported: Path) -> None:
    run = parity.onnx_runner(exported, manifest_file.read(exported))
    unet = weights.load(exported.parent / "tiny.safetensors").network("render")
    torch.manual_seed(1)
    x, z, t = torch.randn(1, 3, 32, 32), torch.randn(1, 16), torch.tensor([400.0])
    scale, shift = run("modulation", z.numpy(), run("time", t.numpy())[0])
    (seen,) = run("unet_step", x.numpy(), scale, shift)
    np.testing.assert_allclose(seen, unet(x, t, z), atol=10 * ROUNDING)


def test_parity_sees_a_wrong_weight(exported: Path) -> None:
    loaded = weights.load(exported.parent / "tiny.safetensors")
    encoder, unet = loaded.network("reenactment"), loaded.network("render")
    assert isinstance(encoder, ReenactmentEncoder) and isinstance(unet, UNet)
    unet.position_stem[0, 0, 0, 0] += 0.5
    rows = parity.measure(
        exported, manifest_file.read(exported), wrap.components(encoder, unet, None)
    )
    failed = {row.what for row in rows if not row.passed}
    assert {"unet_step", "render, T=20"} <= failed and "encoder" not in failed
    assert "TOO LARGE" in parity.table(rows)


def test_float16_storage_rounds_nothing() -> None:
    exact = np.array([1.0, 0.5, -2.25], np.float32)
    inexact = np.array([1.0, 0.1, 1e6], np.float32)
    y = helper.make_tensor_value_info("y", TensorProto.FLOAT, [3])
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("Add", ["a", "b"], ["y"])], "g", [], [y],
            [numpy_helper.from_array(exact, "a"), numpy_helper.from_array(inexact, "b")],
        ),
        opset_imports=[helper.make_opsetid("", 21)], ir_version=10,
    )  # fmt: skip
    to_onnx.store_as_float16(model)
    stored = {i.name: i.data_type for i in model.graph.initializer}
    assert stored == {"a.float16": TensorProto.FLOAT16, "b": TensorProto.FLOAT}
    session = onnxruntime.InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    np.testing.assert_array_equal(session.run(None, {})[0], exact + inexact)


class _DataDependent(nn.Module):
    def forward(self, t: torch.Tensor) -> torch.Tensor:
        return t / t.shape[0]


def test_a_graph_that_computes_shapes_is_refused(tmp_path: Path) -> None:
    t, y = TensorSpec("t", "float32", ("N",)), TensorSpec("y", "float32", ("N",))
    with pytest.raises(RuntimeError, match="computes shapes"):
        to_onnx.export(_DataDependent().eval(), [t], [y], tmp_path / "x.onnx")
    assert list(tmp_path.iterdir()) == []


@pytest.fixture
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Export without tracing: each graph is its module's name."""

    def write(module: nn.Module, _inputs: object, _outputs: object, path: Path) -> None:
        path.write_text(type(module).__name__)

    monkeypatch.setattr(to_onnx, "export", write)
    monkeypatch.setattr(parity, "measure", lambda *_: ())


@pytest.mark.usefixtures("quick")
def test_inversion_with_weights_of_its_own(tmp_path: Path) -> None:
    bundle.export_bundle(save_weights(tmp_path, own_inversion=True), tmp_path / "bundle")
    manifest = manifest_file.read(tmp_path / "bundle")
    assert set(manifest.components) == {*manifest_file.REQUIRED, *manifest_file.OWN_INVERSION}


STUDENT = weights.Student(
    "ab" * 32, Sampling(2, (1,), {"2": (500, 980), "1": (980,)}), Sampling(1, (), {"1": (600,)})
)


@pytest.mark.usefixtures("quick")
def test_a_student_says_how_it_is_run(tmp_path: Path) -> None:
    bundle.export_bundle(save_weights(tmp_path, student=STUDENT), tmp_path / "bundle")
    manifest = manifest_file.read(tmp_path / "bundle")
    assert manifest.student_of == STUDENT.of
    assert (manifest.render, manifest.invert) == (STUDENT.render, STUDENT.invert)
    assert parity.counts(manifest) == (2, 1), "the counts that exist"


@pytest.mark.usefixtures("quick")
def test_a_bundle_is_replaced_and_nothing_else_is(tmp_path: Path) -> None:
    source, out = save_weights(tmp_path), tmp_path / "bundle"
    bundle.export_bundle(source, out)
    bundle.export_bundle(source, out, dataclasses.replace(bundle.FACE128_CARD, name="second"))
    assert manifest_file.read(out).name == "second"
    assert sorted(p.name for p in tmp_path.iterdir()) == ["bundle", "tiny.safetensors"]
    with pytest.raises(BundleError, match="is no bundle"):
        bundle.export_bundle(source, tmp_path)
    assert source.is_file()


@pytest.mark.usefixtures("quick")
def test_a_failed_comparison_leaves_no_bundle(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    row = parity.Row("unet_step", 1.0, 0.1, 1e-3, 1e-4)
    monkeypatch.setattr(parity, "measure", lambda *_: (row,))
    source = save_weights(tmp_path)
    with pytest.raises(BundleError, match="TOO LARGE"):
        bundle.export_bundle(source, tmp_path / "bundle")
    assert [p.name for p in tmp_path.iterdir()] == ["tiny.safetensors"]


def test_missing_weights_are_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no such weights file"):
        bundle.export_bundle(tmp_path / "absent.safetensors", tmp_path / "bundle")


def tracker_network(name: str) -> FrozenNetwork:
    """A helper network with small random weights, in evaluation mode."""
    torch.manual_seed(0)
    network = NETWORKS[name]().eval().requires_grad_(False)
    state = network.state_dict()
    for tensor in state.values():
        tensor.mul_(0.9)
    return NETWORKS[name].from_tensors(state)


def face_model() -> dict[str, Any]:
    """The arrays of a FLAME of random numbers."""
    rng = np.random.default_rng(0)
    return {
        "v_template": rng.normal(0, 0.1, (60, 3)), "shapedirs": rng.normal(0, 0.01, (60, 3, 400)),
        "posedirs": rng.normal(0, 0.01, (60, 3, 36)), "J_regressor": np.full((5, 60), 1 / 60),
        "weights": np.full((60, 5), 0.2), "f": rng.permuted(np.tile(np.arange(60), (90, 1)), axis=1)[:, :3],
        "kintree_table": np.array([[-1, 0, 1, 1, 1], [0, 1, 2, 3, 4]]),
        "static_lmk_faces_idx": rng.integers(0, 90, 51),
        "static_lmk_bary_coords": np.full((51, 3), 1 / 3),
        "dynamic_lmk_faces_idx": rng.integers(0, 90, (79, 17)),
        "dynamic_lmk_bary_coords": np.full((79, 17, 3), 1 / 3),
    }  # fmt: skip


def imported(folder: Path, *helpers: str) -> Path:
    """A folder as `diffusionact import` leaves it."""
    folder.mkdir()
    path = folder / weights_folder.MODEL_FILE
    weights.save(path, TINY, networks(True), provenance={"licence": "x"}, dtype=torch.float32)
    paths = [path] + [
        weights_folder.save_helper(folder, tracker_network(n), "0" * 64) for n in helpers
    ]
    if helpers:
        paths.append(weights_folder.save_flame(folder, flame.reduced(face_model())))
    files = {"diffusionact": {"title": "DiffusionAct", "licence": "none stated"}}
    outputs = {path.name: manifest_file.file_sha256(path) for path in paths}
    weights_folder.write_record(folder, weights_folder.Record(files, outputs), {})
    return folder


@pytest.mark.usefixtures("quick")
def test_an_imported_folder_becomes_a_published_bundle(tmp_path: Path) -> None:
    source = imported(tmp_path / "weights")
    bundle.export_bundle(source, tmp_path / "bundle")
    manifest = manifest_file.read(tmp_path / "bundle")
    assert set(manifest.components) == {*manifest_file.REQUIRED, *manifest_file.OWN_INVERSION}
    assert manifest.name == "diffusionact32" and manifest.licence == "DiffusionAct: none stated"
    assert (manifest.render.steps, manifest.invert.steps) == (20, 50), "the authors' counts"
    assert manifest.crop == Crop(rotate=True, scale=1.0) and manifest.drawing == Drawing()
    assert manifest.training.domain != bundle.FACE128_CARD.training.domain
    assert not manifest.tracker and not manifest.assets
    model = source / weights_folder.MODEL_FILE
    assert manifest.weights_sha256 == manifest_file.file_sha256(model)


@pytest.mark.usefixtures("quick")
def test_what_the_folder_has_of_the_tracker_goes_along(tmp_path: Path) -> None:
    bundle.export_bundle(imported(tmp_path / "weights", "s3fd"), tmp_path / "bundle")
    manifest = manifest_file.read(tmp_path / "bundle")
    assert set(manifest.tracker) == {"s3fd"} and set(manifest.assets) == {"flame"}
    assert (tmp_path / "bundle" / "s3fd.onnx").read_text() == "S3FD"
    asset = (tmp_path / "bundle" / manifest.assets["flame"].file).read_bytes()
    assert asset == (tmp_path / "weights" / "flame.npz").read_bytes()


@pytest.mark.usefixtures("quick")
@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda f: (f / "import.json").unlink(), "has no diffusionact.safetensors of an import"),
        (lambda f: (f / "diffusionact.safetensors").unlink(), "diffusionact.safetensors: gone"),
        (
            lambda f: (f / "diffusionact.safetensors").write_bytes(b"x"),
            "diffusionact.safetensors: sha256 .* says",
        ),
        (lambda f: (f / "import.json").write_text("{}"), "not a record of an import"),
        (
            lambda f: (f / "import.json").write_text('{"files": {"a": 1}, "outputs": {}}'),
            "not a record of an import",
        ),
    ],
)
def test_a_folder_that_is_no_import_is_refused(tmp_path: Path, change: Any, message: str) -> None:
    source = imported(tmp_path / "weights")
    change(source)
    with pytest.raises(SettingsError, match=message):
        bundle.export_bundle(source, tmp_path / "bundle")
    assert not (tmp_path / "bundle").exists()


@pytest.mark.slow
def test_the_tracker_s_graphs_answer_as_its_networks(tmp_path: Path) -> None:
    bundle.export_bundle(imported(tmp_path / "weights", *NETWORKS), tmp_path / "bundle")
    manifest = manifest_file.read(tmp_path / "bundle")
    assert set(manifest.tracker) == set(NETWORKS)
    rows = json.loads((tmp_path / "bundle" / "parity.json").read_text())["rows"]
    assert {row["what"] for row in rows} >= set(NETWORKS)
    assert all(row["max_error"] <= row["max_allowed"] for row in rows)


# The way back


def changed(exported: Path, folder: Path, **values: Any) -> Path:
    """A copy of the bundle with other values in its manifest."""
    folder.mkdir()
    for file in exported.iterdir():
        (folder / file.name).write_bytes(file.read_bytes())
    manifest = dataclasses.replace(manifest_file.read(exported), **values)
    manifest_file.write(folder, manifest)
    return folder


def test_the_weights_come_back_out_of_the_bundle(
    exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To the last byte, so that a second export is of the same hash, too. Many of these parameters
    are equal, ones and zeros, which a graph holds once."""
    source, back = exported.parent / "tiny.safetensors", tmp_path / "back.safetensors"
    assert cli.main(["export", str(exported), "-o", str(back), "--json", "-q"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["same"] is True and told["parts"] == ["render", "reenactment"]
    assert back.read_bytes() == source.read_bytes()
    assert told["weights_sha256"] == manifest_file.read(exported).weights_sha256
    assert weights.load(back).provenance == PROVENANCE


def test_a_student_with_inversion_of_its_own_comes_back(exported: Path, tmp_path: Path) -> None:
    components = manifest_file.read(exported).components
    own = {name: components[name.removesuffix("_invert")] for name in manifest_file.OWN_INVERSION}
    student = {"student_of": STUDENT.of, "render": STUDENT.render, "invert": STUDENT.invert}
    folder = changed(exported, tmp_path / "b", components={**components, **own}, **student)
    made = restore.restore_weights(folder, tmp_path / "back.safetensors")
    assert not made.same and set(made.parts) == {"render", "invert", "reenactment"}
    loaded = weights.load(made.path)
    assert loaded.student == STUDENT and loaded.config == TINY
    due = weights.load(exported.parent / "tiny.safetensors").parts["render"]
    for part in ("render", "invert"):
        assert due.keys() == loaded.parts[part].keys()
        assert all(torch.equal(due[name], loaded.parts[part][name]) for name in due)


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        (None, "before manifests stated the network's sizes"),
        ({"channels": 16}, r"position_stem has shape .*, wanted shape"),
        ({"attention_at": (4, 8)}, "is not there, wanted shape"),
    ],
)
def test_a_bundle_of_other_networks_gives_no_weights(
    exported: Path, tmp_path: Path, sizes: dict[str, Any] | None, message: str
) -> None:
    network = manifest_file.read(exported).network
    folder = changed(
        exported, tmp_path / "b", network={} if sizes is None else {**network, **sizes}
    )
    with pytest.raises(BundleError, match=message):
        restore.restore_weights(folder, tmp_path / "back.safetensors")
    with pytest.raises(SettingsError, match="a folder; give -o a file"):
        restore.restore_weights(folder, tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["b"]
