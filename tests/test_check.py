"""`diffusionact check`: what it tells, what it fails, and the command that it names for each."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusionact import cli, engine_files
from diffusionact import manifest as manifest_file
from diffusionact.engine_files import EngineManifest, Parity
from diffusionact.errors import BackendMissing
from diffusionact.runtime import check, cuda
from diffusionact.runtime.component import BACKENDS
from diffusionact.runtime.doctor import backends, engines, machine
from diffusionact.runtime.doctor.finding import Finding, found

Capture = pytest.CaptureFixture[str]


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """One backend, no face tracker, nothing measured, and no folder but the test's."""
    monkeypatch.setenv(engine_files.CACHE_VARIABLE, str(tmp_path / "cache"))
    monkeypatch.setattr(check, "_tracker", lambda: Finding("tracker", None, "not looked for"))
    monkeypatch.setattr(backends, "explain", lambda *_: "ort fp32: the fastest\n  of one")
    monkeypatch.setattr(backends, "BACKENDS", {"ort": BACKENDS["ort"]})


@pytest.fixture
def bundle(toy_bundle: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(toy_bundle, tmp_path / "toy.bundle"))


def report(bundle: Path, capsys: Capture) -> tuple[int, dict[str, dict[str, Any]]]:
    """The exit status, and the findings by subject."""
    status = cli.main(["check", str(bundle), "--json"])
    found = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert all(set(f) == {"subject", "passed", "detail", "command"} for f in found)
    return status, {finding["subject"]: finding for finding in found}


def write_engine(bundle: Path, **changes: Any) -> Path:
    """An engine file of the encoder, as far as can be judged without running it."""
    manifest = manifest_file.read(bundle)
    key = engine_files.make_key(
        manifest, "encoder", library="tensorrt_rtx", version="1", target=["sm_89"], level=3
    )
    path = engine_files.folder_to_write(bundle) / f"{engine_files.stem(key)}.engine"
    path.write_bytes(b"engine")
    digest = hashlib.sha256(b"engine").hexdigest()
    plain = {"graph": {}, "network": {}, "build_s": 0.0}
    engine_files.write_manifest(
        path, EngineManifest(key, digest, 6, (), (), **{**plain, **changes})
    )
    return path


def test_a_good_bundle_passes(toy_bundle: Path, capsys: Capture) -> None:
    status, seen = report(toy_bundle, capsys)
    assert status == 0
    ways = ("backend ort", "bundle", "repeatability ort cpu fp32", "parity ort cpu fp32")
    assert all(seen[subject]["passed"] for subject in ways)
    assert all(seen[name]["passed"] is None for name in ("numpy", "parity", "engines"))
    assert seen["default on the CPU"]["detail"] == "ort fp32: the fastest; of one"


@pytest.mark.parametrize("mean_error", [1e-5, 2e-4, "x"])
def test_the_parity_of_the_export_is_told(
    bundle: Path, capsys: Capture, mean_error: object
) -> None:
    row = {"what": "unet_step", "max_error": 5e-4, "mean_error": mean_error,
           "max_allowed": 1e-3, "mean_allowed": 1e-4}  # fmt: skip
    (bundle / "parity.json").write_text(json.dumps({"versions": {}, "rows": [row]}))
    assert cli.main(["check", str(bundle)]) == (0 if mean_error == 1e-5 else 1)
    lines = [line for line in capsys.readouterr().out.splitlines() if " parity " in line]
    line = next(line for line in lines if " ort " not in line)
    if mean_error == "x":
        assert line.startswith("FAILED parity") and "export the bundle again" in line
    else:
        assert line.startswith("ok " if mean_error == 1e-5 else "FAILED ")
        assert "parity unet_step" in line and "max 5.0e-04 of 1e-03" in line


def test_a_backend_that_does_not_repeat_fails(
    toy_bundle: Path, monkeypatch: pytest.MonkeyPatch, capsys: Capture
) -> None:
    from diffusionact.runtime.loop import Loop

    count = iter(range(100))
    monkeypatch.setattr(
        Loop, "render", lambda self, x_T, z: np.full((1, 3, 4, 4), next(count), np.float32)
    )
    assert cli.main(["check", str(toy_bundle)]) == 1
    assert "FAILED repeatability ort" in capsys.readouterr().out


