"""The networks against the published ones: names, shapes, sizes and outputs."""

from __future__ import annotations

import dataclasses
import gzip
import json
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffusionact import schedule
from diffusionact.errors import SettingsError
from diffusionact.training.models import (
    FACE128,
    FFHQ64,
    FFHQ128,
    FFHQ256,
    Autoencoder,
    NetworkConfig,
    ReenactmentEncoder,
    SemanticEncoder,
    UNet,
)
from diffusionact.training.models.blocks import group_count, resample
from tests.golden import rule

pytestmark = pytest.mark.torch

GOLDEN = Path(__file__).parent / "golden"

# Largest differences of a correct float32 implementation on another backend; two CPU convolution
# backends of PyTorch differ by 5 to 30 times less, typical mistakes by more than 0.2.
CODE = 2e-5
TIME = 1e-6
MODULATION = 5e-6
ACTIVATION = 1e-4
EPS = 5e-5
SAMPLED = 2e-3  # ten steps magnify a difference wherever a pixel is close to the clip
FLOW = 2e-2  # inversion and render
SAMPLED_MEAN = 1e-4

SMALL = NetworkConfig(64, 32, (1, 2, 2), (1, 2, 2, 2), embed=64)
TINY = dataclasses.replace(
    FACE128, image_size=32, channels=8, attention_at=(2,), embed=16, encoder_mult=(1, 2, 3)
)


@cache
def golden_tables() -> dict[str, Any]:
    tables: dict[str, Any] = json.loads(gzip.decompress((GOLDEN / "networks.json.gz").read_bytes()))
    return tables


@cache
def golden() -> dict[str, np.ndarray[Any, Any]]:
    return dict(np.load(GOLDEN / "network_small.npz"))


@cache
def inputs(size: str = "small") -> dict[str, Tensor]:
    listed = golden_tables()[size]["inputs"].items()
    return {k: torch.from_numpy(rule.tensor(d["name"], d["shape"], d["kind"])) for k, d in listed}


def with_golden_weights(network: nn.Module, prefix: str, size: str = "small") -> Any:
    weights = rule.part(golden_tables()[size]["keys"], prefix)
    network.load_state_dict({name: torch.from_numpy(value) for name, value in weights.items()})
    return network.eval().requires_grad_(False)


@cache
def autoencoder(which: str) -> Autoencoder:
    """The small `model` or `ema_model`."""
    network: Autoencoder = with_golden_weights(Autoencoder(SMALL), f"state_dict_diff/{which}.")
    return network


@cache
def reenactment() -> ReenactmentEncoder:
    network: ReenactmentEncoder = with_golden_weights(ReenactmentEncoder(SMALL), "state_dict_net/")
    return network


def assert_close(seen: Tensor, name: str, limit: float, mean: float | None = None) -> None:
    due = golden()[name]
    if due.ndim == 4:
        stride = seen.shape[-1] // due.shape[-1]
        seen = seen[..., ::stride, ::stride]
    difference = np.abs(seen.numpy() - due)
    assert difference.shape == due.shape
    assert difference.max() <= limit
    if mean is not None:
        assert difference.mean() <= mean


def shapes(network: nn.Module, prefix: str) -> dict[str, list[int]]:
    return {prefix + name: list(value.shape) for name, value in network.state_dict().items()}


@pytest.mark.parametrize(("size", "config"), [("small", SMALL), ("full", FFHQ256)])
def test_names_and_shapes_are_those_of_the_published_checkpoints(
    size: str, config: NetworkConfig
) -> None:
    with torch.device("meta"):
        network, encoder = Autoencoder(config), ReenactmentEncoder(config)
    seen = {
        **shapes(network, "state_dict_diff/model."),
        **shapes(network, "state_dict_diff/ema_model."),
        **shapes(encoder, "state_dict_net/"),
    }
    assert seen == golden_tables()[size]["keys"]


@pytest.mark.parametrize(
    ("config", "unet", "encoder", "unet_gmac", "encoder_gmac"),
    [
        (FFHQ256, 138_341_891, 30_150_400, 277.217542144, 35.396255744),
        (FFHQ128, 103_871_619, 24_673_536, 73.86, 9.50),
        (FFHQ64, 71_518_723, 19_320_512, 13.36, 1.53),
    ],
)
def test_parameters_and_operations_are_the_published_ones(
    config: NetworkConfig, unet: int, encoder: int, unet_gmac: float, encoder_gmac: float
) -> None:
    side = config.image_size
    with torch.device("meta"):
        networks: list[nn.Module] = [UNet(config), SemanticEncoder(config)]
    x, t, z = (torch.zeros(shape, device="meta") for shape in ((1, 3, side, side), (1,), (1, 512)))
    assert [sum(p.numel() for p in n.parameters()) for n in networks] == [unet, encoder]
    assert gmac(lambda: networks[0](x, t, z)) == pytest.approx(unet_gmac, abs=5e-3)
    assert gmac(lambda: networks[1](x)) == pytest.approx(encoder_gmac, abs=5e-3)


