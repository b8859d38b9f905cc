"""The weights file: what goes in comes out, and a wrong file is named as such."""

from __future__ import annotations

import dataclasses
import os
import stat
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from diffusionact.errors import SettingsError
from diffusionact.training import weights
from diffusionact.training.models import FACE128, ReenactmentEncoder, SemanticEncoder, UNet

pytestmark = pytest.mark.torch

TINY = dataclasses.replace(
    FACE128, image_size=32, channels=8, attention_at=(2,), embed=16, encoder_mult=(1, 2, 3)
)


def networks() -> dict[str, nn.Module]:
    torch.manual_seed(0)
    return {
        "render": UNet(TINY),
        "encoder": SemanticEncoder(TINY),
        "reenactment": ReenactmentEncoder(TINY),
    }


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_round_trip(tmp_path: Path, dtype: torch.dtype) -> None:
    path, parts = tmp_path / "w.safetensors", networks()
    weights.save(path, TINY, parts, provenance={"recipe": "tiny", "images_seen": 7}, dtype=dtype)
    loaded = weights.load(path)
    assert loaded.config == TINY
    assert loaded.provenance == {"recipe": "tiny", "images_seen": 7}
    assert set(loaded.parts) == set(parts)
    for part, network in parts.items():
        state = loaded.network(part).state_dict()
        assert state.keys() == network.state_dict().keys()
        for name, tensor in network.state_dict().items():
            assert torch.equal(state[name], tensor.to(dtype).float())
    assert [p.name for p in tmp_path.iterdir()] == ["w.safetensors"]


@pytest.mark.skipif(os.name == "nt", reason="Windows has no umask")
@pytest.mark.parametrize(("umask", "mode"), [(0o022, 0o644), (0o027, 0o640)])
def test_the_file_follows_the_umask(tmp_path: Path, umask: int, mode: int) -> None:
    before = os.umask(umask)
    try:
        weights.save(tmp_path / "w.safetensors", TINY, networks(), provenance={})
    finally:
        os.umask(before)
    assert stat.S_IMODE((tmp_path / "w.safetensors").stat().st_mode) == mode


def test_a_loaded_network_runs_and_is_frozen(tmp_path: Path) -> None:
    path, parts = tmp_path / "w.safetensors", networks()
    weights.save(path, TINY, parts, provenance={}, dtype=torch.float32)
    network = weights.load(path).network("reenactment")
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    image = torch.rand(1, 3, 32, 32)
    expected = parts["reenactment"].eval()(image, image)
    torch.testing.assert_close(network(image, image), expected)


def test_an_overflow_is_not_written(tmp_path: Path) -> None:
    parts = networks()
    with torch.no_grad():
        next(parts["render"].parameters()).fill_(1e6)
    with pytest.raises(SettingsError, match=r"render\.\S+ is not finite as torch.float16"):
        weights.save(tmp_path / "w.safetensors", TINY, parts, provenance={})
    assert list(tmp_path.iterdir()) == []


def test_unknown_part_is_refused(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="'student'"):
        weights.save(tmp_path / "w", TINY, {"student": UNet(TINY)}, provenance={})


def test_missing_part_is_named(tmp_path: Path) -> None:
    path = tmp_path / "w.safetensors"
    weights.save(path, TINY, networks(), provenance={})
    with pytest.raises(SettingsError, match="no part 'invert'"):
        weights.load(path).network("invert")


def test_tensors_of_another_network_are_refused(tmp_path: Path) -> None:
    path, wider = tmp_path / "w.safetensors", dataclasses.replace(TINY, channels=16)
    weights.save(path, wider, networks(), provenance={})
    with pytest.raises(SettingsError, match="'render' of the weights does not fit"):
        weights.load(path).network("render")


def test_files_that_are_no_weights(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no such weights file"):
        weights.load(tmp_path / "absent.safetensors")
    (tmp_path / "text.safetensors").write_text("hello")
    with pytest.raises(SettingsError, match="not a readable safetensors file"):
        weights.load(tmp_path / "text.safetensors")
    save_file({"a": torch.zeros(1)}, tmp_path / "foreign.safetensors")
    with pytest.raises(SettingsError, match="format None"):
        weights.load(tmp_path / "foreign.safetensors")