def test_a_backend_that_is_far_from_the_reference_fails(
    toy_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    ways = (backends.Way("other", "cpu", "fp16"), backends.Way("ort", "cpu", "fp32"))
    pictures = {way: np.zeros((1, 3, 4, 4), np.float32) for way in ways}

    def rendered(_: object, __: object, way: backends.Way, ___: object) -> Any:
        return pictures[way], pictures[way], 1.0

    monkeypatch.setattr(backends, "_rendered", rendered)
    manifest = manifest_file.read(toy_bundle)
    for level, passed in ((0.1, True), (0.3, False)):
        pictures[ways[0]] = np.full((1, 3, 4, 4), level / backends.LEVELS, np.float32)
        told = {f.subject: f for f in backends.parity(toy_bundle, manifest, ways)}
        assert told["parity ort cpu fp32"].passed
        finding = told["parity other cpu fp16"]
        assert finding.passed is passed and f"mean {level:.3f} levels" in finding.detail
        assert bool(finding.command) is not passed


def test_a_damaged_bundle_fails(bundle: Path, capsys: Capture) -> None:
    with (bundle / "encoder.onnx").open("ab") as file:
        file.write(b"x")
    status, seen = report(bundle, capsys)
    assert status == 1 and seen["bundle"]["passed"] is False
    assert seen["bundle"]["command"].startswith("diffusionact export")
    assert "engines" not in seen


def test_a_valid_engine_is_told(bundle: Path, capsys: Capture) -> None:
    path = write_engine(bundle)
    (finding,) = engines.findings(bundle, manifest_file.read(bundle))
    if finding.passed is None:  # a library of another version is installed
        assert (
            "made for its version 1" in finding.detail and "diffusionact build" in finding.command
        )
    else:
        assert finding.passed and "never run" in finding.detail
    assert path.stem in finding.subject


@pytest.mark.parametrize("damage", ["truncated", "tampered", "wrong", "stale"])
def test_a_damaged_engine_fails_and_a_stale_one_does_not(
    bundle: Path, capsys: Capture, damage: str
) -> None:
    far = {"parity": Parity(1.0, 0.01, "NVIDIA Test 1")} if damage == "wrong" else {}
    path = write_engine(bundle, **far)
    if damage == "truncated":
        path.write_bytes(b"engin")
    elif damage == "tampered":
        path.write_bytes(b"enginE")
    elif damage == "stale":
        manifest = manifest_file.read(bundle)
        import onnx

        model = onnx.load(bundle / "encoder.onnx")
        model.producer_name = "other"
        onnx.save(model, bundle / "encoder.onnx")
        part = manifest.components["encoder"]
        digest = manifest_file.file_sha256(bundle / "encoder.onnx")
        changed = {**manifest.components, "encoder": _with(part, sha256=digest)}
        manifest_file.write(bundle, _with(manifest, components=changed))
    status, seen = report(bundle, capsys)
    finding = seen[f"engine {path.stem}"]
    assert damage.upper() in finding["detail"]
    assert finding["command"].startswith(f"diffusionact build {bundle}")
    assert (status, finding["passed"]) == ((0, None) if damage == "stale" else (1, False))


def _with(value: Any, **changes: Any) -> Any:
    import dataclasses

    return dataclasses.replace(value, **changes)


def test_a_backend_that_is_not_installed_is_told_with_its_command(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def missing(name: str) -> Any:
        raise BackendMissing("backend 'torch' needs PyTorch (no); run: pip install torch")

    monkeypatch.setattr(backends, "BACKENDS", {"torch": "nowhere", "ort": "nowhere"})
    monkeypatch.setattr(backends.importlib, "import_module", missing)
    told = {finding.subject: (finding, ways) for finding, ways in backends.loading()}
    finding, ways = told["backend torch"]
    assert (finding.passed, finding.command, ways) == (None, "pip install torch", ())
    assert told["backend ort"][0].passed is False, "the product's own dependency"


@pytest.fixture
def with_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """A program called nvidia-smi that names a GPU; there is no driver behind it."""
    tool = tmp_path / "bin" / "nvidia-smi"
    tool.parent.mkdir()
    tool.write_text("#!/bin/sh\necho 'NVIDIA Test 1, 8.9, 580.65.06'\n")
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", str(tool.parent), prepend=os.pathsep)
    yield


@pytest.mark.skipif(os.name == "nt", reason="a shell script stands in")
def test_a_gpu_that_is_not_reached_is_told(with_smi: None, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda, "why_not", lambda: "no cuda-bindings; run: pip install cuda-x")
    told = {finding.subject: finding for finding in machine.findings()}
    assert told["gpu"].detail == "NVIDIA Test 1, sm_89, driver 580"
    assert (told["driver"].passed, told["driver"].command) == (None, "pip install cuda-x")
    assert told["tensorrt"].passed is None
    assert all(finding.passed is not False for finding in told.values())


def test_the_command_is_taken_out_of_the_message() -> None:
    for text, command in (
        ("no x; run: pip install x", "pip install x"),
        ("no x; run: pip install x, or take --device cpu", "pip install x"),
        ("no x; run: pip uninstall y, then: pip install x", "pip uninstall y"),
        ("no x", ""),
    ):
        assert found("x", None, text).command == command
