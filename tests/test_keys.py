"""Keys of the terminal, typed into one that the test holds."""

from __future__ import annotations

import os
import select
import subprocess
import sys
import time
from pathlib import Path

import pytest

from diffusionact.runtime.keys import TerminalKeys

pty = pytest.importorskip("pty", reason="needs a Unix terminal")

ROOT = Path(__file__).parent.parent
WAIT_S = 20.0
CHILD = """
import fcntl, sys, termios, time
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
from diffusionact.runtime.keys import TerminalKeys
before = termios.tcgetattr(sys.stdin)
with TerminalKeys() as keys:
    print("ready", flush=True)
    seen = []
    while len(seen) < 3:
        seen += keys.pressed()
        time.sleep(0.01)
print("saw", *seen, "restored", termios.tcgetattr(sys.stdin) == before, flush=True)
"""


def read_until(terminal: int, word: bytes) -> bytes:
    seen, end_s = b"", time.monotonic() + WAIT_S
    while word not in seen and time.monotonic() < end_s:
        if select.select([terminal], [], [], 0.1)[0]:
            try:
                seen += os.read(terminal, 1024)
            except OSError:  # the child is gone
                break
    return seen


def test_keys_come_without_enter_and_the_terminal_is_restored() -> None:
    terminal, theirs = pty.openpty()
    child = subprocess.Popen(
        [sys.executable, "-c", CHILD],
        cwd=ROOT, stdin=theirs, stdout=theirs, stderr=theirs, start_new_session=True,
    )  # fmt: skip
    os.close(theirs)
    try:
        assert b"ready" in read_until(terminal, b"ready")
        os.write(terminal, b"r\x1b[A\x1bOP\x1b[1;5CQ2")  # and Up, F1, Ctrl-Right
        assert b"saw r q 2 restored True" in read_until(terminal, b"True")
    finally:
        os.close(terminal)
        child.wait(WAIT_S)


def test_without_a_terminal_there_are_no_keys(monkeypatch: pytest.MonkeyPatch) -> None:
    ours, theirs = pty.openpty()  # a terminal, but not this process's own
    for file in (open(os.devnull), os.fdopen(theirs)):
        with file:
            monkeypatch.setattr(sys, "stdin", file)
            with TerminalKeys() as keys:
                os.write(ours, b"q\n")
                assert not keys.pressed()
    os.close(ours)
