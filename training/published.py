"""DiffusionAct's and DiffAE's published checkpoints: every tensor counted, none guessed.

Source: the published checkpoints' names; DiffusionAct code, for which weights invert and render.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from diffusionact.errors import SettingsError
from diffusionact.training import checkpoint_file
from diffusionact.training.checkpoint_file import shown
from diffusionact.training.models import PRESETS, NetworkConfig
from diffusionact.training.origins import ORIGINS
from diffusionact.training.tensor_table import (
    Count,
    Findings,
    Shapes,
    Tensors,
    group,
    shape_of,
    shapes,
    some,
    take,
    under,
)
from diffusionact.training.weights import PARTS

OTHER_SIZES = ". If its network has other sizes, say which: --network NAME or config.json"
UNUSED = ("x_T", "conds_mean", "conds_std")  # previews of training, and the latent model's
# A name that only one of the flat files of training's critics has.
CRITIC_NAMES = {
    "vgg19": "features.34.weight",
    "arcface": "body.0.res_layer.5.fc1.weight",
    "bisenet": "cp.resnet.conv1.weight",
}
NOT_UNET = ("encoder.", "latent_net.")  # what lies beside a U-Net under its prefix


@dataclass(frozen=True)
class Published:
    """The weights of published checkpoints, float32, by part of a weights file."""

    config: NetworkConfig
    parts: Mapping[str, Tensors]
    findings: tuple[Findings, ...]  # of each file that was read


def read(path: Path, diffae: Path | None = None, config: NetworkConfig | None = None) -> Published:
    """The weights of `diffusionact_model.pt`, and of DiffAE's `last.ckpt` where it is given.

    `model` becomes the part render, `ema_model` the part invert, which is DiffAE's where the first
    file has none (with a warning); DiffAE's own encoder becomes the part encoder.

    Args:
        config: the network's sizes; None finds the preset that has the file's names and shapes.

    Raises:
        SettingsError: a file is damaged or another one, or a tensor that is needed is missing,
            of another shape, or not finite.
    """
    findings = Findings(path, "diffusionact", OTHER_SIZES)
    content = content_of(findings)
    diff = group(findings, content, "state_dict_diff")
    net = group(findings, content, "state_dict_net")
    config = config or _config_of(under(diff, "model.", NOT_UNET), net)
    tables = {part: _shapes(config, part) for part in PARTS}
    parts = {
        "render": _unet(findings, diff, "state_dict_diff", "model.", tables["render"]),
        "reenactment": take(findings, net, tables["reenactment"], "state_dict_net"),
    }
    other = _DiffAE(diffae, tables) if diffae else None
    if under(diff, "ema_model.", NOT_UNET):
        parts["invert"] = _unet(findings, diff, "state_dict_diff", "ema_model.", tables["invert"])
    else:
        parts["invert"] = _inversion_of(findings, diff, other)
    if other:
        parts["encoder"] = other.encoder()
    _tell_the_rest(findings, content, diff)
    return Published(config, parts, (findings, other.findings) if other else (findings,))


def read_autoencoder(path: Path, config: NetworkConfig | None = None) -> Published:
    """The weights of DiffAE's `last.ckpt` alone, which a reenactment encoder is trained from:
    `ema_model` becomes the part render, its own encoder the part encoder.

    Args:
        config: the network's sizes; None finds the preset that has the file's names and shapes.

    Raises:
        SettingsError: the file is damaged or another one, or a tensor is missing, of another shape,
            or not finite.
    """
    state = group(*_opened(path), "state_dict")
    unet, encoder = under(state, "ema_model.", NOT_UNET), under(state, "ema_model.encoder.")
    config = config or _config_of(unet, encoder, "encoder")
    other = _DiffAE(path, {part: _shapes(config, part) for part in ("invert", "encoder")})
    parts = {"render": other.unet(), "encoder": other.encoder()}
    return Published(config, parts, (other.findings,))


def _opened(path: Path) -> tuple[Findings, Mapping[Any, Any]]:
    findings = Findings(path, "diffae", OTHER_SIZES)
    return findings, content_of(findings)


def load_network(name: str) -> NetworkConfig:
    """The sizes that a preset's name or a JSON file of `NetworkConfig` stands for.

    Raises:
        SettingsError: it is neither.
    """
    if name in PRESETS:
        return PRESETS[name]
    try:
        values = json.loads(Path(name).read_bytes())
    except OSError as error:
        raise SettingsError(
            f"--network {name}: neither a file ({error.strerror}) nor one of {', '.join(PRESETS)}"
        ) from error
    except ValueError as error:
        raise SettingsError(f"--network {name}: not JSON ({error})") from error
    if not isinstance(values, dict):
        raise SettingsError(f"--network {name}: wanted a JSON object with the network's sizes")
    return NetworkConfig.from_dict(values)


def identify(content: Any) -> str | None:
    """Which of `origins.ORIGINS` the content of a checkpoint is, as its names tell."""
    if not isinstance(content, Mapping):
        return None
    if "state_dict_net" in content or "state_dict_diff" in content:
        return "diffusionact"
    state = content.get("state_dict")
    names = [name for name in state if isinstance(name, str)] if isinstance(state, Mapping) else []
    if any(name.startswith("ema_model.") for name in names):
        return "diffae"
    if any(name.startswith("deca.") for name in names):
        return "emoca"
    if "visual.class_embedding" in names:
        return "farl"
    if "model_state" in content:
        return "gaze"
    if "conv3_3_norm.weight" in content:
        return "s3fd"
    if "m0.b1_4.bn1.weight" in content or "top_m_0.bn1.weight" in content:
        return "fan"
    return next((kind for kind, name in CRITIC_NAMES.items() if name in content), None)


def content_of(findings: Findings) -> Mapping[Any, Any]:
    """The content of the file, which should be of the kind that the findings say.

    Raises:
        SettingsError: it is not readable, or another file.
    """
    path = findings.path
    content = checkpoint_file.read(path, findings.warn)
    seen, due = identify(content), ORIGINS[findings.kind]
    if seen == findings.kind and isinstance(content, Mapping):
        return content
    if seen is not None:
        raise SettingsError(
            f"{path}: is the file of {ORIGINS[seen].title}: give it as {ORIGINS[seen].option}. "
            f"Wanted here: {due.told()}"
        )
    if isinstance(content, Mapping):
        what = f"holds {some(list(content))}: of none of the networks known here"
    else:
        what = f"holds {shown(type(content).__name__)}, no table of tensors"
    raise SettingsError(f"{path}: {what}. Wanted: {due.told()}")


def _shapes(config: NetworkConfig, part: str) -> Shapes:
    with torch.device("meta"):
        return shapes(PARTS[part](config))


def _config_of(unet: Tensors, net: Tensors, part: str = "reenactment") -> NetworkConfig:
    """The preset nearest to the names and shapes of a U-Net and of what encodes: what differs from
    it is told where it is read."""

    def score(config: NetworkConfig) -> float:
        pairs = ((unet, _shapes(config, "render")), (net, _shapes(config, part)))
        return sum(
            sum(shape_of(seen.get(name)) == shape for name, shape in due.items())
            / len({*seen, *due})
            for seen, due in pairs
        )

    return max((config for config in PRESETS.values() if config.prediction == "eps"), key=score)


def _unet(
    findings: Findings, tensors: Tensors, where: str, prefix: str, due: Shapes
) -> dict[str, Tensor]:
    """The tensors of the U-Net under a prefix; a message for other prefixes names one."""
    found = under(tensors, prefix, NOT_UNET)
    if not found:
        raise findings.error(
            f"{where} has none of the {len(due)} tensors {prefix}*; its names are "
            f"{some(list(tensors))}. The published loader would go on with random weights"
        )
    return take(findings, found, due, f"{where}, {prefix}*", prefix)


class _DiffAE:
    """DiffAE's checkpoint, of which its averaged weights (`ema_model`) count."""

    def __init__(self, path: Path, tables: Mapping[str, Shapes]) -> None:
        self.findings = Findings(path, "diffae", OTHER_SIZES)
        self._tensors = group(self.findings, content_of(self.findings), "state_dict")
        self._tables = tables

    def unet(self) -> dict[str, Tensor]:
        """The U-Net's tensors."""
        due = self._tables["invert"]
        return _unet(self.findings, self._tensors, "state_dict", "ema_model.", due)

    def encoder(self) -> dict[str, Tensor]:
        """The semantic encoder's tensors."""
        prefix = "ema_model.encoder."
        found, due = under(self._tensors, prefix), self._tables["encoder"]
        return take(self.findings, found, due, f"state_dict, {prefix}*", prefix)


