"""The server of the page: what it refuses, what it limits, and the parts that do so."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import heapq
import json
import logging
import secrets
import signal
import socket
import subprocess
import sys
import threading
import time
import tracemalloc
import uuid
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from itertools import accumulate
from pathlib import Path
from types import SimpleNamespace

import aiohttp
import numpy as np
import pytest
from aiohttp import web
from aiohttp.test_utils import TestServer, get_port_socket

from diffusionact.cli import main
from diffusionact.errors import SettingsError
from diffusionact.runtime.reenactor import Reenactor
from diffusionact.runtime.settings import Settings
from diffusionact.runtime.web import messages
from diffusionact.runtime.web import server as server_module
from diffusionact.runtime.web import visitor as visitor_module
from diffusionact.runtime.web.guard import Arrivals, Bucket, Guard
from diffusionact.runtime.web.pace import EARLY_MS, Pace
from diffusionact.runtime.web.server import Server, Site
from diffusionact.runtime.web.studio import Studio
from diffusionact.runtime.web.visitor import Close, Leave, Limits, Visitor
from tests.pages import (
    FRAME_US,
    PATIENCE_S,
    SIDE,
    TRACK,
    Browser,
    FakeTracker,
    Page,
    drive,
    grey_frame,
    png_of_size,
    visit,
)

ABNORMAL = aiohttp.WSCloseCode.ABNORMAL_CLOSURE
TOKEN = "a-token-of-more-than-sixteen"


@pytest.fixture(scope="module")
def act(toy_bundle: Path) -> Iterator[Reenactor]:
    settings = Settings(threads=1, backend="ort")
    with Reenactor.load(toy_bundle, settings=settings, tracker=FakeTracker([])) as act:
        yield act


# ---- what is not allowed ----


def head(kind: int, flags: int = 0, zero: int = 0, frame: int = 1, at_us: int = 1) -> bytes:
    return messages.HEAD.pack(kind, flags, zero, frame, at_us)


MALFORMED: dict[str, bytes | str] = {
    "empty": b"",
    "short": b"\x01\x00\x00",
    "unknown kind": head(9) + bytes(420),
    "the server's kind": head(17),
    "unknown flags": head(1, flags=2),
    "points that are too few": head(1, flags=1) + bytes(418),
    "points of nobody": head(1, flags=0) + bytes(420),
    "another transport": head(2) + b"\xff\xd8\xff",
    "an empty frame": head(2),
    "no json": "{",
    "a list": "[]",
    "no verb": '{"portrait": "ada"}',
    "an unknown verb": '{"do": "dance"}',
    "an unknown portrait": '{"do": "begin", "portrait": "../ada", "transport": "landmarks"}',
    "an unknown transport": '{"do": "begin", "portrait": "ada", "transport": "pigeons"}',
    "a face that is no number": '{"do": "begin", "portrait": "own", "face": "1", '
    '"transport": "landmarks"}',
    "nested": "[" * 1000,
    "a long command": '{"do": "' + "x" * 2000 + '"}',
}


MANY = Site(limits=Limits(connections=1000))


def test_a_malformed_message_ends_its_session_and_no_other(act: Reenactor) -> None:
    async def use(browser: Browser) -> None:
        async with browser.page() as bystander:
            await bystander.begin("bruno")
            for i, (name, message) in enumerate(MALFORMED.items(), start=1):
                async with browser.page() as page:
                    await page.begin()
                    if isinstance(message, bytes):
                        await page.socket.send_bytes(message)
                    else:
                        await page.socket.send_str(message)
                    assert await page.closed() == Close.MALFORMED, name
                assert (await bystander.drive(TRACK[i], SIDE, i, i * FRAME_US)).frame == i

    visit(act, use, MANY)


def test_times_must_rise_and_frames_be_asked_for(act: Reenactor) -> None:
    async def use(browser: Browser) -> None:
        async with browser.page() as page:
            await page.begin()
            await page.drive(TRACK[1], SIDE, 1, 5000)
            await page.socket.send_bytes(messages.landmarks_message(TRACK[2], SIDE, 2, 5000))
            assert await page.closed() == Close.MALFORMED
        async with browser.page() as page:
            await page.begin()
            for i in (1, 2):
                await page.socket.send_bytes(messages.landmarks_message(TRACK[i], SIDE, i, i))
            assert await page.closed() == Close.TOO_FAST

    visit(act, use)


def test_oversized_messages_and_too_many_commands_end_a_session(act: Reenactor) -> None:
    async def use(browser: Browser) -> None:
        async with browser.page() as page:
            with contextlib.suppress(ConnectionError):  # it is cut off before all of it is sent
                await page.socket.send_bytes(bytes(messages.MAX_MESSAGE_BYTES + 1))
            assert await page.closed() in (aiohttp.WSCloseCode.MESSAGE_TOO_BIG, ABNORMAL)
        async with browser.page() as page:
            for _ in range(30):
                await page.say(do="recalibrate")
            assert await page.closed() == Close.TOO_FAST
        async with browser.page() as page:  # a frame that is a bomb, in the midst of a session
            await page.begin(transport="frames")
            bomb = png_of_size(50_000, 50_000)
            await page.socket.send_bytes(messages.frame_message(bomb, 1, 1))
            assert await page.closed() == Close.MALFORMED

    visit(act, use, new_tracker=lambda: FakeTracker([]))


def test_any_points_at_all_leave_the_server_standing(act: Reenactor) -> None:
    rng = np.random.default_rng(5)

    async def use(browser: Browser) -> None:
        async with browser.page() as page:
            await page.begin()
            for i in range(1, 120):
                body = rng.integers(-32768, 32768, 210).astype("<i2")
                body[:: i % 5 + 1] //= 3 ** (i % 9)
                at_us = i * FRAME_US if i < 100 else 2**63 + i * 10**12
                await page.socket.send_bytes(head(1, 1, frame=i, at_us=at_us) + body.tobytes())
                picture = await page.picture()
                assert picture.frame == i and picture.image.std() > 1.0

    visit(act, use)


def test_a_server_that_is_full_says_so_until_a_seat_is_free(act: Reenactor) -> None:
    async def use(browser: Browser) -> None:
        async with browser.page() as first:
            await first.begin()
            async with browser.page() as second:
                assert await second.closed() == Close.FULL
            await first.drive(TRACK[1], SIDE, 1, 1)
        await asyncio.sleep(0.05)
        async with browser.page() as third:
            await third.begin()

    visit(act, use, Site(sessions=1))


def test_an_idle_session_gives_up_its_seat(act: Reenactor) -> None:
    async def use(browser: Browser) -> None:
        async with browser.page() as quiet:
            await quiet.begin()
            assert await quiet.closed() == Close.IDLE

    visit(act, use, Site(limits=Limits(idle_s=0.3)))


def test_a_session_is_idle_without_a_face_and_not_with_one(
    act: Reenactor, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a clock that the test turns: a busy machine is no idle visitor."""
    now_s, idle_s = 0.0, 600.0
    clock = SimpleNamespace(monotonic=lambda: now_s, monotonic_ns=time.monotonic_ns)
    monkeypatch.setattr(visitor_module, "time", clock)

    async def use(browser: Browser) -> None:
        nonlocal now_s
        async with browser.page() as busy:
            await busy.begin()
            for i in range(1, 10):
                await busy.drive(TRACK[i], SIDE, i, i * FRAME_US)
                now_s += 0.4 * idle_s
        async with browser.page() as faceless:  # as busy, but nobody is there
            await faceless.begin()
            for i in range(1, 4):
                await faceless.drive(None, SIDE, i, i * FRAME_US)
                now_s += 0.4 * idle_s
            await faceless.socket.send_bytes(messages.landmarks_message(None, SIDE, 4, 10**6))
            assert await faceless.closed() == Close.IDLE

    visit(act, use, Site(limits=Limits(idle_s=idle_s)))


