"""Writes directories of golden vectors for tests: our PyTorch's answers on weights of another rule.

The sampler's trajectory and the schedules are by the textbook, everything else by `training`.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from diffusionact import schedule
from diffusionact.training import diffusion
from diffusionact.training.models import Autoencoder, NetworkConfig, ReenactmentEncoder

Arrays = dict[str, np.ndarray[Any, Any]]

# Another rule than the published vectors': names give Gaussian numbers, of other sizes.
RULE = """
import hashlib
import numpy as np

def tensor(name, shape, kind=None):
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:8], "big")
    v = np.random.default_rng(seed).standard_normal(tuple(shape))
    if kind == "image":
        v = np.tanh(v)
    elif kind is None and len(shape) == 1:
        v = 0.05 * v + (1.0 if name.endswith("weight") else 0.0)
    elif kind is None:
        v = v * (shape[0] / np.prod(shape)) ** 0.5
    return v.astype(np.float32)

def state_dicts(manifest):
    made = {}
    for name, shape in manifest["keys"].items():
        part, key = name.split("/", 1)
        made.setdefault(part, {})[key] = tensor(name, shape)
    return made

def inputs(manifest):
    return {k: tensor(d["name"], d["shape"], d["kind"]) for k, d in manifest["inputs"].items()}
