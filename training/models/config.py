"""Network sizes: the published ones and the shipped one."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Literal

from diffusionact.decode import DecodeError, decode
from diffusionact.errors import SettingsError
from diffusionact.schedule import Prediction

# "mean" forgets where things are; "flat" keeps a weight for every cell.
CodePool = Literal["mean", "flat"]


@dataclass(frozen=True)
class NetworkConfig:
    """The numbers that fix every tensor's name and shape.

    The network sees the image in pixel blocks of `block_size` x `block_size`: the grid it works on
    has `image_size / block_size` cells a side, and `attention_at` counts grid cells.

    Source: Preechakul et al., Diffusion Autoencoders, Table 6, for the FFHQ values.
    """

    image_size: int  # px, square
    channels: int  # width of the first level
    channel_mult: tuple[int, ...]  # width of each U-Net level, in `channels`
    encoder_mult: tuple[int, ...]  # the same for the encoders
    res_blocks: int = 2  # a level on the way down; one more on the way up
    attention_at: tuple[int, ...] = (16,)  # grid sides with self-attention
    embed: int = 512  # width of the time vector and of z
    block_size: int = 1  # px a side of one grid cell
    prediction: Prediction = "eps"
    positions: bool = False  # learned maps that tell the U-Net where a cell lies
    code_channels: int = 0  # of a map that z adds at the bottom of the U-Net; published: none
    keypoints: int = 0  # that z places on the U-Net's grid as soft dots; published: none
    code_pool: CodePool = "mean"  # how the encoders' last map becomes z; published: mean
    dropout: float = 0.0

    def __post_init__(self) -> None:
        for name, mult in (
            ("channel_mult", self.channel_mult),
            ("encoder_mult", self.encoder_mult),
        ):
            smallest_px = self.block_size * 2 ** (len(mult) - 1)
            if not mult or self.image_size % smallest_px:
                raise SettingsError(
                    f"image_size {self.image_size} cannot be halved for every level of {name} "
                    f"{mult}: it must be a multiple of {smallest_px}; change one of the two"
                )

    @property
    def grid(self) -> int:
        """Cells a side at the first level."""
        return self.image_size // self.block_size

    @property
    def image_channels(self) -> int:
        """Colour values in one grid cell."""
        return 3 * self.block_size**2

    def to_dict(self) -> dict[str, Any]:
        """The fields as JSON values."""
        values: dict[str, Any] = json.loads(json.dumps(asdict(self)))
        return values

    @classmethod
    def from_dict(cls, values: Mapping[str, Any]) -> NetworkConfig:
        """The configuration written by `to_dict`.

        Raises:
            SettingsError: a field is unknown, missing or of another type.
        """
        try:
            return decode(cls, values)
        except DecodeError as error:
            raise SettingsError(
                f"network configuration: {error}; written by another version: upgrade diffusionact"
            ) from error


FFHQ256 = NetworkConfig(256, 128, (1, 1, 2, 2, 4, 4), (1, 1, 2, 2, 4, 4, 4), dropout=0.1)
FFHQ128 = NetworkConfig(128, 128, (1, 1, 2, 3, 4), (1, 1, 2, 3, 4, 4), dropout=0.1)
FFHQ64 = NetworkConfig(64, 64, (1, 2, 4, 8), (1, 2, 4, 8, 8), dropout=0.1)
FACE128 = NetworkConfig(
    image_size=128,
    channels=64,
    channel_mult=(1, 2, 2),
    encoder_mult=(1, 2, 3, 3),
    res_blocks=1,
    attention_at=(8,),
    embed=256,
    block_size=4,
    prediction="x0",
    positions=True,
    code_channels=32,
    keypoints=70,
    code_pool="flat",
)
# The same at a quarter of the side, for experiments that take minutes of one core.
FACE32 = NetworkConfig(
    image_size=32,
    channels=24,
    channel_mult=(1, 2, 2),
    encoder_mult=(1, 2, 3),
    res_blocks=1,
    attention_at=(4,),
    embed=128,
    block_size=2,
    prediction="x0",
    positions=True,
    code_channels=16,
    keypoints=70,
    code_pool="flat",
)
PRESETS: Mapping[str, NetworkConfig] = {
    "ffhq256": FFHQ256,
    "ffhq128": FFHQ128,
    "ffhq64": FFHQ64,
    "face128": FACE128,
    "face32": FACE32,
}
