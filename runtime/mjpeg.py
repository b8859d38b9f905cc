"""A live face as a web page and an MJPEG stream, for OBS and browsers; standard library only.

Each client gets the newest picture when it is ready for one: a slow client misses pictures, a
stalled one is let go, and neither is felt by whoever calls `show`.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any

import cv2

from diffusionact.errors import DeviceError
from diffusionact.runtime.media import Image

log = logging.getLogger(__name__)

JPEG_QUALITY = 90
MAX_CLIENTS, MAX_CONNECTIONS = 8, 32  # that watch; that are open, before they say what they want
STALLED_S = 5.0  # for which nothing can be sent to a client
BOUNDARY = "picture"
LOCAL = ("127.0.0.1", "localhost", "::1")
PAGE = b"""<!doctype html><html lang="en"><meta charset="utf-8"><title>diffusionact live</title>
<style>html,body{margin:0;height:100%;background:#000}
img{width:100%;height:100%;object-fit:contain}</style>
<img src="stream.mjpg" alt="The portrait, moving live"></html>
"""


class _Newest:
    """The newest picture, encoded once, by the first client that asks for it."""

    def __init__(self) -> None:
        self._changed = threading.Condition()
        self._encoding = threading.Lock()
        self._image: Image | None = None
        self._number = 0
        self._jpeg: tuple[int, bytes] = (0, b"")
        self.closed = False

    def put(self, image: Image) -> None:
        with self._changed:
            self._image, self._number = image, self._number + 1
            self._changed.notify_all()

    def close(self) -> None:
        with self._changed:
            self.closed = True
            self._changed.notify_all()

    def after(self, number: int) -> tuple[int, bytes] | None:
        """Return the newest picture and its number, when it is another; None at the end."""
        with self._changed:
            self._changed.wait_for(lambda: self.closed or self._number > number)
            if self.closed or self._image is None:
                return None
            image, seen = self._image, self._number
        with self._encoding:
            if self._jpeg[0] < seen:
                quality = [cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY]
                self._jpeg = seen, cv2.imencode(".jpg", image, quality)[1].tobytes()
            return self._jpeg


class HttpSink:
    """The page at `/`, the stream at `/stream.mjpg`, one picture at `/picture.jpg`."""

    wants_overlay = False

    def __init__(self, host: str = "127.0.0.1", port: int = 8090) -> None:
        self._host, self._port = host, port
        self._newest = _Newest()
        self._server: _Server | None = None
        self._thread: threading.Thread | None = None

    @property
    def name(self) -> str:
        """Return the address of the page."""
        port = self._port if self._server is None else self._server.server_address[1]
        return f"http://{self._host}:{port}/"

    def show(self, image_bgr: Image) -> int:
        self._newest.put(image_bgr)
        return time.monotonic_ns()

    def keys(self) -> Sequence[str]:
        return ()

    def __enter__(self) -> HttpSink:
        """Raises: DeviceError when the port is taken."""
        try:
            self._server = _Server((self._host, self._port), self._newest, self._host in LOCAL)
        except (OSError, OverflowError) as error:
            raise DeviceError(
                f"{self.name} cannot be served ({error}); name another port: --sink http:8091"
            ) from error
        if self._host not in LOCAL:
            log.warning("%s: everyone who reaches this machine can watch", self.name)
        self._thread = threading.Thread(target=self._server.serve_forever, args=(0.1,), daemon=True)
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._newest.close()
        if self._server is not None and self._thread is not None:
            self._server.shutdown()
            self._server.hang_up()
            self._server.server_close()  # waits for the clients' threads
            self._thread.join()


class _Server(ThreadingHTTPServer):
    daemon_threads = False  # so that server_close waits for them
    allow_reuse_address = True

    def __init__(self, address: tuple[str, int], newest: _Newest, local: bool) -> None:
        self.newest, self.local = newest, local
        self.clients: set[socket.socket] = set()
        self.lock = threading.Lock()
        super().__init__(address, _Client)

    def hang_up(self) -> None:
        """End all connections: a thread that sends to a stalled client wakes up."""
        with self.lock:
            for client in self.clients:
                try:
                    client.shutdown(socket.SHUT_RDWR)
                except OSError:
                    pass  # gone already

    def verify_request(self, request: Any, client_address: Any) -> bool:
        """Whether there is a thread left for another connection, be it to say that there is none
        for another watcher."""
        with self.lock:
            return len(self.clients) < MAX_CONNECTIONS

    def handle_error(self, request: Any, client_address: Any) -> None:
        log.debug("client %s is gone", client_address, exc_info=True)


class _Client(BaseHTTPRequestHandler):
    server: _Server
    timeout = STALLED_S

    def setup(self) -> None:
        super().setup()
        with self.server.lock:
            self.server.clients.add(self.request)

    def finish(self) -> None:
        with self.server.lock:
            self.server.clients.discard(self.request)
        super().finish()

    def do_GET(self) -> None:
        path = self.path.partition("?")[0]
        if self.server.local and self._asked_host() not in LOCAL:
            self.send_error(403, "this page is for this machine")  # another name leads here
        elif len(self.server.clients) > MAX_CLIENTS:
            self.send_error(503, f"{MAX_CLIENTS} clients are watching already")
        elif path == "/":
            self._send("text/html; charset=utf-8", PAGE)
        elif path == "/picture.jpg" and (picture := self.server.newest.after(0)) is not None:
            self._send("image/jpeg", picture[1])
        elif path == "/stream.mjpg":
            self._stream()
        else:
            self.send_error(404)

    def log_message(self, format: str, *args: Any) -> None:
        log.debug(format, *args)

    def _asked_host(self) -> str:
        host = self.headers.get("Host", "")
        return host.rpartition(":")[0].strip("[]") if ":" in host.rpartition("]")[2] else host

    def _send(self, kind: str, content: bytes) -> None:
        self.send_response(200)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(content)))
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        self.wfile.write(content)

    def _stream(self) -> None:
        self.send_response(200)
        self.send_header("Content-Type", f"multipart/x-mixed-replace; boundary={BOUNDARY}")
        self.send_header("Cache-Control", "no-store")
        self.end_headers()
        number = 0
        while (picture := self.server.newest.after(number)) is not None:
            number, jpeg = picture
            head = (
                f"--{BOUNDARY}\r\nContent-Type: image/jpeg\r\nContent-Length: {len(jpeg)}\r\n\r\n"
            )
            self.wfile.write(head.encode() + jpeg + b"\r\n")
