"""Where a live face is shown: a window, a virtual camera, a web page, a file; several at once.

`show` returns the moment at which the picture was handed over, which ends its latency. All are
used from one thread, which for a window must be the program's first: some systems ask for that.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from contextlib import ExitStack
from fractions import Fraction
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol

import cv2
import numpy as np

from diffusionact.errors import BackendMissing, DeviceError, SettingsError
from diffusionact.landmarks import Landmarks
from diffusionact.runtime.media import FRAME_NS, Image
from diffusionact.runtime.writer import VIDEO_SUFFIXES, VideoWriter

VIRTUAL_SIZE, VIRTUAL_FPS = (1280, 720), 30.0  # what programs for calls expect of a camera
DEFAULT_PORT = 8090
RECORD_TICK = Fraction(1, 90_000)
# Of x264, which shares the cores with the networks: a third of the work of the usual preset.
RECORD_OPTIONS = {"preset": "ultrafast", "tune": "zerolatency", "crf": "18", "threads": "1"}
KINDS = "window, virtual[:DEVICE], http[:[HOST:]PORT], or a video to write, such as out.mp4"


class Sink(Protocol):
    """Where pictures go. wants_overlay: whether the figures are drawn for it; keys: pressed since
    the last call, "quit" for a window that was closed."""

    @property
    def name(self) -> str: ...
    @property
    def wants_overlay(self) -> bool: ...
    def show(self, image_bgr: Image) -> int: ...
    def keys(self) -> Sequence[str]: ...
    def __enter__(self) -> Sink: ...
    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None: ...


def open_sink(spec: str, title: str = "diffusionact") -> Sink:
    """Return the sink of a word: see KINDS. It is opened by `with`.

    Raises: SettingsError for a word that means none; MediaError for a file that cannot be written;
    BackendMissing when a library is not installed.
    """
    kind, _, rest = spec.partition(":")
    if spec == "window":
        from diffusionact.runtime.window import WindowSink

        return WindowSink(title)
    if kind == "virtual":
        return VirtualSink(rest or None)
    if kind == "http":
        from diffusionact.runtime.mjpeg import HttpSink

        host, _, port = rest.rpartition(":")
        if not (port or str(DEFAULT_PORT)).isdecimal():
            raise SettingsError(f"--sink {spec}: wanted http, http:PORT or http:HOST:PORT")
        return HttpSink(host or "127.0.0.1", int(port or DEFAULT_PORT))
    if Path(spec).suffix.lower() in VIDEO_SUFFIXES:
        return FileSink(Path(spec))
    raise SettingsError(f"--sink {spec}: wanted {KINDS}")


class FileSink:
    """A video of what was shown, each picture from the moment it was shown to the next.

    begun_ns: the moment of the first, which is 0 in the file, on the monotonic clock.
    """

    wants_overlay = False

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._path = path
        self._size: tuple[int, int] | None = None
        self.begun_ns = 0

    def show(self, image_bgr: Image) -> int:
        now_ns = time.monotonic_ns()
        if self._size is None:
            self._size, self.begun_ns = (image_bgr.shape[1], image_bgr.shape[0]), now_ns
        picture = fitted(image_bgr, self._size)
        self._writer.write(picture, now_ns - self.begun_ns, FRAME_NS, _NOWHERE)
        return now_ns

    def keys(self) -> Sequence[str]:
        return ()

    def __enter__(self) -> FileSink:
        # Not before: who fails until then leaves no unfinished file behind.
        self._writer = VideoWriter(self._path, RECORD_TICK, None, RECORD_OPTIONS)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._writer.__exit__(kind, error, trace)


class VirtualSink:
    """A camera that other programs can choose, through pyvirtualcam."""

    wants_overlay = False

    def __init__(self, device: str | None = None, backend: str | None = None) -> None:
        """device: which of several, None the first free; backend: pyvirtualcam's name for it."""
        try:
            import pyvirtualcam
        except ImportError as error:
            raise BackendMissing(
                f"--sink virtual needs pyvirtualcam ({error}); run: "
                "pip install 'diffusionact[virtual]'"
            ) from error
        self.name = "virtual camera"
        self._library: Any = pyvirtualcam
        self._device, self._backend = device, backend
        self._camera: Any = None

    def show(self, image_bgr: Image) -> int:
        self._camera.send(fitted(image_bgr, VIRTUAL_SIZE))
        return time.monotonic_ns()

    def keys(self) -> Sequence[str]:
        return ()

    def __enter__(self) -> VirtualSink:
        """Raises: DeviceError where the system has no virtual camera."""
        try:
            self._camera = self._library.Camera(
                *VIRTUAL_SIZE, VIRTUAL_FPS, fmt=self._library.PixelFormat.BGR,
                device=self._device, backend=self._backend,
            )  # fmt: skip
        except (RuntimeError, ValueError) as error:
            raise DeviceError(
                f"no virtual camera: {error}. On Linux run `sudo modprobe v4l2loopback "
                "exclusive_caps=1`; on Windows and macOS install OBS and start its virtual camera "
                "once; docs/live.md has the steps"
            ) from error
        self.name = f"virtual camera {self._camera.device}"
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if self._camera is not None:
            self._camera.close()


class SeveralSinks:
    """One picture in several places. The first is the display: its moment and its keys count."""

    def __init__(self, sinks: Sequence[Sink]) -> None:
        self._sinks = tuple(sinks)
        self._open = ExitStack()

    @property
    def name(self) -> str:
        return ", ".join(sink.name for sink in self._sinks)

    def show(self, image_bgr: Image, overlaid: Image) -> int:
        """Return the moment of the first; overlaid: the picture for those that want figures."""
        moments = [sink.show(overlaid if sink.wants_overlay else image_bgr) for sink in self._sinks]
        return moments[0]

    def keys(self) -> list[str]:
        return [key for sink in self._sinks for key in sink.keys()]

    @property
    def wants_overlay(self) -> bool:
        return any(sink.wants_overlay for sink in self._sinks)

    def __enter__(self) -> SeveralSinks:
        with ExitStack() as opening:
            for sink in self._sinks:
                opening.enter_context(sink)
            self._open = opening.pop_all()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._open.__exit__(kind, error, trace)


def fitted(image_bgr: Image, size: tuple[int, int]) -> Image:
    """Return the picture in the middle of one of this width and height, as large as fits."""
    width, height = size
    rows, columns = image_bgr.shape[:2]
    if (columns, rows) == size:
        return image_bgr
    zoom = min(width / columns, height / rows)
    inner = max(round(columns * zoom), 1), max(round(rows * zoom), 1)
    how = cv2.INTER_AREA if zoom < 1.0 else cv2.INTER_LINEAR
    scaled = cv2.resize(image_bgr, inner, interpolation=how)
    picture = np.zeros((height, width, 3), np.uint8)
    left, top = (width - inner[0]) // 2, (height - inner[1]) // 2
    picture[top : top + inner[1], left : left + inner[0]] = scaled
    return picture


_NOWHERE = Landmarks(np.zeros((68, 3), np.float32), np.zeros((2, 2), np.float32))
