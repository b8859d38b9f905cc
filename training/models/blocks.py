"""The building blocks of the U-Net and the encoders, with the published parameter names."""

from __future__ import annotations

import math
from typing import Any, Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from diffusionact.training.models import fused_norm

Resample = Literal["none", "up", "down"]

GROUPS = 32
MIN_GROUP_CHANNELS = 4
NORM_EPS = 1e-5
KEYPOINT_SIGMA_CELLS = 0.75  # of a dot: narrow enough to tell a lid from an iris
POSITION_GAIN = 0.3  # of a position map at the start, where features are about 1


def group_count(channels: int) -> int:
    """The number of groups that group norm uses for `channels`: min(32, channels) if it divides.

    Otherwise the largest divisor up to 32 that leaves four channels to a group, or any divisor
    where no such one exists.
    """
    if channels % min(GROUPS, channels) == 0:
        return min(GROUPS, channels)
    divisors = [d for d in range(1, GROUPS + 1) if channels % d == 0]
    return max((d for d in divisors if channels // d >= MIN_GROUP_CHANNELS), default=divisors[-1])


class GroupNorm(nn.GroupNorm):
    """Group norm over NCHW or NCL: sums in float32, output in the dtype of x."""

    def __init__(self, channels: int) -> None:
        super().__init__(group_count(channels), channels, eps=NORM_EPS)

    def forward(self, x: Tensor) -> Tensor:
        y = F.group_norm(x.float(), self.num_groups, self.weight, self.bias, self.eps)
        return y.to(x.dtype)

    def silu(self, x: Tensor) -> Tensor:
        """SiLU(GN(x)) for x [N,C,H,W]."""
        if fused_norm.usable(x):
            rows = (self.weight.expand(len(x), -1), self.bias.expand(len(x), -1))
            return fused_norm.norm_silu(x, *rows, self.num_groups, self.eps)
        return F.silu(self(x))

    def modulated_silu(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """SiLU(n * scale + shift) for n, x [N,C,H,W] normalised, and scale, shift [N,C]."""
        if fused_norm.usable(x):
            return fused_norm.norm_silu(x, scale, shift, self.num_groups, self.eps)
        if len(x) == 1:  # then the rows are an affine part, and one operator where exported
            y = F.group_norm(x.float(), self.num_groups, scale[0], shift[0], self.eps)
            return F.silu(y.to(x.dtype))
        n = F.group_norm(x.float(), self.num_groups, eps=self.eps)
        return F.silu((n * scale[:, :, None, None] + shift[:, :, None, None]).to(x.dtype))


def _doubled(x: Tensor) -> Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class _Up(torch.autograd.Function):
    """Nearest upsampling; PyTorch's own gradient of it takes twenty times as long on a CPU."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        return _doubled(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return 4 * F.avg_pool2d(grad, 2)


def resample(x: Tensor, kind: Resample) -> Tensor:
    """x [N,C,H,W] at twice the side (nearest), half the side (2x2 mean), or as it is."""
    if kind == "up":
        if torch.is_grad_enabled():
            return cast(Tensor, _Up.apply(x))  # type: ignore[no-untyped-call]
        return _doubled(x)
    if kind == "down":
        return F.avg_pool2d(x, 2)
    return x


def conv3x3(cin: int, cout: int) -> nn.Conv2d:
    """A 3x3 convolution that keeps the side."""
    return nn.Conv2d(cin, cout, 3, padding=1)


def zeroed(layer: nn.Module) -> nn.Module:
    """The layer with all its parameters set to zero, so that its branch starts as the identity."""
    for parameter in layer.parameters():
        nn.init.zeros_(parameter)
    return layer


def position_map(channels: int, side: int) -> nn.Parameter:
    """A learned map [1,C,side,side] to add to a feature, begun as the cosine basis of the plane,
    low frequencies first: whatever is scaled per channel can then tell places apart."""
    orders = sorted(
        ((i, j) for i in range(side) for j in range(side) if i + j), key=lambda o: (sum(o), o)
    )
    place = (torch.arange(side) + 0.5) * math.pi / side
    rows = [
        torch.outer(torch.cos(j * place), torch.cos(i * place))
        for i, j in (orders[c % len(orders)] for c in range(channels))
    ]
    return nn.Parameter(POSITION_GAIN * torch.stack(rows)[None])


class HalfBlock(nn.Module):
    """What both residual blocks share: norm, SiLU, resampling and convolution, and a short path."""

    def __init__(self, cin: int, cout: int, kind: Resample) -> None:
        super().__init__()
        self.kind: Resample = kind
        self.in_layers = nn.Sequential(GroupNorm(cin), nn.SiLU(), conv3x3(cin, cout))
        self.skip_connection = nn.Identity() if cin == cout else nn.Conv2d(cin, cout, 1)

    def first_half(self, x: Tensor) -> Tensor:
        """conv(resample(SiLU(GN(x)))) [N,Cout,H',W']."""
        norm, _, conv = self.in_layers
        return cast(Tensor, conv(resample(cast(GroupNorm, norm).silu(x), self.kind)))

    def skip(self, x: Tensor) -> Tensor:
        """The short path [N,Cout,H',W'] of x [N,Cin,H,W]."""
        return cast(Tensor, self.skip_connection(resample(x, self.kind)))


class EncoderBlock(HalfBlock):
    """One-convolution residual block of the encoders.

    Source: DiffAE code, the encoder's blocks, which have no second half.
    """

    def __init__(self, cin: int, cout: int, kind: Resample = "none") -> None:
        super().__init__(cin, cout, kind)

    def forward(self, x: Tensor) -> Tensor:
        """The block's output [N,Cout,H',W'] for x [N,Cin,H,W]."""
        return self.skip(x) + self.first_half(x)


class ResBlock(HalfBlock):
    """Residual block of the U-Net, modulated per channel by the time and by z.

    Source: DiffAE, Eq. 6 (time scales and shifts the normalised feature, then z scales it); its
    code adds 1 to both scales.
    """

    def __init__(
        self, cin: int, cout: int, embed: int, dropout: float, kind: Resample = "none"
    ) -> None:
        super().__init__(cin, cout, kind)
        self.width = cout
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embed, 2 * cout))
        self.cond_emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embed, cout))
        self.out_layers = nn.Sequential(
            GroupNorm(cout), nn.SiLU(), nn.Dropout(dropout), zeroed(conv3x3(cout, cout))
        )

    def time_row(self, e: Tensor) -> tuple[Tensor, Tensor]:
        """Scale and shift [N,Cout] of the time vector e [N,E], norm's affine part folded in."""
        norm = cast(GroupNorm, self.out_layers[0])
        scale, shift = self.emb_layers(e).float().chunk(2, dim=1)
        return norm.weight * (1 + scale), norm.bias * (1 + scale) + shift

    def code_row(self, z: Tensor) -> Tensor:
        """Factor [N,Cout], 1 + linear(SiLU(z)), that z [N,E] puts on both rows of the time."""
        return cast(Tensor, 1 + self.cond_emb_layers(z).float())

    def forward(self, x: Tensor, scale: Tensor, shift: Tensor) -> Tensor:
        """The block's output [N,Cout,H',W'] for x [N,Cin,H,W] and rows scale, shift [N,Cout]."""
        norm, _, dropout, conv = self.out_layers
        h = cast(GroupNorm, norm).modulated_silu(self.first_half(x), scale, shift)
        return self.skip(x) + cast(Tensor, conv(dropout(h)))


