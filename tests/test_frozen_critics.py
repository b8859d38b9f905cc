"""VGG-19, ArcFace, FaRL and BiSeNet: names, sizes and sums of the published ones, and frozen."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffusionact.errors import SettingsError
from diffusionact.training.models.frozen import CRITICS, VGG19, ArcFace, BiSeNet, FaRL
from diffusionact.training.models.frozen.arcface import SqueezeExcite
from diffusionact.training.models.frozen.farl import Attention
from diffusionact.training.models.frozen.network import BATCH_COUNTERS
from tests.small_critics import SMALL, by_rule, pictures, slope

pytestmark = pytest.mark.torch

EXACT = 1e-10  # float64, some hundred operations on values near 1
DIFFERENCE = 1e-5  # of a slope by central differences, relative


@dataclass(frozen=True)
class Facts:
    """What is known of a published file and of its network."""

    used_tensors: int
    parameters: int
    gmacs: float
    some: dict[str, tuple[int, ...]]  # a few of its names
    beside: dict[str, tuple[int, ...]] = field(default_factory=dict)  # names that are not used
    spare: dict[str, int] = field(default_factory=dict)  # and their groups


CONVOLUTIONS_OF_VGG19 = 20_024_384  # all sixteen; the last three are not used
FACTS = {
    "vgg19": Facts(
        26, CONVOLUTIONS_OF_VGG19 - 3 * (512 * 512 * 9 + 512), 18.1,
        {"features.0.weight": (64, 3, 3, 3), "features.19.bias": (512,),
         "features.28.weight": (512, 512, 3, 3)},
        {"features.30.weight": (512, 512, 3, 3), "features.34.bias": (512,),
         "classifier.0.weight": (4096, 25088), "classifier.6.bias": (1000,)},
        {"layers behind the last map": 2, "classifier of ImageNet": 2},
    ),
    "arcface": Facts(
        343, 43_797_696, 6.3,
        {"input_layer.2.weight": (64,), "body.0.res_layer.5.fc1.weight": (4, 64, 1, 1),
         "body.3.shortcut_layer.0.weight": (128, 64, 1, 1),
         "body.7.res_layer.3.weight": (256, 256, 3, 3),
         "body.23.res_layer.5.fc2.weight": (512, 32, 1, 1),
         "output_layer.3.weight": (512, 25088), "output_layer.4.running_mean": (512,)},
    ),
    "farl": Facts(
        152, 86_192_640, 17.6,
        {"visual.class_embedding": (768,), "visual.positional_embedding": (197, 768),
         "visual.conv1.weight": (768, 3, 16, 16), "visual.proj": (768, 512),
         "visual.transformer.resblocks.11.attn.in_proj_weight": (2304, 768),
         "visual.transformer.resblocks.0.mlp.c_fc.weight": (3072, 768),
         "visual.transformer.resblocks.5.ln_2.bias": (768,)},
        {"logit_scale": (), "transformer.resblocks.0.ln_1.weight": (512,),
         "token_embedding.weight": (49408, 512), "visual.mask_token": (768,),
         "visual.lm_transformer.resblocks.0.ln_1.bias": (768,), "visual.lm_head.bias": (8192,)},
        {"encoder of words": 3, "heads of masked modelling": 3},
    ),
    "bisenet": Facts(
        148, 13_150_272, 13.4,
        {"cp.resnet.conv1.weight": (64, 3, 7, 7),
         "cp.resnet.layer2.0.downsample.0.weight": (128, 64, 1, 1),
         "cp.arm16.conv_atten.weight": (128, 128, 1, 1), "cp.conv_avg.bn.running_var": (128,),
         "ffm.convblk.conv.weight": (256, 256, 1, 1), "ffm.conv1.weight": (64, 256, 1, 1),
         "conv_out.conv_out.weight": (19, 256, 1, 1)},
        {"conv_out16.conv_out.weight": (19, 64, 1, 1), "conv_out32.conv.bn.bias": (64,)},
        {"outputs for training": 2},
    ),
}  # fmt: skip


def on_meta(name: str) -> nn.Module:
    with torch.device("meta"):
        return CRITICS[name]().eval()


def published(name: str) -> dict[str, Tensor]:
    """A state dict as the makers' file has it, all ones, on as good as no memory."""
    state: dict[str, Tensor] = {}
    for key, tensor in on_meta(name).state_dict().items():
        state[key] = torch.ones(1).expand(tensor.shape)
        if key.endswith(".running_var"):
            state[key.replace("running_var", "num_batches_tracked")] = torch.tensor(7)
    return state | {key: torch.ones(shape) for key, shape in FACTS[name].beside.items()}


