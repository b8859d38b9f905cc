"""Sinks: what arrives is what was shown, on time, and nobody who watches slows the loop."""

from __future__ import annotations

import contextlib
import http.client
import os
import socket
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from diffusionact.errors import DeviceError, MediaError, SettingsError
from diffusionact.runtime import mjpeg
from diffusionact.runtime.camera import open_camera
from diffusionact.runtime.media import open_reader
from diffusionact.runtime.mjpeg import HttpSink
from diffusionact.runtime.overlay import labelled, overlaid
from diffusionact.runtime.sinks import (
    VIRTUAL_SIZE,
    FileSink,
    SeveralSinks,
    VirtualSink,
    fitted,
    open_sink,
)

pygame = pytest.importorskip("pygame", reason="the window needs pygame-ce")
pyvirtualcam = pytest.importorskip("pyvirtualcam", reason="the virtual camera's library")

UInt8Array = npt.NDArray[np.uint8]
JPEG_TOLERANCE = 4  # of a flat colour at the quality we send, grey levels
VIDEO_TOLERANCE = 6
WAIT_S = 10.0


def flat(level: int, height: int = 96, width: int = 64) -> UInt8Array:
    return np.full((height, width, 3), level, np.uint8)


# The file.


def test_a_file_keeps_what_was_shown_and_when(tmp_path: Path) -> None:
    path, pauses_s, moments = tmp_path / "out.mp4", (0.03, 0.11, 0.05, 0.2), []
    with FileSink(path) as sink:
        for i, pause_s in enumerate(pauses_s):
            moments.append(sink.show(flat(60 * i)))
            time.sleep(pause_s)
    frames = list(open_reader(path))
    times = [frame.pts_ns for frame in frames]
    wanted = [moment - moments[0] for moment in moments]
    np.testing.assert_allclose(times, wanted, atol=1e9 / 90_000)  # its clock's tick
    for i, frame in enumerate(frames):
        assert frame.image_bgr is not None
        assert abs(int(frame.image_bgr.mean()) - 60 * i) <= VIDEO_TOLERANCE


def test_a_file_takes_portraits_of_other_sizes(tmp_path: Path) -> None:
    with FileSink(tmp_path / "out.mp4") as sink:
        for image in (flat(200), flat(200, 40, 120), flat(200, 300, 20)):
            sink.show(image)
    shapes = [
        f.image_bgr.shape for f in open_reader(tmp_path / "out.mp4") if f.image_bgr is not None
    ]
    assert shapes == [(96, 64, 3)] * 3


def test_a_session_that_fails_leaves_no_file(tmp_path: Path) -> None:
    with pytest.raises(MediaError, match="gone"), FileSink(tmp_path / "out.mp4") as sink:
        sink.show(flat(9))
        raise MediaError("gone")
    assert list(tmp_path.iterdir()) == []


# The window, on SDL's dummy screen.


@pytest.fixture
def headless(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "dummy")


def seen_in_window() -> UInt8Array:
    rgb = pygame.surfarray.array3d(pygame.display.get_surface()).swapaxes(0, 1)
    return np.ascontiguousarray(rgb[..., ::-1])


def test_a_window_shows_the_picture_in_its_colours(headless: None) -> None:
    image = flat(0)
    image[:48] = (250, 20, 60)
    with open_sink("window") as sink:
        assert sink.wants_overlay
        sink.show(image)
        seen = seen_in_window()
        assert seen.shape[0] == 640  # a small portrait is shown larger
        assert seen[10, 10].tolist() == [250, 20, 60] and seen[-10, 10].tolist() == [0, 0, 0]


def test_a_window_tells_keys_and_its_closing(headless: None) -> None:
    with open_sink("window") as sink:
        sink.show(flat(9))
        sink.keys()
        for key, text in ((pygame.K_r, "R"), (pygame.K_2, "2"), (pygame.K_ESCAPE, "\x1b")):
            pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=key, unicode=text))
        pygame.event.post(pygame.event.Event(pygame.KEYDOWN, key=pygame.K_LSHIFT, unicode=""))
        pygame.event.post(pygame.event.Event(pygame.QUIT))
        assert sink.keys() == ["r", "2", "quit", "quit"]


def test_a_window_without_a_display_says_what_else_there_is(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "no-such-driver")
    with pytest.raises(DeviceError, match="--sink http"), open_sink("window"):
        pass


