"""Rendered faces with exact ground truth: a seed in, a picture and all that is in it out.

`sample_identity`, `sample_motion` and `sample_camera` draw what a picture depends on;
`render` makes it. Nobody is portrayed: shapes and colours are drawn from wide adult ranges.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import cv2
import numpy as np
from numpy.typing import NDArray

from diffusionact.landmarks import Landmarks
from diffusionact.morphable import pose, project, rotation
from diffusionact.training import rasterizer as raster
from diffusionact.training.accessories import Accessory, accessories
from diffusionact.training.face_shape import (
    EXPRESSION,
    IDENTITY,
    NECK_PIVOT,
    face_shape,
    identity_field,
)

Vector = NDArray[np.float32]
Bytes = NDArray[np.uint8]

SUPERSAMPLE = 2
# Frame side in head units: an FFHQ crop of the mean face, widened so that hair and neck fit.
FRAME_UNITS = 3.7
FRAME_CENTRE_Y = 0.09
POSE_RANGE_DEG = (45.0, 25.0, 25.0)  # yaw, pitch, roll
GAZE_RANGE_DEG = (35.0, 22.0)  # yaw, pitch
EYEBALL = (0.20, 0.16)  # head units the iris moves sideways and up per sine of the gaze

HAIR_STYLES = ("bald", "buzz", "short", "swept", "fringe", "bob", "long", "bun", "curly", "afro")
SKIN_TONES = np.array(
    [[0.93, 0.76, 0.67], [0.88, 0.68, 0.56], [0.80, 0.58, 0.44], [0.66, 0.45, 0.32],
     [0.49, 0.32, 0.22], [0.34, 0.215, 0.15]]
)  # fmt: skip
HAIR_TONES = np.array(
    [[0.08, 0.065, 0.06], [0.17, 0.10, 0.065], [0.30, 0.17, 0.09], [0.50, 0.30, 0.14],
     [0.76, 0.58, 0.33], [0.58, 0.22, 0.09], [0.62, 0.61, 0.60], [0.86, 0.85, 0.83]]
)  # fmt: skip
IRIS_TONES = np.array(
    [[0.28, 0.16, 0.08], [0.42, 0.26, 0.12], [0.40, 0.42, 0.22], [0.30, 0.46, 0.36],
     [0.30, 0.48, 0.66], [0.44, 0.52, 0.58]]
)  # fmt: skip


@dataclass(frozen=True)
class Identity:
    """A person who does not exist: shape, colours, hair, glasses, clothes, room and light.

    shape: float32 [I], standard normal, order `face_shape.IDENTITY`. Colours: float32 [3], sRGB.
    """

    shape: Vector
    skin: Vector
    hair: Vector
    iris: Vector
    lips: Vector
    clothes: Vector
    trim: Vector
    frames: Vector
    style: int
    hair_shape: Vector  # [4]: hairline, volume, length, parting, each 0..1
    glasses: int  # 0 none, 1 round, 2 square
    beard: float
    freckles: float
    lipstick: float
    lines: float
    gloss: float
    neckline: float
    stripes: float
    light_deg: Vector  # [2], azimuth and height
    light: Vector  # [3], brightness of key, sky, ground
    backdrop: int
    backdrop_colours: NDArray[np.float32]  # [3, 3]
    seed: int


@dataclass(frozen=True)
class Motion:
    """What a driver controls. pose: float32 [3] yaw, pitch, roll in degrees; expression: float32
    [E] in 0..1, order `face_shape.EXPRESSION`; gaze: float32 [2] yaw, pitch in degrees;
    shift: float32 [3], head units."""

    pose: Vector
    expression: Vector
    gaze: Vector
    shift: Vector


@dataclass(frozen=True)
class Camera:
    """Weak perspective. units: side of the frame in head units; centre: float32 [2], the point
    of the neutral head's plane in the middle of the frame, head units."""

    units: float
    centre: Vector


@dataclass(frozen=True)
class Rendering:
    """A picture and its ground truth.

    image: uint8 [S, S, 3] RGB; landmarks: px; pose, gaze_angles: degrees; expression: [E];
    labels: uint8 [S, S], 0 background, 1 skin, 2 eyes, 3 mouth and lips, 4 brows, 5 hair,
    6 clothes, 7 glasses; parameters: float32 [P], all the picture depends on, about -1..1.
    """

    image: Bytes
    landmarks: Landmarks
    pose: Vector
    expression: Vector
    gaze_angles: Vector
    labels: Bytes
    parameters: Vector


