"""Small critics with weights by rule: the published networks cut down, and a guide of a few maps."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from types import SimpleNamespace
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from diffusionact.morphable import Flame, flame_from
from diffusionact.training.critics import Critics, FaceModel
from diffusionact.training.models.frozen import VGG19, ArcFace, BiSeNet, FaRL, FrozenNetwork, flame
from tests.test_flame import synthetic

SIDE = 32  # px, of the small guide's pictures
NetworkT = TypeVar("NetworkT", bound=nn.Module)

SMALL: dict[str, Callable[[], FrozenNetwork]] = {
    "vgg19": lambda: VGG19((3, 4, 4, 5, 5)),
    "arcface": lambda: ArcFace((16, 16, 32, 32), (1, 2, 1, 1), side=32, embedding=6),
    "farl": lambda: FaRL(width=12, layers=2, heads=3, side=16, patch=8, embedding=5),
    "bisenet": lambda: BiSeNet(width=4, classes=5),
}


def by_rule(network: NetworkT, seed: int = 0) -> NetworkT:
    """The network in float64, frozen, every number of it set: none is 0 or 1, so all count."""
    generator = torch.Generator().manual_seed(seed)
    network.double().eval().requires_grad_(False)
    for name, tensor in network.state_dict().items():
        if name.startswith("flame_"):
            continue
        noise = torch.randn(tensor.shape, generator=generator, dtype=torch.float64)
        if name.endswith("running_var"):
            tensor.copy_(0.5 + noise.abs())
        elif tensor.ndim > 1:
            tensor.copy_(noise * (1.5 / tensor[0].numel()) ** 0.5)
        else:
            tensor.copy_(0.3 * noise + (0.8 if name.endswith("weight") else 0.1))
    return network


@dataclass(frozen=True)
class Sizes:
    """What `Critics` asks of a guide's config."""

    image_size: int = SIDE


class SmallGuide(nn.Module):
    """A guide of one smooth map: gradients of it can be held against finite differences."""

    def __init__(self) -> None:
        super().__init__()
        self.config = Sizes()
        self.first = nn.Conv2d(3, 4, 3, stride=2, padding=1)
        self.second = nn.Conv2d(4, 6, 3, stride=2, padding=1)
        cells = 6 * (SIDE // 4) ** 2
        self.person = nn.Linear(cells, 7)
        self.points = nn.Linear(cells, 136)
        self.angles = nn.Linear(cells, 5)

    def forward(self, x: Tensor) -> Any:
        first = self.first(x).tanh()
        second = self.second(first).tanh()
        rows = second.flatten(1)
        angles = self.angles(rows)
        return SimpleNamespace(
            maps=(first, second), person=self.person(rows),
            points=16 + 10 * self.points(rows).view(-1, 68, 2),
            gaze=0.3 * angles[:, :2], pose=20 * angles[:, 2:],
        )  # fmt: skip

    def scaled(self, maps: tuple[Tensor, ...]) -> list[Tensor]:
        return [2 * m for m in maps]

    def style_of(self, maps: tuple[Tensor, ...]) -> Tensor:
        return torch.cat([m.square().mean((2, 3)) for m in maps], dim=1)


class SmallCodes(nn.Module):
    """Codes of a face from the means of a picture's quarters, in the place of EMOCA's encoders."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(48, 100 + 50 + 6 + 3)

    def forward(self, image: Tensor) -> tuple[Tensor, ...]:
        rows = nn.functional.adaptive_avg_pool2d(image, 4).flatten(1)
        shape, expression, pose, camera = self.layer(rows).split([100, 50, 6, 3], dim=1)
        return shape, expression, 0.2 * pose, camera + torch.tensor([5.0, 0, 0]).to(camera)


def face_model() -> Flame:
    """A small FLAME of random numbers."""
    return flame_from(flame.reduced(synthetic()))


def published_critics() -> Critics:
    """All the published networks, small; no guide."""
    networks: dict[str, nn.Module] = {name: by_rule(make()) for name, make in SMALL.items()}
    networks["emoca"] = by_rule(FaceModel(SmallCodes(), face_model()))
    networks["xgaze"] = by_rule(SmallGaze())
    return Critics(networks)


class SmallGaze(nn.Module):
    """Two angles from the means of a picture's quarters, in the place of ETH-XGaze's ResNet."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(48, 2)

    def forward(self, image: Tensor) -> Tensor:
        angles: Tensor = self.layer(nn.functional.adaptive_avg_pool2d(image, 4).flatten(1))
        return angles


def guide_critics() -> Critics:
    """The small guide alone."""
    return Critics({"guide": by_rule(SmallGuide())})


def pictures(count: int, seed: int, side: int = SIDE) -> Tensor:
    """Smooth pictures: float64 [count,3,side,side], within -1..1."""
    generator = torch.Generator().manual_seed(seed)
    coarse = torch.randn((count, 3, 5, 5), generator=generator, dtype=torch.float64)
    return torch.tanh(nn.functional.interpolate(coarse, (side, side), mode="bicubic"))


def slope(function: Callable[[Tensor], Tensor], x: Tensor, seed: int = 5) -> tuple[float, float]:
    """The derivative of a scalar function along one direction, by autograd and by difference.

    The step is small, for kinks (ReLU, largest of four) lie close; float64 leaves 1e-8 of it.
    """
    generator = torch.Generator().manual_seed(seed)
    direction = torch.randn(x.shape, generator=generator, dtype=x.dtype)
    at = x.detach().clone().requires_grad_(True)
    (gradient,) = torch.autograd.grad(function(at), at)
    step = 1e-7
    with torch.no_grad():
        ahead, behind = function(x + step * direction), function(x - step * direction)
    return float((gradient * direction).sum()), float((ahead - behind) / (2 * step))
