"""The helper networks: names, shapes, sizes and sums of the published ones, loaded strictly."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from diffusionact.errors import SettingsError
from diffusionact.training.models.frozen import FAN, NETWORKS, S3FD, Emoca, FrozenNetwork, Gaze
from diffusionact.training.models.frozen.emoca import config_of
from diffusionact.training.models.frozen.fan import Hourglass
from diffusionact.training.models.frozen.network import BATCH_COUNTERS, FrozenNorm
from diffusionact.training.models.frozen.resnet import Bottleneck, ResNet50
from diffusionact.training.models.frozen.s3fd import L2Norm

pytestmark = pytest.mark.torch

ROUNDING = 1e-5  # float32, a few operations on values near 1


@dataclass(frozen=True)
class Facts:
    """What is known of a published network."""

    file_tensors: int
    used_tensors: int
    parameters: int  # of those we keep
    gmacs: float
    outputs: tuple[tuple[int, ...], ...]
    some: dict[str, tuple[int, ...]]  # a few of its names


SIDES = (64, 32, 16, 12, 6, 3)  # of S3FD's maps at 256 px
RESNET50_WITHOUT_CLASSIFIER = 25_557_032 - 2_049_000  # torchvision's count, less its fc
FACTS = {
    "s3fd": Facts(
        65, 65, 22_459_110, 21.1,
        tuple((1, c, side, side) for c in (2, 4) for side in SIDES),
        {
            "conv1_1.weight": (64, 3, 3, 3),
            "conv3_3_norm.weight": (256,),
            "conv3_3_norm_mbox_conf.bias": (4,),
            "fc6.weight": (1024, 512, 3, 3),
            "fc7_mbox_loc.weight": (4, 1024, 3, 3),
            "conv7_2_mbox_conf.weight": (2, 256, 3, 3),
        },
    ),
    "fan": Facts(
        1129, 945, 23_820_176, 25.2,
        ((1, 68, 64, 64),),
        {
            "conv1.weight": (64, 3, 7, 7),
            "conv2.downsample.0.running_var": (64,),
            "conv4.downsample.2.weight": (256, 128, 1, 1),
            "m0.b2_plus_1.conv1.weight": (128, 256, 3, 3),
            "m3.b3_4.bn3.running_mean": (64,),
            "top_m_3.conv2.weight": (64, 128, 3, 3),
            "conv_last0.bias": (256,),
            "bn_end2.weight": (256,),
            "l3.weight": (68, 256, 1, 1),
            "al2.weight": (256, 68, 1, 1),
            "bl0.bias": (256,),
        },
    ),
    "gaze": Facts(
        322, 267, RESNET50_WITHOUT_CLASSIFIER + 2 * 2048 + 2, 4.1,
        ((1, 2),),
        {
            "gaze_network.layer3.5.bn2.running_mean": (256,),
            "gaze_network.layer2.0.downsample.0.weight": (512, 256, 1, 1),
            "gaze_fc.0.weight": (2, 2048),
        },
    ),
    "emoca": Facts(
        # 318 of a ResNet-50 without its classifier and 4 of the layers, twice
        644, 538, 2 * RESNET50_WITHOUT_CLASSIFIER + 2 * 2049 * 1024 + 1025 * (236 + 53), 8.2,
        ((1, 100), (1, 50), (1, 6), (1, 3)),
        {
            "E_flame.encoder.conv1.weight": (64, 3, 7, 7),
            "E_flame.layers.2.weight": (236, 1024),
            "E_expression.layers.2.bias": (53,),
        },
    ),
}  # fmt: skip


def on_meta(network: type[FrozenNetwork], **config: Any) -> FrozenNetwork:
    with torch.device("meta"):
        return network(**config).eval()


def published(network: type[FrozenNetwork], **config: Any) -> dict[str, Tensor]:
    """A state dict as the makers' file has it, all ones."""
    state: dict[str, Tensor] = {}
    for name, tensor in on_meta(network, **config).state_dict().items():
        state[name] = torch.ones(1).expand(tensor.shape)
        if name.endswith(".running_var"):
            state[name.replace("running_var", "num_batches_tracked")] = torch.tensor(7)
    if network is Gaze:
        state["gaze_network.fc.weight"] = torch.ones(1).expand(1000, 2048)
        state["gaze_network.fc.bias"] = torch.ones(1000)
    if network is Emoca:
        return {f"deca.{name}": tensor for name, tensor in state.items()}
    return state


