"""The gate of `diffusionact build`: an engine's answers against the bundle's, on real inputs.

No engine runs without a GPU. What stands in for one here is the very graph that it is built from,
fp16 or 8 bits, in ONNX Runtime: the comparison, its inputs, its limits and what becomes of a
failure are all real.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest

from diffusionact import bundle_path, cli, engine_files, trt_library
from diffusionact import manifest as manifest_file
from diffusionact.engine_files import EngineManifest
from diffusionact.engines import build as engines
from diffusionact.engines import precision, quantize
from diffusionact.engines.build import Settings
from diffusionact.engines.plan import Result
from diffusionact.errors import EngineError, SettingsError
from diffusionact.runtime import cuda, gate, recorder
from diffusionact.runtime.gate import Gate
from diffusionact.runtime.ort import run_graph

AHEAD = Settings(gpus=("sm_89",))
PLACE = "NVIDIA Test 1"


@pytest.fixture
def shipped(tmp_path: Path) -> Path:
    ignored = shutil.ignore_patterns("engines")
    return Path(shutil.copytree(bundle_path(), tmp_path / "face.bundle", ignore=ignored))


def engine_manifests(bundle: Path, kind: str = "fp16") -> list[EngineManifest]:
    """The manifests of the engines that `build` would make; nothing is built."""
    manifest = manifest_file.read(bundle)
    settings = dataclasses.replace(AHEAD, precision=kind)
    made = []
    for key in engines.wanted_keys(manifest, settings, "tensorrt_rtx", "1"):
        inputs, outputs = engine_files.fixed_specs(manifest.components[key.component], key)
        made.append(EngineManifest(key, "", 0, inputs, outputs, {}, {}, 0.0))
    return made


class Graphs:
    """An opener: the graph of an engine in ONNX Runtime. error: added to every answer."""

    def __init__(self, bundle: Path, error: float = 0.0) -> None:
        self.bundle, self.error = bundle, error
        self.feeds: dict[str, Mapping[str, Any]] = {}

    def __call__(self, engine: EngineManifest, path: Path) -> tuple[gate.Run, str]:
        name = engine.key.component
        model = onnx.load(self.bundle / f"{name}.onnx")
        made = precision.to_fp16(model) if engine.key.precision == "fp16" else model
        precision.fix_sizes(made, engine.key.shapes)

        def run(feed: Mapping[str, Any]) -> Mapping[str, Any]:
            self.feeds[name] = feed
            answers = run_graph(made.SerializeToString(), feed)
            return {output: values + self.error for output, values in answers.items()}

        return run, PLACE


def test_every_component_passes_on_real_inputs(shipped: Path) -> None:
    graphs = Graphs(shipped)
    compare = Gate(shipped, graphs)
    for engine in engine_manifests(shipped):
        name, shapes = engine.key.component, engine.key.shapes
        parity = compare(engine, Path(name))
        assert parity is not None and parity.gpu == PLACE
        print(f"{name}: {parity.max_error:.1e} of {parity.max_allowed:.1e}")
        assert parity.passed and parity.max_error < parity.max_allowed / 3
        assert (parity.max_error > 0) == (name not in engine_files.ONCE), "fp16 is another graph"
        for tensor, values in graphs.feeds[name].items():
            assert values.shape == shapes[tensor]
    step = graphs.feeds["unet_step"]
    assert 0.9 < step["x_t"].std() < 1.1 and step["scale"].std() > 0.1
    assert len(set(graphs.feeds["time"]["t"])) == len(graphs.feeds["time"]["t"]) > 1


def test_a_wrong_engine_is_far_and_so_is_one_that_is_not_a_number(shipped: Path) -> None:
    step = next(e for e in engine_manifests(shipped) if e.key.component == "unet_step")
    graphs = Graphs(shipped)
    compare = Gate(shipped, graphs)
    for graphs.error in (0.1, float("nan"), float("inf")):
        parity = compare(step, Path("unet_step"))
        assert parity is not None and not parity.passed
        json.loads(json.dumps(dataclasses.asdict(parity), allow_nan=False))


def test_an_engine_that_cannot_be_run_here_has_no_parity(shipped: Path) -> None:
    (engine, *_) = engine_manifests(shipped)
    assert Gate(shipped, lambda _, __: None)(engine, Path("x")) is None
    if cuda.why_not() is not None:
        assert Gate(shipped, gate.on_gpu)(engine, Path("x")) is None


def test_build_stores_the_parity_and_refuses_a_wrong_engine(
    toy: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Through the command line; test_build.py has the real builder."""
    graphs = Graphs(toy)
    monkeypatch.setattr(gate, "on_gpu", graphs)
    monkeypatch.setattr(engines, "run_child", short_of_memory()[1])
    words = ["build", str(toy), "--gpu", "sm_89", "--json"]
    assert cli.main(words) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert len(lines) == 6
    for line in lines:
        assert line["manifest"]["parity"]["gpu"] == PLACE
        found = engine_files.verify(Path(line["path"]))
        assert found.state == "valid" and found.manifest and found.manifest.parity
    graphs.error = 1.0
    assert cli.main([*words, "--force"]) == 2
    assert "is allowed; it is not used" in capsys.readouterr().err
    worst = [engine_files.verify(path).state for path in engine_files.engine_paths(toy)]
    assert worst.count("wrong") == 1


