"""The weights of an ONNX file without the onnx package, against that package."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffusionact import bundle_path
from diffusionact.errors import BundleError
from diffusionact.graph_file import HALVED, initialisers

onnx = pytest.importorskip("onnx", reason="it is the reference")


@pytest.mark.parametrize("name", ["encoder", "time", "modulation", "unet_step"])
def test_the_shipped_graphs_are_read_as_onnx_reads_them(name: str) -> None:
    path = bundle_path() / f"{name}.onnx"
    kinds = (onnx.TensorProto.FLOAT, onnx.TensorProto.FLOAT16)
    due = {
        tensor.name.removesuffix(HALVED): onnx.numpy_helper.to_array(tensor)
        for tensor in onnx.load(path).graph.initializer
        if tensor.data_type in kinds
    }
    seen = initialisers(path)
    assert seen.keys() == due.keys() and len(due) > 1
    for key, values in seen.items():
        assert values.dtype == due[key].dtype and values.shape == due[key].shape
        np.testing.assert_array_equal(values, due[key])
        assert values.flags.writeable, "PyTorch takes it as it is"


def test_sizes_may_be_packed_or_not(tmp_path: Path) -> None:
    """Writers of protobuf choose; 300 takes two bytes."""
    values = np.arange(300, dtype=np.float32).reshape(1, 300)
    raw = b"\x4a\xb0\x09" + values.tobytes()  # field 9, 1200 bytes
    for dims in (b"\x08\x01\x08\xac\x02", b"\x0a\x03\x01\xac\x02"):
        tensor = dims + b"\x10\x01\x42\x01w" + raw
        graph = b"\x2a" + varint(len(tensor)) + tensor
        (tmp_path / "w.onnx").write_bytes(b"\x3a" + varint(len(graph)) + graph)
        assert onnx.load(tmp_path / "w.onnx").graph.initializer[0].dims == [1, 300]
        np.testing.assert_array_equal(initialisers(tmp_path / "w.onnx")["w"], values)


def varint(number: int) -> bytes:
    low = number & 0x7F
    return bytes([low]) if number < 0x80 else bytes([low | 0x80]) + varint(number >> 7)


@pytest.mark.parametrize(
    ("keep", "message"), [(5000, "damaged"), (1, "damaged"), (None, "not readable")]
)
def test_a_damaged_file_is_named(tmp_path: Path, keep: int | None, message: str) -> None:
    path = tmp_path / "time.onnx"
    if keep is not None:
        path.write_bytes((bundle_path() / "time.onnx").read_bytes()[:keep])
    with pytest.raises(BundleError, match=rf"time\.onnx: .*{message}"):
        initialisers(path)
    path.write_bytes(b"\xff" * 40)
    with pytest.raises(BundleError, match="64 bits"):
        initialisers(path)
