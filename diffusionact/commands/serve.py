"""`diffusionact serve`: the page."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import secrets
import signal
import socket
from collections.abc import Coroutine
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusionact.commands.exits import DONE, INTERRUPTED, TERMINATED
from diffusionact.commands.extras import extra
from diffusionact.commands.model import (
    RATE,
    goal_options,
    goal_or_rate,
    load_reenactor,
    positive,
    warn_of_missing_label,
)
from diffusionact.commands.output import say

if TYPE_CHECKING:
    from diffusionact.runtime.web.server import Server, Site

HELP = "A page in the browser: a portrait that follows the camera."
PORT = 8600


def options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "--host",
        default="127.0.0.1",
        metavar="ADDRESS",
        help="where to listen (default: 127.0.0.1, this machine only); others need --token",
    )
    add(
        "--port",
        type=_port,
        default=PORT,
        metavar="N",
        help=f"default: {PORT}; 0: any that is free",
    )
    add(
        "--token",
        metavar="TEXT",
        help="wanted of every page: 16 or more of A-Z a-z 0-9 . _ ~ -; `new` makes one and "
        "prints it",
    )
    add(
        "--allow-host",
        action="append",
        default=[],
        metavar="NAME",
        help="a host name pages may use, behind a proxy say; needs --token",
    )
    add("--tls", nargs=2, metavar=("CERT", "KEY"), help="https: certificate and key, PEM")
    add("--sessions", type=int, default=4, metavar="N", help="pages at once (default: 4)")
    add(
        "--idle",
        type=positive,
        default=120.0,
        metavar="S",
        help="seconds without a face until a session is closed (default: 120)",
    )
    goal_options(parser)
    add("--no-label", action="store_true", help="without the mark AI-generated in the corner")
    parser.set_defaults(crop=False, absolute_pose=False, smoothing=1.0, compat=None)
    # The camera's face is measured, never coded: sessions do not share a published tracker.
    parser.set_defaults(tracker="mediapipe")


def run(arguments: argparse.Namespace) -> int:
    """Serve the page until interrupted."""
    with extra("serve"):
        from diffusionact.runtime.web.server import Site, serve
    from diffusionact.runtime.web.studio import Studio
    from diffusionact.runtime.web.visitor import Limits

    token = secrets.token_urlsafe(24) if arguments.token == "new" else arguments.token
    tls = tuple(Path(path) for path in arguments.tls) if arguments.tls else None
    site = Site(
        host=arguments.host,
        port=arguments.port,
        token=token,
        names=tuple(arguments.allow_host),
        sessions=arguments.sessions,
        tls=(tls[0], tls[1]) if tls else None,
        limits=Limits(idle_s=arguments.idle),
    )
    if arguments.no_label:
        warn_of_missing_label()
    goal = goal_or_rate(arguments, RATE)
    with load_reenactor(arguments) as act:
        told = partial(_tell, arguments, site)
        studio = Studio(act, goal=goal, label=not arguments.no_label)
        return asyncio.run(_until_ended(serve(studio, site, told)))


def _port(text: str) -> int:
    """Return a port. Raises: argparse.ArgumentTypeError."""
    if text.isdecimal() and int(text) < 65536:
        return int(text)
    raise argparse.ArgumentTypeError(f"{text!r}; wanted 0 to 65535")


async def _until_ended(serving: Coroutine[Any, Any, None]) -> int:
    """Serve until a signal comes, then end in order: pages are told, threads joined. (Where loops
    know no signals, on Windows, SIGINT is asyncio's own and becomes a KeyboardInterrupt.)"""
    loop, task, ended = asyncio.get_running_loop(), asyncio.ensure_future(serving), list[int]()

    def end(status: int) -> None:
        ended.append(status)
        task.cancel()

    for number, status in ((signal.SIGINT, INTERRUPTED), (signal.SIGTERM, TERMINATED)):
        with contextlib.suppress(NotImplementedError):
            loop.add_signal_handler(number, end, status)
    try:
        await task
    except asyncio.CancelledError:
        if not ended:
            raise
    return ended[0] if ended else DONE


def _tell(arguments: argparse.Namespace, site: Site, server: Server, port: int) -> None:
    """Print where the page is, and what it lacks."""
    scheme, host = "https" if site.tls else "http", _reached_by(site)
    url = f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}/"
    url += f"#token={site.token}" if site.token else ""
    lines = [f"the page is at {url}  (end with Ctrl+C)"]
    if not server.has_web_tracker:
        lines.append(
            "the page's own tracker is not installed: cameras are sent as pictures, to be tracked "
            "here. With npm, `make env` fetches it (or install again)"
        )
    values = {"url": url, "web_tracker": server.has_web_tracker}
    say(arguments, values, "\n".join(lines))


def _reached_by(site: Site) -> str:
    """A name or address that pages can use: of a server that listens everywhere, a name it was
    given, or the address that this machine has in its network."""
    if site.host in ("127.0.0.1", "::1"):
        return "localhost"
    if site.host not in ("0.0.0.0", "::"):
        return site.host
    if site.names:
        return site.names[0]
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # of documentation; nothing is sent
        except OSError:
            return socket.gethostname()
        return str(probe.getsockname()[0])