_LABELS = np.zeros(256, np.uint8)
_LABELS[[0, 1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11]] = [1, 2, 2, 2, 4, 3, 3, 5, 1, 6, 7, 1]


def _f32(*values: Any) -> Vector:
    return np.array(values, np.float32)


def _tone(rng: np.random.Generator, tones: NDArray[np.float64], jitter: float) -> Vector:
    at = rng.uniform(0, len(tones) - 1)
    i = int(at)
    mixed = tones[i] * (1 - at + i) + tones[min(i + 1, len(tones) - 1)] * (at - i)
    return np.asarray(np.clip(mixed * rng.normal(1, jitter, 3), 0.02, 0.97), np.float32)


def _vivid(rng: np.random.Generator, saturation: tuple[float, float] = (0.15, 0.75)) -> Vector:
    hsv = _f32(rng.uniform(0, 360), rng.uniform(*saturation), rng.uniform(0.25, 0.9))
    rgb: Vector = cv2.cvtColor(hsv[None, None], cv2.COLOR_HSV2RGB)[0, 0]
    return rgb


def sample_identity(rng: np.random.Generator) -> Identity:
    """A random adult."""
    skin = _tone(rng, SKIN_TONES, 0.03)
    feminine = rng.random() < 0.5
    weights = (
        np.array([0.0, 0.02, 0.06, 0.12, 0.18, 0.2, 0.22, 0.12, 0.05, 0.05])
        if feminine
        else np.array([0.08, 0.14, 0.27, 0.2, 0.11, 0.03, 0.03, 0.01, 0.08, 0.05])
    )
    style = int(rng.choice(len(HAIR_STYLES), p=weights / weights.sum()))
    made_up = rng.uniform(0.2, 1) if feminine and rng.random() < 0.6 else 0.0
    lips = skin * _f32(0.93, 0.66, 0.66)
    lips = lips * (1 - made_up) + made_up * _f32(*rng.uniform([0.5, 0.1, 0.12], [0.85, 0.32, 0.36]))
    shape = rng.normal(0, 1, len(IDENTITY)).clip(-2.2, 2.2).astype(np.float32)
    shape[IDENTITY.index("jaw")] += -0.5 if feminine else 0.5
    shape[IDENTITY.index("lip_fullness")] += 0.6 if feminine else -0.3
    return Identity(
        shape=shape,
        skin=skin,
        hair=_tone(rng, HAIR_TONES, 0.06),
        iris=_tone(rng, IRIS_TONES, 0.08),
        lips=lips.astype(np.float32),
        clothes=_vivid(rng),
        trim=_vivid(rng),
        frames=_vivid(rng, (0.0, 0.6)) * np.float32(rng.uniform(0.1, 0.8)),
        style=style,
        hair_shape=rng.random(4).astype(np.float32),
        glasses=int(rng.choice(3, p=[0.76, 0.12, 0.12])),
        beard=float(rng.uniform(0.25, 0.95)) if not feminine and rng.random() < 0.38 else 0.0,
        freckles=float(rng.random() < 0.15) * float(rng.uniform(0.3, 0.9)),
        lipstick=float(made_up),
        lines=float(rng.uniform(0, 1) ** 2),
        gloss=float(rng.uniform(0.08, 0.3)),
        neckline=float(rng.uniform(0.0, 0.32)),
        stripes=float(rng.choice([0.0, 22.0, 34.0], p=[0.75, 0.125, 0.125])),
        light_deg=_f32(rng.uniform(-60, 60), rng.uniform(5, 55)),
        light=_f32(rng.uniform(0.7, 1.05), rng.uniform(0.3, 0.5), rng.uniform(0.15, 0.35)),
        backdrop=int(rng.integers(5)),
        backdrop_colours=np.stack([_vivid(rng, (0.05, 0.6)) for _ in range(3)]),
        seed=int(rng.integers(1 << 20)),
    )


def sample_camera(rng: np.random.Generator) -> Camera:
    """A frame about the neutral head, off centre and scale by what real crops are."""
    zoom, x, y = np.clip(rng.normal(0, [0.05, 0.1, 0.1]), -0.25, 0.25)
    return Camera(FRAME_UNITS * float(np.exp(zoom)), _f32(x, FRAME_CENTRE_Y + y))