def gmac(run: Callable[[], object]) -> float:
    with FlopCounterMode(display=False) as counter:
        run()
    return counter.get_total_flops() / 2e9


def test_the_sum_of_the_modulated_channels_at_full_size() -> None:
    with torch.device("meta"):
        assert UNet(FFHQ256).modulation_size == 12_928


@pytest.mark.parametrize("which", ["model", "ema_model"])
def test_semantic_encoder(which: str) -> None:
    z = autoencoder(which).encode(inputs()["src_img"])
    assert_close(z, "enc_model_src" if which == "model" else "enc_ema_src", CODE)


@pytest.mark.parametrize("which", ["src", "tgt"])
def test_reenactment_encoder(which: str) -> None:
    z = reenactment()(inputs()["src_img"], inputs()[f"stick_{which}"])
    assert_close(z, f"net_{which}", CODE)


def test_the_drawing_enters_by_a_convolution() -> None:
    assert_close(reenactment().zero_conv_1(inputs()["stick_tgt"]), "zero_conv_out", TIME)


def test_time_embedding() -> None:
    t = torch.tensor([0, 450, 950])
    embed = autoencoder("model").time_embed
    assert_close(embed.sinusoids(t), "temb_sincos", TIME)
    assert_close(embed(t), "temb_mlp", TIME)


def test_modulation_layers() -> None:
    network = autoencoder("model")
    block: Any = network.input_blocks[1][0]  # type: ignore[index]
    assert_close(
        block.emb_layers(network.time_embed(torch.tensor([450]))), "mod_time_in1", MODULATION
    )
    assert_close(block.cond_emb_layers(inputs()["z"][:1]), "mod_cond_in1", MODULATION)


def test_activations() -> None:
    network = autoencoder("model")
    watched: dict[str, nn.Module] = {
        "act_input0": network.input_blocks[0],
        "act_input1": network.input_blocks[1][0],  # type: ignore[index]
        "act_input3_down": network.input_blocks[3][0],  # type: ignore[index]
        "act_mid0": network.middle_block[0],
        "act_mid1_attn": network.middle_block[1],
        "act_mid": network.middle_block[2],
        "act_out2_up": network.output_blocks[2][2],  # type: ignore[index]
    }
    seen: dict[str, Tensor] = {}
    hooks = [
        (layer[0] if isinstance(layer, nn.Sequential) else layer).register_forward_hook(
            lambda _layer, _inputs, output, name=name: seen.__setitem__(name, output)
        )
        for name, layer in watched.items()
    ]
    network(inputs()["x_t"][:1], torch.tensor([450]), inputs()["z"][:1])
    for hook in hooks:
        hook.remove()
    for name in watched:
        assert_close(seen[name], name, ACTIVATION)


@pytest.mark.parametrize(
    ("which", "t", "name"),
    [
        ("model", [0, 0], "eps_model_t0"),
        ("model", [450, 450], "eps_model_t450"),
        ("model", [950, 950], "eps_model_t950"),
        ("ema_model", [450, 450], "eps_ema_t450"),
        ("model", [0, 950], "eps_model_tmixed"),
    ],
)
def test_noise_prediction(which: str, t: list[int], name: str) -> None:
    eps = autoencoder(which)(inputs()["x_t"], torch.tensor(t), inputs()["z"])
    assert_close(eps, name, EPS)


def sample(network: UNet, x: Tensor, z: Tensor, run: schedule.Run) -> Iterator[Tensor]:
    """The samples after each step of a run."""
    order = [step.row for step in run.steps]
    for row in order:
        t = torch.full((len(x),), int(run.timesteps[row]))
        levels = (float(run.alpha_bar[row]), float(run.alpha_bar_to[row]))
        x = schedule.ddim_step(run.prediction, x, network(x, t, z), *levels)
        yield x


def render_run() -> schedule.Run:
    return schedule.render_run("eps", schedule.timesteps(10), schedule.alpha_bars())


def inversion_run() -> schedule.Run:
    return schedule.inversion_run("eps", schedule.timesteps(10), schedule.alpha_bars())


def last(samples: Iterator[Tensor]) -> Tensor:
    return list(samples)[-1]


@pytest.mark.parametrize(("which", "name"), [("model", "render"), ("ema_model", "render_ema")])
def test_render(which: str, name: str) -> None:
    samples = list(sample(autoencoder(which), inputs()["x_T"], inputs()["z"], render_run()))
    if which == "model":
        assert_close(samples[0][:1], "render_traj_sample", SAMPLED / 2)
    assert_close(samples[-1], name, SAMPLED, SAMPLED_MEAN)


