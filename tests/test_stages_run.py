"""The paper's protocol as a run: what each stage moves, begins from, draws and leaves behind."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from diffusionact.errors import SettingsError
from diffusionact.schedule import alpha_bars
from diffusionact.training import loop, state, weights
from diffusionact.training.config import CriteriaRecipe, StageRecipe, load_recipe, parse_recipe
from diffusionact.training.critics import Critics
from diffusionact.training.data import PairSampler, Pool
from diffusionact.training.diffusion import invert, render, to_batch
from diffusionact.training.inversions import InversionCache
from diffusionact.training.inverted_sources import inverted_sources
from diffusionact.training.losses import HeadTargets
from diffusionact.training.models import FFHQ64, ReenactmentEncoder
from diffusionact.training.stages import pretrain, sampler, trained
from diffusionact.training.stages.sample import Sample
from diffusionact.training.state import State
from diffusionact.training.weights_folder import MODEL_FILE
from tests.test_training import write_pool

pytestmark = pytest.mark.torch

SIDE = 16
SPREAD = 0.3  # of a pixel's value
TINY = replace(FFHQ64, image_size=SIDE, channels=32, channel_mult=(1, 2), encoder_mult=(1, 2),
               attention_at=(8,), res_blocks=1, embed=32)  # fmt: skip
PLAIN = CriteriaRecipe(
    perceptual=0, identity=0, style=0, background=10, shape=0, gaze=0, head_pose=0
)

TEXT = """
name = "paper"
network = "tiny"
weights = "{folder}/paper.safetensors"
[pool]
folder = "{folder}/pool"
identities = 6
held_out = 2
size = 16
[inversions]
steps = 3
folder = "{folder}/inversions"
[criteria]
perceptual = 0
identity = 0
style = 0
shape = 0
gaze = 0
head_pose = 0
[loop]
log_every_steps = 1
fused_norm = false
bf16 = false
evaluation_pairs = 2
[[stages]]
kind = "autoencoder"
images = 8
batch = 4
cached_noise = 0
[[stages]]
kind = "pretrain"
images = 8
batch = 4
lr = 1e-2
warmup_steps = 1
[[stages]]
kind = "sampler"
images = 8
batch = 4
lr = 1e-2
unet_lr = 0
train_steps = 2
warmup_steps = 1
[[stages]]
kind = "sampler"
images = 8
batch = 4
lr = 1e-2
unet_lr = 0.1
train_steps = 2
warmup_steps = 1
"""


@pytest.fixture(autouse=True)
def presets(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(state, "PRESETS", {"tiny": TINY})


@pytest.fixture
def text(tmp_path: Path) -> str:
    write_pool(tmp_path / "pool", side=SIDE)
    return TEXT.format(folder=tmp_path)


def new_state(text: str) -> State:
    """Networks whose zeroed layers are not zero, live and averaged alike."""
    fresh = State(parse_recipe(text), HeadTargets(np.zeros((2, 5), np.float32), (1,) * 5),
                  torch.device("cpu"))  # fmt: skip
    generator = torch.Generator().manual_seed(0)
    for parameter in fresh.live.parameters():
        if not parameter.any():
            parameter.data.normal_(std=0.05, generator=generator)
    fresh.ema.load_state_dict(fresh.live.state_dict())
    fresh.critics = Critics({})
    return fresh


def new_sample(count: int = 4) -> Sample:
    generator = torch.Generator().manual_seed(1)

    def picture() -> Tensor:
        return torch.rand((count, 3, SIDE, SIDE), generator=generator) * 2 - 1

    points = torch.rand((count, 70, 2), generator=generator) * SIDE
    return Sample(
        target=picture(), source=picture(), condition=picture(),
        weight=torch.ones(count, 1, SIDE, SIDE), values=torch.zeros(count, 5), keypoints=points,
        true_keypoints=torch.zeros(count, dtype=torch.bool),
        eps=torch.randn((count, 3, SIDE, SIDE), generator=generator),
        t=torch.zeros(count, dtype=torch.long),
        labels=torch.randint(0, 2, (count, SIDE, SIDE), generator=generator),
    )  # fmt: skip


def touched(networks: torch.nn.ModuleDict) -> set[str]:
    """The networks of which every parameter has a gradient that is not zero everywhere."""
    return {
        name for name, network in networks.items()
        if all(p.grad is not None and bool(p.grad.any()) for p in network.parameters())
    }  # fmt: skip


def untouched(networks: torch.nn.ModuleDict) -> set[str]:
    return {
        name for name, network in networks.items()
        if all(p.grad is None for p in network.parameters())
    }  # fmt: skip


# Pre-training


def test_pretraining_is_the_l1_distance_of_the_codes_and_nothing_else(text: str) -> None:
    run, sample = new_state(text), new_sample()
    stage = StageRecipe("pretrain", images=8)
    loss, _ = pretrain.loss(run, sample, parse_recipe(text), stage)
    with torch.no_grad():
        assert sample.source is not None and sample.condition is not None
        z_r = run.live["reenactment"](sample.source, sample.condition).double()
        z_t = run.ema["encoder"](sample.target).double()
    wanted = (z_r - z_t).abs().sum() / z_r.numel()
    assert float(loss.detach()) == pytest.approx(float(wanted), rel=1e-6)
    loss.backward()  # type: ignore[no-untyped-call]
    assert touched(run.live) == {"reenactment"} == set(trained(stage))
    assert untouched(run.live) == {"unet", "encoder", "heads"}
    assert untouched(run.ema) == set(run.ema)


def test_pretraining_begins_with_the_encoder_and_a_drawing_that_says_nothing(
    text: str, tmp_path: Path
) -> None:
    run = new_state(text)
    run.start_reenactment(0.0)
    encoder = run.live["reenactment"]
    assert isinstance(encoder, ReenactmentEncoder)
    assert not any(bool(p.any()) for p in encoder.zero_conv_1.parameters())
    sample = new_sample()
    z = encoder(sample.source, sample.condition)
    torch.testing.assert_close(z, run.ema["encoder"](sample.source), atol=0, rtol=0)


# Through the sampler


@pytest.mark.parametrize(("unet_lr", "moves"), [(0.0, {"reenactment"}),
                                                (0.1, {"reenactment", "unet"})])  # fmt: skip
def test_the_sampler_moves_the_encoder_and_with_a_rate_of_its_own_the_decoder(
    text: str, unet_lr: float, moves: set[str]
) -> None:
    run, sample = new_state(text), new_sample()
    stage = StageRecipe("sampler", images=8, unet_lr=unet_lr, train_steps=2)
    assert set(trained(stage)) == moves
    loss, parts = sampler.loss(run, sample, replace(parse_recipe(text), criteria=PLAIN), stage)
    loss.backward()  # type: ignore[no-untyped-call]
    assert touched(run.live) == moves
    assert untouched(run.live) == set(run.live) - moves
    assert untouched(run.ema) == set(run.ema)
    assert not run.live["unet"].training or unet_lr == 0, "dropout is not what the runtime does"
    assert set(parts) == {"pixel", "background", "reenacted", "reconstructed"}
    halves = float(parts["reenacted"] + parts["reconstructed"]) / 2
    assert halves == pytest.approx(float(parts["pixel"].detach()), rel=1e-5)


def test_its_loss_is_the_weighted_criteria_of_the_rendered_picture(text: str) -> None:
    run, sample = new_state(text), new_sample()
    stage = StageRecipe("sampler", images=8, unet_lr=0.0, train_steps=4)
    loss, _ = sampler.loss(run, sample, replace(parse_recipe(text), criteria=PLAIN), stage)
    assert sample.labels is not None
    with torch.no_grad():
        z = run.live["reenactment"](sample.source, sample.condition)
        x_0 = render(run.ema["unet"], "eps", sample.eps, z, 4)
    apart = (x_0 - sample.target).abs()
    behind = (sample.labels == 0)[:, None] * apart
    wanted = 20 * apart.mean() + 10 * behind.mean()
    assert float(loss.detach()) == pytest.approx(float(wanted), rel=1e-5)


@pytest.mark.parametrize("split", [True, False])
def test_half_of_a_batch_reenacts_and_half_reconstructs(
    text: str, tmp_path: Path, split: bool
) -> None:
    pool = Pool.open(tmp_path / "pool")
    stage = StageRecipe("sampler", images=8, batch=16, split=split, same_frame=0.5)
    draw = PairSampler(pool, 4, stage, InversionCache(1, SIDE), (1, 0))
    for step in range(4):
        batch = draw(step)
        assert batch.source is not None
        same = (batch.source == batch.target).all(axis=(1, 2, 3))
        np.testing.assert_array_equal(same, np.arange(16) % 2 == 1 if split else np.zeros(16, bool))
        np.testing.assert_array_equal(same, batch.source_frame == batch.frame)


def test_an_odd_batch_cannot_be_halved(text: str) -> None:
    odd = text.replace("batch = 4\nlr = 1e-2\nunet_lr = 0\n", "batch = 3\nlr = 1e-2\nunet_lr = 0\n")
    with pytest.raises(SettingsError, match="batch = 3, wanted an even number: .* split = false"):
        parse_recipe(odd)
    parse_recipe(odd.replace("unet_lr = 0\n", "unet_lr = 0\nsplit = false\n"))


# The noise of sources


def pictures(count: int, seed: int = 0) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (count, SIDE, SIDE, 3), dtype=np.uint8)


def files(folder: Path) -> list[Path]:
    return sorted(folder.rglob("*.npy"))


def test_a_cached_inversion_is_a_fresh_one(text: str, tmp_path: Path) -> None:
    """By the U-Net that inverts, not the one that renders, under the source's semantic code."""
    run, recipe, sources = new_state(text), parse_recipe(text), pictures(3)
    run.keep_inverter()
    with torch.no_grad():
        for parameter in run.ema["unet"].parameters():
            parameter.mul_(0.9)  # as fine-tuning moves it
    cached = inverted_sources(run, recipe, tmp_path, torch.device("cpu"))
    x_0 = to_batch(sources, torch.device("cpu"))
    with torch.no_grad():
        assert run.invert is not None
        fresh = invert(run.invert, run.config.prediction, x_0, run.ema["encoder"](x_0), 3).numpy()
    np.testing.assert_array_equal(cached(sources), fresh)
    kept = files(tmp_path / "inversions")
    assert len(kept) == 3
    before = [path.stat().st_mtime_ns for path in kept]
    again = inverted_sources(run, recipe, tmp_path, torch.device("cpu"))
    np.testing.assert_array_equal(again(sources[::-1]), fresh[::-1])
    assert [path.stat().st_mtime_ns for path in kept] == before, "read, not made again"


