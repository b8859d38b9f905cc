"""Several processes that train together: the same gradients, the same clock, the same end."""

from __future__ import annotations

import json
import os
import socket
from pathlib import Path

import pytest
import torch
from torch import nn

from diffusionact.training.world import World, join_world

pytestmark = pytest.mark.torch


def agree_in_one_of_two(rank: int, folder: str) -> None:
    """What each process does; its answers go to a file."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2")
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=Path(folder, "port").read_text())
    torch.set_num_threads(1)
    with join_world(torch.device("cpu")) as world:
        layer, unused = nn.Linear(3, 2), nn.Parameter(torch.zeros(4))
        for parameter in layer.parameters():
            parameter.grad = torch.full_like(parameter, 1.0 + 2 * rank)
        seconds, stop = world.agree([*layer.parameters(), unused], 10.0 + rank, stop=rank == 1)
        answer = {
            "gradients": [float(g) for p in layer.parameters() for g in p.grad.flatten()],  # type: ignore[union-attr]
            "unused": unused.grad is None, "seconds": seconds, "stop": stop,
            "first": world.first, "stream": world.stream,
        }  # fmt: skip
    Path(folder, f"{rank}.json").write_text(json.dumps(answer))


def test_two_processes_agree(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        (tmp_path / "port").write_text(str(server.getsockname()[1]))
    torch.multiprocessing.spawn(agree_in_one_of_two, (str(tmp_path),), nprocs=2)
    first, second = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in (0, 1))
    assert (first.pop("first"), second.pop("first")) == (True, False)
    assert first.pop("stream") != second.pop("stream"), "each draws batches of its own"
    assert first == second
    assert first["gradients"] == [2.0] * 8 and first["unused"]
    assert first["seconds"] == 10.5 and first["stop"] is True


def test_a_world_of_one_changes_nothing() -> None:
    layer = nn.Linear(2, 2)
    layer(torch.ones(1, 2)).sum().backward()
    assert layer.weight.grad is not None
    before = layer.weight.grad.clone()
    with join_world(torch.device("cpu")) as world:
        assert world.agree(list(layer.parameters()), 3.0, stop=False) == (3.0, False)
        assert world.first and world.stream == ()
    assert torch.equal(layer.weight.grad, before)
    assert World(torch.device("cpu"), rank=1, size=2).stream == (1,)
