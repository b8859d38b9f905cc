"""One suite that every backend passes: what `Component` promises, on each device, in each precision.

A backend whose library is not installed, or whose device is not here, is skipped with the reason.
"""

from __future__ import annotations

import builtins
import importlib
import shutil
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt
import pytest

from diffusionact import bundle_path, engine_files
from diffusionact import manifest as manifest_file
from diffusionact.errors import (
    BackendMissing,
    BundleError,
    DeviceError,
    EngineError,
    SettingsError,
)
from diffusionact.manifest import Manifest
from diffusionact.runtime.component import BACKENDS, Component, open_component, precisions

Array: TypeAlias = npt.NDArray[Any]

STEPS = {"N": 3}
# What may lie between a backend and ONNX Runtime in fp32, as a part of the largest value: a float32
# sum in another order over a hundred layers; 11 bits and 8 bits of mantissa, measured about 1e-3
# and 1.5e-2 on these inputs, and room for other machines' order of sums.
TOLERANCE = {"fp32": 1e-4, "fp16": 1e-2, "bf16": 5e-2}
REFERENCE = "ort"


@dataclass(frozen=True)
class Case:
    """One way to run a network. library: the module that the backend cannot do without."""

    backend: str
    device: str
    precision: str
    library: str


CASES = [
    Case("ort", "cpu", "fp32", "onnxruntime"),
    Case("torch", "cpu", "fp32", "torch"),
    Case("openvino", "cpu", "bf16", "openvino"),
]
SLOW_CASES = [
    Case("torch", "cpu", "bf16", "torch"),
    Case("openvino", "cpu", "fp32", "openvino"),
]
GPU_CASES = [
    Case("ort", "cuda", "fp32", "onnxruntime"),
    Case("torch", "cuda", "fp32", "torch"),
    Case("torch", "cuda", "fp16", "torch"),
    Case("torch", "cuda", "bf16", "torch"),
    Case("trt", "cuda", "fp16", "tensorrt"),
]
PARAMETERS = [
    pytest.param(case, id="-".join((case.backend, case.device, case.precision)), marks=marks)
    for cases, marks in (
        (CASES, ()), (SLOW_CASES, (pytest.mark.slow,)), (GPU_CASES, (pytest.mark.gpu,))
    )
    for case in cases
]  # fmt: skip


class Host:
    """Memory of the CPU."""

    stream: int | None = None

    def place(self, array: Array) -> Any:
        return array

    def send(self, placed: Any, array: Array) -> None:
        """The array's values are where the network reads them."""

    def fetch(self, array: Array, placed: Any) -> None:
        """What the network wrote is in the array."""

    def first(self, placed: Any, rows: int) -> Any:
        return placed[:rows]


class Gpu(Host):
    """Memory of the GPU."""

    def __init__(self) -> None:
        from diffusionact.runtime import cuda

        if reason := cuda.why_not():
            pytest.skip(reason)
        self._device = cuda.Device()
        self.stream = self._device.stream

    def place(self, array: Array) -> Any:
        placed = self._device.empty(array.shape, array.dtype.name)
        self.send(placed, array)
        return placed

    def send(self, placed: Any, array: Array) -> None:
        self._device.upload(placed, array)
        self._device.synchronize()

    def fetch(self, array: Array, placed: Any) -> None:
        self._device.download(array, placed)
        self._device.synchronize()

    def first(self, placed: Any, rows: int) -> Any:
        return placed.first(rows)


@dataclass
class Bench:
    """A backend that is here, its memory, and a bundle that it can run."""

    case: Case
    memory: Host
    bundle: Path
    manifest: Manifest

    def open(self, name: str, **changes: Any) -> Component:
        plan: dict[str, Any] = {
            "backend": self.case.backend,
            "device": self.case.device,
            "precision": "fp32" if name in engine_files.ONCE else self.case.precision,
            "sizes": STEPS,
        }
        if self.memory.stream is not None:
            plan["stream"] = self.memory.stream
        return open_component(self.bundle, self.manifest, name, **{**plan, **changes})

    def answers(self, name: str, seed: int = 0) -> dict[str, Array]:
        """The outputs on random inputs."""
        part = self.open(name)
        bound = self.bound(part, seed)
        part.run()
        return bound.outputs()

    def bound(self, part: Component, seed: int = 0) -> Bound:
        return Bound(part, self.memory, self.manifest, seed)


