"""Keys typed in the terminal, for sinks that have no window to type in."""

from __future__ import annotations

import os
import re
import sys
from collections.abc import Sequence
from types import TracebackType
from typing import Any

# Arrows, function keys and Alt with a key are sequences that begin with Escape, and no Escape.
SEQUENCE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|O.|[^\x1b])")


class TerminalKeys:
    """Keys as they are pressed, without Enter; none where stdin is no terminal."""

    def __init__(self) -> None:
        self._restore: Any = None
        self._open = False

    def pressed(self) -> Sequence[str]:
        """Return the keys since the last call, in lower case."""
        if not self._open:
            return ()
        return _pressed_windows() if sys.platform == "win32" else _pressed_unix()

    def __enter__(self) -> TerminalKeys:
        self._open = sys.stdin is not None and sys.stdin.isatty()
        if self._open and sys.platform != "win32":
            import termios
            import tty

            try:
                in_front = os.getpgrp() == os.tcgetpgrp(sys.stdin.fileno())
            except OSError:  # not this process's terminal
                in_front = False
            if not in_front:  # a job in the background must leave the terminal alone
                self._open = False
                return self
            self._restore = termios.tcgetattr(sys.stdin)
            tty.setcbreak(sys.stdin)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open = False
        if self._restore is not None and sys.platform != "win32":
            import termios

            termios.tcsetattr(sys.stdin, termios.TCSADRAIN, self._restore)


def _pressed_unix() -> list[str]:
    import select

    if not select.select([sys.stdin], [], [], 0.0)[0]:
        return []
    typed = os.read(sys.stdin.fileno(), 64).decode("utf-8", "ignore")
    return list(SEQUENCE.sub("", typed).lower())


def _pressed_windows() -> list[str]:
    import importlib

    msvcrt: Any = importlib.import_module("msvcrt")
    keys = []
    while msvcrt.kbhit():
        keys.append(msvcrt.getwch().lower())
    return keys
