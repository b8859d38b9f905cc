"""The processes that train together, through Lightning Fabric: one for each GPU, or one for each
core of a small machine.

Two processes of one thread each train a network of this size 1.5 times as fast as one process of
two threads: they wait for each other once a step and not after every operation.
"""

from __future__ import annotations

import contextlib
import math
import os
from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager
from typing import Any

import torch
from lightning_fabric import Fabric
from lightning_fabric.plugins import MixedPrecision, Precision
from lightning_fabric.plugins.environments.torchelastic import TorchElasticEnvironment
from lightning_fabric.strategies.ddp import DDPStrategy
from lightning_fabric.wrappers import _FabricModule, _FabricOptimizer
from torch import Tensor, distributed, nn

from diffusionact.training.share import Share

BUCKET_MB = 25  # of gradients that travel together while the rest is still computed


class Bfloat16(MixedPrecision):
    """Autocast to bfloat16 that leaves the inputs of the objective as they are: Fabric's own rounds
    them too, and a picture or its noise in bfloat16 is not what is to be learnt."""

    def convert_input(self, data: Any) -> Any:
        """Returns the data itself."""
        return data


class World:
    """This process among `size`, counted by `rank`; without torchrun, the only one."""

    def __init__(self, fabric: Fabric) -> None:
        self.fabric = fabric
        self.device, self.rank, self.size = fabric.device, fabric.global_rank, fabric.world_size

    @property
    def first(self) -> bool:
        """Whether this process writes the files of the run."""
        return self.rank == 0

    @property
    def share(self) -> Share:
        """This process's part of every batch."""
        return Share(self.rank, self.size)

    def wrap(
        self, objective: nn.Module, optimizer: torch.optim.Optimizer
    ) -> tuple[_FabricModule, _FabricOptimizer]:
        """Returns both as Fabric drives them: the gradients of a backward pass are their mean over
        the processes. A parameter that has none in any process keeps none."""
        module = self.fabric.setup_module(objective, move_to_device=False)
        wrapped = self.fabric.setup_optimizers(optimizer)
        assert not isinstance(wrapped, tuple)
        return module, wrapped

    def apart(self, module: _FabricModule, apart: bool) -> AbstractContextManager[None]:
        """Within it, where `apart`, gradients add up in each process and are not yet exchanged."""
        return self.fabric.no_backward_sync(module, enabled=apart and self.size > 1)

    def clip(self, module: _FabricModule, optimizer: _FabricOptimizer, norm: float) -> Tensor:
        """Returns the norm of all gradients, after scaling them down to `norm` where above; 0 lets
        them be."""
        before = self.fabric.clip_gradients(
            module, optimizer, max_norm=norm or math.inf, error_if_nonfinite=False
        )
        assert before is not None
        return before

    def mean(self, values: Mapping[str, Tensor | float]) -> dict[str, float]:
        """Returns the mean of each value over the processes, the same in all of them."""
        numbers = [float(value) for value in values.values()]
        if self.size > 1:
            said = torch.tensor(numbers, dtype=torch.float64, device=self.device)
            distributed.all_reduce(said)
            numbers = (said / self.size).tolist()
        return dict(zip(values, numbers, strict=True))


def alone(device: torch.device, *, bf16: bool = False) -> World:
    """Returns a world of one."""
    fabric = Fabric(accelerator=device.type, devices=1, plugins=_precision(device, bf16))
    fabric.launch()
    return World(fabric)


@contextlib.contextmanager
def join_world(device: torch.device, *, bf16: bool = False) -> Iterator[World]:
    """Yields the world that torchrun made, or a world of one."""
    if "RANK" not in os.environ:
        yield alone(device, bf16=bf16)
        return
    strategy = DDPStrategy(
        process_group_backend="nccl" if device.type == "cuda" else "gloo",
        find_unused_parameters=True,  # a stage may leave parts of its networks out
        gradient_as_bucket_view=True,
        bucket_cap_mb=BUCKET_MB,
    )
    fabric = Fabric(
        accelerator=device.type, strategy=strategy,
        devices=int(os.environ["LOCAL_WORLD_SIZE"]),
        num_nodes=int(os.environ.get("GROUP_WORLD_SIZE", 1)),
        plugins=[_precision(device, bf16), TorchElasticEnvironment()],
    )  # fmt: skip
    fabric.launch()
    try:
        yield World(fabric)
    finally:
        distributed.destroy_process_group()


def _precision(device: torch.device, bf16: bool) -> Precision:
    return Bfloat16("bf16-mixed", device.type) if bf16 else Precision()
