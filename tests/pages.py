"""A page's part of the protocol, in Python: what the tests of the server drive it with."""

from __future__ import annotations

import asyncio
import json
import struct
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any

import aiohttp
import cv2
import numpy as np
import numpy.typing as npt
from aiohttp.test_utils import TestServer

from diffusionact.assets import driver_path
from diffusionact.errors import NoFace
from diffusionact.landmarks import Landmarks, Track, sidecar_path
from diffusionact.runtime.reenactor import Reenactor
from diffusionact.runtime.web import messages
from diffusionact.runtime.web.server import SUBPROTOCOL, Server, Site
from diffusionact.runtime.web.studio import Studio

UInt8Array = npt.NDArray[np.uint8]
PATIENCE_S = 30.0
FRAME_US = 40_000
TRACK = Track.load(sidecar_path(driver_path()))  # the shipped driver's motion
SIDE = float(max(TRACK.size))


@dataclass(frozen=True)
class Picture:
    """One answer of the server."""

    frame: int
    captured_us: int
    seen: bool
    neutral: bool
    moments: messages.Moments
    jpeg: bytes

    @property
    def image(self) -> UInt8Array:
        image = cv2.imdecode(np.frombuffer(self.jpeg, np.uint8), cv2.IMREAD_COLOR)
        return np.asarray(image, np.uint8)


class Page:
    """One connection."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self.socket = socket
        self._frame = 0

    async def say(self, **command: Any) -> None:
        await self.socket.send_str(json.dumps(command))

    async def hear(self) -> Picture | dict[str, Any] | None:
        """The next picture or state; None is leave to send a frame."""
        message = await self.socket.receive(PATIENCE_S)
        if message.type is aiohttp.WSMsgType.TEXT:
            return dict(json.loads(message.data))
        if message.type is not aiohttp.WSMsgType.BINARY:
            raise ConnectionError(self.socket.close_code, message.type.name)
        if message.data[0] == messages.Kind.NEXT:
            return None
        return Picture(*messages.read_picture(message.data))

    async def state(self, wanted: str) -> dict[str, Any]:
        """Read on until the server says this."""
        while True:
            heard = await self.hear()
            if isinstance(heard, dict) and heard["state"] == wanted:
                return heard
            assert not isinstance(heard, dict) or heard["state"] == "warming", heard

    async def begin(self, portrait: str = "ada", transport: str = "landmarks", **more: Any) -> None:
        """Return when the first frame may be sent."""
        await self.say(do="begin", portrait=portrait, transport=transport, **more)
        await self.state("ready")
        assert await self.hear() is None

    async def drive(self, face: Landmarks | None, side: float, frame: int, at_us: int) -> Picture:
        """Send one face, and return its picture and the leave for the next."""
        await self.socket.send_bytes(messages.landmarks_message(face, side, frame, at_us))
        return await self.picture()

    async def picture(self) -> Picture:
        """The next picture, after the leave for the next frame has come too."""
        first, second = await self.hear(), await self.hear()
        picture = second if first is None else first
        assert isinstance(picture, Picture) and (first is None or second is None)
        return picture

    async def closed(self) -> int | None:
        """Read to the end; why the server closed."""
        async with asyncio.timeout(PATIENCE_S):
            while not self.socket.closed:
                message = await self.socket.receive()
                if message.type in (aiohttp.WSMsgType.CLOSED, aiohttp.WSMsgType.CLOSE):
                    break
        return self.socket.close_code


class Browser:
    """Connections to one running server."""

    def __init__(self, server: TestServer, http: aiohttp.ClientSession) -> None:
        self.server, self.http = server, http

    @asynccontextmanager
    async def page(self, token: str | None = None, **headers: str) -> AsyncIterator[Page]:
        protocols = (SUBPROTOCOL, *((f"token.{token}",) if token else ()))
        async with self.http.ws_connect(
            self.server.make_url("/api/drive"), protocols=protocols, headers=headers
        ) as socket:
            yield Page(socket)


@asynccontextmanager
async def serving(
    act: Reenactor, site: Site, *, port: int = 0, **studio: Any
) -> AsyncIterator[Browser]:
    """A server on this port or a free one, and a browser that knows it."""
    room = Studio(act, **studio)
    server = TestServer(Server(room, site).app(), port=port)
    await server.start_server()
    try:
        async with aiohttp.ClientSession() as http:
            yield Browser(server, http)
    finally:
        await server.close()
        await room.close()


class FakeTracker:
    """Knows one face in any portrait, or as many as it is told, and a driver by its brightness."""

    def __init__(self, faces: list[Landmarks]) -> None:
        self.faces, self.closed = faces, False

    def detect(self, image_bgr: UInt8Array) -> list[Landmarks]:
        return self.faces

    def track(self, image_bgr: UInt8Array) -> Landmarks:
        number = round(float(image_bgr.mean()))
        if number == 0:
            raise NoFace("black")
        face = TRACK[number]
        assert face is not None
        return face

    def close(self) -> None:
        self.closed = True


def visit(
    act: Reenactor,
    use: Callable[[Browser], Awaitable[None]],
    site: Site | None = None,
    **studio: Any,
) -> None:
    """Run one story against a server of its own."""

    async def story() -> None:
        async with serving(act, site or Site(), **studio) as browser:
            await use(browser)

    asyncio.run(story())


async def drive(page: Page, frames: range) -> list[Picture]:
    return [await page.drive(TRACK[i], SIDE, i, i * FRAME_US) for i in frames]


def png(image: UInt8Array) -> bytes:
    return cv2.imencode(".png", image)[1].tobytes()


def grey_frame(number: int, at_us: int) -> bytes:
    jpeg = cv2.imencode(".jpg", np.full((48, 64, 3), number, np.uint8))[1].tobytes()
    return messages.frame_message(jpeg, number, at_us)


def png_of_size(width: int, height: int) -> bytes:
    """The first bytes of a PNG that says it is so large."""
    return png(np.zeros((32, 32, 3), np.uint8))[:16] + struct.pack(">II", width, height) + b"x" * 99
