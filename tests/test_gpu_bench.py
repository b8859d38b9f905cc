"""benchmarks/gpu.py, the way it goes on a GPU machine, with a toy network on the CPU."""

from __future__ import annotations

import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="no PyTorch; make dev installs it")

from benchmarks import gpu, gpu_floor, gpu_variant  # noqa: E402
from diffusionact.manifest import REQUIRED, component_tensors  # noqa: E402
from diffusionact.runtime import cuda, graph  # noqa: E402
from diffusionact.training.models import FFHQ256, UNet  # noqa: E402
from tests.recording_device import OnDevice, RecordingDevice  # noqa: E402

pytestmark = pytest.mark.torch
# Section 5 of what is known of the published network: one step, one encoder pass.
STEP_GFLOP, ENCODER_GFLOP = 554.4, 70.8


def run(*words: str) -> subprocess.CompletedProcess[str]:
    """The benchmark as make starts it: this tree on the path, nothing else."""
    environment = {**os.environ, "PYTHONPATH": ".", "OMP_NUM_THREADS": "1"}
    return subprocess.run(
        [sys.executable, "-m", "benchmarks.gpu", *words], cwd=gpu.ROOT, env=environment,
        capture_output=True, text=True, timeout=240,
    )  # fmt: skip


def toy(path: Path, only: str) -> dict[str, Any]:
    words = ["--device", "cpu", "--tiny", "--steps", "2", "--frames", "2", "--only", only]
    done = run(*words, "--json", str(path))
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(path.read_text())
    print(done.stdout)
    return found


def check(found: dict[str, Any], name: str) -> dict[str, Any]:
    (row,) = found["variants"][name]["rows"]
    assert row["finite"] and row["as_first_mode"] and row["mode"] == "eager"
    for what in ("frame", "step", "encoder"):
        assert 0 < row[what]["p50_ms"] <= row[what]["p95_ms"]
    return dict(row)


def test_it_measures_in_a_process_of_its_own_and_tells_on_what(tmp_path: Path) -> None:
    found = toy(tmp_path / "gpu.json", "torch-fp32")
    assert list(found["variants"]) == ["torch-fp32"]
    assert "mean_levels" not in check(found, "torch-fp32"), "the reference"
    assert found["floor_ms"] == pytest.approx(
        1e3 * (found["flops"]["encoder"] + 2 * found["flops"]["step"]) / found["peak_flops"],
        abs=1e-3,
    )
    assert found["versions"]["torch"] and found["machine"]["cpu"] and found["time"]


@pytest.mark.slow
def test_others_are_compared_with_the_first(tmp_path: Path) -> None:
    found = toy(tmp_path / "gpu.json", "torch-fp32,torch-bf16,torch-fp32-compiled")
    half = check(found, "torch-bf16")
    assert 0 < half["mean_levels"] < 5 and half["max_levels"] < 40
    assert check(found, "torch-fp32-compiled")["mean_levels"] < 0.02


