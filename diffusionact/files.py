"""Files that are written whole or not at all."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path


def write_whole(path: Path, *content: bytes | memoryview | str) -> None:
    """Return nothing; the file has this content, piece after piece (text as UTF-8), or what it had
    before."""
    part = path.with_name(f".part-{path.name}")
    with open(part, "wb") as file:
        for piece in content:
            file.write(piece.encode() if isinstance(piece, str) else piece)
    os.replace(part, path)


def check_place(path: Path) -> None:
    """Return nothing where a file of this name can be written: before the work whose result it is
    to hold. The folder is made. Raises: OSError."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryFile(dir=path.parent):
        pass
    if path.exists():
        with path.open("ab"):
            pass