@pytest.mark.parametrize("name", FACTS)
def test_sizes_and_names_are_the_published_ones(name: str) -> None:
    facts, network = FACTS[name], on_meta(name)
    shapes = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    assert len(shapes) == facts.used_tensors and facts.some.items() <= shapes.items()
    assert sum(tensor.numel() for tensor in network.parameters()) == facts.parameters
    with FlopCounterMode(display=False) as counter:
        outputs = network(torch.empty(CRITICS[name].INPUT, device="meta"))
    assert counter.get_total_flops() / 2e9 == pytest.approx(facts.gmacs, abs=0.06)
    assert len(outputs if isinstance(outputs, tuple) else (outputs,)) == len(CRITICS[name].OUTPUTS)


@pytest.mark.parametrize("name", FACTS)
def test_a_published_file_is_accounted_for_and_refused_where_it_differs(name: str) -> None:
    facts, state = FACTS[name], published(name)
    network = CRITICS[name].from_published(state)
    assert network.counts is not None
    counters = sum(key.endswith("num_batches_tracked") for key in state)
    spare = facts.spare | ({BATCH_COUNTERS: counters} if counters else {})
    assert (network.counts.used, dict(network.counts.spare)) == (facts.used_tensors, spare)
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    key = next(iter(facts.some))
    change = {key: torch.ones(2), "visual.new": torch.ones(1)}
    with pytest.raises(SettingsError) as raised:
        CRITICS[name].from_published(state | change)
    assert f"{key} [2] instead of" in str(raised.value)
    assert "1 are unknown (visual.new)" in str(raised.value)


@pytest.mark.parametrize("name", SMALL)
def test_gradients_reach_the_picture_and_never_the_weights(name: str) -> None:
    network = by_rule(SMALL[name]())
    x = pictures(1, 3, 16 if name == "farl" else 32)

    def value(image: Tensor) -> Tensor:
        outputs = network(image)
        return sum(
            o.square().mean() for o in (outputs if isinstance(outputs, tuple) else [outputs])
        )  # type: ignore[return-value]

    if name == "arcface":  # of length 1: its square says nothing

        def value(image: Tensor) -> Tensor:
            return network(image)[:, 0].sum()  # type: ignore[no-any-return]

    by_autograd, by_difference = slope(value, x)
    assert by_autograd == pytest.approx(by_difference, rel=DIFFERENCE) and by_autograd != 0
    image = x.clone().requires_grad_(True)
    value(image).backward()  # type: ignore[no-untyped-call]
    assert image.grad is not None and all(p.grad is None for p in network.parameters())


# The same sums, written a second time from the keys alone.


def sequential_vgg19(widths: tuple[int, ...]) -> nn.Sequential:
    """Configuration E in torchvision's order, without the classifier."""
    layers: list[nn.Module] = []
    c_in = 3
    for width, count in zip(widths, (2, 2, 4, 4, 4), strict=True):
        for _ in range(count):
            layers += [nn.Conv2d(c_in, width, 3, padding=1), nn.ReLU()]
            c_in = width
        layers.append(nn.MaxPool2d(2, 2))
    return nn.Sequential(*layers).double()


def test_vgg19_s_maps_are_those_behind_the_first_relu_of_each_block() -> None:
    network, x = by_rule(SMALL["vgg19"]()), pictures(2, 1)
    whole = sequential_vgg19((3, 4, 4, 5, 5))
    ours = {name.removeprefix("features."): v for name, v in network.state_dict().items()}
    whole.load_state_dict(ours, strict=False)
    maps, at = [], {1, 6, 11, 20, 29}
    for i, layer in enumerate(whole):
        x = layer(x)
        maps += [x] if i in at else []
    found = network(pictures(2, 1))
    assert [tuple(m.shape[2:]) for m in found] == [(s, s) for s in (32, 16, 8, 4, 2)]
    for a, b in zip(found, maps, strict=True):
        assert torch.allclose(a, b, atol=EXACT)


def norm(x: Tensor, state: dict[str, Tensor], at: str) -> Tensor:
    shape = (1, -1) + (1,) * (x.ndim - 2)
    mean, variance, weight, bias = (
        state[f"{at}.{n}"].view(shape) for n in ("running_mean", "running_var", "weight", "bias")
    )
    return (x - mean) / (variance + 1e-5).sqrt() * weight + bias


