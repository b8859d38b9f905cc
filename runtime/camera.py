"""Cameras: by number, device path or address, and a clip in a camera's place.

Each yields the newest picture with the time of its capture on the monotonic clock. One that stops
sending is opened again until it is back; meanwhile nothing is yielded.
"""

from __future__ import annotations

import logging
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any, Protocol

import cv2
import numpy as np

from diffusionact.errors import MediaError, SettingsError
from diffusionact.runtime.media import FRAME_NS, NS, Frame, Image, Reader, open_reader

log = logging.getLogger(__name__)

URL_SCHEMES = ("http://", "https://", "rtsp://", "rtmp://", "udp://", "tcp://", "srt://")
FIRST_WAIT_S, LONGEST_WAIT_S = 0.5, 5.0  # between tries to open a camera again
BELIEVED_NS = NS  # a driver's time of capture is taken when it lies this far back at most
MOST_LATE_NS = NS // 5  # that a clip's frame comes after it is due
MOST_HELD = 10_000  # times that are remembered
OPENCV_SILENT = 0
NETWORK_TIMEOUT_S = 5.0
# What FFmpeg would gather before the first picture is only delay.
NETWORK_OPTIONS = {"fflags": "nobuffer", "flags": "low_delay", "rtsp_transport": "tcp"}


class CameraError(MediaError):
    """A camera that cannot be opened now, or that stopped sending."""


class Camera(Reader, Protocol):
    """A reader that may wait for its camera; `close` ends the wait, from any thread."""

    def close(self) -> None: ...


def open_camera(spec: str | int, *, realtime: bool = False, loop: bool = False) -> Camera:
    """Return the reader of a camera: a number, a device path, an address, or a clip.

    realtime: a clip's frames come by the clock, as from a camera; loop: and begin again.

    Raises: MediaError for a clip that cannot be read, SettingsError for a loop without end that
    is not by the clock. A camera is first opened when frames are asked for.
    """
    text = str(spec)
    device = text.isdecimal() or text.startswith("/dev/")
    if device or text.lower().startswith(URL_SCHEMES):
        if realtime or loop:
            raise SettingsError(f"{text}: --realtime and --loop are for clips; leave them out")
        opener = _open_device if device else _open_stream
        return LiveCamera(f"camera {text}", lambda: opener(text))
    if loop and not realtime:
        raise SettingsError("--loop never ends: add --realtime, or use `diffusionact run`")
    return ClipCamera(open_reader(text), realtime, loop)


class Pictures(Protocol):
    """An open camera. read: the next picture and when it was taken, ns of the monotonic clock.

    Raises: CameraError when no more come.
    """

    def read(self) -> Frame: ...
    def close(self) -> None: ...


@dataclass(frozen=True)
class LiveCamera:
    """A camera that is opened again when it stops sending."""

    name: str
    opener: Callable[[], Pictures]
    live: bool = True
    length: int | None = None
    time_base: Fraction | None = None
    _closed: threading.Event = field(default_factory=threading.Event)

    def close(self) -> None:
        """Return nothing; reading ends at the next picture, and at once where it waits."""
        self._closed.set()

    def __iter__(self) -> Iterator[Frame]:
        """Yield frames. Raises: CameraError when it cannot be opened the first time."""
        pictures = self.opener()
        while True:
            try:
                while not self._closed.is_set():
                    yield pictures.read()
                return
            except CameraError as error:
                log.warning("%s; waiting for it to come back", error)
            finally:
                pictures.close()
            again = self._reopened()
            if again is None:
                return
            pictures = again

    def _reopened(self) -> Pictures | None:
        """The camera when it is back; None when reading was ended meanwhile."""
        wait_s, begun_s = FIRST_WAIT_S, time.monotonic()
        while not self._closed.wait(wait_s):
            try:
                pictures = self.opener()
            except CameraError as error:
                wait_s = min(2.0 * wait_s, LONGEST_WAIT_S)
                log.info("%s; next try in %.1f s", error, wait_s)
                continue
            log.warning("%s is back after %.1f s", self.name, time.monotonic() - begun_s)
            return pictures
        return None


class DeviceCamera:
    """A webcam through OpenCV."""

    def __init__(self, name: str, capture: Any) -> None:
        """capture: an open cv2.VideoCapture."""
        self._name, self._capture = name, capture

    def read(self) -> Frame:
        good, image = self._capture.read()
        if not good:
            raise CameraError(f"camera {self._name} stopped sending; plug it in again")
        return Frame(_in_colour(image), self._capture_ns(time.monotonic_ns()))

    def close(self) -> None:
        self._capture.release()

    def _capture_ns(self, now_ns: int) -> int:
        """When the picture was taken: by Video4Linux, whose clock is ours; else now."""
        stamp_ns = round(float(self._capture.get(cv2.CAP_PROP_POS_MSEC)) * 1e6)
        return stamp_ns if 0 <= now_ns - stamp_ns < BELIEVED_NS else now_ns


