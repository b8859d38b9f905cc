"""ONNX Runtime on the CPU, and on CUDA with onnxruntime-gpu; the only importer of onnxruntime."""

from __future__ import annotations

import contextlib
import io
import shutil
import tempfile
from collections.abc import Mapping
from functools import cache
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from diffusionact.errors import BackendMissing, BundleError, DeviceError
from diffusionact.manifest import TensorSpec
from diffusionact.runtime.component import check_bound
from diffusionact.runtime.trace import Layer, onnxruntime_layers, recording

try:
    import onnxruntime
except ImportError as error:  # pragma: no cover - the product's own dependency
    raise BackendMissing(
        f"backend 'ort' needs onnxruntime ({error}); run: pip install onnxruntime"
    ) from error

Array: TypeAlias = npt.NDArray[Any]

DEVICES = ("cpu", "cuda")
PRECISIONS = ("fp32",)
CUDA_PROVIDER = "CUDAExecutionProvider"
_AS_REQUESTED = 1  # kSameAsRequested
_TYPES = {
    "tensor(float)": "float32",
    "tensor(float16)": "float16",
    "tensor(uint8)": "uint8",
    "tensor(int64)": "int64",
}


class OrtComponent:
    """One ONNX model over bound memory, NumPy's or a GPU's: `run` copies nothing."""

    def __init__(
        self,
        session: onnxruntime.InferenceSession,
        inputs: Mapping[str, TensorSpec],
        outputs: Mapping[str, TensorSpec],
        device: str,
    ) -> None:
        self.inputs = inputs
        self.outputs = outputs
        self._session = session
        self._device = device
        self._binding = session.io_binding()
        self._arrays: dict[str, Any] = {}
        self._how = onnxruntime.RunOptions()
        if device == "cuda":  # the stream's owner waits, not each network
            self._how.add_run_config_entry("disable_synchronize_execution_providers", "1")

    def bind(self, **arrays: Array) -> None:
        check_bound({**self.inputs, **self.outputs}, arrays, self._device)
        self._arrays = arrays  # kept alive: the binding holds bare addresses
        for name, array in arrays.items():
            place = self._binding.bind_input if name in self.inputs else self._binding.bind_output
            place(name, self._device, 0, array.dtype, array.shape, self._address(array))

    def run(self) -> None:
        self._session.run_with_iobinding(self._binding, self._how)

    def layers(self) -> list[list[Layer]]:
        """Return the layers of every call, of a model opened while a trace was recorded."""
        profile = Path(self._session.end_profiling())
        made = onnxruntime_layers(profile)
        shutil.rmtree(profile.parent)
        return made

    def _address(self, array: Any) -> int:
        if self._device == "cpu":
            return int(array.ctypes.data)
        return int(array.__cuda_array_interface__["data"][0])


def problem(device: str) -> str | None:
    """Return why ONNX Runtime does not run on a device here and what to do, or None if it does."""
    if device == "cpu":
        return None
    if CUDA_PROVIDER not in onnxruntime.get_available_providers():
        return (
            f"onnxruntime {onnxruntime.__version__} here has no CUDA provider; "
            "run: pip uninstall -y onnxruntime, then: pip install onnxruntime-gpu"
        )
    from diffusionact.runtime import cuda  # only who asks for a GPU needs it

    return cuda.why_not()


def open_model(
    path: Path,
    inputs: Mapping[str, TensorSpec],
    outputs: Mapping[str, TensorSpec],
    *,
    device: str,
    threads: int,
    precision: str,
    stream: int | None = None,
) -> OrtComponent:
    """Return the model of an .onnx file, held to its specs.

    threads: 0 means one for each physical core; stream: the address of the CUDA stream to run on,
    None leaves it to the library.

    Raises: BundleError; DeviceError when CUDA is asked for and does not work: never the CPU.
    """
    if found := problem(device):
        raise DeviceError(f"backend 'ort' does not run on {device!r}: {found}")
    if device == "cuda":
        _preload()
    try:
        session = onnxruntime.InferenceSession(
            str(path), _options(threads), providers=_providers(device, stream)
        )
    except Exception as error:  # onnxruntime's own classes share no other root
        raise BundleError(
            f"{path}: ONNX Runtime {onnxruntime.__version__} cannot open it ({error}); "
            "export the bundle again: diffusionact export WEIGHTS -o BUNDLE"
        ) from error
    if device == "cuda" and CUDA_PROVIDER not in session.get_providers():
        # It was dropped with a line in the log, and all would run on the CPU.
        raise DeviceError(
            f"{path}: ONNX Runtime {onnxruntime.__version__} could not load its CUDA provider and "
            "offers the CPU; run: pip install 'onnxruntime-gpu[cuda,cudnn]', or take --device cpu"
        )
    _check_model(path, "inputs", session.get_inputs(), inputs)
    _check_model(path, "outputs", session.get_outputs(), outputs)
    return OrtComponent(session, inputs, outputs, device)


def run_graph(content: bytes, feed: Mapping[str, Array]) -> dict[str, Array]:
    """Return the outputs by name of an ONNX graph in memory, on the CPU, in one thread: for work
    on graphs that no bundle has, such as calibration.

    Raises: BundleError when it cannot be opened.
    """
    try:
        session = onnxruntime.InferenceSession(
            content, _options(threads=1), providers=_providers("cpu", None)
        )
    except Exception as error:  # as above
        raise BundleError(f"ONNX Runtime cannot open a graph made here ({error})") from error
    names = [value.name for value in session.get_outputs()]
    return dict(zip(names, session.run(names, dict(feed)), strict=True))


def _preload() -> None:
    """Nothing; the CUDA libraries that pip installed, which the loader does not find, are loaded.

    What it prints about those that it does not find, the provider says again.
    """
    with contextlib.redirect_stdout(io.StringIO()):
        onnxruntime.preload_dlls()


def _options(threads: int) -> onnxruntime.SessionOptions:
    options = onnxruntime.SessionOptions()
    _share_memory()
    options.add_session_config_entry("session.use_env_allocators", "1")
    options.intra_op_num_threads = threads
    if recording() is not None:
        options.enable_profiling = True
        folder = tempfile.mkdtemp(prefix="diffusionact-profile-")
        options.profile_file_prefix = str(Path(folder) / "onnxruntime")
    options.inter_op_num_threads = 1
    options.log_severity_level = 3
    # Threads that spin between operators gain nothing on a quiet machine and halve the speed on a
    # busy one, where tracker, decoder and encoder want the same cores.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    return options


@cache
def _share_memory() -> None:
    """Nothing; the sessions of this process take the CPU's memory from one store, which grows by
    what is asked for and not by doubling: the published network peaks at two thirds.

    Where somebody else has made such a store, it is theirs that is shared.
    """
    kind = onnxruntime.OrtAllocatorType.ORT_ARENA_ALLOCATOR
    place = onnxruntime.OrtMemoryInfo("Cpu", kind, 0, onnxruntime.OrtMemType.DEFAULT)
    with contextlib.suppress(Exception):  # onnxruntime's own classes share no other root
        onnxruntime.create_and_register_allocator(
            place, onnxruntime.OrtArenaCfg({"arena_extend_strategy": _AS_REQUESTED})
        )


def _providers(device: str, stream: int | None) -> list[Any]:
    if device == "cpu":
        return ["CPUExecutionProvider"]
    how = {"device_id": "0", "use_tf32": "0"}  # fp32 is to be fp32
    if stream:
        how["user_compute_stream"] = str(stream)
    return [(CUDA_PROVIDER, how), "CPUExecutionProvider"]


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
