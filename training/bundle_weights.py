"""The weights that are in a bundle: what training, another export and PyTorch itself start from."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusionact import manifest as manifest_file
from diffusionact.errors import BundleError
from diffusionact.graph_file import initialisers
from diffusionact.manifest import Manifest
from diffusionact.training.models import NetworkConfig, ReenactmentEncoder, UNet
from diffusionact.training.weights import Student, Weights


def read(bundle_dir: Path) -> Weights:
    """The networks of a bundle, every value as it was exported, in the type that it is stored in.

    What the runtime has no use for, such as the semantic encoder, is in no bundle.

    Raises:
        BundleError: the bundle is damaged, was exported before manifests stated the network's
            sizes, or its graphs do not hold these networks' tensors by name.
    """
    manifest = manifest_file.read(bundle_dir)
    config = _config(manifest)
    stored = {name: _tensors(bundle_dir / part.file) for name, part in manifest.components.items()}
    with torch.device("meta"):
        encoder, unet = ReenactmentEncoder(config), UNet(config)
    parts = {
        "render": _unet(unet, stored, ""),
        "reenactment": _named(encoder, stored["encoder"], "network."),
    }
    if "unet_step_invert" in stored:
        parts["invert"] = _unet(unet, stored, "_invert")
    return Weights(config, parts, _provenance(manifest.training.provenance), _student(manifest))


def _config(manifest: Manifest) -> NetworkConfig:
    if not manifest.network:
        raise BundleError(
            f"bundle {manifest.name!r} was exported before manifests stated the network's sizes; "
            "export it again: diffusionact export WEIGHTS -o BUNDLE"
        )
    return NetworkConfig.from_dict(json.loads(json.dumps(dict(manifest.network))))


def _student(manifest: Manifest) -> Student | None:
    if manifest.student_of is None:
        return None
    return Student(manifest.student_of, manifest.render, manifest.invert)


def _provenance(flat: Mapping[str, str | int | float]) -> dict[str, Any]:
    """The provenance as it was before the export made one-line words of it."""
    return {key: _unfolded(value) for key, value in flat.items()}


def _unfolded(value: str | int | float) -> Any:
    if not isinstance(value, str) or not (value[:1] in "[{" or value in ("true", "false", "null")):
        return value
    try:
        return json.loads(value)
    except ValueError:
        return value


def _tensors(file: Path) -> dict[str, Tensor]:
    return {name: torch.from_numpy(values) for name, values in initialisers(file).items()}


def _unet(unet: UNet, stored: Mapping[str, Mapping[str, Tensor]], suffix: str) -> dict[str, Tensor]:
    """The U-Net's tensors: time and step keep their names, modulation is one matrix of many."""
    found = {**stored["time" + suffix], **stored["unet_step" + suffix]}
    rows = stored["modulation" + suffix]
    names = {module: name for name, module in unet.named_modules()}
    at = 0
    for block in unet.modulated:
        place = f"unet.{names[block]}.cond_emb_layers.1"
        for kind in ("weight", "bias"):
            if kind in rows:
                found[f"{place}.{kind}"] = rows[kind][at : at + block.width]
        at += block.width
    return _named(unet, found, "unet.")


def _named(network: nn.Module, found: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The tensors of a network's state."""
    made = {}
    for name, due in network.state_dict().items():
        tensor = found.get(prefix + name)
        if tensor is None or tensor.shape != due.shape:
            seen = "is not there" if tensor is None else f"has shape {tuple(tensor.shape)}"
            raise BundleError(
                f"the bundle's graphs are not as diffusionact exports them: {name} {seen}, wanted "
                f"shape {tuple(due.shape)}. Take the weights that it was made of"
            )
        made[name] = tensor
    return made
