"""TensorRT's engines: which is opened, how it is bound and run, and what is refused.

No GPU is needed: a stand-in for the library reads and writes the addresses it is given and computes
with ONNX Runtime. That the library has every name used is proven in test_trt_names.py.
"""

from __future__ import annotations

import ctypes
import gc
import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from diffusionact import engine_files, trt_library
from diffusionact import manifest as manifest_file
from diffusionact.engine_files import EngineManifest, Gpu, Parity
from diffusionact.errors import BackendMissing, BundleError, DeviceError, EngineError, SettingsError
from diffusionact.manifest import Manifest
from diffusionact.runtime import cuda, trt
from diffusionact.runtime.component import fixed, open_component

GPU = Gpu("Stand-in 4090", "sm_89", 580)
VERSION = "1.2.3"
STREAM = 0x5EED
SIZES = {"N": 4}


class Memory:
    """Host memory with the face of a GPU's, aligned as that is."""

    def __init__(self, array: Any) -> None:
        raw = np.zeros(array.nbytes + 256, np.uint8)
        start = -raw.ctypes.data % 256
        self.host = raw[start : start + array.nbytes].view(array.dtype).reshape(array.shape)
        self.host[...] = array
        self.shape, self.dtype, self.nbytes = array.shape, array.dtype, array.nbytes
        self.ptr = self.host.ctypes.data

    @property
    def __cuda_array_interface__(self) -> dict[str, Any]:
        return {"data": (self.ptr, False), "shape": self.shape, "strides": None, "version": 3}


def at(address: int, spec: Any) -> Any:
    """The array at an address."""
    count = int(np.prod(spec.shape))
    numbers = (ctypes.c_float * count).from_address(address)
    return np.frombuffer(numbers, np.float32).reshape(spec.shape)


class Context:
    def __init__(self, engine: Engine) -> None:
        self.engine = engine
        self.addresses: dict[str, int] = {}
        self.scratch: list[tuple[int, int]] = []
        self.answer = True

    def set_device_memory(self, memory: int, size: int) -> None:
        assert memory % 256 == 0
        self.scratch.append((memory, size))

    def set_tensor_address(self, name: str, memory: int) -> bool:
        self.addresses[name] = memory
        return name in self.engine.specs

    def execute_async_v3(self, stream_handle: int) -> bool:
        assert stream_handle == STREAM and self.scratch[-1][1] >= self.engine.device_memory_size_v2
        part = self.engine.part
        arrays = {n: at(self.addresses[n], s) for n, s in self.engine.specs.items()}
        part.bind(**arrays)
        part.run()
        return self.answer


class Engine:
    def __init__(self, part: Any, device_memory_size_v2: int) -> None:
        self.part = part
        self.specs = {**part.outputs, **part.inputs}  # in another order than the manifest's
        self.device_memory_size_v2 = device_memory_size_v2
        self.renamed: dict[str, str] = {}
        self.kind = "FLOAT"
        self.contexts: list[Context] = []

    @property
    def num_io_tensors(self) -> int:
        return len(self.specs)

    def get_tensor_name(self, index: int) -> str:
        return list(self.specs)[index]

    def get_tensor_dtype(self, name: str) -> Any:
        return SimpleNamespace(name=self.kind)

    def get_tensor_mode(self, name: str) -> str:
        return "input" if name in self.part.inputs else "output"

    def get_tensor_shape(self, name: str) -> list[int]:
        return list(self.specs[name].shape)

    def create_execution_context(self, how: Any) -> Context:
        if isinstance(how, RuntimeConfig):
            how = how.strategy
        assert how == "user managed"
        self.contexts.append(Context(self))
        return self.contexts[-1]


class RuntimeCache:
    """Of TensorRT for RTX: what was compiled, here one name for each engine that has run."""

    def __init__(self, fits: bool = True) -> None:
        self.fits = fits
        self.content = b""

    def deserialize(self, blob: bytes) -> bool:
        self.content = blob if self.fits else b""
        return self.fits

    def serialize(self) -> bytes | None:
        return self.content or None


