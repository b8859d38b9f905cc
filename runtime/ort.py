"""ONNX Runtime on the CPU; the only importer of onnxruntime."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from diffusionact.errors import BackendMissing, BundleError
from diffusionact.manifest import TensorSpec
from diffusionact.runtime.component import check_bound

try:
    import onnxruntime
except ImportError as error:  # pragma: no cover - the product's own dependency
    raise BackendMissing(
        f"backend 'ort' needs onnxruntime ({error}); run: pip install onnxruntime"
    ) from error

Array: TypeAlias = npt.NDArray[Any]

DEVICES = ("cpu",)
PRECISIONS = ("fp32",)
_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(uint8)": "uint8",
    "tensor(int64)": "int64",
}


class OrtComponent:
    """One ONNX model over bound NumPy memory: `run` copies nothing."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        inputs: Mapping[str, TensorSpec],
        outputs: Mapping[str, TensorSpec],
    ) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self._session = session
        self._binding = session.io_binding()
        self._arrays: dict[str, Array] = {}

    def bind(self, **arrays: Array) -> None:
        check_bound({**self.inputs, **self.outputs}, arrays)
        self._arrays = arrays  # kept alive: the binding holds bare addresses
        for name, array in arrays.items():
            place = self._binding.bind_input if name in self.inputs else self._binding.bind_output
            place(name, "cpu", 0, array.dtype, array.shape, array.ctypes.data)

    def run(self) -> None:
        self._session.run_with_iobinding(self._binding)


def open_model(
    path: Path,
    inputs: Mapping[str, TensorSpec],
    outputs: Mapping[str, TensorSpec],
    *,
    device: str,
    threads: int,
    precision: str,
) -> OrtComponent:
    """Return the model of an .onnx file, held to its specs.

    threads: 0 means one for each physical core; precision: the graph's own, "fp32".

    Raises: BundleError.
    """
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Threads that spin between operators gain nothing on a quiet machine and halve the speed on a
    # busy one, where tracker, decoder and encoder want the same cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    try:
        session = onnxruntime.InferenceSession(
            str(path), options, providers=["CPUExecutionProvider"]
        )
    except Exception as error:  # onnxruntime's own classes share no other root
        raise BundleError(
            f"{path}: ONNX Runtime {onnxruntime.__version__} cannot open it ({error}); "
            "export the bundle again: diffusionact export WEIGHTS -o BUNDLE"
        ) from error
    _check_model(path, "inputs", session.get_inputs(), inputs)
    _check_model(path, "outputs", session.get_outputs(), outputs)
    return OrtComponent(session, inputs, outputs)


def _check_model(
    path: Path, side: str, seen: list[onnxruntime.NodeArg], wanted: Mapping[str, TensorSpec]
) -> None:
    names = [tensor.name for tensor in seen]
    if set(names) != set(wanted):
        raise BundleError(f"{path}: {side} {names}; the manifest says {list(wanted)}. {_MEND}")
    for tensor in seen:
        spec = wanted[tensor.name]
        fits = len(tensor.shape) == len(spec.shape) and all(
            not isinstance(size, int) or size == fixed
            for size, fixed in zip(tensor.shape, spec.shape, strict=True)
        )
        if not fits or _TYPES.get(tensor.type) != np.dtype(spec.dtype).name:
            raise BundleError(
                f"{path}: {tensor.name!r} is {tensor.type} {tensor.shape}; "
                f"the manifest says {spec.dtype} {list(spec.shape)}. {_MEND}"
            )


_MEND = "Export the bundle again: diffusionact export WEIGHTS -o BUNDLE"
