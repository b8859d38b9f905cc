"""The measures that a table may have: what they are called, which way is better, how they read."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

Better = Literal["higher", "lower", "zero", "none"]


@dataclass(frozen=True)
class Column:
    """title: of the table; better: which way; digits: after the point; note: formula in a line."""

    title: str
    better: Better
    digits: int
    note: str


PSNR_CEILING_DB = 100.0  # of a frame: equal pictures have no finite one, and a mean needs numbers

# Of a frame.
FRAME_COLUMNS = {
    "psnr": Column("PSNR, dB", "higher", 2, "10 log10(255^2 / MSE), at most 100 a frame"),
    "ssim": Column("SSIM", "higher", 3, "Gaussian window of 11 px, sigma 1.5"),
    "l1": Column("L1", "lower", 4, "mean |difference| of values in 0..1"),
    "lpips": Column("LPIPS", "lower", 3, "the network given with --networks"),
    "perceptual_rendered": Column(
        "perceptual (ours)", "lower", 3, "LPIPS' formula on a network of rendered faces"
    ),
    "psnr_face": Column("PSNR of the face, dB", "higher", 2, "inside the true mask of skin and so"),
    "csim": Column("CSIM", "higher", 3, "cosine of ArcFace embeddings, with the source"),
    "nme": Column("NME", "lower", 4, "landmarks' error over the distance of outer eye corners"),
    "gaze_px": Column("gaze, px", "lower", 2, "iris' place from the centre of its eye"),
    "apd": Column("APD, deg", "lower", 2, "mean |difference| of yaw, pitch and roll"),
    "aed": Column("AED", "lower", 4, "mean |difference| of expression coefficients"),
    "brightness": Column("brightness", "zero", 4, "difference of mean luma, values in 0..1"),
}
# Of a clip.
CLIP_COLUMNS = {
    "tl_id": Column("TL-ID", "higher", 3, "cosine of neighbouring frames' embeddings"),
    "tg_id": Column("TG-ID", "higher", 3, "cosine of all pairs of frames' embeddings"),
    "tl_id_ratio": Column("TL-ID / real", "higher", 3, "over the real clip's own"),
    "tg_id_ratio": Column("TG-ID / real", "higher", 3, "over the real clip's own"),
    "flicker": Column("flicker", "lower", 4, "change between frames that the real clip lacks"),
    "jitter": Column("jitter", "none", 4, "landmarks' acceleration over the eyes' distance"),
    "jitter_real": Column("jitter of the real", "none", 4, "the same of the real clip"),
}
COLUMNS = {**FRAME_COLUMNS, **CLIP_COLUMNS}

# What may be wrong with a frame; each is counted, none is dropped in silence.
DAMAGES = {
    "missing": "the reference has this frame, the result does not",
    "extra": "the result has this frame, the reference does not",
    "unreadable_result": "the result's picture cannot be decoded",
    "unreadable_reference": "the reference's picture cannot be decoded",
}
COUNTS = (*DAMAGES, "resized", "no_face", "no_face_reference", "unusable_clips")


def improvement(name: str, change: float) -> float:
    """Return a change as one for the better: its sign turned where lower is better; of a measure
    whose best is zero, or that has no direction, it means nothing and is 0."""
    return {"higher": change, "lower": -change}.get(COLUMNS[name].better, 0.0)


def text_of(name: str, value: float | None) -> str:
    """Return a value with the digits of its column; a dash where there is none."""
    return "-" if value is None else f"{value:.{COLUMNS[name].digits}f}"
