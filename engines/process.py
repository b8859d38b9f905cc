"""The process in which an engine is built, from the side of who waits for it (`child.py`)."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from dataclasses import asdict
from typing import IO, Any

from diffusionact import engine_files, errors
from diffusionact.decode import decode
from diffusionact.engines.plan import Request, Result
from diffusionact.errors import EngineError

PATIENCE_S = 20.0  # for a cancelled builder to come back: one of its steps
MESSAGE_BYTES = 2000  # of a crashed builder's last words
MORE_ROOM = f"free some space, or set {engine_files.CACHE_VARIABLE} to a folder on another disk"


def run_child(request: Request, report: Callable[[int], object]) -> Result:
    """Return what a process of its own has built; its memory is free again.

    Raises: what `make_plan` raises, and EngineError when the process dies.
    """
    paths = [os.path.abspath(entry) if entry else os.getcwd() for entry in sys.path]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths)}
    command = [sys.executable, "-c", "from diffusionact.engines.child import main; main()"]
    with tempfile.TemporaryFile() as words:
        child = subprocess.Popen(
            command,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=words,
            env=environment,
            encoding="utf-8",
        )
        try:
            answer = _converse(child, request, report)
        finally:
            _end(child)
        if "result" in answer:
            return decode(Result, answer["result"])
        if "error" in answer:
            raise _error(answer["error"], answer["message"])
        words.seek(0)
        raise EngineError(_epitaph(request, child.returncode, words))


def _converse(
    child: subprocess.Popen[str], request: Request, report: Callable[[int], object]
) -> dict[str, Any]:
    """The last line of the child, {} if it died before it."""
    assert child.stdin is not None and child.stdout is not None
    try:
        child.stdin.write(json.dumps(asdict(request)) + "\n")
        child.stdin.flush()
    except BrokenPipeError:
        return {}
    for line in child.stdout:
        answer: dict[str, Any] = json.loads(line)
        if "percent" not in answer:
            return answer
        report(answer["percent"])
    return {}


def _end(child: subprocess.Popen[str]) -> None:
    """Nothing; the child has ended: of itself, because its stdin is closed, or killed."""
    assert child.stdin is not None and child.stdout is not None
    try:
        child.stdin.close()
    except BrokenPipeError:
        pass  # it has died, and a flush found out
    try:
        child.wait(PATIENCE_S)
    except subprocess.TimeoutExpired:
        child.kill()
        child.wait()
    child.stdout.close()  # not before: the child may still be telling how far it is


def _error(kind: str, message: str) -> Exception:
    if kind == "OSError":
        return EngineError(f"{message}; {MORE_ROOM}")
    found: Exception = getattr(errors, kind)(message)
    return found


def _epitaph(request: Request, status: int, words: IO[bytes]) -> str:
    last = words.read()[-MESSAGE_BYTES:].decode(errors="replace").strip()
    how = f"was killed by signal {-status}" if status < 0 else f"ended with status {status}"
    return (
        f"{request.onnx}: the builder {how}{': ' if last else ''}{last}; if memory is short, "
        "try less --workspace or a lower --level"
    )
