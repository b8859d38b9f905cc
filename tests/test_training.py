"""Recipes, losses, the state of a run, and a run of two stages on a tiny pool."""

from __future__ import annotations

import itertools
import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from diffusionact.errors import DeviceError, SettingsError
from diffusionact.training import loop, savepoints, state, weights
from diffusionact.training.config import (
    LoopRecipe,
    LossRecipe,
    Recipe,
    StageRecipe,
    load_recipe,
    parse_recipe,
)
from diffusionact.training.data import PairSampler
from diffusionact.training.inversions import InversionCache
from diffusionact.training.losses import (
    GROUP_WEIGHTS,
    Heads,
    code_distance,
    group_weights,
    head_targets,
    keypoint_distance,
    keypoint_targets,
    pixel_weights,
    weighted_square,
)
from diffusionact.training.models import FACE128
from diffusionact.training.pace import fraction, rate
from diffusionact.training.stages import to_sample
from diffusionact.training.state import BACKGROUND, State
from diffusionact.training.world import alone

pytestmark = pytest.mark.torch

RECIPES = Path(__file__).parents[1] / "training" / "recipes"
TINY = replace(FACE128, image_size=32, channels=32, channel_mult=(1, 2), encoder_mult=(1, 2),
               attention_at=(4,), embed=32)  # fmt: skip
FLOAT32_TOLERANCE = 1e-5

TEXT = """
name = "tiny"
network = "tiny"
weights = "{weights}"
[pool]
folder = "{folder}"
identities = 6
held_out = 2
size = 32
[inversions]
steps = 2
capacity = 16
fill = 4
every = 1
batch = 4
[loop]
log_every_steps = 1
fused_norm = false
bf16 = false
evaluation_pairs = 4
[[stages]]
kind = "autoencoder"
images = 16
batch = 4
cached_from = 0.4
[[stages]]
kind = "reenact"
images = 8
batch = 4
matrix_lr = 0.01
"""


