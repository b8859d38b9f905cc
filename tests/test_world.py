"""Several processes that train together: the same curve as one, the same clock, the same end."""

from __future__ import annotations

import json
import os
import socket
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffusionact.training import loop, state
from diffusionact.training.gather import gathered
from diffusionact.training.share import Share
from diffusionact.training.world import alone, join_world
from tests.test_training import TINY, write_pool

pytestmark = pytest.mark.torch

# Sums of float32 in another order, and Muon, whose iteration is in bfloat16; 2.5e-5 was seen.
CURVE_TOLERANCE = 2e-4
CPU = torch.device("cpu")

TEXT = """
name = "tiny"
network = "tiny"
weights = "{folder}/face.safetensors"
[pool]
folder = "{folder}/pool"
identities = 6
held_out = 2
[loop]
log_every_steps = 1
fused_norm = false
bf16 = false
sheet_minutes = 0
[[stages]]
kind = "autoencoder"
images = 16
batch = 8
cached_noise = 0.0
accumulate = {accumulate}
matrix_lr = 0.02
[[stages]]
kind = "reenact"
images = 16
batch = 8
cached_noise = 0.0
encoder_lr = 1.0
drawing_gain = 1.0
"""


WORKS = ("agree", "train")


def be_one_of_two(rank: int, folder: str) -> None:
    """All that the two processes do, each work in a world of its own: to begin them takes longer."""
    os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE="2", LOCAL_WORLD_SIZE="2")
    torch.set_num_threads(1)
    for name, work in zip(WORKS, (agree_in_one_of_two, train_in_one_of_two), strict=True):
        port = Path(folder, f"port of {name}").read_text()
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
        work(rank, folder)


@pytest.fixture(scope="module")
def two(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder in which two processes have done their works."""
    folder = tmp_path_factory.mktemp("two")
    for name in WORKS:
        with socket.create_server(("127.0.0.1", 0)) as server:
            (folder / f"port of {name}").write_text(str(server.getsockname()[1]))
    write_pool(folder / "pool")
    (folder / "tiny.toml").write_text(TEXT.format(folder=folder, accumulate=2))
    torch.multiprocessing.spawn(be_one_of_two, (str(folder),), nprocs=2)
    return folder


class Sum(nn.Module):
    """Two linear layers, one of them idle."""

    def __init__(self) -> None:
        super().__init__()
        self.used, self.idle = nn.Linear(3, 2), nn.Linear(3, 2)

    def forward(self, x: Tensor) -> Tensor:
        total: Tensor = self.used(x).sum()
        return total


def agree_in_one_of_two(rank: int, folder: str) -> None:
    """Leaves its answers in a file."""
    with join_world(CPU) as world:
        model = Sum()
        wrapped, optimizer = world.wrap(model, torch.optim.SGD(model.parameters(), lr=1.0))
        with world.apart(wrapped, True):
            world.fabric.backward(wrapped(torch.full((1, 3), 1.0 + 2 * rank)))
        assert model.used.weight.grad is not None
        apart = float(model.used.weight.grad[0, 0])
        world.fabric.backward(wrapped(torch.full((1, 3), 1.0 + 2 * rank)))
        answer: dict[str, Any] = {
            "gradient": model.used.weight.grad.flatten().tolist(),
            "idle": model.idle.weight.grad is None,
            "mean": world.mean({"seconds": 10.0 + rank, "stop": float(rank)}),
            "gathered": gathered(torch.full((2, 1), float(rank))).flatten().tolist(),
        }
        own = {"first": world.first, "share": [world.share.index, world.share.count],
               "apart": apart}  # fmt: skip
    Path(folder, f"{rank}.json").write_text(json.dumps([answer, own]))


def test_two_processes_agree(two: Path) -> None:
    (first, own), (second, others) = (
        json.loads((two / f"{rank}.json").read_text()) for rank in (0, 1)
    )
    assert own == {"first": True, "share": [0, 2], "apart": 1.0}, "not exchanged before the last"
    assert others == {"first": False, "share": [1, 2], "apart": 3.0}
    assert first == second
    assert first["gradient"] == [4.0] * 6, "the mean of 1 + 1 and 3 + 3"
    assert first["idle"], "what nobody used has no gradient"
    assert first["mean"] == {"seconds": 10.5, "stop": 0.5}
    assert first["gathered"] == [0, 0, 1, 1]


def test_a_world_of_one_changes_nothing() -> None:
    world = alone(CPU)
    assert world.mean({"seconds": 3.0, "stop": 0.0}) == {"seconds": 3.0, "stop": 0.0}
    assert world.first and world.share == Share(0, 1)
    rows = torch.ones(2, 3, requires_grad=True)
    assert torch.equal(gathered(rows), rows) and not gathered(rows).requires_grad


def test_bfloat16_is_for_the_networks_and_not_for_what_they_see() -> None:
    seen: list[torch.dtype] = []

    class Probe(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(2, 2)

        def forward(self, x: Tensor) -> Tensor:
            seen.extend([x.dtype, self.layer(x).dtype])
            return x.sum()

    probe, world = Probe(), alone(CPU, bf16=True)
    wrapped, _ = world.wrap(probe, torch.optim.SGD(probe.parameters(), lr=1.0))
    assert wrapped(torch.ones(1, 2)).dtype == torch.float32
    assert seen == [torch.float32, torch.bfloat16]


def test_shares_are_contiguous_and_whole() -> None:
    rows = [np.arange(12)[Share(i, 3).rows(12)] for i in range(3)]
    np.testing.assert_array_equal(np.concatenate(rows), np.arange(12))
    assert all(part[0] % 2 == 0 for part in rows), "even places stay even"


def train_in_one_of_two(rank: int, folder: str) -> None:
    state.PRESETS = {"tiny": replace(TINY, channels=64)}
    loop.train(Path(folder) / "tiny.toml", out=Path(folder) / "two", device="cpu")


def curve(folder: Path) -> list[dict[str, float]]:
    lines = [json.loads(line) for line in (folder / "curves.jsonl").read_text().splitlines()]
    timed = ("seconds", "images_per_s", "peak_memory_mb", "stage")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines if "step" in line]


def test_two_processes_learn_what_one_does(
    two: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The same curve at the same batch; and at the same batch in turns."""
    monkeypatch.setattr(state, "PRESETS", {"tiny": replace(TINY, channels=64)})
    recipe, curves = tmp_path / "tiny.toml", [curve(two / "two")]
    for accumulate in (1, 4):
        recipe.write_text(TEXT.format(folder=two, accumulate=accumulate))
        out = tmp_path / f"turns {accumulate}"
        curves.append(curve(loop.train(recipe, out=out, device="cpu")))
    wanted = curves.pop(1)
    assert len(wanted) == 4 and wanted[-1]["seen"] == 32
    for found in curves:
        for line, line_wanted in zip(found, wanted, strict=True):
            assert line == pytest.approx(line_wanted, rel=CURVE_TOLERANCE)