class Wall:
    """A socket whose page takes so many messages, and no more."""

    def __init__(self, taken: int) -> None:
        self._left = taken

    async def send_bytes(self, data: bytes) -> None:
        self._left -= 1
        if self._left < 0:
            await asyncio.Event().wait()

    async def send_json(self, data: object) -> None:
        await self.send_bytes(b"")


@pytest.mark.parametrize("taken", range(4))  # warming, the portrait at rest, ready, next
def test_a_page_that_takes_nothing_is_idle_from_the_first_message_on(
    act: Reenactor, monkeypatch: pytest.MonkeyPatch, taken: int
) -> None:
    monkeypatch.setattr(visitor_module, "SEND_S", 0.05)

    async def said(message: str | bytes) -> AsyncIterator[str | bytes]:
        yield message
        await asyncio.Event().wait()

    async def why(message: str | bytes) -> Close:
        studio = Studio(act)
        try:
            with pytest.raises(Leave) as left:
                await Visitor(studio, Wall(taken), Limits()).attend(said(message))
        finally:
            await studio.close()
        return left.value.why

    begin = '{"do": "begin", "portrait": "ada", "transport": "landmarks"}'
    assert asyncio.run(why(begin)) == Close.IDLE
    if taken == 0:
        assert asyncio.run(why(messages.portrait_message(b"no picture"))) == Close.IDLE


