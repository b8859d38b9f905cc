"""Checkpoints of other people, read without running anything that they hold.

A checkpoint is a pickle, and a pickle is a program. Only PyTorch's restricted reader sees it
(`weights_only`), with numbers of NumPy allowed. What trainers leave beside the weights (callbacks,
settings) is replaced by nothing: no name of a file is ever looked up. A file that asks for Python's
own functions, or PyTorch's, is refused altogether: no checkpoint needs them.
"""

from __future__ import annotations

import _compat_pickle
import pickletools
import re
import sys
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch

from diffusionact.errors import SettingsError

MAX_INDEX_BYTES = 64_000_000  # of the pickle beside the tensors; the published ones have 1 MB
SHOWN_CHARACTERS = 100

# Whose objects lie beside the weights of many a checkpoint, not worth a word.
TRAINERS = (
    "pytorch_lightning.", "lightning.", "lightning_fabric.", "lightning_utilities.",
    "torchmetrics.", "omegaconf.", "yacs.", "gdl.", "argparse.Namespace", "pathlib.",
    "collections.defaultdict", "enum.", "typing.", "datetime.",
)  # fmt: skip
PLAIN_TYPES = ("dict", "list", "set", "frozenset", "tuple", "object", "int", "float", "str", "bool")
# Packages whose functions a program could be made of; by their names in Python 2 as well.
POWERFUL = frozenset(
    {*sys.stdlib_module_names, *_compat_pickle.IMPORT_MAPPING, "torch", "numpy"}
    | {*_compat_pickle.REVERSE_IMPORT_MAPPING.values()}
)

# What the first bytes say of a file that is no checkpoint.
FOREIGN: tuple[tuple[bytes, str], ...] = (
    (b"version https://git-lfs", "is a pointer of Git LFS, not the file; run `git lfs pull`"),
    (b"\x1f\x8b", "is a gzip archive; unpack it and give the file inside"),
    (b"7z\xbc\xaf\x27\x1c", "is a 7z archive; unpack it and give the file inside"),
    (b"\xfd7zXZ", "is an xz archive; unpack it and give the file inside"),
    (b"Rar!", "is a RAR archive; unpack it and give the file inside"),
    (b"\x89HDF", "is an HDF5 file, of another framework"),
    (b"\x89PNG", "is a picture"),
    (b"\xff\xd8\xff", "is a picture"),
    (b"%PDF", "is a PDF"),
)


class _Nothing:
    """Stands for every object that is not needed: to make one gives an empty dict."""

    def __new__(cls, *_: Any, **__: Any) -> Any:
        return OrderedDict()


def read(path: Path, warn: Callable[[str], None]) -> Any:
    """The content of a checkpoint; tensors of a new-style file stay on the disk until they are
    used. Nothing in the file is run.

    Args:
        warn: is told what is left out of the content.

    Raises:
        SettingsError: there is no such file, or it is no checkpoint, damaged, or asks for more
            than tensors.
    """
    with _opened(path) as file:
        head = file.read(1024)
        _refuse_foreign(path, head)
        zipped = head.startswith(b"PK")
        index = _checked_index(path, file) if zipped else None
        names = set(_names_in(index) if index is not None else _names_in_old(file))
    content = _load(path, names, zipped)
    if strange := sorted(n for n in names if _replaced(n) and not _is_of_trainers(n)):
        rest = f" and {len(strange) - 1} more" if len(strange) > 1 else ""
        warn(f"holds objects that are no weights, left out: {shown(strange[0])}{rest}")
    return content


def shown(name: object) -> str:
    """A name out of a file, fit to be printed: short, and without control characters."""
    text = name if isinstance(name, str) else f"a key of type {type(name).__name__}"
    plain = text.encode("unicode_escape").decode("ascii")
    return plain if len(plain) <= SHOWN_CHARACTERS else plain[:SHOWN_CHARACTERS] + "..."


def _opened(path: Path) -> BinaryIO:
    if path.is_dir():
        raise SettingsError(f"{path}: is a folder, wanted a checkpoint file")
    try:
        return path.open("rb")
    except OSError as error:
        raise SettingsError(
            f"{path}: not readable ({error.strerror}), wanted a checkpoint file"
        ) from error


def _refuse_foreign(path: Path, head: bytes) -> None:
    if not head:
        raise SettingsError(f"{path}: is empty, wanted a checkpoint; download it again")
    text = head.lstrip().lower()
    if text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<script")):
        raise SettingsError(
            f"{path}: is a web page, not a checkpoint: the download gave the page that asks to "
            "confirm or to sign in; open its address in a browser and save the file itself"
        )
    for magic, what in FOREIGN:
        if head.startswith(magic):
            raise SettingsError(f"{path}: {what}; wanted a PyTorch checkpoint")
    if head[257:262] == b"ustar":
        raise SettingsError(
            f"{path}: is a tar archive; unpack it and give the checkpoint inside (published "
            "checkpoints that are named .tar are no archives)"
        )
    if head[8:9] == b"{" and int.from_bytes(head[:8], "little") < 1 << 32:
        raise SettingsError(
            f"{path}: is a safetensors file, wanted the published PyTorch checkpoint; what "
            "`diffusionact import` or training wrote goes to `diffusionact export`"
        )
    if not head.startswith((b"PK", b"\x80")):
        raise SettingsError(
            f"{path}: is no PyTorch checkpoint (it begins with {shown(repr(head[:16]))}); "
            "download it again"
        )