def _timeless_row(e: Tensor, width: int) -> tuple[Tensor, Tensor]:
    """Scale 1 and shift 0 [N,width] for every time vector e [N,E]."""
    zero = (e[:, :1] * 0).float() + torch.zeros(width, device=e.device)
    return zero + 1, zero


class CodeMap(nn.Module):
    """A map of z itself, added at the bottom of the U-Net: modulation scales channels and has no
    places, so that a small network is slow to learn where z wants things.

    Its values travel in the modulation rows behind those of the ResBlocks, as scales.
    """

    def __init__(self, code_channels: int, channels: int, side: int, embed: int) -> None:
        super().__init__()
        self.shape = (code_channels, side, side)
        self.width = code_channels * side * side
        self.cond_emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embed, self.width))
        self.project = nn.Conv2d(code_channels, channels, 1)

    def time_row(self, e: Tensor) -> tuple[Tensor, Tensor]:
        """Scale 1 and shift 0 [N,width]: the map is the same at all times."""
        return _timeless_row(e, self.width)

    def code_row(self, z: Tensor) -> Tensor:
        """The map's values [N,width] for z [N,E]."""
        return cast(Tensor, 1 + self.cond_emb_layers(z).float())

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        """x [N,C,H,W] with the map of a row [N,width] added."""
        return x + cast(Tensor, self.project(scale.reshape(-1, *self.shape).to(x.dtype)))