_MOODS: tuple[dict[str, tuple[float, float]], ...] = (
    {},
    {"jaw_open": (0.02, 0.75), "stretch": (0, 0.4), "pucker": (0, 0.3)},
    {"smile": (0.3, 1.0), "squint": (0, 0.8), "lip_raise": (0, 0.6)},
    {"smile": (0.5, 1.0), "jaw_open": (0.1, 0.6), "squint": (0.2, 1.0), "lip_raise": (0.2, 1)},
    {"jaw_open": (0.2, 0.9), "brows_up": (0.5, 1.0)},
    {"frown": (0.3, 1.0), "brows_down": (0.3, 1.0), "squint": (0, 0.6)},
    {"pucker": (0.4, 1.0), "jaw_open": (0, 0.35)},
    {"frown": (0.2, 0.9), "brows_inner_up": (0.4, 1.0)},
    {"lip_raise": (0.2, 1), "lip_drop": (0.3, 1), "stretch": (0.2, 0.9)},
    {"jaw_open": (0.0, 0.9), "smile": (0, 0.8), "pucker": (0, 0.5), "brows_up": (0, 1.0),
     "brows_down": (0, 0.5), "frown": (0, 0.5), "lip_raise": (0, 0.8), "lip_drop": (0, 0.8)},
)  # fmt: skip


def sample_motion(rng: np.random.Generator) -> Motion:
    """A random pose, expression and gaze within the training range."""
    wide = rng.random() < 0.35
    spread = _f32(20, 10, 9)
    limit = np.array(POSE_RANGE_DEG, np.float32)
    angles = rng.uniform(-limit, limit) if wide else rng.normal(0, spread)
    expression = np.zeros(len(EXPRESSION), np.float32)
    for name, (low, high) in _MOODS[rng.integers(len(_MOODS))].items():
        expression[EXPRESSION.index(name)] = rng.uniform(low, high)
    blink = rng.uniform(0.3, 1.0) if rng.random() < 0.22 else max(0.0, rng.normal(0, 0.06))
    wink = rng.uniform(0, 1) if rng.random() < 0.05 else 1.0
    pair = [blink, blink * wink] if rng.random() < 0.5 else [blink * wink, blink]
    expression[[EXPRESSION.index("blink_a"), EXPRESSION.index("blink_b")]] = pair
    gaze_limit = np.array(GAZE_RANGE_DEG, np.float32)
    gaze = rng.normal(0, 0.5, 2) * gaze_limit
    return Motion(
        np.clip(angles, -limit, limit).astype(np.float32),
        expression,
        np.clip(gaze, -gaze_limit, gaze_limit).astype(np.float32),
        rng.normal(0, [0.05, 0.04, 0.0]).clip(-0.12, 0.12).astype(np.float32),
    )


def parameters(identity: Identity, motion: Motion, camera: Camera) -> Vector:
    """Everything a picture depends on as one vector, float32 [P], each about -1..1."""
    style = np.eye(len(HAIR_STYLES), dtype=np.float32)[identity.style]
    glasses = np.eye(3, dtype=np.float32)[identity.glasses]
    backdrop = np.eye(5, dtype=np.float32)[identity.backdrop]
    colours = [identity.skin, identity.hair, identity.iris, identity.lips, identity.clothes,
               identity.trim, identity.frames * (identity.glasses > 0),
               identity.backdrop_colours.ravel()]  # fmt: skip
    return np.concatenate(
        [
            motion.pose / np.array(POSE_RANGE_DEG, np.float32),
            motion.gaze / np.array(GAZE_RANGE_DEG, np.float32),
            motion.expression * 2 - 1,
            motion.shift[:2] * 8,
            identity.shape / 2,
            np.concatenate(colours) * 2 - 1,
            style * 2 - 1,
            glasses * 2 - 1,
            backdrop * 2 - 1,
            identity.hair_shape * 2 - 1,
            _f32(identity.beard, identity.freckles, identity.lipstick, identity.lines) * 2 - 1,
            _f32(identity.neckline * 4 - 1, identity.stripes / 17 - 1),
            identity.light_deg / 60,
            identity.light * 2 - 1,
            _f32((camera.units / FRAME_UNITS - 1) * 8, *(camera.centre * 4)),
        ]
    ).astype(np.float32)


def _linear(srgb: Vector) -> Vector:
    return np.asarray(srgb, np.float32) ** np.float32(2.2)