class OfGaussians(torch.nn.Module):
    """The exact eps of pictures whose pixels are N(0, SPREAD^2), each by itself."""

    def forward(self, x: Tensor, t: Tensor, z: Tensor) -> Tensor:
        level = torch.from_numpy(alpha_bars()).float()[t][:, None, None, None]
        return x * (1 - level).sqrt() / (level * SPREAD**2 + 1 - level)


def test_the_noise_leads_back_to_the_source(text: str, tmp_path: Path) -> None:
    """The network that made it renders the source again, the nearer the more steps there are."""
    run, recipe, sources = new_state(text), parse_recipe(text), 96 + pictures(2) // 4
    run.ema["unet"] = OfGaussians()
    x_0 = to_batch(sources, torch.device("cpu"))
    z, errors = run.ema["encoder"](x_0), []
    for steps in (10, 50, 250):
        recipe = replace(recipe, inversions=replace(recipe.inversions, steps=steps))
        x_T = torch.from_numpy(inverted_sources(run, recipe, tmp_path, x_0.device)(sources))
        assert 0.5 < float(x_T.std() / x_0.std()) * SPREAD < 2.0, "noise"
        back = render(run.ema["unet"], run.config.prediction, x_T, z, steps)
        errors.append(float((back - x_0).abs().max()))
    assert errors[0] > 2 * errors[1] > 4 * errors[2] and errors[2] < 0.02, errors


