"""TensorRT over `cuda.py`: `tensorrt` or `tensorrt_rtx`, whichever the bundle has engines of.

Engines come from `diffusionact build`, with keys that say what they were made of and for which
GPU. Nothing of TensorRT is touched before the driver has answered: without one, `Runtime` of
`tensorrt` crashes the process.
"""

from __future__ import annotations

import functools
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from diffusionact import engine_files, trt_library
from diffusionact import manifest as manifest_file
from diffusionact.engine_files import EngineKey, Found, Gpu
from diffusionact.errors import BackendMissing, EngineError
from diffusionact.manifest import Manifest, TensorSpec
from diffusionact.runtime import cuda
from diffusionact.runtime.component import check_bound
from diffusionact.runtime.jit_cache import cache_path, open_context

DEVICES = ("cuda",)
PRECISIONS = engine_files.PRECISIONS
ALIGNMENT = 256  # bytes, of every address and of the scratch memory
_TYPES = {"float32": "FLOAT", "float16": "HALF", "int32": "INT32", "int64": "INT64"}
MAX_MESSAGES = 4  # of the library's own, in an error


def problem(device: str = "cuda") -> str | None:
    """Return why TensorRT does not run here and what to do, or None if it does."""
    if not trt_library.installed():
        return f"TensorRT is not installed; run: {' or '.join(trt_library.INSTALL.values())}"
    return cuda.why_not()


def cannot_run(bundle_dir: Path, manifest: Manifest, precision: str) -> str | None:
    """Return which engine of a bundle is missing for the GPU that is here, or None if none is."""
    found = find_engines(bundle_dir, manifest, cuda.probe(), precision)
    return next((one.reason for one in found if one.state != "valid"), None)


class Scratch:
    """Memory that the contexts of one stream share: they run one after the other.

    A larger one may be needed by the next engine. The former is kept, because graphs may have been
    recorded with its address.
    """

    def __init__(self) -> None:
        self._contexts: list[Any] = []
        self._kept: list[cuda.DeviceArray] = []
        self._nbytes = 0

    def lend(self, context: Any, nbytes: int) -> None:
        """Return nothing; the context has at least so much. Raises: DeviceError."""
        if nbytes > self._nbytes or not self._kept:
            self._kept.append(cuda.allocate((max(nbytes, ALIGNMENT),), "uint8"))
            self._nbytes = self._kept[-1].nbytes
            for former in self._contexts:
                self._point(former)
        self._point(context)
        self._contexts.append(context)

    def _point(self, context: Any) -> None:
        context.set_device_memory(self._kept[-1].ptr, self._nbytes)


class TrtComponent:
    """One engine over bound memory of the GPU; `run` puts it on the stream and returns."""

    def __init__(
        self,
        engine: Any,
        inputs: Mapping[str, TensorSpec],
        outputs: Mapping[str, TensorSpec],
        lane: Lane,
        code: Path,
    ) -> None:
        """code: the file of `jit_cache`."""
        self.inputs = inputs
        self.outputs = outputs
        self._lane = lane
        self._engine = engine  # a context does not keep it
        context, keeping = open_context(lane.library.module, engine, code)
        if context is None:
            raise EngineError(f"TensorRT makes no context: {lane.log.text()}")
        lane.scratch.lend(context, engine.device_memory_size_v2)
        self._context = context
        self._execute = keeping(context.execute_async_v3)
        self._stream = lane.stream
        self._arrays: dict[str, Any] = {}

    def bind(self, **arrays: Any) -> None:
        check_bound({**self.inputs, **self.outputs}, arrays, "cuda")
        for name, array in arrays.items():
            address = int(array.__cuda_array_interface__["data"][0])
            if address % ALIGNMENT or not self._context.set_tensor_address(name, address):
                raise EngineError(f"tensor {name!r}: TensorRT refuses address {address:#x}")
        self._arrays = arrays  # kept alive: the context holds bare addresses

    def run(self) -> None:
        if not self._execute(self._stream):
            raise EngineError(f"TensorRT does not run the engine: {self._lane.log.text()}")


class Lane:
    """What the engines of one stream share: the library's runtime, its log, scratch memory."""

    def __init__(self, library: trt_library.Library, stream: int, owner: Any = None) -> None:
        self.library = library
        self.stream = stream
        self.log, self.runtime = _runtime(library)
        self.scratch = Scratch()
        self._owner = owner  # of the stream, if it was made here


# One for each stream and library, as long as an engine of it is open.
_LANES: weakref.WeakValueDictionary[tuple[int, str], Lane] = weakref.WeakValueDictionary()


def open_model(
    path: Path,
    inputs: Mapping[str, TensorSpec],
    outputs: Mapping[str, TensorSpec],
    *,
    device: str,
    threads: int,
    precision: str,
    stream: int | None = None,
) -> TrtComponent:
    """Return the engine of an .onnx file of a bundle, for this GPU, held to its specs.

    stream: the handle of the CUDA stream to run on, None makes one.

    Raises: DeviceError without a GPU; BackendMissing without TensorRT; EngineError when there is no
    valid engine, saying what is there and which command builds it.
    """
    gpu = cuda.probe()
    library, key = _find(path, inputs, outputs, gpu, precision)
    path_of_plan, told = engine_files.require(path.parent, key)
    mend = f"run: {engine_files.build_command(path.parent, told.key)} --force"
    return open_plan(path_of_plan, (library, gpu, mend), inputs, outputs, stream)


