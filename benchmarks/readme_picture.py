"""The README's moving picture, from the demo's video.

`python -m benchmarks.readme_picture out/demo.mp4 docs/demo.webp`
"""

from __future__ import annotations

import argparse
import os
from pathlib import Path

import av
from PIL import Image

WIDTH_PX, QUALITY = 720, 70


def frames(video: Path) -> tuple[list[Image.Image], float]:
    """The video's frames at the README's width, and milliseconds a frame."""
    with av.open(str(video)) as container:
        stream = container.streams.video[0]
        ms = 1000 / float(stream.average_rate or 25)
        pictures = [frame.to_image() for frame in container.decode(stream)]
    height = round(pictures[0].height * WIDTH_PX / pictures[0].width)
    size = (WIDTH_PX, height)
    return [p.resize(size, Image.Resampling.LANCZOS) for p in pictures], ms


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("video", type=Path)
    parser.add_argument("picture", type=Path)
    arguments = parser.parse_args()
    (first, *rest), ms = frames(arguments.video)
    arguments.picture.parent.mkdir(parents=True, exist_ok=True)
    part = arguments.picture.with_name(f".part-{arguments.picture.name}")
    first.save(
        part, "WEBP", save_all=True, append_images=rest, duration=round(ms), loop=0,
        quality=QUALITY, method=6,
    )  # fmt: skip
    os.replace(part, arguments.picture)


if __name__ == "__main__":
    main()
