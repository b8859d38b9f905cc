"""The processes that train together: one for each GPU, or one for each core of a small machine.

Two processes of one thread each train a network of this size 1.5 times as fast as one process of
two threads: they wait for each other once a step and not after every operation.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, distributed


class World:
    """This process among `size`, counted by `rank`; without torchrun, the only one."""

    def __init__(self, device: torch.device, rank: int = 0, size: int = 1) -> None:
        self.device, self.rank, self.size = device, rank, size

    @property
    def first(self) -> bool:
        """Whether this process writes the files of the run."""
        return self.rank == 0

    @property
    def stream(self) -> tuple[int, ...]:
        """What sets the random numbers of this process apart; empty for the first, whose run is
        then that of a single process."""
        return (self.rank,) if self.rank else ()

    def agree(self, parameters: Sequence[Tensor], seconds: float, stop: bool) -> tuple[float, bool]:
        """Returns the mean of `seconds` and whether any process wants to stop, the same in all of
        them; the gradients of `parameters` are now their mean over the processes.

        A parameter must have a gradient in all processes or in none.
        """
        if self.size == 1:
            return seconds, stop
        gradients = [p.grad for p in parameters if p.grad is not None]
        said = torch.tensor([seconds, float(stop)], device=self.device)
        flat = torch.cat([*(g.reshape(-1) for g in gradients), said])
        distributed.all_reduce(flat)
        flat /= self.size
        pieces = torch.split_with_sizes(flat, [*(g.numel() for g in gradients), len(said)])
        for gradient, piece in zip(gradients, pieces, strict=False):
            gradient.copy_(piece.view_as(gradient))
        mean_seconds, share = pieces[-1].tolist()
        return mean_seconds, share > 0


@contextlib.contextmanager
def join_world(device: torch.device) -> Iterator[World]:
    """Yields the world that torchrun made, or a world of one."""
    if "RANK" not in os.environ:
        yield World(device)
        return
    on_gpu = device.type == "cuda"
    if on_gpu:
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    distributed.init_process_group("nccl" if on_gpu else "gloo")
    try:
        yield World(device, distributed.get_rank(), distributed.get_world_size())
    finally:
        distributed.destroy_process_group()
