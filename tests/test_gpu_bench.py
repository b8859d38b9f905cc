"""benchmarks/gpu.py, the way it goes on a GPU machine, with a toy network on the CPU."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

torch = pytest.importorskip("torch", reason="no PyTorch; make dev installs it")

from benchmarks import gpu, gpu_variant  # noqa: E402
from diffusionact.manifest import REQUIRED, component_tensors  # noqa: E402
from diffusionact.runtime import cuda  # noqa: E402
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
    gpu_variant.measure(request)
    monkeypatch.setattr(gpu_variant, "Opener", Recorded)
    monkeypatch.setattr(cuda, "Device", lambda: device)
    modes = ("eager", "step", "turbo")
    rows = gpu_variant.measure(dataclasses.replace(request, device="cuda", modes=modes))
    assert [row["mode"] for row in rows] == list(modes)
    assert all(row["as_first_mode"] and row["finite"] for row in rows)
    assert all(row["max_levels"] <= 0.501 for row in rows), "8 bits of the same picture"
    assert all("outside_networks_ms" in row and row["gpu"] for row in rows)


@pytest.mark.skipif(cuda.why_not() is None, reason="a GPU is here")
def test_without_a_gpu_it_says_so() -> None:
    done = run("--check")
    assert done.returncode == 0 and done.stdout.startswith("gpu: skipped: ")


def test_a_child_that_fails_or_hangs_is_told(tmp_path: Path) -> None:
    assert gpu.run_child(["-c", "pass"], tmp_path, 20) is None
    failed = gpu.run_child(["-c", "raise RuntimeError('no such GPU')"], tmp_path, 20)
    assert failed and "status 1" in failed and "no such GPU" in failed
    hung = gpu.run_child(["-c", "import time; time.sleep(60)"], tmp_path, 0.5)
    assert hung == "not done after 0 s"


def test_no_time_is_a_reason_too(tmp_path: Path) -> None:
    class Given:
        tiny, device, steps, frames = True, "cpu", 1, 1

    given: Any = Given()
    ((_, answer),) = gpu.measured(gpu.ON_CPU[:1], given, tmp_path, gpu.Clock(0.0))
    assert answer == {"skipped": "no time left"}


def test_the_floor_is_that_of_the_published_network() -> None:
    counted = gpu_variant.flops("ffhq256")
    assert counted["step"] / 1e9 == pytest.approx(STEP_GFLOP, rel=0.01)
    assert counted["encoder"] / 1e9 == pytest.approx(ENCODER_GFLOP, rel=0.01)


def test_sizes_are_those_of_the_network() -> None:
    manifest = gpu_variant.bare_manifest("ffhq256", 20)
    with torch.device("meta"):
        assert manifest.modulation_size == UNet(FFHQ256).modulation_size
    assert set(component_tensors(manifest)) == set(REQUIRED)


@pytest.mark.slow
def test_the_tests_that_need_a_gpu_are_found_without_our_settings(tmp_path: Path) -> None:
    answer = gpu.run_tests(tmp_path, 240)
    assert answer["status"] in (0, 5), answer["said"]
    assert "passed" in answer["said"][-1] or "skipped" in answer["said"][-1]