class RuntimeConfig:
    def __init__(self, cache: RuntimeCache) -> None:
        self.strategy, self.made, self.given = "static", cache, None

    def set_execution_context_allocation_strategy(self, strategy: str) -> None:
        self.strategy = strategy

    def create_runtime_cache(self) -> RuntimeCache:
        return self.made

    def set_runtime_cache(self, cache: Any) -> bool:
        self.given = cache
        return True


class StandIn:
    """The library's module. engines: the plan's bytes -> what is loaded from it."""

    TensorIOMode = SimpleNamespace(INPUT="input", OUTPUT="output")
    ExecutionContextAllocationStrategy = SimpleNamespace(USER_MANAGED="user managed")

    class ILogger:
        ERROR = 2

        def __init__(self) -> None: ...

    def __init__(self) -> None:
        self.engines: dict[bytes, Engine] = {}
        self.log: Any = None

    def Runtime(self, log: Any) -> StandIn:  # noqa: N802  # the library's name
        self.log = log
        return self

    def deserialize_cuda_engine(self, plan: bytes) -> Engine | None:
        if plan not in self.engines:
            self.log.log(2, "  Error Code 1: no such plan  ")
            self.log.log(4, "chatter")
        return self.engines.get(plan)


@pytest.fixture
def bundle(toy_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_bundle, tmp_path / "toy.bundle"))


@pytest.fixture
def manifest(bundle: Path) -> Manifest:
    return manifest_file.read(bundle)


@pytest.fixture
def library(monkeypatch: pytest.MonkeyPatch) -> Iterator[StandIn]:
    module = StandIn()
    monkeypatch.setattr(trt_library, "installed", lambda: ("tensorrt_rtx",))
    found = trt_library.Library("tensorrt_rtx", VERSION, module)
    monkeypatch.setattr(trt_library, "find", lambda name=None: found)
    monkeypatch.setattr(cuda, "probe", lambda index=0: GPU)
    monkeypatch.setattr(
        cuda, "allocate", lambda shape, dtype: Memory(np.zeros(shape, np.dtype(dtype)))
    )
    yield module
    gc.collect()
    assert not trt._LANES, "the scratch memory outlives its engines"


def build(bundle: Path, library: StandIn, name: str, scratch: int = 512, **changes: Any) -> Path:
    """An engine file, as `diffusionact build` writes it."""
    manifest = manifest_file.read(bundle)
    key = engine_files.make_key(
        manifest, name, library="tensorrt_rtx", version=VERSION, target=GPU, sizes=SIZES
    )
    key = replace(key, **changes)
    part = manifest.components[name]
    inputs, outputs = engine_files.fixed_specs(part, key)
    path = engine_files.folder_to_write(bundle) / f"{engine_files.stem(key)}.engine"
    plan = f"plan of {path.stem}".encode()
    path.write_bytes(plan)
    told = EngineManifest(
        key, manifest_file.file_sha256(path), len(plan), inputs, outputs, {}, {}, 1.0
    )
    engine_files.write_manifest(path, told)
    inner = open_component(bundle, manifest, name, sizes=SIZES, threads=1)
    library.engines[plan] = Engine(inner, scratch)
    return path


def open_engine(bundle: Path, name: str, precision: str = "fp16") -> trt.TrtComponent:
    manifest = manifest_file.read(bundle)
    part = open_component(
        bundle, manifest, name,
        backend="trt", device="cuda", precision=precision, sizes=SIZES, stream=STREAM,
    )  # fmt: skip
    assert isinstance(part, trt.TrtComponent)
    return part


def memory_of(part: Any, seed: int = 0) -> dict[str, Memory]:
    rng = np.random.default_rng(seed)
    specs = {**part.inputs, **part.outputs}
    return {n: Memory(rng.standard_normal(s.shape).astype(s.dtype)) for n, s in specs.items()}