# The virtual camera, on a device of ours.


class Device:
    """A backend of pyvirtualcam that keeps what it is sent."""

    sent: list[UInt8Array] = []
    closed = 0

    def __init__(self, **how: Any) -> None:
        self.how = how

    def close(self) -> None:
        Device.closed += 1

    def device(self) -> str:
        return "test device"

    def native_fourcc(self) -> None:
        return None

    def send(self, frame: UInt8Array) -> None:
        Device.sent.append(frame.copy())


@pytest.fixture
def device() -> Iterator[type[Device]]:
    pyvirtualcam.register_backend("test", Device)
    Device.sent, Device.closed = [], 0
    yield Device
    del pyvirtualcam.camera.BACKENDS["test"]


def test_a_virtual_camera_gets_whole_pictures_of_its_size(device: type[Device]) -> None:
    with VirtualSink(backend="test") as sink:
        assert sink.name == "virtual camera test device" and not sink.wants_overlay
        for level in (50, 150):
            sink.show(flat(level))
    assert device.closed == 1
    assert [frame.size for frame in device.sent] == [3 * VIRTUAL_SIZE[0] * VIRTUAL_SIZE[1]] * 2
    picture = device.sent[1].reshape(VIRTUAL_SIZE[1], VIRTUAL_SIZE[0], 3)
    assert picture[360, 640].tolist() == [150] * 3  # the portrait upright in the middle
    assert picture[360, 10].tolist() == [0] * 3


def test_a_system_without_a_virtual_camera_is_told_how_to_get_one() -> None:
    with pytest.raises(DeviceError, match="docs/live.md"), VirtualSink("no such device"):
        pass


# The page.


@pytest.fixture
def server() -> Iterator[HttpSink]:
    before = threading.active_count()
    with HttpSink(port=0) as sink:
        yield sink
    assert threading.active_count() == before


def connected(sink: HttpSink, path: str, host: str | None = None) -> http.client.HTTPResponse:
    port = int(sink.name.rstrip("/").rpartition(":")[2])
    connection = http.client.HTTPConnection("127.0.0.1", port, timeout=WAIT_S)
    connection.request("GET", path, headers={} if host is None else {"Host": host})
    return connection.getresponse()


def test_a_page_a_picture_and_what_is_not_there(server: HttpSink) -> None:
    page = connected(server, "/")
    assert page.status == 200 and b'src="stream.mjpg"' in page.read()
    server.show(flat(77))
    picture = connected(server, "/picture.jpg")
    image = cv2.imdecode(np.frombuffer(picture.read(), np.uint8), cv2.IMREAD_COLOR)
    assert image is not None and np.abs(image.astype(int) - 77).max() <= JPEG_TOLERANCE
    assert connected(server, "/../secret").status == 404


def test_only_this_machine_by_its_own_name(server: HttpSink) -> None:
    assert connected(server, "/", host="evil.example:8090").status == 403
    for name in ("localhost", "127.0.0.1:8090", "[::1]:8090"):
        assert connected(server, "/", host=name).status == 200


def test_the_stream_is_a_camera_and_the_newest_picture_wins(server: HttpSink) -> None:
    """Our own reader of network cameras on our own stream: both ends hold to the format."""
    stop = threading.Event()

    def show() -> None:
        level = 0
        while not stop.wait(0.02):
            level = (level + 10) % 250
            server.show(flat(level))

    shower = threading.Thread(target=show)
    shower.start()
    try:
        camera = open_camera(server.name + "stream.mjpg")
        levels = []
        for frame in camera:
            assert frame.image_bgr is not None
            levels.append(int(frame.image_bgr.mean()))
            if len(levels) == 12:
                camera.close()
    finally:
        stop.set()
        shower.join(WAIT_S)
    steps = np.diff(levels) % 250
    assert len(levels) == 12 and (steps >= 6).all()  # in order, none twice


def test_a_client_that_stalls_slows_nobody(server: HttpSink) -> None:
    noise = np.random.default_rng(0).integers(0, 256, (720, 1280, 3), dtype=np.uint8)
    port = int(server.name.rstrip("/").rpartition(":")[2])
    with socket.create_connection(("127.0.0.1", port)) as stalled:
        stalled.sendall(b"GET /stream.mjpg HTTP/1.0\r\nHost: localhost\r\n\r\n")
        reading = connected(server, "/stream.mjpg")
        got = 0
        spent_s = []
        for _ in range(20):
            begun_s = time.monotonic()
            server.show(noise)
            spent_s.append(time.monotonic() - begun_s)
            got += len(reading.read(100_000))
        # A client that holds a picture up would do it until it is let go, 5 s.
        assert np.median(spent_s) < 0.05 and max(spent_s) < 2.0 and got == 2_000_000


