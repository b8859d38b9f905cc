"""Files that are written whole or not at all."""

from __future__ import annotations

import os
from pathlib import Path


def write_whole(path: Path, content: bytes | str) -> None:
    """Return nothing; the file has this content (text as UTF-8), or what it had before."""
    part = path.with_name(f".part-{path.name}")
    part.write_bytes(content.encode() if isinstance(content, str) else content)
    os.replace(part, path)
