"""Landmark tracks that lie beside a picture or video and take the tracker's place."""

from __future__ import annotations

import logging
import os
from dataclasses import dataclass
from pathlib import Path

from diffusionact.errors import MediaError, NoFace
from diffusionact.landmarks import Landmarks, Track, sidecar_path

log = logging.getLogger(__name__)


@dataclass(frozen=True)
class Sidecar:
    """media: the picture or video; path: its track, NAME.landmarks.npz beside it."""

    media: Path
    path: Path
    track: Track

    @classmethod
    def beside(cls, media: str | os.PathLike[str]) -> Sidecar | None:
        """Return the track beside a file, or None where there is none. Raises: MediaError."""
        path = sidecar_path(media)
        if not path.is_file():
            return None
        log.info("%s: landmarks from %s", media, path)
        return cls(Path(media), path, Track.load(path))

    def faces(self, frames: int, size: tuple[int, int]) -> list[Landmarks | None]:
        """Return the face of every frame of the media; size: its width and height, px.

        Raises: MediaError when the track is of something else, NoFace when it has no face at all.
        """
        seen = len(self.track), self.track.size
        if seen != (frames, size):
            raise MediaError(
                f"{self.path}: holds {_extent(*seen)}, but {self.media} is {_extent(frames, size)};"
                " remove or rename the .npz to have the faces tracked, or make it anew"
            )
        made = [self.track[i] for i in range(frames)]
        if not any(made):
            raise NoFace(
                f"{self.path}: no face in any of its frames; wanted 68 points and both irises. "
                "Remove or rename it to have the faces tracked"
            )
        return made


def _extent(frames: int, size: tuple[int, int]) -> str:
    return f"{frames} frame{'s' if frames > 1 else ''} of {size[0]}x{size[1]} px"
