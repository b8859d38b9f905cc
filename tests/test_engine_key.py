"""Engine files: keys, names, places, and what is refused, without TensorRT and without a GPU."""

from __future__ import annotations

import dataclasses
import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from diffusionact import engine_files
from diffusionact import manifest as manifest_file
from diffusionact.engine_files import EngineKey, EngineManifest, Gpu, Parity
from diffusionact.errors import BundleError, EngineError, SettingsError

HERE = Gpu("NVIDIA Test 1", "sm_89", 580)
PLAN = bytes(range(256)) * 8


@pytest.fixture
def bundle(toy_bundle: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv(engine_files.CACHE_VARIABLE, str(tmp_path / "cache"))
    return Path(shutil.copytree(toy_bundle, tmp_path / "toy.bundle"))


def key(bundle: Path, component: str = "unet_step", **changes: Any) -> EngineKey:
    given: dict[str, Any] = {"library": "tensorrt_rtx", "version": "1.7.1.116", "target": HERE}
    return engine_files.make_key(
        manifest_file.read(bundle), component, **{**given, "sizes": {"N": 4}, **changes}
    )


def put(bundle: Path, made: EngineKey, folder: Path | None = None) -> Path:
    """Write an engine of this key, as the builder does."""
    part = manifest_file.read(bundle).components[made.component]
    inputs, outputs = engine_files.fixed_specs(part, made)
    path = (folder or engine_files.folder_to_write(bundle)) / f"{engine_files.stem(made)}.engine"
    path.write_bytes(PLAN)
    manifest = EngineManifest(
        made, manifest_file.file_sha256(path), len(PLAN), inputs, outputs,
        graph={"Conv": {"float16": 2}}, network={"CONVOLUTION": {"HALF": 2}}, build_s=1.5,
    )  # fmt: skip
    engine_files.write_manifest(path, manifest)
    return path


def test_a_manifest_comes_back_as_it_was_written(bundle: Path) -> None:
    path = put(bundle, key(bundle))
    assert path.parent == bundle / "engines"
    manifest = engine_files.read_manifest(path)
    assert manifest.key == key(bundle) and manifest.parity is None and manifest.engine is None
    with_parity = dataclasses.replace(manifest, parity=Parity(1e-3, 2e-3, HERE.name))
    engine_files.write_manifest(path, with_parity)
    assert engine_files.read_manifest(path) == with_parity
    assert with_parity.parity is not None and with_parity.parity.passed
    assert not Parity(3e-3, 2e-3, "").passed
    assert list(path.parent.glob(".part-*")) == []


def test_the_key_names_the_file_and_everything_in_it_counts(bundle: Path) -> None:
    made = key(bundle)
    assert engine_files.stem(made) == engine_files.stem(key(bundle))
    others = [
        dataclasses.replace(made, **{field.name: value})
        for field in dataclasses.fields(EngineKey)
        if field.name != "component"
        for value in [{"x": (1,)} if field.name == "shapes" else ("sm_75",)
                      if field.name == "targets" else 9 if field.type == "int" else "other"]
    ]  # fmt: skip
    assert len({engine_files.stem(k) for k in (made, *others)}) == len(others) + 1
    assert len(others) == len(dataclasses.fields(EngineKey)) - 1


def test_targets_are_sorted_by_number(bundle: Path) -> None:
    made = key(bundle, target=("sm_120", "sm_89", "sm_89"))
    assert (made.targets, made.gpu, made.driver_major) == (("sm_89", "sm_120"), "", 0)
    for wrong in ("89", "sm_", "sm_8x"):
        with pytest.raises(SettingsError, match="wanted such as sm_89"):
            key(bundle, target=[wrong])


def test_what_runs_once_keeps_fp32(bundle: Path) -> None:
    precisions = {name: key(bundle, name).precision for name in manifest_file.REQUIRED}
    assert precisions == {
        "encoder": "fp16", "time": "fp32", "modulation": "fp32", "unet_step": "fp16",
    }  # fmt: skip


def test_sizes_are_fixed(bundle: Path) -> None:
    made = key(bundle, "time", sizes={"N": 7})
    inputs, outputs = engine_files.fixed_specs(manifest_file.read(bundle).components["time"], made)
    assert inputs[0].shape == (7,) and outputs[0].shape[0] == 7
    with pytest.raises(SettingsError, match="size 'N'"):
        key(bundle, "time", sizes={})
    with pytest.raises(BundleError, match="no component 'other'"):
        key(bundle, "other")
    with pytest.raises(SettingsError, match="precision 'half'"):
        key(bundle, precision="half")


def test_an_engine_is_found_by_what_it_is_needed_for(bundle: Path) -> None:
    path = put(bundle, key(bundle))
    found = engine_files.find(bundle, key(bundle))
    assert (found.state, found.path) == ("valid", path)
    assert engine_files.require(bundle, key(bundle))[0] == path
    assert engine_files.find(bundle, key(bundle, "encoder")).state == "missing"


def test_an_engine_ahead_of_time_serves_each_of_its_gpus(bundle: Path) -> None:
    path = put(bundle, key(bundle, target=("sm_89", "sm_120")))
    assert engine_files.find(bundle, key(bundle)).path == path
    assert engine_files.find(bundle, key(bundle, target=["sm_120"])).path == path
    found = engine_files.find(bundle, key(bundle, target=["sm_86"]))
    assert found.state == "foreign" and "--gpu sm_86" in found.reason


def test_the_better_one_is_taken(bundle: Path) -> None:
    ahead = put(bundle, key(bundle, target=["sm_89"], level=3))
    here = put(bundle, key(bundle, level=3))
    assert engine_files.find(bundle, key(bundle)).path == here
    best = put(bundle, key(bundle, target=["sm_89"], level=5))
    assert engine_files.find(bundle, key(bundle)).path == best
    best.write_bytes(PLAN[:-1])  # then the next best
    assert engine_files.find(bundle, key(bundle)).path == here
    here.unlink()
    assert engine_files.find(bundle, key(bundle)).path == ahead


CHANGES: dict[str, tuple[Callable[[EngineKey], EngineKey], str, str]] = {
    "other weights": (lambda k: dataclasses.replace(k, onnx_sha256="0" * 64), "stale", "ONNX"),
    "other recipe": (lambda k: dataclasses.replace(k, recipe=k.recipe - 1), "stale", "recipe"),
    "other shapes": (
        lambda k: dataclasses.replace(k, shapes={**k.shapes, "x_t": (1,)}),
        "stale",
        "shapes",
    ),
    "other precision": (lambda k: dataclasses.replace(k, precision="fp32"), "stale", "fp32"),
    "other library": (lambda k: dataclasses.replace(k, library="tensorrt"), "stale", "library"),
    "other version": (lambda k: dataclasses.replace(k, version="1.6"), "stale", "version 1.6"),
    "lower level": (lambda k: dataclasses.replace(k, level=1), "stale", "level 1"),
    "other GPU": (lambda k: dataclasses.replace(k, gpu="NVIDIA Test 2"), "foreign", "Test 2"),
    "other SM": (lambda k: dataclasses.replace(k, targets=("sm_90",)), "foreign", "sm_90"),
    "other driver": (lambda k: dataclasses.replace(k, driver_major=570), "foreign", "driver 570"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_what_it_was_not_made_for_is_refused_with_the_command(bundle: Path, name: str) -> None:
    change, state, word = CHANGES[name]
    wanted = key(bundle, level=3)
    put(bundle, change(wanted))
    found = engine_files.find(bundle, wanted)
    assert found.state == state and word in found.reason
    assert found.reason.endswith(f"run: diffusionact build {bundle}")
    with pytest.raises(EngineError, match="diffusionact build"):
        engine_files.require(bundle, wanted)


def edit(path: Path, **values: object) -> None:
    beside = path.with_suffix(".json")
    beside.write_text(json.dumps({**json.loads(beside.read_text()), **values}))


DAMAGES: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut short": (lambda p: p.write_bytes(PLAN[:100]), "truncated"),
    "empty": (lambda p: p.write_bytes(b""), "truncated"),
    "one bit": (lambda p: p.write_bytes(bytes([PLAN[0] ^ 1]) + PLAN[1:]), "tampered"),
    "longer": (lambda p: p.write_bytes(PLAN + b"x"), "tampered"),
    "no manifest": (lambda p: p.with_suffix(".json").unlink(), "tampered"),
    "manifest cut": (lambda p: p.with_suffix(".json").write_bytes(b'{"format": 1, "ke'), "tampered"),
    "manifest is no object": (lambda p: p.with_suffix(".json").write_bytes(b"[]"), "tampered"),
    "manifest is no text": (lambda p: p.with_suffix(".json").write_bytes(b"\xff\xfe\x00"), "tampered"),
    "field of another type": (lambda p: edit(p, plan_bytes="many"), "tampered"),
    "other format": (lambda p: edit(p, format=99), "tampered"),
    "another engine's name": (lambda p: [p.with_suffix(s).rename(
        p.with_name("unet_step-0123456789abcdef" + s)) for s in (".json", ".engine")], "tampered"),
}  # fmt: skip


@pytest.mark.parametrize("name", DAMAGES)
def test_a_damaged_engine_is_refused(bundle: Path, name: str) -> None:
    damage, state = DAMAGES[name]
    damage(put(bundle, key(bundle)))
    found = engine_files.find(bundle, key(bundle))
    assert found.state == state and found.manifest is None
    assert "run: diffusionact build" in found.reason
    (path,) = engine_files.engine_paths(bundle)
    assert engine_files.verify(path).state == state


def test_an_engine_that_answered_wrongly_is_refused(bundle: Path) -> None:
    path = put(bundle, key(bundle))
    made = engine_files.read_manifest(path)
    wrong = dataclasses.replace(made, parity=Parity(3e-2, 1e-2, HERE.name))
    engine_files.write_manifest(path, wrong)
    found = engine_files.find(bundle, key(bundle))
    assert found.state == "wrong" and "3.0e-02 from fp32" in found.reason


def test_engines_lie_in_the_cache_when_the_bundle_cannot_be_written(bundle: Path) -> None:
    inside, cache = engine_files.folders(bundle)
    inside.symlink_to("/proc/self")  # where root cannot write either
    assert engine_files.folder_to_write(bundle) == cache
    path = put(bundle, key(bundle))
    assert path.parent == cache and engine_files.find(bundle, key(bundle)).path == path
    other = shutil.copytree(bundle, bundle.with_name("other.bundle"), symlinks=True)
    assert engine_files.find(Path(other), key(bundle)).state == "missing", "a bundle has its own"


def test_no_place_at_all(bundle: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(engine_files.CACHE_VARIABLE, "/proc/self")
    (bundle / "engines").write_bytes(b"")
    with pytest.raises(EngineError, match=engine_files.CACHE_VARIABLE):
        engine_files.folder_to_write(bundle)


def test_the_command_repeats_what_was_asked(bundle: Path) -> None:
    wanted = key(bundle, precision="int8", target=("sm_120", "sm_89"))
    command = engine_files.build_command(bundle, wanted)
    assert command == f"diffusionact build {bundle} --gpu sm_89,sm_120 --precision int8"
