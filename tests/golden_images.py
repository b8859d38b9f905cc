"""The image pipeline against a directory of golden vectors: `rows(directory)`.

Names, sizes, cases and tolerances come from the directory's image.npz, image.json, manifest.json
and README.md, the rule of its inputs from its regen.py. A vector that nothing checks is a row that
fails.
"""

from __future__ import annotations

import importlib.util
import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any, TypeAlias

import cv2
import numpy as np
import numpy.typing as npt

from diffusionact.condition import Drawing, draw_condition
from diffusionact.landmarks import Landmarks, gaze_points
from diffusionact.morphable import flame_from, flame_pixels
from diffusionact.runtime.published import crop_ffhq, emoca, fan, gaze, ranges, s3fd
from diffusionact.training.models.frozen.flame import reduced

Array: TypeAlias = npt.NDArray[Any]
Row: TypeAlias = tuple[str, float, float, float, bool]
NAN = math.nan


class Vectors:
    """The arrays of image.npz, which remembers those that were read."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        with np.load(directory / "image.npz") as file:
            self._arrays = {name: file[name] for name in file.files}
        self.meta: Mapping[str, Any] = _json(directory / "image.json").get("meta", {})
        limits = _json(directory / "manifest.json").get("tolerances_float32", {})
        self._limits: Mapping[str, Any] = limits
        self._read: set[str] = set()

    def __getitem__(self, name: str) -> Array:
        self._read.add(name)
        return self._arrays[name]

    def __contains__(self, name: str) -> bool:
        return name in self._arrays

    def matching(self, pattern: str) -> list[tuple[str, re.Match[str]]]:
        """Names that the pattern fits whole, in the file's order."""
        found = ((name, re.fullmatch(pattern, name)) for name in self._arrays)
        return [(name, match) for name, match in found if match]

    def limit(self, name: str) -> float:
        """A tolerance that is a number; a missing one is 0."""
        value = self._limits.get(name, 0.0)
        return float(value) if isinstance(value, (int, float)) else 0.0

    def words(self, name: str) -> str:
        """A tolerance that is a sentence."""
        return str(self._limits.get(name, ""))

    def unread(self) -> list[str]:
        return [name for name in self._arrays if name not in self._read]


def rows(directory: str | Path) -> Iterator[Row]:
    """Yield (name, max abs, mean abs, tolerance, ok) for every image vector of a directory."""
    vectors = Vectors(Path(directory))
    for check in (_ranges, _crops, _drawings, _gaze, _emoca, _detector, _landmarks, _flame):
        yield from check(vectors)
    for name in vectors.unread():
        yield f"{name} (nothing checks it)", NAN, NAN, 0.0, False


def _row(name: str, seen: Array | float, wanted: Array | float, tolerance: float) -> Row:
    a, b = np.asarray(seen, np.float64), np.asarray(wanted, np.float64)
    if a.shape != b.shape:
        return f"{name} {list(a.shape)}, wanted {list(b.shape)}", NAN, NAN, tolerance, False
    error = np.abs(a - b)
    most = float(error.max()) if error.size else NAN
    return name, most, float(error.mean()) if error.size else NAN, tolerance, most <= tolerance


def _ranges(v: Vectors) -> Iterator[Row]:
    if "u8_to_tensor_to_u8_trunc" in v:
        levels = np.arange(256, dtype=np.uint8)
        cut = ranges.truncated_uint8(ranges.to_signed(levels))
        yield _row("u8_to_tensor_to_u8_trunc", cut, v["u8_to_tensor_to_u8_trunc"], 0.0)
        if "truncation_changes_n_of_256" in v.meta:
            changed = float((cut != levels).sum())
            yield _row("meta truncation", changed, v.meta["truncation_changes_n_of_256"], 0.0)
    if "range_1_to_255_of_pm1" in v:
        wanted, inputs = v["range_1_to_255_of_pm1"], _stated_inputs(v, "range_1_to_255_of_pm1")
        if len(inputs) == len(wanted):
            seen = ranges.to_unit(np.array(inputs, np.float32)) * np.float32(255.0)
            yield _row("range_1_to_255_of_pm1", seen, wanted, v.limit("gaze_and_flame"))
    if "png_in" in v and "png_out_u8" in v:
        yield _row("png_out_u8", ranges.stretched_uint8(v["png_in"]), v["png_out_u8"], 0.0)


def _stated_inputs(v: Vectors, name: str) -> list[float]:
    """The inputs that the README names behind a vector."""
    readme = v.directory / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    stated = re.search(rf"`{name}`\s*\(inputs ([^)]*)\)", text)
    return [float(word) for word in stated[1].split(",")] if stated else []