@pytest.mark.parametrize("name", FACTS)
def test_sizes_and_shapes_are_the_published_ones(name: str) -> None:
    facts, network = FACTS[name], on_meta(NETWORKS[name])
    shapes = {key: tuple(tensor.shape) for key, tensor in network.state_dict().items()}
    assert len(shapes) == facts.used_tensors
    assert facts.some.items() <= shapes.items()
    assert sum(tensor.numel() for tensor in network.parameters()) == facts.parameters
    with FlopCounterMode(display=False) as counter:
        outputs = network(torch.empty(network.INPUT, device="meta"))
    outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    assert counter.get_total_flops() / 2e9 == pytest.approx(facts.gmacs, abs=0.06)
    assert tuple(tuple(output.shape) for output in outputs) == facts.outputs
    assert len(outputs) == len(network.OUTPUTS)


@pytest.mark.parametrize("name", FACTS)
def test_published_file_is_accounted_for_and_comes_back_from_its_tensors(name: str) -> None:
    facts, state = FACTS[name], published(NETWORKS[name])
    network = NETWORKS[name].from_published(state)
    assert network.counts is not None
    assert (network.counts.used, network.counts.total) == (facts.used_tensors, facts.file_tensors)
    stored = network.state_dict()
    assert all(tensor.dtype == torch.float32 for tensor in stored.values())
    assert not network.training and not any(p.requires_grad for p in network.parameters())
    again = NETWORKS[name].from_tensors(stored, network.config())
    assert all(torch.equal(tensor, stored[key]) for key, tensor in again.state_dict().items())


def test_old_files_without_batch_counters_load_too() -> None:
    state = {k: v for k, v in published(FAN).items() if not k.endswith("num_batches_tracked")}
    counts = FAN.from_published(state).counts
    assert counts is not None and (counts.used, dict(counts.spare)) == (945, {})


def test_half_precision_becomes_float32() -> None:
    state = {name: tensor.half() for name, tensor in published(S3FD).items()}
    assert S3FD.from_published(state).fc6.weight.dtype == torch.float32


@pytest.mark.parametrize(
    ("change", "said"),
    [
        ({"conv1_1.weight": None}, r"1 are missing \(conv1_1.weight\)"),
        ({"module.x": torch.ones(1)}, r"1 are unknown \(module.x\)"),
        ({"fc7.bias": torch.ones(3)}, r"fc7.bias \[3\] instead of \[1024\]"),
        ({"fc7.bias": torch.full((1024,), torch.nan)}, r"1 are not finite \(fc7.bias\)"),
        ({"fc7.bias": torch.ones(1024, dtype=torch.int64)}, r"not tensors of floats \(fc7.bias\)"),
        ({"fc7.bias": "text"}, r"not tensors of floats \(fc7.bias\)"),
    ],
)
def test_a_file_that_differs_is_refused(change: dict[str, Any], said: str) -> None:
    state: dict[str, Any] = {**published(S3FD), **change}
    state = {name: value for name, value in state.items() if value is not None}
    with pytest.raises(SettingsError, match=said):
        S3FD.from_published(state)


@pytest.mark.parametrize("name", FACTS)
@pytest.mark.parametrize("state", [[1, 2], {3: torch.ones(1)}, {}, "text"])
def test_what_is_no_state_dict_is_refused(name: str, state: Any) -> None:
    with pytest.raises(SettingsError, match=name):
        NETWORKS[name].from_published(state)


def test_another_network_s_file_is_refused_with_few_names() -> None:
    with pytest.raises(SettingsError, match="are unknown") as raised:
        S3FD.from_published(published(FAN))
    assert len(str(raised.value)) < 600


def test_unknown_config_is_refused() -> None:
    with pytest.raises(SettingsError, match="depth"):
        FAN.from_tensors({}, {"depth": 3})


def test_norm_is_batch_norm_with_fixed_statistics() -> None:
    torch.manual_seed(0)
    ours, theirs = FrozenNorm(5), nn.BatchNorm2d(5).eval()
    for tensor in (*theirs.parameters(), theirs.running_mean, theirs.running_var):
        assert tensor is not None
        tensor.data.uniform_(0.2, 2)
    state = theirs.state_dict()
    del state["num_batches_tracked"]
    ours.load_state_dict(state)
    x = torch.randn(2, 5, 3, 4)
    assert torch.allclose(ours(x), theirs(x), atol=ROUNDING)


def test_l2_norm_gives_every_cell_its_weights_length() -> None:
    norm = L2Norm(4)
    norm.weight.data.fill_(10)
    y = norm(torch.randn(1, 4, 3, 3))
    assert torch.allclose(y.norm(dim=1), torch.tensor(10.0), atol=1e-4)
    assert norm(torch.zeros(1, 4, 1, 1)).abs().max() == 0