class KeypointMap(nn.Module):
    """Points that z places on the first grid of the U-Net, each a soft dot in a channel of its own.

    Where eyes, irises and lips are is then a linear function of z, which a few thousand pictures
    teach; from modulation alone the network has to find it out by painting. The coordinates travel
    in the modulation rows behind the other maps, as scales: 1 is the middle of the picture, 0 and 2
    its edges.
    """

    def __init__(self, points: int, channels: int, side: int, embed: int) -> None:
        super().__init__()
        self.points, self.side = points, side
        self.width = 2 * points
        self.cond_emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(embed, self.width))
        self.project = nn.Conv2d(points, channels, 1)

    def time_row(self, e: Tensor) -> tuple[Tensor, Tensor]:
        """Scale 1 and shift 0 [N,width]: the points are the same at all times."""
        return _timeless_row(e, self.width)

    def code_row(self, z: Tensor) -> Tensor:
        """The coordinates [N,width], x and y of each point in turn, for z [N,E]."""
        with torch.autocast(z.device.type, enabled=False):  # bfloat16 would round to 0.3 px
            return cast(Tensor, 1 + self.cond_emb_layers(z.float()))

    def forward(self, x: Tensor, scale: Tensor) -> Tensor:
        """x [N,C,H,W] with the dots of a row [N,width] added."""
        at = scale.float().reshape(-1, self.points, 2, 1) * (self.side / 2)
        cells = torch.arange(self.side, dtype=at.dtype, device=at.device) + 0.5
        bump = torch.exp(-0.5 * ((cells - at) / KEYPOINT_SIGMA_CELLS) ** 2)
        dots = bump[:, :, 1, :, None] * bump[:, :, 0, None, :]
        return x + cast(Tensor, self.project(dots.to(x.dtype)))


class Attention(nn.Module):
    """Self-attention over all cells with one head, added to its input."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.norm = GroupNorm(channels)
        self.qkv = nn.Conv1d(channels, 3 * channels, 1)
        self.proj_out = zeroed(nn.Conv1d(channels, channels, 1))

    def forward(self, x: Tensor) -> Tensor:
        """x + attention(GN(x)) [N,C,H,W]."""
        n, c, height, width = x.shape
        flat = x.reshape(n, c, height * width)
        q, k, v = self.qkv(self.norm(flat)).chunk(3, dim=1)
        half_scale = c**-0.25  # on both factors: their product stays in range in half precision
        logits = torch.matmul((q * half_scale).transpose(1, 2), k * half_scale)
        weights = logits.float().softmax(dim=-1).to(v.dtype)
        out = self.proj_out(torch.matmul(v, weights.transpose(1, 2)))
        return x + cast(Tensor, out.reshape(n, c, height, width))


class TimeEmbed(nn.Module):
    """Sinusoidal embedding of the timestep and the two-layer network behind it."""

    def __init__(self, channels: int, embed: int) -> None:
        super().__init__()
        self.frequencies = channels // 2
        self.time_embed = nn.Sequential(
            nn.Linear(channels, embed), nn.SiLU(), nn.Linear(embed, embed)
        )

    def sinusoids(self, t: Tensor) -> Tensor:
        """[cos(t f), sin(t f)] float32 [N,channels] for timesteps t [N] counted in 0..999."""
        index = torch.arange(self.frequencies, dtype=torch.float32, device=t.device)
        angles = t.float()[:, None] * torch.exp(-math.log(10000.0) * index / self.frequencies)
        return torch.cat([angles.cos(), angles.sin()], dim=1)

    def forward(self, t: Tensor) -> Tensor:
        """The time vector [N,E] of timesteps t [N]."""
        return cast(Tensor, self.time_embed(self.sinusoids(t)))