"""
TOLERANCES = {
    "note": "those of this directory", "encoders_and_net": 1e-5, "zero_conv_out": 1e-5,
    "temb": 1e-5, "modulation_vectors": 1e-5, "activations": 1e-4, "eps_a": 2e-5, "eps_cut": 1e-4,
    "render_cut": 3e-3, "render": 2e-3, "render_traj_first_step_sample": 1e-3,
    "encode_stochastic": 2e-3, "flow_xT": 2e-3, "flow_out": 2e-2, "render_and_flow_mean_abs": 1e-4,
    "schedules": "float64 arrays rtol 1e-11",
}  # fmt: skip
CODE, BATCH, TIMES = 12, 3, [7, 334, 801]


class Made:
    """A network by the rule, and its specification, before it has outputs."""

    def __init__(self, name: str, config: Mapping[str, Any], batch: int) -> None:
        self.name, side = name, config["image_size"]
        self.config = NetworkConfig(
            side, config["model_channels"], tuple(config["ch_mult"]),
            tuple(config["enc_ch_mult"]), res_blocks=config.get("num_res_blocks", 2),
            attention_at=tuple(config["attn"]), embed=CODE,
        )  # fmt: skip
        kinds = {
            "state_dict_diff/model.": Autoencoder,
            "state_dict_diff/ema_model.": Autoencoder,
            "state_dict_net/": ReenactmentEncoder,
        }
        networks = {prefix: kind(self.config) for prefix, kind in kinds.items()}
        keys = {
            prefix + key: list(value.shape)
            for prefix, network in networks.items()
            for key, value in network.state_dict().items()
        }
        picture = [batch, 3, side, side]
        kinds_of = {"src_img": "image", "x_t": "noise", "z": "code"}
        kinds_of |= {"stick": "image"} if name == "cut" else {
            "stick_src": "image", "stick_tgt": "image", "x_T": "noise",
        }  # fmt: skip
        self.spec: dict[str, Any] = {
            "config": {**config, "embed": CODE, "style": CODE}, "timesteps": TIMES, "keys": keys,
            "inputs": {
                key: {"kind": kind, "shape": [batch, CODE] if key == "z" else picture,
                      "name": f"{name}/{key}"}
                for key, kind in kinds_of.items()
            },
        }  # fmt: skip
        rule = _rule()
        states = rule.state_dicts(self.spec)
        for prefix, network in networks.items():
            part, _, key = prefix.partition("/")
            network.load_state_dict(
                {
                    k.removeprefix(key): torch.from_numpy(v)
                    for k, v in states[part].items()
                    if k.startswith(key)
                }
            )
            network.eval().requires_grad_(False)
        self.model, self.ema, self.net = (networks[prefix] for prefix in kinds)
        self.given = {k: torch.from_numpy(v) for k, v in rule.inputs(self.spec).items()}


def _rule() -> ModuleType:
    module = ModuleType("rule")
    exec(RULE, module.__dict__)
    return module


def _timesteps(value: int, count: int) -> Tensor:
    return torch.full((count,), value)


def inner(made: Made) -> dict[str, Tensor]:
    """What PyTorch alone can give: codes, embeddings, modulation, activations."""
    given, model = made.given, made.model
    seen: dict[str, Tensor] = {}
    watched = {
        "act_input0": model.input_blocks[0], "act_input2": model.input_blocks[2],
        "act_mid0": model.middle_block[0], "act_mid1_attn": model.middle_block[1],
        "act_mid": model.middle_block[2], "act_out2_up": model.output_blocks[2],
    }  # fmt: skip
    hooks = [
        (list(layer)[-1] if isinstance(layer, nn.Sequential) else layer).register_forward_hook(
            lambda _layer, _inputs, output, name=name: seen.__setitem__(name, output)
        )
        for name, layer in watched.items()
    ]
    model(given["x_t"][:1], torch.tensor(TIMES[2:]), given["z"][:1])
    for hook in hooks:
        hook.remove()
    block = model.input_blocks[2][0]
    times = torch.tensor(TIMES)
    return {
        **seen,
        "enc_ema_src": made.ema.encode(given["src_img"]),
        "enc_model_src": model.encode(given["src_img"]),
        "zero_conv_out": made.net.zero_conv_1(given["stick_tgt"]),
        "temb_sincos": model.time_embed.sinusoids(times),
        "temb_mlp": model.time_embed(times),
        "mod_time_in2": block.emb_layers(model.time_embed(times[2:])),
        "mod_cond_in2": block.cond_emb_layers(given["z"][:1]),
    }


def flow(made: Made, renders: int, inverts: int) -> dict[str, Tensor]:
    """What a bundle can give too: noise predictions, both samplers, the whole flow."""
    given, model, ema = made.given, made.model, made.ema
    x_t, z, source = given["x_t"], given["z"], given["src_img"]
    z_s = made.net(source, given["stick_src"])
    z_r = made.net(source, given["stick_tgt"])
    x_T = diffusion.invert(ema, "eps", source, z_s, inverts)
    samples, x_0s = _trajectory(model, given["x_T"], z, renders)
    return {
        "net_src": z_s,
        "net_tgt": z_r,
        "eps_model_t334": model(x_t, _timesteps(334, BATCH), z),
        "eps_ema_t7": ema(x_t, _timesteps(7, BATCH), z),
        "eps_model_tmixed": model(x_t, torch.tensor(TIMES), z),
        "render": diffusion.render(model, "eps", given["x_T"], z, renders),
        "render_ema": diffusion.render(ema, "eps", given["x_T"], z, renders),
        "render_traj_sample": samples,
        "render_traj_x0": x_0s,
        "encode_stochastic_model": diffusion.invert(model, "eps", source, z, inverts),
        "flow_xT": x_T,
        "flow_out": diffusion.render(model, "eps", x_T, z_r, renders),
    }


def _trajectory(model: nn.Module, x: Tensor, z: Tensor, steps: int) -> tuple[Tensor, Tensor]:
    """x and x_0 of the first picture after each step."""
    table, at = schedule.alpha_bars(), list(reversed(schedule.timesteps(steps).tolist()))
    samples, x_0s = [], []
    for t, below in zip(at, [*at[1:], None], strict=True):
        eps = model(x[:1], torch.tensor([t]), z[:1])
        x_0 = ((x[:1] - (1 - table[t]) ** 0.5 * eps) / table[t] ** 0.5).clamp(-1, 1)
        eps = (x[:1] - table[t] ** 0.5 * x_0) / (1 - table[t]) ** 0.5
        level = 1.0 if below is None else table[below]
        x = level**0.5 * x_0 + (1 - level) ** 0.5 * eps
        samples.append(x[0])
        x_0s.append(x_0[0])
    return torch.stack(samples), torch.stack(x_0s)


def as_arrays(tensors: Mapping[str, Tensor]) -> Arrays:
    """The tensors as NumPy arrays."""
    return {name: tensor.numpy() for name, tensor in tensors.items()}


def write(folder: Path, made: Made, arrays: Mapping[str, Any], **fields: Any) -> None:
    """One network of a directory, and what every directory has."""
    folder.mkdir(exist_ok=True)
    (folder / "regen.py").write_text(RULE)
    (folder / "manifest.json").write_text(json.dumps({"tolerances_float32": TOLERANCES}))
    (folder / f"{made.name}.json").write_text(json.dumps({**made.spec, **fields}))
    np.savez(folder / f"{made.name}.npz", **arrays)


def write_cut(folder: Path, changed: tuple[str, tuple[int, ...]]) -> None:
    """A network of which patches and means are stored, another size again; one value is wrong."""
    config = {
        "num_res_blocks": 1,
        "image_size": 32,
        "model_channels": 4,
        "ch_mult": [1, 3],
        "enc_ch_mult": [2, 3],
    }
    made = Made("cut", {**config, "attn": [16]}, batch=1)
    given = made.given
    pictures = {
        "eps_model_t801": made.model(given["x_t"], torch.tensor([801]), given["z"]),
        "render_T3": diffusion.render(made.model, "eps", given["x_t"], given["z"], 3),
    }
    arrays = {"net_src_stick": made.net(given["src_img"], given["stick"]).numpy()}
    stats = {}
    for name, tensor in pictures.items():
        x = tensor[0].numpy().astype(np.float64)
        arrays[f"{name}/patch_center"] = x[:, 13:19, 13:19]
        arrays[f"{name}/patch_corner"] = x[:, :6, :6].copy()
        arrays[f"{name}/block4_mean"] = x.reshape(3, 8, 4, 8, 4).mean(axis=(2, 4))
        stats[name] = {"shape": [1, *x.shape], "mean": x.mean(), "l2": np.sqrt((x**2).sum())}
    arrays[changed[0]][changed[1]] += 0.01
    write(folder, made, arrays, T_render=3, stats=stats)


def write_schedules(folder: Path, total: int, counts: Mapping[str, list[int]]) -> None:
    """Tables by the textbook, not by our schedule."""
    betas = np.linspace(0.001, 0.03, total) if total != 1000 else np.linspace(1e-4, 0.02, 1000)
    table, arrays = np.cumprod(1 - betas), {"base_betas": betas}
    for count, at in counts.items():
        level = table[at]
        arrays |= {
            f"T{count}_timesteps": np.array(at),
            f"T{count}_alphas_cumprod": level,
            f"T{count}_alphas_cumprod_prev": np.append(1.0, level[:-1]),
            f"T{count}_alphas_cumprod_next": np.append(level[1:], 0.0),
            f"T{count}_betas": 1 - level / np.append(1.0, level[:-1]),
            f"T{count}_sqrt_recip_alphas_cumprod": level**-0.5,
            f"T{count}_sqrt_recipm1_alphas_cumprod": (1 / level - 1) ** 0.5,
        }
    np.savez(folder / "schedules.npz", **arrays)
    (folder / "schedules.json").write_text(json.dumps({"timesteps": counts}))
