"""8 bits: calibrated on a real frame, held to the gate, and built by the real TensorRT for RTX."""

from __future__ import annotations

import dataclasses
import hashlib
import importlib.metadata
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
from onnx import TensorProto

from diffusionact import bundle_path, engine_files, manifest
from diffusionact.engines import build as engines
from diffusionact.engines import precision, quantize
from diffusionact.engines.build import Settings
from diffusionact.engines.quantize import Calibration
from diffusionact.errors import EngineError, SettingsError
from tests import half

NAME = "unet_step"


def run(model: onnx.ModelProto, feed: quantize.Feed) -> dict[str, Any]:
    """The outputs by name, of ONNX Runtime."""
    options = onnxruntime.SessionOptions()
    options.log_severity_level, options.intra_op_num_threads = 3, 1
    content = model.SerializeToString()
    session = onnxruntime.InferenceSession(content, options, providers=["CPUExecutionProvider"])
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feed)), strict=True))


@pytest.fixture(scope="module")
def feeds() -> list[dict[str, Any]]:
    return [dict(feed) for feed in half.record_frame(bundle_path())[NAME]]


@pytest.fixture(scope="module")
def model() -> onnx.ModelProto:
    return onnx.load(bundle_path() / f"{NAME}.onnx")


@pytest.fixture(scope="module")
def digest() -> str:
    return manifest.read(bundle_path()).components[NAME].sha256


@pytest.fixture(scope="module")
def int8(model: onnx.ModelProto, digest: str, feeds: list[dict[str, Any]]) -> Calibration:
    return quantize.calibrate(model, digest, "int8", feeds, run)


def test_int8_passes_the_gate_on_the_shipped_model(int8: Calibration) -> None:
    print(f"int8: {int8.psnr_db:.1f} dB, {len(int8.ranges)} convolutions")
    assert quantize.LEAST_PSNR_DB <= int8.psnr_db < 70, "far from what fp16 alone would give"
    assert all(size > 0 for size in int8.ranges.values())


@pytest.mark.slow
def test_fp8_passes_the_gate_on_the_shipped_model(
    model: onnx.ModelProto, digest: str, feeds: list[dict[str, Any]]
) -> None:
    found = quantize.calibrate(model, digest, "fp8", feeds, run)
    print(f"fp8: {found.psnr_db:.1f} dB")
    assert quantize.LEAST_PSNR_DB <= found.psnr_db < 70


def test_who_is_in_8_bits(model: onnx.ModelProto, int8: Calibration) -> None:
    made = quantize.quantized(model, int8.ranges, "int8")
    counts = precision.census(made)
    assert counts["QuantizeLinear"] == {"int8": len(int8.ranges)}
    assert counts["DequantizeLinear"] == {"float16": 2 * len(int8.ranges)}
    weights = {t.name: t for t in made.graph.initializer}
    back = {n.output[0]: n for n in made.graph.node if n.op_type == "DequantizeLinear"}
    for node in made.graph.node:
        if node.op_type == "Conv":
            narrow = weights.get(node.input[1])
            if narrow is not None:
                assert min(narrow.dims[:2]) < quantize.MIN_CHANNELS, node.name
            else:
                stored = weights[back[node.input[1]].input[0]]
                assert stored.data_type == TensorProto.INT8
    assert made.ByteSize() < 0.6 * precision.to_fp16(model).ByteSize()


def test_the_gate_refuses(model: onnx.ModelProto, digest: str, feeds: list[dict[str, Any]]) -> None:
    with pytest.raises(EngineError, match=r"dB from fp32, 200\.0 dB is the least"):
        quantize.calibrate(model, digest, "int8", feeds, run, least_psnr_db=200.0)


def test_what_cannot_be_calibrated(
    model: onnx.ModelProto, feeds: list[dict[str, Any]], int8: Calibration
) -> None:
    with pytest.raises(SettingsError, match="at least 4"):
        quantize.calibrate(model, "", "int8", feeds[:3], run)
    with pytest.raises(SettingsError, match="'int4'"):
        quantize.calibrate(model, "", "int4", feeds, run)
    time = onnx.load(bundle_path() / "time.onnx")
    with pytest.raises(EngineError, match="wide enough"):
        quantize.calibrate(time, "", "int8", [{"t": np.float32([1.0])}] * 4, run)
    some = dict(list(int8.ranges.items())[1:])
    with pytest.raises(EngineError, match="no range; calibrate again"):
        quantize.quantized(model, some, "int8")


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "missing": (lambda p: p.unlink(), "not readable"),
    "cut": (lambda p: p.write_bytes(p.read_bytes()[:50]), "damaged"),
    "other type": (lambda p: p.write_text('{"kind": 8}'), "damaged"),
    "other graph": (
        lambda p: p.write_text(json.dumps({**json.loads(p.read_text()), "onnx_sha256": "0" * 64})),
        "000000000000, wanted int8",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_calibration_is_of_its_graph(name: str, tmp_path: Path) -> None:
    path, digest = tmp_path / "c.json", hashlib.sha256(b"graph").hexdigest()
    made = Calibration(digest, "int8", {"conv": 1.5}, 4, 40.0)
    quantize.write(path, made)
    assert quantize.read(path, digest, "int8") == made
    with pytest.raises(EngineError, match="wanted fp8"):
        quantize.read(path, digest, "fp8")
    damage, message = DAMAGES[name]
    damage(path)
    with pytest.raises(EngineError, match=message):
        quantize.read(path, digest, "int8")


@pytest.mark.skipif(
    importlib.util.find_spec("tensorrt_rtx_bindings") is None, reason="no tensorrt_rtx"
)
@pytest.mark.parametrize("kind", ["int8", pytest.param("fp8", marks=pytest.mark.slow)])
def test_the_real_builder_takes_it(kind: str, int8: Calibration, tmp_path: Path) -> None:
    ignored = shutil.ignore_patterns("engines")
    bundle = Path(shutil.copytree(bundle_path(), tmp_path / "face.bundle", ignore=ignored))
    of_kind = dataclasses.replace(int8, kind=kind)
    quantize.write(tmp_path / f"{NAME}-{kind}.json", of_kind)
    settings = Settings(gpus=("sm_89",), precision=kind, calibration=tmp_path)
    found = manifest.read(bundle)
    (key,) = [k for k in _keys(found, settings) if k.component == NAME]
    digest = manifest.file_sha256(tmp_path / f"{NAME}-{kind}.json")
    assert (key.precision, key.calibration) == (kind, digest)
    path = engine_files.folder_to_write(bundle) / f"{engine_files.stem(key)}.engine"
    part = found.components[NAME]
    made = engines._build_one(bundle, part, key, settings, path, None)
    assert made.network["QUANTIZE"] and made.network["DEQUANTIZE"]
    assert engine_files.find(bundle, key).state == "valid"


def _keys(found: manifest.Manifest, settings: Settings) -> tuple[engine_files.EngineKey, ...]:
    """The keys of the one component that has a calibration here."""
    alone = dataclasses.replace(found, components={NAME: found.components[NAME]})
    version = importlib.metadata.version("tensorrt_rtx_cu13_bindings")
    return engines.wanted_keys(alone, settings, "tensorrt_rtx", version)


def test_8_bits_without_a_calibration_are_refused(toy_bundle: Path) -> None:
    with pytest.raises(SettingsError, match="needs a calibration"):
        list(engines.build(toy_bundle, Settings(gpus=("sm_89",), precision="int8")))
