from __future__ import annotations

import builtins
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime
import pytest

from diffusionact import manifest as manifest_file
from diffusionact.errors import BackendMissing, BundleError, DeviceError, SettingsError
from diffusionact.manifest import Manifest, TensorSpec
from diffusionact.runtime import component, ort
from diffusionact.runtime.component import Component, open_component

STEPS = {"N": 3}
FLOAT32_ATOL = 1e-6


@pytest.fixture
def manifest(toy_bundle: Path) -> Manifest:
    return manifest_file.read(toy_bundle)


def buffers(part: Component, seed: int = 0) -> dict[str, Any]:
    rng = np.random.default_rng(seed)
    specs = {**part.inputs, **part.outputs}
    return {name: rng.standard_normal(s.shape).astype(s.dtype) for name, s in specs.items()}


def test_run_writes_into_the_bound_memory_and_reads_it_again(
    toy_bundle: Path, manifest: Manifest, toy_weights: dict[str, Any]
) -> None:
    part = open_component(toy_bundle, manifest, "modulation", sizes=STEPS)
    bound = buffers(part)
    part.bind(**bound)
    for seed in (1, 2):
        fresh = np.random.default_rng(seed)
        bound["z"][:] = fresh.standard_normal(bound["z"].shape)
        part.run()
        wanted = bound["time_rows"][:, :4] * (bound["z"] @ toy_weights["code"])
        np.testing.assert_allclose(bound["scale"], wanted, atol=FLOAT32_ATOL)


def test_binding_again_moves_to_the_new_memory(toy_bundle: Path, manifest: Manifest) -> None:
    part = open_component(toy_bundle, manifest, "time", sizes=STEPS)
    first, second = buffers(part), buffers(part, 1)
    second["t"][:] = first["t"]
    part.bind(**first)
    part.run()
    kept = first["time_rows"].copy()
    part.bind(**second)
    part.run()
    np.testing.assert_array_equal(second["time_rows"], kept)
    first["time_rows"][:] = 0
    part.run()
    assert not first["time_rows"].any()


def test_bound_memory_outlives_its_callers_names(toy_bundle: Path, manifest: Manifest) -> None:
    part = open_component(toy_bundle, manifest, "time", sizes=STEPS)
    rows = np.zeros(part.outputs["time_rows"].shape, np.float32)
    part.bind(t=np.array([1, 2, 3], np.float32), time_rows=rows)
    scribble = [np.full(3, 1e9, np.float32) for _ in range(64)]  # would land in freed memory
    part.run()
    assert np.abs(rows).max() < 100 and len(scribble) == 64


def test_named_sizes_are_fixed_at_opening(toy_bundle: Path, manifest: Manifest) -> None:
    part = open_component(toy_bundle, manifest, "modulation", sizes={"N": 7})
    assert part.inputs["time_rows"].shape[0] == part.outputs["shift"].shape[0] == 7
    with pytest.raises(SettingsError, match=r"'time_rows'.*'N'"):
        open_component(toy_bundle, manifest, "modulation")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"z": np.zeros((1, 9), np.float32)}, r"'z' is float32 \[1, 9\]; wanted float32 \[1, 8\]"),
        ({"z": np.zeros((1, 8))}, r"'z' is float64"),
        ({"z": np.zeros((1, 16), np.float32)[:, ::2]}, "not contiguous"),
        ({"w": np.zeros(1, np.float32)}, "bound .*'w'"),
        ({"z": None}, r"wanted \['scale', 'shift', 'time_rows', 'z'\]"),
    ],
)
def test_memory_that_does_not_fit_is_refused(
    toy_bundle: Path, manifest: Manifest, change: dict[str, Any], message: str
) -> None:
    part = open_component(toy_bundle, manifest, "modulation", sizes=STEPS)
    arrays = {**buffers(part), **change}
    with pytest.raises(SettingsError, match=message):
        part.bind(**{name: array for name, array in arrays.items() if array is not None})


def test_an_unknown_backend_lists_the_known(toy_bundle: Path, manifest: Manifest) -> None:
    with pytest.raises(SettingsError, match=r"'abacus' is not known; choose from: .*ort"):
        open_component(toy_bundle, manifest, "encoder", backend="abacus")


def test_a_device_the_backend_lacks_is_an_error_not_a_fallback(
    toy_bundle: Path, manifest: Manifest
) -> None:
    with pytest.raises(DeviceError, match=r"'ort' runs on cpu, cuda, not on 'tpu'"):
        open_component(toy_bundle, manifest, "encoder", device="tpu")
    assert open_component(toy_bundle, manifest, "encoder", device="auto").outputs["z"].shape[0] == 1


