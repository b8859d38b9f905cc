"""The server of the page: its files, and one WebSocket for each visitor.

aiohttp is behind this file alone.
"""

from __future__ import annotations

import asyncio
import logging
import ssl
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

from aiohttp import WSMsgType, web

import diffusionact.runtime as runtime_package
from diffusionact.errors import SettingsError
from diffusionact.landmarks import MESH_IRISES, MESH_TO_POINTS
from diffusionact.runtime.web.guard import Arrivals, Guard, check_token, is_local
from diffusionact.runtime.web.messages import MAX_MESSAGE_BYTES, MAX_PICTURE_BYTES, PROTOCOL, UNITS
from diffusionact.runtime.web.pictures import FRAME_SIDE, PORTRAIT_SIDE
from diffusionact.runtime.web.studio import Studio
from diffusionact.runtime.web.visitor import Close, Leave, Limits, Visitor, in_time

PORT = 8600
SUBPROTOCOL = "diffusionact"
TOKEN_PREFIX = "token."  # a second subprotocol: the one header that a page may set
HEARTBEAT_S = 15.0
CLOSE_S = 3.0  # for a page to take what was sent, and the goodbye
PAGE = Path(__file__).parent / "page"
TRACKER_PLACES = ("web/tracker", "web/node_modules/@mediapipe/face_mesh")
TRACKER_FILES = (
    "face_mesh.js",
    "face_mesh.binarypb",
    "face_mesh_solution_packed_assets.data",
    "face_mesh_solution_packed_assets_loader.js",
    "face_mesh_solution_simd_wasm_bin.js",
    "face_mesh_solution_simd_wasm_bin.wasm",
)
TYPES = {
    ".html": "text/html", ".css": "text/css", ".js": "text/javascript", ".svg": "image/svg+xml",
    ".png": "image/png", ".wasm": "application/wasm",
}  # fmt: skip
# No inline script, nothing from elsewhere. The glue of the page's tracker makes functions from
# text (embind), so that where it is served, 'unsafe-eval' is added.
POLICY = (
    "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' "
    "blob: data:; media-src 'self' blob:; connect-src 'self'; base-uri 'none'; form-action 'none'; "
    "frame-ancestors 'none'"
)
HEADERS = {
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cross-Origin-Opener-Policy": "same-origin",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Permissions-Policy": "camera=(self), microphone=(), geolocation=()",
    "Cache-Control": "no-cache",
}
_log = logging.getLogger("diffusionact.serve")
Handler = Callable[[web.Request], Awaitable[web.StreamResponse]]


@dataclass(frozen=True)
class Site:
    """Where a server listens and whom it lets in. names: host names it goes by, beside localhost
    and numbers; tls: certificate and key files."""

    host: str = "127.0.0.1"
    port: int = PORT
    token: str | None = None
    names: tuple[str, ...] = ()
    sessions: int = 4
    tls: tuple[Path, Path] | None = None
    limits: Limits = field(default_factory=Limits)

    def __post_init__(self) -> None:
        check_token(self.token)
        # A name is for others too: whoever connects to a proxy comes from this machine.
        if self.token is None and (self.names or not is_local(self.host)):
            why = f"--allow-host {self.names[0]}" if self.names else f"--host {self.host}"
            raise SettingsError(
                f"{why} lets other machines in: it needs --token TEXT as well, or --token new "
                "for a fresh one"
            )
        if not 1 <= self.sessions <= 64:
            raise SettingsError(f"--sessions {self.sessions}; wanted 1 to 64")


