"""Faces in pictures: what a tracker is, MediaPipe behind it, and recorded tracks in its place."""

from __future__ import annotations

import importlib.machinery
import importlib.metadata
import importlib.util
import os
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, Protocol, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

from diffusionact.errors import BackendMissing, BundleError, NoFace, SettingsError
from diffusionact.landmarks import EYE_A, EYE_B, Landmarks, Track, from_mediapipe
from diffusionact.manifest import ASSETS, Manifest, tracker_tensors
from diffusionact.runtime.component import open_component
from diffusionact.runtime.media import Image

TrackerKind: TypeAlias = Literal["auto", "mediapipe", "published"]
TRACKERS: tuple[TrackerKind, ...] = ("auto", "mediapipe", "published")

MEDIAPIPE_VERSION = "0.10.21"  # the last one whose wheel carries the face model
LEAN_INSTALL = f"pip install --no-deps mediapipe=={MEDIAPIPE_VERSION} && pip install protobuf"
MAX_FACES = 8
FRAME_US = 33_333  # the graph wants rising times; it does not use their distance
# One NormalizedLandmark in its list: tag and length, then three tagged little-endian floats.
LANDMARK_BYTES = np.dtype(
    [("head", "u1", 2), ("tx", "u1"), ("x", "<f4"), ("ty", "u1"), ("y", "<f4"), ("tz", "u1"),
     ("z", "<f4")]
)  # fmt: skip


class Tracker(Protocol):
    """Finds faces.

    detect: every face of a picture, uint8 [H,W,3] BGR, the largest first.
    track: the driver's face in the next frame of a clip; raises NoFace when it is not seen. The
    most certain face is taken first, then the one nearest to the last.
    """

    def detect(self, image_bgr: Image) -> list[Landmarks]: ...
    def track(self, image_bgr: Image) -> Landmarks: ...
    def close(self) -> None: ...


def open_tracker() -> Tracker:
    """Return the tracker that is installed. Raises: BackendMissing with the command to run."""
    return MediaPipeTracker()


def open_tracker_of(
    bundle_dir: Path,
    manifest: Manifest,
    kind: TrackerKind = "auto",
    *,
    published: bool = False,
    backend: str = "ort",
    device: str = "auto",
    threads: int = 0,
) -> Tracker:
    """Return the tracker for a bundle: with "auto" the published one where the bundle has it all,
    else the installed one.

    published: as the authors have it, surprises included; the rest as in `open_component`.

    Raises: BackendMissing, and BundleError when the published one is wanted and not there.
    """
    parts = {*manifest.tracker, *manifest.assets}
    missing = [name for name in (*tracker_tensors(), *ASSETS) if name not in parts]
    if kind == "mediapipe" or (kind == "auto" and missing):
        return open_tracker()
    if missing:
        raise BundleError(
            f"{bundle_dir}: the published tracker lacks {', '.join(missing)}; import its files "
            "with `diffusionact import --s3fd FILE --fan FILE --emoca DIR --gaze FILE --flame "
            "FILE -o weights/` and export the bundle again"
        )
    from diffusionact.morphable import load_flame
    from diffusionact.runtime.published.tracker import NETWORKS, PublishedTracker

    networks = {
        name: open_component(
            bundle_dir,
            manifest,
            name,
            backend=backend,
            device=device,
            precision="fp32",  # coordinates: bfloat16 has 8 bits for them
            threads=threads,
        )
        for name in NETWORKS
    }
    face = load_flame(bundle_dir / manifest.assets["flame"].file)
    return PublishedTracker(networks, face, manifest.image_size, published)


