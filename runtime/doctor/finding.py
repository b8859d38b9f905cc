"""One line of the report."""

from __future__ import annotations

import re
from dataclasses import dataclass

_COMMAND = re.compile(r"run: (.+?)(?:, or |, then|$)")


@dataclass(frozen=True)
class Finding:
    """What was found. passed: None for what is only told; command: what mends it, if anything."""

    subject: str
    passed: bool | None
    detail: str
    command: str = ""


def found(subject: str, passed: bool | None, error: Exception | str) -> Finding:
    """Return the finding that a message makes; its command is the one that it names."""
    named = _COMMAND.search(str(error))
    return Finding(subject, passed, str(error), named[1] if named else "")