def open_plan(
    path_of_plan: Path,
    place: tuple[trt_library.Library, Gpu, str],
    inputs: Mapping[str, TensorSpec],
    outputs: Mapping[str, TensorSpec],
    stream: int | None = None,
) -> TrtComponent:
    """Return the engine of a plan's file, whatever it was made of, held to its specs.

    place: the library, the GPU, which `cuda.probe` has named, and what to do if it does not load.

    Raises: EngineError.
    """
    library, gpu, mend = place
    lane = _lane(library, stream)
    engine = lane.runtime.deserialize_cuda_engine(path_of_plan.read_bytes())
    if engine is None:
        raise EngineError(
            f"{path_of_plan}: {library.name} {library.version} does not load it on {gpu.name}: "
            f"{lane.log.text()}; {mend}"
        )
    _check(path_of_plan, library.module, engine, {**inputs, **outputs}, set(inputs))
    return TrtComponent(engine, inputs, outputs, lane, cache_path(path_of_plan, gpu))


def find_engines(bundle_dir: Path, manifest: Manifest, gpu: Gpu, precision: str) -> list[Found]:
    """Return for each component of a bundle its engine for a GPU, or why there is none.

    Raises: BackendMissing without TensorRT.
    """
    found = []
    for name in manifest.components:
        sizes = {"N": manifest.invert.steps if name.endswith("_invert") else manifest.render.steps}
        keys = _keys(manifest, name, gpu, precision, sizes)
        every = [engine_files.find(bundle_dir, key) for _, key in keys]
        found.append(next((one for one in every if one.state == "valid"), every[0]))
    return found


def _find(
    path: Path,
    inputs: Mapping[str, TensorSpec],
    outputs: Mapping[str, TensorSpec],
    gpu: Gpu,
    precision: str,
) -> tuple[trt_library.Library, EngineKey]:
    """The library to take, and the key of the engine: the first that has a valid one."""
    manifest = manifest_file.read(path.parent, verify=False)
    name = next((n for n, part in manifest.components.items() if part.file == path.name), None)
    if name is None:
        raise EngineError(f"{path}: engines are built of a bundle's own components only; use 'ort'")
    part = manifest.components[name]
    sizes = {
        word: number
        for spec in (*part.inputs, *part.outputs)
        for word, number in zip(spec.shape, {**inputs, **outputs}[spec.name].shape, strict=True)
        if isinstance(word, str) and isinstance(number, int)
    }
    keys = _keys(manifest, name, gpu, precision, sizes)
    valid = (pair for pair in keys if engine_files.find(path.parent, pair[1]).state == "valid")
    return next(valid, keys[0])


def _keys(
    manifest: Manifest, name: str, gpu: Gpu, precision: str, sizes: Mapping[str, int]
) -> list[tuple[trt_library.Library, EngineKey]]:
    libraries = [trt_library.find(each) for each in trt_library.installed()]
    if not libraries:
        raise BackendMissing(str(problem()))
    return [
        (
            library,
            engine_files.make_key(
                manifest,
                name,
                library=library.name,
                version=library.version,
                target=gpu,
                precision=precision,
                sizes=sizes,
            ),
        )
        for library in libraries
    ]


def _lane(library: trt_library.Library, stream: int | None) -> Lane:
    owner = cuda.Device() if stream is None else None
    handle = owner.stream if owner is not None else stream
    assert handle is not None
    lane = _LANES.get((handle, library.name)) or Lane(library, handle, owner)
    _LANES[(handle, library.name)] = lane
    return lane


@functools.cache
def _runtime(library: trt_library.Library) -> tuple[Any, Any]:
    """The library's log and runtime; there is a driver, the caller has seen to that."""
    trt = library.module
    log = _make_log(trt)
    return log, trt.Runtime(log)


def _make_log(trt: Any) -> Any:
    class Log(trt.ILogger):  # type: ignore[misc]  # the module is found at run time
        """Keeps the last errors, for the message of a failure."""

        def __init__(self) -> None:
            trt.ILogger.__init__(self)
            self._kept: list[str] = []

        def log(self, severity: Any, message: str) -> None:
            if severity <= trt.ILogger.ERROR:
                self._kept = [*self._kept, message.strip()][-MAX_MESSAGES:]

        def text(self) -> str:
            return "; ".join(self._kept) or "it gave no reason"

    return Log()


def _check(
    path: Path, trt: Any, engine: Any, specs: Mapping[str, TensorSpec], inputs: set[str]
) -> None:
    """Nothing; the engine has just these tensors, by name.

    Raises: EngineError.
    """
    seen = {}
    for i in range(engine.num_io_tensors):
        name = engine.get_tensor_name(i)
        kind = engine.get_tensor_dtype(name).name
        is_input = engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT
        seen[name] = (kind, tuple(engine.get_tensor_shape(name)), is_input)
    due = {name: (_TYPES[spec.dtype], spec.shape, name in inputs) for name, spec in specs.items()}
    if seen != due:
        raise EngineError(f"{path}: its tensors are {seen}; the manifest says {due}; build again")
