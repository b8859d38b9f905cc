"""What a run is resumed from: safetensors files in its folder, each whole or not there at all."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes
from torch import Tensor

from diffusionact.errors import SettingsError
from diffusionact.files import write_whole
from diffusionact.training.inversions import InversionCache

FORMAT = 2
PATTERN, RING_PATTERN = "checkpoint-*.safetensors", "inversions-*.safetensors"
NO_RING: Mapping[str, Any] = {"added": 0, "files": []}
BEFORE = "last.pt"  # what versions before format 2 wrote, by pickle


def path_of(folder: Path, stage: int, step: int) -> Path:
    """Returns where the checkpoint of this place in the run lies; names sort by age."""
    return folder / f"checkpoint-{stage:02d}-{step:08d}.safetensors"


def newest(folder: Path) -> Path | None:
    """Returns the checkpoint to go on from, if there is one.

    Raises:
        SettingsError: there is only one of an earlier version.
    """
    found = sorted(folder.glob(PATTERN))
    if not found and (folder / BEFORE).exists():
        raise SettingsError(
            f"{folder / BEFORE} is the checkpoint of an earlier version, whose pickles this one "
            "does not open: finish that run with its own version, and begin a new one from the "
            "weights, by start = \"FILE\" in the recipe and another folder with -o"
        )  # fmt: skip
    return found[-1] if found else None


def write(path: Path, tensors: Mapping[str, Tensor], record: Mapping[str, Any]) -> None:
    """Writes a file of tensors and a record of JSON values, whole or not at all."""
    content = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    metadata = {"format": str(FORMAT), "record": json.dumps(record)}
    write_whole(path, to_bytes(content, metadata))


def read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Returns the tensors of the file and its record.

    Raises:
        SettingsError: it cannot be read, or is of another format.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise SettingsError(
            f"{path}: not a readable checkpoint ({error}); remove it to go on from the one before"
        ) from error
    if metadata.get("format") != str(FORMAT):
        raise SettingsError(f"{path}: format {metadata.get('format')}, wanted {FORMAT}")
    return tensors, json.loads(metadata["record"])


def thin_out(folder: Path, keep: int) -> None:
    """Removes all but the last `keep` checkpoints, and the parts of rings that none of them needs."""
    found = sorted(folder.glob(PATTERN))
    for path in found[:-keep]:
        path.unlink()
    needed = {name for path in found[-keep:] for name in _record(path)["ring"]["files"]}
    for path in folder.glob(RING_PATTERN):
        if path.name not in needed:
            path.unlink()


def _record(path: Path) -> dict[str, Any]:
    with safe_open(path, framework="pt") as file:
        record: dict[str, Any] = json.loads(file.metadata()["record"])
    return record


def optimizer_tensors(
    optimizer: torch.optim.Optimizer, names: Mapping[Tensor, str]
) -> dict[str, Tensor]:
    """Returns what the optimiser remembers of each parameter, as "PARAMETER/KEY"."""
    return {
        f"{names[parameter]}/{key}": value
        for parameter, memory in optimizer.state.items()
        for key, value in memory.items()
    }


def restore_optimizer(
    optimizer: torch.optim.Optimizer,
    names: Mapping[Tensor, str],
    tensors: Mapping[str, Tensor],
) -> None:
    """Gives the optimiser back what `optimizer_tensors` found. Rates, decays and the like stay
    those of the recipe: who lowers a rate before a resumption gets the lower one."""
    content = optimizer.state_dict()
    order = [p for group in optimizer.param_groups for p in group["params"]]
    places = {names[parameter]: place for place, parameter in enumerate(order)}
    for full, value in tensors.items():
        name, key = full.rsplit("/", 1)
        parameter = order[places[name]]
        if value.shape == parameter.shape:  # with the parameter's strides, as it was made
            value = torch.empty_like(parameter).copy_(value)
        content["state"].setdefault(places[name], {})[key] = value
    optimizer.load_state_dict(content)


def under(part: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Returns the tensors named "PART/...", by the rest of their names."""
    start = f"{part}/"
    return {name[len(start):]: value for name, value in tensors.items() if name.startswith(start)}  # fmt: skip


def named(part: str, tensors: Iterable[tuple[str, Tensor]]) -> dict[str, Tensor]:
    """Returns the tensors by the names "PART/..."."""
    return {f"{part}/{name}": value for name, value in tensors}


# The ring of inversions: too large to be written at each checkpoint, so each adds what is new.


def save_ring(folder: Path, stage: int, ring: InversionCache) -> dict[str, Any]:
    """Returns what a checkpoint says of the ring, after writing what it took in since the files
    that are there: how many were ever added, and the files that hold those it still needs."""
    files = _ring_files(folder, stage)
    fresh = ring.since(files[-1][1] if files else 0)
    first = int(fresh["first"][0])
    if first < ring.added:
        path = folder / f"inversions-{stage:02d}-{first:08d}-{ring.added:08d}.safetensors"
        write(path, {name: torch.from_numpy(array) for name, array in fresh.items()}, {})
        files.append((path, ring.added))
    needed = [path.name for path, end in files if end > ring.added - ring.held]
    return {"added": ring.added, "files": needed}


def restore_ring(folder: Path, stage: int, record: Mapping[str, Any], ring: InversionCache) -> None:
    """Fills the ring as it was at the checkpoint that says this of it. Files of what came later are
    removed: the run makes it anew.

    Raises:
        SettingsError: a file is missing or damaged.
    """
    for path, end in _ring_files(folder, stage):
        if end > record["added"]:
            path.unlink(missing_ok=True)
    for name in record["files"]:
        tensors, _ = read(folder / name)
        ring.restore({key: tensor.numpy() for key, tensor in tensors.items()})


def _ring_files(folder: Path, stage: int) -> list[tuple[Path, int]]:
    """The files of a stage's ring, each with the number of the entry after its last, ascending."""
    found = sorted(folder.glob(f"inversions-{stage:02d}-*.safetensors"))
    return [(path, int(path.stem.split("-")[3])) for path in found]
