"""The people of the rendered benchmark: those that ship, or more, rendered now."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np

from diffusionact.assets import benchmark_path
from diffusionact.errors import BackendMissing, SettingsError
from diffusionact.evaluation.rendered import SEED, SIZE, Person, Shot, load_people

if TYPE_CHECKING:
    from diffusionact.progress import ProgressCallback
    from diffusionact.training import faces


def people(
    count: int | None = None,
    seed: int = SEED,
    size: int = SIZE,
    progress: ProgressCallback | None = None,
) -> list[Person]:
    """Return the first `count` people of a series, all that ship by default.

    Person i has the random stream (seed, i), as in the model card, whatever the count. Those that
    ship are read; others need the renderer, and so numba.

    Raises: SettingsError for less than one; BackendMissing.
    """
    if count is not None and count < 1:
        raise SettingsError(f"--identities {count}; wanted 1 or more")
    shipped = load_people(benchmark_path()) if (seed, size) == (SEED, SIZE) else []
    if shipped and (count is None or count <= len(shipped)):
        return shipped[:count]
    wanted = count or len(load_people(benchmark_path()))
    made = shipped
    for index in range(len(shipped), wanted):
        made.append(rendered_person(seed, index, size))
        if progress is not None:
            progress(index + 1, wanted)
    return made


def rendered_person(seed: int, index: int, size: int) -> Person:
    """Return one person of a series. Raises: BackendMissing where the renderer is not there."""
    try:
        from diffusionact.training import faces
        from diffusionact.training.face_shape import face_shape
    except ModuleNotFoundError as error:
        raise BackendMissing(
            f"rendering people needs {error.name}, which is not installed; run `pip install "
            f"numba`, or take those that ship: the first {len(load_people(benchmark_path()))} of "
            f"seed {SEED}, {SIZE} px"
        ) from error
    rng = np.random.default_rng((seed, index))
    scene, camera = faces.scene(faces.sample_identity(rng)), faces.sample_camera(rng)
    shots = []
    for _ in range(2):
        motion = faces.sample_motion(rng)
        shots.append(_shot(motion, faces.render(scene, motion, camera, size)))
    irises = scene.template[face_shape().iris]
    return Person(
        f"{seed}-{index:05d}", scene.identity.shape, irises, camera.units, camera.centre, *shots
    )


def _shot(motion: faces.Motion, made: faces.Rendering) -> Shot:
    return Shot(
        image=np.ascontiguousarray(made.image[..., ::-1]),
        landmarks=made.landmarks,
        pose=motion.pose,
        expression=motion.expression,
        gaze_deg=motion.gaze,
        shift=motion.shift,
        labels=made.labels,
    )
