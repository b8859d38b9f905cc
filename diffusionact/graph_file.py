"""The weights that an ONNX file holds, read without the onnx package, which users do not have."""

from __future__ import annotations

import math
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from diffusionact.errors import BundleError

# What export/to_onnx.py writes:
HALVED = ".float16"  # ends the name of a float32 initialiser that is stored so
SAME = "same as: "  # begins a note: this name, stored once with an equal one

# Field numbers and values of onnx.proto, which never change.
_GRAPH, _INITIALISER, _NOTE = 7, 5, 14
_DIMS, _TYPE, _NAME, _RAW = 1, 2, 8, 9
_KEY, _VALUE = 1, 2
_TYPES: dict[int, np.dtype[Any]] = {1: np.dtype("<f4"), 10: np.dtype("<f2")}

_VARINT, _FIXED64, _BYTES, _FIXED32 = 0, 1, 2, 5


def initialisers(path: Path) -> dict[str, npt.NDArray[Any]]:
    """Return name -> values, float16 or float32 as stored, of an ONNX file; integers are left out.

    Names are those of the parameters that were exported, without `HALVED`.

    Raises: BundleError when the file cannot be read as one.
    Source: onnx.proto, ModelProto; the Protocol Buffers wire format.
    """
    try:
        content = memoryview(path.read_bytes())
        named = (_tensor(t) for g in _fields(content, _GRAPH) for t in _fields(g, _INITIALISER))
        found = {n.removesuffix(HALVED): values for n, values in named if values is not None}
        notes = dict(_note(note) for note in _fields(content, _NOTE))
        same = {n.removeprefix(SAME): of for n, of in notes.items() if n.startswith(SAME)}
        return found | {name: found[of].copy() for name, of in same.items()}
    except OSError as error:
        raise BundleError(f"{path}: not readable ({error.strerror})") from error
    except (ValueError, LookupError) as error:
        raise BundleError(f"{path}: not an ONNX file, or damaged ({error})") from error


def _note(message: memoryview) -> tuple[str, str]:
    """Key and value of a StringStringEntryProto."""
    parts = {number: value for number, _, value in _parts(message)}
    return bytes(parts[_KEY]).decode(), bytes(parts[_VALUE]).decode()


def _tensor(message: memoryview) -> tuple[str, npt.NDArray[Any] | None]:
    """The name and a copy of the values of a TensorProto; None: of no type that weights have."""
    shape, kind, name, raw = [], 0, "", b""
    for number, wire, value in _parts(message):
        if number == _DIMS:
            shape += [value] if wire == _VARINT else list(_varints(value))
        elif number == _TYPE:
            kind = value
        elif number == _NAME:
            name = bytes(value).decode()
        elif number == _RAW:
            raw = bytes(value)
    dtype = _TYPES.get(kind)
    if dtype is None or len(raw) != math.prod(shape) * dtype.itemsize:
        return name, None
    return name, np.frombuffer(bytearray(raw), dtype).reshape(shape)


def _fields(message: memoryview, wanted: int) -> Iterator[memoryview]:
    """The values of one field of a message, each a message of its own."""
    for number, wire, value in _parts(message):
        if number == wanted and wire == _BYTES:
            yield value


def _parts(message: memoryview) -> Iterator[tuple[int, int, Any]]:
    """Number, wire type and value of every field: an integer, or the bytes."""
    at = 0
    while at < len(message):
        tag, at = _varint(message, at)
        number, wire = tag >> 3, tag & 7
        if wire == _VARINT:
            value, at = _varint(message, at)
            yield number, wire, value
            continue
        if wire == _BYTES:
            size, at = _varint(message, at)
        elif wire in (_FIXED32, _FIXED64):
            size = 4 if wire == _FIXED32 else 8
        else:
            raise ValueError(f"wire type {wire}")
        if at + size > len(message):
            raise ValueError("cut off")
        yield number, wire, message[at : at + size]
        at += size


def _varints(packed: memoryview) -> Iterator[int]:
    at = 0
    while at < len(packed):
        value, at = _varint(packed, at)
        yield value


def _varint(message: memoryview, at: int) -> tuple[int, int]:
    """An integer in groups of seven bits, the lowest first, and where the next field begins."""
    value = shift = 0
    while True:
        byte = message[at]
        at += 1
        value |= (byte & 0x7F) << shift
        if byte < 0x80:
            return value, at
        shift += 7
        if shift > 63:
            raise ValueError("an integer of more than 64 bits")