def test_what_fills_its_share_of_the_disk_is_made_anew(
    text: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run, recipe, sources = new_state(text), parse_recipe(text), pictures(3)
    one_gb = 4 * 3 * SIDE * SIDE / 1e9
    small = replace(recipe, inversions=replace(recipe.inversions, most_gb=2 * one_gb))
    cached = inverted_sources(run, small, tmp_path, torch.device("cpu"))
    first = cached(sources)
    assert 1 <= len(files(tmp_path / "inversions")) <= 2 and "most_gb" in caplog.text
    # Inverted in batches of other sizes, they differ by float32's rounding.
    np.testing.assert_allclose(cached(sources), first, atol=1e-3)


def test_other_weights_or_steps_have_another_folder(text: str, tmp_path: Path) -> None:
    run, device = new_state(text), torch.device("cpu")
    recipe, sources = parse_recipe(text), pictures(1)
    first = inverted_sources(run, recipe, tmp_path, device)(sources)
    steps = replace(recipe, inversions=replace(recipe.inversions, steps=4))
    second = inverted_sources(run, steps, tmp_path, device)(sources)
    run.ema["unet"].out[2].bias.data += 0.1  # type: ignore[union-attr,index,operator]
    third = inverted_sources(run, recipe, tmp_path, device)(sources)
    assert not np.array_equal(first, second) and not np.array_equal(first, third)
    assert len(files(tmp_path / "inversions")) == 3


def test_a_damaged_file_is_made_anew(text: str, tmp_path: Path) -> None:
    run, recipe, sources = new_state(text), parse_recipe(text), pictures(2)
    cached = inverted_sources(run, recipe, tmp_path, torch.device("cpu"))
    fresh = cached(sources)
    first, second = files(tmp_path / "inversions")
    first.write_bytes(first.read_bytes()[:50])
    second.write_bytes(b"")
    np.testing.assert_array_equal(cached(sources), fresh)
    assert first.stat().st_size == second.stat().st_size > 50
    assert not list((tmp_path / "inversions").rglob(".part-*"))


def test_a_full_disk_ends_the_keeping_and_not_the_run(
    text: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    run, recipe, sources = new_state(text), parse_recipe(text), pictures(2)
    cached = inverted_sources(run, recipe, tmp_path, torch.device("cpu"))
    monkeypatch.setattr("diffusionact.training.inverted_sources.KEEP_FREE_BYTES", 1 << 62)
    np.testing.assert_array_equal(cached(sources), cached(sources))
    assert not files(tmp_path / "inversions")
    assert len(caplog.messages) == 1 and "free; sources not inverted so far" in caplog.text


# The whole protocol


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """A run of all four stages."""
    folder = tmp_path_factory.mktemp("paper")
    write_pool(folder / "pool", side=SIDE)
    (folder / "paper.toml").write_text(TEXT.format(folder=folder))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(state, "PRESETS", {"tiny": TINY})
        loop.train(folder / "paper.toml", out=folder / "run", device="cpu")
    yield folder


def test_the_four_stages_run_one_after_another(run_folder: Path) -> None:
    text = (run_folder / "run/curves.jsonl").read_text()
    lines = [json.loads(line) for line in text.splitlines()]
    stages = [line["stage"] for line in lines if "stage" in line]
    assert stages == ["autoencoder"] * 2 + ["pretrain"] * 2 + ["sampler"] * 4
    last = next(line for line in reversed(lines) if "stage" in line)
    assert {"pixel", "background", "reenacted", "reconstructed"} <= set(last)
    sheets = [line["psnr"] for line in lines if "psnr" in line]
    assert "reenactment T=8" in sheets[-1] and "reconstruction T=20" in sheets[-1]


def test_after_fine_tuning_the_decoder_inversion_keeps_the_weights_from_before(
    run_folder: Path,
) -> None:
    stored = weights.load(run_folder / "paper.safetensors")
    assert set(stored.parts) == {"render", "invert", "encoder", "reenactment"}
    render_parts, invert_parts = stored.parts["render"], stored.parts["invert"]
    moved = [
        name for name in render_parts if not torch.equal(render_parts[name], invert_parts[name])
    ]
    assert len(moved) > 0.5 * len(render_parts)
    caches = list((run_folder / "inversions").iterdir())
    assert len(caches) == 1, "fine-tuning reads the noise that the stage before it made"
    pool = Pool.open(run_folder / "pool")
    assert 0 < len(files(run_folder / "inversions")) <= 4 * pool.frames, "no held-out person"


def test_a_run_begins_where_the_weights_stand(run_folder: Path, tmp_path: Path) -> None:
    """A Diffusion Autoencoder alone, as it is published, is enough to begin with (b) or (c)."""
    stored = weights.load(run_folder / "paper.safetensors")
    autoencoder = {part: stored.parts[part] for part in ("render", "encoder")}
    weights.save_tensors(tmp_path / "ae.safetensors", stored.config, autoencoder, provenance={},
                         dtype=torch.float32)  # fmt: skip
    recipe = load_recipe(run_folder / "paper.toml")
    begun = State(replace(recipe, start=str(tmp_path / "ae.safetensors")),
                  HeadTargets(np.zeros((2, 5), np.float32), (1,) * 5), torch.device("cpu"))  # fmt: skip
    assert not begun.has_reenactment and begun.invert is None
    whole = State(replace(recipe, start=str(run_folder / "paper.safetensors")),
                  HeadTargets(np.zeros((2, 5), np.float32), (1,) * 5), torch.device("cpu"))  # fmt: skip
    assert whole.has_reenactment and whole.invert is not None
    for name, value in whole.invert.state_dict().items():
        torch.testing.assert_close(value, stored.parts["invert"][name].float(), atol=0, rtol=0)


def test_published_weights_without_the_autoencoders_file_say_what_is_missing(
    run_folder: Path, tmp_path: Path
) -> None:
    stored = weights.load(run_folder / "paper.safetensors")
    parts = {part: values for part, values in stored.parts.items() if part != "encoder"}
    folder = tmp_path / "weights"  # as `diffusionact import` leaves it
    folder.mkdir()
    weights.save_tensors(folder / MODEL_FILE, stored.config, parts, provenance={})
    recipe = replace(load_recipe(run_folder / "paper.toml"), start=str(folder))
    targets = HeadTargets(np.zeros((2, 5), np.float32), (1,) * 5)
    with pytest.raises(SettingsError, match="no semantic encoder, .* --diffae last.ckpt"):
        State(recipe, targets, torch.device("cpu"))
    weights.save_tensors(folder / MODEL_FILE, stored.config, stored.parts, provenance={})
    assert State(recipe, targets, torch.device("cpu")).has_reenactment
