"""How much of the driver's face shape is in the drawing: landmarks as detected, and Eq. 8.

    python -m benchmarks.shape_leak --json benchmarks/results/shape_leak.json

The paper's Fig. 6 shows what the landmarks of a detector do: they carry the driver's face shape
into the result. Here it is a number, on the face model that renders our data, where the drawing
that a pair should have is known: the source's shape with the driver's expression and pose.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from diffusionact.errors import NoFace
from diffusionact.landmarks import Landmarks, crop_matrix
from diffusionact.morphable import Morphable, pose, project, rendered_face, rotation
from diffusionact.runtime.retarget import Retargeter, RetargetSettings
from diffusionact.runtime.tracker import Tracker, open_tracker
from diffusionact.training.faces import (
    Identity,
    Motion,
    Rendering,
    render,
    sample_camera,
    sample_identity,
    sample_motion,
)

Points = NDArray[np.float64]

SIDE_PX = 256
POSE_LIMIT_DEG = np.array([25.0, 15.0, 15.0])  # beyond it the contour that is seen is another
LAYOUT_PICTURES = 40  # that tell how MediaPipe's 68 points lie beside ours
# The fit of Eq. 7: a point's error, px of the crop; spread of expressions; of angles, degrees.
POINT_PX, EXPRESSION_SPREAD, ANGLE_SPREAD_DEG, SWEEPS = 1.5, 0.5, 20.0, 15
METHODS = {
    "driver_exact": "the driver's landmarks, exact",
    "driver_detected": "the driver's landmarks, detected (MediaPipe)",
    "eq8_exact": "Eq. 8, codes exact",
    "eq8_fitted": "Eq. 8, codes fitted to exact landmarks of one picture each",
    "eq8_read": "Eq. 8, codes fitted to detected landmarks of one picture each",
    "retargeted": "ours: motion of detected landmarks, relative to the neutral face",
}


@dataclass(frozen=True)
class Leak:
    """share: of the way from the drawing that is due to the driver's own, mean and standard
    deviation over pairs (0: the source's shape, 1: the driver's); error_px: mean distance from
    the drawing that is due, of a crop of 256; nearer_driver: share of drawings whose fitted shape
    is nearer to the driver's than to the source's."""

    pairs: int
    share: float
    share_std: float
    error_px: float
    nearer_driver: float


@dataclass(frozen=True)
class Codes:
    """identity [I]; expression [E]; angles_deg [3]: yaw, pitch, roll."""

    identity: Points
    expression: Points
    angles_deg: Points


def measure(pairs: int, seed: int = 0, tracker: Tracker | None = None) -> Mapping[str, Leak]:
    """The leak of every method over random pairs of people who do not exist.

    Raises: BackendMissing where no tracker is installed.
    """
    own = tracker is None
    tracker = tracker or open_tracker()
    rng = np.random.default_rng(seed)
    layout = layout_offset(rng, tracker)
    seen: dict[str, list[tuple[float, float, bool]]] = {name: [] for name in METHODS}
    while len(seen["eq8_exact"]) < pairs:
        try:
            pair = Pair.sample(rng, tracker)
        except NoFace:  # MediaPipe does not see every rendered face
            continue
        for name, drawing in pair.drawings(layout).items():
            seen[name].append(pair.judged(drawing))
    if own:
        tracker.close()
    return {name: _summary(values) for name, values in seen.items()}


def _summary(values: list[tuple[float, float, bool]]) -> Leak:
    shares, errors, nearer = (np.array(column, float) for column in zip(*values, strict=True))
    return Leak(
        pairs=len(values),
        share=float(shares.mean()),
        share_std=float(shares.std()),
        error_px=float(errors.mean()),
        nearer_driver=float(nearer.mean()),
    )


@dataclass(frozen=True)
class Pair:
    """A source and a driver. due: what should be drawn; neutral: the driver at rest."""

    source: Identity
    driver: Identity
    source_picture: Rendering
    driver_picture: Rendering
    due: Landmarks
    source_found: Landmarks
    driver_found: Landmarks
    neutral_found: Landmarks

    @classmethod
    def sample(cls, rng: np.random.Generator, tracker: Tracker) -> Pair:
        """Raises: NoFace when the tracker misses one of the pictures."""
        source, driver = sample_identity(rng), sample_identity(rng)
        camera = sample_camera(rng)
        at_source, at_driver = _moderate(sample_motion(rng)), _moderate(sample_motion(rng))
        pictures = [
            render(who, motion, camera, SIDE_PX)
            for who, motion in (
                (source, at_source),
                (driver, at_driver),
                (driver, _at_rest(at_driver)),
            )
        ]
        found = [_found(tracker, picture) for picture in pictures]
        due = render(source, at_driver, camera, SIDE_PX).landmarks
        return cls(source, driver, pictures[0], pictures[1], due, *found)

    def drawings(self, layout: Points) -> dict[str, Points]:
        """The drawing's landmarks of every method, [68,2], px of the aligned crop.

        layout: what to take off detected landmarks, see `layout_offset`.
        """
        face = rendered_face()
        expression = self.driver_picture.expression.astype(np.float64)
        exact = Codes(self.source.shape.astype(np.float64), expression, self._angles())
        pictures = self.source_picture, self.driver_picture
        detected = [
            aligned(found.points) - layout for found in (self.source_found, self.driver_found)
        ]
        settings = RetargetSettings(smoothing=0.0, absolute_pose=True)
        retargeter = Retargeter(self.source_found, settings)
        retargeter.calibrate([self.neutral_found])
        return {
            "driver_exact": aligned(self.driver_picture.landmarks.points),
            "driver_detected": detected[1],
            "eq8_exact": aligned(drawn(face, exact)),
            "eq8_fitted": _mixed(*(aligned(picture.landmarks.points) for picture in pictures)),
            "eq8_read": _mixed(*detected),
            "retargeted": aligned(retargeter.target(self.driver_found).points) - layout,
        }

    def judged(self, drawing: Points) -> tuple[float, float, bool]:
        """The share of the driver's shape in a drawing, its error, px, and whose shape it shows."""
        due, driver = aligned(self.due.points), aligned(self.driver_picture.landmarks.points)
        way = (driver - due).ravel()
        share = float((drawing - due).ravel() @ way / (way @ way))
        error = float(np.linalg.norm(drawing - due, axis=1).mean())
        shape = fitted(drawing).identity
        far = [np.linalg.norm(shape - who.shape) for who in (self.source, self.driver)]
        return share, error, bool(far[1] < far[0])

    def _angles(self) -> Points:
        return self.driver_picture.pose.astype(np.float64)


