"""One connection: its portrait, its driver, its frames. Nothing here is seen by another one."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import time
from collections.abc import AsyncIterator, Coroutine, Mapping
from dataclasses import dataclass
from enum import IntEnum
from typing import Any, Protocol

from diffusionact.errors import BackendMissing, NoFace
from diffusionact.landmarks import Landmarks
from diffusionact.runtime.session import Session
from diffusionact.runtime.source import Source
from diffusionact.runtime.tracker import Tracker
from diffusionact.runtime.web.guard import Bucket
from diffusionact.runtime.web.messages import (
    Kind,
    Malformed,
    Moments,
    Packet,
    landmarks_of,
    next_message,
    picture_message,
    read_command,
    read_packet,
)
from diffusionact.runtime.web.pace import Pace
from diffusionact.runtime.web.pictures import BadPicture
from diffusionact.runtime.web.studio import Studio, Upload

SEND_S = 10.0  # a page that takes nothing for so long is gone
NOT_TAKEN = "the page takes no pictures"
TRANSPORTS = ("landmarks", "frames")
_log = logging.getLogger("diffusionact.serve")


class Close(IntEnum):
    """Why the server closes a connection; the page says it in words."""

    IDLE = 4000
    MALFORMED = 4001
    TOO_FAST = 4002
    FULL = 4003
    TOKEN = 4004
    FAULT = 4005
    GOING = 1001


class Leave(Exception):
    """The connection is to be closed."""

    def __init__(self, why: Close, detail: str) -> None:
        super().__init__(detail)
        self.why = why


class Socket(Protocol):
    """What is used of a WebSocket."""

    async def send_bytes(self, data: bytes) -> None: ...
    async def send_json(self, data: Any) -> None: ...


@dataclass(frozen=True)
class Limits:
    """idle_s: without a face or a command before the seat is given to another. Commands: so many
    at once, and so many a second. Connections of one address: so many at once beside the seats,
    and so many a second."""

    idle_s: float = 120.0
    commands: int = 12
    commands_a_second: float = 1.0
    connections: int = 10
    connections_a_second: float = 1.0


class Visitor:
    """One user at one page."""

    def __init__(self, studio: Studio, socket: Socket, limits: Limits) -> None:
        self._studio, self._socket, self._limits = studio, socket, limits
        self._commands = Bucket(limits.commands, limits.commands_a_second)
        self._pace = Pace()
        self._session: Session | None = None
        self._transport = TRANSPORTS[0]
        self._upload: Upload | None = None
        self._tracker: Tracker | None = None
        self._asked = False  # whether the page has leave to send a frame
        self._captured_us = -1
        self._active_s = time.monotonic()
        self._sending = asyncio.Lock()  # pictures leave in the order they were rendered
        self._tasks: set[asyncio.Task[None]] = set()
        self._failed: asyncio.Future[None] = asyncio.get_running_loop().create_future()

    async def attend(self, messages: AsyncIterator[str | bytes]) -> None:
        """Return when the page has gone. Raises: Leave when the server has had enough."""
        try:
            while (message := await self._next(messages)) is not None:
                await self._take(message)
        except Malformed as error:
            raise Leave(Close.MALFORMED, str(error)) from None
        except TimeoutError:  # of _say or _send
            raise Leave(Close.IDLE, NOT_TAKEN) from None
        finally:
            await self._end()

    async def _next(self, messages: AsyncIterator[str | bytes]) -> str | bytes | None:
        """The next message; None at the end. Raises: Leave after too long, or what a task did."""
        coming = asyncio.ensure_future(anext(messages, None))
        try:
            while True:
                left_s = self._active_s + self._limits.idle_s - time.monotonic()
                if left_s <= 0.0:
                    raise Leave(Close.IDLE, f"no face for {self._limits.idle_s:.0f} s")
                both = (coming, self._failed)
                await asyncio.wait(both, timeout=left_s, return_when=asyncio.FIRST_COMPLETED)
                if self._failed.done():
                    self._failed.result()
                if coming.done():
                    return coming.result()
        finally:
            coming.cancel()

    async def _take(self, message: str | bytes) -> None:
        packet = read_packet(message) if isinstance(message, bytes) else None
        if packet is not None and packet.kind is not Kind.PORTRAIT:
            self._take_frame(packet)
            return
        if not self._commands.take():
            raise Leave(Close.TOO_FAST, f"more than {self._limits.commands} commands at once")
        self._active_s = time.monotonic()
        if packet is not None:
            await self._take_portrait(packet)
        else:
            await self._take_command(read_command(str(message)))

    async def _take_command(self, command: Mapping[str, Any]) -> None:
        if command["do"] == "begin":
            await self._begin(command)
        elif command["do"] == "recalibrate" and self._session is not None:
            await self._studio.recalibrate(self._session)
        elif command["do"] != "recalibrate":
            raise Malformed("an unknown command")

    async def _take_portrait(self, packet: Packet) -> None:
        """Look for the faces in a user's portrait, and tell where they are."""
        self._upload = None
        try:
            upload = await self._studio.upload(packet.body)
        except BadPicture as error:
            await self._say("bad-portrait", upload=packet.frame, why=str(error))
        except BackendMissing:
            why = "this server has no face tracker"
            await self._say("bad-portrait", upload=packet.frame, why=why)
        else:
            self._upload = upload
            height, width = upload.image.shape[:2]
            size = [width, height]
            await self._say("faces", upload=packet.frame, faces=upload.boxes(), size=size)

    async def _begin(self, command: Mapping[str, Any]) -> None:
        """Make the portrait ready, show it at rest, and ask for the first frame."""
        transport = command.get("transport")
        if transport not in TRANSPORTS:
            raise Malformed("an unknown transport")
        await self._rendered()
        self._session = None
        await self._say("warming")
        if transport == "frames" and self._tracker is None:
            self._tracker = await self._studio.tracker()
            if self._tracker is None:
                await self._say("no-tracker")
                return
        source = await self._source(command)
        if source is None:
            return
        still = await self._studio.jpeg(await self._studio.rest(source))
        self._transport, self._session = str(transport), await self._studio.session(source)
        nothing = Moments(0, 0, 0, 0, 0, 0)
        await self._send(picture_message(still, 0, 0, nothing, seen=False, neutral=True))
        await self._say("ready")
        self._active_s = time.monotonic()
        await self._ask()

    async def _source(self, command: Mapping[str, Any]) -> Source | None:
        """The portrait that a command names; None when there is none, which is told."""
        name, face = command.get("portrait"), command.get("face", 0)
        if name == "own":
            if self._upload is None or type(face) is not int:
                raise Malformed("no portrait, or no face of it")
            if not 0 <= face < len(self._upload.faces):
                raise Malformed("a face that the portrait has not")
            try:
                return await self._studio.own(self._upload, face)
            except NoFace:
                await self._say("bad-portrait", why="this face cannot be read")
                return None
        if not isinstance(name, str) or name not in self._studio.portraits:
            raise Malformed("an unknown portrait")
        return await self._studio.shipped(name)

    def _take_frame(self, packet: Packet) -> None:
        """Begin work on a frame that was asked for."""
        session = self._session
        if session is None:
            return  # it was on its way while another portrait began
        if not self._asked:
            raise Leave(Close.TOO_FAST, "a frame that was not asked for")
        wanted = Kind.LANDMARKS if self._transport == "landmarks" else Kind.FRAME
        if packet.kind is not wanted:
            raise Malformed(f"a frame of another transport than {self._transport}")
        if packet.captured_us <= self._captured_us:
            raise Malformed("a frame from before the last one")
        self._captured_us, self._asked = packet.captured_us, False
        task = asyncio.create_task(self._frame(session, packet, time.monotonic_ns()))
        self._tasks.add(task)
        task.add_done_callback(self._done)

    async def _frame(self, session: Session, packet: Packet, received_ns: int) -> None:
        """Track, render, encode and send one frame."""
        driver: Landmarks | None
        if packet.kind is Kind.FRAME and self._tracker is not None:
            driver = await self._studio.track(self._tracker, packet.body)
        else:
            driver = landmarks_of(packet)
        made = await self._studio.frame(
            session, driver, packet.captured_us * 1000, lambda: self._ask_later(session)
        )
        if made.result.seen:
            self._active_s = time.monotonic()
        async with self._sending:
            jpeg = await self._studio.jpeg(made.result.frame)
            now_ns = time.monotonic_ns()
            moments = Moments(
                received_ns=received_ns,
                sent_ns=now_ns,
                track_ns=made.ready_ns - received_ns,
                wait_ns=made.begun_ns - made.ready_ns,
                render_ns=made.done_ns - made.begun_ns,
                encode_ns=now_ns - made.done_ns,
                steps=made.result.steps,
            )
            round_ns = self._studio.observe(session, made, now_ns - received_ns)
            self._pace.learn(made.ready_ns, made.begun_ns, made.free_ns, round_ns)
            if session is self._session:
                message = picture_message(
                    jpeg, packet.frame, packet.captured_us, moments,
                    seen=made.result.seen, neutral=session.retargeter.calibrating,
                )  # fmt: skip
                await self._send(message)

    def _ask_later(self, session: Session) -> None:
        """The renderer took a frame: ask for the next, so that it comes when the renderer is
        free again, and not before the last picture has left."""

        async def ask() -> None:
            await asyncio.sleep(self._pace.delay_ms / 1e3)
            async with self._sending:
                if session is self._session:
                    await self._ask()

        task = asyncio.create_task(ask())
        self._tasks.add(task)
        task.add_done_callback(self._done)

    async def _ask(self) -> None:
        self._asked = True
        await self._send(next_message())

    async def _say(self, state: str, **more: Any) -> None:
        await in_time(self._socket.send_json({"state": state, **more}), SEND_S)

    async def _send(self, message: bytes) -> None:
        await in_time(self._socket.send_bytes(message), SEND_S)

    def _done(self, task: asyncio.Task[None]) -> None:
        self._tasks.discard(task)
        error = None if task.cancelled() else task.exception()  # and so it is seen
        if self._failed.done():
            return
        if isinstance(error, BadPicture):
            self._failed.set_exception(Leave(Close.MALFORMED, str(error)))
        elif isinstance(error, (TimeoutError, ConnectionError)):
            self._failed.set_exception(Leave(Close.IDLE, NOT_TAKEN))
        elif error is not None:
            self._failed.set_exception(error)

    async def _rendered(self) -> None:
        """Return when no frame of this visitor is in the studio, nor asked for, and the studio
        has forgotten the session."""
        session, self._session, self._asked = self._session, None, False
        if session is not None:
            self._studio.leave(session)  # at once: the others' share of the renderer is larger now
        if self._tasks:
            await asyncio.wait(self._tasks)
        if session is not None:
            self._studio.leave(session)  # again: the last frame was observed meanwhile

    async def _end(self) -> None:
        """Return when nothing is left of this visitor."""
        await self._rendered()
        if self._failed.done():
            self._failed.exception()  # seen, whatever came first
        else:
            self._failed.cancel()
        if self._tracker is not None:
            with contextlib.suppress(RuntimeError):  # the studio has closed already
                await self._studio.release(self._tracker)
        self._upload = self._tracker = None


async def in_time(work: Coroutine[Any, Any, object], seconds: float) -> None:
    """Return when the work is done. Raises: TimeoutError after so long, or what the work raises."""
    task = asyncio.ensure_future(work)
    try:
        await asyncio.wait({task}, timeout=seconds)
        # All who send on one connection wait for one future of aiohttp's: the first of them to
        # give up cancels it, and all that wait for it later. They are as late.
        if not task.done() or task.cancelled():
            raise TimeoutError
        task.result()
    finally:
        task.cancel()
