"""Processes that take turns: each holds one variant, so that its memory is its own, and works only
when it is asked, so that what disturbs the machine disturbs all of them alike."""

from __future__ import annotations

import multiprocessing
import pickle
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from multiprocessing.connection import Connection
from pathlib import Path
from types import TracebackType
from typing import Any, TypeAlias

from diffusionact.errors import DeviceError, DiffusionActError

# Made in the process of its own, with the variant; its methods are what it may be asked.
Maker: TypeAlias = Callable[..., Any]

CLOSING_S = 10.0
MIB = 2.0**20


class Contestant:
    """A process with one object in it, whose methods `ask` calls."""

    def __init__(self, maker: Maker, *arguments: Any) -> None:
        context = multiprocessing.get_context("spawn")
        self._here, there = context.Pipe()
        self._process = context.Process(
            target=_serve, args=(there, maker, arguments), daemon=True, name="contestant"
        )
        self._process.start()
        there.close()
        try:
            self._answer()
        except BaseException:
            self.close()
            raise

    def ask(self, method: str, *arguments: Any) -> Any:
        """Return what the object's method answers.

        Raises: what the method raised, of the package's own errors; DeviceError when the process
        ended.
        """
        try:
            self._here.send((method, arguments))
        except OSError:
            pass  # it has ended: what it said last, or its exit status, tells why
        return self._answer()

    def close(self) -> None:
        """Return nothing; the process has ended."""
        self._here.close()  # the end of its input ends it
        self._process.join(CLOSING_S)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()

    def __enter__(self) -> Contestant:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _answer(self) -> Any:
        try:
            failed, answer = self._here.recv()
        except EOFError:
            self._process.join(CLOSING_S)
            raise DeviceError(
                f"the measuring process ended (exit status {self._process.exitcode}; -9 is mostly "
                "a lack of memory, -11 a crash of the backend); try fewer variants or another "
                "--backend"
            ) from None
        if failed:
            raise answer
        return answer


@contextmanager
def contest(maker: Maker, variants: Sequence[Sequence[Any]]) -> Iterator[list[Contestant]]:
    """Yield one contestant for each variant, its arguments; all have ended afterwards."""
    with ExitStack() as stack:
        yield [stack.enter_context(Contestant(maker, *variant)) for variant in variants]


def peak_memory_mib() -> float | None:
    """Return the most memory this process has held at once, MiB; None where nothing tells.

    Not ru_maxrss where Linux tells better: that one begins at the size of the process which
    started this one.
    """
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
        (line,) = (row for row in status.splitlines() if row.startswith("VmHWM:"))
        return int(line.split()[1]) / 1024
    except (OSError, ValueError):
        pass
    try:
        import resource
    except ImportError:  # on Windows
        return None
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak / (MIB if sys.platform == "darwin" else 1024)


def _serve(pipe: Connection, maker: Maker, arguments: Sequence[Any]) -> None:
    """The process of a contestant: answers until its input ends."""
    try:
        try:
            made = maker(*arguments)
        except Exception as error:
            pipe.send((True, _portable(error)))
            return
        pipe.send((False, None))
        while True:
            method, given = pipe.recv()
            try:
                answer = (False, getattr(made, method)(*given))
            except Exception as error:
                answer = (True, _portable(error))
            pipe.send(answer)
    except (EOFError, BrokenPipeError, KeyboardInterrupt):
        return


def _portable(error: Exception) -> Exception:
    """The error as the parent may raise it: the package's own as it is, others with their trace."""
    if isinstance(error, DiffusionActError):
        try:
            pickle.loads(pickle.dumps(error))
            return error
        except Exception:
            return DiffusionActError(str(error))
    return RuntimeError("in the measuring process:\n" + traceback.format_exc())
