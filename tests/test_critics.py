"""The critics: what each is shown, which network is asked, and the files that they come from."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from diffusionact import morphable
from diffusionact.errors import SettingsError
from diffusionact.landmarks import fit_similarity
from diffusionact.runtime.published import emoca as emoca_crop
from diffusionact.runtime.published import gaze as gaze_crop
from diffusionact.training import critic_inputs as inputs
from diffusionact.training.config import CriteriaRecipe, CriticRecipe, parse_recipe
from diffusionact.training.critics import ASKS, GUIDES, Critics, FaceModel, open_critics
from diffusionact.training.models.frozen import CRITICS, Emoca, FrozenNetwork, Gaze
from diffusionact.training.models.guide import Guide, GuideConfig, load_guide, save_guide
from diffusionact.training.origins import ORIGINS
from tests.small_critics import (
    SIDE,
    SmallCodes,
    by_rule,
    face_model,
    guide_critics,
    pictures,
    published_critics,
    slope,
)
from tests.test_flame import emoca_state, synthetic

pytestmark = pytest.mark.torch

EXACT = 1e-10  # float64, some hundred operations on values near 1
SINGLE = 1e-4  # float32 crops of the runtime against float64 ones, normalised colours
PIXELS = 1e-4  # a model stored as float32, px at coordinates of some hundred
DIFFERENCE = 1e-5  # of a slope by central differences, relative
OFF = dict.fromkeys(asdict(CriteriaRecipe()), 0.0)


def face_points(seed: int = 0, side: int = 64) -> np.ndarray[Any, Any]:
    """Points with the five of the template where a tilted face of the picture has them."""
    rng = np.random.default_rng(seed)
    return rng.uniform(0.2 * side, 0.8 * side, (68, 2))


# What a network is shown.


def test_the_similarity_is_umeyama_s() -> None:
    rng = np.random.default_rng(0)
    source, target = rng.normal(size=(5, 2)), rng.normal(size=(5, 2))
    scale, rotation, offset = fit_similarity(source, target)
    found = inputs.similarity(*(torch.from_numpy(v)[None] for v in (source, target)))[0].numpy()
    assert np.allclose(found, np.column_stack([scale * rotation, offset]), atol=EXACT)


@pytest.mark.parametrize("seed", range(3))
def test_crops_are_the_published_tracker_s(seed: int) -> None:
    x, points = pictures(1, seed, 64), face_points(seed)
    points_t = torch.from_numpy(points)[None]
    image = x[0].permute(1, 2, 0).float().numpy()
    expected = gaze_crop.crop(image, points, 224)
    assert np.allclose(inputs.for_gaze(x, points_t, 224).numpy(), expected, atol=SINGLE)
    expected = emoca_crop.crop((image + 1) / (2 + 1e-5), points, 224)
    assert np.allclose(inputs.for_emoca(x, points_t).numpy(), expected, atol=SINGLE)


def test_without_points_the_face_is_where_ffhq_s_crop_has_it() -> None:
    side = 256
    ramps = torch.arange(side, dtype=torch.float64)
    x = torch.stack([ramps.expand(side, side), ramps[:, None].expand(side, side)])[None]
    crop = inputs.aligned(x, None, 112)[0]
    # its columns are those of the picture from 32 to 220, its rows from 35 to 223
    places = (torch.arange(112).double() + 0.5) * 188 / 112 - 0.5
    assert torch.allclose(crop[0, 5], places + 32, atol=1e-9)
    assert torch.allclose(crop[1, :, 5], places + 35, atol=1e-9)


def test_without_points_emoca_sees_the_picture_from_corner_to_corner() -> None:
    x = pictures(1, 4, 64)
    crop = inputs.for_emoca(x, None)
    corners = ((x[..., ::63, ::63] + 1) / (2 + 1e-5)).flatten()
    assert torch.allclose(crop[..., ::223, ::223].flatten(), corners, atol=EXACT)


def test_whole_pictures_keep_their_colours() -> None:
    grey = torch.zeros(1, 3, 40, 40, dtype=torch.float64)
    for made, (mean, deviation) in (
        (inputs.for_farl(grey, 16), inputs.CLIP),
        (inputs.for_bisenet(grey, 64), inputs.IMAGENET),
        (inputs.imagenet(grey), inputs.IMAGENET),
    ):
        expected = [(0.5 - m) / d for m, d in zip(mean, deviation, strict=True)]
        assert torch.allclose(made.mean((0, 2, 3)), torch.tensor(expected).double(), atol=1e-6)
        assert float(made.std((2, 3)).max()) < 1e-9


@pytest.mark.parametrize(
    "shown",
    [
        lambda x, p: inputs.for_arcface(x, p, 20),
        lambda x, p: inputs.for_gaze(x, p, 24),
        lambda x, p: inputs.for_arcface(x, None, 20),
        inputs.for_emoca,
        lambda x, _: inputs.for_farl(x, 16),
        lambda x, _: inputs.for_bisenet(x, 50),
    ],
)
def test_what_is_shown_passes_gradients_to_the_picture(
    shown: Callable[[Tensor, Tensor], Tensor],
) -> None:
    points = torch.from_numpy(face_points())[None].requires_grad_(True)
    x = 0.9 * pictures(1, 2, 64)
    by_autograd, by_difference = slope(lambda v: shown(v, points).square().mean(), x)
    assert by_autograd == pytest.approx(by_difference, rel=DIFFERENCE) and by_autograd != 0
    shown(x.requires_grad_(True), points).sum().backward()  # type: ignore[no-untyped-call]
    assert points.grad is None


# What EMOCA's codes become.


def test_a_face_s_landmarks_are_flame_s_in_the_crop() -> None:
    codes, model = by_rule(SmallCodes()), face_model()
    x = (pictures(2, 3, 64) + 1) / 2
    points, _ = by_rule(FaceModel(codes, model))(x)
    shape, expression, pose, camera = (code.numpy() for code in codes(x))
    expected = morphable.flame_pixels(model.landmarks(shape, expression, pose), camera)
    assert np.allclose(points.numpy(), expected[..., :2], atol=PIXELS)


@pytest.mark.parametrize(
    ("turn", "degrees"),
    [
        # about FLAME's axes (x right, y up, z to the camera) -> yaw, pitch, roll of the picture
        ((0.0, 0.5, 0.0), (np.degrees(0.5), 0, 0)),
        ((0.3, 0.0, 0.0), (0, np.degrees(0.3), 0)),
        ((0.0, 0.0, -0.2), (0, 0, np.degrees(0.2))),
    ],
)
def test_a_head_s_turn_is_yaw_pitch_and_roll(
    turn: tuple[float, ...], degrees: tuple[float, ...]
) -> None:
    class Turned(nn.Module):
        def forward(self, image: Tensor) -> tuple[Tensor, ...]:
            pose = torch.tensor([[*turn, 0.1, 0.2, 0.3]])
            return torch.zeros(1, 100), torch.zeros(1, 50), pose, torch.ones(1, 3)

    model = FaceModel(Turned(), face_model())
    points, angles = model(torch.zeros(1, 3, 8, 8))
    assert points.shape == (1, 68, 2)
    # the same turn as our own face's, whose axes are the picture's
    flip = np.diag([1.0, -1.0, -1.0])
    matrix = flip @ morphable.axis_angle(np.array(turn)) @ flip
    assert np.allclose(morphable.rotation(angles[0].double().numpy()), matrix, atol=1e-6)
    assert np.allclose(np.abs(angles[0].numpy()), np.abs(degrees), atol=1e-3)


# Which network is asked.


def test_the_guide_is_asked_as_it_is() -> None:
    sizes = GuideConfig(image_size=SIDE, channels=(4, 6, 8, 8), eye_channels=(4, 4), eye_px=8.0,
                        eye_cells=8, embed=5)  # fmt: skip
    torch.manual_seed(0)
    guide = Guide(sizes).eval()
    critics, x = Critics({"guide": guide}), pictures(2, 1).float()
    for name in ("identity", "style", "landmarks", "gaze", "head_pose"):
        assert torch.allclose(getattr(critics, name)(x), getattr(guide, name)(x), atol=1e-5)
    for ours, theirs in zip(critics.features(x), guide.features(x), strict=True):
        assert torch.allclose(ours, theirs, atol=1e-5)


def test_every_network_runs_once_a_picture_and_only_when_asked() -> None:
    critics, x = published_critics(), pictures(1, 1)
    runs: list[str] = []
    for name, network in critics.networks.items():
        network.register_forward_hook(lambda *_, name=name: runs.append(name))
    reading = critics.read(x)
    assert sorted(runs) == ["arcface", "emoca", "farl", "vgg19", "xgaze"]
    assert all(value is not None for value in vars(reading).values())
    runs.clear()
    reading = critics.read(x, asked=frozenset({"head_pose"}))
    assert runs == ["emoca"] and reading.head_pose is not None
    assert reading.landmarks is None and reading.features is None
    assert critics.identity(x).norm(dim=1).allclose(torch.ones(1, dtype=torch.float64))


def test_a_published_file_is_asked_before_the_guide_and_the_guide_for_the_rest() -> None:
    whole, guide, x = published_critics(), guide_critics(), pictures(2, 1)
    networks: dict[str, nn.Module] = {
        "guide": guide.networks["guide"], "arcface": whole.networks["arcface"]
    }  # fmt: skip
    mixed = Critics(networks)
    assert torch.equal(mixed.identity(x), whole.identity(x))
    for name in ("style", "landmarks", "gaze", "head_pose"):
        assert torch.equal(getattr(mixed, name)(x), getattr(guide, name)(x))


def test_a_guide_of_another_size_is_refused() -> None:
    with pytest.raises(SettingsError, match="guide reads pictures of 32 px, these have 64"):
        guide_critics().gaze(pictures(1, 1, 64))


def test_the_background_is_exact_where_there_are_labels() -> None:
    labels = torch.tensor([[[0, 1], [7, 0]]], dtype=torch.uint8)
    mask = guide_critics().background(torch.zeros(1, 3, 2, 2), labels)
    assert mask.tolist() == [[[[1, 0], [0, 1]]]]
    with pytest.raises(SettingsError, match="(?s)bisenet = .* for background.*dataset with masks"):
        guide_critics().background(torch.zeros(1, 3, 2, 2), None)


def test_bisenet_s_background_is_the_share_of_its_first_class() -> None:
    class Halves(nn.Module):
        """Background on the left with certainty, one of five parts on the right."""

        def forward(self, image: Tensor) -> Tensor:
            logits = torch.zeros(len(image), 5, *image.shape[2:], dtype=image.dtype)
            logits[:, 0, :, : image.shape[3] // 2] = 50
            return logits

    mask = Critics({"bisenet": Halves()}).background(pictures(1, 1), None)
    assert mask.shape == (1, 1, SIDE, SIDE)
    assert torch.allclose(mask[..., :15], torch.ones(1).double())
    assert torch.allclose(mask[..., 17:], torch.full((1,), 0.2).double())


# The files that they come from.


def ones(network: type[FrozenNetwork]) -> dict[str, Tensor]:
    """A published state dict, all ones, on as good as no memory and disk."""
    with torch.device("meta"):
        names = network().state_dict()
    return {name: torch.ones(1).expand(value.shape) for name, value in names.items()}


def write_published(folder: Path, field: str) -> Path:
    """The file that `field` of [critics] names, in the form in which it is published."""
    path = folder / f"{field}.pth"
    if field in CRITICS:
        state = ones(CRITICS[field])
        if field == "vgg19":  # its last layers tell it apart
            state |= {"features.34.weight": torch.ones(1).expand(512, 512, 3, 3)}
        torch.save({"state_dict": state} if field == "farl" else state, path)
    elif field == "xgaze":
        torch.save({"model_state": ones(Gaze)}, path)
    else:
        state = {f"deca.{name}": value for name, value in ones(Emoca).items()}
        torch.save({"state_dict": emoca_state(synthetic()) | state}, path)
    return path


@pytest.mark.parametrize("field", sorted(set(ASKS.values())))
def test_a_published_file_becomes_its_critic(field: str, tmp_path: Path) -> None:
    path = write_published(tmp_path, field)
    weights = replace(CriteriaRecipe(**OFF), **{n: 1.0 for n in ASKS if ASKS[n] == field})
    critics = open_critics(CriticRecipe(**{field: str(path)}), weights, masks=False)
    assert set(critics.networks) == {field}
    assert not any(p.requires_grad for p in critics.parameters())
    assert isinstance(critics.networks[field], FaceModel if field == "emoca" else FrozenNetwork)


def test_a_file_in_another_s_place_is_told(tmp_path: Path) -> None:
    weights = replace(CriteriaRecipe(**OFF), style=1.0)
    path = write_published(tmp_path, "bisenet")
    with pytest.raises(SettingsError, match="is the file of BiSeNet.*Wanted here: FaRL"):
        open_critics(CriticRecipe(farl=str(path)), weights)


def test_all_files_that_are_not_there_are_told_at_once(tmp_path: Path) -> None:
    weights = replace(CriteriaRecipe(**OFF), style=1.0, identity=1.0, perceptual=1.0)
    lost = {name: str(tmp_path / f"no_{name}.pth") for name in ("farl", "arcface")}
    there = {"vgg19": str(write_published(tmp_path, "vgg19"))}
    with pytest.raises(SettingsError, match="The ways on") as raised:
        open_critics(CriticRecipe(**lost, **there), weights)
    for name, path in lost.items():
        assert f'{name} = "{path}" for ' in str(raised.value)
    assert str(raised.value).count("(no such file)") == 2 and "vgg19" not in str(raised.value)


def test_nothing_given_names_every_file_its_licence_and_the_ways_on() -> None:
    with pytest.raises(SettingsError) as raised:
        open_critics(CriticRecipe(), CriteriaRecipe(), masks=False)
    said = str(raised.value)
    for kind in ("vgg19", "arcface", "farl", "bisenet", "emoca", "gaze"):
        origin = ORIGINS[kind]
        assert origin.file in said and origin.url in said and origin.licence in said
    assert "for shape and head_pose" in said
    assert "perceptual = 0" in said and "guide.safetensors" in said and "with masks" in said


def test_a_guide_serves_all_but_the_masks_of_real_pictures(tmp_path: Path) -> None:
    path = tmp_path / "guide.safetensors"
    sizes = GuideConfig(image_size=SIDE, channels=(4, 6, 8, 8), eye_channels=(4, 4), embed=5)
    save_guide(path, Guide(sizes), {})
    recipe = CriticRecipe(guide=str(path))
    critics = open_critics(recipe, CriteriaRecipe())
    assert set(critics.networks) == {"guide"} and load_guide(path).config == sizes
    with pytest.raises(SettingsError) as raised:
        open_critics(recipe, CriteriaRecipe(), masks=False)
    assert "bisenet" in str(raised.value) and "vgg19" not in str(raised.value)
    only_pixels = replace(CriteriaRecipe(**OFF), pixel=1.0)
    assert not open_critics(CriticRecipe(guide="nowhere"), only_pixels, masks=False).networks


def test_every_loss_but_the_pixels_asks_a_network() -> None:
    assert set(ASKS) == set(OFF) - {"pixel"} == GUIDES | {"background"}
    assert set(ASKS.values()) <= set(asdict(CriticRecipe()))


RECIPE = """\
name = "a"
network = "face128"
[pool]
folder = "p"
[[stages]]
kind = "scene"
images = 8
"""


def test_a_recipe_says_critics_and_weights() -> None:
    text = RECIPE + '[critics]\nguide = "g"\nfarl = "f"\n[criteria]\nshape = 0\nstyle = 3\n'
    recipe = parse_recipe(text)
    assert recipe.critics == CriticRecipe(guide="g", farl="f")
    assert recipe.criteria == CriteriaRecipe(shape=0, style=3)
    assert parse_recipe(RECIPE).criteria == CriteriaRecipe()
    for wrong in ("-1", "nan", "inf"):
        with pytest.raises(SettingsError, match=r"\[criteria\]: gaze = .*, wanted 0 or above"):
            parse_recipe(f"{RECIPE}[criteria]\ngaze = {wrong}\n")
    with pytest.raises(SettingsError, match="unknown setting lpips; known: .*vgg19"):
        parse_recipe(f'{RECIPE}[critics]\nlpips = "x"\n')