@torch.inference_mode()
def test_s3fd_takes_the_likeliest_background_of_its_first_head() -> None:
    network = S3FD().eval()
    for name, parameter in network.named_parameters():
        parameter.zero_()
        if name.endswith("_mbox_conf.bias"):
            parameter.copy_(torch.arange(1.0, 1.0 + len(parameter)))
        if name.endswith("_mbox_loc.bias"):
            parameter.copy_(torch.arange(4.0))
    network.conv3_3_norm_mbox_conf.bias.copy_(torch.tensor([0.0, 7.0, -2.0, 3.0]))
    outputs = network(torch.zeros(1, 3, 64, 64))
    assert outputs[0].shape == (1, 2, 16, 16)
    assert outputs[0][0, :, 0, 0].tolist() == [7.0, 3.0]
    assert all(logits[0, :, 0, 0].tolist() == [1.0, 2.0] for logits in outputs[1:6])
    assert all(offsets[0, :, 0, 0].tolist() == [0.0, 1.0, 2.0, 3.0] for offsets in outputs[6:])


def test_s3fd_s_heads_look_at_the_feature_maps_of_their_strides() -> None:
    network = on_meta(S3FD)
    seen: dict[str, list[int]] = {}
    for name, layer in network.named_children():
        layer.register_forward_hook(
            lambda _, inputs, __, name=name: seen.update({name: list(inputs[0].shape[1:])})
        )
    network(torch.empty(S3FD.INPUT, device="meta"))
    assert seen["conv3_3_norm"] == [256, 64, 64] and seen["conv5_3_norm"] == [512, 16, 16]
    assert seen["fc6"] == [512, 8, 8] and seen["fc7"] == [1024, 10 + 2, 10 + 2]
    assert seen["fc7_mbox_conf"] == [1024, 12, 12] and seen["conv7_2_mbox_loc"] == [256, 3, 3]


@torch.inference_mode()
def test_hourglass_adds_the_coarser_scales_repeated() -> None:
    hourglass = Hourglass().eval()
    for name, parameter in hourglass.named_parameters():
        if ".conv" in name:
            parameter.zero_()  # each block is its way around then
    x = torch.randn(1, 256, 16, 16)
    expected = x.clone()
    for size in (2, 4, 8, 16):
        mean = x.unfold(2, size, size).unfold(3, size, size).mean((-1, -2))
        expected += mean.repeat_interleave(size, 2).repeat_interleave(size, 3)
    assert torch.allclose(hourglass(x), expected, atol=ROUNDING)


@torch.inference_mode()
def test_fan_feeds_each_stack_with_the_one_before_and_gives_the_last_map() -> None:
    network = FAN().eval()
    for parameter in network.parameters():
        parameter.zero_()
    # features of stack i are relu(bias of bn_end); its map is l's bias + the features' first
    fed: list[float] = []
    for i in range(4):
        network.get_submodule(f"bn_end{i}").bias.fill_(1.0)
        head = network.get_submodule(f"l{i}")
        head.weight[:, 0].fill_(1.0)
        head.bias.fill_(10.0 * i)
        network.get_submodule(f"m{i}").register_forward_hook(
            lambda _, inputs, __: fed.append(float(inputs[0][0, 0, 0, 0]))
        )
        if i < 3:
            network.get_submodule(f"bl{i}").weight[:, 0].fill_(100.0)
            network.get_submodule(f"al{i}").weight[:, 0].fill_(1000.0)
    heatmaps = network(torch.zeros(1, 3, 64, 64))
    assert heatmaps.shape == (1, 68, 16, 16)
    assert heatmaps.unique().tolist() == [31.0]
    steps = [100 + 1000 * (1 + 10 * i) for i in range(3)]
    assert fed == [0.0, steps[0], steps[0] + steps[1], sum(steps)]


def test_resnet_strides_in_its_3x3_convolution() -> None:
    with torch.device("meta"):
        network = ResNet50()
    sides: dict[str, int] = {}
    for name, layer in network.named_modules():
        layer.register_forward_hook(
            lambda _, __, output, name=name: sides.update({name: output.shape[-1]})
        )
    network(torch.empty(1, 3, 224, 224, device="meta"))
    assert (sides["conv1"], sides["layer1"], sides["layer4"]) == (112, 56, 7)
    assert (sides["layer2.0.conv1"], sides["layer2.0.conv2"]) == (56, 28)
    assert (sides["layer4.0.conv1"], sides["layer4.0.conv2"]) == (14, 7)


