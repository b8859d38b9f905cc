"""The process in which an engine is built: a request on stdin, lines of JSON on stdout.

When stdin closes, by request or because the parent has died, the build is given up.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from dataclasses import asdict
from typing import Any

from diffusionact.decode import decode
from diffusionact.engines.plan import Cancelled, Request, make_plan
from diffusionact.errors import DiffusionActError


def main() -> None:
    """Return nothing; one line for each percent, then one with the result or the error."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # of a terminal: the parent decides
    answers = os.fdopen(os.dup(1), "w", buffering=1, encoding="utf-8")
    os.dup2(2, 1)  # what libraries print must not come between the lines

    def say(**values: Any) -> None:
        answers.write(json.dumps(values) + "\n")

    request = decode(Request, json.loads(sys.stdin.readline()))
    stopped = threading.Event()

    def wait_for_the_end() -> None:
        sys.stdin.read()
        stopped.set()

    threading.Thread(target=wait_for_the_end, daemon=True).start()
    try:
        result = make_plan(request, lambda percent: say(percent=percent), stopped.is_set)
        say(result=asdict(result))
    except Cancelled:
        say(cancelled=True)
    except DiffusionActError as error:
        say(error=type(error).__name__, message=str(error))
    except OSError as error:
        say(error="OSError", message=f"{error.filename or request.plan}: {error.strerror}")
    answers.flush()
    os._exit(0)  # the libraries' own clean-up at exit is not needed, and has crashed


if __name__ == "__main__":
    main()
