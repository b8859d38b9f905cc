"""A window, through SDL by way of pygame-ce; the only importer of pygame.

SDL and not OpenCV's windows, because those need another build of OpenCV than the one without
windows that this package asks for, and two builds of it overwrite each other; and not Tk, which
Pythons of Linux and macOS often lack.
"""

from __future__ import annotations

import os
import time
from collections.abc import Sequence
from types import TracebackType
from typing import Any

import cv2

from diffusionact.errors import BackendMissing, DeviceError
from diffusionact.runtime.media import Image
from diffusionact.runtime.sinks import fitted

DRIVER_VARIABLE, BLIND = "SDL_VIDEODRIVER", ("dummy", "offscreen", "evdev")
FIRST_SIDE_PX = 640  # of a window's longer side, at least: portraits are often smaller


class WindowSink:
    """A window of the size of the first picture that can be resized. To be used by one thread."""

    wants_overlay = True

    def __init__(self, title: str) -> None:
        os.environ.setdefault("PYGAME_HIDE_SUPPORT_PROMPT", "1")  # stdout is ours
        try:
            import pygame
        except ImportError as error:
            raise BackendMissing(
                f"--sink window needs pygame-ce ({error}); run: pip install 'diffusionact[live]', "
                "or show the face elsewhere: --sink http"
            ) from error
        self.name = "window"
        self._pygame: Any = pygame
        self._title = title
        self._surface: Any = None

    def show(self, image_bgr: Image) -> int:
        pygame = self._pygame
        if self._surface is None:
            height, width = image_bgr.shape[:2]
            zoom = max(FIRST_SIDE_PX / max(width, height), 1.0)
            size = round(width * zoom), round(height * zoom)
            self._surface = pygame.display.set_mode(size, pygame.RESIZABLE)
        else:
            self._surface = pygame.display.get_surface()  # another one after a change of size
        size = self._surface.get_size()
        picture = cv2.cvtColor(fitted(image_bgr, size), cv2.COLOR_BGR2RGB)
        self._surface.blit(pygame.image.frombuffer(picture, size, "RGB"), (0, 0))
        pygame.display.flip()
        return time.monotonic_ns()

    def keys(self) -> Sequence[str]:
        pygame, pressed = self._pygame, []
        for event in pygame.event.get():
            if event.type == pygame.QUIT:
                pressed.append("quit")
            elif event.type == pygame.KEYDOWN:
                pressed.append("quit" if event.key == pygame.K_ESCAPE else event.unicode.lower())
        return [key for key in pressed if key]

    def __enter__(self) -> WindowSink:
        """Raises: DeviceError where there is no display."""
        display = self._pygame.display
        try:
            display.init()
            driver = display.get_driver()
        except self._pygame.error as error:
            driver = f"no driver: {error}"
        # Without a display SDL draws where nobody sees it, unless it was told to.
        if display.get_init() and (driver not in BLIND or DRIVER_VARIABLE in os.environ):
            display.set_caption(self._title)
            return self
        display.quit()
        raise DeviceError(
            f"no window can be opened ({driver}): there is no display here. Show the face on a "
            "page, --sink http, or write it to a file, --sink out.mp4"
        )

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._surface = None
        self._pygame.display.quit()
