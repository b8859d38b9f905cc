"""A bundle back to weights, for training, distillation and another export to start from."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import onnx
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from diffusionact import manifest as manifest_file
from diffusionact.errors import BundleError, SettingsError
from diffusionact.export.to_onnx import HALVED
from diffusionact.manifest import Manifest
from diffusionact.training import weights as weights_file
from diffusionact.training.models import NetworkConfig, ReenactmentEncoder, UNet

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Restored:
    """A weights file that came out of a bundle. same: it is the very file that went in."""

    path: Path
    sha256: str
    parts: tuple[str, ...]
    same: bool


def restore_weights(bundle_dir: Path, path: Path) -> Restored:
    """The networks of a bundle as the weights file at `path`, every value as it was exported.

    What the runtime has no use for, such as the semantic encoder, is in no bundle.

    Raises:
        SettingsError: `path` is a folder.
        BundleError: the bundle is damaged, was exported before manifests stated the network's
            sizes, or its graphs do not hold these networks' tensors by name.
    """
    if path.is_dir():
        raise SettingsError(f"{path}: a folder; give -o a file, such as weights.safetensors")
    manifest = manifest_file.read(bundle_dir)
    config = _config(manifest)
    stored = {
        name: _initialisers(bundle_dir / part.file) for name, part in manifest.components.items()
    }
    with torch.device("meta"):
        encoder, unet = ReenactmentEncoder(config), UNet(config)
    parts = {
        "render": _unet(unet, stored, ""),
        "reenactment": _named(encoder, stored["encoder"], "network."),
    }
    if "unet_step_invert" in stored:
        parts["invert"] = _unet(unet, stored, "_invert")
    kinds = {tensor.dtype for tensors in parts.values() for tensor in tensors.values()}
    weights_file.save_tensors(
        path,
        config,
        parts,
        provenance=_provenance(manifest.training.provenance),
        student=_student(manifest),
        dtype=torch.float16 if kinds == {torch.float16} else torch.float32,
    )
    digest = manifest_file.file_sha256(path)
    same = digest == manifest.weights_sha256
    log.info("%s: %s", path, "the file of the export" if same else "the networks of the bundle")
    return Restored(path, digest, tuple(parts), same)


def _config(manifest: Manifest) -> NetworkConfig:
    if not manifest.network:
        raise BundleError(
            f"bundle {manifest.name!r} was exported before manifests stated the network's sizes; "
            "export it again: diffusionact export WEIGHTS -o BUNDLE"
        )
    return NetworkConfig.from_dict(json.loads(json.dumps(dict(manifest.network))))


def _student(manifest: Manifest) -> weights_file.Student | None:
    if manifest.student_of is None:
        return None
    return weights_file.Student(manifest.student_of, manifest.render, manifest.invert)


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


def _initialisers(file: Path) -> dict[str, Tensor]:
    """The values that a graph holds by name, in the type in which they are stored."""
    return {
        tensor.name.removesuffix(HALVED): torch.from_numpy(numpy_helper.to_array(tensor).copy())
        for tensor in onnx.load(file).graph.initializer
    }


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
    for name, due in cast(Mapping[str, Tensor], network.state_dict()).items():
        tensor = found.get(prefix + name)
        if tensor is None or tensor.shape != due.shape:
            seen = "is not there" if tensor is None else f"has shape {tuple(tensor.shape)}"
            raise BundleError(
                f"the bundle's graphs are not as diffusionact exports them: {name} {seen}, wanted "
                f"shape {tuple(due.shape)}. Take the weights that it was made of"
            )
        made[name] = tensor
    return made
