"""Published metric networks that the user has: LPIPS and ArcFace, read from a folder as ONNX.

The folder has any of `lpips.onnx` and `arcface.onnx`, and may have `networks.json`, which says
where a file differs from what is expected here (docs/evaluation.md): its name, the names of its
tensors, and what values and which order of the colours it wants.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Literal

import cv2
import numpy as np
import numpy.typing as npt

from diffusionact.decode import DecodeError, decode
from diffusionact.errors import BundleError, MediaError
from diffusionact.evaluation.compared import Image
from diffusionact.evaluation.judge import Float32Array, Network
from diffusionact.evaluation.reading import Reading
from diffusionact.image import resize_area
from diffusionact.landmarks import EYE_A, EYE_B, fit_similarity
from diffusionact.manifest import TensorSpec, file_sha256

DESCRIPTION = "networks.json"
ARCFACE_SIDE = 112
# Eyes, nose tip and corners of the mouth in ArcFace's crop of 112 px.
ARCFACE_POINTS = np.array(
    [[38.2946, 51.6963], [73.5318, 51.5014], [56.0252, 71.7366], [41.5493, 92.3655],
     [70.7299, 92.2041]]
)  # fmt: skip
NOSE_TIP, MOUTH_LEFT, MOUTH_RIGHT = 30, 48, 54


@dataclass(frozen=True)
class MetricNetwork:
    """How a file is fed. inputs: tensor names, two of LPIPS, one of ArcFace; output: of what is
    wanted; low, high: what black and white become; colours: their order; side: px of the picture
    that it takes; size: numbers that come out; sha256: of the file, checked where it is given."""

    file: str
    inputs: tuple[str, ...]
    output: str
    low: float = -1.0
    high: float = 1.0
    colours: Literal["rgb", "bgr"] = "rgb"
    side: int = 256
    output_shape: tuple[int, ...] = (1, 1, 1, 1)
    sha256: str | None = None

    @property
    def tensors(self) -> tuple[dict[str, TensorSpec], dict[str, TensorSpec]]:
        """The inputs and the output as the component has them."""
        picture = (1, 3, self.side, self.side)
        inputs = {name: TensorSpec(name, "float32", picture) for name in self.inputs}
        return inputs, {self.output: TensorSpec(self.output, "float32", self.output_shape)}

    def tensor(self, image_bgr: Image) -> Float32Array:
        """Return a picture as the network takes it, [1,3,side,side]."""
        if image_bgr.shape[:2] != (self.side, self.side):
            image_bgr = resize_area(image_bgr, self.side, self.side)
        ordered = image_bgr if self.colours == "bgr" else image_bgr[..., ::-1]
        scaled = ordered.astype(np.float32) * ((self.high - self.low) / 255.0) + self.low
        return np.ascontiguousarray(scaled.transpose(2, 0, 1)[None], np.float32)


KNOWN = {
    "lpips": MetricNetwork("lpips.onnx", ("a", "b"), "distance"),
    "arcface": MetricNetwork(
        "arcface.onnx", ("image",), "embedding", side=ARCFACE_SIDE, output_shape=(1, 512)
    ),
}


def find_networks(folder: Path) -> dict[str, MetricNetwork]:
    """Return the networks that a folder has, with the hash of each file.

    Raises: MediaError when the folder or its description cannot be read, BundleError when a file
    is not the one that the description's hash names.
    """
    if not folder.is_dir():
        raise MediaError(f"{folder}: no such folder; wanted one with lpips.onnx or arcface.onnx")
    changed = _described(folder)
    found = {}
    for name, usual in KNOWN.items():
        network = changed.get(name, usual)
        path = folder / network.file
        if not path.is_file():
            continue
        seen = file_sha256(path)
        if network.sha256 not in (None, seen):
            raise BundleError(
                f"{path}: sha256 {seen}, {DESCRIPTION} says {network.sha256}: another file; "
                "fetch the right one or correct the description"
            )
        found[name] = replace(network, sha256=seen)
    return found


def _described(folder: Path) -> dict[str, MetricNetwork]:
    path = folder / DESCRIPTION
    if not path.exists():
        return {}
    try:
        values = json.loads(path.read_bytes())
        unknown = sorted(set(values) - set(KNOWN))
        if unknown:
            raise ValueError(f"{unknown}; wanted some of {sorted(KNOWN)}")
        usual = json.loads(json.dumps({name: vars(each) for name, each in KNOWN.items()}))
        return {
            name: decode(MetricNetwork, {**usual[name], **changes})
            for name, changes in values.items()
        }
    except (OSError, ValueError, TypeError, AttributeError, DecodeError) as error:
        raise MediaError(f"{path}: {error}; see docs/evaluation.md") from error


def lpips_of(network: MetricNetwork, run: Network) -> Callable[[Image, Image], float]:
    """Return the distance of two pictures, BGR.

    LPIPS: sum over layers of the mean over places of |w (u - v)|^2, u and v the unit features of
    the pictures, w learned. 0 (equal) upwards; lower is better. Source: Zhang et al. 2018, Eq. 1.
    """
    first, second = network.inputs

    def distance(a: Image, b: Image) -> float:
        made = run({first: network.tensor(a), second: network.tensor(b)})
        return float(made[network.output].reshape(-1)[0])

    return distance


def embedder_of(
    network: MetricNetwork, run: Network
) -> Callable[[Image, Reading], npt.NDArray[np.floating]]:
    """Return the embedding of a face, float [E], cut out by its eyes, nose and mouth.

    Source: Deng et al. 2019, ArcFace; the five points and crop of 112 px of its alignment.
    """
    (name,) = network.inputs

    def embed(image: Image, face: Reading) -> npt.NDArray[np.floating]:
        crop = arcface_crop(image, face)
        return np.asarray(run({name: network.tensor(crop)})[network.output].reshape(-1))

    return embed


def arcface_crop(image_bgr: Image, face: Reading) -> Image:
    """Return the face upright in ArcFace's 112 x 112 px crop."""
    p = face.points
    five = np.stack(
        [p[EYE_A].mean(0), p[EYE_B].mean(0), p[NOSE_TIP], p[MOUTH_LEFT], p[MOUTH_RIGHT]]
    )
    scale, turn, shift = fit_similarity(five, ARCFACE_POINTS)
    matrix = np.concatenate([scale * turn, shift[:, None]], axis=1)
    side = (ARCFACE_SIDE, ARCFACE_SIDE)
    return np.asarray(cv2.warpAffine(image_bgr, matrix, side, flags=cv2.INTER_LINEAR), np.uint8)


def described(networks: Mapping[str, MetricNetwork]) -> dict[str, str]:
    """Return what was used, for the head of a run: name -> file and hash."""
    return {name: f"{each.file} sha256 {each.sha256}" for name, each in networks.items()}
