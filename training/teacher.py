"""The finished networks that a student learns from."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from diffusionact.errors import SettingsError
from diffusionact.manifest import file_sha256
from diffusionact.schedule import Prediction
from diffusionact.training import weights


@dataclass(frozen=True)
class Teacher:
    """Frozen networks of a weights file: the U-Net that renders, the one that inverts (often the
    same), and the reenactment encoder."""

    unet: nn.Module
    inverter: nn.Module
    reenactment: nn.Module
    prediction: Prediction

    @torch.no_grad()
    def code(self, source: Tensor | None, condition: Tensor | None) -> Tensor:
        """Returns its z float32 [B,E] of source and drawing [B,3,S,S]; a student's batches have
        both."""
        assert source is not None and condition is not None
        z: Tensor = self.reenactment(source, condition).float()
        return z


def teacher_sha256(path: str) -> str:
    """Returns the SHA-256 of the teacher's weights file. Raises: SettingsError if there is none."""
    try:
        return file_sha256(Path(path))
    except OSError as error:
        raise SettingsError(
            f"[student]: of = {path!r}: {error.strerror}; name the weights file of the teacher, "
            "which diffusionact train wrote"
        ) from error


def open_teacher(path: str, image_size: int, device: torch.device) -> Teacher:
    """Returns the networks of the teacher's weights file on a device.

    Raises: SettingsError if there is no such file, or its pictures have another size.
    """
    found = weights.load(path)
    if found.config.image_size != image_size:
        raise SettingsError(
            f"[student]: of = {path!r} makes pictures of {found.config.image_size} px, wanted "
            f"{image_size} px as the network of the recipe"
        )

    def network(part: str) -> nn.Module:
        frozen = found.network(part)
        frozen.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in stubs
        return frozen.to(device)

    unet = network("render")
    inverter = network("invert") if "invert" in found.parts else unet
    return Teacher(unet, inverter, network("reenactment"), found.config.prediction)