def _moderate(motion: Motion) -> Motion:
    angles = np.clip(motion.pose, -POSE_LIMIT_DEG, POSE_LIMIT_DEG).astype(np.float32)
    return Motion(angles, motion.expression, motion.gaze, np.zeros(3, np.float32))


def _at_rest(motion: Motion) -> Motion:
    still = np.zeros(3, np.float32)
    return Motion(still, np.zeros_like(motion.expression), np.zeros(2, np.float32), still)


def _found(tracker: Tracker, picture: Rendering) -> Landmarks:
    faces = tracker.detect(np.ascontiguousarray(picture.image[..., ::-1]))
    if not faces:
        raise NoFace("no face in the rendered picture")
    return faces[0]


def layout_offset(rng: np.random.Generator, tracker: Tracker) -> Points:
    """How detected landmarks lie beside ours on average, [68,2], px of the aligned crop: two
    layouts of 68 points, which is not what is measured here."""
    offsets: list[Points] = []
    while len(offsets) < LAYOUT_PICTURES:
        motion = _moderate(sample_motion(rng))
        picture = render(sample_identity(rng), motion, sample_camera(rng), SIDE_PX)
        try:
            found = _found(tracker, picture)
        except NoFace:
            continue
        offsets.append(aligned(found.points) - aligned(picture.landmarks.points))
    return np.asarray(np.mean(offsets, axis=0))