@asynccontextmanager
async def deaf(server: TestServer, *said: str) -> AsyncIterator[socket.socket]:
    """A connection that says all this, and never reads. Its system takes little for it."""
    loop = asyncio.get_running_loop()
    with socket.socket() as peer:
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        peer.setblocking(False)
        await loop.sock_connect(peer, (server.host, server.port))
        await loop.sock_sendall(
            peer,
            b"GET /api/drive HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\n"
            b"Connection: Upgrade\r\nSec-WebSocket-Version: 13\r\n"
            b"Sec-WebSocket-Protocol: diffusionact\r\n"
            b"Sec-WebSocket-Key: AAAAAAAAAAAAAAAAAAAAAA==\r\n\r\n",
        )
        for text in said:  # short frames, masked with zeros
            await loop.sock_sendall(peer, bytes([0x81, 0x80 + len(text), 0, 0, 0, 0]))
            await loop.sock_sendall(peer, text.encode())
        yield peer


def short_of_breath(host: str, port: int, family: socket.AddressFamily) -> socket.socket:
    """A listening socket whose connections hold little of what is sent."""
    made = get_port_socket(host, port, family)
    made.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 4096)
    return made


@pytest.mark.parametrize("ended_by", ["the peer", "the server"])
def test_a_peer_that_reads_nothing_holds_neither_its_seat_nor_the_server(
    act: Reenactor, monkeypatch: pytest.MonkeyPatch, ended_by: str
) -> None:
    monkeypatch.setattr(server_module, "CLOSE_S", 0.2)
    if ended_by == "the peer":
        monkeypatch.setattr(visitor_module, "SEND_S", 0.2)
    begin = '{"do":"begin","portrait":"ada","transport":"landmarks"}'
    ordinary, seats = server_module._close, list[int]()

    async def story() -> None:
        room = Studio(act)
        site = Site(sessions=1, limits=Limits(commands=40, connections=1000))
        made = Server(room, site)
        server = TestServer(made.app(), socket_factory=short_of_breath)

        async def noted(peer: web.WebSocketResponse, request: web.Request, why: Close) -> None:
            if why == Close.IDLE:
                seats.append(len(made._seats))
            await ordinary(peer, request, why)

        monkeypatch.setattr(server_module, "_close", noted)
        await server.start_server()
        try:
            async with aiohttp.ClientSession() as http, deaf(server, *[begin] * 30):
                async with asyncio.timeout(PATIENCE_S):
                    while not any(peer.writing_paused for peer in server.handler.connections):
                        await asyncio.sleep(0.02)
                    if ended_by == "the peer":
                        while not await has_seat(Browser(server, http)):
                            await asyncio.sleep(0.05)
                        while server.handler.connections:  # it is cut off
                            await asyncio.sleep(0.05)
                        assert seats == [0]  # free before the goodbye
                    await server.close()
        finally:
            await server.close()
            await room.close()

    asyncio.run(story())


async def has_seat(browser: Browser) -> bool:
    async with browser.page() as page:
        try:
            await page.begin()
        except ConnectionError:
            return False
        return True


def test_too_many_connections_of_one_address_are_told_to_wait(act: Reenactor) -> None:
    async def use(browser: Browser) -> None:
        for _ in range(4):  # two beside the seats
            async with browser.page(token="not-the-token-of-it") as page:
                assert await page.closed() == Close.TOKEN
        with pytest.raises(aiohttp.WSServerHandshakeError) as refused:
            async with browser.page(token=TOKEN):
                pass
        assert refused.value.status == 429 and refused.value.headers is not None
        assert 900 < int(refused.value.headers["Retry-After"]) <= 1000
        assert "Content-Security-Policy" in refused.value.headers
        async with browser.http.get(browser.server.make_url("/")) as answer:
            assert answer.status == 200

    limits = Limits(connections=2, connections_a_second=0.001)
    visit(act, use, Site(token=TOKEN, sessions=2, limits=limits))


