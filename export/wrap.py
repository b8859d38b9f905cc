"""The four components of a bundle as modules with flat tensor arguments."""

from __future__ import annotations

from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusionact.training.models import ReenactmentEncoder, UNet


class Encoder(nn.Module):
    """image, condition [1,3,S,S] -> z [1,Z]."""

    def __init__(self, network: ReenactmentEncoder) -> None:
        super().__init__()
        self.network = network

    def forward(self, image: Tensor, condition: Tensor) -> Tensor:
        return cast(Tensor, self.network(image, condition))


class Time(nn.Module):
    """t float32 [N] -> time_rows [N,2K]: once per run."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, t: Tensor) -> Tensor:
        return self.unet.time_rows(t)


class Modulation(nn.Module):
    """z [1,Z], time_rows [N,2K] -> scale, shift [N,K]: once per frame.

    The linear layers of all blocks are one matrix here.
    """

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        layers = [cast(nn.Linear, block.cond_emb_layers[1]) for block in unet.modulated]
        self.weight = nn.Parameter(torch.cat([layer.weight for layer in layers]))
        self.bias = nn.Parameter(torch.cat([layer.bias for layer in layers]))

    def forward(self, z: Tensor, time_rows: Tensor) -> tuple[Tensor, Tensor]:
        factor = 1 + F.linear(F.silu(z), self.weight, self.bias)
        scale, shift = time_rows.chunk(2, dim=1)
        return scale * factor, shift * factor


class Step(nn.Module):
    """x_t [1,3,S,S], scale, shift [1,K] -> prediction [1,3,S,S]: once per frame and timestep."""

    def __init__(self, unet: UNet) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, x_t: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        return self.unet.step(x_t, scale, shift)


def components(
    encoder: ReenactmentEncoder, render: UNet, invert: UNet | None
) -> dict[str, nn.Module]:
    """Component name -> module, in evaluation mode; `invert` if inversion has its own weights."""
    modules: dict[str, nn.Module] = {"encoder": Encoder(encoder)}
    for suffix, unet in (("", render), ("_invert", invert)):
        if unet is not None:
            modules["time" + suffix] = Time(unet)
            modules["modulation" + suffix] = Modulation(unet)
            modules["unet_step" + suffix] = Step(unet)
    return {name: module.eval().requires_grad_(False) for name, module in modules.items()}
