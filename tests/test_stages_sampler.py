"""Training through the sampler: its pictures are the runtime's, its gradient the true one."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt
import pytest
import torch
from torch import Tensor, nn

from diffusionact import schedule
from diffusionact.manifest import TensorSpec
from diffusionact.runtime.component import check_bound
from diffusionact.runtime.loop import Loop, Pass
from diffusionact.schedule import Prediction
from diffusionact.training.diffusion import TABLE, render
from diffusionact.training.models import FACE128, FFHQ64, UNet
from diffusionact.training.models.config import NetworkConfig

pytestmark = pytest.mark.torch

F32 = npt.NDArray[np.float32]
SIDE = 16
# The published kind of network, and ours, both small.
EPS = replace(FFHQ64, image_size=SIDE, channels=32, channel_mult=(1, 2), encoder_mult=(1, 2),
              attention_at=(8,), res_blocks=1, embed=32)  # fmt: skip
X0 = replace(FACE128, image_size=SIDE, channels=32, channel_mult=(1, 2), encoder_mult=(1, 2),
             attention_at=(4,), embed=32)  # fmt: skip
# The same float32 operations in torch and in NumPy, eight times; with eps the first step multiplies
# a rounding by 19.
RUNTIME_TOLERANCE = 1e-4


def unet(config: NetworkConfig, seed: int = 0) -> UNet:
    """A network whose zeroed layers are not zero, so that every weight counts."""
    torch.manual_seed(seed)
    network = UNet(config)
    for parameter in network.parameters():
        if not parameter.any():
            nn.init.normal_(parameter, std=0.05)
    return network.eval()


def normal(*shape: int, seed: int, dtype: torch.dtype = torch.float32) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype)


# The runtime


class Network:
    """A component of the runtime that calls PyTorch."""

    def __init__(
        self,
        inputs: Mapping[str, tuple[int, ...]],
        outputs: Mapping[str, tuple[int, ...]],
        call: Callable[..., tuple[Tensor, ...]],
    ) -> None:
        self.inputs = {name: TensorSpec(name, "float32", s) for name, s in inputs.items()}
        self.outputs = {name: TensorSpec(name, "float32", s) for name, s in outputs.items()}
        self._call = call
        self._bound: dict[str, Any] = {}

    def bind(self, **arrays: Any) -> None:
        check_bound({**self.inputs, **self.outputs}, arrays)
        self._bound = arrays

    @torch.no_grad()
    def run(self) -> None:
        made = self._call(*(torch.from_numpy(self._bound[name].copy()) for name in self.inputs))
        for name, value in zip(self.outputs, made, strict=True):
            self._bound[name][...] = value.numpy()


def runtime_loop(network: UNet, steps: int) -> Loop:
    config, k = network.config, network.modulation_size
    picture, rows = (1, 3, config.image_size, config.image_size), (1, k)
    run = schedule.render_run(config.prediction, schedule.timesteps(steps), TABLE)
    with torch.no_grad():
        time_rows = network.time_rows(torch.from_numpy(run.timesteps)).numpy()
    code = (1, config.embed)
    encoder = Network({"image": picture, "condition": picture}, {"z": code}, lambda i, c: (i,))
    step = Network({"x_t": picture, "scale": rows, "shift": rows}, {"prediction": picture},
                   lambda *inputs: (network.step(*inputs),))  # fmt: skip

    def direction() -> Pass:
        modulation = Network({"z": code, "time_rows": (steps, 2 * k)},
                             {"scale": (steps, k), "shift": (steps, k)},
                             network.modulation)  # fmt: skip
        return Pass(run, time_rows, modulation, step)

    return Loop(encoder, direction(), direction())


@pytest.mark.parametrize("config", [EPS, X0], ids=["eps", "x0"])
@pytest.mark.parametrize("recompute", [False, True])
def test_training_renders_what_the_runtime_renders(config: NetworkConfig, recompute: bool) -> None:
    network = unet(config)
    x_T, z = normal(2, 3, SIDE, SIDE, seed=1), normal(2, config.embed, seed=2).requires_grad_()
    rendered = render(network, config.prediction, x_T, z, 8, recompute=recompute)
    loop = runtime_loop(network, 8)
    for i in range(2):
        codes = z.detach().numpy()[i : i + 1]
        wanted = loop.render(x_T.numpy()[i : i + 1], codes)
        np.testing.assert_allclose(
            rendered.detach().numpy()[i : i + 1], wanted, atol=RUNTIME_TOLERANCE
        )
    spread = float(rendered.detach().std())
    assert spread > 100 * RUNTIME_TOLERANCE, "a picture without contrast compares to anything"


# The gradient


class Small(nn.Module):
    """A network of float64 for finite differences: time and z reach every pixel, not linearly."""

    def __init__(self, kind: Prediction) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.first, self.last = nn.Conv2d(3, 2, 3, padding=1), nn.Conv2d(2, 3, 3, padding=1)
        self.code = nn.Linear(3, 2)
        self.gain = 1.0 if kind == "eps" else 0.7
        self.double()

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        time = torch.sin(t.double() / 1000 * math.pi)[:, None]
        h = torch.tanh(self.first(x) * (1 + self.code(z) + time)[:, :, None, None])
        made: Tensor = self.gain * x + self.last(h)
        return made


@pytest.mark.parametrize("kind", ["eps", "v", "x0"])
def test_the_gradient_through_all_steps_is_that_of_finite_differences(kind: Prediction) -> None:
    network = Small(kind)
    x_T = 0.3 * normal(1, 3, 4, 4, seed=1, dtype=torch.float64)
    z = normal(1, 3, seed=2, dtype=torch.float64).requires_grad_()
    names, weights = zip(*network.named_parameters(), strict=True)

    def rendered(z: Tensor, *weights: Tensor) -> Tensor:
        values = dict(zip(names, weights, strict=True))

        def call(x: Tensor, t: Tensor, z: Tensor) -> Tensor:
            made: Tensor = torch.func.functional_call(network, values, (x, t, z))
            return made

        return render(call, kind, x_T, z, 4)  # type: ignore[arg-type]

    clipped = float((rendered(z, *weights).abs() == 1).double().mean())
    assert clipped < 0.9, "what is clipped has no gradient to check"
    assert torch.autograd.gradcheck(rendered, (z, *weights), eps=1e-6, atol=1e-6, rtol=1e-4)


@pytest.mark.parametrize("config", [EPS, X0], ids=["eps", "x0"])
def test_steps_that_are_run_again_give_the_same_gradients(config: NetworkConfig) -> None:
    x_T, wanted = normal(2, 3, SIDE, SIDE, seed=1), normal(2, 3, SIDE, SIDE, seed=3)
    found = []
    for recompute in (False, True):
        network = unet(config)
        z = normal(2, config.embed, seed=2).requires_grad_()
        picture = render(network, config.prediction, x_T, z, 8, recompute=recompute)
        ((picture - wanted) ** 2).mean().backward()  # type: ignore[no-untyped-call]
        found.append([picture, z.grad, *(p.grad for p in network.parameters())])
    for first, second in zip(*found, strict=True):
        assert first is not None and second is not None and bool(first.any())
        torch.testing.assert_close(second, first, atol=0, rtol=0)


def test_steps_that_are_run_again_hold_the_activations_of_one() -> None:
    held = {}
    for recompute in (False, True):
        sizes = list[int]()

        def keep(tensor: Tensor, sizes: list[int] = sizes) -> Tensor:
            sizes.append(tensor.nbytes)
            return tensor

        z = normal(1, EPS.embed, seed=2).requires_grad_()
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            render(unet(EPS), "eps", normal(1, 3, SIDE, SIDE, seed=1), z, 8, recompute=recompute)
        held[recompute] = sum(sizes)
    assert held[True] < held[False] / 50, held
