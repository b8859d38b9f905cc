"""The command line: parsing, logging and exit status; the commands are in diffusionact/commands.

Exit status: 0 done, 1 a check failed, 2 the message says what to do, 130 and 143 ended by SIGINT
and SIGTERM; any other error is a bug and keeps its trace.
"""

from __future__ import annotations

import argparse
import logging
import os
import signal
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from diffusionact._version import __version__
from diffusionact.commands import (
    bench,
    bench_compare,
    build,
    calibrate,
    check,
    demo,
    eval,
    export,
    import_,
    live,
    prepare,
    run,
    serve,
    train,
)
from diffusionact.commands.exits import INTERRUPTED, REFUSED, TERMINATED
from diffusionact.commands.model import model_options
from diffusionact.commands.output import talk_options
from diffusionact.errors import DiffusionActError, SettingsError

# In the order of --help; the second are those that take the options of a model.
COMMANDS = (
    demo, run, live, serve, import_, export, build, calibrate, prepare, train, eval, check, bench,
    bench_compare,
)  # fmt: skip
OF_A_MODEL = (demo, run, live, serve)
LOG_VARIABLE = "DIFFUSIONACT_LOG"
LEVELS = ("debug", "info", "warning", "error")


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit status of one command."""
    arguments = _parser().parse_args(argv)
    try:
        with _terminable():
            _start_log(arguments)
            status: int = arguments.command(arguments)
            return status
    except DiffusionActError as error:
        print(f"diffusionact: {error}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("diffusionact: interrupted", file=sys.stderr)
        return INTERRUPTED
    except _Terminated:
        print("diffusionact: terminated", file=sys.stderr)
        return TERMINATED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="diffusionact", description="One-shot face reenactment with a diffusion autoencoder."
    )
    parser.add_argument("--version", action="version", version=f"diffusionact {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    talk, model = talk_options(), model_options()
    for command in COMMANDS:
        name = command.__name__.rpartition(".")[2].rstrip("_").replace("_", "-")
        made = commands.add_parser(
            name,
            parents=[model, talk] if command in OF_A_MODEL else [talk],
            help=command.HELP,
            description=command.HELP,
        )
        made.set_defaults(command=command.run, log="warning")
        command.options(made)
    return parser


def _start_log(arguments: argparse.Namespace) -> None:
    """Send the package's log to stderr, from the level that the variable or the command says."""
    level = os.environ.get(LOG_VARIABLE, "error" if arguments.quiet else arguments.log).lower()
    if level not in LEVELS:
        raise SettingsError(f"{LOG_VARIABLE}={level}; wanted one of {', '.join(LEVELS)}")
    logging.basicConfig(
        format="%(levelname)s: %(message)s", level=logging.WARNING, stream=sys.stderr
    )
    logging.getLogger("diffusionact").setLevel(level.upper())


class _Terminated(BaseException):
    """SIGTERM came; like KeyboardInterrupt, no `except Exception` on the way may swallow it."""


@contextmanager
def _terminable() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that writers remove what they have not finished."""

    def terminate(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one must not disturb the clean-up
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


if __name__ == "__main__":
    sys.exit(main())
