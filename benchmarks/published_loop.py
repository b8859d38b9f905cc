"""The published loop with the work that it does, in eager PyTorch: what we measure ourselves against.

A re-implementation from the description of its work: every step embeds its timestep anew and
projects time and code in all 42 blocks, copies whole tables to the device, spreads their entries
over the picture, works out a posterior and draws noise that the deterministic sampler multiplies by
zero; every call builds the schedule anew. Nothing is added: `in_networks` tells how much of the
time is spent inside the U-Net and the encoder, and the tests hold its results to the published ones.

It runs on the networks of training.models, whose own forward pass does less.
Source: DiffAE code and DiffusionAct code, as described; DDIM, Eq. 12.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from diffusionact import schedule
from diffusionact.training.models import ReenactmentEncoder
from diffusionact.training.models.blocks import ResBlock, resample
from diffusionact.training.models.unet import UNet

Float64Array = NDArray[np.float64]
Network = Callable[[Tensor, Tensor, Tensor], Tensor]

ETA = 0.0  # of DDIM: no noise


class PublishedLoop:
    """Encoder and sampler; pictures are float32 [N,3,S,S] in [-1, 1], codes [N,Z].

    autocast: the lower precision that PyTorch's autocast brings to the networks, as published on
    CUDA (float16), or as a reader of PyTorch's manual would add it on a CPU (bfloat16).
    compiled: the U-Net through torch.compile, which takes minutes at the first call.
    """

    def __init__(
        self,
        encoder: ReenactmentEncoder,
        unet: UNet,
        *,
        device: str = "cpu",
        autocast: torch.dtype | None = None,
        channels_last: bool = False,
        compiled: bool = False,
    ) -> None:
        layout = torch.channels_last if channels_last else torch.contiguous_format
        self._encoder = encoder.to(device=device, memory_format=layout)  # type: ignore[call-overload]
        self._unet = unet.to(device=device, memory_format=layout)  # type: ignore[call-overload]
        self._device, self._autocast, self._layout = device, autocast, layout
        self._network: Network = lambda x, t, z: published_eps(self._unet, x, t, z)
        if compiled:
            self._network = torch.compile(self._network)
        self.network_s = 0.0  # spent inside the networks so far
        self.total_s = 0.0  # spent in encode, render and invert so far

    @property
    def in_networks(self) -> float:
        """The share of the time so far that was spent inside the U-Net and the encoder."""
        return self.network_s / self.total_s

    def encode(self, image: Tensor, drawing: Tensor) -> Tensor:
        """z of a picture and a drawing. Source: DiffusionAct, section 3.2."""
        with self._timed(), torch.no_grad(), self._in_network(autocast=False):
            pictures = (x.to(self._device, memory_format=self._layout) for x in (image, drawing))
            return cast(Tensor, self._encoder(*pictures))

    def render(self, x_T: Tensor, z: Tensor, steps: int) -> Tensor:
        """The picture x_0 after a run of `steps` from x_T."""
        with self._timed(), torch.no_grad():
            tables = Tables(steps)
            return self._run(x_T, z, tables, reversed(range(steps)), self._step_down)

    def invert(self, x_0: Tensor, z: Tensor, steps: int) -> Tensor:
        """The stochastic code x_T after a run of `steps` from the picture."""
        with self._timed(), torch.no_grad():
            return self._run(x_0, z, Tables(steps), iter(range(steps)), self._step_up)

    def _run(
        self,
        x: Tensor,
        z: Tensor,
        tables: Tables,
        order: Iterator[int],
        step: Callable[[Tables, Tensor, Tensor, Tensor], Tensor],
    ) -> Tensor:
        x = x.to(self._device, memory_format=self._layout)
        for i in order:
            index = torch.tensor([i] * len(x), device=self._device)
            t = torch.from_numpy(tables.timesteps).to(self._device)[index]
            with self._in_network():
                eps = self._network(x, t, z)
            x = step(tables, x, eps.float(), index)
        return x

    def _step_down(self, tables: Tables, x: Tensor, eps: Tensor, index: Tensor) -> Tensor:
        """x one step nearer to the picture. Source: DDIM, Eq. 12, with eta."""
        x_0 = tables.x0(x, eps, index)
        tables.posterior(x_0, x, index)  # published: computed, and not used
        eps = tables.eps(x, x_0, index)
        level = tables.at("alpha_bar", index, x)
        level_to = tables.at("alpha_bar_to_picture", index, x)
        sigma = ETA * torch.sqrt((1 - level_to) / (1 - level)) * torch.sqrt(1 - level / level_to)
        noise = torch.randn_like(x)
        mean = x_0 * torch.sqrt(level_to) + torch.sqrt(1 - level_to - sigma**2) * eps
        not_last = (index != 0).float().view(-1, 1, 1, 1)
        return mean + not_last * sigma * noise

    def _step_up(self, tables: Tables, x: Tensor, eps: Tensor, index: Tensor) -> Tensor:
        """x one step nearer to pure noise."""
        x_0 = tables.x0(x, eps, index)
        tables.posterior(x_0, x, index)
        eps = tables.eps(x, x_0, index)
        level_to = tables.at("alpha_bar_to_noise", index, x)
        return x_0 * torch.sqrt(level_to) + torch.sqrt(1 - level_to) * eps

    @contextmanager
    def _timed(self) -> Iterator[None]:
        self._wait()
        begun_s = time.perf_counter()
        yield
        self._wait()
        self.total_s += time.perf_counter() - begun_s

    @contextmanager
    def _in_network(self, autocast: bool = True) -> Iterator[None]:
        begun_s = time.perf_counter()
        with self._lower() if autocast else nullcontext():
            yield
        self._wait()
        self.network_s += time.perf_counter() - begun_s

    def _lower(self) -> AbstractContextManager[object]:
        if self._autocast is None:
            return nullcontext()
        return torch.autocast(torch.device(self._device).type, self._autocast)

    def _wait(self) -> None:
        if self._device != "cpu":
            torch.cuda.synchronize()


class Tables:
    """The float64 tables of a run on the CPU, made anew for every call."""

    def __init__(self, steps: int) -> None:
        self.timesteps = schedule.timesteps(steps)
        # Source: DiffAE code: the kept levels give new betas, from which all else is made again.
        kept = schedule.alpha_bars()[self.timesteps]
        betas = 1.0 - kept / np.append(1.0, kept[:-1])
        level = np.cumprod(1.0 - betas)
        before = np.append(1.0, level[:-1])
        self._tables: dict[str, Float64Array] = {
            "alpha_bar": level,
            "alpha_bar_to_picture": before,
            "alpha_bar_to_noise": np.append(level[1:], 0.0),
            "sqrt_recip": np.sqrt(1.0 / level),
            "sqrt_recip_minus_one": np.sqrt(1.0 / level - 1.0),
            "variance": betas,
            "log_variance": np.log(np.append(betas[1:2], betas[1:])),
            "posterior_on_x0": betas * np.sqrt(before) / (1.0 - level),
            "posterior_on_x": (1.0 - before) * np.sqrt(1.0 - betas) / (1.0 - level),
        }

    def at(self, name: str, index: Tensor, like: Tensor) -> Tensor:
        """A table's entries as a picture: the whole table is copied, one value is spread."""
        table = torch.from_numpy(self._tables[name]).to(like.device)
        return table[index].float().view(-1, 1, 1, 1).expand(like.shape)

    def x0(self, x: Tensor, eps: Tensor, index: Tensor) -> Tensor:
        """The estimate of the picture, clipped. Source: DDIM, Eq. 9."""
        on_x, on_eps = (self.at(n, index, x) for n in ("sqrt_recip", "sqrt_recip_minus_one"))
        return (on_x * x - on_eps * eps).clamp(-1, 1)

    def eps(self, x: Tensor, x_0: Tensor, index: Tensor) -> Tensor:
        """The noise derived anew from the clipped estimate."""
        on_x, on_eps = (self.at(n, index, x) for n in ("sqrt_recip", "sqrt_recip_minus_one"))
        return (on_x * x - x_0) / on_eps

    def posterior(self, x_0: Tensor, x: Tensor, index: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Mean and variances of a sampler that is not the deterministic one. Source: DDPM, Eq. 7."""
        on_x0, on_x = (self.at(n, index, x) for n in ("posterior_on_x0", "posterior_on_x"))
        variances = (self.at(n, index, x) for n in ("variance", "log_variance"))
        variance, log_variance = variances
        return on_x0 * x_0 + on_x * x, variance, log_variance


def published_eps(unet: UNet, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
    """The prediction, with all that the published forward pass computes.

    x: [N,3,S,S]; t: int64 [N]; z: [N,Z]
    Source: DiffAE, Figure 2 and Eq. 6, and its code.
    """
    e = unet.time_embed(t)
    laterals = []
    h = x
    for stage in unet.input_blocks:
        h = _through(stage, h, e, z)
        laterals.append(h)
    h = _through(unet.middle_block, h, e, z)
    for stage in unet.output_blocks:
        h = _through(stage, torch.cat([h, laterals.pop()], dim=1), e, z)
    return cast(Tensor, unet.out(h))


def _through(stage: nn.Module, h: Tensor, e: Tensor, z: Tensor) -> Tensor:
    for layer in cast(Any, stage):
        h = published_block(layer, h, e, z) if isinstance(layer, ResBlock) else layer(h)
    return h


def published_block(block: ResBlock, x: Tensor, e: Tensor, z: Tensor) -> Tensor:
    """A residual block: time scales and shifts the norm's output, then the code scales it."""
    norm, act, conv = block.in_layers
    h = conv(resample(act(norm(x)), block.kind))
    scale, shift = block.emb_layers(e)[:, :, None, None].chunk(2, dim=1)
    code = block.cond_emb_layers(z)[:, :, None, None]
    norm, act, dropout, conv = block.out_layers
    h = (norm(h) * (1 + scale) + shift) * (1 + code)
    h = conv(dropout(act(h)))
    return block.skip(x) + cast(Tensor, h)
