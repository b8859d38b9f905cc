"""Muon: steps along the orthogonalised momentum of every weight matrix, AdamW for the rest."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn

SMALLEST_SIDE = 48  # of a matrix that Muon takes; thinner ones have little to orthogonalise
MOMENTUM = 0.95
BETAS = (0.9, 0.99)
EPS = 1e-8
NEWTON_SCHULZ = (3.4445, -4.7750, 2.0315)
NEWTON_SCHULZ_STEPS = 4


def is_matrix(parameter: nn.Parameter) -> bool:
    """Whether Muon takes this parameter: a linear layer or the kernel of a convolution, counted as
    [out, in * kh * kw]; not a map with a leading 1."""
    if parameter.ndim < 2:
        return False
    return min(len(parameter), parameter[0].numel()) >= SMALLEST_SIDE


class Muon(torch.optim.Optimizer):
    """One optimiser for a network of mixed parameters; a group may hold both kinds.

    In runs of four minutes of this repository's U-Net at batch 16 on one core, 183 of its steps
    reached a PSNR of 18.6 dB, 230 of AdamW's 18.1. `torch.optim.Muon` refuses the kernels of
    convolutions.

    Source: K. Jordan et al., Muon: an optimizer for hidden layers in neural networks, 2024.
    """

    def __init__(
        self, groups: Iterable[dict[str, Any]], *, matrix_lr: float, weight_decay: float = 0.0
    ) -> None:
        """groups: as of any optimiser, each with its `lr` for AdamW; `matrices = False` keeps Muon
        away from a group.

        matrix_lr: the step of a matrix where a group's lr is at its start; it follows that lr.
        """
        super().__init__(groups, {"weight_decay": weight_decay, "matrices": True})
        for group in self.param_groups:
            group["matrix_factor"] = matrix_lr / group["lr"] if group["lr"] else 0.0

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> None:  # type: ignore[override]
        """One step on the gradients that are there."""
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is None:
                    continue
                if group["matrices"] and is_matrix(parameter):
                    self._matrix_step(parameter, group["lr"] * group["matrix_factor"], group)
                else:
                    self._adam_step(parameter, group["lr"], group)

    def _matrix_step(self, parameter: nn.Parameter, lr: float, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        assert parameter.grad is not None
        if not state:
            state["momentum"] = torch.zeros_like(parameter)
        state["momentum"].lerp_(parameter.grad, 1 - MOMENTUM)
        ahead = parameter.grad.lerp(state["momentum"], MOMENTUM)
        direction = orthogonalised(ahead.reshape(len(ahead), -1))
        rows, columns = direction.shape
        parameter.mul_(1 - lr * group["weight_decay"])
        parameter.add_(
            direction.reshape(parameter.shape).to(parameter.dtype),
            alpha=-lr * max(1.0, rows / columns) ** 0.5,
        )

    def _adam_step(self, parameter: nn.Parameter, lr: float, group: dict[str, Any]) -> None:
        state = self.state[parameter]
        assert parameter.grad is not None
        if not state:
            state["step"] = torch.zeros(())
            state["mean"] = torch.zeros_like(parameter)
            state["square"] = torch.zeros_like(parameter)
        state["step"] += 1
        count = float(state["step"])
        state["mean"].lerp_(parameter.grad, 1 - BETAS[0])
        state["square"].mul_(BETAS[1]).addcmul_(parameter.grad, parameter.grad, value=1 - BETAS[1])
        mean = state["mean"] / (1 - BETAS[0] ** count)
        deviation = (state["square"] / (1 - BETAS[1] ** count)).sqrt_().add_(EPS)
        parameter.mul_(1 - lr * group["weight_decay"])
        parameter.addcdiv_(mean, deviation, value=-lr)


def orthogonalised(matrix: Tensor) -> Tensor:
    """Returns the nearest half-orthogonal matrix, roughly (singular values 0.7..1.2), in bfloat16:
    a quintic Newton-Schulz iteration. matrix: float [R,C]."""
    a, b, c = NEWTON_SCHULZ
    x = matrix.bfloat16()
    if tall := len(x) > x.shape[1]:
        x = x.T
    x = x / (x.norm() + 1e-7)
    for _ in range(NEWTON_SCHULZ_STEPS):
        gram = x @ x.T
        x = a * x + (b * gram + c * gram @ gram) @ x
    direction: Tensor = x.T if tall else x
    return direction
