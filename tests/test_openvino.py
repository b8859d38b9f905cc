"""The OpenVINO backend: the graph it makes, the cache it keeps, and what it does not send."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper, numpy_helper

from diffusionact import bundle_path
from diffusionact import manifest as manifest_file
from diffusionact.errors import BackendMissing, BundleError, SettingsError
from diffusionact.manifest import TensorSpec
from diffusionact.runtime.component import (
    Component,
    frames_at_once,
    open_component,
    open_reusing,
)
from diffusionact.runtime.loop import AnyLoop, open_loop
from diffusionact.runtime.trial import fixed_input

openvino = pytest.importorskip(
    "diffusionact.runtime.openvino", exc_type=BackendMissing, reason="no openvino; make dev has it"
)

GROUPS, CHANNELS, SIDE = 4, 8, 16
# float32 sums over 512 numbers, in another order, of values about 100 from zero
NORM_ATOL = 2e-4
STEP_FP32_ATOL = 1e-4  # of a network of 60 layers whose output is about 1
STEP_BF16_PSNR_DB = 45.0  # one step; 54.7 and more were seen on recorded inputs


@pytest.fixture
def cache_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "cache"
    monkeypatch.setenv("DIFFUSIONACT_CACHE", str(folder))
    return folder


def norm_model(path: Path, rank: int) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
    """A group norm with weights of its own, of [1, C, *sizes]."""
    shape = (1, CHANNELS, *(SIDE,) * (rank - 2))
    rng = np.random.default_rng(1)
    weights = {
        name: rng.standard_normal(CHANNELS).astype(np.float32) for name in ("weight", "bias")
    }
    node = helper.make_node(
        "GroupNormalization", ["x", *weights], ["y"], num_groups=GROUPS, epsilon=1e-5
    )
    graph = helper.make_graph(
        [node],
        "norm",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(array, name) for name, array in weights.items()],
    )
    opset = helper.make_opsetid("", 21)
    onnx.save(helper.make_model(graph, opset_imports=[opset], ir_version=10), path)
    return {"x": TensorSpec("x", "float32", shape)}, {"y": TensorSpec("y", "float32", shape)}


def opened(path: Path, specs: Any, precision: str = "fp32") -> Any:
    return openvino.open_model(path, *specs, device="cpu", threads=1, precision=precision)


def ran(part: Component, **inputs: Any) -> dict[str, Any]:
    outputs = {n: np.zeros(s.shape, np.float32) for n, s in part.outputs.items()}
    part.bind(**inputs, **outputs)
    part.run()
    return outputs


@pytest.mark.parametrize("rank", [3, 4])
@pytest.mark.parametrize("mean", [0.0, 100.0])
def test_a_norm_is_the_textbooks_also_far_from_zero(
    tmp_path: Path, cache_dir: Path, rank: int, mean: float
) -> None:
    specs = norm_model(tmp_path / "norm.onnx", rank)
    rng = np.random.default_rng(2)
    # A spread of 0.05 around 100: E[x^2] - m^2 has lost all its digits here.
    x = (rng.standard_normal(specs[0]["x"].shape) * 0.05 + mean).astype(np.float32)
    seen = ran(opened(tmp_path / "norm.onnx", specs), x=x)["y"]
    weights = np.random.default_rng(1).standard_normal((2, CHANNELS)).astype(np.float32)
    rows = x.astype(np.float64).reshape(GROUPS, -1)
    spread = np.sqrt(rows.var(axis=1, keepdims=True) + 1e-5)
    plain = ((rows - rows.mean(axis=1, keepdims=True)) / spread).reshape(1, CHANNELS, -1)
    wanted = (plain * weights[0][:, None] + weights[1][:, None]).reshape(x.shape)
    # float32 cannot tell numbers near 100 apart below 4e-6: over a spread of 0.05 that is 8e-5.
    np.testing.assert_allclose(seen, wanted, atol=NORM_ATOL if mean else 1e-5)


def shipped_step(backend: str, precision: str) -> Component:
    bundle = Path(bundle_path())
    manifest = manifest_file.read(bundle, verify=False)
    return open_component(
        bundle, manifest, "unet_step", backend=backend, precision=precision, threads=1
    )


def test_the_shipped_network_is_onnx_runtimes_in_both_precisions() -> None:
    wanted = shipped_step("ort", "fp32")
    rng = np.random.default_rng(3)
    inputs = {n: rng.standard_normal(s.shape).astype(np.float32) for n, s in wanted.inputs.items()}
    due = ran(wanted, **inputs)["prediction"]
    near = ran(shipped_step("openvino", "fp32"), **inputs)["prediction"]
    np.testing.assert_allclose(near, due, atol=STEP_FP32_ATOL)
    if "bf16" not in openvino.PRECISIONS:
        pytest.skip("this processor has no bfloat16")
    coarse = ran(shipped_step("openvino", "bf16"), **inputs)["prediction"]
    error = np.sqrt(np.mean((coarse - due) ** 2.0))
    assert error > 1e-5, "not bfloat16 at all"
    assert 20 * np.log10(np.ptp(due) / error) > STEP_BF16_PSNR_DB


REUSE_PSNR_DB = 35.0  # what the option promises; 39 was seen on this noise, 44 on real frames


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_reused_features_give_nearly_the_same_frame(precision: str) -> None:
    bundle = Path(bundle_path())
    manifest = manifest_file.read(bundle, verify=False)
    if precision not in openvino.PRECISIONS:
        pytest.skip("this processor has no bfloat16")
    x_T, image, condition = fixed_input(manifest)

    def opened(approximate: Any) -> AnyLoop:
        return open_loop(
            bundle, manifest, steps=4, also=(2,), backend="openvino", device="cpu",
            precision=precision, threads=1, approximate=approximate,
        )  # fmt: skip

    def rendered(loop: AnyLoop) -> Any:
        return loop.render(x_T, loop.encode(image, condition)).copy()

    reusing, whole = opened("reuse"), opened(None)
    near, due = rendered(reusing), rendered(whole)
    np.testing.assert_array_equal(rendered(reusing), near)  # nothing is carried to the next frame
    error = np.sqrt(np.mean((near - due) ** 2.0))
    assert error > 1e-4, "nothing was reused"
    assert 20 * np.log10(2.0 / error) > REUSE_PSNR_DB
    if precision == "fp32":  # first and last step are whole: of two steps none is left to reuse in
        for loop in (reusing, whole):
            loop.set_steps(2)
        np.testing.assert_allclose(rendered(reusing), rendered(whole), atol=1e-5)


def test_the_halves_of_a_cut_network_make_the_whole() -> None:
    """With features of the very same input, the shallow half gives what the whole gives."""
    bundle = Path(bundle_path())
    manifest = manifest_file.read(bundle, verify=False)
    whole, shallow = open_reusing(bundle, manifest, backend="openvino", precision="fp32", threads=1)
    rng = np.random.default_rng(5)
    inputs = {n: rng.standard_normal(s.shape).astype(np.float32) for n, s in whole.inputs.items()}
    due = ran(whole, **inputs)["prediction"]
    np.testing.assert_allclose(ran(shallow, **inputs)["prediction"], due, atol=1e-5)
    plain = ran(shipped_step("openvino", "fp32"), **inputs)["prediction"]
    np.testing.assert_allclose(due, plain, atol=1e-5)


def test_a_network_without_skip_connections_cannot_be_cut(toy_bundle: Path) -> None:
    manifest = manifest_file.read(toy_bundle)
    with pytest.raises(BundleError, match=r"unet_step\.onnx: no skip connection"):
        open_reusing(toy_bundle, manifest, backend="openvino", precision="fp32")
    with pytest.raises(SettingsError, match="'ort' cannot reuse"):
        open_reusing(toy_bundle, manifest, backend="ort")


TOGETHER_PSNR_DB = {"fp32": 90.0, "bf16": 45.0}  # to single frames; no bit differed here


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_frames_at_once_are_each_what_they_are_alone(precision: str) -> None:
    if precision not in openvino.PRECISIONS:
        pytest.skip("this processor has no bfloat16")
    bundle, frames = Path(bundle_path()), 3
    manifest = manifest_file.read(bundle, verify=False)
    together = open_component(
        bundle, manifest, "unet_step",
        backend="openvino", precision=precision, threads=1, frames=frames,
    )  # fmt: skip
    rng = np.random.default_rng(6)
    inputs = {
        n: rng.standard_normal(s.shape).astype(np.float32) for n, s in together.inputs.items()
    }
    inputs["x_t"][1:] = inputs["x_t"][0]  # as of a clip: the codes alone tell them apart
    seen = ran(together, **inputs)["prediction"]
    alone = shipped_step("openvino", precision)
    for i in range(frames):
        due = ran(alone, **{n: array[i : i + 1].copy() for n, array in inputs.items()})
        error = np.sqrt(np.mean((seen[i] - due["prediction"][0]) ** 2.0)) + 1e-12
        assert 20 * np.log10(np.ptp(seen[i]) / error) > TOGETHER_PSNR_DB[precision]
        assert np.abs(seen[i] - seen[i - 1]).max() > 0.1, "frames that differ came out alike"


def test_the_number_at_once_is_stated_for_every_precision(tmp_path: Path) -> None:
    small, large = tmp_path / "small.onnx", tmp_path / "large.onnx"
    small.touch()
    with large.open("wb") as file:  # a hole: it takes no room
        file.truncate(openvino.AT_ONCE_BYTES + 1)
    for precision in openvino.PRECISIONS:
        stated = openvino.AT_ONCE[precision]
        assert frames_at_once(small, "openvino", "cpu", precision) == stated
        assert frames_at_once(large, "openvino", "cpu", precision) == 1
    assert frames_at_once(large, "openvino", "auto", "fp32", 7) == 7
    assert frames_at_once(small, "ort", "cpu", "auto") == 1
    assert frames_at_once(small, "ort", "cpu", "auto", 1) == 1
    with pytest.raises(SettingsError, match="at_once=2: backend 'ort' renders one frame at a time"):
        frames_at_once(small, "ort", "cpu", "auto", 2)


def test_a_network_that_takes_one_frames_values_for_all_is_not_run_for_several(
    tmp_path: Path, cache_dir: Path
) -> None:
    """Nothing would fail, and every frame would get the first one's motion."""
    shape = (1, CHANNELS, SIDE, SIDE)
    nodes = [
        helper.make_node("Gather", ["scale", "first"], ["row"], axis=0),
        helper.make_node("Reshape", ["row", "column"], ["factors"]),
        helper.make_node("Mul", ["x", "factors"], ["y"]),
    ]
    graph = helper.make_graph(
        nodes,
        "picks",
        [
            helper.make_tensor_value_info("x", TensorProto.FLOAT, shape),
            helper.make_tensor_value_info("scale", TensorProto.FLOAT, (1, CHANNELS)),
        ],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [
            numpy_helper.from_array(np.array(0, np.int64), "first"),
            numpy_helper.from_array(np.array([CHANNELS, 1, 1], np.int64), "column"),
        ],
    )
    path = tmp_path / "picks.onnx"
    onnx.save(
        helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10), path
    )
    specs = (
        {
            "x": TensorSpec("x", "float32", shape),
            "scale": TensorSpec("scale", "float32", (1, CHANNELS)),
        },
        {"y": TensorSpec("y", "float32", shape)},
    )
    opened(path, specs)
    with pytest.raises(BundleError, match=r"picks\.onnx: made for one frame at a time"):
        openvino.open_together(path, *specs, frames=2, device="cpu", threads=1, precision="fp32")