def portrait_face(faces: list[Landmarks], face: int | None = None) -> Landmarks:
    """Return the one face of a portrait, or the one asked for, counted from 1.

    Raises: NoFace when there is none, or several and no number; SettingsError for a wrong number.
    """
    if not faces:
        raise NoFace(
            "no face was found in the portrait; wanted one, seen from the front and at least 60 "
            "pixels wide. Crop the picture closer to the face, or give its landmarks"
        )
    if face is None and len(faces) > 1:
        raise NoFace(f"{len(faces)} faces in the portrait: {_places(faces)}; pick one: --face N")
    number = 1 if face is None else face
    if not 1 <= number <= len(faces):
        raise SettingsError(
            f"--face {number}: the portrait has {len(faces)}: {_places(faces)}; wanted "
            f"1 to {len(faces)}"
        )
    return faces[number - 1]


def _places(faces: list[Landmarks]) -> str:
    centres = [face.points[:, :2].mean(axis=0) for face in faces]
    return ", ".join(f"{i} at x={x:.0f} y={y:.0f}" for i, (x, y) in enumerate(centres, start=1))


class RecordedTracker:
    """A landmark track in the tracker's place: each call gives the next entry."""

    def __init__(self, track: Track) -> None:
        self._track = track
        self._next = 0

    def detect(self, image_bgr: Image) -> list[Landmarks]:
        face = self._track[0]
        return [face] if face is not None else []

    def track(self, image_bgr: Image) -> Landmarks:
        if self._next >= len(self._track):
            raise NoFace(f"the landmark track ends after {len(self._track)} frames")
        face = self._track[self._next]
        self._next += 1
        if face is None:
            raise NoFace(f"the landmark track has no face at frame {self._next - 1}")
        return face

    def close(self) -> None:
        """Nothing is held."""


class MediaPipeTracker:
    """MediaPipe's face mesh with irises, as its 0.10.21 wheel carries it.

    The graph is run through the wheel's own bindings. Importing the package `mediapipe` instead
    would need matplotlib, jax and an old protobuf, none of which the graph uses.
    """

    def __init__(self) -> None:
        self._root, self._bindings = _load_bindings()
        self._video: _Graph | None = None
        self._still: _Graph | None = None

    def detect(self, image_bgr: Image) -> list[Landmarks]:
        if self._still is None:
            self._still = _Graph(self._root, self._bindings, faces=MAX_FACES, follow=False)
        faces = self._still.run(image_bgr)
        if not faces:  # a face that fills the picture is too close for the detector
            faces = _detect_padded(self._still, image_bgr)
        return sorted(faces, key=_eye_distance, reverse=True)

    def track(self, image_bgr: Image) -> Landmarks:
        # One face and `follow`: the graph keeps to the region of the last face, and after a loss
        # takes the most certain detection.
        if self._video is None:
            self._video = _Graph(self._root, self._bindings, faces=1, follow=True)
        faces = self._video.run(image_bgr)
        if not faces:
            raise NoFace("no face in this frame")
        return faces[0]

    def close(self) -> None:
        for graph in (self._video, self._still):
            if graph is not None:
                graph.close()
        self._video = self._still = None

    def __enter__(self) -> MediaPipeTracker:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class _Graph:
    """One running face mesh graph."""

    def __init__(self, root: Path, bindings: Any, faces: int, follow: bool) -> None:
        self._make, self._get = bindings._packet_creator, bindings._packet_getter
        self._format = bindings.image_frame.ImageFormat.SRGB
        self._packet: Any = None
        self._now_us = 0
        self._spoken = False  # its libraries write notes to stderr at the first picture
        graph_file = root / "modules/face_landmark/face_landmark_front_cpu.binarypb"
        side = {
            "num_faces": self._make.create_int(faces),
            "with_attention": self._make.create_bool(True),
            "use_prev_landmarks": self._make.create_bool(follow),
        }
        with _silent_stderr():
            bindings.resource_util.set_resource_dir(str(root.parent))
            self._graph = bindings.calculator_graph.CalculatorGraph(
                binary_graph_path=str(graph_file)
            )
            self._graph.observe_output_stream("multi_face_landmarks", self._take, True)
            self._graph.start_run(side)

    def run(self, image_bgr: Image) -> list[Landmarks]:
        """The faces of a picture, px."""
        if self._spoken:
            return self._faces(image_bgr)
        self._spoken = True
        with _silent_stderr():
            return self._faces(image_bgr)

    def close(self) -> None:
        self._graph.close()

    def _take(self, _stream: str, packet: Any) -> None:
        self._packet = packet

    def _faces(self, image_bgr: Image) -> list[Landmarks]:
        image_rgb = cv2.cvtColor(image_bgr, cv2.COLOR_BGR2RGB)
        self._packet, self._now_us = None, self._now_us + FRAME_US
        packet = self._make._create_image_frame_from_pixel_data(self._format, image_rgb, True)
        self._graph.add_packet_to_input_stream(stream="image", packet=packet.at(self._now_us))
        self._graph.wait_until_idle()
        if self._packet is None or self._packet.is_empty():
            return []
        height, width = image_bgr.shape[:2]
        messages = self._get._get_serialized_proto_list(self._packet)
        scale = np.array([width, height, width], np.float64)
        return [from_mediapipe(_decode_landmarks(data) * scale) for data in messages]


