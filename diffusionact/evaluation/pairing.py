"""Which frame belongs to which: two folders, two videos, or one of each.

Nothing is dropped: a frame that one side lacks is paired with nothing and counted.
"""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

from diffusionact.errors import MediaError
from diffusionact.evaluation.compared import Frame, Load


@dataclass(frozen=True)
class Side:
    """One side: its pictures by name, or a stream of frames that have only their order.

    entries: (name, load) in order; named: whether the names say which frame it is.
    """

    name: str
    entries: Sequence[tuple[str, Load]] | Iterable[tuple[str, Load]]
    named: bool


def paired(reference: Side, result: Side) -> Iterator[Frame]:
    """Yield every frame of either side, in the reference's order; extra ones of named sides last.

    Raises: MediaError when the names of two folders have nothing in common and their counts
    differ, so that no pairing is certain.
    """
    if reference.named and result.named:
        yield from _by_name(reference, result)
    elif reference.named or result.named:
        yield from _by_number(reference, result)
    else:
        for i, (a, b) in enumerate(itertools.zip_longest(reference.entries, result.entries)):
            yield _frame(str(i), a and a[1], b and b[1])


def pairing_of(reference: Side, result: Side) -> str:
    """Return how the frames of two folders find each other: name, number or order. Raises: as
    `paired`."""
    a, b = [name for name, _ in reference.entries], [name for name, _ in result.entries]
    if set(a) & set(b):
        return "name"
    numbers = [_last_number(name) for name in a], [_last_number(name) for name in b]
    if all(None not in side and len(set(side)) == len(side) for side in numbers):
        if set(numbers[0]) & set(numbers[1]):
            return "number"
    if len(a) == len(b):
        return "order"
    raise MediaError(
        f"{reference.name} ({len(a)} pictures, {a[0]!r} first) and {result.name} ({len(b)}, "
        f"{b[0]!r} first) have no name or number in common; name the pictures of a frame alike"
    )


def _by_name(reference: Side, result: Side) -> Iterator[Frame]:
    how = pairing_of(reference, result)
    a = _keyed(reference, how)
    b = _keyed(result, how)
    for key, (name, load) in a.items():
        other = b.get(key)
        yield _frame(name, load, other and other[1])
    for key, (name, load) in b.items():
        if key not in a:
            yield _frame(name, None, load)


def _keyed(side: Side, how: str) -> dict[object, tuple[str, Load]]:
    made: dict[object, tuple[str, Load]] = {}
    for i, (name, load) in enumerate(side.entries):
        key = {"name": name, "number": _last_number(name), "order": i}[how]
        if key in made:
            raise MediaError(
                f"{side.name}: two pictures are named {name!r}, with other endings; remove one"
            )
        made[key] = (name, load)
    return made


def _by_number(reference: Side, result: Side) -> Iterator[Frame]:
    """A stream against a folder: the numbers in the names are places in the stream, from 0 or 1."""
    folder = reference if reference.named else result
    stream = result if reference.named else reference
    numbers = [_last_number(name) for name, _ in folder.entries]
    if None in numbers or len(set(numbers)) != len(numbers):
        places = list(range(len(numbers)))
    else:
        known = [number for number in numbers if number is not None]
        first = 0 if 0 in known else 1
        places = [number - first for number in known]
    pictures = dict(zip(places, (load for _, load in folder.entries), strict=True))
    i = -1
    for i, (_, load) in enumerate(stream.entries):
        picture = pictures.pop(i, None)
        pair = (picture, load) if reference.named else (load, picture)
        yield _frame(str(i), *pair)
    for place, load in sorted(pictures.items()):
        yield _frame(str(place), *((load, None) if reference.named else (None, load)))


def _frame(key: str, reference: Load | None, result: Load | None) -> Frame:
    unpaired = "missing" if result is None else "extra" if reference is None else None
    return Frame(key, result, reference, unpaired=unpaired)


def _last_number(name: str) -> int | None:
    found = re.findall(r"\d+", name)
    return int(found[-1]) if found else None