def write_pool(folder: Path, identities: int = 6, frames: int = 3, side: int = 32) -> None:
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = (identities, frames)
    patches = rng.integers(0, 256, (*rows, 4, 4, 3), dtype=np.uint8)  # simple, but not flat
    arrays = {
        "images": patches.repeat(side // 4, axis=2).repeat(side // 4, axis=3),
        "labels": rng.integers(0, 8, (*rows, side, side), dtype=np.uint8),
        "points": rng.uniform(0, side, (*rows, 68, 3)).astype(np.float32),
        "gaze": rng.uniform(0, side, (*rows, 2, 2)).astype(np.float32),
        "pose": np.zeros((*rows, 3), np.float32),
        "expression": np.zeros((*rows, 4), np.float32),
        "gaze_angles": np.zeros((*rows, 2), np.float32),
        "parameters": rng.standard_normal((*rows, 5)).astype(np.float32),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    (folder / "meta.json").write_text(json.dumps({"format": 1}))


@pytest.fixture
def recipe_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(state, "PRESETS", {"tiny": TINY})
    write_pool(tmp_path / "pool")
    path = tmp_path / "tiny.toml"
    values = {"folder": tmp_path / "pool", "weights": tmp_path / "face.safetensors"}
    path.write_text(TEXT.format(**values))
    return path


def trainer(path: Path, folder: Path) -> loop.Trainer:
    return loop.Trainer(load_recipe(path), folder, alone(torch.device("cpu")))


# Recipes


@pytest.mark.parametrize("path", sorted(RECIPES.glob("face*.toml")), ids=lambda p: p.name)
def test_shipped_recipes_load(path: Path) -> None:
    recipe = load_recipe(path)
    assert recipe.network.lower() in state.PRESETS
    assert recipe.stages[-1].kind == "reenact", "without it there is nothing to export"
    assert len(recipe.digest) == 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (("steps = 2", "stepz = 2"), "unknown setting stepz; known: .*steps"),
        (("held_out = 2", "held_out = 6"), "held_out = 6, wanted between 1 and"),
        (('kind = "reenact"', 'kind = "swap"'), "kind = 'swap', wanted one of 'scene', 'auto"),
        (("cached_from = 0.4", "cached_from = 4"), "cached_from = 4, wanted 0..1"),
        (("images = 16", "images = 0"), "images = 0, wanted above 0"),
        (("images = 16", "images = 16\naccumulate = 0"), "accumulate = 0, wanted above 0"),
        (("images = 16", "images = 16\nminutes = 0"), "minutes = 0, wanted above 0"),
        (("every = 1", "every = 0"), r"\[inversions\]: every = 0, wanted 1 or more"),
        (("steps = 2", "steps = [5, 3]"), "ascending"),
        (("images = 8\nbatch = 4", "images = 8\nbatch = 5"), "batch = 5, wanted an even number"),
        (('folder = "{folder}"', ""), "folder"),
        (("[pool]", 'pool = "here"\n[other]'), "'here', wanted a table"),
        (("[pool]", "[pool"), "not TOML"),
    ],
)
def test_a_bad_recipe_says_what_is_wrong(change: tuple[str, str], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        parse_recipe(TEXT.replace(*change))


def test_a_missing_recipe_is_named(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"cannot read the recipe .*none\.toml"):
        load_recipe(tmp_path / "none.toml")


# Losses


def test_pixel_weights_favour_features_and_have_mean_one() -> None:
    labels = torch.ones(2, 32, 32, dtype=torch.uint8)
    labels[0, 10:13, 10:13] = 3
    gaze = torch.tensor([[[20.0, 5.0], [20.0, 5.0]], [[-99.0, -99.0], [-99.0, -99.0]]])
    weight = pixel_weights(labels, gaze, LossRecipe())
    assert weight.shape == (2, 1, 32, 32)
    torch.testing.assert_close(weight.mean(dim=(1, 2, 3)), torch.ones(2))
    skin = weight[0, 0, 31, 31]
    # The gaze's bump is 3.6 sigma away and adds a little.
    assert float(weight[0, 0, 11, 11] / skin) == pytest.approx(LossRecipe().mouth, rel=1e-2)
    assert float(weight[0, 0, 9, 9] / skin) > 6  # grown by one pixel
    assert float(weight[0, 0, 5, 20] / skin) > LossRecipe().gaze  # row y = 5, column x = 20
    torch.testing.assert_close(weight[1], torch.ones(1, 32, 32))


def test_weighted_square_counts_by_weight() -> None:
    error = torch.zeros(1, 3, 2, 2)
    error[:, :, 0, 0] = 2
    weight = torch.tensor([[3.0, 1], [0, 0]])[None, None]
    assert float(weighted_square(error, torch.zeros_like(error), weight)[0]) == 3.0


def test_head_targets_hold_gaze_and_openings_relative_to_the_face() -> None:
    rng = np.random.default_rng(0)
    points = rng.uniform(0, 128, (4, 68, 3)).astype(np.float32)
    gaze = rng.uniform(0, 128, (4, 2, 2)).astype(np.float32)
    parameters = rng.standard_normal((4, 7)).astype(np.float32)
    targets = head_targets(points, gaze, parameters)
    moved = head_targets(points + 5, gaze + 5, parameters)
    starts = np.cumsum((0, *targets.sizes))
    np.testing.assert_allclose(
        targets.values[:, starts[3] :], moved.values[:, starts[3] :], atol=1e-4
    )
    np.testing.assert_allclose(
        moved.values[:, starts[1] : starts[3]] - targets.values[:, starts[1] : starts[3]],
        5, atol=1e-4,
    )  # fmt: skip


def test_groups_count_by_their_weight_not_by_their_length() -> None:
    sizes = (2, 10, 4, 4, 1)
    weights = group_weights(sizes)
    sums = [part.sum() for part in np.split(weights, np.cumsum(sizes)[:-1])]
    wanted = np.array(GROUP_WEIGHTS) / sum(GROUP_WEIGHTS)
    np.testing.assert_allclose(sums, wanted, rtol=FLOAT32_TOLERANCE)


def test_heads_that_say_the_truth_have_no_loss() -> None:
    rng = np.random.default_rng(0)
    targets = head_targets(
        rng.uniform(0, 128, (64, 68, 3)).astype(np.float32),
        rng.uniform(0, 128, (64, 2, 2)).astype(np.float32),
        np.concatenate([rng.standard_normal((64, 2)), np.ones((64, 1))], 1).astype(np.float32),
    )
    heads = Heads(8, targets).requires_grad_(False)
    heads.linear.weight.data.zero_()
    heads.linear.bias.data.zero_()
    z = torch.zeros(1, 8)
    mean = torch.from_numpy(targets.values.mean(0, keepdims=True))
    assert float(heads.loss(z, mean)) == pytest.approx(0, abs=FLOAT32_TOLERANCE)
    assert float(heads.loss(z, mean + 1)) > 0


def test_code_distance_is_in_standard_deviations() -> None:
    wanted = torch.tensor([[-1.0, 0.0], [1.0, 0.0], [0.0, 6.0]])
    deviation = wanted.std(dim=0)
    distance = code_distance(wanted + deviation * torch.tensor([[2.0, 1.0]]), wanted)
    torch.testing.assert_close(distance, torch.full((3,), (2 + 1) / 2))


def test_keypoints_are_landmarks_then_gaze_and_irises_count_most() -> None:
    points, gaze = np.full((1, 68, 3), 5, np.float32), np.full((1, 2, 2), 9, np.float32)
    wanted = torch.from_numpy(keypoint_targets(points, gaze))
    assert (
        wanted.shape == (1, 70, 2) and (wanted[0, :68] == 5).all() and (wanted[0, 68:] == 9).all()
    )
    assert float(keypoint_distance(wanted + 2, wanted)) == pytest.approx(2), "a mean in px"
    chin, iris = torch.zeros(1, 70, 2), torch.zeros(1, 70, 2)
    chin[0, 8], iris[0, 68] = 1, 1
    assert keypoint_distance(wanted + iris, wanted) > 3 * keypoint_distance(wanted + chin, wanted)


# The run


def test_two_stages_end_with_weights_curves_and_sheets(recipe_path: Path, tmp_path: Path) -> None:
    folder = loop.train(recipe_path, out=tmp_path / "run", device="cpu")
    assert (tmp_path / "face.safetensors").stat().st_size > 0
    lines = [json.loads(line) for line in (folder / "curves.jsonl").read_text().splitlines()]
    steps = [(line["stage"], line["step"]) for line in lines if "stage" in line]
    assert steps == [("autoencoder", i) for i in range(1, 5)] + [("reenact", 1), ("reenact", 2)]
    sheets = [line["psnr"] for line in lines if "psnr" in line]
    assert len(sheets) == 2 and "z only" in sheets[0]
    assert "reenactment T=4" in sheets[1] and "reenactment T=4" not in sheets[0]
    assert len(list(folder.glob("sheet-*.png"))) == 2
    assert not list(folder.glob(".part-*"))


def test_a_run_cut_short_gives_weights_from_its_last_checkpoint(
    recipe_path: Path, tmp_path: Path
) -> None:
    first, second = load_recipe(recipe_path).stages
    run = trainer(recipe_path, tmp_path / "run")
    run.recipe = replace(run.recipe, stages=(first,))
    run.run()  # ends with the second stage not begun
    with pytest.raises(SettingsError, match="stage 2 of 2, step 0: .* not trained"):
        loop.finish_early(recipe_path, out=tmp_path / "run")
    run.recipe = replace(run.recipe, stages=(first, replace(second, images=800)))
    stop_after(run, 1)
    assert not run.run()
    path = loop.finish_early(recipe_path, out=tmp_path / "run")
    stored = weights.load(path)
    assert set(stored.parts) == {"render", "encoder", "reenactment"}
    assert stored.provenance["complete"] is False and stored.provenance["images_seen"] == 20
    name = "input_blocks.0.0.weight"
    averaged = run.state.ema["unet"].state_dict()[name]
    torch.testing.assert_close(stored.parts["render"][name], averaged.half())


def test_a_stopped_run_resumes_as_if_it_had_not_stopped(recipe_path: Path, tmp_path: Path) -> None:
    whole = trainer(recipe_path, tmp_path / "whole")
    whole.recipe = replace(whole.recipe, stages=(plain_stage(),))
    whole.run()
    first = trainer(recipe_path, tmp_path / "halves")
    first.recipe = whole.recipe
    stop_after(first, 2)
    assert not first.run()
    second = trainer(recipe_path, tmp_path / "halves")
    second.recipe = whole.recipe
    second.resume()
    assert second.state.progress.step == 2
    assert second.run()
    for name, value in whole.state.live.state_dict().items():
        torch.testing.assert_close(
            second.state.live.state_dict()[name], value, atol=1e-6, rtol=1e-5, msg=name
        )


def test_slices_of_a_run_are_the_run(
    recipe_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("INFO")
    whole, sliced = (tmp_path / name for name in ("whole.safetensors", "sliced.safetensors"))
    text = recipe_path.read_text()
    for path, slices in ((whole, [None]), (sliced, [0.0, 0.0, 60.0])):  # of no time: a step
        recipe_path.write_text(text.replace(str(tmp_path / "face.safetensors"), str(path)))
        for minutes in slices:
            assert not path.exists()
            loop.train(recipe_path, out=tmp_path / path.stem, device="cpu", minutes=minutes)
    assert "stopped in stage 1 of 2, 25 % of it done; --resume goes on" in caplog.text
    assert "stopped in stage 1 of 2, 50 % of it done" in caplog.text
    one, other = (weights.load(path).parts for path in (whole, sliced))
    for part, tensors in one.items():
        for name, tensor in tensors.items():
            assert torch.equal(other[part][name], tensor), (part, name)


def test_a_new_run_leaves_the_checkpoint_of_another_alone(
    recipe_path: Path, tmp_path: Path
) -> None:
    run = trainer(recipe_path, tmp_path / "run")
    run.save()
    (checkpoint,) = (tmp_path / "run").iterdir()
    before = checkpoint.read_bytes()
    with pytest.raises(SettingsError, match=r"checkpoint-.* is .* --resume, .* with -o"):
        loop.train(recipe_path, out=tmp_path / "run", device="cpu")
    assert checkpoint.read_bytes() == before


def test_weights_lie_in_the_run_s_folder_unless_the_recipe_says_where(
    recipe_path: Path, tmp_path: Path
) -> None:
    text = recipe_path.read_text()
    recipe_path.write_text("\n".join(x for x in text.splitlines() if not x.startswith("weights")))
    loop.train(recipe_path, out=tmp_path / "run", device="cpu")
    assert weights.load(tmp_path / "run" / "weights.safetensors").provenance["complete"]


def test_no_recipe_overwrites_what_is_shipped() -> None:
    shipped = Path("training/checkpoints")
    for path in RECIPES.glob("*.toml"):
        if path.stem in ("guide128", "judge128"):  # made to be kept there
            continue
        assert Path(load_recipe(path).weights).parent != shipped, path.name


def test_a_step_that_is_no_number_ends_the_run_and_spoils_nothing(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    run, turns = trainer(recipe_path, tmp_path / "run"), itertools.count()
    run.save()
    gradients = run._gradients

    def spoilt(*arguments: object) -> dict[str, torch.Tensor]:
        parts = gradients(*arguments)  # type: ignore[arg-type]
        if next(turns) == 2:
            for parameter in run.state.live["unet"].parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(float("nan"))
        return parts

    monkeypatch.setattr(run, "_gradients", spoilt)
    kept = savepoints.newest(tmp_path / "run")
    assert kept is not None
    before = kept.read_bytes()
    with pytest.raises(loop.TrainingDiverged, match=r"step 2: .*--resume, lower lr"):
        run.run()
    assert savepoints.newest(tmp_path / "run") == kept and kept.read_bytes() == before
    assert all(bool(value.isfinite().all()) for value in run.state.live.state_dict().values())


def test_curves_tell_the_rate_and_begin_with_their_run(recipe_path: Path, tmp_path: Path) -> None:
    (tmp_path / "run").mkdir()
    curves = tmp_path / "run" / "curves.jsonl"
    curves.write_text('{"stage": "of a run that was killed before it had saved"}\n')
    run = trainer(recipe_path, tmp_path / "run")
    rates = []
    step = run._step

    def seen(*arguments: object) -> dict[str, torch.Tensor]:
        parts = step(*arguments)  # type: ignore[arg-type]
        rates.append(run.optimizer.param_groups[0]["lr"])
        return parts

    run._step = seen  # type: ignore[method-assign,assignment]
    run.run()
    lines = [json.loads(line) for line in curves.read_text().splitlines()]
    told = [line["lr"] for line in lines if "lr" in line]
    assert "of a run" not in curves.read_text()
    assert told == pytest.approx(rates, rel=1e-4) and len(set(told)) > 2


def test_tensorboard_holds_what_the_lines_hold(recipe_path: Path, tmp_path: Path) -> None:
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    loop.train(recipe_path, out=tmp_path / "run", device="cpu")
    lines = [json.loads(x) for x in (tmp_path / "run" / "curves.jsonl").read_text().splitlines()]
    events = reader.EventAccumulator(str(tmp_path / "run" / "tensorboard")).Reload()
    told = {line["seen"]: line["denoising"] for line in lines if line.get("stage") == "autoencoder"}
    found = {event.step: event.value for event in events.Scalars("autoencoder/denoising")}
    assert found == pytest.approx(told) and len(found) == 4
    assert events.Tags()["images"], "no sample sheet"


def test_weights_name_every_recipe_of_their_run(
    recipe_path: Path, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    run = trainer(recipe_path, tmp_path / "run")
    run.save()
    digests = [run.recipe.digest]
    for line in ("", "# edited\n", "# and again\n"):
        recipe_path.write_text(recipe_path.read_text() + line)
        run = trainer(recipe_path, tmp_path / "run")
        caplog.clear()
        run.resume()
        assert len(caplog.records) == (line != "")
        if line:
            digests.append(run.recipe.digest)
            assert digests[-2] in caplog.text and digests[-1] in caplog.text
        run.save()
    loop.finish(run.state, run.recipe, Path(run.recipe.weights))
    provenance = weights.load(run.recipe.weights).provenance
    assert provenance["earlier_recipes_sha256"] == digests[:2]
    assert provenance["recipe_sha256"] == digests[2]


def plain_stage() -> StageRecipe:
    return StageRecipe("autoencoder", images=16, batch=4, cached_noise=0.0, warmup_steps=1)


def stop_after(run: loop.Trainer, steps: int) -> None:
    step = run._step

    def counting(*arguments: object) -> dict[str, torch.Tensor]:
        parts = step(*arguments)  # type: ignore[arg-type]
        run.stop = run.state.progress.step >= steps
        return parts

    run._step = counting  # type: ignore[method-assign,assignment]


def test_a_run_begins_from_finished_weights(recipe_path: Path, tmp_path: Path) -> None:
    first = trainer(recipe_path, tmp_path / "first")
    for parameter in first.state.ema.parameters():
        parameter.data.uniform_(-0.5, 0.5)
    first.state.has_reenactment = True
    path = tmp_path / "start.safetensors"
    loop.finish(first.state, first.recipe, path)
    run = loop.Trainer(
        replace(first.recipe, start=str(path)), tmp_path / "second", alone(torch.device("cpu"))
    )
    run._begin(replace(first.recipe.stages[-1], kind="reenact"))
    for name in ("unet", "encoder", "reenactment"):
        for networks in (run.state.live, run.state.ema):
            for key, value in networks[name].state_dict().items():
                wanted = first.state.ema[name].state_dict()[key].half().float()
                torch.testing.assert_close(value, wanted)


def test_an_encoder_that_no_stage_trained_is_not_written(recipe_path: Path, tmp_path: Path) -> None:
    run, path = trainer(recipe_path, tmp_path / "run"), tmp_path / "weights.safetensors"
    assert not run.state.has_reenactment
    loop.finish(run.state, run.recipe, path)
    assert "reenactment" not in weights.load(path).parts
    run.state.has_reenactment = True
    loop.finish(run.state, run.recipe, path)
    assert "reenactment" in weights.load(path).parts


def test_weights_of_another_network_start_nothing(
    recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = trainer(recipe_path, tmp_path / "first")
    path = tmp_path / "start.safetensors"
    loop.finish(first.state, first.recipe, path)
    wider = replace(first.state.config, channels=2 * first.state.config.channels)
    monkeypatch.setattr(state, "PRESETS", {"tiny": wider})
    with pytest.raises(SettingsError, match="start"):
        loop.Trainer(
            replace(first.recipe, start=str(path)), tmp_path / "second", alone(torch.device("cpu"))
        )


def test_the_reenactment_encoder_starts_as_the_averaged_encoder(
    recipe_path: Path, tmp_path: Path
) -> None:
    run = trainer(recipe_path, tmp_path / "run")
    for parameter in run.state.ema["encoder"].parameters():
        parameter.data.normal_()
    run.state.start_reenactment(gain=1.5)
    source, drawing = torch.rand(2, 3, 32, 32), torch.full((2, 3, 32, 32), BACKGROUND)
    z = run.state.ema["encoder"](source)
    torch.testing.assert_close(run.state.live["reenactment"](source, drawing), z)
    torch.testing.assert_close(run.state.ema["reenactment"](source, drawing), z)
    torch.testing.assert_close(run.state.live["encoder"](source), z)
    drawing[..., 10:12, 10:20] = 1.0
    assert not torch.allclose(run.state.live["reenactment"](source, drawing), z), "lines are seen"


@pytest.mark.parametrize("matrix_lr", [0.0, 0.02])
def test_a_scene_stage_teaches_both_encoders_where_things_are(
    recipe_path: Path, tmp_path: Path, matrix_lr: float
) -> None:
    run = trainer(recipe_path, tmp_path / "run")
    stage = replace(
        run.recipe.stages[1], kind="scene", images=4 * 60, lr=5e-3, matrix_lr=matrix_lr,
        cached_noise=0.0, drawing_gain=1.5,
    )  # fmt: skip
    run.recipe = replace(run.recipe, stages=(stage,), loss=LossRecipe(keypoints=1.0))
    before = {name: value.clone() for name, value in run.state.live["unet"].state_dict().items()}
    run.run()
    lines = (tmp_path / "run" / "curves.jsonl").read_text().splitlines()
    curve = [row for line in lines if "stage" in (row := json.loads(line))]
    assert not list((tmp_path / "run").glob("sheet-*")), "there is no decoder to show"
    for name in ("keypoints of z_t", "keypoints of z_r"):
        assert curve[-1][name] < 0.8 * curve[0][name]
    moved = {
        name for name, value in run.state.live["unet"].state_dict().items()
        if not torch.equal(value, before[name])
    }  # fmt: skip
    layer = "keypoint_map.cond_emb_layers.1"
    assert moved == {f"{layer}.weight", f"{layer}.bias"}


def test_the_next_stage_keeps_the_reenactment_encoder_of_a_scene_stage(
    recipe_path: Path, tmp_path: Path
) -> None:
    run = trainer(recipe_path, tmp_path / "run")
    scene = replace(run.recipe.stages[1], kind="scene", images=8, cached_noise=0.0)
    run.recipe = replace(run.recipe, stages=(scene, run.recipe.stages[1]))
    run._begin(scene)
    run.state.progress.next_stage()
    run.state.live["reenactment"].zero_conv_1.weight.data.fill_(0.25)
    run._begin(run.recipe.stages[1])
    assert (run.state.live["reenactment"].zero_conv_1.weight == 0.25).all()


def test_true_keypoints_fade_out(recipe_path: Path, tmp_path: Path) -> None:
    run = trainer(recipe_path, tmp_path / "run")
    stage = replace(run.recipe.stages[1], batch=64, true_keypoints_until=0.5, cached_noise=0.0)
    batch = PairSampler(run.pool, 4, stage, InversionCache(1, 32), (1,))(0)

    def share(fraction: float) -> float:
        generator = torch.Generator().manual_seed(0)
        sample = to_sample(batch, run.recipe, stage, generator, fraction)
        return float(sample.true_keypoints.float().mean())

    assert share(0) == 1 and share(0.5) == 0 and share(0.9) == 0
    assert 0.25 < share(0.25) < 0.75


def test_training_lowers_the_error_on_what_it_sees(recipe_path: Path, tmp_path: Path) -> None:
    run = trainer(recipe_path, tmp_path / "run")
    low_noise = 4.0  # the picture shows through: what there is to learn is learnt in few steps
    stage = replace(plain_stage(), images=4 * 30, lr=3e-3, timestep_power=low_noise)
    run.recipe = replace(
        run.recipe,
        stages=(stage,),
        loop=LoopRecipe(log_every_steps=10, fused_norm=False, bf16=False),
    )
    run.run()
    lines = (tmp_path / "run" / "curves.jsonl").read_text().splitlines()
    curve = [json.loads(line) for line in lines if "denoising" in line]
    assert curve[-1]["denoising"] < 0.7 * curve[0]["denoising"]


def test_the_rate_warms_up_and_falls_to_zero(recipe_path: Path, tmp_path: Path) -> None:
    run = trainer(recipe_path, tmp_path / "run")
    stage = replace(plain_stage(), images=1000, warmup_steps=10, minutes=1.0)
    progress = run.state.progress
    assert rate(stage, run.state) == pytest.approx(0.1)
    progress.step, progress.images = 100, 500
    assert rate(stage, run.state) == pytest.approx(0.5)
    progress.seconds = 60.0  # the minutes are over before the images are
    assert fraction(stage, run.state) == 1
    assert rate(stage, run.state) == pytest.approx(0)


def test_the_average_follows_by_its_decay(recipe_path: Path, tmp_path: Path) -> None:
    run = trainer(recipe_path, tmp_path / "run")
    live = next(run.state.live["unet"].parameters())
    averaged = next(run.state.ema["unet"].parameters())
    before = averaged.clone()
    live.data.add_(1)
    run.state.average(0.75, ["unet"])
    torch.testing.assert_close(averaged.data, before + 0.25)


def test_refusals(recipe_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = trainer(recipe_path, tmp_path / "run")
    with pytest.raises(SettingsError, match="run without --resume"):
        run.resume()
    (tmp_path / "run" / "last.pt").write_bytes(b"of an earlier version")
    with pytest.raises(SettingsError, match=r"last\.pt .* begin a new one from the weights"):
        run.resume()
    recipe: Recipe = replace(run.recipe, network="huge")
    with pytest.raises(SettingsError, match="network = 'huge'"):
        State(recipe, loop._statistics(run.pool, 4), torch.device("cpu"))
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(DeviceError, match="--device cpu"):
        loop.choose_device("cuda")