def test_too_many_clients_are_told(server: HttpSink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mjpeg, "MAX_CLIENTS", 1)
    server.show(flat(1))
    first = connected(server, "/stream.mjpg")
    assert first.status == 200
    assert connected(server, "/").status == 503


def test_silent_connections_are_bounded(server: HttpSink, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(mjpeg, "MAX_CONNECTIONS", 2)
    port = int(server.name.rstrip("/").rpartition(":")[2])
    before = threading.active_count()
    with contextlib.ExitStack() as held:
        for _ in range(2):
            held.enter_context(socket.create_connection(("127.0.0.1", port)))
        until_s = time.monotonic() + WAIT_S
        while threading.active_count() < before + 2 and time.monotonic() < until_s:
            time.sleep(0.01)
        time.sleep(0.05)
        third = held.enter_context(socket.create_connection(("127.0.0.1", port), WAIT_S))
        assert third.recv(1) == b""  # closed, without a thread
        assert threading.active_count() <= before + 2


def test_a_port_in_use_is_named(server: HttpSink) -> None:
    port = server.name.rstrip("/").rpartition(":")[2]
    with pytest.raises(DeviceError, match=port), open_sink(f"http:{port}"):
        pass


# All of them.


@pytest.mark.parametrize("word", ["", "windows", "out.gif", "http:x", "picture.png"])
def test_a_word_that_means_no_sink_names_those_that_do(word: str) -> None:
    with pytest.raises(SettingsError, match="wanted"):
        open_sink(word)


def test_several_sinks_show_the_same_and_figures_where_wanted(
    headless: None, tmp_path: Path
) -> None:
    with SeveralSinks([open_sink("window"), open_sink(str(tmp_path / "out.mp4"))]) as sinks:
        assert sinks.wants_overlay
        sinks.show(flat(40), flat(200))
        assert seen_in_window()[5, 330].tolist() == [200] * 3
    (frame,) = open_reader(tmp_path / "out.mp4")
    assert frame.image_bgr is not None
    assert abs(int(frame.image_bgr.mean()) - 40) <= VIDEO_TOLERANCE


def test_when_one_of_several_cannot_open_the_others_are_closed(
    device: type[Device], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SDL_VIDEODRIVER", "no-such-driver")
    with (
        pytest.raises(DeviceError),
        SeveralSinks([VirtualSink(backend="test"), open_sink("window")]),
    ):
        pass
    assert device.closed == 1


@pytest.mark.parametrize(("rows", "columns"), [(10, 400), (400, 10), (96, 64), (1, 1)])
def test_fitted_keeps_the_form_and_the_size(rows: int, columns: int) -> None:
    picture = fitted(flat(255, rows, columns), (320, 180))
    assert picture.shape == (180, 320, 3)
    lit = np.argwhere(picture[..., 0] > 128)
    high, wide = np.ptp(lit, axis=0) + 1
    assert wide == 320 or high == 180
    assert abs(wide / high - columns / rows) <= 0.1 * columns / rows + 1.0


@pytest.mark.parametrize("side", [96, 128, 384, 1080])
def test_the_label_is_small_and_stands_out(side: int) -> None:
    for level in (0, 128, 255):
        before = flat(level, side, side)
        after = labelled(before.copy())
        changed = np.argwhere((after != before).any(axis=2))
        assert len(changed)
        top, left = changed.min(axis=0)
        assert top > 0.8 * side and left > (0.0 if side < 200 else 0.55) * side
        assert np.ptp(after[top:, left:].astype(int)) > 100  # letters against their ground


def test_figures_leave_the_picture_itself_alone() -> None:
    image = flat(128, 256, 256)
    picture = overlaid(image, ["24 fps  81 ms", "no face in the picture"])
    assert (image == 128).all() and (picture != 128).any()
    assert (picture[100:] == 128).all()


def test_no_environment_is_needed_but_sdl_is_quiet(headless: None) -> None:
    with open_sink("window"):
        assert os.environ["PYGAME_HIDE_SUPPORT_PROMPT"] == "1"