def test_four_pages_that_reconnect_stay_below_the_limit() -> None:
    """The page's own waits, after a server that came back and found every seat taken."""
    now_s, limits = 0.0, Limits()
    arrivals = Arrivals(
        limits.connections + Site().sessions, limits.connections_a_second, clock=lambda: now_s
    )
    tries = sorted(4 * [0.0, *accumulate([0.5, 1.0, 2.0, 4.0, *[4.0] * 20])])
    for now_s in tries:
        assert arrivals.wait_s("127.0.0.1") == 0, now_s


def test_a_token_is_wanted_where_there_is_one(act: Reenactor) -> None:
    async def use(browser: Browser) -> None:
        for wrong in (None, "a-token-of-more-than-sixteeN", TOKEN[:-1]):
            async with browser.page(token=wrong) as page:
                assert await page.closed() == Close.TOKEN
        async with browser.page(token=TOKEN) as page:
            assert page.socket.protocol == "diffusionact"  # the token is not sent back
            await page.begin()
        async with browser.page(Authorization=f"Bearer {TOKEN}") as page:
            await page.begin()
        about = await (await browser.http.get(browser.server.make_url("/api/site"))).text()
        assert '"token": true' in about and TOKEN not in about

    visit(act, use, Site(token=TOKEN))


def test_other_hosts_and_other_sites_are_refused(act: Reenactor) -> None:
    async def use(browser: Browser) -> None:
        async def status(path: str, **headers: str) -> int:
            url = browser.server.make_url(path)
            async with browser.http.get(url, headers=headers) as answer:
                return answer.status

        port = browser.server.port
        assert await status("/", Host=f"localhost:{port}") == 200
        assert await status("/", Host=f"[::1]:{port}") == 200
        assert await status("/", Host=f"192.168.7.5:{port}") == 200
        for host in ("evil.example", f"evil.example:{port}", "localhost.evil.example", ""):
            assert await status("/", Host=host) == 421, host
        assert await status("/", Host="studio.lan") == 200
        here = f"http://127.0.0.1:{port}"
        assert await status("/", Origin=here) == 200
        for origin in ("https://evil.example", "null", "http://127.0.0.1:1"):
            assert await status("/", Origin=origin) == 403, origin
            with pytest.raises(aiohttp.WSServerHandshakeError):
                async with browser.page(Origin=origin):
                    pass
        async with browser.page(token=TOKEN, Origin=here) as page:
            await page.begin()

    visit(act, use, Site(names=("studio.lan",), token=TOKEN))


def test_files_come_with_a_policy_and_none_but_the_pages_own(act: Reenactor) -> None:
    async def use(browser: Browser) -> None:
        for path in ("/", "/page/app.js", "/page/style.css", "/portraits/ada.png", "/nothing"):
            async with browser.http.get(browser.server.make_url(path)) as answer:
                policy = answer.headers["Content-Security-Policy"]
                assert "default-src 'none'" in policy and "unsafe-inline" not in policy
                assert answer.headers["X-Content-Type-Options"] == "nosniff"
                assert (answer.status == 200) is (path != "/nothing"), path
        for path in ("/page/..%2fserver.py", "/page/../server.py", "/portraits/..%2fface68.npz",
                     "/portraits/ada.landmarks.npz", "/tracker/package.json"):  # fmt: skip
            raw = aiohttp.client.URL(f"{browser.server.make_url('/')}"[:-1] + path, encoded=True)
            async with browser.http.get(raw) as answer:
                assert answer.status == 404, path

    visit(act, use)


def test_nothing_of_a_user_is_written_or_logged(
    act: Reenactor, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    caplog: pytest.LogCaptureFixture,
) -> None:  # fmt: skip
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("TMPDIR", str(tmp_path))
    marker = "my-secret-name"

    async def use(browser: Browser) -> None:
        async with browser.page() as page:
            await page.socket.send_bytes(messages.portrait_message(marker.encode()))
            await page.state("bad-portrait")
            await page.begin()
            await drive(page, range(1, 10))
            await page.say(do=marker)
            assert await page.closed() == Close.MALFORMED

    with caplog.at_level(logging.DEBUG):
        visit(act, use)
    assert list(tmp_path.iterdir()) == [] and marker not in caplog.text
    assert not [r for r in caplog.records if r.levelno >= logging.ERROR]


