"""Checkpoints: whole files, the last few of them, and a run that goes on as if nothing had been."""

from __future__ import annotations

import json
import signal
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open

from diffusionact.errors import SettingsError
from diffusionact.training import loop, savepoints, state, weights
from diffusionact.training.config import load_recipe
from diffusionact.training.inversions import AHEAD, InversionCache
from diffusionact.training.muon import Muon
from diffusionact.training.world import alone
from tests.test_training import TINY, write_pool

pytestmark = pytest.mark.torch

ROOT = Path(__file__).parent.parent
CHILD_S = 240  # patience with a child on a machine where others work, too
KILLED_AT = 7  # steps, of 12

TEXT = """
name = "tiny"
network = "tiny"
weights = "{folder}/face.safetensors"
[pool]
folder = "{folder}/pool"
identities = 6
held_out = 2
[inversions]
steps = 1
capacity = 6
fill = 4
every = 2
batch = 2
[loop]
log_every_steps = 4
checkpoint_minutes = 0
sheet_minutes = 0
fused_norm = false
bf16 = false
[[stages]]
kind = "autoencoder"
images = 24
batch = 2
cached_noise = 0.5
cached_from = 0.0
matrix_lr = 0.01
"""


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(state, "PRESETS", {"tiny": TINY})
    write_pool(tmp_path / "pool")
    return tmp_path


class Killed(BaseException):
    """What no code expects: as after kill -9, nothing is saved any more."""


def train(folder: Path, out: str, *, kill_at: int = 0) -> None:
    """The run in a folder of its own, begun or gone on with; saved after each step."""
    recipe = load_recipe(folder / "tiny.toml")
    run = loop.Trainer(recipe, folder / out, alone(torch.device("cpu")))
    if list((folder / out).iterdir()):
        run.resume()
    step = run._step

    def stepping(*arguments: object) -> dict[str, float]:
        parts = step(*arguments)  # type: ignore[arg-type]
        if run.state.progress.step == kill_at:
            raise Killed
        return parts

    run._step = stepping  # type: ignore[method-assign,assignment]
    run.run()
    loop.finish(run.state, recipe, folder / f"{out}.safetensors")


def assert_same_weights(folder: Path) -> None:
    whole, halves = (weights.load(folder / f"{out}.safetensors") for out in ("whole", "halves"))
    assert halves.provenance["images_seen"] == whole.provenance["images_seen"] == 24
    for part, tensors in whole.parts.items():
        for name, tensor in tensors.items():
            assert torch.equal(halves.parts[part][name], tensor), (part, name)


def curve(folder: Path) -> list[dict[str, object]]:
    lines = [json.loads(line) for line in (folder / "curves.jsonl").read_text().splitlines()]
    timed = ("seconds", "images_per_s", "peak_memory_mb")
    return [{k: v for k, v in line.items() if k not in timed} for line in lines]


def test_a_run_killed_and_resumed_is_the_run_that_was_not(folder: Path) -> None:
    """To the last bit of the weights and of the curve, ring of inversions included."""
    (folder / "tiny.toml").write_text(TEXT.format(folder=folder))
    train(folder, "whole")
    with pytest.raises(Killed):
        train(folder, "halves", kill_at=KILLED_AT)
    with (folder / "halves" / "curves.jsonl").open("a") as file:
        file.write('{"stage": "autoenc')  # the kill came in the middle of a line
    train(folder, "halves")
    assert_same_weights(folder)
    found = curve(folder / "halves")
    assert found == curve(folder / "whole")
    assert [line.get("step") for line in found] == [4, 8, 12, None]
    assert not list((folder / "halves").glob(".part-*"))


def test_dropout_goes_on_too(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The published networks have it; what it drops is the step's, not the process's."""
    monkeypatch.setattr(state, "PRESETS", {"tiny": replace(TINY, dropout=0.3)})
    (folder / "tiny.toml").write_text(TEXT.format(folder=folder))
    train(folder, "whole")
    with pytest.raises(Killed):
        train(folder, "halves", kill_at=KILLED_AT)
    torch.manual_seed(99)
    train(folder, "halves")
    assert_same_weights(folder)


# The same with kill -9 itself.
RUN = f"""
import os, signal, sys
from dataclasses import replace
from pathlib import Path
import torch
from diffusionact.training import loop, state
from diffusionact.training.models import FACE128
torch.set_num_threads(1)
state.PRESETS = {{"tiny": replace(FACE128, image_size=32, channels=32, channel_mult=(1, 2),
                                encoder_mult=(1, 2), attention_at=(4,), embed=32)}}
folder = Path(sys.argv[1])
step = loop.Trainer._step
def stepping(run, *arguments):
    parts = step(run, *arguments)
    if run.state.progress.step == {KILLED_AT}:
        os.kill(os.getpid(), signal.SIGKILL)
    return parts
loop.Trainer._step = stepping
loop.train(folder / "tiny.toml", out=folder / "halves", device="cpu")
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform == "win32", reason="Windows has no SIGKILL")
def test_kill_9_is_no_different(folder: Path) -> None:
    (folder / "tiny.toml").write_text(TEXT.format(folder=folder))
    done = subprocess.run(
        [sys.executable, "-c", RUN, str(folder)], cwd=ROOT, timeout=CHILD_S, check=False
    )
    assert done.returncode == -signal.SIGKILL
    train(folder, "halves")
    train(folder, "whole")
    assert_same_weights(folder)
    assert curve(folder / "halves") == curve(folder / "whole")


