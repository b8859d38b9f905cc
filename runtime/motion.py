"""The first pass over a clip: the driver's landmarks, frame by frame, and nothing else of it."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt

from diffusionact.errors import MediaError, NoFace
from diffusionact.landmarks import Landmarks, Track, load_npz, save_npz
from diffusionact.progress import ProgressCallback
from diffusionact.runtime.ahead import read_ahead
from diffusionact.runtime.media import FolderReader, Frame, Reader, TrackReader, VideoReader
from diffusionact.runtime.reenactor import Reenactor
from diffusionact.runtime.sidecar import Sidecar
from diffusionact.runtime.writer import make_track

TIMES_SUFFIX = "_times_ns"


@dataclass(frozen=True)
class Motion:
    """A driver's track, for how long each of its frames shows, and what finding it took:
    times: stage -> nanoseconds, int64 [N]; "read", and "track" where a tracker was asked."""

    track: Track
    spans_ns: tuple[int, ...]
    times: Mapping[str, npt.NDArray[np.int64]]

    def seen(self) -> int:
        """Return the number of frames that have a face."""
        return sum(self.track[i] is not None for i in range(len(self.track)))

    def save(self, path: Path) -> None:
        """Return nothing; the file (.npz) is a landmark track, with more beside it; it is
        complete or not there at all. Raises: MediaError when it cannot be written."""
        save_npz(
            path,
            **self.track.arrays(),
            spans_ns=np.array(self.spans_ns, np.int64),
            **{f"{stage}{TIMES_SUFFIX}": values for stage, values in self.times.items()},
        )

    @classmethod
    def load(cls, path: Path) -> Motion:
        """Return the motion of a file that `save` wrote. Raises: MediaError."""
        arrays = load_npz(path, "driver's motion")
        if "spans_ns" not in arrays:
            raise MediaError(f"{path}: a landmark track, not a driver's motion")
        times = {
            name.removesuffix(TIMES_SUFFIX): values.astype(np.int64)
            for name, values in arrays.items()
            if name.endswith(TIMES_SUFFIX)
        }
        return cls(Track.load(path), tuple(arrays["spans_ns"].tolist()), times)


def driver_motion(
    act: Reenactor, reader: Reader, progress: ProgressCallback | None = None
) -> Motion:
    """Return the landmarks of every frame of a driver, with the frames' own times: from a track
    beside its file, NAME.landmarks.npz, where there is one, else by the tracker, which looks at
    one frame while the next is decoded.

    Raises: MediaError for a track of another file, NoFace when no frame has a face, BackendMissing.
    """
    file = _single_file(reader)
    known = None if file is None else Sidecar.beside(file)
    faces: list[Landmarks | None] = []
    pts_ns, spans_ns, read_times_ns, track_times_ns = [], [], [], []
    size = reader.track.size if isinstance(reader, TrackReader) else (0, 0)
    with closing(read_ahead(reader)) as frames:
        for frame, read_ns in frames:
            begun_ns = time.monotonic_ns()
            if frame.image_bgr is not None:
                size = (frame.image_bgr.shape[1], frame.image_bgr.shape[0])
            faces.append(None if known is not None else _find(act, frame))
            read_times_ns.append(read_ns)
            track_times_ns.append(time.monotonic_ns() - begun_ns)
            pts_ns.append(frame.pts_ns)
            spans_ns.append(frame.duration_ns)
            if progress is not None:  # a file's header may promise another number
                progress(len(faces), reader.length and max(reader.length, len(faces)))
    if progress is not None:
        progress(len(faces), len(faces))
    if known is not None:
        faces = known.faces(len(faces), size)
    times = {"read": np.array(read_times_ns, np.int64)}
    if known is None:
        times["track"] = np.array(track_times_ns, np.int64)
    motion = Motion(make_track(faces, pts_ns, size), tuple(spans_ns), times)
    if not motion.seen():
        raise NoFace(
            f"{reader.name}: no face in any of its {len(faces)} frames; wanted a face at least 60 "
            "pixels wide, seen from the front, or, in a landmark track, 68 points and both irises"
        )
    return motion


def _single_file(reader: Reader) -> Path | None:
    """The one file of a reader of pictures, beside which a track may lie."""
    if isinstance(reader, FolderReader) and len(reader.paths) == 1:
        return reader.paths[0]
    return reader.path if isinstance(reader, VideoReader) else None


def _find(act: Reenactor, frame: Frame) -> Landmarks | None:
    if frame.image_bgr is None:
        return frame.landmarks
    try:
        return act.tracker.track(frame.image_bgr)
    except NoFace:
        return None
