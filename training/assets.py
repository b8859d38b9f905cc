"""The pictures and clips the package ships, rendered: portraits, the driving clip, landmark model.

`python -m diffusionact.training.assets` rewrites them under `diffusionact/assets`; the result
depends on the seeds below only.
"""

from __future__ import annotations

import argparse
import os
from fractions import Fraction
from pathlib import Path

import av
import cv2
import numpy as np
from numpy.typing import NDArray

from diffusionact.landmarks import Landmarks, Track, sidecar_path
from diffusionact.training.face_shape import EXPRESSION, face_shape
from diffusionact.training.faces import (
    FRAME_CENTRE_Y,
    Camera,
    Identity,
    Motion,
    render,
    sample_identity,
    scene,
)

PORTRAIT_SEED, DRIVER_SEED = 7_000, 7_100  # streams no pool uses
PORTRAITS = {
    "ada": 23,
    "bruno": 25,
    "chidi": 12,
    "dede": 18,
    "elif": 24,
    "goro": 30,
    "hana": 32,
    "iris": 4,
}
PORTRAIT_PX, DRIVER_PX = 384, 320
PORTRAIT_CAMERA = Camera(4.4, np.array([0.0, 0.22], np.float32))
FRAMES, FPS = 100, 25


def portrait_identity(number: int) -> Identity:
    """The person of portrait stream `number`."""
    return sample_identity(np.random.default_rng((PORTRAIT_SEED, number)))


def driver_identity(number: int = 8) -> Identity:
    """The person of the driving clip."""
    return sample_identity(np.random.default_rng((DRIVER_SEED, number)))


def neutral() -> Motion:
    """Frontal, at rest, looking at the viewer."""
    return Motion(
        np.zeros(3, np.float32),
        np.zeros(len(EXPRESSION), np.float32),
        np.zeros(2, np.float32),
        np.zeros(3, np.float32),
    )


def _pulse(t: NDArray[np.float64], at: float, width: float) -> NDArray[np.float64]:
    return np.asarray(np.exp(-(((t - at) / width) ** 2) * 2.5))


def driver_motion() -> list[Motion]:
    """A hundred frames, 4 s: looks about, talks, smiles, blinks, frowns; ends where it began."""
    t = np.linspace(0, 1, FRAMES)
    yaw = 26 * _pulse(t, 0.17, 0.09) - 30 * _pulse(t, 0.37, 0.11) + 14 * _pulse(t, 0.62, 0.12)
    pitch = 10 * _pulse(t, 0.27, 0.07) - 11 * _pulse(t, 0.53, 0.08) + 5 * _pulse(t, 0.8, 0.06)
    roll = 13 * _pulse(t, 0.72, 0.08) - 13 * _pulse(t, 0.86, 0.07) + 5 * _pulse(t, 0.3, 0.07)
    talk = np.clip(_pulse(t, 0.48, 0.16), 0, 1) * (0.5 - 0.5 * np.cos(t * 2 * np.pi * 14))
    moves = {
        "jaw_open": 0.55 * talk + 0.62 * _pulse(t, 0.68, 0.05),
        "pucker": 0.7 * _pulse(t, 0.425, 0.03) + 0.5 * _pulse(t, 0.545, 0.03),
        "smile": 0.95 * _pulse(t, 0.78, 0.11) + 0.45 * _pulse(t, 0.1, 0.06),
        "lip_raise": 0.5 * _pulse(t, 0.78, 0.09),
        "squint": 0.5 * _pulse(t, 0.78, 0.1),
        "brows_up": 0.9 * _pulse(t, 0.66, 0.06) + 0.4 * _pulse(t, 0.2, 0.05),
        "brows_down": 0.9 * _pulse(t, 0.9, 0.05),
        "frown": 0.75 * _pulse(t, 0.9, 0.05),
    }
    blink = sum(_pulse(t, at, 0.018) for at in (0.06, 0.3, 0.57, 0.835, 0.955))
    moves["blink_a"] = moves["blink_b"] = np.clip(blink, 0, 1)
    look = 24 * _pulse(t, 0.12, 0.06) - 26 * _pulse(t, 0.33, 0.07) + 20 * _pulse(t, 0.6, 0.05)
    raise_ = -12 * _pulse(t, 0.5, 0.05) + 12 * _pulse(t, 0.25, 0.05)
    table = np.zeros((FRAMES, len(EXPRESSION)), np.float32)
    for name, values in moves.items():
        table[:, EXPRESSION.index(name)] = np.clip(values, 0, 1)
    pose = np.stack([yaw, pitch, roll], 1).astype(np.float32)
    gaze = np.stack([look, raise_], 1).astype(np.float32)
    return [Motion(pose[i], table[i], gaze[i], np.zeros(3, np.float32)) for i in range(FRAMES)]


