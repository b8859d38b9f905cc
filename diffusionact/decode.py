"""JSON values to frozen dataclasses, checked against their annotations."""

from __future__ import annotations

import types
from collections.abc import Mapping
from dataclasses import MISSING, fields, is_dataclass
from typing import Any, Literal, TypeVar, Union, get_args, get_origin, get_type_hints

T = TypeVar("T")


class DecodeError(ValueError):
    """A value does not fit its annotation; the message begins with the field's path."""


def decode(kind: type[T], value: Any) -> T:
    """Return `value`, as json.loads gives it, as the dataclass `kind`.

    Fields may be dataclasses, str, bool, int, float, None, Literal, tuple, Mapping with str keys,
    and unions of these. A float field takes an integer.

    Raises: DecodeError for a field that is missing, unknown or of another type.
    """
    result: T = _decode(kind, value, "")
    return result


def _decode(kind: Any, value: Any, path: str) -> Any:
    origin, arguments = get_origin(kind), get_args(kind)
    if is_dataclass(kind):
        return _dataclass(kind, value, path)
    if origin in (Union, types.UnionType):
        return _first_that_fits(arguments, value, path)
    if origin is tuple:
        return _tuple(arguments, value, path)
    if origin is Mapping:
        items = _expect(dict, value, path).items()
        return {key: _decode(arguments[1], item, f"{path}.{key}") for key, item in items}
    if origin is Literal:
        if value not in arguments:
            raise DecodeError(f"{path.strip('.')} is {value!r}, wanted one of {list(arguments)}")
        return value
    if kind is float and type(value) is int:
        return float(value)
    return _expect(kind, value, path)


def _dataclass(kind: Any, value: Any, path: str) -> Any:
    _expect(dict, value, path)
    types_by_name = get_type_hints(kind)
    known = {f.name for f in fields(kind)}
    if unknown := sorted(set(value) - known):
        raise DecodeError(f"{path}.{unknown[0]}".strip(".") + " is not a field of this format")
    for f in fields(kind):
        if f.name not in value and f.default is MISSING and f.default_factory is MISSING:
            raise DecodeError(f"{path}.{f.name}".strip(".") + " is missing")
    return kind(**{k: _decode(types_by_name[k], v, f"{path}.{k}") for k, v in value.items()})


def _tuple(arguments: tuple[Any, ...], value: Any, path: str) -> tuple[Any, ...]:
    items = _expect(list, value, path)
    kinds = [arguments[0]] * len(items) if arguments[-1] is Ellipsis else list(arguments)
    if len(items) != len(kinds):
        raise DecodeError(f"{path.strip('.')} has {len(items)} items, wanted {len(kinds)}")
    pairs = enumerate(zip(kinds, items, strict=True))
    return tuple(_decode(kind, item, f"{path}.{i}") for i, (kind, item) in pairs)


def _first_that_fits(kinds: tuple[Any, ...], value: Any, path: str) -> Any:
    for kind in kinds:
        try:
            return _decode(kind, value, path)
        except DecodeError:
            continue
    names = " or ".join(getattr(kind, "__name__", str(kind)) for kind in kinds)
    raise DecodeError(f"{path.strip('.')} is {value!r}, wanted {names}")


def _expect(kind: type, value: Any, path: str) -> Any:
    if type(value) is not kind:
        where = path.strip(".") or "the file"
        raise DecodeError(f"{where} is {type(value).__name__}, wanted {kind.__name__}")
    return value