class Server:
    """One site over one studio."""

    def __init__(self, studio: Studio, site: Site) -> None:
        self._studio, self._site = studio, site
        self._guard = Guard(site.token, (*site.names, site.host))
        limits = site.limits
        burst = limits.connections + site.sessions
        self._arrivals = Arrivals(burst, limits.connections_a_second)
        self._seats: dict[web.WebSocketResponse, web.Request] = {}
        self._tracker_dir = web_tracker()
        policy = POLICY
        if self._tracker_dir is not None:
            policy = policy.replace("script-src 'self'", "script-src 'self' 'unsafe-eval'")
        self._headers = {**HEADERS, "Content-Security-Policy": policy}

    def app(self) -> web.Application:
        """Return the routes."""
        app = web.Application(middlewares=[self._guarded], client_max_size=4096)
        app.router.add_get("/", self._index)
        app.router.add_get("/api/site", self._about)
        app.router.add_get("/api/drive", self._drive)
        app.router.add_get("/portraits/{name}.png", self._portrait)
        app.router.add_get("/page/{name}", self._file(PAGE, {p.name for p in PAGE.iterdir()}))
        if self._tracker_dir is not None:
            route = self._file(self._tracker_dir, set(TRACKER_FILES))
            app.router.add_get("/tracker/{name}", route)
        app.on_shutdown.append(self._shut)
        return app

    @property
    def has_web_tracker(self) -> bool:
        """Whether pages can track by themselves."""
        return self._tracker_dir is not None

    @web.middleware
    async def _guarded(self, request: web.Request, handler: Handler) -> web.StreamResponse:
        """Refuse strangers; put the headers on all else."""
        host = request.headers.get("Host")
        if not self._guard.knows_host(host):
            return web.Response(
                status=421,
                text="this server does not go by that name; start it with --allow-host NAME\n",
                headers=self._headers,
            )
        if not self._guard.knows_origin(request.headers.get("Origin"), host):
            return web.Response(status=403, text="not from another site\n", headers=self._headers)
        try:
            response = await handler(request)
        except web.HTTPException as error:
            error.headers.update(self._headers)
            raise
        if not response.prepared:
            response.headers.update(self._headers)
        return response

    async def _index(self, request: web.Request) -> web.StreamResponse:
        return _whole(PAGE / "index.html")

    async def _portrait(self, request: web.Request) -> web.StreamResponse:
        path = self._studio.portraits.get(request.match_info["name"])
        if path is None:
            raise web.HTTPNotFound
        return _whole(path)

    async def _about(self, request: web.Request) -> web.StreamResponse:
        """What the page has to know; nothing of it is secret."""
        return web.json_response(
            {
                "protocol": PROTOCOL,
                "model": self._studio.model,
                "portraits": sorted(self._studio.portraits),
                "token": self._site.token is not None,
                "seats": {"all": self._site.sessions, "taken": len(self._seats)},
                "tracker": self.has_web_tracker,
                "mesh": {"points": MESH_TO_POINTS, "irises": MESH_IRISES, "units": UNITS},
                "limits": {
                    "frameSide": FRAME_SIDE,
                    "frameBytes": MAX_PICTURE_BYTES,
                    "portraitSide": PORTRAIT_SIDE,
                    "idleSeconds": self._site.limits.idle_s,
                },
            }
        )

    def _file(self, folder: Path, names: set[str]) -> Handler:
        async def give(request: web.Request) -> web.StreamResponse:
            name = request.match_info["name"]
            if name not in names:
                raise web.HTTPNotFound
            return _whole(folder / name)

        return give

    async def _drive(self, request: web.Request) -> web.StreamResponse:
        """Serve one visitor until one of both has had enough."""
        if wait_s := self._arrivals.wait_s(request.remote):
            raise web.HTTPTooManyRequests(
                text="too many connections\n", headers={"Retry-After": str(wait_s)}
            )
        socket = web.WebSocketResponse(
            protocols=(SUBPROTOCOL,),
            heartbeat=HEARTBEAT_S,
            max_msg_size=MAX_MESSAGE_BYTES,
            compress=False,
        )
        await socket.prepare(request)
        why: Close | None
        if not self._guard.admits(_token(request)):
            why = Close.TOKEN
        elif len(self._seats) >= self._site.sessions:
            why = Close.FULL
        else:
            self._seats[socket] = request
            try:
                why = await self._attend(socket)
            finally:
                del self._seats[socket]  # before the goodbye, which a peer can draw out
        if why is not None:
            await _close(socket, request, why)
        return socket

    async def _attend(self, socket: web.WebSocketResponse) -> Close | None:
        """Why a visitor is to be sent away; None where the page has gone by itself."""
        try:
            await Visitor(self._studio, socket, self._site.limits).attend(_messages(socket))
        except Leave as leave:
            _log.info("a session was closed: %s", leave)
            return leave.why
        except ConnectionError:
            pass
        except Exception:
            _log.exception("a session failed")
            return Close.FAULT
        return None

    async def _shut(self, app: web.Application) -> None:
        closing = (_close(*seat, Close.GOING) for seat in tuple(self._seats.items()))
        await asyncio.gather(*closing, return_exceptions=True)