def _mixed(source: Points, driver: Points) -> Points:
    """Eq. 8 from landmarks of both in the aligned crop, and those of the drawing there."""
    of_source, of_driver = fitted(source), fitted(driver)
    codes = Codes(of_source.identity, of_driver.expression, of_driver.angles_deg)
    return aligned(drawn(rendered_face(), codes))


def aligned(points: NDArray[np.floating]) -> Points:
    """Landmarks in px of the aligned crop, [68,2], as the published networks see every face."""
    matrix = crop_matrix(points, SIDE_PX, rotate=True)
    return np.asarray(points[:, :2] @ matrix[:, :2].T + matrix[:, 2], np.float64)


def drawn(face: Morphable, codes: Codes) -> Points:
    """The landmarks of a face with these codes, [68,3], px of a picture of its own."""
    points = face.landmarks(face.shape(codes.identity, codes.expression))
    turned = pose(points, rotation(codes.angles_deg), np.zeros(3), np.zeros(3))
    return np.asarray(project(turned, SIDE_PX / 4.0, np.full(2, SIDE_PX / 2.0)), np.float64)


def fitted(wanted: Points) -> Codes:
    """The codes whose landmarks come nearest to these, [68,2], px of the aligned crop:
    Gauss-Newton on Eq. 7 with a weak camera, under the priors that the renderer samples from."""
    face = rendered_face()
    basis = np.concatenate([face.identity_basis, face.expression_basis]).astype(np.float64)
    people, count = len(face.identity_basis), len(basis)
    prior = np.ones(count)
    prior[people:] = EXPRESSION_SPREAD
    numbers = np.zeros(count + 6)  # codes, angles, log of the scale, offset
    numbers[-3:] = np.log(SIDE_PX / 4.0), SIDE_PX / 2.0, SIDE_PX / 2.0
    weights = np.concatenate([1 / prior, np.full(3, 1 / ANGLE_SPREAD_DEG), np.zeros(3)])
    for _ in range(SWEEPS):
        seen, slopes = _seen(face, basis, numbers)
        rows = np.concatenate([slopes.T / POINT_PX, np.diag(weights)])
        left = np.concatenate([(wanted - seen).ravel() / POINT_PX, -weights * numbers])
        numbers = numbers + np.linalg.lstsq(rows, left, rcond=None)[0]
    return Codes(numbers[:people], numbers[people:count], numbers[count : count + 3])


def _seen(face: Morphable, basis: Points, numbers: Points) -> tuple[Points, Points]:
    """The landmarks [68,2], px, and their slopes [P,136]."""
    count = len(basis)
    vertices = face.template + np.tensordot(numbers[:count], basis, 1)
    angles_deg, scale, offset = numbers[count : count + 3], np.exp(numbers[-3]), numbers[-2:]

    def flat(points: Points, turns: Points) -> Points:
        return scale * np.asarray(points @ rotation(turns).T)[..., :2]

    plain = flat(vertices, angles_deg)
    turned = [flat(vertices, angles_deg + step) - plain for step in np.eye(3) * 1e-3]
    slopes = np.concatenate(
        [
            flat(basis, angles_deg).reshape(count, -1),
            np.stack(turned).reshape(3, -1) / 1e-3,
            plain.reshape(1, -1),
            np.tile(np.eye(2), (1, len(plain))),
        ]
    )
    return plain + offset, slopes


def main() -> None:
    parser = argparse.ArgumentParser(description="Measure the driver's face shape in drawings.")
    parser.add_argument("--pairs", type=int, default=200)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--json", type=Path)
    arguments = parser.parse_args()
    leaks = measure(arguments.pairs, arguments.seed)
    print(f"{'drawing':66} {'share of driver':>18} {'error px':>9} {'driver nearer':>14}")
    for name, leak in leaks.items():
        share = f"{leak.share:.3f} +- {leak.share_std:.3f}"
        nearer = f"{leak.nearer_driver:.1%}"
        print(f"{METHODS[name]:66} {share:>18} {leak.error_px:9.2f} {nearer:>14}")
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        values = {name: asdict(leak) for name, leak in leaks.items()}
        arguments.json.write_text(json.dumps(values, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