class Bound:
    """A component's memory: values on the host, and where the network has them."""

    def __init__(self, part: Component, memory: Host, manifest: Manifest, seed: int) -> None:
        self.part, self.memory = part, memory
        self.values = values_for(part, manifest, seed)
        self.placed = {name: memory.place(array) for name, array in self.values.items()}
        part.bind(**self.placed)

    def change(self, name: str, array: Array) -> None:
        self.values[name][...] = array
        self.memory.send(self.placed[name], self.values[name])

    def outputs(self) -> dict[str, Array]:
        return self._fetched(self.part.outputs)

    def inputs(self) -> dict[str, Array]:
        return self._fetched(self.part.inputs)

    def _fetched(self, names: Mapping[str, Any]) -> dict[str, Array]:
        made = {name: np.zeros_like(self.values[name]) for name in names}
        for name, array in made.items():
            self.memory.fetch(array, self.placed[name])
            if isinstance(self.placed[name], np.ndarray):
                array[...] = self.placed[name]
        return made


def values_for(part: Component, manifest: Manifest, seed: int) -> dict[str, Array]:
    """Random inputs within their ranges; outputs that no network gives."""
    rng = np.random.default_rng(seed)
    made: dict[str, Array] = {}
    for name, spec in part.inputs.items():
        values = (
            rng.standard_normal(spec.shape)
            if spec.range is None
            else rng.uniform(*spec.range, [int(n) for n in spec.shape])
        )
        made[name] = values.astype(spec.dtype)
    for name, spec in part.outputs.items():
        made[name] = np.full([int(n) for n in spec.shape], np.nan, spec.dtype)
    return made


