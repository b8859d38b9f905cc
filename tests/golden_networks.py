"""The networks behind golden vectors: in PyTorch, and exported, in ONNX Runtime.

Both answer NumPy arrays of any batch. `which` is "model" or "ema", as the vectors' names say.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from types import ModuleType
from typing import Any, TypeAlias, cast

import numpy as np
import numpy.typing as npt
import torch
from torch import Tensor, nn

from diffusionact import manifest as manifest_file
from diffusionact.condition import Drawing
from diffusionact.errors import SettingsError
from diffusionact.export import to_onnx, wrap
from diffusionact.manifest import ComponentSpec, Crop, Manifest, Sampling, Schedule, Training
from diffusionact.runtime.component import open_component
from diffusionact.training.models import Autoencoder, NetworkConfig, ReenactmentEncoder

Array: TypeAlias = npt.NDArray[Any]

SUFFIX = {"model": "", "ema": "_invert"}  # of a bundle's components


class TorchNetworks:
    """The networks of a specification, on weights made by its rule."""

    def __init__(self, spec: Mapping[str, Any], regen: ModuleType) -> None:
        self.config = _network_config(spec["config"])
        given = weights_by(regen, spec)
        self._unets = {
            "model": _loaded(Autoencoder, self.config, given, "state_dict_diff/model."),
            "ema": _loaded(Autoencoder, self.config, given, "state_dict_diff/ema_model."),
        }
        self.encoder = _loaded(ReenactmentEncoder, self.config, given, "state_dict_net/")
        if given:
            raise SettingsError(f"weights that no network has: {sorted(given)[:5]}")

    def unet(self, which: str) -> Autoencoder:
        """The `model` or `ema_model`."""
        return self._unets[which]

    def eps(self, which: str, x: Array, t: Array, z: Array) -> Array:
        """The prediction [N,3,S,S] for x [N,3,S,S], t [N] and z [N,Z]."""
        return answer(self.unet(which), x, t, z)

    def code(self, which: str, image: Array) -> Array:
        """z [N,Z] of the semantic encoder."""
        return answer(self.unet(which).encode, image)

    def net(self, image: Array, drawing: Array) -> Array:
        """z [N,Z] of the reenactment encoder."""
        return answer(self.encoder, image, drawing)

    def activations(
        self, layers: Mapping[str, nn.Module], x: Array, t: Array, z: Array
    ) -> dict[str, Array]:
        """What the layers of `model` put out while it runs."""
        seen: dict[str, Array] = {}
        hooks = [
            layer.register_forward_hook(
                lambda _layer, _inputs, output, name=name: seen.__setitem__(name, output.numpy())
            )
            for name, layer in layers.items()
        ]
        self.eps("model", x, t, z)
        for hook in hooks:
            hook.remove()
        return seen


class OnnxNetworks:
    """The graphs of a bundle that `write_bundle` wrote."""

    def __init__(self, bundle_dir: Path, threads: int) -> None:
        found = manifest_file.read(bundle_dir)
        self._components = {
            name: _bound(bundle_dir, found, name, threads) for name in found.components
        }

    def eps(self, which: str, x: Array, t: Array, z: Array) -> Array:
        """The prediction [N,3,S,S] for x [N,3,S,S], t [N] and z [N,Z]."""
        suffix, made = SUFFIX[which], []
        for one_x, one_t, one_z in zip(x, t, z, strict=True):
            rows = self._components["time" + suffix](t=one_t[None])["time_rows"]
            both = self._components["modulation" + suffix](z=one_z[None], time_rows=rows)
            made.append(self._components["unet_step" + suffix](x_t=one_x[None], **both))
        return np.concatenate([outputs["prediction"] for outputs in made])

    def net(self, image: Array, drawing: Array) -> Array:
        """z [N,Z] of the reenactment encoder."""
        encode = self._components["encoder"]
        pairs = zip(image, drawing, strict=True)
        return np.concatenate([encode(image=i[None], condition=d[None])["z"] for i, d in pairs])


def weights_by(regen: ModuleType, spec: Mapping[str, Any]) -> dict[str, Array]:
    """The rule's weights under their full names, such as state_dict_net/zero_conv_1.bias."""
    if not hasattr(regen, "state_dicts"):
        return {name: regen.tensor(name, shape) for name, shape in spec["keys"].items()}
    made = regen.state_dicts(spec)
    return {f"{part}/{key}": value for part, keys in made.items() for key, value in keys.items()}