def _crops(v: Vectors) -> Iterator[Row]:
    words = re.search(r"allow (\d+) level in <= ([\d.]+) percent", v.words("crop_u8"))
    levels, share = (float(words[1]), float(words[2]) / 100.0) if words else (0.0, 0.0)
    for name, match in v.matching(r"crop_(.+)_out"):
        wanted = v[name]
        seen = crop_ffhq.crop_ffhq(v["img"], v[f"crop_{match[1]}_lm"], len(wanted))
        _, most, mean, _, ok = _row(name, seen, wanted, levels)
        yield name, most, mean, levels, ok and bool((seen != wanted).mean() <= share)


def _drawings(v: Vectors) -> Iterator[Row]:
    """Here max abs is the number of pixels that differ, mean abs their share."""
    words = v.words("stickman_u8")
    exact = re.search(r"exact with OpenCV ([\d.]*\d)", words)
    allowed = re.search(r"allow <= (\d+) differing pixels", words)
    same = exact is not None and cv2.__version__.startswith(exact[1])
    tolerance = float(allowed[1]) if allowed and not same else 0.0
    signed: list[Array] = []
    for name, with_gaze in (("stick_gaze_u8", True), ("stick_nogaze_u8", False)):
        for i, wanted in enumerate(v[name] if name in v else ()):
            drawn = draw_condition(_face(v, i, with_gaze), wanted.shape[-1], Drawing())
            differs = (drawn.transpose(2, 0, 1) != wanted).any(axis=0)
            count = float(differs.sum())
            label = f"{name}[{i}] (pixels that differ)"
            yield label, count, float(differs.mean()), tolerance, count <= tolerance
            if with_gaze:
                signed.append(ranges.to_signed(drawn))
    if "stick_gaze_float_minmax" in v and signed:
        ends = np.array([np.min(signed), np.max(signed)])
        yield _row("stick_gaze_float_minmax", ends, v["stick_gaze_float_minmax"], 1e-6)
    if "stick_background_value" in v.meta:
        blank = ranges.to_signed(np.array([Drawing().background], np.uint8))
        yield _row("meta stick background", blank, [v.meta["stick_background_value"]], 1e-6)


def _face(v: Vectors, i: int, with_gaze: bool) -> Landmarks:
    points = np.full((68, 3), np.nan, np.float32)
    points[:, :2] = v["stick_lm"][i]
    pitch, yaw = _angles(v, i)
    look = gaze_points(points, pitch, yaw) if with_gaze else np.full((2, 2), np.nan, np.float32)
    return Landmarks(points, look)


def _angles(v: Vectors, i: int) -> tuple[float, float]:
    angles = v["gaze_pitchyaw"]
    pitch, yaw = angles[i if len(angles) > 1 else 0]
    return float(pitch), float(yaw)


def _gaze(v: Vectors) -> Iterator[Row]:
    limit = v.limit("gaze_and_flame")
    for eye, name in enumerate(("gaze_left_pt", "gaze_right_pt")):
        if name in v:
            count = len(v["stick_lm"])
            looks = [gaze_points(v["stick_lm"][i], *_angles(v, i))[eye] for i in range(count)]
            yield _row(name, np.stack(looks), v[name], limit)
    blocks = v.matching(r"gaze_input_block(\d+)")
    if not blocks or "fan_lm" not in v:
        return
    name, match = blocks[0]
    block, wanted = int(match[1]), v[name]
    side = block * wanted.shape[-1]
    image = ranges.to_signed(v["img"])
    crops = np.concatenate([gaze.crop(image, points, side) for points in v["fan_lm"]])
    yield _row(name, _block_means(crops, block), wanted, limit)
    if "gaze_input_patch" in v:
        patch = v["gaze_input_patch"]
        seen = _window(v, crops, patch.shape[-1])
        yield _row("gaze_input_patch", seen, patch, limit)
    if "gaze_theta" in v:
        thetas = [_theta(gaze.crop_matrix(p, side), side, v["img"]) for p in v["fan_lm"]]
        yield _row("gaze_theta", np.stack(thetas), v["gaze_theta"], limit)


def _window(v: Vectors, crops: Array, size: int) -> Array:
    """The rows and columns that the README names, else the middle."""
    readme = v.directory / "README.md"
    text = readme.read_text(encoding="utf-8") if readme.is_file() else ""
    stated = re.search(r"`gaze_input_patch`[^`]*rows/cols (\d+)\.\.(\d+)", text)
    first = int(stated[1]) if stated else (crops.shape[-1] - size) // 2
    return crops[..., first : first + size, first : first + size]


def _theta(to_image: Array, side: int, image: Array) -> Array:
    """A map between pixel indices as affine_grid writes it: both pictures from -1 to 1."""
    linear = to_image[:, :2]
    offset = to_image[:, 2] + 0.5 - linear @ (0.5, 0.5)  # from corner to corner
    half = np.array(image.shape[1::-1])[:, None] / 2.0
    middle = (linear @ (side / 2.0, side / 2.0) + offset)[:, None]
    return np.concatenate([linear * (side / 2.0) / half, middle / half - 1.0], axis=1)


