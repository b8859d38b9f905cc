"""A bundle back to a weights file."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path

import torch

from diffusionact import manifest as manifest_file
from diffusionact.errors import SettingsError
from diffusionact.training import weights as weights_file

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

    Raises:
        SettingsError: `path` is a folder.
        BundleError: as training/bundle_weights.py, which reads the bundle.
    """
    if path.is_dir():
        raise SettingsError(f"{path}: a folder; give -o a file, such as weights.safetensors")
    found = weights_file.load(bundle_dir)
    kinds = {tensor.dtype for tensors in found.parts.values() for tensor in tensors.values()}
    weights_file.save_tensors(
        path,
        found.config,
        found.parts,
        provenance=found.provenance,
        student=found.student,
        dtype=torch.float16 if kinds == {torch.float16} else torch.float32,
    )
    digest = manifest_file.file_sha256(path)
    same = digest == manifest_file.read(bundle_dir, verify=False).weights_sha256
    log.info("%s: %s", path, "the file of the export" if same else "the networks of the bundle")
    return Restored(path, digest, tuple(found.parts), same)