FULL = "[virtualMemoryBuffer.cpp] Error Code 2: OutOfMemory (Requested size was 9126805504 bytes.)"


def short_of_memory(*levels: int) -> tuple[list[tuple[int, int]], Any]:
    """What was asked for, and a builder that has too little memory at these levels."""
    asked: list[tuple[int, int]] = []

    def run_child(request: Any, report: Any) -> Result:
        asked.append((request.level, request.workspace_mib))
        if request.level in levels:
            raise EngineError(f"built no engine of {request.onnx}: {FULL}")
        Path(request.plan).write_bytes(b"plan")
        return Result(hashlib.sha256(b"plan").hexdigest(), 4, {}, {}, None, 1.0)

    return asked, run_child


@pytest.fixture
def toy(toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(engine_files.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(
        trt_library, "find", lambda name=None: trt_library.Library("tensorrt_rtx", "1", None)
    )
    return Path(shutil.copytree(toy_bundle, tmp_path / "toy.bundle"))


def test_a_builder_short_of_memory_takes_less_and_says_so(
    toy: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    asked, run_child = short_of_memory(3, 2)
    monkeypatch.setattr(engines, "run_child", run_child)
    with caplog.at_level(logging.WARNING, logger="diffusionact"):
        first = next(engines.build(toy, AHEAD))
    assert asked == [(3, 4096), (2, 1024), (1, 256)]
    assert first.manifest.key.level == 1
    assert first.path.stem == engine_files.stem(first.manifest.key)
    assert "memory was short" in caplog.text and "level 1 and 256 MiB" in caplog.text


def test_a_builder_that_never_has_enough_says_why(
    toy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, run_child = short_of_memory(*range(6))
    monkeypatch.setattr(engines, "run_child", run_child)
    with pytest.raises(EngineError, match="OutOfMemory"):
        next(engines.build(toy, AHEAD))
    assert asked[-1] == (0, engines.LEAST_WORKSPACE_MIB) and len(asked) == 4
    assert list(engine_files.engine_paths(toy)) == []


def test_another_failure_is_not_tried_again(toy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def run_child(request: Any, report: Any) -> Result:
        asked.append(request)
        raise EngineError("no kernel for this layer")

    monkeypatch.setattr(engines, "run_child", run_child)
    with pytest.raises(EngineError, match="no kernel"):
        next(engines.build(toy, AHEAD))
    assert len(asked) == 1


def test_what_is_recorded_is_what_the_networks_were_given() -> None:
    manifest = manifest_file.read(bundle_path())
    frames, steps = 2, manifest.render.steps
    feeds = recorder.record(bundle_path(), frames)
    inverted = recorder.PORTRAITS
    assert len(feeds["encoder"]) == len(feeds["modulation"]) == frames + inverted
    assert len(feeds["unet_step"]) == frames * steps + inverted * manifest.invert.steps
    first = feeds["unet_step"][0]
    noisiest = max(np.abs(feed["x_t"]).max() for feed in feeds["unet_step"])
    assert np.abs(first["x_t"]).max() <= 1.0 < noisiest, "a picture; noise"
    for name in ("encoder", "unet_step"):
        inputs = {spec.name: spec.shape for spec in manifest.components[name].inputs}
        for feed in feeds[name]:
            assert {tensor: values.shape for tensor, values in feed.items()} == inputs
        assert not np.array_equal(*(feeds[name][i][next(iter(inputs))] for i in (-1, -2)))
    with pytest.raises(SettingsError, match="frames=0"):
        recorder.record(bundle_path(), 0)


@pytest.mark.slow
@pytest.mark.skipif("tensorrt_rtx" not in trt_library.installed(), reason="no tensorrt_rtx")
@pytest.mark.parametrize("kind", ["int8", "fp8"])
def test_8_bits_from_recording_to_engine_by_the_command_line(
    shipped: Path, kind: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ranges = tmp_path / "ranges"
    assert cli.main(["calibrate", str(shipped), "-o", str(ranges), "--kind", kind, "--json"]) == 0
    lines = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    quality = {line["component"]: line["psnr_db"] for line in lines}
    assert set(quality) == {"encoder", "unet_step"}
    assert all(db >= quantize.LEAST_PSNR_DB for db in quality.values())
    words = ["build", str(shipped), "--gpu", "sm_89", "--precision", kind, "--calibration"]
    assert cli.main([*words, str(ranges)]) == 0
    told = capsys.readouterr().out
    for name, db in quality.items():
        assert f"{kind} {db:.1f} dB" in next(s for s in told.splitlines() if f" {name} " in s)
    for path in engine_files.engine_paths(shipped, "unet_step"):
        built = engine_files.read_manifest(path)
        assert built.psnr_db == quality["unet_step"] and "QUANTIZE" in built.network