def test_a_compiled_model_is_kept_and_used_and_made_again_when_damaged(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "norm.onnx"
    specs = norm_model(path, 4)
    x = np.random.default_rng(4).standard_normal(specs[0]["x"].shape).astype(np.float32)
    first = ran(opened(path, specs), x=x)["y"]
    (kept,) = (cache_dir / "openvino").iterdir()
    assert kept.name.startswith("norm-") and kept.suffix == ".blob"

    with monkeypatch.context() as patch:
        patch.setattr(openvino, "rewrite_norms", lambda model: pytest.fail("compiled again"))
        part = opened(path, specs)
        kept.unlink()  # what was mapped stays
        np.testing.assert_array_equal(ran(part, x=x)["y"], first)

    for damage in (b"", b"short", b"x" * 4096):
        kept.write_bytes(damage)
        np.testing.assert_array_equal(ran(opened(path, specs), x=x)["y"], first)
        assert kept.stat().st_size > 4096, "the damaged file is still there"


def test_another_file_of_the_same_name_is_another_model(tmp_path: Path, cache_dir: Path) -> None:
    path = tmp_path / "norm.onnx"
    opened(path, norm_model(path, 4))
    opened(path, norm_model(path, 3))
    assert len(list((cache_dir / "openvino").iterdir())) == 2


def test_without_a_place_for_the_cache_it_works_all_the_same(
    tmp_path: Path, cache_dir: Path
) -> None:
    cache_dir.write_text("a file where the folder should be")
    path = tmp_path / "norm.onnx"
    specs = norm_model(path, 4)
    x = np.ones(specs[0]["x"].shape, np.float32)
    assert np.isfinite(ran(opened(path, specs), x=x)["y"]).all()


def test_the_cache_forgets_what_was_not_used_for_longest(
    tmp_path: Path, cache_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "norm.onnx"
    opened(path, norm_model(path, 4))
    (old,) = (cache_dir / "openvino").iterdir()
    monkeypatch.setattr(openvino, "KEPT_BYTES", old.stat().st_size * 1.5)
    opened(path, norm_model(path, 3))
    (left,) = (cache_dir / "openvino").iterdir()
    assert left != old


def test_a_run_allocates_no_array(tmp_path: Path, cache_dir: Path) -> None:
    import tracemalloc

    path = tmp_path / "norm.onnx"
    specs = norm_model(path, 4)
    part = opened(path, specs)
    x = np.ones(specs[0]["x"].shape, np.float32)
    ran(part, x=x)
    tracemalloc.start()
    part.run()
    tracemalloc.reset_peak()
    before = tracemalloc.get_traced_memory()[0]
    part.run()
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak - before < x.nbytes / 4


def test_a_file_that_is_no_model_says_how_to_mend_it(tmp_path: Path, cache_dir: Path) -> None:
    path = tmp_path / "norm.onnx"
    specs = norm_model(path, 4)
    path.write_bytes(b"garbage")
    with pytest.raises(BundleError, match=r"norm\.onnx.*OpenVINO.*diffusionact export"):
        opened(path, specs)


def test_nothing_is_reported_to_the_makers_of_openvino() -> None:
    code = (
        "import sys, socket\n"
        "def refuse(*_): raise SystemExit('a connection was tried')\n"
        "socket.socket.connect = refuse\n"
        "import diffusionact.runtime.openvino as o; o.PRECISIONS\n"
        "assert not any(m.startswith('openvino_telemetry') for m in sys.modules), 'loaded'\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