def _inversion_of(findings: Findings, diff: Tensors, other: _DiffAE | None) -> dict[str, Tensor]:
    """The weights of inversion where the first file has none: DiffAE's.

    Raises:
        SettingsError: DiffAE's file was not given.
    """
    if other is None:
        strange = [name for name in diff if not name.startswith(("model.", *UNUSED))]
        raise SettingsError(
            f"{findings.path}: state_dict_diff has none of the weights that invert a portrait, "
            f"ema_model.* (beside model.* it has {some(strange)}); they are those of DiffAE: give "
            f"its file as well, --diffae last.ckpt. {ORIGINS['diffae'].told()}"
        )
    findings.warn(
        f"no ema_model.* in state_dict_diff; inversion uses those of {other.findings.path.name}"
    )
    return other.unet()


def _tell_the_rest(findings: Findings, content: Mapping[Any, Any], diff: Tensors) -> None:
    """Count what is there and not used, and warn of what nobody knows."""
    beside = [p + kind for p in ("model.", "ema_model.") for kind in NOT_UNET]
    for prefix in (*beside, *UNUSED):
        if found := len(under(diff, prefix)):
            findings.counts.append(Count(f"state_dict_diff, {prefix}*", found, None))
    known = ("model.", "ema_model.", *UNUSED)
    if strange := [name for name in diff if not name.startswith(known)]:
        findings.warn(
            f"{len(strange)} unknown tensors in state_dict_diff are left out: {some(strange)}"
        )
    expected = {"state_dict_net", "state_dict_diff", "best_val_loss", "global_noise"}
    if strange := [name for name in content if name not in expected]:
        findings.warn(f"unknown entries are left out: {some(strange)}")