@torch.inference_mode()
def test_bottleneck_adds_its_way_around_before_the_last_relu() -> None:
    block = Bottleneck(16, 4, 1).eval()
    for parameter in block.parameters():
        parameter.zero_()
    x = torch.randn(1, 16, 3, 3)
    assert torch.equal(block(x), x.relu())
    block.bn3.bias.fill_(0.5)
    assert torch.allclose(block(x), (x + 0.5).relu(), atol=ROUNDING)


@torch.inference_mode()
@pytest.mark.parametrize("clone", [True, False])
@pytest.mark.parametrize(
    ("global_pose", "jaw_pose", "pose"),
    [
        (False, False, [200, 201, 202, 203, 204, 205]),
        (False, True, [200, 201, 202, 1050, 1051, 1052]),
        (True, False, [1050, 1051, 1052, 203, 204, 205]),
        (True, True, [1050, 1051, 1052, 1053, 1054, 1055]),
    ],
)
def test_emoca_takes_each_code_from_its_columns(
    clone: bool, global_pose: bool, jaw_pose: bool, pose: list[float]
) -> None:
    network = on_meta(Emoca, clone=clone, global_pose=global_pose, jaw_pose=jaw_pose)
    network.to_empty(device="cpu")
    for tensor in network.state_dict().values():
        tensor.zero_()
    for head, first in ((network.E_flame, 0.0), (network.E_expression, 1000.0)):
        bias = head.layers[2].bias
        bias.copy_(torch.arange(first, first + len(bias)))
    shape, expression, turns, camera = network(torch.zeros(1, 3, 32, 32))
    assert shape[0].tolist() == list(range(100))
    assert expression[0].tolist() == list(range(1000, 1050))
    assert turns[0].tolist() == pose
    assert camera[0].tolist() == [206, 207, 208]


DETAIL_JAW = """\
coarse:
  model:
    exp_deca_global_pose: true
    exp_deca_jaw_pose: false
detail:
  model:
    # of the published checkpoint
    expression_backbone: deca_clone
    exp_deca_global_pose: false
    exp_deca_jaw_pose: true
"""


@pytest.mark.parametrize(
    ("rows", "cfg_yaml", "flags"),
    [
        (53, "", (False, True)),
        (53, DETAIL_JAW, (False, True)),
        (53, "exp_deca_global_pose: True\n", (True, False)),
        (53, "model:\n  exp_deca_global_pose: true\n  exp_deca_jaw_pose: false", (True, False)),
        (53, "exp_deca_jaw_pose: false\n", (True, False)),
        (50, "", (False, False)),
        (56, "", (True, True)),
    ],
)
def test_emoca_s_turns_are_read_from_its_rows_and_its_cfg(
    rows: int, cfg_yaml: str, flags: tuple[bool, bool]
) -> None:
    state = {"E_expression.layers.2.weight": torch.empty(rows, 1024)}
    config = config_of(state, cfg_yaml)
    assert config == {"clone": False, "global_pose": flags[0], "jaw_pose": flags[1]}


def test_emoca_refuses_a_cfg_of_another_checkpoint_and_odd_rows() -> None:
    state = published(Emoca)
    with pytest.raises(SettingsError, match="53 rows.*exp_deca_jaw_pose: False"):
        Emoca.from_published(state, "exp_deca_jaw_pose: false\nexp_deca_global_pose: false\n")
    state["deca.E_expression.layers.2.weight"] = torch.ones(52, 1024)
    with pytest.raises(SettingsError, match="it has 52"):
        Emoca.from_published(state)


def test_emoca_counts_what_it_leaves_and_shares_one_resnet_where_published_so() -> None:
    state = published(Emoca, clone=False)
    flame = {
        name.removeprefix("deca.E_flame."): v for name, v in state.items() if "E_flame" in name
    }
    state |= {f"deca.E_expression.resnet.{name}": value for name, value in flame.items()}
    state |= {"deca.E_detail.layers.0.bias": torch.ones(3), "deca.flame.f": torch.ones(2).long()}
    network = Emoca.from_published(state)
    assert not network.clone and network.counts is not None
    assert network.counts.spare == {
        BATCH_COUNTERS: 53, "second copy of E_flame": 322, "E_detail": 1, "flame": 1
    }  # fmt: skip
    assert network.counts.total == len(state)
    assert Emoca.from_tensors(network.state_dict(), network.config()).config() == network.config()
