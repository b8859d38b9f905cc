"""`engines/build.py` with the real TensorRT for RTX, which builds on a machine without a GPU."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, helper

from diffusionact import bundle_path, cli, engine_files, trt_library
from diffusionact import manifest as manifest_file
from diffusionact.engine_files import EngineManifest, Gpu, Parity
from diffusionact.engines import build as engines
from diffusionact.engines import plan as engine_plan
from diffusionact.engines.build import Settings
from diffusionact.errors import (
    BackendMissing,
    BundleError,
    DeviceError,
    EngineError,
    SettingsError,
)
from diffusionact.gpu import gpu_here

pytest.importorskip("tensorrt_rtx_bindings", reason="no tensorrt_rtx; make dev installs it")

AHEAD = Settings(gpus=("sm_89", "sm_120"))
GATE_GPU = "NVIDIA Test 1"
CANCEL_S = 60.0  # of a builder that is between two steps, on a busy machine
LIMIT_BYTES = 4096  # of a written file, where the disk is full


@pytest.fixture
def bundle(toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(engine_files.CACHE_VARIABLE, str(tmp_path / "cache"))
    return Path(shutil.copytree(toy_bundle, tmp_path / "toy.bundle"))


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    return Path(shutil.copytree(bundle_path(), tmp_path / "face.bundle",
                                ignore=shutil.ignore_patterns("engines")))  # fmt: skip


def only(bundle: Path, *names: str) -> Path:
    """The bundle, whose other components have engines already: files that nobody reads."""
    manifest = manifest_file.read(bundle)
    library = trt_library.find("tensorrt_rtx")
    keys = engines.wanted_keys(manifest, AHEAD, library.name, library.version)
    folder = engine_files.folder_to_write(bundle)
    for key in keys:
        if key.component not in names:
            path = folder / f"{engine_files.stem(key)}.engine"
            path.write_bytes(b"engine")
            engine_files.write_manifest(path, EngineManifest(
                key, hashlib.sha256(b"engine").hexdigest(), 6, (), (), {}, {}, 0.0,
            ))  # fmt: skip
    return bundle


def replace_component(bundle: Path, name: str, content: bytes) -> None:
    """Exchange a component's file, and say so in the manifest."""
    manifest = manifest_file.read(bundle)
    part = manifest.components[name]
    (bundle / part.file).write_bytes(content)
    changed = dataclasses.replace(part, sha256=hashlib.sha256(content).hexdigest())
    components = {**manifest.components, name: changed}
    manifest_file.write(bundle, dataclasses.replace(manifest, components=components))


def left_over(bundle: Path) -> list[str]:
    return sorted(p.name for f in engine_files.folders(bundle) if f.is_dir()
                  for p in f.iterdir() if p.name.startswith(".part-"))  # fmt: skip


def children() -> set[int]:
    """The processes that this one has started and that run."""
    tasks = Path("/proc/self/task").glob("*/children")
    return {int(word) for task in tasks for word in task.read_text().split()}


def test_every_component_has_an_engine_and_is_built_once(bundle: Path) -> None:
    made = list(engines.build(bundle, AHEAD))
    counts = {name: [b.component for b in made].count(name) for name in manifest_file.REQUIRED}
    assert counts == {"encoder": 1, "time": 2, "modulation": 2, "unet_step": 1}
    assert all(b.new and b.path.parent == bundle / "engines" for b in made)
    for b in made:
        key = b.manifest.key
        assert (key.library, key.targets, key.gpu) == ("tensorrt_rtx", ("sm_89", "sm_120"), "")
        assert key.precision == ("fp32" if b.component in engine_files.ONCE else "fp16")
        assert key.version == trt_library.find("tensorrt_rtx").version
        assert b.manifest == engine_files.read_manifest(b.path)
        assert b.manifest.plan_bytes == b.path.stat().st_size and b.manifest.parity is None
        part = manifest_file.read(bundle).components[b.component]
        names = [s.name for s in (*b.manifest.inputs, *b.manifest.outputs)]
        assert names == [s.name for s in (*part.inputs, *part.outputs)] == list(key.shapes)
        assert all(isinstance(n, int) for shape in key.shapes.values() for n in shape)
    again = list(engines.build(bundle, AHEAD))
    assert [(b.path, b.new) for b in again] == [(b.path, False) for b in made]
    assert left_over(bundle) == []