@pytest.mark.parametrize("name", ["encoder", "time", "modulation", "unet_step"])
def test_an_engine_answers_as_the_graph(
    name: str, bundle: Path, manifest: Manifest, library: StandIn
) -> None:
    build(bundle, library, name)
    part = open_engine(bundle, name)
    wanted = open_component(bundle, manifest, name, sizes=SIZES, threads=1)
    bound = memory_of(part)
    part.bind(**bound)
    for _ in range(2):
        for tensor in part.outputs:
            bound[tensor].host[...] = np.nan
        part.run()
        arrays = {n: memory.host.copy() for n, memory in bound.items()}
        wanted.bind(**arrays)
        wanted.run()
        for tensor in part.outputs:
            np.testing.assert_array_equal(bound[tensor].host, arrays[tensor])


def test_scratch_memory_is_shared_and_moves_to_the_largest(bundle: Path, library: StandIn) -> None:
    for name, nbytes in (("encoder", 1024), ("modulation", 0), ("unet_step", 4096)):
        build(bundle, library, name, nbytes)
    parts = [open_engine(bundle, n) for n in ("encoder", "modulation", "unet_step")]
    contexts = [engine.contexts[0] for engine in library.engines.values()]
    assert len({context.scratch[-1] for context in contexts}) == 1
    assert contexts[0].scratch[-1][1] == 4096
    assert contexts[1].scratch[0] == contexts[0].scratch[0], "no more was needed"
    assert len(trt._LANES) == 1 and len(parts) == 3


def compiling(library: StandIn, cache: RuntimeCache, monkeypatch: pytest.MonkeyPatch) -> None:
    """From now on the library compiles an engine as it runs it first, unless the cache has that."""
    made: list[RuntimeConfig] = []

    def create_runtime_config(self: Engine) -> RuntimeConfig:
        made.append(RuntimeConfig(cache))
        return made[-1]

    def execute(self: Context, stream_handle: int) -> bool:
        assert made[-1].given is cache, "the context was made with it"
        cache.content = cache.content or b"compiled"
        return self.answer

    monkeypatch.setattr(library, "IRuntimeCache", RuntimeCache, raising=False)
    monkeypatch.setattr(Engine, "create_runtime_config", create_runtime_config, raising=False)
    monkeypatch.setattr(Context, "execute_async_v3", execute)