def _block_means(pictures: Array, block: int) -> Array:
    height, width = (size // block for size in pictures.shape[-2:])
    return pictures.reshape(*pictures.shape[:-2], height, block, width, block).mean((-3, -1))


def _emoca(v: Vectors) -> Iterator[Row]:
    limit, blocks = v.limit("emoca_crop"), v.matching(r"emoca_crop_block(\d+)")
    if not blocks or "fan_lm" not in v:
        return
    name, match = blocks[0]
    block, wanted = int(match[1]), v[name]
    side, image = block * wanted.shape[-1], ranges.to_unit(ranges.to_signed(v["img"]))
    crops = np.concatenate([emoca.crop(image, points, side) for points in v["fan_lm"]])
    yield _row(name, _block_means(crops, block), wanted, limit)
    if "emoca_crop_first" in v:
        yield _row("emoca_crop_first", crops[0], v["emoca_crop_first"], limit)


def _detector(v: Vectors) -> Iterator[Row]:
    if "sfd_boxes" not in v:
        return
    boxes = s3fd.decode(v["sfd_loc"], v["sfd_priors"])
    yield _row("sfd_boxes", boxes, v["sfd_boxes"], v.limit("gaze_and_flame"))
    if "sfd_nms_keep" in v:
        kept = s3fd.suppress(v["sfd_boxes"], v["sfd_scores"], s3fd.OVERLAP)
        yield _row("sfd_nms_keep", kept, v["sfd_nms_keep"], 0.0)


def _landmarks(v: Vectors) -> Iterator[Row]:
    if "fan_bbox" not in v:
        return
    window = fan.Window.of_box(v["fan_bbox"])
    if "fan_scale" in v.meta:
        yield _row("meta fan_scale", window.scale, v.meta["fan_scale"], 1e-6)
    if "fan_center" in v.meta:
        limit = v.limit("gaze_and_flame")
        yield _row("meta fan_center", np.array(window.centre), v.meta["fan_center"], limit)
    for name, match in v.matching(r"fan_pts(\d+)"):
        resolution, wanted = int(match[1]), v[name]
        shape = (*wanted.shape[:2], resolution, resolution)
        heatmaps = _rule(v.directory)("input/heatmap", shape, "image")
        yield _row(name, fan.peaks(heatmaps), wanted, 0.0)
        if "fan_pts_img" in v:
            seen = [fan.landmarks(one[None], window, whole=True) for one in heatmaps]
            yield _row("fan_pts_img", np.stack(seen), v["fan_pts_img"], 0.0)
    for name, match in v.matching(r"fan_crop_block(\d+)_.*"):
        block, wanted = int(match[1]), v[name]
        image = v["img"].astype(np.float32) / np.float32(255.0)
        seen = fan.crop(image, window, block * wanted.shape[-1], "antialias" in name)
        # stored as 0..255, where the network sees 0..1
        yield _row(name, _block_means(seen, block), wanted / 255.0, v.limit("emoca_crop"))


def _flame(v: Vectors) -> Iterator[Row]:
    arrays = {name[len("flame_") :]: v[name] for name, _ in v.matching(r"flame_(?!in_|out_).+")}
    if not arrays:
        return
    limit = v.limit("gaze_and_flame")
    codes = [v[f"flame_in_{name}"] for name in ("shape", "exp", "pose")]
    face = flame_from(reduced(arrays))
    if "flame_out_verts" in v:
        tables = [arrays[f"{kind}_lmk_faces_idx"].ravel() for kind in ("dynamic", "static")]
        kept = np.unique(arrays["f"][np.concatenate(tables)])
        wanted = v["flame_out_verts"]
        name = f"flame_out_verts ({len(kept)} of {wanted.shape[1]} lie under landmarks)"
        yield _row(name, face.vertices(*codes), wanted[:, kept], limit)
    if "flame_out_landmarks2d_px224" in v:
        seen = flame_pixels(face.landmarks(*codes), v["flame_in_cam"])[..., :2]
        yield _row("flame_out_landmarks2d_px224", seen, v["flame_out_landmarks2d_px224"], limit)
    if "flame_out_lmk3d68_static_contour" in v:
        # 68 points before projection: of the turning contour, whatever the name says
        wanted = v["flame_out_lmk3d68_static_contour"]
        yield _row("flame_out_lmk3d68_static_contour", face.landmarks(*codes), wanted, limit)


def _rule(directory: Path) -> Callable[..., Array]:
    """`tensor` of the directory's own regen.py."""
    path = directory / "regen.py"
    spec = importlib.util.spec_from_file_location("golden_regen", path)
    if spec is None or spec.loader is None:
        raise FileNotFoundError(f"{path}: the rule of the inputs is missing")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    tensor: Callable[..., Array] = module.tensor
    return tensor


def _json(path: Path) -> Mapping[str, Any]:
    if not path.is_file():
        return {}
    values: Mapping[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    return values
