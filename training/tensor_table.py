"""Tables of tensors out of foreign files: counted, compared with a network's names and shapes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from diffusionact.errors import SettingsError
from diffusionact.training.checkpoint_file import shown
from diffusionact.training.origins import ORIGINS

Tensors = Mapping[str, Tensor]
Shapes = Mapping[str, tuple[int, ...]]

WRAPPER = "module."  # what parallel training puts before every name
NAMES_SHOWN = 4


@dataclass(frozen=True)
class Count:
    """How many tensors a file holds of one network, and how many are wanted; None: unused."""

    what: str
    found: int
    wanted: int | None


@dataclass
class Findings:
    """What is told of a file beside its tensors.

    kind: of `origins.ORIGINS`; hint: what else a wrong network may mean.
    """

    path: Path
    kind: str
    hint: str = ""
    counts: list[Count] = field(default_factory=list)
    warnings: list[str] = field(default_factory=list)

    def error(self, what: str) -> SettingsError:
        """The error that says what is wrong with the file, and where to get it."""
        advice = f"Download it again: {ORIGINS[self.kind].url}"
        return SettingsError(f"{self.path}: {what}. {advice}{self.hint}")

    def warn(self, what: str) -> None:
        """Nothing; the warning is kept, with the file's name."""
        self.warnings.append(f"{self.path.name}: {what}")


def shapes(network: nn.Module) -> Shapes:
    """Name -> shape of a network's tensors."""
    return {name: tuple(value.shape) for name, value in network.state_dict().items()}


def shape_of(value: object) -> tuple[int, ...] | None:
    """The shape of a tensor, None for anything else."""
    return tuple(value.shape) if isinstance(value, Tensor) else None


def group(findings: Findings, content: Mapping[Any, Any], name: str) -> Tensors:
    """The table of tensors under `name`, without what parallel training puts before names.

    Raises:
        SettingsError: there is none, or its names are no text.
    """
    values = content.get(name)
    if not isinstance(values, Mapping) or not values:
        raise findings.error(f"has no tensors under {name!r}, only {some(list(content))}")
    return unwrapped(findings, values, name)


def unwrapped(findings: Findings, values: Mapping[Any, Any], name: str) -> Tensors:
    """The table without what parallel training puts before every name.

    Raises:
        SettingsError: a name is no text.
    """
    if strange := [key for key in values if not isinstance(key, str)]:
        raise findings.error(f"{name} has names that are no text ({some(strange)})")
    if not all(key.startswith(WRAPPER) for key in values):
        return values
    findings.warn(
        f"the names in {name} begin with {WRAPPER!r}, as parallel training writes them; "
        "read without it"
    )
    return {key[len(WRAPPER) :]: value for key, value in values.items()}


def under(tensors: Tensors, prefix: str, but: tuple[str, ...] = ()) -> Tensors:
    """The tensors whose name begins with `prefix`, under the rest of it, but for some."""
    found = {n[len(prefix) :]: t for n, t in tensors.items() if n.startswith(prefix)}
    return {n: t for n, t in found.items() if not n.startswith(but)} if but else found


def take(
    findings: Findings, tensors: Tensors, due: Shapes, what: str, prefix: str = ""
) -> dict[str, Tensor]:
    """The tensors of one network, float32, once all are there and no other.

    Args:
        prefix: of the names in the file, for messages.

    Raises:
        SettingsError: one is missing, unknown, of another shape, or has no finite values.
    """
    good = [name for name, shape in due.items() if shape_of(tensors.get(name)) == shape]
    findings.counts.append(Count(what, len(good), len(due)))
    if len(good) < len(due) or len(tensors) > len(due):
        raise findings.error(_difference(what, tensors, due, prefix))
    made = {name: _values(findings, prefix + name, tensors[name]) for name in due}
    stored = {str(t.dtype) for t in tensors.values() if t.is_floating_point()} - {"torch.float32"}
    if stored:
        findings.warn(f"{what} is stored as {', '.join(sorted(stored))}, made float32")
    return made


def some(names: list[Any]) -> str:
    """The first of the names, and how many more there are."""
    rest = f" and {len(names) - NAMES_SHOWN} more" if len(names) > NAMES_SHOWN else ""
    return (", ".join(shown(name) for name in names[:NAMES_SHOWN]) or "nothing") + rest


def _values(findings: Findings, name: str, value: Tensor) -> Tensor:
    """A copy of a tensor as float32; a batch norm's count of batches stays what it is."""
    if value.device.type != "cpu" or value.layout != torch.strided or value.is_quantized:
        raise findings.error(f"{shown(name)} holds no plain values")
    if name.endswith("num_batches_tracked") and value.dtype == torch.int64:
        return value.clone()
    if not value.is_floating_point():
        raise findings.error(f"{shown(name)} is {value.dtype}, wanted floating point")
    made = value.detach().to(torch.float32, copy=True).contiguous()
    if bad := int((~torch.isfinite(made)).sum()):
        raise findings.error(
            f"{shown(name)} has {bad} of {made.numel()} values that are not finite: damaged, or "
            "its training failed"
        )
    return made


def _difference(what: str, tensors: Tensors, due: Shapes, prefix: str) -> str:
    missing = [prefix + name for name in due if name not in tensors]
    unknown = [prefix + name for name in tensors if name not in due]
    said = [f"{what} has {len(due) - len(missing)} of the {len(due)} tensors wanted"]
    if missing:
        said.append(f"missing: {some(missing)}")
    if unknown:
        said.append(f"unknown: {some(unknown)}")
    other = [name for name in due if name in tensors and shape_of(tensors[name]) != due[name]]
    for name in other[:NAMES_SHOWN]:
        kind = shape_of(tensors[name])
        text = f"of shape {list(kind)}" if kind is not None else type(tensors[name]).__name__
        said.append(f"{shown(prefix + name)} is {text}, wanted {list(due[name])}")
    if len(other) > NAMES_SHOWN:
        said.append(f"{len(other)} tensors in all have another shape")
    return "; ".join(said)