# The files


def test_the_last_checkpoints_are_kept_and_no_pickle(folder: Path) -> None:
    (folder / "tiny.toml").write_text(TEXT.format(folder=folder))
    run = loop.Trainer(
        load_recipe(folder / "tiny.toml"), folder / "run", alone(torch.device("cpu"))
    )
    for step in (3, 10, 200):
        run.state.progress.step = step
        run.save()
    names = [path.name for path in sorted((folder / "run").iterdir())]
    assert names == ["checkpoint-00-00000010.safetensors", "checkpoint-00-00000200.safetensors"]
    assert savepoints.newest(folder / "run") == folder / "run" / names[-1]
    with safe_open(folder / "run" / names[-1], framework="pt") as file:
        assert json.loads(file.metadata()["record"])["progress"]["step"] == 200
        assert any(name.startswith("ema/unet.") for name in file.keys())  # noqa: SIM118


def test_a_damaged_checkpoint_is_named_and_the_one_before_it_is_there(tmp_path: Path) -> None:
    first, second = (savepoints.path_of(tmp_path, 0, step) for step in (1, 2))
    for path in (first, second):
        savepoints.write(path, {"x": torch.ones(3)}, {"ring": savepoints.NO_RING})
    second.write_bytes(second.read_bytes()[:-5])
    with pytest.raises(SettingsError, match=r"00000002\.safetensors: .* remove it to go on from"):
        savepoints.read(second)
    tensors, record = savepoints.read(first)
    assert tensors["x"].tolist() == [1, 1, 1] and record["ring"] == savepoints.NO_RING


def test_a_checkpoint_of_another_network_or_other_stages_is_refused(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    recipe = folder / "tiny.toml"
    recipe.write_text(TEXT.format(folder=folder))
    with pytest.raises(Killed):
        train(folder, "run", kill_at=2)
    recipe.write_text(recipe.read_text().replace("autoencoder", "pretrain"))
    with pytest.raises(SettingsError, match=r"remembers 'unet\.|encoder\."):
        train(folder, "run")
    monkeypatch.setattr(state, "PRESETS", {"tiny": replace(TINY, channels=64)})
    with pytest.raises(SettingsError, match="holds another network"):
        train(folder, "run")


@pytest.mark.parametrize("kind", [torch.optim.AdamW, Muon])
def test_an_optimizer_gets_its_memory_back_and_its_rate_from_the_recipe(kind: type) -> None:
    layer = torch.nn.Conv2d(64, 64, 3).to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    names = {parameter: name for name, parameter in layer.named_parameters()}

    def made(lr: float) -> torch.optim.Optimizer:
        settings = {"matrix_lr": lr} if kind is Muon else {}
        optimizer: torch.optim.Optimizer = kind([{"params": [*names], "lr": lr}], **settings)
        return optimizer

    first, second = made(0.1), made(0.01)
    layer(torch.ones(1, 64, 4, 4)).square().mean().backward()
    first.step()
    savepoints.restore_optimizer(second, names, savepoints.optimizer_tensors(first, names))
    assert second.param_groups[0]["lr"] == 0.01
    for parameter in names:
        assert set(second.state[parameter]) == set(first.state[parameter])
        for key, value in first.state[parameter].items():
            again = second.state[parameter][key]
            assert torch.equal(again, value) and again.stride() == value.stride(), key


# The ring of inversions


def filled(ring: InversionCache, entries: range, step: int) -> None:
    numbers = np.array(entries)
    ring.add(numbers[:, None, None, None] * np.ones((1, 3, 1, 1)), numbers, numbers, step)


def test_a_batch_sees_what_was_added_well_before_it() -> None:
    """The newest `capacity` of those that were there AHEAD steps before, whatever came since."""
    ring = InversionCache(4, 1, spare=6)
    filled(ring, range(0, 6), step=10)
    filled(ring, range(6, 8), step=12)
    rng = np.random.default_rng(0)
    seen = {step: set(ring.pick(rng, 200, step)[1]) for step in (10 + AHEAD, 12 + AHEAD)}
    assert ring.seen(9 + AHEAD) == 0 and ring.seen(10 + AHEAD) == 6
    assert seen == {10 + AHEAD: {2, 3, 4, 5}, 12 + AHEAD: {4, 5, 6, 7}}


def test_a_ring_comes_back_from_the_files_that_it_left(tmp_path: Path) -> None:
    """As a run that goes on from the checkpoint after its tenth step needs it."""
    ring, records = InversionCache(4, 1, spare=2 * (AHEAD + 1)), []
    for step in range(12):
        filled(ring, range(2 * step, 2 * step + 2), step)
        records.append(savepoints.save_ring(tmp_path, 0, ring))
    assert [len(record["files"]) for record in records] == [*range(1, 8), *[7] * 5]
    again = InversionCache(4, 1, spare=2 * (AHEAD + 1))
    savepoints.restore_ring(tmp_path, 0, records[9], again)
    assert again.added == 20 and len(list(tmp_path.iterdir())) == 10, "what came later is gone"
    for step in range(10, 10 + AHEAD):
        assert again.seen(step) == ring.seen(step) == 2 * (step - AHEAD) + 2
        picked, wanted = (r.pick(np.random.default_rng(0), 50, step) for r in (again, ring))
        for array, array_wanted in zip(picked, wanted, strict=True):
            np.testing.assert_array_equal(array, array_wanted)