def _decode_landmarks(message: bytes) -> npt.NDArray[np.float64]:
    raw = np.frombuffer(message, LANDMARK_BYTES)
    return np.stack([raw["x"], raw["y"], raw["z"]], axis=1).astype(np.float64)


def _detect_padded(graph: _Graph, image_bgr: Image) -> list[Landmarks]:
    pad = max(image_bgr.shape[:2]) // 2
    wide = cv2.copyMakeBorder(image_bgr, pad, pad, pad, pad, cv2.BORDER_REPLICATE)
    back = np.array([[1.0, 0.0, -pad], [0.0, 1.0, -pad]])
    return [face.transformed(back) for face in graph.run(np.asarray(wide, np.uint8))]


def _eye_distance(face: Landmarks) -> float:
    across = face.points[EYE_A, :2].mean(axis=0) - face.points[EYE_B, :2].mean(axis=0)
    return float(np.hypot(*across))


def _load_bindings() -> tuple[Path, Any]:
    """The folder of the installed mediapipe package and its C++ bindings."""
    try:
        seen = importlib.metadata.version("mediapipe")
        spec = importlib.util.find_spec("mediapipe")
    except (importlib.metadata.PackageNotFoundError, ValueError):
        raise BackendMissing(_missing("MediaPipe is not installed")) from None
    if seen != MEDIAPIPE_VERSION or spec is None or not spec.submodule_search_locations:
        raise BackendMissing(_missing(f"MediaPipe {seen} carries no face model"))
    root = Path(spec.submodule_search_locations[0])
    files = [p for p in (root / "python").glob("_framework_bindings*") if p.is_file()]
    try:
        loader = importlib.machinery.ExtensionFileLoader("_framework_bindings", str(files[0]))
        module_spec = importlib.util.spec_from_loader("_framework_bindings", loader)
        if module_spec is None:
            raise ImportError("no module specification")
        with _silent_stderr():
            bindings = importlib.util.module_from_spec(module_spec)
            loader.exec_module(bindings)
    except (IndexError, ImportError) as error:
        raise BackendMissing(_missing(f"MediaPipe cannot be loaded ({error})")) from error
    return root, bindings


def _missing(what: str) -> str:
    python = sys.version_info
    advice = f"run `{LEAN_INSTALL}`"
    if python >= (3, 13):
        advice = f"its wheels end at Python 3.12, this is {python.major}.{python.minor}: use 3.12"
    return f"{what}; wanted {MEDIAPIPE_VERSION}: {advice}. Landmark tracks (.npz) need no tracker"


@contextmanager
def _silent_stderr() -> Iterator[None]:
    """Send file descriptor 2 to nowhere: the C++ libraries know no other way to be quiet. Not for
    long: what other threads write meanwhile is lost."""
    sys.stderr.flush()
    saved, nowhere = os.dup(2), os.open(os.devnull, os.O_WRONLY)
    try:
        os.dup2(nowhere, 2)
        yield
    finally:
        os.dup2(saved, 2)
        os.close(saved)
        os.close(nowhere)