def _look(identity: Identity, iris: NDArray[np.float64], hairline: float) -> raster.Look:
    azimuth, height = np.deg2rad(identity.light_deg)
    light = _f32(
        np.sin(azimuth) * np.cos(height), -np.sin(height), -np.cos(azimuth) * np.cos(height)
    )
    key, sky, ground = identity.light
    skin, hair = _linear(identity.skin), _linear(identity.hair)
    return raster.Look(
        skin=skin,
        blush=_linear(identity.skin * _f32(0.98, 0.74, 0.72)),
        lips=_linear(identity.lips),
        iris=_linear(identity.iris),
        hair=hair,
        brow=(hair * 0.55 + 0.004).astype(np.float32),
        clothes=_linear(identity.clothes),
        trim=_linear(identity.trim),
        frames=_linear(identity.frames),
        light_colour=_f32(1.0, 0.96, 0.9) * key,
        light=light,
        sky=_f32(0.92, 0.97, 1.05) * sky,
        ground=_f32(1.05, 0.95, 0.88) * ground,
        beard=identity.beard,
        freckles=identity.freckles,
        lipstick=identity.lipstick,
        lines=identity.lines,
        gloss=identity.gloss,
        neckline=identity.neckline,
        stripes=identity.stripes,
        iris_a=iris[0].astype(np.float32),
        iris_b=iris[1].astype(np.float32),
        hairline=hairline,
        seed=float(identity.seed % 97),
    )


def _backdrop(identity: Identity, side: int) -> NDArray[np.float32]:
    """A soft room behind the head: float32 [side, side, 3], linear RGB."""
    rng = np.random.default_rng(identity.seed)
    a, b, c = (_linear(colour) for colour in identity.backdrop_colours)
    small = 64
    y, x = np.mgrid[0:small, 0:small].astype(np.float32) / (small - 1)
    if identity.backdrop == 1:
        t = np.clip(np.hypot(x - rng.uniform(0.2, 0.8), y - rng.uniform(0.1, 0.6)) * 1.2, 0, 1)
    else:
        angle = rng.uniform(0, 2 * np.pi)
        t = np.clip(0.5 + (x - 0.5) * np.cos(angle) + (y - 0.5) * np.sin(angle), 0, 1)
    image = a * (1 - t[..., None]) + b * t[..., None]
    if identity.backdrop == 2:  # lights out of focus
        for _ in range(int(rng.integers(5, 12))):
            spot = np.zeros((small, small), np.float32)
            place = rng.integers(0, small, 2).tolist()
            cv2.circle(spot, place, int(rng.integers(3, 9)), 1.0, -1, cv2.LINE_AA)
            image = image + spot[..., None] * c * np.float32(rng.uniform(0.15, 0.6))
    elif identity.backdrop == 3:  # shelves, frames, windows
        for _ in range(int(rng.integers(3, 7))):
            corner = rng.integers(-8, small, 2)
            size = rng.integers(8, 36, 2)
            tint = c * np.float32(rng.uniform(0.3, 1.2)) + a * np.float32(rng.uniform(0, 0.3))
            cv2.rectangle(image, corner.tolist(), (corner + size).tolist(), tint.tolist(), -1)
    elif identity.backdrop == 4:  # broad stripes
        angle = rng.uniform(-0.8, 0.8)
        wave = np.sin((x * np.cos(angle) + y * np.sin(angle)) * rng.uniform(14, 26)) > 0.2
        image = np.where(wave[..., None], image, image * 0.5 + c * 0.5)
    image = cv2.GaussianBlur(np.ascontiguousarray(image, np.float32), (0, 0), 2.2)
    return np.asarray(cv2.resize(image, (side, side), interpolation=cv2.INTER_CUBIC), np.float32)


@dataclass(frozen=True)
class _Scene:
    """What an identity's frames share: the shaped head and its accessories, unposed."""

    identity: Identity
    template: NDArray[np.float64]
    accessories: tuple[Accessory, ...]
    hairline: float


def scene(identity: Identity) -> _Scene:
    """The unposed head of an identity, to render several frames from."""
    parts = accessories(HAIR_STYLES[identity.style], identity.hair_shape, identity.glasses,
                        identity.neckline, identity.seed)  # fmt: skip
    shaped = tuple(
        part
        if part.fixed
        else part.moved(np.tensordot(identity.shape, identity_field(part.points), 1))
        for part in parts
    )
    hairline = -2.0 if HAIR_STYLES[identity.style] == "bald" else _hairline(identity)
    neutral = np.zeros(len(EXPRESSION))
    return _Scene(identity, face_shape().model.shape(identity.shape, neutral), shaped, hairline)


def _hairline(identity: Identity) -> float:
    low = HAIR_STYLES[identity.style] == "fringe"
    return float((-0.5 if low else -0.86) - 0.12 * identity.hair_shape[0])


