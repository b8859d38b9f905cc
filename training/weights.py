"""The weights file: safetensors, with the network's sizes and the weights' origin inside."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from diffusionact.decode import DecodeError, decode
from diffusionact.errors import SettingsError
from diffusionact.files import write_whole
from diffusionact.manifest import FILE_NAME as BUNDLE_FILE
from diffusionact.manifest import Sampling, student_fault
from diffusionact.training.models import NetworkConfig, ReenactmentEncoder, SemanticEncoder, UNet

FORMAT = "1"

# part -> the network it holds. `invert` is there only when inversion has weights of its own.
PARTS: Mapping[str, Callable[[NetworkConfig], nn.Module]] = {
    "render": UNet,
    "invert": UNet,
    "encoder": SemanticEncoder,
    "reenactment": ReenactmentEncoder,
}


@dataclass(frozen=True)
class Student:
    """What a few-step student is made for, each count with its timesteps; none but these.

    of: SHA-256 of the teacher's weights file.
    """

    of: str
    render: Sampling
    invert: Sampling

    def __post_init__(self) -> None:
        if fault := student_fault(self.of, self.render, self.invert):
            raise SettingsError(fault)
        for sampling in (self.render, self.invert):
            for count in sampling.counts:
                sampling.at(count)


@dataclass(frozen=True)
class Weights:
    """The content of a weights file; tensors as stored, names without the part.

    student: how it is run, if it is a student.
    """

    config: NetworkConfig
    parts: Mapping[str, Mapping[str, Tensor]]
    provenance: Mapping[str, Any] = field(default_factory=dict)
    student: Student | None = None

    def network(self, part: str) -> nn.Module:
        """The network of a part in float32, in evaluation mode.

        Raises:
            SettingsError: the file has no such part, or its tensors are not those of the config.
        """
        if part not in self.parts:
            raise SettingsError(f"the weights have no part {part!r}, only {sorted(self.parts)}")
        with torch.device("meta"):
            network = PARTS[part](self.config)
        tensors = {name: tensor.float() for name, tensor in self.parts[part].items()}
        try:
            network.load_state_dict(tensors, assign=True)  # no initialisation to throw away
        except RuntimeError as error:
            raise SettingsError(
                f"part {part!r} of the weights does not fit its network configuration: {error}"
            ) from error
        return network.requires_grad_(False).eval()


def save(
    path: Path | str,
    config: NetworkConfig,
    parts: Mapping[str, nn.Module],
    *,
    provenance: Mapping[str, Any],
    student: Student | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """Nothing; writes the networks of `parts` to `path`, whole or not at all.

    Args:
        dtype: what the tensors are rounded to; norms and biases too.
        provenance: JSON values: recipe, data, licence, commit.

    Raises:
        SettingsError: a part has an unknown name, or a value has no finite form in `dtype`.
    """
    tensors = {part: network.state_dict() for part, network in parts.items()}
    save_tensors(path, config, tensors, provenance=provenance, student=student, dtype=dtype)


def save_tensors(
    path: Path | str,
    config: NetworkConfig,
    parts: Mapping[str, Mapping[str, Tensor]],
    *,
    provenance: Mapping[str, Any],
    student: Student | None = None,
    dtype: torch.dtype = torch.float16,
) -> None:
    """As `save`, of tensors instead of networks. The same content makes the same file."""
    if unknown := sorted(set(parts) - set(PARTS)):
        raise SettingsError(f"parts {unknown} are unknown; a weights file has {list(PARTS)}")
    tensors = {
        f"{part}.{name}": tensor.detach().to("cpu", dtype).contiguous()
        for part, named in parts.items()
        for name, tensor in named.items()
    }
    for name, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise SettingsError(f"{name} is not finite as {dtype}; nothing was written to {path}")
    metadata = {
        "format": FORMAT,
        "config": json.dumps(config.to_dict()),
        "provenance": json.dumps(dict(provenance)),
    }
    if student is not None:
        metadata["student"] = json.dumps(asdict(student))
    write_whole(Path(path), *_ordered(to_bytes(tensors, metadata)))  # save_file's: owner alone


def _ordered(content: bytes) -> tuple[bytes, memoryview]:
    """The header and the tensors of a safetensors file, its metadata in the order of the names:
    the library's own order changes from process to process, and with it the file's hash.

    Source: the safetensors format: length as 8 bytes, JSON, spaces up to a multiple of 8, tensors.
    """
    end = 8 + int.from_bytes(content[:8], "little")
    header = json.loads(content[8:end])
    header["__metadata__"] = dict(sorted(header["__metadata__"].items()))
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text, memoryview(content)[end:]


def load(path: Path | str) -> Weights:
    """The content of a weights file, or the networks of a bundle.

    Raises:
        SettingsError: there is no such file, or it is not a weights file of this format.
        BundleError: as bundle_weights.
    """
    if (Path(path) / BUNDLE_FILE).is_file():
        from diffusionact.training import bundle_weights  # which is made of this module's types

        return bundle_weights.read(Path(path))
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except FileNotFoundError as error:
        raise SettingsError(
            f"{path}: no such weights file; diffusionact train writes it"
        ) from error
    except (OSError, SafetensorError) as error:
        raise SettingsError(
            f"{path}: not a readable safetensors file ({error}); published checkpoints go through "
            "diffusionact import first"
        ) from error
    if metadata.get("format") != FORMAT:
        raise SettingsError(
            f"{path}: weights format {metadata.get('format')!r}, this version reads {FORMAT!r}; "
            "give the file that diffusionact train wrote"
        )
    parts: dict[str, dict[str, Tensor]] = {}
    for full, tensor in tensors.items():
        part, name = full.split(".", 1)
        parts.setdefault(part, {})[name] = tensor
    config = NetworkConfig.from_dict(json.loads(metadata["config"]))
    provenance = json.loads(metadata.get("provenance", "{}"))
    return Weights(config, parts, provenance, _student(path, metadata.get("student")))


def _student(path: Path | str, text: str | None) -> Student | None:
    if text is None:
        return None
    try:
        return decode(Student, json.loads(text))
    except (DecodeError, SettingsError, ValueError) as error:
        raise SettingsError(
            f"{path}: its student's metadata is damaged ({error}); write the file again with "
            "diffusionact train"
        ) from error
