"""Rows of published tables, to stand beside ours where the protocol is the same.

A file of rows is JSON: {"paper": ..., "rows": [{"table": "Table 2", "method": "...", "protocol":
"self", "data": "VoxCeleb1", "read_in": "where the figures were read", "values": {"csim": 0.0}}]}.
Only what its writer read in a source belongs there; docs/evaluation.md says what ships.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from diffusionact.decode import DecodeError, decode
from diffusionact.errors import MediaError
from diffusionact.evaluation.columns import COLUMNS

SHIPPED = Path(__file__).with_name("published.json")


@dataclass(frozen=True)
class PublishedRow:
    """table: its name in the paper; protocol: "self", "cross" or "pairs"; data: what it was
    measured on; read_in: the source of the figures; values: by the names of COLUMNS."""

    table: str
    method: str
    protocol: str
    data: str
    read_in: str
    values: Mapping[str, float]


@dataclass(frozen=True)
class Published:
    """One paper's rows. note: what is not there, and why."""

    paper: str
    rows: tuple[PublishedRow, ...]
    note: str = ""


def published(path: Path | None = None) -> Published:
    """Return the rows of a file, of what ships by default.

    Raises: MediaError for a file that is no such, or names a measure that is not known.
    """
    file = path or SHIPPED
    try:
        made = decode(Published, json.loads(file.read_bytes()))
        for row in made.rows:
            unknown = sorted(set(row.values) - set(COLUMNS))
            if unknown or not row.read_in:
                raise ValueError(f"{row.table}, {row.method}: {unknown or 'read_in is empty'}")
    except (OSError, ValueError, DecodeError) as error:
        raise MediaError(f"{file}: not rows of published tables ({error})") from error
    return made