def test_the_gpus_loop_over_pytorch_gives_the_cpus_picture(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """All of what runs on a GPU but the GPU: the graph loop, its modes, and PyTorch's networks."""
    device, opener = RecordingDevice(), gpu_variant.Opener

    class Recorded(opener):  # type: ignore[misc, valid-type]
        def __init__(self, request: gpu_variant.Request, stream: int | None) -> None:
            assert stream == device.stream
            super().__init__(dataclasses.replace(request, device="cpu"), None)

        def __call__(self, name: str, count: int) -> Any:
            return OnDevice(device, f"{name} {count}", super().__call__(name, count))

    weights = tmp_path / "weights.pt"
    gpu_variant.make_weights("tiny", weights)
    picture = str(tmp_path / "picture.npy")
    request = gpu_variant.Request(
        "torch", "fp32", False, ("eager",), "cpu", "tiny", steps=3, frames=2,
        weights=str(weights), picture=picture,
    )  # fmt: skip
    list(gpu_variant.measure(request))
    monkeypatch.setattr(gpu_variant, "Opener", Recorded)
    monkeypatch.setattr(cuda, "Device", lambda: device)
    modes = ("eager", "step", "turbo")
    monkeypatch.setattr(cuda, "free_bytes", lambda: 1000 - device.allocated)
    rows = list(gpu_variant.measure(dataclasses.replace(request, device="cuda", modes=modes)))
    assert [row["mode"] for row in rows] == list(modes)
    assert all(row["as_first_mode"] and row["finite"] for row in rows)
    assert all(row["max_levels"] <= 0.501 for row in rows), "8 bits of the same picture"
    assert all("outside_networks_ms" in row and row["gpu"] for row in rows)
    assert [row["allocated_bytes"] for row in rows] == [0, 0, 0], "by the frames"


@pytest.mark.skipif(cuda.why_not() is None, reason="a GPU is here")
def test_without_a_gpu_it_says_so() -> None:
    done = run("--check")
    assert done.returncode == 0 and done.stdout.startswith("gpu: skipped: ")


def test_the_networks_of_a_bundle_are_timed_by_themselves_too(
    toy_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """TensorRT's way and ONNX Runtime's: the loop opens the components, the rig notes them."""
    device = RecordingDevice()
    inner = graph.open_component

    def on_device(bundle: Path, manifest: Any, name: str, **how: Any) -> OnDevice:
        sizes, backend = how["sizes"], how["backend"]
        if backend == "ort":
            device.refuses = ["encoder", "unet_step"]
        return OnDevice(device, name, inner(bundle, manifest, name, sizes=sizes, threads=1))

    monkeypatch.setattr(graph, "open_component", on_device)
    monkeypatch.setattr(cuda, "Device", lambda: device)
    for backend, mode in (("trt", "step"), ("ort", "eager")):
        rig = gpu_variant.GpuRig(gpu_variant.Request(
            backend, "fp32", False, (mode,), "cuda", "tiny", 3, 2, "", bundle=str(toy_bundle)
        ))  # fmt: skip
        assert rig.start(mode) == mode
        device.launched.clear()
        for name, run in rig.networks().items():
            run()
            assert device.launched[-1][0] == ("graph" if mode == "step" else dict(
                encoder="encoder", step="unet_step")[name])  # fmt: skip


def test_a_child_that_fails_or_hangs_is_told(tmp_path: Path) -> None:
    assert gpu.run_child(["-c", "pass"], tmp_path, 20) is None
    failed = gpu.run_child(["-c", "raise RuntimeError('no such GPU')"], tmp_path, 20)
    assert failed and "status 1" in failed and "no such GPU" in failed
    hung = gpu.run_child(["-c", "import time; time.sleep(60)"], tmp_path, 0.5)
    assert hung == "not done after 0 s: no words"


def test_a_childs_children_do_not_hold_it_up_and_do_not_outlive_it(tmp_path: Path) -> None:
    """Compilers of torch.compile, which inherit its pipes."""
    code = (
        "import subprocess, sys, time; c = subprocess.Popen([sys.executable, '-c', "
        "'import time; time.sleep(60)']); print(c.pid, flush=True); time.sleep(60)"
    )
    start = time.monotonic()
    status, said = gpu.ended(["-c", code], tmp_path, 3.0)
    assert status is None and time.monotonic() - start < 20
    (pid,) = map(int, said)
    for _ in range(100):  # until init has taken note
        stat = Path(f"/proc/{pid}/stat")
        if not stat.exists() or stat.read_text().split()[2] == "Z":
            break
        time.sleep(0.05)
    else:
        pytest.fail("the grandchild lives on")


def test_what_a_child_measured_before_it_died_is_kept(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    class Given:
        tiny, device, steps, frames = True, "cpu", 1, 1

    given: Any = Given()
    monkeypatch.setattr(gpu_variant, "make_weights", lambda *_: None)
    limits: list[float] = []

    def dies(words: list[str], folder: Path, limit_s: float) -> str:
        limits.append(limit_s)
        Path(words[-1]).write_text(json.dumps({"rows": [{"mode": "step"}]}))
        return f"not done after {limit_s:.0f} s"

    monkeypatch.setattr(gpu, "run_child", dies)
    seen = list(gpu.measured(gpu.ON_GPU[:2], given, tmp_path, gpu.Clock(5)))
    for _, answer in seen:
        assert answer["rows"] == [{"mode": "step"}] and "not done" in answer["skipped"]
    assert limits == [gpu.LIMIT_S] * 2, "one that hangs leaves time for the others"
    assert gpu.ON_GPU[-1].limit_s is None and all(v.limit_s for v in gpu.ON_GPU[:-1])


@pytest.mark.parametrize("command", ["gpu-check", "gpu-bench"])
def test_make_keeps_the_callers_path(command: str, tmp_path: Path) -> None:
    """pytest or TensorRT may lie in a folder there: the machine has no pip."""
    if shutil.which("make") is None:
        pytest.skip("no make")
    tool = tmp_path / "python"
    tool.write_text('#!/bin/sh\necho "$PYTHONPATH" "$@"\n')
    tool.chmod(0o755)
    done = subprocess.run(
        ["make", "-s", command, f"GPU_PYTHON={tool}"], cwd=gpu.ROOT, text=True,
        capture_output=True, env={**os.environ, "PYTHONPATH": "/theirs"},
    )  # fmt: skip
    assert done.stdout.startswith(".:/theirs -m benchmarks.gpu"), done.stderr


def test_no_time_is_a_reason_too(tmp_path: Path) -> None:
    class Given:
        tiny, device, steps, frames = True, "cpu", 1, 1

    given: Any = Given()
    ((_, answer),) = gpu.measured(gpu.ON_CPU[:1], given, tmp_path, gpu.Clock(0.0))
    assert answer == {"skipped": "no time left"}


def test_the_floor_is_that_of_the_published_network() -> None:
    counted = gpu_floor.flops(FFHQ256)
    assert counted["step"] / 1e9 == pytest.approx(STEP_GFLOP, rel=0.01)
    assert counted["encoder"] / 1e9 == pytest.approx(ENCODER_GFLOP, rel=0.01)


def test_sizes_are_those_of_the_network() -> None:
    manifest = gpu_variant.bare_manifest("ffhq256", 20)
    with torch.device("meta"):
        assert manifest.modulation_size == UNet(FFHQ256).modulation_size
    assert set(component_tensors(manifest)) == set(REQUIRED)


def test_what_failed_is_not_lost_among_the_skips() -> None:
    said = [
        "tests/test_a.py::test_one PASSED                    [  2%]",
        "tests/test_a.py::test_two[x y] SKIPPED (no onnx)    [ 12%]",
        "tests/test_a.py::test_three FAILED                  [100%]",
        "E   assert 1 == 2",
        *["SKIPPED [4] tests/test_a.py:265: engines: no onnx"] * 30,
        "1 failed, 1 passed, 120 skipped in 1.00s",
    ]
    assert gpu.shortened(said) == ["skipped 120: engines: no onnx", *said[2:4], said[-1]]


@pytest.mark.slow
def test_the_tests_that_need_a_gpu_are_found_without_our_settings(tmp_path: Path) -> None:
    answer = gpu.run_tests(tmp_path, 240)
    assert answer["status"] in (0, 5), answer["said"]
    assert "passed" in answer["said"][-1] or "skipped" in answer["said"][-1]