def test_step_counts_and_own_inversion(own_inversion_bundle: Path) -> None:
    manifest = manifest_file.read(own_inversion_bundle)

    def rows(settings: Settings) -> list[tuple[str, int]]:
        keys = engines.wanted_keys(manifest, settings, "tensorrt_rtx", "1")
        return [(k.component, k.shapes["time_rows"][0]) for k in keys if "time_rows" in k.shapes]

    render, invert = manifest.render.steps, manifest.invert.steps
    assert set(rows(AHEAD)) == {
        ("time", render), ("modulation", render),
        ("time_invert", invert), ("modulation_invert", invert),
    }  # fmt: skip
    steps = dataclasses.replace(AHEAD, steps=(2, 8))
    assert {n for name, n in rows(steps) if name == "modulation"} == {2, 8}


def test_the_shipped_model_is_built_in_fp16(shipped: Path) -> None:
    names = ("encoder", "unet_step")
    seen: list[tuple[str, int]] = []
    built = {b.component: b for b in engines.build(
        only(shipped, *names), AHEAD, lambda stage, done, total: seen.append((stage, done))
    )}  # fmt: skip
    for name in names:
        network, graph = built[name].manifest.network, built[name].manifest.graph
        assert set(network["CONVOLUTION"]) == set(network["MATRIX_MULTIPLY"]) == {"HALF"}
        assert set(network["NORMALIZATION"]) == set(network["SOFTMAX"]) == {"FLOAT"}
        assert network["CONVOLUTION"]["HALF"] == graph["Conv"]["float16"]
        assert network["NORMALIZATION"]["FLOAT"] == graph["GroupNormalization"]["float32"]
    percents = [done for stage, done in seen if stage == "unet_step"]
    assert percents == sorted(set(percents)) and percents[-1] == 100


def test_fp32_is_built_on_request_and_shown(bundle: Path) -> None:
    settings = dataclasses.replace(AHEAD, precision="fp32")
    (step,) = [b for b in engines.build(only(bundle, "unet_step"), settings)
               if b.component == "unet_step"]  # fmt: skip
    assert set(step.manifest.network["CONVOLUTION"]) == {"FLOAT"}
    assert "HALF" not in engines.describe(step.manifest.network)
    half = engine_files.find(bundle, dataclasses.replace(step.manifest.key, precision="fp16"))
    assert half.state == "stale" and "precision fp32" in half.reason


def test_stale_and_damaged_engines_are_built_again(bundle: Path) -> None:
    names = ("encoder", "unet_step")
    first = {b.component: b.path for b in engines.build(only(bundle, *names), AHEAD)}
    first["unet_step"].write_bytes(first["unet_step"].read_bytes()[:-1])
    model = onnx.load(bundle / "encoder.onnx")
    model.producer_name = "other"
    replace_component(bundle, "encoder", model.SerializeToString())
    again = {b.component: b for b in engines.build(bundle, AHEAD)}
    new = {name for name, b in again.items() if b.new}
    assert new == set(names)
    assert again["unet_step"].path == first["unet_step"]
    assert again["encoder"].path != first["encoder"]
    assert engine_files.verify(first["unet_step"]).state == "valid"


def test_force_builds_what_is_valid(bundle: Path) -> None:
    list(engines.build(only(bundle, "encoder"), AHEAD))
    forced = engines.build(bundle, dataclasses.replace(AHEAD, force=True))
    first = next(forced)
    forced.close()  # type: ignore[attr-defined]
    assert first.new and first.component == "encoder"


def test_ctrl_c_leaves_nothing(shipped: Path) -> None:
    def interrupt(stage: str, done: int, total: int | None) -> None:
        raise KeyboardInterrupt

    before = children()
    start_s = time.monotonic()
    with pytest.raises(KeyboardInterrupt):
        list(engines.build(only(shipped, "unet_step"), AHEAD, interrupt))
    assert time.monotonic() - start_s < CANCEL_S
    assert children() <= before and left_over(shipped) == []
    assert list(engine_files.engine_paths(shipped, "unet_step")) == []


def request(bundle: Path, name: str, **changes: Any) -> engine_plan.Request:
    manifest = manifest_file.read(bundle)
    key = engine_files.make_key(
        manifest, name, library="tensorrt_rtx", version="", target=["sm_89"], sizes={"N": 4}
    )
    plan = bundle.parent / f"{name}.engine"
    return dataclasses.replace(
        engine_plan.Request(
            onnx=str(bundle / manifest.components[name].file), plan=str(plan), shapes=key.shapes,
            precision=key.precision, library="tensorrt_rtx", targets=key.targets, gpu="",
            level=3, workspace_mib=1024,
        ),
        **changes,
    )  # fmt: skip


