"""The authors' way from a picture to what is drawn: detector, landmarks, aligned crop, codes."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from diffusionact.errors import NoFace, SettingsError
from diffusionact.image import bgr_to_rgb, resize_area, warp_crop
from diffusionact.landmarks import Landmarks, crop_matrix, gaze_points, invert_affine
from diffusionact.morphable import Flame
from diffusionact.runtime.component import Component
from diffusionact.runtime.published import crop_ffhq, emoca, fan, gaze, ranges, s3fd
from diffusionact.runtime.published.codes import CANVAS_PX, FaceCodes, drawn_landmarks
from diffusionact.runtime.published.resample import resize_pillow
from diffusionact.runtime.tracker import portrait_face

UInt8Array: TypeAlias = npt.NDArray[np.uint8]
Float32Array: TypeAlias = npt.NDArray[np.float32]
Float64Array: TypeAlias = npt.NDArray[np.float64]

NETWORKS = ("s3fd", "fan", "emoca", "gaze")
FINER = 2  # times finer than the landmark network sees, a picture may be; more costs time only


@dataclass(frozen=True)
class Portrait:
    """A portrait made ready for the networks.

    crop: uint8 [S,S,3], RGB; matrix: float64 [2,3], portrait px -> crop px; landmarks: those of
    its own drawing, canvas px, with its codes.
    """

    crop: UInt8Array
    matrix: Float64Array
    landmarks: Landmarks


@dataclass(frozen=True)
class _Scene:
    """The picture in which faces are looked for, uint8 [H,W,3] RGB, and the way to it, [2,3], from
    the px of the picture that was given."""

    image: UInt8Array
    matrix: Float64Array


class PublishedTracker:
    """Finds faces and reads their codes: a `Tracker`, and what a published model draws from.

    networks: by name, of NETWORKS; face: the morphable model; side: of the crop, px; published:
    all as the authors have it, else their surprises are mended (docs/compatibility.md).

    Raises: SettingsError when a network is missing.
    """

    def __init__(
        self, networks: Mapping[str, Component], face: Flame, side: int, published: bool = False
    ) -> None:
        if missing := [name for name in NETWORKS if name not in networks]:
            raise SettingsError(f"the published tracker lacks {missing}; wanted {list(NETWORKS)}")
        self._s3fd, self._fan, self._emoca, self._gaze = (_Bound(networks[n]) for n in NETWORKS)
        self._face, self._side, self._published = face, side, published
        self._shape_codes = self._emoca.size("shape")
        self._last: Float32Array | None = None

    def detect(self, image_bgr: UInt8Array) -> list[Landmarks]:
        """Return every face of a picture, its px, with codes; the largest first."""
        scene, found = self._scene(image_bgr), []
        for box in _largest_first(self._boxes(scene.image)):
            try:
                found.append(self._face_in(scene, box))
            except NoFace:  # what the detector took for one, and landmarks do not confirm
                continue
        return found

    def track(self, image_bgr: UInt8Array) -> Landmarks:
        """Return the driver's face in the next frame, its px, with codes: the surest at first, then
        the nearest to the last; as published always the surest. Raises: NoFace."""
        scene = self._scene(image_bgr)
        boxes = self._boxes(scene.image)
        if not len(boxes):
            raise NoFace("no face in this frame")
        box = boxes[0]
        if self._last is not None and not self._published:
            far = np.hypot(*(_centres(boxes) - self._last).T)
            box = boxes[int(far.argmin())]
        self._last = _centres(box[None])[0]
        return self._face_in(scene, box)

    def portrait(self, image_bgr: UInt8Array, face: int | None = None) -> Portrait:
        """Return a portrait made ready; face: which of several, from 1, the largest first.

        Raises: NoFace for none, or several and no number (as published, the surest is taken);
        SettingsError for a wrong number.
        """
        scene = self._scene(image_bgr)
        boxes = self._boxes(scene.image)
        boxes = boxes[:1] if self._published and face is None else _largest_first(boxes)
        points = [self._points(scene.image, box) for box in boxes]
        places = [_flat(xy).transformed(invert_affine(scene.matrix)) for xy in points]
        chosen = portrait_face(places, face)
        index = next(i for i, place in enumerate(places) if place is chosen)
        codes = self._codes(scene.image, points[index])
        crop, matrix = self._crop(scene.image, points[index], self._side)
        drawn = drawn_landmarks(self._face, codes, codes, self._side)
        landmarks = replace(drawn, score=float(boxes[index, 4]), codes=codes.vector)
        return Portrait(crop, _after(matrix, scene.matrix), landmarks)

    def mixed(self, source: Landmarks, driver: Landmarks) -> Landmarks:
        """Return the landmarks to draw, canvas px: the source's shape, all else the driver's.

        Raises: SettingsError when either was found by another tracker.
        """
        if source.codes is None or driver.codes is None:
            raise SettingsError(
                "these landmarks carry no face codes; have them found by the published tracker"
            )
        shape, motion = (
            FaceCodes.of_vector(face.codes, self._shape_codes)
            for face in (source, driver)
            if face.codes is not None
        )
        return replace(drawn_landmarks(self._face, shape, motion, self._side), score=driver.score)

    def close(self) -> None:
        """Return nothing; the last face is forgotten."""
        self._last = None

    def _scene(self, image_bgr: UInt8Array) -> _Scene:
        image = bgr_to_rgb(image_bgr)
        if not self._published:
            return _Scene(image, np.eye(2, 3))
        height, width = image.shape[:2]
        zoom = np.array([CANVAS_PX / width, CANVAS_PX / height])
        matrix = np.concatenate([np.diag(zoom), (zoom[:, None] - 1.0) / 2.0], axis=1)
        return _Scene(resize_pillow(image, CANVAS_PX, CANVAS_PX), matrix)

    def _boxes(self, image: UInt8Array) -> Float32Array:
        """The faces, [N,5], px of this picture and score, the surest first."""
        side = self._s3fd.side
        seen = image
        if image.shape != (side, side, 3):  # as large as it fits, in the upper left corner
            zoom = side / max(image.shape[:2])
            height, width = (max(round(length * zoom), 1) for length in image.shape[:2])
            seen = np.zeros((side, side, 3), np.uint8)
            seen[:height, :width] = resize_area(image, width, height)
        unit = ranges.to_unit(ranges.to_signed(seen))
        maps = self._s3fd(unit.transpose(2, 0, 1)[None] * np.float32(255.0))
        levels = sum(name.startswith("box_logits_") for name in maps)
        found = s3fd.detect((maps[f"box_logits_{i}"], maps[f"offsets_{i}"]) for i in range(levels))
        found[:, :4] *= np.float32(max(image.shape[:2]) / side)
        return found

    def _points(self, image: UInt8Array, box: Float32Array) -> Float32Array:
        """The landmarks in a box, float32 [68,2], px of this picture."""
        window = fan.Window.of_box(box)
        fold = int(window.scale * fan.WINDOW_PX // (FINER * self._fan.side))
        if fold > 1 and not self._published:  # a close-up: the network sees no more of it
            small = resize_area(image, image.shape[1] // fold, image.shape[0] // fold)
            return self._points(small, box / np.float32(fold)) * np.float32(fold)
        patch = fan.crop(image, window, self._fan.side, antialias=not self._published)
        heatmaps = self._fan(patch / np.float32(255.0))["heatmaps"]
        return fan.landmarks(heatmaps, window, whole=self._published)

    def _crop(
        self, image: UInt8Array, points: Float32Array, side: int
    ) -> tuple[UInt8Array, Float64Array]:
        """The aligned crop and its map from this picture's px."""
        matrix = crop_matrix(points, side, rotate=True)
        if not self._published:
            return warp_crop(image, matrix, side), matrix
        lossy = ranges.truncated_uint8(ranges.to_signed(image))
        return crop_ffhq.crop_ffhq(lossy, points, side), matrix

    def _codes(self, image: UInt8Array, points: Float32Array) -> FaceCodes:
        """What the networks read of the face at these landmarks. Raises: NoFace."""
        crop, matrix = self._crop(image, points, CANVAS_PX)
        if self._published:  # the face is found a second time
            boxes = self._boxes(crop)
            if not len(boxes):
                raise NoFace("no face is found again in the aligned crop")
            points = self._points(crop, boxes[0])
        else:
            points = (points @ matrix[:, :2].T + matrix[:, 2]).astype(np.float32)
        signed = ranges.to_signed(crop)
        read = self._emoca(emoca.crop(ranges.to_unit(signed), points, self._emoca.side))
        looks = self._gaze(gaze.crop(signed, points, self._gaze.side))["pitch_yaw"]
        return FaceCodes(
            shape=read["shape"][0].copy(),
            expression=read["expression"][0].copy(),
            pose=read["pose"][0].copy(),
            camera=read["camera"][0].copy(),
            gaze=looks[0].copy(),
        )

    def _face_in(self, scene: _Scene, box: Float32Array) -> Landmarks:
        """The face of a box, px of the picture that was given, with codes."""
        points = self._points(scene.image, box)
        codes = self._codes(scene.image, points)
        placed = _flat(points).transformed(invert_affine(scene.matrix))
        pitch, yaw = (float(angle) for angle in codes.gaze)
        looks = gaze_points(placed.points, pitch, yaw)
        return Landmarks(placed.points, looks, float(box[4]), codes.vector)


