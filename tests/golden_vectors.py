"""What each golden vector of a network is: its name -> the computation that has to give it."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple, TypeAlias, cast

import numpy as np
import numpy.typing as npt
from torch import nn

from diffusionact import schedule
from diffusionact.manifest import Schedule
from tests.golden_networks import OnnxNetworks, TorchNetworks, answer

Array: TypeAlias = npt.NDArray[Any]
Match: TypeAlias = re.Match[str]

MEAN = "render_and_flow_mean_abs"  # the limit of the mean of whatever was sampled


@dataclass
class Case:
    """One network of a directory.

    spec: its JSON; stored: its .npz; inputs: by key; timesteps: count -> the listed ones.
    """

    name: str
    spec: Mapping[str, Any]
    stored: Mapping[str, Array]
    inputs: Mapping[str, Array]
    tolerances: Mapping[str, Any]
    plan: Schedule = field(default_factory=Schedule)
    timesteps: Mapping[str, list[int]] = field(default_factory=dict)

    def tolerance(self, key: str) -> float:
        """The largest difference allowed to vectors of a kind, for this network if it has its own.

        Raises:
            KeyError: the directory gives none.
        """
        for name in (f"{key}_{self.name}", key):
            if name in self.tolerances:
                return float(self.tolerances[name])
        of_others = [v for k, v in self.tolerances.items() if k.startswith(f"{key}_")]
        if not of_others:
            raise KeyError(f"no tolerance {key!r} among tolerances_float32")
        return float(min(of_others))

    def picture(self, key: str) -> Array:
        """The input `key`_img, or `key`."""
        return self.inputs[f"{key}_img" if f"{key}_img" in self.inputs else key]

    def drawing(self, key: str) -> Array:
        """The input stick_`key`, or the only drawing there is."""
        return self.inputs[f"stick_{key}" if f"stick_{key}" in self.inputs else "stick"]

    def run(self, direction: str, count: int) -> schedule.Run:
        """The sampler's tables: direction "render" or "invert"."""
        plan = self.plan
        table = schedule.alpha_bars(plan.total, plan.beta_start, plan.beta_end)
        at = schedule.timesteps(self.timesteps.get(str(count), count), plan.total)
        make = schedule.render_run if direction == "render" else schedule.inversion_run
        return make("eps", at, table)


class Samples(NamedTuple):
    """After each step of a run: x at the next noise level, and the clipped x_0 it was made of."""

    x: list[Array]
    x_0: list[Array]


class Answers:
    """What our networks give for a case; each run of the sampler is made once."""

    def __init__(self, case: Case, networks: TorchNetworks | OnnxNetworks) -> None:
        self.case = case
        self.networks = networks
        self._whole: dict[str, Array] = {}
        self._runs: dict[tuple[object, ...], Samples] = {}

    @property
    def torch(self) -> TorchNetworks:
        """The networks, where a rule says that only PyTorch has what is asked for."""
        return cast(TorchNetworks, self.networks)

    def of(self, name: str) -> Array:
        """The array that the vector `name` should hold; "name/place" is a cut of "name"."""
        base, _, place = name.partition("/")
        if base not in self._whole:
            rule, match = find_rule(base)
            self._whole[base] = rule.compute(self, match)
        whole = self._whole[base]
        return cut(whole[0], place, self.case.stored[name].shape) if place else whole

    def sampled(self, direction: str, which: str, count: int, start: str, code: str) -> Samples:
        """A run of the sampler; `start` and `code` name inputs, or what `flow` made."""
        key = (direction, which, count, start, code)
        if key not in self._runs:
            x, z = (self._given(name) for name in (start, code))
            self._runs[key] = self._sample(self.case.run(direction, count), which, x, z)
        return self._runs[key]

    def _given(self, name: str) -> Array:
        """An input, or for the whole flow the codes that it makes itself."""
        case = self.case
        if name in ("z_src", "z_tgt"):
            return self.networks.net(case.picture("src"), case.drawing(name[2:]))
        return self.of(name) if name == "flow_xT" else case.inputs[name]

    def _sample(self, run: schedule.Run, which: str, x: Array, z: Array) -> Samples:
        made = Samples([], [])
        for step in run.steps:
            t = np.full(len(x), run.timesteps[step.row], np.float32)
            eps = self.networks.eps(which, x, t, z)
            level, level_to = float(run.alpha_bar[step.row]), float(run.alpha_bar_to[step.row])
            x_0 = schedule.x0_from_prediction("eps", x, eps, level).clip(-1.0, 1.0)
            x = schedule.ddim_step("eps", x, eps, level, level_to)
            made.x.append(x)
            made.x_0.append(x_0)
        return made


