"""The folder that `diffusionact import` writes and `diffusionact export` reads.

diffusionact.safetensors    the diffusion model, in the format of weights.py
{s3fd,fan,emoca,gaze}.safetensors    the networks of the published tracker
flame.npz       the face model, reduced to what its 68 landmarks need
import.json     what each of them was made from
"""

from __future__ import annotations

import io
import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as to_bytes

from diffusionact.errors import SettingsError
from diffusionact.files import write_whole
from diffusionact.manifest import file_sha256
from diffusionact.training.models.frozen import NETWORKS, FrozenNetwork

MODEL_FILE = "diffusionact.safetensors"
FLAME_FILE = "flame.npz"
RECORD_FILE = "import.json"
FORMAT = "1"


@dataclass(frozen=True)
class Record:
    """The content of import.json.

    files: name of `origins.ORIGINS` -> what was read: names, sha256, origin, licence, counts,
    warnings; outputs: file of the folder -> its sha256.
    """

    files: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    outputs: Mapping[str, str] = field(default_factory=dict)


def helper_file(folder: Path, name: str) -> Path:
    """Where the folder keeps the network `name` of the tracker."""
    return folder / f"{name}.safetensors"


def save_helper(folder: Path, network: FrozenNetwork, source_sha256: str) -> Path:
    """The file in which the network now is, float32, whole or not at all."""
    metadata = {
        "format": FORMAT,
        "network": network.NAME,
        "source_sha256": source_sha256,
        "config": json.dumps(network.config()),
    }
    path = helper_file(folder, network.NAME)
    tensors = {name: value.contiguous() for name, value in network.state_dict().items()}
    write_whole(path, to_bytes(tensors, metadata))
    return path


def load_helper(folder: Path, name: str) -> FrozenNetwork | None:
    """The network `name` of the tracker, None where the folder has none.

    Raises:
        SettingsError: its file is damaged, or of another network or format.
    """
    path = helper_file(folder, name)
    if not path.is_file():
        return None
    try:
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {key: file.get_tensor(key) for key in file.keys()}  # noqa: SIM118
    except (OSError, SafetensorError) as error:
        raise SettingsError(
            f"{path}: not a readable safetensors file ({error}). {_MEND}"
        ) from error
    seen = (metadata.get("format"), metadata.get("network"))
    if seen != (FORMAT, name):
        raise SettingsError(f"{path}: format and network {seen}, wanted {(FORMAT, name)}. {_MEND}")
    return NETWORKS[name].from_tensors(tensors, json.loads(metadata.get("config", "{}")))


def save_flame(folder: Path, arrays: Mapping[str, NDArray[Any]]) -> Path:
    """The file in which the reduced face model now is, whole or not at all."""
    path, buffer = folder / FLAME_FILE, io.BytesIO()
    np.savez(buffer, **dict[str, Any](arrays))
    write_whole(path, buffer.getvalue())
    return path


def read_record(folder: Path) -> Record:
    """What import.json says; an empty record where there is none.

    Raises:
        SettingsError: it is not readable.
    """
    path = folder / RECORD_FILE
    if not path.is_file():
        return Record()
    try:
        values = json.loads(path.read_bytes())
        record = Record(dict(values["files"]), dict(values["outputs"]))
        told = [
            text for entry in record.files.values() for text in (entry["title"], entry["licence"])
        ]
        if not all(isinstance(text, str) for text in (*told, *record.outputs.values())):
            raise TypeError("a title, licence or sha256 is no text")
        return record
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise SettingsError(f"{path}: not a record of an import ({error}). {_MEND}") from error


def checked_record(folder: Path) -> Record:
    """What import.json says of a folder that has a diffusion model, its files unchanged since.

    Raises:
        SettingsError: the folder is none of an import, has no diffusion model, or a file of it is
            gone or was changed.
    """
    record = read_record(folder)
    if MODEL_FILE not in record.outputs:
        raise SettingsError(
            f"{folder}: has no {MODEL_FILE} of an import; make it: "
            f"diffusionact import diffusionact_model.pt -o {folder}"
        )
    for name, due in record.outputs.items():
        path = folder / Path(name).name
        if not path.is_file() or (seen := file_sha256(path)) != due:
            what = f"sha256 {seen}" if path.is_file() else "gone"
            raise SettingsError(f"{path}: {what}, {RECORD_FILE} says {due}. {_MEND}")
    return record


def write_record(folder: Path, record: Record, missing: Mapping[str, str]) -> None:
    """Nothing; import.json is in the folder.

    Args:
        missing: name -> what it is and where it is published, of what was not given so far.
    """
    values = {
        "format": FORMAT,
        "files": record.files,
        "outputs": record.outputs,
        "missing": missing,
    }
    write_whole(folder / RECORD_FILE, (json.dumps(values, indent=2) + "\n").encode())


_MEND = "Import the published file again: diffusionact import ... -o WEIGHTS"