@pytest.mark.skipif(
    ort.CUDA_PROVIDER in onnxruntime.get_available_providers(), reason="onnxruntime-gpu"
)
def test_onnx_runtime_without_cuda_says_so(
    toy_bundle: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(DeviceError, match="no CUDA provider; run: .*pip install onnxruntime-gpu"):
        open_component(toy_bundle, manifest, "encoder", device="cuda")
    # Where the provider is there and does not load, the library takes the CPU and logs a line.
    offered = ["CUDAExecutionProvider", "CPUExecutionProvider"]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: offered)
    monkeypatch.setattr("diffusionact.runtime.cuda.why_not", lambda: None)
    with (
        pytest.warns(UserWarning, match="CUDAExecutionProvider"),
        pytest.raises(DeviceError, match="could not load its CUDA provider and offers the CPU"),
    ):
        open_component(toy_bundle, manifest, "encoder", device="cuda")


def test_an_unknown_component_lists_the_known(toy_bundle: Path, manifest: Manifest) -> None:
    with pytest.raises(BundleError, match=r"no component 'decoder'.*encoder, modulation"):
        open_component(toy_bundle, manifest, "decoder")


@pytest.mark.parametrize("content", [b"", b"garbage"])
def test_a_file_that_is_no_model_names_itself_and_the_mending(
    toy_bundle: Path, manifest: Manifest, tmp_path: Path, content: bytes
) -> None:
    (tmp_path / "encoder.onnx").write_bytes(content)
    with pytest.raises(BundleError, match=r"encoder\.onnx.*diffusionact export"):
        open_component(tmp_path, manifest, "encoder")
    assert toy_bundle.exists()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("name", "picture", r"inputs \['image', 'condition'\]; the manifest says .*picture"),
        ("shape", (1, 3, 64, 64), r"'image'.*\[1, 3, 32, 32\].*\[1, 3, 64, 64\]"),
        ("shape", (3, 32, 32), r"\[3, 32, 32\]"),
        ("dtype", "uint8", r"'image' is tensor\(float\).*uint8"),
    ],
)
def test_a_model_unlike_its_manifest_is_refused(
    toy_bundle: Path, manifest: Manifest, field: str, value: Any, message: str
) -> None:
    spec = manifest.components["encoder"]
    wrong = replace(spec.inputs[0], **{field: value})
    other = replace(spec, inputs=(wrong, *spec.inputs[1:]))
    changed = replace(manifest, components={**manifest.components, "encoder": other})
    with pytest.raises(BundleError, match=message):
        open_component(toy_bundle, changed, "encoder")


def test_a_missing_library_names_the_command(
    toy_bundle: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = builtins.__import__

    def without_onnxruntime(name: str, *rest: Any, **named: Any) -> Any:
        if name == "onnxruntime":
            raise ImportError("No module named 'onnxruntime'")
        return real(name, *rest, **named)

    monkeypatch.delitem(sys.modules, "diffusionact.runtime.ort", raising=False)
    monkeypatch.setattr(builtins, "__import__", without_onnxruntime)
    with pytest.raises(BackendMissing, match="pip install onnxruntime"):
        open_component(toy_bundle, manifest, "encoder")


def test_a_backend_is_found_by_one_line_in_the_table(
    toy_bundle: Path, manifest: Manifest, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Nothing:
        DEVICES = ("null",)
        PRECISIONS = ("fp16", "fp32")

        @staticmethod
        def open_model(
            path: Path,
            inputs: dict[str, TensorSpec],
            outputs: dict[str, TensorSpec],
            *,
            device: str,
            threads: int,
            precision: str,
        ) -> tuple[str, str, int, str]:
            return path.name, device, threads, precision

    monkeypatch.setitem(sys.modules, "null_backend", Nothing)
    monkeypatch.setattr(component, "BACKENDS", {"null": "null_backend"})
    seen: Any = open_component(
        toy_bundle, manifest, "encoder", backend="null", device="auto", threads=3
    )
    assert seen == ("encoder.onnx", "null", 3, "fp16")
    with pytest.raises(SettingsError, match="'null' computes in fp16, fp32 .*not in 'int8'"):
        open_component(
            toy_bundle, manifest, "encoder", backend="null", device="null", precision="int8"
        )


def test_a_damaged_bundle_is_caught_by_its_hash(toy_bundle: Path, tmp_path: Path) -> None:
    copy = tmp_path / "copy.bundle"
    shutil.copytree(toy_bundle, copy)
    model = copy / "unet_step.onnx"
    model.write_bytes(model.read_bytes()[:-7])
    with pytest.raises(BundleError, match=r"unet_step\.onnx"):
        manifest_file.read(copy)