@pytest.fixture(scope="module", autouse=True)
def cache(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """What backends keep between runs lies in a folder of the tests."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(engine_files.CACHE_VARIABLE, str(tmp_path_factory.mktemp("cache")))
        yield


@pytest.fixture(scope="module", params=PARAMETERS)
def bench(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Bench:
    case: Case = request.param
    if case.backend not in BACKENDS:
        pytest.skip(f"no backend {case.backend!r} in this version")
    try:
        module = importlib.import_module(BACKENDS[case.backend])
    except BackendMissing as error:
        pytest.skip(str(error))
    memory = Gpu() if case.device == "cuda" else Host()
    if case.precision not in precisions(module, case.device):
        pytest.skip(f"{case.backend} has no {case.precision} on this machine")
    bundle = bundle_path()
    if case.backend == "trt":
        bundle = with_engines(tmp_path_factory.mktemp("bundles") / "face.bundle", case.precision)
    made = Bench(case, memory, bundle, manifest_file.read(bundle))
    try:
        made.open("time")
    except (BackendMissing, DeviceError) as error:
        if case.device == "cpu":
            raise
        pytest.skip(str(error))
    return made


def with_engines(bundle: Path, precision: str) -> Path:
    """A copy of the shipped bundle with engines for the GPU that is here."""
    pytest.importorskip("onnx", reason="engines are built with onnx")
    from diffusionact.engines import build
    from diffusionact.runtime.cuda import gpu_to_build_for

    shutil.copytree(bundle_path(), bundle, ignore=shutil.ignore_patterns("engines"))
    settings = build.Settings(here=gpu_to_build_for(), precision=precision, steps=(STEPS["N"],))
    try:
        list(build.build(bundle, settings))
    except (BackendMissing, EngineError) as error:  # such as a GPU that the library does not know
        pytest.skip(str(error))
    return bundle


@pytest.fixture(scope="module")
def reference() -> Callable[[str, int], dict[str, Array]]:
    """The outputs of ONNX Runtime in fp32 on the CPU."""
    bundle = bundle_path()
    pytest.importorskip("onnxruntime", reason="the reference is ONNX Runtime")
    plain = Bench(CASES[0], Host(), bundle, manifest_file.read(bundle))
    return plain.answers


COMPONENTS = manifest_file.REQUIRED


def test_every_backend_is_in_this_suite() -> None:
    assert set(BACKENDS) <= {case.backend for case in (*CASES, *GPU_CASES)}


@pytest.mark.parametrize("name", COMPONENTS)
def test_tensors_are_those_of_the_manifest_with_sizes_fixed(bench: Bench, name: str) -> None:
    part, spec = bench.open(name), bench.manifest.components[name]
    for seen, due in ((part.inputs, spec.inputs), (part.outputs, spec.outputs)):
        assert list(seen) == [tensor.name for tensor in due]
        for tensor in due:
            fixed = tuple(STEPS["N"] if size == "N" else size for size in tensor.shape)
            assert (seen[tensor.name].shape, seen[tensor.name].dtype) == (fixed, tensor.dtype)


@pytest.mark.parametrize("name", COMPONENTS)
def test_answers_are_those_of_the_reference(
    bench: Bench, name: str, reference: Callable[[str, int], dict[str, Array]]
) -> None:
    seen, due = bench.answers(name, seed=3), reference(name, 3)
    precision = "fp32" if name in engine_files.ONCE else bench.case.precision
    for output, values in due.items():
        far = float(np.abs(seen[output].astype(np.float64) - values).max())
        part = far / max(1.0, float(np.abs(values).max()))
        print(f"{bench.case.backend} {precision} {name} {output}: {part:.1e}")
        assert part <= TOLERANCE[precision]


@pytest.mark.parametrize("name", ["modulation", "unet_step"])
def test_run_writes_all_outputs_and_nothing_else(bench: Bench, name: str) -> None:
    part = bench.open(name)
    bound = bench.bound(part)
    guard = np.float32(-12345.0)
    longer = {n: np.full((len(a) + 1, *a.shape[1:]), guard) for n, a in bound.values.items()}
    for output in part.outputs:
        longer[output][:-1] = np.nan
    for tensor in part.inputs:
        longer[tensor][:-1] = bound.values[tensor]
    placed = {n: bench.memory.place(a) for n, a in longer.items()}
    part.bind(**{n: bench.memory.first(a, len(bound.values[n])) for n, a in placed.items()})
    part.run()
    for tensor, values in longer.items():
        after = np.zeros_like(values)
        after[...] = values
        bench.memory.fetch(after, placed[tensor])
        assert (after[-1] == guard).all(), f"{tensor}: written behind its end"
        if tensor in part.inputs:
            np.testing.assert_array_equal(after[:-1], bound.values[tensor])
        else:
            assert np.isfinite(after[:-1]).all(), f"{tensor}: not written"


@pytest.mark.parametrize("name", ["encoder", "unet_step"])
def test_run_reads_its_inputs_again_and_repeats_itself(bench: Bench, name: str) -> None:
    part = bench.open(name)
    bound = bench.bound(part, seed=1)
    part.run()
    first, given = bound.outputs(), bound.inputs()
    other = values_for(part, bench.manifest, 2)
    for tensor in part.inputs:
        bound.change(tensor, other[tensor])
    part.run()
    (changed,) = bound.outputs().values()
    for tensor in part.inputs:
        bound.change(tensor, given[tensor])
    part.run()
    (last,) = bound.outputs().values()
    (due,) = first.values()
    assert np.abs(changed - due).max() > 0.01
    np.testing.assert_array_equal(last, due)


def test_binding_again_moves_to_the_new_memory(bench: Bench) -> None:
    part = bench.open("time")
    first = bench.bound(part, 1)
    part.run()
    kept = first.outputs()["time_rows"]
    second = bench.bound(part, 2)
    part.run()
    fresh = second.outputs()["time_rows"]
    assert np.isfinite(fresh).all() and np.abs(fresh - kept).max() > 0
    np.testing.assert_array_equal(first.outputs()["time_rows"], kept)


def test_bound_memory_outlives_its_callers_names(bench: Bench) -> None:
    part = bench.open("time")
    rows = values_for(part, bench.manifest, 0)["time_rows"]
    placed = bench.memory.place(rows)
    t = np.array([1, 2, 3], np.float32)
    part.bind(t=bench.memory.place(t), time_rows=placed)
    del t
    scribble = [bench.memory.place(np.full(3, 1e9, np.float32)) for _ in range(64)]
    part.run()
    after = np.asarray(rows)
    bench.memory.fetch(after, placed)
    assert np.abs(after).max() < 1e4 and len(scribble) == 64


WRONG: dict[str, tuple[Callable[[dict[str, Array]], object], str]] = {
    "too few": (lambda a: a.pop("z"), r"wanted \['scale', 'shift', 'time_rows', 'z'\]"),
    "too many": (lambda a: a.update(w=a["z"]), r"bound .*'w'"),
    "shape": (lambda a: a.update(z=np.zeros((1, 9), np.float32)), r"'z' is float32 \[1, 9\]"),
    "type": (lambda a: a.update(z=a["z"].astype(np.float64)), r"'z' is float64"),
}


@pytest.mark.parametrize("name", WRONG)
def test_memory_that_does_not_fit_is_refused(bench: Bench, name: str) -> None:
    change, message = WRONG[name]
    part = bench.open("modulation")
    arrays = values_for(part, bench.manifest, 0)
    change(arrays)
    with pytest.raises(SettingsError, match=message):
        part.bind(**{n: bench.memory.place(a) for n, a in arrays.items()})


def test_memory_of_the_other_device_or_not_in_order_is_refused(bench: Bench) -> None:
    part = bench.open("modulation")
    arrays = values_for(part, bench.manifest, 0)
    width = arrays["z"].shape[1]
    strided: Any = np.zeros((1, 2 * width), np.float32)[:, ::2]
    message = "not contiguous" if bench.case.device == "cpu" else "wanted memory of 'cuda'"
    placed = {n: bench.memory.place(a) for n, a in arrays.items()}
    with pytest.raises(SettingsError, match=message):
        part.bind(**{**placed, "z": strided})


def test_a_model_unlike_its_manifest_is_refused(bench: Bench) -> None:
    spec = bench.manifest.components["encoder"]
    for change in ({"name": "picture"}, {"shape": (1, 3, 64, 64)}, {"shape": (3, 32, 32)}):
        wrong = replace(spec.inputs[0], **change)
        other = replace(spec, inputs=(wrong, *spec.inputs[1:]))
        components = {**bench.manifest.components, "encoder": other}
        changed = replace(bench, manifest=replace(bench.manifest, components=components))
        with pytest.raises((BundleError, EngineError), match=r"diffusionact (export|build)"):
            changed.open("encoder")


def test_a_damaged_model_names_what_mends_it(bench: Bench, tmp_path: Path) -> None:
    copy = Path(shutil.copytree(bench.bundle, tmp_path / "damaged.bundle"))
    if bench.case.backend == "trt":
        for path in copy.glob("engines/encoder-*.engine"):
            path.write_bytes(path.read_bytes()[:100])
        message = r"diffusionact build"
    else:
        path = copy / "encoder.onnx"
        path.write_bytes(path.read_bytes()[:1000])
        message = r"encoder\.onnx.*diffusionact export"
    changed = replace(bench, bundle=copy, manifest=manifest_file.read(copy, verify=False))
    with pytest.raises((BundleError, EngineError), match=message):
        changed.open("encoder")


def test_a_device_or_precision_that_it_lacks_is_an_error(bench: Bench) -> None:
    with pytest.raises(DeviceError, match="'abacus'"):
        bench.open("time", device="abacus")
    with pytest.raises(SettingsError, match="'int3'"):
        bench.open("time", precision="int3")


def test_cuda_is_an_error_where_it_does_not_work(bench: Bench) -> None:
    """Never the CPU in silence."""
    if bench.case.device == "cuda":
        pytest.skip("it works here")
    if bench.memory.stream is None and _gpu_is_here():
        pytest.skip("a GPU is here")
    with pytest.raises((DeviceError, BackendMissing), match=r"cuda|CUDA"):
        bench.open("time", device="cuda", precision="fp32")


def _gpu_is_here() -> bool:
    from diffusionact.runtime import cuda

    return cuda.why_not() is None


def test_a_missing_library_names_the_command(bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    if bench.case.backend == "trt":
        pytest.skip("either of two libraries; tests/test_build.py")
    real = builtins.__import__

    def without(name: str, *rest: Any, **named: Any) -> Any:
        if name.split(".")[0] == bench.case.library:
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        return real(name, *rest, **named)

    name = BACKENDS[bench.case.backend]
    for module in [m for m in sys.modules if m == name or m.startswith(f"{name}_")]:
        monkeypatch.delitem(sys.modules, module)
    monkeypatch.setattr(builtins, "__import__", without)
    with pytest.raises(BackendMissing, match="run: pip install"):
        bench.open("encoder")