def _iris_offsets(motion: Motion) -> NDArray[np.float64]:
    yaw, pitch = np.deg2rad(motion.gaze)
    return np.array([EYEBALL[0] * np.sin(yaw) * np.cos(pitch), EYEBALL[1] * np.sin(pitch)])


def _pixels(points: NDArray[np.float64], camera: Camera, side: int) -> NDArray[np.float64]:
    scale = side / camera.units
    projected: NDArray[np.float64] = project(points, scale, side / 2 - scale * camera.centre)
    return projected


def render(
    identity: Identity | _Scene, motion: Motion, camera: Camera, size: int = 128
) -> Rendering:
    """The picture of one frame with its ground truth, about 10 ms at 128 px on one core.

    size: side of the picture, px. Pass `scene(identity)` to render several frames faster.
    """
    stage = identity if isinstance(identity, _Scene) else scene(identity)
    who = stage.identity
    shape, model = face_shape(), face_shape().model
    head = stage.template + np.tensordot(motion.expression, model.expression_basis, 1)
    turn = rotation(motion.pose.astype(np.float64))
    shift = motion.shift.astype(np.float64)
    side = size * SUPERSAMPLE
    groups = [(head, head, shape.triangles, shape.material, shape.side, shape.uv)]
    for part in stage.accessories:
        groups.append((part.points, part.points, part.triangles, part.material, part.side, part.uv))
    points, places, triangles, materials, sides, uvs = [], [], [], [], [], []
    count = 0
    for index, (place, local, faces, material, flank, uv) in enumerate(groups):
        turned = pose(local, turn, NECK_PIVOT, shift)
        if index:
            free = stage.accessories[index - 1].follow[:, None]
            turned = free * turned + (1 - free) * (local + shift * 0.6)
        points.append(turned)
        places.append(place if index else model.template)
        triangles.append(faces + count)
        materials.append(material)
        sides.append(flank)
        uvs.append(uv)
        count += len(local)
    offset = _iris_offsets(motion)
    eye = np.zeros((count, 2))
    for which, vertex in zip((-1, 1), shape.iris, strict=True):
        rows = np.flatnonzero(shape.side == which)
        eye[rows] = head[rows, :2] - stage.template[vertex, :2]
    all_points = np.concatenate(points)
    faces = np.concatenate(triangles)
    normals = raster.vertex_normals(all_points.astype(np.float32), faces)
    attributes = np.concatenate(
        [normals, np.concatenate(places), np.concatenate(uvs), eye], 1
    ).astype(np.float32)
    pixels = np.zeros((side, side, raster.ATTRIBUTES), np.float32)
    kind = np.full((side, side, 2), raster.EMPTY, np.uint8)
    raster.rasterize(
        _pixels(all_points, camera, side).astype(np.float32), faces, attributes,
        np.concatenate(materials).astype(np.uint8), np.concatenate(sides).astype(np.int8),
        pixels, kind,
    )  # fmt: skip
    canvas = _backdrop(who, side)
    look = _look(who, np.stack([offset, offset]), stage.hairline)
    landmarks68 = model.landmarks(head)
    opening = float(landmarks68[66, 1] - landmarks68[62, 1])
    raster.shade(pixels, kind, look, max(opening, 0.0), canvas)
    gaze = stage.template[shape.iris] + [*offset, 0.0]
    truth = _pixels(
        pose(np.concatenate([landmarks68, gaze]), turn, NECK_PIVOT, shift), camera, size
    )
    return Rendering(
        image=_develop(canvas, size),
        landmarks=Landmarks(truth[:68].astype(np.float32), truth[68:, :2].astype(np.float32)),
        pose=motion.pose,
        expression=motion.expression,
        gaze_angles=motion.gaze,
        labels=np.ascontiguousarray(_LABELS[kind[::SUPERSAMPLE, ::SUPERSAMPLE, 0]]),
        parameters=parameters(who, motion, camera),
    )


def _develop(canvas: NDArray[np.float32], size: int) -> Bytes:
    """Linear light to sRGB bytes: average the samples, roll off the highlights, apply gamma."""
    small = cv2.resize(canvas, (size, size), interpolation=cv2.INTER_AREA)
    rolled = small * (1 + small / 2.6) / (1 + small)
    return np.asarray(np.clip(rolled * 1.12, 0, 1) ** (1 / 2.2) * 255 + 0.5).astype(np.uint8)