def _in_colour(image: Any) -> Image:
    """A camera's picture as uint8 [H,W,3] BGR; infrared ones send grey."""
    if image.ndim == 2 or image.shape[2] == 1:
        image = cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)
    return np.asarray(image, np.uint8)


def _open_device(spec: str) -> Pictures:
    level = cv2.utils.logging.setLogLevel(OPENCV_SILENT)  # its own words would only precede ours
    try:
        capture = cv2.VideoCapture(int(spec) if spec.isdecimal() else spec)
    finally:
        cv2.utils.logging.setLogLevel(level)
    if not capture.isOpened():
        capture.release()
        raise CameraError(
            f"camera {spec} cannot be opened: none there, in use by another program, or not "
            "permitted. On Linux `ls /dev/video*` lists them, on macOS and Windows the privacy "
            "settings say who may use them; docs/live.md has the steps. Name another with --camera"
        )
    capture.set(cv2.CAP_PROP_BUFFERSIZE, 1)  # old frames in a queue are only delay
    return DeviceCamera(spec, capture)


class StreamCamera:
    """A camera of the network; its clock is not ours, so a picture is taken when it arrives."""

    def __init__(self, address: str) -> None:
        import av

        self._address = address
        try:
            self._container = av.open(
                address, options=dict(NETWORK_OPTIONS), timeout=NETWORK_TIMEOUT_S
            )
            self._frames = self._container.decode(video=0)
        except (av.FFmpegError, OSError, IndexError) as error:
            raise CameraError(
                f"camera {address} cannot be opened ({error}); check the address with "
                f"`ffplay {address}`"
            ) from error

    def read(self) -> Frame:
        import av

        try:
            picture = next(self._frames)
        except (av.FFmpegError, OSError, StopIteration) as error:
            raise CameraError(f"camera {self._address} stopped sending ({error})") from error
        image = picture.to_ndarray(format="bgr24")
        return Frame(np.asarray(image, np.uint8), time.monotonic_ns())

    def close(self) -> None:
        self._container.close()


def _open_stream(spec: str) -> Pictures:
    return StreamCamera(spec)


@dataclass(frozen=True)
class ClipCamera:
    """A clip in a camera's place. realtime: its frames come when they are due, their time is that
    moment, and what is not taken is lost; otherwise each waits to be taken. Where a clip is read
    more slowly than it plays, it plays as slowly: a camera's pictures do not grow old in it; `held`
    keeps by how much its clock was put back each time, ns."""

    clip: Reader
    realtime: bool = True
    loop: bool = False
    held: deque[int] = field(default_factory=lambda: deque(maxlen=MOST_HELD))
    _closed: threading.Event = field(default_factory=threading.Event)

    @property
    def name(self) -> str:
        return self.clip.name

    @property
    def live(self) -> bool:
        return self.realtime

    @property
    def length(self) -> int | None:
        return None if self.loop else self.clip.length

    @property
    def time_base(self) -> Fraction | None:
        return None if self.realtime else self.clip.time_base

    def close(self) -> None:
        """Return nothing; reading ends at once."""
        self._closed.set()

    def __iter__(self) -> Iterator[Frame]:
        """Yield frames; the clip's clock starts when the first is asked for."""
        if not self.realtime:
            for frame in self.clip:
                if self._closed.is_set():
                    return
                yield frame
            return
        begun_ns = 0
        while True:
            end_ns = begun_ns
            for frame in self.clip:
                if begun_ns == 0:  # decoding the first picture takes longer than the others
                    begun_ns = time.monotonic_ns() - frame.pts_ns
                due_ns = begun_ns + frame.pts_ns
                if self._closed.wait(max(due_ns - time.monotonic_ns(), 0) / NS):
                    return
                late_ns = time.monotonic_ns() - due_ns
                if late_ns > MOST_LATE_NS:  # it cannot be read so fast: its clock waits for it
                    begun_ns, due_ns = begun_ns + late_ns, due_ns + late_ns
                    self.held.append(late_ns)
                yield replace(frame, pts_ns=due_ns)
                end_ns = due_ns + (frame.duration_ns or FRAME_NS)
            if not self.loop or end_ns == begun_ns:  # a clip without a frame would loop in no time
                return
            begun_ns = end_ns
