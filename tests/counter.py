"""What the tests of contests open in other processes; light, for each imports it anew."""

from __future__ import annotations

import os

from diffusionact.errors import MediaError, SettingsError


class Counter:
    """Counts from a number, and fails in all ways when asked to."""

    def __init__(self, start: int) -> None:
        if start < 0:
            raise SettingsError("below nothing")
        self._at = start

    def add(self, more: int) -> int:
        """The count, raised by so many."""
        self._at += more
        return self._at

    def fail(self, kind: str) -> None:
        """Nothing: "ours" raises an error for people, "exit" ends the process, others are bugs."""
        if kind == "ours":
            raise MediaError("a message for people")
        if kind == "exit":
            os._exit(7)
        raise ZeroDivisionError("a bug")