def test_squeeze_and_excitation_is_its_equation() -> None:
    block = by_rule(SqueezeExcite(32))
    x = np.random.default_rng(0).normal(size=(2, 32, 3, 4))
    w1, w2 = (block.state_dict()[f"fc{i}.weight"].numpy()[:, :, 0, 0] for i in (1, 2))
    means = x.mean(axis=(2, 3))
    share = 1 / (1 + np.exp(-np.maximum(means @ w1.T, 0) @ w2.T))
    assert np.allclose(block(torch.from_numpy(x)).numpy(), x * share[:, :, None, None], atol=EXACT)


def test_arcface_is_the_sum_that_its_keys_say() -> None:
    network, x = by_rule(SMALL["arcface"]()), pictures(2, 2)
    state: dict[str, Tensor] = dict(network.state_dict())
    h = norm(F.conv2d(x, state["input_layer.0.weight"], padding=1), state, "input_layer.1")
    h = F.prelu(h, state["input_layer.2.weight"])
    for i, stride in enumerate((2, 2, 1, 2, 2)):
        at = f"body.{i}"
        around = h[:, :, ::stride, ::stride]
        if f"{at}.shortcut_layer.0.weight" in state:
            around = F.conv2d(h, state[f"{at}.shortcut_layer.0.weight"], stride=stride)
            around = norm(around, state, f"{at}.shortcut_layer.1")
        r = F.conv2d(norm(h, state, f"{at}.res_layer.0"), state[f"{at}.res_layer.1.weight"],
                     padding=1)  # fmt: skip
        r = F.prelu(r, state[f"{at}.res_layer.2.weight"])
        r = F.conv2d(r, state[f"{at}.res_layer.3.weight"], stride=stride, padding=1)
        r = norm(r, state, f"{at}.res_layer.4")
        s = F.conv2d(r.mean((2, 3), keepdim=True), state[f"{at}.res_layer.5.fc1.weight"])
        s = F.conv2d(s.relu(), state[f"{at}.res_layer.5.fc2.weight"])
        h = around + r * s.sigmoid()
    rows = norm(h, state, "output_layer.0").flatten(1)
    rows = rows @ state["output_layer.3.weight"].T + state["output_layer.3.bias"]
    rows = norm(rows, state, "output_layer.4")
    found = network(x)
    assert torch.allclose(found, rows / rows.norm(dim=1, keepdim=True), atol=EXACT)
    assert torch.allclose(found.norm(dim=1), torch.ones(2, dtype=torch.float64), atol=EXACT)


def softmax(x: NDArray[np.float64]) -> NDArray[np.float64]:
    raised = np.exp(x - x.max(axis=-1, keepdims=True))
    return np.asarray(raised / raised.sum(axis=-1, keepdims=True))


def attention(
    x: NDArray[np.float64], state: dict[str, NDArray[np.float64]], heads: int
) -> NDArray[np.float64]:
    """Vaswani et al., Eq. 1, head by head, for one sequence [L,W]."""
    width = x.shape[1]
    rows = x @ state["in_proj_weight"].T + state["in_proj_bias"]
    q, k, v = rows[:, :width], rows[:, width : 2 * width], rows[:, 2 * width :]
    size, parts = width // heads, []
    for i in range(heads):
        of = slice(i * size, (i + 1) * size)
        parts.append(softmax(q[:, of] @ k[:, of].T / np.sqrt(size)) @ v[:, of])
    joined = np.concatenate(parts, axis=1)
    return np.asarray(joined @ state["out_proj.weight"].T + state["out_proj.bias"])


def under(state: dict[str, Any], prefix: str) -> dict[str, Any]:
    return {n.removeprefix(prefix): v for n, v in state.items() if n.startswith(prefix)}


def test_attention_is_its_equation() -> None:
    block = by_rule(Attention(12, 3))
    state = {name: value.numpy() for name, value in block.state_dict().items()}
    x = np.random.default_rng(1).normal(size=(2, 5, 12))
    expected = np.stack([attention(row, state, 3) for row in x])
    assert np.allclose(block(torch.from_numpy(x)).numpy(), expected, atol=EXACT)


def layer_norm(x: NDArray[np.float64], state: dict[str, Any], at: str) -> NDArray[np.float64]:
    centred = x - x.mean(axis=-1, keepdims=True)
    scaled = centred / np.sqrt(np.square(centred).mean(axis=-1, keepdims=True) + 1e-5)
    return np.asarray(scaled * state[f"{at}.weight"] + state[f"{at}.bias"])