async def serve(studio: Studio, site: Site, started: Callable[[Server, int], None]) -> None:
    """Serve until cancelled; `started` is called, with the port, when the first page can come.

    Raises: SettingsError when the port cannot be had.
    """
    server = Server(studio, site)
    runner = web.AppRunner(server.app(), access_log=None, handle_signals=False)
    await runner.setup()
    try:
        place = web.TCPSite(
            runner, site.host, site.port, ssl_context=_tls(site), shutdown_timeout=3.0
        )
        try:
            await place.start()
        except OSError as error:
            raise SettingsError(
                f"{site.host}:{site.port} cannot be listened on ({error.strerror}); try --port N"
            ) from error
        started(server, runner.addresses[0][1])
        await asyncio.Event().wait()
    finally:
        await runner.cleanup()
        await studio.close()


def web_tracker() -> Path | None:
    """Return the folder of the page's own tracker, as installed or as `npm ci` left it in a
    checkout; None when it is not there, or not whole."""
    for folder in _tracker_places():
        if all((folder / name).is_file() for name in TRACKER_FILES):
            return folder
    return None


def _tracker_places() -> Iterator[Path]:
    for root in runtime_package.__path__:
        for place in TRACKER_PLACES:
            yield Path(root) / place


def _whole(path: Path) -> web.FileResponse:
    kind = TYPES.get(path.suffix, "application/octet-stream")
    return web.FileResponse(path, headers={"Content-Type": kind})


def _token(request: web.Request) -> str | None:
    """The token of a request: of scripts as `Authorization: Bearer`, of pages as a subprotocol."""
    scheme, _, bearer = request.headers.get("Authorization", "").partition(" ")
    if scheme.lower() == "bearer":
        return bearer
    offered = request.headers.get("Sec-WebSocket-Protocol", "").split(",")
    tokens = (o.strip().removeprefix(TOKEN_PREFIX) for o in offered if TOKEN_PREFIX in o)
    return next(tokens, None)


async def _close(socket: web.WebSocketResponse, request: web.Request, why: Close) -> None:
    """Return when the page knows why, or has let the time pass and is cut off: a peer that reads
    nothing would hold its connection until TCP gives up."""
    try:
        await in_time(socket.close(code=why, message=why.name.lower().encode()), CLOSE_S)
    except TimeoutError:
        if request.transport is not None:
            request.transport.abort()


async def _messages(socket: web.WebSocketResponse) -> AsyncIterator[str | bytes]:
    async for message in socket:
        if message.type in (WSMsgType.TEXT, WSMsgType.BINARY):
            yield message.data


def _tls(site: Site) -> ssl.SSLContext | None:
    if site.tls is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    certificate, key = site.tls
    try:
        context.load_cert_chain(certificate, key)
    except (OSError, ssl.SSLError) as error:
        raise SettingsError(
            f"{certificate}, {key}: no certificate and its key ({error.strerror or error})"
        ) from error
    return context