def write_face68(path: Path) -> None:
    """Write the landmark model that `diffusionact.morphable.rendered_face` reads."""
    model = face_shape().model
    rows = model.landmark_vertices[:, 0]
    _replace(
        path,
        lambda temporary: np.savez_compressed(
            temporary,
            template=model.template[rows].astype(np.float32),
            identity_basis=model.identity_basis[:, rows].astype(np.float32),
            expression_basis=model.expression_basis[:, rows].astype(np.float32),
        ),
    )


def write_portraits(folder: Path) -> None:
    """Write NAME.png, a frontal portrait, and NAME.landmarks.npz beside it, for each of PORTRAITS."""
    folder.mkdir(parents=True, exist_ok=True)
    for name, number in PORTRAITS.items():
        made = render(portrait_identity(number), neutral(), PORTRAIT_CAMERA, PORTRAIT_PX)
        _replace(folder / f"{name}.png", lambda t, i=made.image: cv2.imwrite(str(t), i[..., ::-1]))
        _track([made.landmarks], PORTRAIT_PX).save(sidecar_path(folder / f"{name}.png"))


def write_driver(path: Path) -> None:
    """Write the driving clip and, beside it as NAME.landmarks.npz, its exact landmarks."""
    stage = scene(driver_identity())
    camera = Camera(4.4, np.array([0.0, FRAME_CENTRE_Y + 0.1], np.float32))
    frames = [render(stage, motion, camera, DRIVER_PX) for motion in driver_motion()]
    _replace(path, lambda temporary: _encode(temporary, [frame.image for frame in frames]))
    _track([frame.landmarks for frame in frames], DRIVER_PX).save(sidecar_path(path))


def _encode(path: Path, images: list[NDArray[np.uint8]]) -> None:
    with av.open(str(path), "w", format="mp4") as container:
        stream = container.add_stream("libx264", rate=FPS, options={"crf": "20"})
        stream.height, stream.width = images[0].shape[:2]
        stream.pix_fmt = "yuv420p"
        stream.time_base = Fraction(1, FPS)
        for image in images:
            container.mux(stream.encode(av.VideoFrame.from_ndarray(image, format="rgb24")))
        container.mux(stream.encode())


def _track(frames: list[Landmarks], side: int) -> Track:
    return Track(
        np.stack([frame.points for frame in frames]),
        np.stack([frame.gaze for frame in frames]),
        np.arange(len(frames), dtype=np.int64) * (1_000_000_000 // FPS),
        (side, side),
    )


def _replace(path: Path, write: object) -> None:
    temporary = path.with_name(f".part-{path.name}")
    assert callable(write)
    write(temporary)
    os.replace(temporary, path)


def main() -> None:
    parser = argparse.ArgumentParser(description="Render the package's portraits and driving clip.")
    parser.add_argument("-o", "--out", type=Path, default=Path("diffusionact/assets"))
    out: Path = parser.parse_args().out
    out.mkdir(parents=True, exist_ok=True)
    write_face68(out / "face68.npz")
    write_portraits(out / "portraits")
    write_driver(out / "driver.mp4")


if __name__ == "__main__":
    main()