def test_other_machines_are_let_in_with_a_token_only(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SettingsError, match="--token"):
        Site(host="0.0.0.0")
    with pytest.raises(SettingsError, match="sessions"):
        Site(sessions=0)
    with pytest.raises(SettingsError, match="--allow-host studio.lan .* --token"):
        Site(names=("studio.lan",))  # of a proxy on this machine
    with pytest.raises(SystemExit):
        main(["serve", "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "behind a proxy say; needs --token" in told and "16 or more of A-Z a-z 0-9" in told
    Site(host="0.0.0.0", token=TOKEN)
    Site(names=("studio.lan",), token=TOKEN)
    Site(host="::1")
    assert not Guard(TOKEN).admits("\udcff" + TOKEN)  # a header with a byte that is no text


@pytest.mark.skipif(sys.platform == "win32", reason="no SIGTERM to send")
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_the_command_says_where_the_page_is_and_ends_in_order(
    toy_bundle: Path, number: signal.Signals
) -> None:
    command = (sys.executable, "-m", "diffusionact.cli", "serve", "--json", "--port", "0",
               "--bundle", str(toy_bundle), "--backend", "ort")  # fmt: skip
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None and process.stderr is not None
        told = json.loads(process.stdout.readline())

        async def use() -> None:
            protocols = ("diffusionact",)
            async with (
                aiohttp.ClientSession() as http,
                http.ws_connect(f"{told['url']}api/drive", protocols=protocols) as socket,
            ):
                page = Page(socket)
                await page.begin()
                await page.drive(TRACK[1], SIDE, 1, 1)
                process.send_signal(number)
                assert await page.closed() == Close.GOING

        asyncio.run(use())
        assert process.wait(30) == 128 + number
        assert process.stderr.read() == b""


@pytest.mark.slow
def test_visitors_who_come_and_go_leave_nothing_behind(act: Reenactor) -> None:
    held: list[tuple[int, int, int]] = []  # tasks, threads, traced bytes

    async def use(browser: Browser) -> None:
        for number in range(240):
            async with browser.page() as page:
                await page.begin(transport=("landmarks", "frames")[number % 2])
                if number % 2:
                    await page.socket.send_bytes(grey_frame(9, 1))
                    await page.picture()
                else:
                    await page.drive(TRACK[1], SIDE, 1, 1)
                    await page.socket.send_bytes(messages.landmarks_message(None, SIDE, 2, 2))
            if number in (79, 239):
                await asyncio.sleep(0.5)
                gc.collect()
                traced = tracemalloc.get_traced_memory()[0]
                held.append((len(asyncio.all_tasks()), threading.active_count(), traced))

    tracemalloc.start()
    try:
        visit(act, use, MANY, new_tracker=lambda: FakeTracker([]))
    finally:
        tracemalloc.stop()
    (tasks, threads, early), (later_tasks, later_threads, late) = held
    assert later_tasks <= tasks and later_threads <= threads
    assert late - early < 500_000  # of 160 visitors: 3 KB each


# ---- parts ----


@pytest.mark.parametrize(
    "token", ["", "short", "fifteen-letters", *(f"sixteen{c}letters-" for c in "=/+ \n%#,é")]
)
def test_a_token_that_a_page_could_not_send_is_refused(token: str) -> None:
    for made in (Guard, lambda text: Site(token=text)):
        with pytest.raises(SettingsError, match="16 or more.* --token new") as refused:
            made(token)
        assert len(token) < 3 or token not in str(refused.value)


def test_tokens_of_the_usual_makers_are_taken() -> None:
    for token in (
        secrets.token_urlsafe(24),
        secrets.token_hex(),
        str(uuid.uuid4()),
        "a.b_c~d-" * 2,
    ):
        assert Guard(token).admits(token)


def test_a_bucket_gives_so_many_at_once_and_so_many_a_second() -> None:
    now = 0.0
    bucket = Bucket(3, 2.0, clock=lambda: now)
    assert [bucket.take() for _ in range(4)] == [True, True, True, False]
    now = 1.0
    assert [bucket.take() for _ in range(3)] == [True, True, False]


def test_arrivals_are_counted_by_address_and_forgotten() -> None:
    now = 0.0
    arrivals = Arrivals(2, 0.25, clock=lambda: now)
    assert [arrivals.wait_s("192.0.2.1") for _ in range(3)] == [0, 0, 4]
    assert arrivals.wait_s("192.0.2.2") == 0
    assert [arrivals.wait_s(f"2001:db8::{i}") for i in (1, 2, 3)] == [0, 0, 4]  # one network
    assert arrivals.wait_s("2001:db8:0:1::1") == arrivals.wait_s("fe80::1%eth0") == 0
    assert [arrivals.wait_s(a) for a in ("::ffff:192.0.2.1", "::ffff:192.0.2.2")] == [4, 0]
    assert arrivals.wait_s(None) == 0  # of a Unix socket
    now = 3.0
    assert arrivals.wait_s("192.0.2.1") == 1
    now = 4.0
    assert arrivals.wait_s("192.0.2.1") == 0
    now = 100.0
    assert arrivals.wait_s("192.0.2.1") == 0 and len(arrivals._known) == 1


def test_the_pace_brings_frames_just_before_the_renderer_is_free() -> None:
    """A page that answers 12 ms after it was asked, a renderer that takes 40 ms a frame."""
    pace, free_ms, waits = Pace(), 0.0, []
    asked_ms = 0.0
    for _ in range(60):
        ready_ms = asked_ms + 12.0
        begun_ms = max(ready_ms, free_ms)
        pace.learn(*(round(1e6 * ms) for ms in (ready_ms, begun_ms, free_ms, 40.0)))
        waits.append(begun_ms - ready_ms)
        free_ms, asked_ms = begun_ms + 40.0, begun_ms + pace.delay_ms
    assert waits[1] > 20.0  # at first as early as can be
    assert waits[-1] == pytest.approx(EARLY_MS, abs=0.5)


@pytest.mark.parametrize(
    ("visitors", "render_ms", "camera_ms"), [(4, 40, 100), (4, 20, 0), (2, 30, 33)]
)
def test_every_visitor_gets_the_same_share_of_a_busy_renderer(
    visitors: int, render_ms: float, camera_ms: float
) -> None:
    """Pages whose cameras tick apart, renders that differ, one in twenty three times as long."""
    rng = np.random.default_rng(0)
    paces, shown = [Pace() for _ in range(visitors)], [0] * visitors
    tick_ms = rng.uniform(0, camera_ms, visitors)
    free_ms, waiting = 0.0, list[tuple[float, int]]()

    def ask(i: int, at_ms: float) -> None:
        tick_ms[i] = max(tick_ms[i] + camera_ms, at_ms + 6.0)  # the camera's next picture
        heapq.heappush(waiting, (tick_ms[i] + 6.0, i))

    for i in range(visitors):
        ask(i, 0.0)
    while True:
        ready_ms, i = heapq.heappop(waiting)
        begun_ms = max(ready_ms, free_ms)
        if begun_ms > 30_000.0:
            break
        took_ms = render_ms * rng.uniform(0.7, 1.3) * (3.0 if rng.random() < 0.05 else 1.0)
        times = (ready_ms, begun_ms, free_ms, visitors * took_ms)
        paces[i].learn(*(round(1e6 * ms) for ms in times))
        free_ms, shown[i] = begun_ms + took_ms, shown[i] + 1
        ask(i, begun_ms + paces[i].delay_ms)
    assert min(shown) > 0.8 * max(shown), shown
    assert sum(shown) > 0.75 * 30_000.0 / (1.1 * render_ms), "the renderer idles"


def test_landmarks_survive_the_wire() -> None:
    face = TRACK[40]
    assert face is not None
    packet = messages.read_packet(messages.landmarks_message(face, SIDE, 7, 123))
    assert (packet.frame, packet.captured_us, packet.seen) == (7, 123, True)
    assert len(packet.body) == 420
    back = messages.landmarks_of(packet)
    assert back is not None
    scale = SIDE / messages.REFERENCE_PX
    np.testing.assert_allclose(back.points * scale, face.points, atol=SIDE / messages.UNITS)
    np.testing.assert_allclose(back.gaze * scale, face.gaze, atol=SIDE / messages.UNITS)
