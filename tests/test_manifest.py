"""The manifest: a round trip, and every kind of damage named with its file and field."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from diffusionact import manifest as m
from diffusionact.condition import Drawing
from diffusionact.errors import BundleError, SettingsError


def example(bundle_dir: Path, own_inversion: bool = False) -> m.Manifest:
    """A manifest whose files lie in the folder, a few bytes each."""
    bare = m.Manifest(
        name="tiny", image_size=32, z_size=16, modulation_size=88, time_row_size=176,
        prediction="v", schedule=m.Schedule(),
        render=m.Sampling(4, (4, 10), {"4": (0, 250, 500, 999)}), invert=m.Sampling(20),
        crop=m.Crop(rotate=False), drawing=Drawing(1, 1.5, True), landmark_layout="ibug68+gaze2",
        training=m.Training("rendered", "CC0-1.0", "rendered faces", {"yaw": (-40, 40.0)}),
        licence="MIT", weights_sha256="0" * 64, components={},
    )  # fmt: skip
    components = {}
    for name in m.REQUIRED + (m.OWN_INVERSION if own_inversion else ()):
        path = bundle_dir / f"{name}.onnx"
        path.write_bytes(name.encode())
        inputs, outputs = m.component_tensors(bare)[name.removesuffix("_invert")]
        components[name] = m.ComponentSpec(path.name, m.file_sha256(path), inputs, outputs)
    return replace(bare, components=components)


@pytest.mark.parametrize("own_inversion", [False, True])
def test_round_trip(tmp_path: Path, own_inversion: bool) -> None:
    written = example(tmp_path, own_inversion)
    m.write(tmp_path, written)
    assert m.read(tmp_path) == written
    assert not list(tmp_path.glob(".part-*"))


def test_a_file_is_hashed_once_until_it_changes(tmp_path: Path) -> None:
    path = tmp_path / "weights"
    path.write_bytes(b"1" * 10)
    first = m.file_sha256(path)
    path.write_bytes(b"2" * 10)  # at once, when its times may not have moved
    assert m.file_sha256(path) != first
    known = dict(m._hashes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(m, "SETTLED_NS", -(10**15))
        second = m.file_sha256(path)
        assert list(m._hashes.values()) == [*known.values(), second]
        patch.setattr(m.hashlib, "sha256", None)
        assert m.file_sha256(path) == second, "read again"
    path.write_bytes(b"3" * 11)
    assert m.file_sha256(path) not in (first, second)


def with_tracker(bundle_dir: Path) -> m.Manifest:
    """The example with all networks and files of the published tracker."""
    written, tracker = example(bundle_dir), {}
    for name, (inputs, outputs) in m.tracker_tensors().items():
        path = bundle_dir / f"{name}.onnx"
        path.write_bytes(name.encode())
        tracker[name] = m.ComponentSpec(path.name, m.file_sha256(path), inputs, outputs)
    (bundle_dir / "flame.npz").write_bytes(b"flame")
    asset = m.AssetSpec("flame.npz", m.file_sha256(bundle_dir / "flame.npz"))
    return replace(written, tracker=tracker, assets={"flame": asset})


def test_round_trip_with_a_tracker(tmp_path: Path) -> None:
    written = with_tracker(tmp_path)
    m.write(tmp_path, written)
    assert m.read(tmp_path) == written
    part = replace(written, tracker={"fan": written.tracker["fan"]}, assets={})
    m.write(tmp_path, part)
    assert m.read(tmp_path) == part


def test_a_manifest_without_the_tracker_fields_is_read(tmp_path: Path) -> None:
    written = example(tmp_path)
    damage_on_disk(tmp_path, lambda v: (v.pop("tracker"), v.pop("assets")))
    assert m.read(tmp_path) == written


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v["tracker"].update(nose=v["tracker"]["fan"]), r"tracker \['nose'\], wanted"),
        (lambda v: v["tracker"].update(fan=v["tracker"]["gaze"]), "tracker.fan has tensors"),
        (lambda v: v["tracker"]["fan"].update(file="../fan.onnx"), "tracker.fan.file .* leaves"),
        (lambda v: v["assets"]["flame"].update(file="/etc/passwd"), "assets.flame.file .* leaves"),
        (lambda v: v["assets"].update(skin=v["assets"]["flame"]), r"assets \['skin'\], wanted"),
        (lambda v: v["assets"]["flame"].update(sha256="0"), r"flame\.npz: sha256 .* says 0"),
        (lambda v: v["tracker"]["gaze"].update(file="g.onnx"), r"g\.onnx: not readable"),
    ],
)
def test_damage_to_the_tracker_is_named(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    damage_on_disk(tmp_path, change, with_tracker)
    with pytest.raises(BundleError, match=message):
        m.read(tmp_path)


def test_tensors_are_those_of_the_sizes(tmp_path: Path) -> None:
    tensors = m.component_tensors(example(tmp_path))
    assert [spec.shape for spec in tensors["encoder"][0]] == [(1, 3, 32, 32)] * 2
    assert [spec.shape for spec in tensors["modulation"][0]] == [(1, 16), ("N", 176)]
    assert [spec.shape for spec in tensors["unet_step"][0]] == [(1, 3, 32, 32), (1, 88), (1, 88)]


def test_a_sampling_prefers_the_timesteps_that_it_lists() -> None:
    sampling = m.Sampling(4, (4, 10), {"4": (0, 250, 500, 999)})
    assert sampling.at().tolist() == [0, 250, 500, 999]
    assert sampling.at(10).tolist() == list(range(0, 1000, 100))
    assert sampling.at((3, 7)).tolist() == [3, 7]
    assert sampling.at(2, total=10).tolist() == [0, 5]
    with pytest.raises(SettingsError, match="steps=37"):
        sampling.at(37)


def damage_on_disk(
    tmp_path: Path,
    change: Callable[[dict[str, Any]], object],
    make: Callable[[Path], m.Manifest] = example,
) -> None:
    m.write(tmp_path, make(tmp_path))
    path = tmp_path / m.FILE_NAME
    values = json.loads(path.read_text())
    change(values)
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda v: v.update(format=2), "format 2, this version reads 1"),
        (lambda v: v.pop("z_size"), "z_size is missing"),
        (lambda v: v.update(colour="red"), "colour is not a field"),
        (lambda v: v["crop"].update(rotate=1), "crop.rotate is int, wanted bool"),
        (lambda v: v.update(prediction="noise"), "prediction is 'noise', wanted one of"),
        (lambda v: v.update(image_size="32"), "image_size is str, wanted int"),
        (lambda v: v.update(z_size=17), "components.encoder has tensors"),
        (lambda v: v["components"].pop("time"), "wanted .*'time'"),
        (lambda v: v["components"]["time"].update(file="../time.onnx"), "leaves the bundle"),
        (lambda v: v["render"].update(steps=37), "render: steps=37"),
        (lambda v: v["render"].update(timesteps={"3": [0, 1]}), "timesteps.3 lists 2"),
        (lambda v: v["render"].update(timesteps={"2": [9, 1]}), "ascending"),
        (lambda v: v["schedule"].update(kind="cosine"), "schedule.kind 'cosine'"),
        (lambda v: v["schedule"].update(total=1e3), "schedule.total is float, wanted int"),
    ],
)
def test_damage_is_named(
    tmp_path: Path, change: Callable[[dict[str, Any]], object], message: str
) -> None:
    damage_on_disk(tmp_path, change)
    with pytest.raises(BundleError, match=message) as caught:
        m.read(tmp_path)
    assert str(tmp_path / m.FILE_NAME) in str(caught.value)
    assert "diffusionact export WEIGHTS -o BUNDLE" in str(caught.value)


def test_missing_and_unreadable_manifest(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="not readable"):
        m.read(tmp_path / "absent")
    (tmp_path / m.FILE_NAME).write_text("{")
    with pytest.raises(BundleError, match="not JSON"):
        m.read(tmp_path)
    (tmp_path / m.FILE_NAME).write_text("[]")
    with pytest.raises(BundleError, match="format None"):
        m.read(tmp_path)


def test_a_changed_file_is_found(tmp_path: Path) -> None:
    written = example(tmp_path)
    m.write(tmp_path, written)
    (tmp_path / "unet_step.onnx").write_bytes(b"other")
    with pytest.raises(BundleError) as caught:
        m.read(tmp_path)
    message = str(caught.value)
    assert written.components["unet_step"].sha256 in message
    assert m.file_sha256(tmp_path / "unet_step.onnx") in message
    assert m.read(tmp_path, verify=False) == written


def test_a_missing_file_is_found(tmp_path: Path) -> None:
    m.write(tmp_path, example(tmp_path))
    (tmp_path / "time.onnx").unlink()
    with pytest.raises(BundleError, match=r"time\.onnx: not readable"):
        m.read(tmp_path)


def test_a_contradiction_is_not_written(tmp_path: Path) -> None:
    wrong = replace(example(tmp_path), modulation_size=1)
    with pytest.raises(BundleError, match="components.modulation has tensors"):
        m.write(tmp_path, wrong)
    assert not (tmp_path / m.FILE_NAME).exists()
