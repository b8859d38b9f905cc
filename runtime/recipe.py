"""What a clip's result depends on, by name: equal recipes make equal frames."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Mapping
from dataclasses import asdict
from pathlib import Path

from diffusionact.errors import MediaError
from diffusionact.landmarks import sidecar_path
from diffusionact.machine import versions
from diffusionact.manifest import file_sha256
from diffusionact.runtime.media import FolderReader, Reader, VideoReader
from diffusionact.runtime.reenactor import Reenactor

CONTENTS = ("portrait", "driver", "bundle")  # known by a hash that says nothing to a reader
OF_ONE_BACKEND = {"onnxruntime": "ort", "openvino": "openvino", "torch": "torch"}
DEFAULT = "None"


def recipe_of(act: Reenactor, portrait: Path, reader: Reader, face: int | None) -> dict[str, str]:
    """Return what the frames are made from: contents of the inputs and of the bundle, settings,
    and versions of the libraries at work. Raises: MediaError when an input cannot be read."""
    made = {
        "portrait": _content([portrait]),
        "driver": _content(_files(reader)),
        "bundle": hashlib.sha256(repr(act.manifest).encode()).hexdigest(),
        "face": str(face),
    }
    made |= {name: str(value) for name, value in asdict(act.settings).items()}
    for name, number in versions().items():
        if OF_ONE_BACKEND.get(name, act.settings.backend) == act.settings.backend:
            made[f"version of {name}"] = number
    return made


def differences(before: Mapping[str, str], now: Mapping[str, str]) -> str:
    """Return in words how a recipe differs from an earlier one."""
    names = [name for name in {**now, **before} if before.get(name) != now.get(name)]
    words = [
        f"{name} changed"
        if name in CONTENTS
        else f"{name} was {before.get(name, DEFAULT)} and is {now.get(name, DEFAULT)}"
        for name in names
    ]
    return ", ".join(words)


def _files(reader: Reader) -> list[Path]:
    if isinstance(reader, FolderReader):
        return list(reader.paths)
    return [reader.path if isinstance(reader, VideoReader) else Path(reader.name)]


def _content(paths: Iterable[Path]) -> str:
    """The hash of files, in order, and of the landmarks beside them."""
    whole = hashlib.sha256()
    for path in paths:
        for file in (path, sidecar_path(path)):
            try:
                whole.update(file_sha256(file).encode() if file.is_file() else b"-")
            except OSError as error:
                raise MediaError(f"{file}: cannot be read ({error.strerror})") from error
    return whole.hexdigest()