def inputs_by(regen: ModuleType, spec: Mapping[str, Any]) -> dict[str, Array]:
    """The rule's inputs by key."""
    if hasattr(regen, "inputs"):
        return dict(regen.inputs(spec))
    listed = spec["inputs"].items()
    return {key: regen.tensor(d["name"], d["shape"], d["kind"]) for key, d in listed}


def answer(function: Callable[..., Tensor], *inputs: Array) -> Array:
    """The function's tensor for these arrays."""
    with torch.inference_mode():
        return np.asarray(function(*(torch.from_numpy(array) for array in inputs)).numpy())


def write_bundle(
    folder: Path,
    networks: TorchNetworks,
    plan: Schedule,
    samplings: tuple[Sampling, Sampling],
    own_inversion: bool,
) -> None:
    """Nothing; the networks are in the folder as a bundle. `samplings`: of render, of inversion.

    Made of the exporter's parts, for its own comparison of 140 steps is what is done here anyway.
    """
    unet = networks.unet("model")
    bare = Manifest(
        name="golden",
        image_size=networks.config.image_size,
        z_size=networks.config.embed,
        modulation_size=unet.modulation_size,
        time_row_size=2 * unet.modulation_size,
        prediction=networks.config.prediction,
        schedule=plan,
        render=samplings[0],
        invert=samplings[1],
        crop=Crop(rotate=True),
        drawing=Drawing(),
        landmark_layout="ibug68+gaze2",
        training=Training("weights made by a rule", "none", "noise"),
        licence="none",
        weights_sha256="0" * 64,
        components={},
    )
    tensors = manifest_file.component_tensors(bare)
    modules = wrap.components(
        networks.encoder, unet, networks.unet("ema") if own_inversion else None
    )
    folder.mkdir(parents=True, exist_ok=True)
    components = {}
    for name, module in modules.items():
        path = folder / f"{name}.onnx"
        inputs, outputs = tensors[name.removesuffix("_invert")]
        to_onnx.export(module, inputs, outputs, path)
        digest = manifest_file.file_sha256(path)
        components[name] = ComponentSpec(path.name, digest, inputs, outputs)
    manifest_file.write(folder, replace(bare, components=components))


def _network_config(given: Mapping[str, Any]) -> NetworkConfig:
    """The configuration under our names."""
    if given.get("style", given["embed"]) != given["embed"]:
        raise SettingsError(f"style {given['style']} differs from embed {given['embed']}")
    return NetworkConfig(
        image_size=given["image_size"],
        channels=given["model_channels"],
        channel_mult=tuple(given["ch_mult"]),
        encoder_mult=tuple(given["enc_ch_mult"]),
        res_blocks=given.get("num_res_blocks", NetworkConfig.res_blocks),
        attention_at=tuple(given["attn"]),
        embed=given["embed"],
    )


def _loaded(
    kind: Callable[[NetworkConfig], nn.Module],
    config: NetworkConfig,
    given: dict[str, Array],
    prefix: str,
) -> Any:
    """The network with the weights under the prefix, which leave `given`."""
    names = [name for name in given if name.startswith(prefix)]
    weights = {name.removeprefix(prefix): torch.from_numpy(given.pop(name)) for name in names}
    with torch.device("meta"):
        network = kind(config)
    network.load_state_dict(weights, assign=True)
    return network.eval().requires_grad_(False)


def _bound(
    bundle_dir: Path, found: Manifest, name: str, threads: int
) -> Callable[..., dict[str, Array]]:
    """A call of the component: arrays by name -> copies of its outputs by name."""
    part = open_component(bundle_dir, found, name, threads=threads, sizes={"N": 1})
    specs = {**part.inputs, **part.outputs}
    arrays = {
        key: np.zeros([cast(int, size) for size in spec.shape], spec.dtype)
        for key, spec in specs.items()
    }
    part.bind(**arrays)

    def call(**inputs: Array) -> dict[str, Array]:
        for key, value in inputs.items():
            np.copyto(arrays[key], value)
        part.run()
        return {key: arrays[key].copy() for key in part.outputs}

    return call