def test_the_builder_stops_when_its_parent_is_gone(shipped: Path) -> None:
    child = subprocess.Popen(
        [sys.executable, "-m", "diffusionact.engines.child"],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True,
    )  # fmt: skip
    assert child.stdin is not None and child.stdout is not None
    with child:
        child.stdin.write(json.dumps(dataclasses.asdict(request(shipped, "unet_step"))) + "\n")
        child.stdin.flush()
        assert "percent" in json.loads(child.stdout.readline())
        child.stdin.close()
        lines = child.stdout.read().splitlines()
    assert json.loads(lines[-1]) == {"cancelled": True} and child.returncode == 0


def test_a_killed_builder_is_told(shipped: Path) -> None:
    before = children()

    def kill(stage: str, done: int, total: int | None) -> None:
        for pid in children() - before:
            os.kill(pid, signal.SIGKILL)

    with pytest.raises(EngineError, match="killed by signal 9.*--workspace"):
        list(engines.build(only(shipped, "unet_step"), AHEAD, kill))
    assert left_over(shipped) == []


@pytest.fixture
def full_disk() -> Iterator[None]:
    """No file may grow beyond a few KB: every write fails as on a full disk, the child's too."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (LIMIT_BYTES, hard))
    yield
    resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))


def test_a_full_disk_leaves_nothing(bundle: Path, full_disk: None) -> None:
    with pytest.raises(EngineError, match=rf"{engine_files.CACHE_VARIABLE}"):
        list(engines.build(bundle, AHEAD))
    assert left_over(bundle) == [] and list(engine_files.engine_paths(bundle)) == []


def test_a_bundle_that_cannot_be_written_has_its_engines_in_the_cache(bundle: Path) -> None:
    (bundle / "engines").symlink_to("/proc/self")
    cache = engine_files.folders(bundle)[1]
    made = list(engines.build(only(bundle, "encoder"), AHEAD))
    assert {b.path.parent for b in made} == {cache} and any(b.new for b in made)
    assert not any(b.new for b in engines.build(bundle, AHEAD))


def test_a_damaged_bundle_builds_nothing(bundle: Path) -> None:
    path = bundle / "encoder.onnx"
    content = path.read_bytes()
    path.write_bytes(content[:-10])
    with pytest.raises(BundleError, match="damaged"):
        list(engines.build(bundle, AHEAD))
    path.write_bytes(content)
    replace_component(bundle, "encoder", b"\x01\x02 no model")
    with pytest.raises(BundleError, match=r"encoder\.onnx: not an ONNX file"):
        list(engines.build(bundle, AHEAD))


def test_a_graph_that_tensorrt_does_not_read(bundle: Path) -> None:
    image = [helper.make_tensor_value_info(n, TensorProto.FLOAT, (1, 3, 32, 32))
             for n in ("image", "condition")]  # fmt: skip
    z = helper.make_tensor_value_info("z", TensorProto.FLOAT, (1, 8))
    nodes = [
        helper.make_node("Det", ["image"], ["det"]),
        helper.make_node("Add", ["det", "condition"], ["sum"]),
        helper.make_node("Flatten", ["sum"], ["z"]),
    ]
    graph = helper.make_graph(nodes, "g", image, [z])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)
    replace_component(bundle, "encoder", model.SerializeToString())
    with pytest.raises(BundleError, match="TensorRT does not read it"):
        list(engines.build(bundle, AHEAD))


def test_shapes_are_those_of_the_manifest(bundle: Path) -> None:
    wrong = request(bundle, "encoder", shapes={"image": (1, 3, 32, 32), "z": (1, 8)})
    with pytest.raises(BundleError, match="'condition'"):
        engine_plan.make_plan(wrong, lambda percent: None, lambda: False)


def test_no_engine_is_fp32_for_want_of_something_else(bundle: Path) -> None:
    for kind, message in (("int8", "calibration"), ("half", "calibration")):
        with pytest.raises(EngineError, match=message):
            asked = request(bundle, "encoder", precision=kind)
            engine_plan.make_plan(asked, lambda percent: None, lambda: False)


def test_what_cannot_be_built_here_is_said(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wrong: list[tuple[Settings, type[Exception], str]] = [
        (Settings(), DeviceError, "--gpu sm_89,sm_120"),
        (Settings(gpus=("sm_90",)), EngineError, "sm_90 ahead of time, only for sm_75"),
        (Settings(gpus=("ada",)), SettingsError, "wanted such as sm_89"),
        (Settings(gpus=("sm_89",), library="tensorrt"), SettingsError, "tensorrt_rtx"),
        (Settings(gpus=("sm_89",), library="trt"), SettingsError, "choose from"),
        (dataclasses.replace(AHEAD, level=6), SettingsError, "level 6"),
        (dataclasses.replace(AHEAD, precision="half"), SettingsError, "'half'"),
        (dataclasses.replace(AHEAD, workspace_mib=0), SettingsError, "workspace 0"),
        (dataclasses.replace(AHEAD, steps=(0,)), SettingsError, "at least 1"),
    ]
    for settings, kind, message in wrong:
        with pytest.raises(kind, match=message):
            list(engines.build(bundle, settings))
    monkeypatch.setattr(trt_library, "installed", lambda: ())
    with pytest.raises(BackendMissing, match=r"pip install 'diffusionact\[rtx\]'"):
        list(engines.build(bundle, AHEAD))


def test_the_timing_cache_is_kept_whole(bundle: Path, tmp_path: Path) -> None:
    """TensorRT for RTX takes the calls and keeps nothing in it, which it warns of."""
    cache = tmp_path / "timing.cache"
    for before in (None, b"of another version"):
        if before:
            cache.write_bytes(before)
        asked = request(bundle, "modulation", timing_cache=str(cache))
        with pytest.warns(DeprecationWarning, match="Timing cache"):
            engine_plan.make_plan(asked, lambda percent: None, lambda: False)
        assert cache.stat().st_size > 0 and cache.read_bytes() != before
    assert list(tmp_path.glob(".part-*")) == []


def test_the_gate_stores_what_it_found_and_refuses(bundle: Path) -> None:
    asked: list[Path] = []

    def gate(manifest: EngineManifest, path: Path) -> Parity:
        asked.append(path)
        return Parity(1e-3 if manifest.key.component == "encoder" else 1.0, 1e-2, GATE_GPU)

    with pytest.raises(EngineError, match=r"1.0e\+00, 1.0e-02 is allowed"):
        for built in engines.build(bundle, AHEAD, gate=gate):
            assert built.manifest.parity == Parity(1e-3, 1e-2, GATE_GPU)
            assert engine_files.find(bundle, built.manifest.key).state == "valid"
    refused = engine_files.read_manifest(asked[-1]).key
    assert engine_files.find(bundle, refused).state == "wrong"


def test_the_inspectors_layers_are_counted() -> None:
    layers = [
        {"LayerType": "kgen", "Outputs": [{"Name": "a", "Format/Datatype": "Half"}]},
        {"LayerType": "kgen", "Outputs": [{"Name": "b", "Datatype": "Float"}]},
        {"LayerType": "signal", "Outputs": []},
        "a name only",
    ]
    assert engine_plan.layer_census(json.dumps({"Layers": layers})) == {
        "kgen": {"Float": 1, "Half": 1}, "signal": {"untold": 1}, "untold": {"untold": 1},
    }  # fmt: skip


@pytest.mark.slow
@pytest.mark.torch
@pytest.mark.timeout(900)  # the export is most of it
def test_the_full_size_unet_is_built_in_fp16(tmp_path: Path) -> None:
    import torch

    from diffusionact.export import to_onnx, wrap
    from diffusionact.manifest import TensorSpec
    from diffusionact.training.models import FFHQ256, UNet

    torch.manual_seed(0)
    unet = UNet(FFHQ256)
    step = wrap.Step(unet).eval().requires_grad_(False)
    for parameter in step.parameters():
        if not parameter.any():
            parameter.normal_(0, 0.05)
    rows = tuple(TensorSpec(n, "float32", (1, unet.modulation_size)) for n in ("scale", "shift"))
    picture = (1, 3, FFHQ256.image_size, FFHQ256.image_size)
    inputs = (TensorSpec("x_t", "float32", picture), *rows)
    outputs = (TensorSpec("prediction", "float32", picture),)
    path = tmp_path / "unet_step.onnx"
    to_onnx.export(step, inputs, outputs, path)
    shapes = {s.name: tuple(int(n) for n in s.shape) for s in (*inputs, *outputs)}
    asked = engine_plan.Request(
        str(path), str(tmp_path / "plan"), shapes, "fp16", "tensorrt_rtx", ("sm_89", "sm_120"),
        gpu="", level=3, workspace_mib=4096,
    )  # fmt: skip
    result = engines.run_child(asked, lambda percent: None)
    assert set(result.network["CONVOLUTION"]) == {"HALF"}
    assert set(result.network["NORMALIZATION"]) == {"FLOAT"}
    weights = sum(int(np.prod(p.shape)) for p in unet.parameters())
    assert result.plan_bytes < 3 * weights, "two bytes a weight"


def test_a_gpu_that_is_here_is_in_the_key(bundle: Path) -> None:
    here = Gpu("NVIDIA Test 1", "sm_89", 580)
    manifest = manifest_file.read(bundle)
    keys = engines.wanted_keys(manifest, Settings(here=here), "tensorrt", "11.4")
    assert {(k.gpu, k.targets, k.driver_major) for k in keys} == {(here.name, ("sm_89",), 580)}


def stand_in(folder: Path, monkeypatch: pytest.MonkeyPatch, script: str) -> None:
    """Put a program called nvidia-smi first on the path."""
    tool = folder / "bin" / "nvidia-smi"
    tool.parent.mkdir(exist_ok=True)
    tool.write_text(f"#!/bin/sh\n{script}\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)


def test_the_gpu_is_what_the_driver_says(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    two = "echo 'NVIDIA RTX 4090, 8.9, 580.65.06'; echo 'NVIDIA H200, 9.0, 580.65.06'"
    stand_in(tmp_path, monkeypatch, two)
    assert gpu_here() == Gpu("NVIDIA RTX 4090", "sm_89", 580)
    for broken in ("exit 9", "echo No devices were found", ":"):
        stand_in(tmp_path, monkeypatch, broken)
        with pytest.raises(DeviceError, match="--gpu sm_89"):
            gpu_here()
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_here() is None


def run_cli(*words: str | Path) -> int:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(cli, "_start_log", lambda arguments: None)
        return cli.main(["build", *map(str, words)])


def test_the_command_builds_and_tells(bundle: Path, capsys: pytest.CaptureFixture[str]) -> None:
    only(bundle, "encoder")
    assert run_cli(bundle, "--gpu", "sm_89,sm_120", "--json") == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 6 and [line["component"] for line in lines if line["new"]] == ["encoder"]
    assert Path(lines[0]["path"]).is_file() and lines[0]["manifest"]["graph"]
    assert run_cli(bundle, "--gpu", "sm_89,sm_120") == 0
    text = capsys.readouterr().out
    assert text.count("valid") == 6 and text.count("parity not run here") == 6
    assert "encoder            fp16" in text and "matrix_multiply 1 HALF" in text
    assert "modulation N=4     fp32" in text and "modulation N=5     fp32" in text


def test_the_command_without_a_gpu_says_what_to_give(
    bundle: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("diffusionact.runtime.cuda.gpu_to_build_for", lambda: None)
    assert run_cli(bundle) == 2
    assert "--gpu sm_89,sm_120" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run_cli(bundle, "--precision", "half")


@pytest.mark.usefixtures("interruptible")
def test_sigint_ends_the_command_and_its_builder(shipped: Path) -> None:
    """As a terminal sends it: to both."""
    targets = "sm_80,sm_86,sm_89,sm_120"  # so that a fast machine is not done before the signal
    words = ["build", str(only(shipped, "unet_step")), "--gpu", targets]
    child = subprocess.Popen(
        [sys.executable, "-m", "diffusionact.cli", *words], start_new_session=True,
        stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
    )  # fmt: skip
    with child:
        deadline_s = time.monotonic() + CANCEL_S
        tasks = Path(f"/proc/{child.pid}/task/{child.pid}/children")
        while not tasks.read_text() and time.monotonic() < deadline_s:
            time.sleep(0.05)
        (builder,) = map(int, tasks.read_text().split())
        time.sleep(0.5)  # into the build, or still loading: both must end
        os.killpg(child.pid, signal.SIGINT)
        _, told = child.communicate(timeout=CANCEL_S)
    assert child.returncode == 130 and "interrupted" in told
    assert not Path(f"/proc/{builder}").exists()
    assert left_over(shipped) == []
