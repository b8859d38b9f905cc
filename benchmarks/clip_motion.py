"""How well a portrait follows its driver over a clip, read by the judge.

    python -m benchmarks.clip_motion --json benchmarks/results/clip_motion.json

Without other names: the shipped portrait, clip and bundle, as in the demo. The driver must show a
rendered face, for that is what the judge can read; its frames are cut by one fixed square, so that
nothing but the face moves in them.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffusionact.assets import driver_path, portrait_paths
from diffusionact.errors import MediaError, SettingsError
from diffusionact.evaluation import metrics
from diffusionact.image import bgr_to_rgb, warp_crop
from diffusionact.landmarks import Landmarks, Track, crop_matrix
from diffusionact.runtime.clip import prepare_portrait
from diffusionact.runtime.media import FRAME_NS, open_reader
from diffusionact.runtime.motion import driver_motion
from diffusionact.runtime.reenactor import Reenactor
from diffusionact.runtime.source import Source
from diffusionact.training.models.judge import Judge, Reading, load_judge

Frames = NDArray[np.uint8]

# What the shipped demo must reach.
REQUIRED = {"yaw": 0.8, "roll": 0.8, "mouth": 0.6}
MAX_FROZEN_DIFFERENCE = 0.1  # grey levels
SETTLE_FRAMES, FROZEN_FRAMES = 25, 8  # a second for the smoothing to end, then what is compared


@dataclass(frozen=True)
class ClipMotion:
    """Pearson correlations of driver and result over a clip: the head's angles, the openings of
    mouth and eyes, and the gaze's offset from the centre of the eyes along x and y."""

    frames: int
    yaw: float
    pitch: float
    roll: float
    mouth: float
    eyes: float
    gaze_x: float
    gaze_y: float

    @property
    def passed(self) -> bool:
        """Whether yaw, roll and mouth follow as the shipped demo must."""
        return all(getattr(self, name) >= least for name, least in REQUIRED.items())


def clip_motion(judge: Judge, driver: Frames, result: Frames) -> ClipMotion:
    """How a result follows its driver.

    driver, result: uint8 [N,S,S,3], RGB, the judge's size, the same N moments
    Raises: SettingsError when the counts differ or the sizes are not the judge's.
    """
    if len(driver) != len(result):
        raise SettingsError(
            f"the driver has {len(driver)} frames, the result {len(result)}; "
            "compare clips of the same moments"
        )
    return correlations(judge.read(driver), judge.read(result))


def correlations(driver: Reading, result: Reading) -> ClipMotion:
    """The correlations of two readings of the same moments."""
    a, b = _series(driver), _series(result)
    return ClipMotion(
        frames=len(driver.pose),
        **{name: metrics.correlation(a[name], b[name]) for name in a},
    )


def _series(reading: Reading) -> dict[str, NDArray[np.float64]]:
    gaze = metrics.gaze_offset(reading.gaze, reading.points).mean(axis=1)
    angles = reading.pose.astype(np.float64)
    return {
        "yaw": angles[:, 0],
        "pitch": angles[:, 1],
        "roll": angles[:, 2],
        "mouth": metrics.mouth_opening(reading.points),
        "eyes": metrics.eye_opening(reading.points).mean(axis=1),
        "gaze_x": gaze[:, 0],
        "gaze_y": gaze[:, 1],
    }


def frozen_difference(frames: Sequence[NDArray[np.uint8]]) -> float:
    """The largest mean absolute difference, in grey levels, of any frame from the first: what a
    driver that does not move leaves to see."""
    first = frames[0].astype(np.float64)
    return max((float(np.abs(frame - first).mean()) for frame in frames[1:]), default=math.nan)


@dataclass(frozen=True)
class Made:
    """A clip as the judge reads it, where the driver shows a face, and what came after it.

    driver, result: uint8 [N,S,S,3] RGB; frozen: uint8 [H,W,3], of a driver that stands still
    """

    driver: Frames
    result: Frames
    frozen: list[Frames]


def reenact_clip(act: Reenactor, source: Source, driver: str | Path) -> Made:
    """What the runtime makes of a driver, who then stands still at the last face.

    Raises: MediaError when the driver is no video, NoFace when none is found in it.
    """
    reader = open_reader(driver)
    track = driver_motion(act, reader).track
    act.start_session(source, track)
    matrix, side = _fixed_crop(track, act), act.manifest.image_size
    seen, made, last = [], [], None
    for i, frame in enumerate(reader):
        if frame.image_bgr is None:
            raise MediaError(f"{driver}: a landmark track has no pictures; wanted a video")
        result = act.reenact(track[i], source, frame.pts_ns)
        if (face := track[i]) is not None:
            last = face, frame.pts_ns
            seen.append(warp_crop(bgr_to_rgb(frame.image_bgr), matrix, side))
            made.append(bgr_to_rgb(result.crop))
    if last is None:
        raise MediaError(f"{driver}: no frame with a face can be read")
    return Made(np.stack(seen), np.stack(made), _stand_still(act, source, *last))


def _stand_still(act: Reenactor, source: Source, face: Landmarks, pts_ns: int) -> list[Frames]:
    frames = [
        act.reenact(face, source, pts_ns + i * FRAME_NS).frame
        for i in range(1, SETTLE_FRAMES + FROZEN_FRAMES + 1)
    ]
    return frames[SETTLE_FRAMES:]


def _fixed_crop(track: Track, act: Reenactor) -> NDArray[np.float64]:
    """One crop for the whole clip, about the face's median place and size."""
    crop, side = act.manifest.crop, act.manifest.image_size
    return crop_matrix(np.nanmedian(track.landmarks, axis=0), side, crop.rotate, crop.scale)


def measure(act: Reenactor, judge: Judge, portrait: Path, driver: Path) -> tuple[ClipMotion, float]:
    """How a portrait follows a driver, and the frozen driver's difference in grey levels."""
    source = prepare_portrait(act, portrait)
    made = reenact_clip(act, source, driver)
    return clip_motion(judge, made.driver, made.result), frozen_difference(made.frozen)


def main() -> None:
    parser = argparse.ArgumentParser(description="Correlate a portrait's motion with its driver's.")
    root = Path(__file__).parents[1]
    weights = root / "training" / "checkpoints" / "judge.safetensors"
    parser.add_argument("--bundle", type=Path, default=root / "diffusionact/assets/face.bundle")
    parser.add_argument("--portrait", type=Path, default=portrait_paths()[0])
    parser.add_argument("--driver", type=Path, default=driver_path())
    parser.add_argument("--judge", type=Path, default=weights)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    judge, _ = load_judge(arguments.judge)
    with Reenactor.load(arguments.bundle) as act:
        motion, frozen = measure(act, judge, arguments.portrait, arguments.driver)
    values = {
        **asdict(motion),
        "frozen_difference": frozen,
        "passed": motion.passed and frozen < MAX_FROZEN_DIFFERENCE,
    }
    for name, value in values.items():
        print(f"{name:18} {value:.3f}" if isinstance(value, float) else f"{name:18} {value}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        arguments.json.write_text(json.dumps(values) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