def _checked_index(path: Path, file: BinaryIO) -> bytes:
    """The pickle of a new-style checkpoint, once the archive around it is found whole.

    Raises:
        SettingsError: it is cut off, damaged, or an archive of something else.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            entries = archive.infolist()
            index = _index_entry(path, entries)
            if damaged := archive.testzip():
                raise SettingsError(
                    f"{path}: damaged: the checksum of {shown(damaged)} is wrong; download it again"
                )
            return archive.read(index)
    except (zipfile.BadZipFile, OSError, EOFError, RuntimeError, NotImplementedError) as error:
        raise SettingsError(
            f"{path}: cut off or damaged ({shown(str(error))}): {_megabytes(path)} are here; "
            "download it again and compare the size with that of its page"
        ) from error


def _index_entry(path: Path, entries: list[zipfile.ZipInfo]) -> zipfile.ZipInfo:
    names = [entry.filename for entry in entries]
    if any(name.endswith("constants.pkl") or "/code/" in name for name in names):
        raise SettingsError(
            f"{path}: is a TorchScript archive, a program; wanted the weights alone. Newer "
            "versions of face-alignment publish these: take the .pth or .pth.tar of its older ones"
        )
    found = [e for e in entries if e.filename == "data.pkl" or e.filename.endswith("/data.pkl")]
    if len(found) != 1:
        inside = ", ".join(shown(name) for name in names[:5])
        raise SettingsError(
            f"{path}: is a zip archive that is no checkpoint ({inside}); unpack it and give the "
            "checkpoint inside"
        )
    if any(entry.compress_type != zipfile.ZIP_STORED for entry in entries):
        raise SettingsError(
            f"{path}: is a compressed archive; PyTorch compresses nothing. Download it again"
        )
    if found[0].file_size > MAX_INDEX_BYTES:
        raise SettingsError(
            f"{path}: its index has {found[0].file_size / 1e6:.0f} MB, a checkpoint's about 1 MB"
        )
    return found[0]


def _megabytes(path: Path) -> str:
    return f"{path.stat().st_size / 1e6:.1f} MB"


def _names_in_old(file: BinaryIO) -> Iterator[str]:
    """The names that an old-style checkpoint asks for: four pickles, then the tensors."""
    file.seek(0)
    for _ in range(4):
        yield from _names_in(file)


def _names_in(pickled: bytes | BinaryIO) -> Iterator[str]:
    """The names that a pickle asks for by the one operation for it that PyTorch's reader knows.

    Only a help to choose what is replaced by nothing: it is the reader that refuses.
    """
    try:
        for operation, argument, _ in pickletools.genops(pickled):
            if operation.name == "GLOBAL":
                yield str(argument).replace(" ", ".", 1).replace("__builtin__", "builtins", 1)
    except Exception:  # whatever a broken pickle does to the parser; the reader says so below
        return


def _is_of_trainers(name: str) -> bool:
    module, _, kind = name.rpartition(".")
    if module == "builtins":
        return kind in PLAIN_TYPES
    return any(name.startswith(t) if t.endswith(".") else name == t for t in TRAINERS)


def _replaced(name: str) -> bool:
    """Whether objects of this name are left out; those of others are for the reader to refuse."""
    return _is_of_trainers(name) or name.split(".", 1)[0] not in POWERFUL


def _load(path: Path, names: set[str], zipped: bool) -> Any:
    allowed: list[Callable[..., Any] | tuple[Callable[..., Any], str]] = [
        *_numbers_of_numpy(),
        *((_Nothing, name) for name in sorted(names) if _replaced(name)),
    ]
    try:
        with torch.serialization.safe_globals(allowed):
            return torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except MemoryError as error:
        raise SettingsError(f"{path}: asks for more memory than there is: damaged") from error
    except Exception as error:  # a hostile file can make the reader fail in any way
        raise SettingsError(f"{path}: {_reason(str(error) or type(error).__name__)}") from error


def _numbers_of_numpy() -> list[Callable[..., Any] | tuple[Callable[..., Any], str]]:
    """What a number or array of NumPy is made of, under its names in NumPy 1 and 2."""
    made: dict[str, Any] = {
        "scalar": np.float64(0).__reduce__()[0],
        "_reconstruct": np.zeros(1).__reduce__()[0],
    }
    named = [
        (function, f"numpy.{package}.multiarray.{name}")
        for name, function in made.items()
        for package in ("core", "_core")
    ]
    kinds = [type(np.dtype(code)) for code in ("f8", "f4", "f2", "i8", "i4", "u1", "?")]
    return [np.dtype, np.ndarray, *kinds, *named]


def _reason(message: str) -> str:
    """What PyTorch's reader did not like, in our words."""
    asked = re.search(r"GLOBAL (\S+)", message)
    if asked:
        return (
            f"is not only weights: it asks to run {shown(asked.group(1))}. Nothing of it was "
            "run. Take the checkpoint from its makers' own page"
        )
    if ".tar format" in message:
        return "is a checkpoint of PyTorch before 0.1.10, which cannot be read safely"
    return f"not readable as a checkpoint, damaged or of another kind ({shown(message)})"