def test_farl_is_the_sum_that_its_keys_say() -> None:
    network, x = by_rule(SMALL["farl"]()), pictures(1, 4, 16)
    state = under({n: v.numpy() for n, v in network.state_dict().items()}, "visual.")
    image = x[0].numpy()
    patches = [image[:, r : r + 8, c : c + 8] for r in (0, 8) for c in (0, 8)]
    rows = [state["class_embedding"]]
    rows += [(state["conv1.weight"] * patch).sum(axis=(1, 2, 3)) for patch in patches]
    h = layer_norm(np.stack(rows) + state["positional_embedding"], state, "ln_pre")
    for i in range(2):
        block = under(state, f"transformer.resblocks.{i}.")
        h = h + attention(layer_norm(h, block, "ln_1"), under(block, "attn."), 3)
        m = layer_norm(h, block, "ln_2") @ block["mlp.c_fc.weight"].T + block["mlp.c_fc.bias"]
        m = m / (1 + np.exp(-1.702 * m))
        h = h + m @ block["mlp.c_proj.weight"].T + block["mlp.c_proj.bias"]
    expected = layer_norm(h[:1], state, "ln_post") @ state["proj"]
    assert np.allclose(network(x).numpy(), expected, atol=EXACT)


def test_bisenet_is_the_sum_that_its_keys_say() -> None:
    network, x = by_rule(SMALL["bisenet"]()), pictures(1, 5, 64)
    state: dict[str, Tensor] = dict(network.state_dict())

    def conv(h: Tensor, at: str, bn: str, stride: int = 1) -> Tensor:
        weight = state[f"{at}.weight"]
        h = F.conv2d(h, weight, stride=stride, padding=weight.shape[-1] // 2)
        return norm(h, state, bn)

    def block(h: Tensor, at: str) -> Tensor:
        return conv(h, f"{at}.conv", f"{at}.bn").relu()

    def basic(h: Tensor, at: str, stride: int) -> Tensor:
        around = h
        if f"{at}.downsample.0.weight" in state:
            around = conv(h, f"{at}.downsample.0", f"{at}.downsample.1", stride)
        h = conv(h, f"{at}.conv1", f"{at}.bn1", stride).relu()
        return (conv(h, f"{at}.conv2", f"{at}.bn2") + around).relu()

    def refined(h: Tensor, at: str) -> Tensor:
        h = block(h, f"{at}.conv")
        share = conv(h.mean((2, 3), keepdim=True), f"{at}.conv_atten", f"{at}.bn_atten")
        return h * share.sigmoid()

    def twice(h: Tensor) -> Tensor:
        return h.repeat_interleave(2, 2).repeat_interleave(2, 3)

    h = F.max_pool2d(conv(x, "cp.resnet.conv1", "cp.resnet.bn1", 2).relu(), 3, 2, 1)
    maps = []
    for i, stride in enumerate((1, 2, 2, 2), 1):
        h = basic(basic(h, f"cp.resnet.layer{i}.0", stride), f"cp.resnet.layer{i}.1", 1)
        maps.append(h)
    _, eighth, sixteenth, last = maps
    whole = block(last.mean((2, 3), keepdim=True), "cp.conv_avg")
    up = block(twice(refined(last, "cp.arm32") + whole), "cp.conv_head32")
    up = block(twice(refined(sixteenth, "cp.arm16") + up), "cp.conv_head16")
    fused = block(torch.cat([eighth, up], dim=1), "ffm.convblk")
    share = F.conv2d(fused.mean((2, 3), keepdim=True), state["ffm.conv1.weight"]).relu()
    fused = fused + fused * F.conv2d(share, state["ffm.conv2.weight"]).sigmoid()
    logits = F.conv2d(block(fused, "conv_out.conv"), state["conv_out.conv_out.weight"])
    found = network(x)
    assert found.shape == (1, 5, 64, 64)
    # corners of the small map are corners of the picture
    assert torch.allclose(found[..., ::63, ::63], logits[..., ::7, ::7], atol=EXACT)
    assert torch.allclose(
        found, F.interpolate(logits, (64, 64), mode="bilinear", align_corners=True), atol=EXACT
    )


def test_configs_say_the_sizes() -> None:
    for make in SMALL.values():
        network = make()
        assert type(network).from_tensors(network.state_dict(), network.config()).config() == (
            network.config()
        )
    assert VGG19().config() == {"widths": [64, 128, 256, 512, 512]}
    assert {ArcFace.NAME, FaRL.NAME, BiSeNet.NAME, VGG19.NAME} == set(CRITICS)