@pytest.mark.parametrize("which", ["model", "ema_model"])
def test_inversion(which: str) -> None:
    x_T = last(sample(autoencoder(which), inputs()["src_img"], inputs()["z"], inversion_run()))
    assert_close(x_T, f"encode_stochastic_{which.removesuffix('_model')}", SAMPLED, SAMPLED_MEAN)


def test_reenactment_from_end_to_end() -> None:
    given, encode = inputs(), reenactment()
    z_s = encode(given["src_img"], given["stick_src"])
    x_T = last(sample(autoencoder("ema_model"), given["src_img"], z_s, inversion_run()))
    assert_close(x_T, "flow_xT", SAMPLED, SAMPLED_MEAN)
    z_r = encode(given["src_img"], given["stick_tgt"])
    frame = last(sample(autoencoder("model"), x_T, z_r, render_run()))
    assert_close(frame, "flow_out", FLOW, SAMPLED_MEAN)


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_full_size_network() -> None:
    given, due = inputs("full"), np.load(GOLDEN / "network_full.npz")
    encoder = with_golden_weights(ReenactmentEncoder(FFHQ256), "state_dict_net/", "full")
    z = encoder(given["src_img"], given["stick"]).numpy()
    assert np.abs(z - due["net_src_stick"]).max() <= CODE
    network = with_golden_weights(Autoencoder(FFHQ256), "state_dict_diff/model.", "full")
    code = network.encode(given["src_img"]).numpy()
    assert np.abs(code - due["enc_model_src"]).max() <= CODE
    eps = network(given["x_t"], torch.tensor([450]), given["z"])[0].numpy()
    patches = {"patch_center": np.s_[:, 120:136, 120:136], "patch_corner": np.s_[:, :16, :16]}
    for name, place in patches.items():
        assert np.abs(eps[place] - due[f"eps_model_t450/{name}"]).max() <= EPS
    means = eps.astype(np.float64).reshape(3, 16, 16, 16, 16).mean(axis=(2, 4))
    assert np.abs(means - due["eps_model_t450/block16_mean"]).max() <= EPS


def random_network(config: NetworkConfig) -> UNet:
    """A network in which no parameter is zero, so that every path counts."""
    torch.manual_seed(0)
    network = UNet(config).eval().requires_grad_(False)
    for parameter in network.parameters():
        parameter.copy_(torch.randn_like(parameter) * 0.2)
    return network


@pytest.mark.parametrize("config", [TINY, dataclasses.replace(TINY, positions=False, block_size=2)])
def test_folded_modulation_is_the_published_order_of_operations(config: NetworkConfig) -> None:
    network = random_network(config)
    block: Any = network.input_blocks[1][0]  # type: ignore[index]
    e, z = torch.randn(2, config.embed), torch.randn(2, config.embed)
    h = torch.randn(2, block.width, 4, 4)
    s_t, b_t = block.emb_layers(e)[:, :, None, None].chunk(2, dim=1)
    s_z = block.cond_emb_layers(z)[:, :, None, None]
    published = nn.functional.silu((block.out_layers[0](h) * (1 + s_t) + b_t) * (1 + s_z))
    (scale, shift), factor = block.time_row(e), block.code_row(z)
    folded = block.out_layers[0].modulated_silu(h, scale * factor, shift * factor)
    torch.testing.assert_close(folded, published, atol=1e-5, rtol=1e-5)


def test_rows_of_several_timesteps_serve_one_frame() -> None:
    network = random_network(TINY)
    x, z, t = torch.randn(1, 3, 32, 32), torch.randn(1, 16), torch.tensor([0, 300, 950])
    rows = network.time_rows(t)
    assert rows.shape == (3, 2 * network.modulation_size)
    scale, shift = network.modulation(z, rows)
    assert scale.shape == shift.shape == (3, network.modulation_size)
    for i in range(3):
        stepped = network.step(x, scale[i : i + 1], shift[i : i + 1])
        torch.testing.assert_close(stepped, network(x, t[i : i + 1], z), atol=1e-5, rtol=1e-4)


def test_positions_make_the_output_depend_on_the_place() -> None:
    network = UNet(TINY)
    assert {"position_stem", "position_middle"} <= set(network.state_dict())
    flat = network.position_stem.flatten(2)[0]
    assert torch.linalg.matrix_rank(flat) == min(flat.shape), "channels tell places apart"
    network = random_network(TINY)
    x, t, z = torch.zeros(1, 3, 32, 32), torch.zeros(1), torch.randn(1, 16)
    with_positions = network(x, t, z)
    network.position_stem.zero_()
    assert (network(x, t, z) - with_positions).abs().max() > 1e-3


