"""Pictures appended one by one to a file that may be cut off at any byte, without loss."""

from __future__ import annotations

import struct
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import cv2
import numpy as np

from diffusionact.errors import MediaError
from diffusionact.runtime.media import Image

HEAD = struct.Struct("<II")  # bytes of the picture that follows, and their CRC-32
PNG = (cv2.IMWRITE_PNG_COMPRESSION, 1)  # half the bytes of the pixels, in milliseconds


class Journal:
    """A file of pictures as PNG, each behind its length and check sum.

    count: of pictures. Opening it counts those that are whole and cuts off what follows them: half
    a picture after a kill, zeros after a power cut.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        # Unbuffered: what `append` was given survives the process.
        self._file: BinaryIO = path.open("a+b", buffering=0)
        self.count = self._found = sum(1 for _ in self._records())
        self._file.truncate(self._end)

    def pictures(self) -> Iterator[Image]:
        """Yield the pictures that the file held when it was opened, uint8 [H,W,3] or [H,W]."""
        with self.path.open("rb") as file:
            for _ in range(self._found):
                length, _ = HEAD.unpack(file.read(HEAD.size))
                image = cv2.imdecode(np.frombuffer(file.read(length), np.uint8), -1)
                if image is None:
                    raise MediaError(f"{self.path}: a picture cannot be decoded; delete the file")
                yield np.asarray(image, np.uint8)

    def append(self, image: Image) -> None:
        """Return nothing; the picture is in the file. Raises: OSError."""
        _, data = cv2.imencode(".png", image, PNG)
        content = data.tobytes()
        record = HEAD.pack(len(content), zlib.crc32(content)) + content
        if self._file.write(record) != len(record):  # the next write would say why
            raise OSError(f"{self.path}: only a part could be written")
        self.count += 1

    def close(self) -> None:
        """Return nothing; the file is closed."""
        self._file.close()

    def __enter__(self) -> Journal:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def _records(self) -> Iterator[int]:
        """Yield the length of each whole record; `_end` is where the last one ends."""
        self._end = 0
        with self.path.open("rb") as file:
            while len(head := file.read(HEAD.size)) == HEAD.size:
                length, checksum = HEAD.unpack(head)
                content = file.read(length)
                if not length or len(content) < length or zlib.crc32(content) != checksum:
                    return
                self._end += HEAD.size + length
                yield length
