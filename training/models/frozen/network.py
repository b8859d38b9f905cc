"""What the helper networks have in common: strict loading of published files, with counts."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from diffusionact.errors import SettingsError

BATCH_COUNTERS = "batch counters of norms"
SHOWN = 3  # names of a kind that a message lists


@dataclass(frozen=True)
class Counts:
    """How many tensors of a published file a network took, and what else the file held.

    spare: what the tensors are -> how many; inference needs none of them.
    """

    used: int
    spare: Mapping[str, int] = field(default_factory=dict)

    @property
    def total(self) -> int:
        return self.used + sum(self.spare.values())


class FrozenNorm(nn.Module):
    """Batch norm with fixed statistics; without the counter, which inference never reads."""

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, channels: int, eps: float = 1e-5) -> None:
        super().__init__()
        self.eps = eps
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.register_buffer("running_mean", torch.zeros(channels))
        self.register_buffer("running_var", torch.ones(channels))

    def forward(self, x: Tensor) -> Tensor:
        return F.batch_norm(
            x, self.running_mean, self.running_var, self.weight, self.bias, eps=self.eps
        )


class FrozenNetwork(nn.Module):
    """A helper network for inference: published parameter names, float32, evaluation mode."""

    NAME: ClassVar[str]  # of the component and of its file in weights/
    INPUT: ClassVar[tuple[int, ...]]  # shape of the one input, `image`
    OUTPUTS: ClassVar[tuple[str, ...]]  # what forward() returns, in order

    counts: Counts | None = None  # of the published file it came from

    def config(self) -> dict[str, Any]:
        """The constructor's arguments: JSON values."""
        return {}

    @classmethod
    def from_tensors(
        cls, tensors: Mapping[str, Tensor], config: Mapping[str, Any] | None = None
    ) -> Self:
        """The network of a file in weights/, from its tensors and the config stored with them.

        Raises: SettingsError: the tensors are not exactly this network's.
        """
        return cls._load(tensors, config or {}, lambda name: None)

    @classmethod
    def from_published(cls, state: Mapping[str, Any]) -> Self:
        """The network from its published state dict, every name accounted for in `counts`.

        Raises: SettingsError: tensors are missing, unknown, of another shape or not finite.
        """
        return cls._load(state, {}, batch_counter)

    @classmethod
    def _load(
        cls,
        state: Mapping[str, Any],
        config: Mapping[str, Any],
        spare: Callable[[str], str | None],
    ) -> Self:
        """The network with the tensors of `state`, less those which `spare` gives a group."""
        try:
            with torch.device("meta"):
                network = cls(**config)
        except TypeError as error:
            raise SettingsError(f"{cls.NAME}: config {dict(config)} is unknown: {error}") from error
        state = named(cls.NAME, state)
        groups = Counter(group for name in state if (group := spare(name)))
        tensors = {name: value for name, value in state.items() if not spare(name)}
        wanted = network.state_dict()
        _check(cls.NAME, tensors, wanted)
        floats = {name: tensors[name].detach().float().contiguous() for name in wanted}
        network.load_state_dict(floats, assign=True)  # no initialisation to throw away
        network.counts = Counts(len(floats), dict(groups))
        return network.requires_grad_(False).eval()


def named(network: str, state: Any) -> Mapping[str, Any]:
    """`state` itself, known to be a mapping of names.

    Raises: SettingsError: it is something else.
    """
    if isinstance(state, Mapping) and all(isinstance(name, str) for name in state):
        return state
    raise SettingsError(
        f"{network}: the file holds a {type(state).__name__} where names and tensors were wanted. "
        "Give the file as its makers publish it"
    )


def batch_counter(name: str) -> str | None:
    """The group of a name that is a batch norm's counter of steps; None of any other."""
    return BATCH_COUNTERS if name.endswith(".num_batches_tracked") else None


def _check(network: str, tensors: Mapping[str, Any], wanted: Mapping[str, Tensor]) -> None:
    """Nothing; raises SettingsError with all that is wrong about the tensors."""
    present = [name for name in wanted if name in tensors]
    problems = {
        "are missing": [name for name in wanted if name not in tensors],
        "are unknown": [name for name in tensors if name not in wanted],
        "are not tensors of floats": [name for name in present if not _is_float(tensors[name])],
    }
    present = [name for name in present if _is_float(tensors[name])]
    problems["have another shape"] = [
        f"{name} {list(tensors[name].shape)} instead of {list(wanted[name].shape)}"
        for name in present
        if tensors[name].shape != wanted[name].shape
    ]
    problems["are not finite"] = [
        name for name in present if not torch.isfinite(tensors[name]).all()
    ]
    found = [f"{len(names)} {what} ({_few(names)})" for what, names in problems.items() if names]
    if found:
        raise SettingsError(
            f"{network}: of {len(wanted)} tensors wanted and {len(tensors)} given, "
            f"{'; '.join(found)}. Give the file as its makers publish it"
        )


def _is_float(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()


def _few(names: Sequence[str]) -> str:
    return ", ".join(names[:SHOWN]) + (", ..." if len(names) > SHOWN else "")