def cut(picture: Array, place: str, shape: tuple[int, ...]) -> Array:
    """The part of a picture [3,S,S] that was stored under this name in this shape.

    Raises:
        KeyError: no part has such a name.
    """
    _, height, width = shape
    if place == "patch_corner":
        return picture[:, :height, :width]
    if place == "patch_center":
        top, left = (picture.shape[1] - height) // 2, (picture.shape[2] - width) // 2
        return picture[:, top : top + height, left : left + width]
    if match := re.fullmatch(r"block(\d+)_mean", place):
        side = int(match[1])
        blocks = picture.astype(np.float64).reshape(len(picture), height, side, width, side)
        return np.asarray(blocks.mean(axis=(2, 4)))
    raise KeyError(f"no place {place!r} of a picture is known")


def probed_timestep(case: Case, networks: TorchNetworks) -> int:
    """The timestep at which activations and modulation were taken, which the JSON does not say:
    the one that gives the stored time modulation, a listed one if it can be; without it, the
    middle one of the list."""
    listed: list[int] = list(case.spec["timesteps"])
    names = [name for name in case.stored if re.fullmatch(r"mod_time_in\d+", name)]
    if not names:
        return listed[len(listed) // 2]
    due = case.stored[names[0]].reshape(1, -1)
    at = np.array([*listed, *range(case.plan.total)], np.float32)
    seen = _time_modulation(networks, int(names[0].removeprefix("mod_time_in")), at)
    apart = np.abs(seen - due).max(axis=1)
    near = np.flatnonzero(apart <= case.tolerance("modulation_vectors"))
    return int(at[near[0]] if len(near) else at[np.argmin(apart[: len(listed)])])


def _time_modulation(networks: TorchNetworks, index: int, t: Array) -> Array:
    unet = networks.unet("model")
    block: Any = cast(nn.Sequential, unet.input_blocks[index])[0]
    return answer(block.emb_layers, answer(unet.time_embed, t))


def _code(answers: Answers, match: Match) -> Array:
    return answers.torch.code(match["which"], answers.case.picture(match["key"]))


def _net(answers: Answers, match: Match) -> Array:
    case, key = answers.case, match["key"]
    if f"stick_{key}" in case.inputs:
        return answers.networks.net(case.picture("src"), case.drawing(key))
    picture, _, drawing = key.partition("_")
    return answers.networks.net(case.picture(picture), case.inputs[drawing])


def _zero_conv(answers: Answers, _match: Match) -> Array:
    return answer(answers.torch.encoder.zero_conv_1, answers.case.drawing("tgt"))


def _time_embedding(answers: Answers, match: Match) -> Array:
    embed = answers.torch.unet("model").time_embed
    t = np.array(answers.case.spec["timesteps"], np.float32)
    return answer(embed.sinusoids if match["what"] == "sincos" else embed, t)


def _modulation(answers: Answers, match: Match) -> Array:
    networks, index = answers.torch, int(match["index"])
    if match["what"] == "time":
        t = np.array([probed_timestep(answers.case, networks)], np.float32)
        return _time_modulation(networks, index, t)
    block: Any = cast(nn.Sequential, networks.unet("model").input_blocks[index])[0]
    return answer(block.cond_emb_layers, answers.case.inputs["z"][:1])


def _activation(answers: Answers, match: Match) -> Array:
    networks, given = answers.torch, answers.case.inputs
    unet = networks.unet("model")
    stages = {"input": unet.input_blocks, "out": unet.output_blocks, "mid": unet.middle_block}
    layer = stages[match["where"]]
    if match["index"]:
        layer = cast(Any, layer)[int(match["index"])]
    if isinstance(layer, nn.Sequential):
        layer = layer[-1]
    t = np.array([probed_timestep(answers.case, networks)], np.float32)
    return networks.activations({"it": layer}, given["x_t"][:1], t, given["z"][:1])["it"]


def _eps(answers: Answers, match: Match) -> Array:
    given = answers.case.inputs
    count = len(given["x_t"])
    if match["t"] == "mixed":  # from the first listed timestep to the last over the batch
        listed = answers.case.spec["timesteps"]
        t = [listed[round(i)] for i in np.linspace(0, len(listed) - 1, count)]
    else:
        t = [int(match["t"])] * count
    return answers.networks.eps(match["which"], given["x_t"], np.array(t, np.float32), given["z"])


def _render_samples(answers: Answers, match: Match) -> Samples:
    groups, case = match.groupdict(), answers.case
    start = "x_T" if "x_T" in case.inputs else "x_t"
    count = int(groups.get("T") or case.spec["T_render"])
    return answers.sampled("render", groups.get("which") or "model", count, start, "z")


def _render(answers: Answers, match: Match) -> Array:
    return _render_samples(answers, match).x[-1]


def _trajectory(answers: Answers, match: Match) -> Array:
    samples = _render_samples(answers, match)
    return np.stack([batch[0] for batch in (samples.x_0 if match["what"] == "x0" else samples.x)])


def _inverted(answers: Answers, match: Match) -> Array:
    count = int(match["T"] or answers.case.spec["T_reverse"])
    return answers.sampled("invert", match["which"], count, "src_img", "z").x[-1]


def _flow_noise(answers: Answers, _match: Match) -> Array:
    count = int(answers.case.spec["T_reverse"])
    return answers.sampled("invert", "ema", count, "src_img", "z_src").x[-1]


def _flow_frame(answers: Answers, _match: Match) -> Array:
    count = int(answers.case.spec["T_render"])
    return answers.sampled("render", "model", count, "flow_xT", "z_tgt").x[-1]


class Rule(NamedTuple):
    """A form of names. exported: whether the bundle's graphs give it too; sampled: whether its
    mean is limited as well."""

    pattern: str
    tolerance: str
    compute: Callable[[Answers, Match], Array]
    exported: bool = False
    sampled: bool = False


RULES = (
    Rule(r"enc_(?P<which>model|ema)_(?P<key>\w+)", "encoders_and_net", _code),
    Rule(r"net_(?P<key>\w+)", "encoders_and_net", _net, exported=True),
    Rule(r"zero_conv_out", "zero_conv_out", _zero_conv),
    Rule(r"temb_(?P<what>sincos|mlp)", "temb", _time_embedding),
    Rule(r"mod_(?P<what>time|cond)_in(?P<index>\d+)", "modulation_vectors", _modulation),
    Rule(r"act_(?P<where>input|mid|out)(?P<index>\d*)(_\w+)?", "activations", _activation),
    Rule(r"eps_(?P<which>model|ema)_t(?P<t>\d+|mixed)", "eps", _eps, True),
    Rule(r"render_traj_(?P<what>sample|x0)", "render", _trajectory, True, True),
    Rule(r"render(_(?P<which>model|ema))?(_T(?P<T>\d+))?", "render", _render, True, True),
    Rule(
        r"encode_stochastic_(?P<which>model|ema)(_T(?P<T>\d+))?",
        "encode_stochastic", _inverted, True, True,
    ),
    Rule(r"flow_xT", "flow_xT", _flow_noise, True, True),
    Rule(r"flow_out", "flow_out", _flow_frame, True, True),
)  # fmt: skip


def find_rule(base: str) -> tuple[Rule, Match]:
    """The rule of a name, without what stands behind a slash.

    Raises:
        KeyError: no rule knows the name.
    """
    for rule in RULES:
        if match := re.fullmatch(rule.pattern, base):
            return rule, match
    raise KeyError(f"no vector is called {base!r}")


def names(case: Case) -> Iterator[str]:
    """The vectors of a case, those that the JSON lists and the .npz lacks among them; no inputs."""
    yield from dict.fromkeys(
        name for name in (*case.stored, *case.spec.get("outputs", ())) if not name.startswith("in_")
    )