class _Bound:
    """A network of one picture with its memory."""

    def __init__(self, network: Component) -> None:
        self._network = network
        specs = {**network.inputs, **network.outputs}
        self._arrays = {
            name: np.zeros([int(size) for size in spec.shape], np.float32)
            for name, spec in specs.items()
        }
        network.bind(**self._arrays)

    @property
    def side(self) -> int:
        """Of the picture that it sees, px."""
        return int(self._arrays["image"].shape[-1])

    def size(self, output: str) -> int:
        """How many numbers an output has."""
        return int(self._arrays[output].size)

    def __call__(self, image: npt.NDArray[Any]) -> Mapping[str, Float32Array]:
        """Return the outputs by name; the memory is valid until the next call."""
        np.copyto(self._arrays["image"], image)
        self._network.run()
        return self._arrays


def _flat(points: Float32Array) -> Landmarks:
    """Landmarks without depth; the eyes look straight ahead until their gaze is read."""
    depth = np.full((len(points), 1), np.nan, np.float32)
    return Landmarks(np.concatenate([points, depth], axis=1), gaze_points(points, 0.0, 0.0))


def _centres(boxes: Float32Array) -> Float32Array:
    return np.asarray((boxes[:, :2] + boxes[:, 2:4]) / 2.0, np.float32)


def _largest_first(boxes: Float32Array) -> Float32Array:
    areas = (boxes[:, 2:4] - boxes[:, :2]).prod(axis=1)
    return np.asarray(boxes[np.argsort(-areas, kind="stable")], np.float32)


def _after(second: Float64Array, first: Float64Array) -> Float64Array:
    """The affine map [2,3] that does `first`, then `second`."""
    linear = second[:, :2] @ first[:, :2]
    offset = second[:, :2] @ first[:, 2] + second[:, 2]
    return np.concatenate([linear, offset[:, None]], axis=1)