def test_the_code_map_puts_z_in_places() -> None:
    network = random_network(TINY)
    code_map = network.code_map
    z, h = torch.randn(2, 16), torch.zeros(2, code_map.project.out_channels, *code_map.shape[1:])
    added = code_map(h, code_map.code_row(z))
    assert added.std(dim=(2, 3)).min() > 1e-3, "z differs from place to place"
    rows = network.time_rows(torch.tensor([5, 900]))
    one, zero = (part[:, -code_map.width :] for part in rows.chunk(2, dim=1))
    assert (one == 1).all() and (zero == 0).all(), "the same at all times"


def test_z_places_a_dot_where_its_keypoint_is() -> None:
    network = random_network(TINY)
    dots = network.keypoint_map
    assert network.modulated[-1] is dots
    x_cell, y_cell = 3, 6
    row = torch.ones(1, dots.width)
    row[0, 4], row[0, 5] = (x_cell + 0.5) * 2 / dots.side, (y_cell + 0.5) * 2 / dots.side
    dots.project.weight.zero_()
    dots.project.bias.zero_()
    dots.project.weight[0, 2] = 1.0  # the first channel shows the third point
    shown = dots(torch.zeros(1, dots.project.out_channels, dots.side, dots.side), row)[0, 0]
    assert shown.argmax() == y_cell * dots.side + x_cell and shown.max() == 1
    assert shown[y_cell, x_cell + 2] < 0.05


def test_keypoints_that_are_given_take_the_place_of_those_of_z() -> None:
    network = random_network(TINY)
    x, t, z = torch.randn(2, 3, 32, 32), torch.tensor([3, 700]), torch.randn(2, 16)
    own = network.keypoints(z)
    assert own.shape == (2, 70, 2) and 0 < own.mean() < 32
    torch.testing.assert_close(network(x, t, z, own), network(x, t, z))
    assert (network(x, t, z, own + 5) - network(x, t, z)).abs().max() > 1e-3


def test_a_flat_code_knows_where_things_are() -> None:
    flat = SemanticEncoder(dataclasses.replace(TINY, code_pool="flat"))
    mean = SemanticEncoder(dataclasses.replace(TINY, code_pool="mean"))
    assert flat.state_dict().keys() == mean.state_dict().keys(), "published names either way"
    feature = torch.zeros(2, flat.out[3].in_channels, 8, 8)
    side = flat.out[3].kernel_size[0]
    feature = feature[..., :side, :side]
    feature[0, 0, 0, 0] = feature[1, 0, -1, -1] = 1.0
    (one, other), (same, again) = (e.out[2:](feature) for e in (flat, mean))
    assert (one - other).abs().max() > 1e-3
    torch.testing.assert_close(same, again)


def test_a_new_network_predicts_zero() -> None:
    network = UNet(TINY).eval()
    assert not network(torch.randn(2, 3, 32, 32), torch.zeros(2), torch.randn(2, 16)).any()


def test_a_new_reenactment_encoder_ignores_the_drawing() -> None:
    encoder = ReenactmentEncoder(TINY)
    image = torch.randn(1, 3, 32, 32)
    torch.testing.assert_close(encoder(image, image), encoder(image, -image))


def test_gradients_reach_every_parameter() -> None:
    network = random_network(TINY).requires_grad_(True)
    network(torch.randn(2, 3, 32, 32), torch.tensor([3, 700]), torch.randn(2, 16)).sum().backward()
    assert [n for n, p in network.named_parameters() if p.grad is None or not p.grad.any()] == []


def test_the_gradient_of_upsampling_is_that_of_pytorch() -> None:
    x = torch.randn(2, 3, 4, 4, requires_grad=True)
    weight = torch.randn(2, 3, 8, 8)
    gradients = [
        torch.autograd.grad((up * weight).sum(), x)[0]
        for up in (resample(x, "up"), nn.functional.interpolate(x, scale_factor=2.0))
    ]
    torch.testing.assert_close(*gradients)


@pytest.mark.parametrize(
    ("channels", "groups"), [(512, 32), (64, 32), (16, 16), (80, 20), (240, 30), (48, 12), (37, 1)]
)
def test_group_count(channels: int, groups: int) -> None:
    assert group_count(channels) == groups


def test_config_survives_json() -> None:
    assert NetworkConfig.from_dict(json.loads(json.dumps(FACE128.to_dict()))) == FACE128


def test_config_errors_name_the_field() -> None:
    with pytest.raises(SettingsError, match="widths is not a field"):
        NetworkConfig.from_dict({**FACE128.to_dict(), "widths": 3})
    with pytest.raises(SettingsError, match="channels is str, wanted int"):
        NetworkConfig.from_dict({**FACE128.to_dict(), "channels": "64"})
    with pytest.raises(SettingsError, match="multiple of 16"):
        dataclasses.replace(FACE128, image_size=100)