def test_what_rtx_compiles_at_first_is_kept_for_the_next_start(
    bundle: Path, library: StandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv(engine_files.CACHE_VARIABLE, str(tmp_path / "cache"))
    plan = build(bundle, library, "encoder")
    kept = tmp_path / "cache" / "jit" / f"{plan.stem}-sm_89.bin"

    def start(cache: RuntimeCache, answer: bool = True) -> None:
        compiling(library, cache, monkeypatch)
        part = open_engine(bundle, "encoder")
        part.bind(**memory_of(part))
        for engine in library.engines.values():
            engine.contexts[-1].answer = answer
        for _ in range(2):
            part.run()

    with pytest.raises(EngineError, match="does not run"):
        start(RuntimeCache(), answer=False)
    assert not kept.exists(), "of a run that failed"
    start(RuntimeCache())
    assert kept.read_bytes() == b"compiled"
    written_ns = kept.stat().st_mtime_ns
    second = RuntimeCache()
    start(second)
    assert second.content == b"compiled" and kept.stat().st_mtime_ns == written_ns
    kept.write_bytes(b"of another driver")
    start(RuntimeCache(fits=False))
    assert kept.read_bytes() == b"compiled"


def test_a_cache_that_cannot_be_written_stops_nothing(
    bundle: Path, library: StandIn, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    (tmp_path / "jit").write_text("a file where the folder would be")
    monkeypatch.setenv(engine_files.CACHE_VARIABLE, str(tmp_path))
    build(bundle, library, "encoder")
    for cache in (RuntimeCache(), RuntimeCache()):
        compiling(library, cache, monkeypatch)
        part = open_engine(bundle, "encoder")
        part.bind(**memory_of(part))
        part.run()


def test_an_engine_that_needs_no_scratch_gets_an_address(bundle: Path, library: StandIn) -> None:
    build(bundle, library, "time", 0)
    part = open_engine(bundle, "time")
    part.bind(**memory_of(part))
    part.run()


def test_it_is_bound_by_name_and_held_to_its_specs(bundle: Path, library: StandIn) -> None:
    build(bundle, library, "encoder")
    part = open_engine(bundle, "encoder")
    bound = memory_of(part)
    with pytest.raises(SettingsError, match="all of them"):
        part.bind(image=bound["image"])
    with pytest.raises(SettingsError, match="memory of 'cuda'"):
        part.bind(**{n: memory.host for n, memory in bound.items()})
    crooked = Memory(bound["z"].host)
    crooked.ptr += 4
    with pytest.raises(EngineError, match="'z': TensorRT refuses address"):
        part.bind(**{**bound, "z": crooked})


def test_a_run_that_fails_says_why(bundle: Path, library: StandIn) -> None:
    build(bundle, library, "encoder")
    part = open_engine(bundle, "encoder")
    part.bind(**memory_of(part))
    next(iter(library.engines.values())).contexts[0].answer = False
    library.log.log(2, "illegal address")
    with pytest.raises(EngineError, match="does not run the engine: .*illegal address"):
        part.run()


def test_without_an_engine_the_command_is_told(bundle: Path, library: StandIn) -> None:
    with pytest.raises(EngineError, match=r"no engine of encoder .* run: diffusionact build"):
        open_engine(bundle, "encoder")


@pytest.mark.parametrize(
    ("changes", "why"),
    [
        ({"version": "1.2.2"}, "made for its version 1.2.2, wanted 1.2.3"),
        ({"targets": ("sm_120",)}, "made for sm_120, wanted sm_89"),
        ({"onnx_sha256": "0" * 64}, "made for the ONNX file 000000000000"),
        ({"precision": "fp32"}, "made for precision fp32, wanted fp16"),
        ({"gpu": "Other", "driver_major": 570}, "made for Other, driver 570"),
        ({"recipe": -1}, "made for recipe -1"),
    ],
)
def test_a_plan_whose_key_does_not_fit_is_refused(
    changes: dict[str, Any], why: str, bundle: Path, library: StandIn
) -> None:
    build(bundle, library, "unet_step", **changes)
    with pytest.raises(EngineError, match=f"{why}.*run: diffusionact build"):
        open_engine(bundle, "unet_step")


def test_a_damaged_plan_is_refused_before_it_is_loaded(bundle: Path, library: StandIn) -> None:
    path = build(bundle, library, "unet_step")
    path.write_bytes(path.read_bytes().upper())
    with pytest.raises(EngineError, match="sha256"):
        open_engine(bundle, "unet_step")
    path = build(bundle, library, "unet_step")
    told = engine_files.read_manifest(path)
    engine_files.write_manifest(path, replace(told, parity=Parity(0.5, 0.01, GPU.name)))
    with pytest.raises(EngineError, match="its answers on Stand-in 4090 were"):
        open_engine(bundle, "unet_step")


def test_a_plan_that_the_library_refuses_says_its_words(bundle: Path, library: StandIn) -> None:
    build(bundle, library, "encoder")
    library.engines.clear()
    wanted = "tensorrt_rtx 1.2.3 does not load it on Stand-in 4090: Error Code 1: no such plan"
    with pytest.raises(EngineError, match=f"{wanted}; run: diffusionact build .* --force"):
        open_engine(bundle, "encoder")


@pytest.mark.parametrize("wrong", ["name", "type", "mode"])
def test_tensors_that_are_not_the_manifests_are_refused(
    wrong: str, bundle: Path, library: StandIn
) -> None:
    build(bundle, library, "encoder")
    engine = next(iter(library.engines.values()))
    if wrong == "name":
        engine.specs = {n.replace("z", "code"): s for n, s in engine.specs.items()}
    elif wrong == "type":
        engine.kind = "HALF"
    else:
        engine.get_tensor_mode = lambda name: "output"  # type: ignore[method-assign]
    with pytest.raises(EngineError, match="its tensors are .* the manifest says"):
        open_engine(bundle, "encoder")


def test_the_other_librarys_engine_is_taken_where_it_is_the_valid_one(
    bundle: Path, library: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    build(bundle, library, "encoder")
    both = {
        "tensorrt": trt_library.Library("tensorrt", "11.4", StandIn()),
        "tensorrt_rtx": trt_library.Library("tensorrt_rtx", VERSION, library),
    }
    monkeypatch.setattr(trt_library, "installed", lambda: tuple(both))
    monkeypatch.setattr(trt_library, "find", lambda name=None: both[name or "tensorrt"])
    assert open_engine(bundle, "encoder").outputs.keys() == {"z"}
    with pytest.raises(EngineError, match="no engine of time"):
        open_engine(bundle, "time")


def test_what_a_bundle_has_engines_of(bundle: Path, manifest: Manifest, library: StandIn) -> None:
    build(bundle, library, "encoder")
    found = dict(zip(manifest.components, trt.find_engines(bundle, manifest, GPU, "fp16")))  # noqa: B905
    assert found.pop("encoder").state == "valid"
    assert {one.state for one in found.values()} == {"missing"}


def test_networks_that_are_no_component_go_elsewhere(bundle: Path, library: StandIn) -> None:
    (bundle / "other.onnx").write_bytes(b"")
    specs = fixed(manifest_file.read(bundle).components["encoder"].inputs, {})
    with pytest.raises(EngineError, match="own components only"):
        trt.open_model(bundle / "other.onnx", specs, {}, device="cuda", threads=0, precision="fp16")


def test_without_a_driver_the_library_is_not_touched(
    bundle: Path, library: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    def none(index: int = 0) -> Gpu:
        raise DeviceError("no NVIDIA driver here")

    monkeypatch.setattr(cuda, "probe", none)
    monkeypatch.setattr(library, "Runtime", lambda log: pytest.fail("this would crash"))
    build(bundle, library, "encoder")
    with pytest.raises(DeviceError, match="no NVIDIA driver"):
        open_engine(bundle, "encoder")
    assert "no NVIDIA driver" in str(trt.problem())


def test_without_the_library_the_command_is_told(
    bundle: Path, library: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(trt_library, "installed", lambda: ())
    assert "pip install 'diffusionact[rtx]'" in str(trt.problem())
    with pytest.raises(BackendMissing, match="pip install"):
        open_engine(bundle, "encoder")


def test_the_cpu_is_never_taken_in_silence(bundle: Path, manifest: Manifest) -> None:
    with pytest.raises(DeviceError, match="runs on cuda, not on 'cpu'"):
        open_component(bundle, manifest, "encoder", backend="trt", device="cpu")


def test_the_real_library_refuses_rubbish_with_its_own_words(
    bundle: Path, library: StandIn, monkeypatch: pytest.MonkeyPatch
) -> None:
    """tensorrt_rtx's Runtime without a driver: usable, and its answer is an error of ours."""
    real = pytest.importorskip("tensorrt_rtx_bindings")
    found = trt_library.Library("tensorrt_rtx", VERSION, real)
    monkeypatch.setattr(trt_library, "find", lambda name=None: found)
    build(bundle, library, "encoder")
    with pytest.raises(EngineError, match="does not load it on Stand-in 4090: .*[Ee]rror"):
        open_engine(bundle, "encoder")


def test_a_bundle_without_a_manifest_is_said_to_be_none(tmp_path: Path, library: StandIn) -> None:
    with pytest.raises(BundleError, match="not readable"):
        trt.open_model(
            tmp_path / "encoder.onnx", {}, {}, device="cuda", threads=0, precision="fp16"
        )
