"""What a portrait becomes before the first frame."""

from __future__ import annotations

import os
from dataclasses import dataclass
from functools import cached_property
from typing import Any, TypeAlias

import numpy as np
import numpy.typing as npt

from diffusionact.errors import MediaError, SettingsError
from diffusionact.image import to_tensor
from diffusionact.landmarks import Landmarks, load_npz, save_npz
from diffusionact.runtime.paste import Paster

UInt8Array: TypeAlias = npt.NDArray[np.uint8]
Float32Array: TypeAlias = npt.NDArray[np.float32]
Float64Array: TypeAlias = npt.NDArray[np.float64]

FORMAT = 1


@dataclass(frozen=True, eq=False)
class Source:
    """A portrait made ready.

    portrait: uint8 [H,W,3], BGR; crop: uint8 [S,S,3], RGB; landmarks: in crop px;
    matrix: float64 [2,3], portrait px -> crop px; x_T: float32 [1,3,S,S], the stochastic code;
    weights_sha256: of the weights that made x_T.
    """

    portrait: UInt8Array
    crop: UInt8Array
    landmarks: Landmarks
    matrix: Float64Array
    x_T: Float32Array
    weights_sha256: str

    @cached_property
    def image(self) -> Float32Array:
        """The crop as the networks see it, float32 [1,3,S,S] in [-1, 1], RGB; read-only."""
        image = to_tensor(self.crop)
        image.setflags(write=False)
        return image

    @cached_property
    def paster(self) -> Paster:
        """The way of a crop back into the portrait."""
        return Paster(self.portrait, self.matrix, len(self.crop))

    def check_made_by(self, weights_sha256: str) -> None:
        """Return nothing when these weights made the source.

        Raises: SettingsError otherwise: the codes of one model mean nothing to another.
        """
        if self.weights_sha256 != weights_sha256:
            raise SettingsError(
                f"this source was prepared with weights {self.weights_sha256[:12]}, the bundle has "
                f"{weights_sha256[:12]}: prepare the portrait again with this bundle"
            )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Return nothing; the file (.npz) is complete or not there at all.

        Raises: MediaError when it cannot be written.
        """
        codes = self.landmarks.codes
        save_npz(
            path,
            format=np.array(FORMAT),
            portrait=self.portrait,
            crop=self.crop,
            points=self.landmarks.points,
            gaze=self.landmarks.gaze,
            score=np.array(self.landmarks.score),
            matrix=self.matrix,
            x_T=self.x_T,
            weights_sha256=np.array(self.weights_sha256),
            **({} if codes is None else {"codes": codes}),
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Source:
        """Return the source of a file that `save` wrote.

        Raises: MediaError when the file is missing, broken or something else. Whether it fits
        the weights shows when it is first used.
        """
        arrays = load_npz(path, "prepared source")
        if "format" not in arrays or int(arrays["format"]) != FORMAT:
            raise MediaError(
                f"{path}: not a prepared source of format {FORMAT}; prepare the portrait again"
            )
        try:
            codes = _float32(arrays["codes"]) if "codes" in arrays else None
            found = Landmarks(
                _float32(arrays["points"]), _float32(arrays["gaze"]), float(arrays["score"]), codes
            )
            return cls(
                portrait=np.ascontiguousarray(arrays["portrait"], np.uint8),
                crop=np.ascontiguousarray(arrays["crop"], np.uint8),
                landmarks=found,
                matrix=np.ascontiguousarray(arrays["matrix"], np.float64),
                x_T=_float32(arrays["x_T"]),
                weights_sha256=str(arrays["weights_sha256"]),
            )
        except KeyError as error:
            raise MediaError(
                f"{path}: the prepared source lacks {error}; prepare the portrait again"
            ) from None


def _float32(array: npt.NDArray[Any]) -> Float32Array:
    return np.ascontiguousarray(array, np.float32)
