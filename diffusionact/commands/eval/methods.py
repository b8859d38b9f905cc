"""Who makes the pictures that `diffusionact eval` measures: the model, and its yardsticks."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeAlias

import numpy as np

from diffusionact import manifest as manifest_file
from diffusionact.condition import draw_condition
from diffusionact.errors import DiffusionActError, SettingsError
from diffusionact.evaluation.reading import Reading
from diffusionact.image import bgr_to_rgb, to_tensor, to_uint8

if TYPE_CHECKING:
    from diffusionact.evaluation.compared import Image
    from diffusionact.landmarks import Landmarks
    from diffusionact.runtime.reenactor import Reenactor
    from diffusionact.runtime.source import Source

# true: the reference itself, which shows what the instruments are wrong by.
YARDSTICKS = ("true", "copy", "oracle", "mean")
METHODS = ("ours", *YARDSTICKS)
OF_THE_MODEL = ("ours", "oracle")


@dataclass(frozen=True)
class Setup:
    """One configuration of the model. invert_steps: of x_T, None the bundle's; random_x_T: noise
    in its place."""

    bundle: Path
    steps: int
    backend: str = "auto"
    precision: str = "auto"
    invert_steps: int | None = None
    random_x_T: bool = False

    @property
    def name(self) -> str:
        """Of a run's folder."""
        parts = [f"T{self.steps}"]
        if self.random_x_T:
            parts.append("random")
        elif self.invert_steps is not None:
            parts.append(f"inv{self.invert_steps}")
        if self.backend != "auto":
            parts.append(self.backend)
        if self.precision != "auto":
            parts.append(self.precision)
        return "-".join(parts)


@dataclass(frozen=True)
class Moment:
    """What a method is asked for. name: of the person, for what is made once of each; source,
    target: uint8 [S,S,3] BGR crops; the landmarks in their px; wanted: those to draw."""

    name: str
    source: Image
    source_landmarks: Landmarks
    wanted: Landmarks
    target: Image | None = None
    target_landmarks: Landmarks | None = None


Method: TypeAlias = Callable[[Moment], "Image"]


class Model:
    """One open model; several configurations of it share what they can."""

    def __init__(self, act: Reenactor, threads: int) -> None:
        self.act = act
        self.threads = threads
        self._codes: dict[str, Any] = {}

    def ours(self, moment: Moment, setup: Setup) -> Image:
        """Return the reenacted crop."""
        self.act.set_steps(setup.steps)
        return self.act.render(moment.wanted, self._source(moment, setup)).crop

    def oracle(self, moment: Moment, setup: Setup) -> Image:
        """Return the code of the target's own picture and drawing, decoded from the source's x_T:
        what a perfect reenactment encoder would reach at most, or nearly so."""
        if moment.target is None or moment.target_landmarks is None:
            raise SettingsError("the oracle needs the true picture of each frame; leave it out")
        self.act.set_steps(setup.steps)
        source = self._source(moment, setup)
        image = to_tensor(bgr_to_rgb(moment.target))
        made = self.act.generate(source.x_T, image, self._drawn(moment.target_landmarks))
        return bgr_to_rgb(to_uint8(made))

    def _source(self, moment: Moment, setup: Setup) -> Source:
        from diffusionact.runtime.source import Source

        crop = bgr_to_rgb(moment.source)
        if setup.random_x_T:
            x_T = _noise(moment.name, len(crop))
        else:
            if moment.name not in self._codes:  # one clip after the other: the last is enough
                self._codes = dict(list(self._codes.items())[-256:])
                drawing = self._drawn(moment.source_landmarks)
                self._codes[moment.name] = self.act.invert(to_tensor(crop), drawing).copy()
            x_T = self._codes[moment.name]
        matrix = np.eye(2, 3)
        weights = self.act.manifest.weights_sha256
        return Source(moment.source, crop, moment.source_landmarks, matrix, x_T, weights)

    def _drawn(self, landmarks: Landmarks) -> Any:
        side = self.act.manifest.image_size
        return to_tensor(draw_condition(landmarks, side, self.act.manifest.drawing))


class Models:
    """Open models by what cannot change between frames; one at a time is kept."""

    def __init__(self, steps: Sequence[int], device: str = "auto", threads: int = 0) -> None:
        self._steps = tuple(steps)
        self._device = device
        self._threads = threads
        self._key: tuple[Any, ...] | None = None
        self._model: Model | None = None

    def of(self, setup: Setup) -> Model:
        """Return the model of a configuration. Raises: as `Reenactor.load`."""
        key = (setup.bundle, setup.backend, setup.precision, setup.invert_steps)
        if self._model is None or key != self._key:
            self.close()
            self._model, self._key = Model(self._open(setup), self._threads), key
        return self._model

    def close(self) -> None:
        """Return nothing; the model is closed."""
        if self._model is not None:
            self._model.act.close()
        self._model = None

    def __enter__(self) -> Models:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _open(self, setup: Setup) -> Reenactor:
        from diffusionact.runtime.choice import choose
        from diffusionact.runtime.loop import open_loop
        from diffusionact.runtime.reenactor import Reenactor
        from diffusionact.runtime.settings import Settings

        settings = Settings(
            steps=setup.steps,
            step_choices=self._steps,
            backend=setup.backend,
            precision=setup.precision,
            threads=self._threads,
            paste=False,
            smoothing=0.0,
            absolute_pose=True,
        )
        if setup.invert_steps is None:
            return Reenactor.load(setup.bundle, device=self._device, settings=settings)
        manifest = manifest_file.read(setup.bundle)
        manifest.invert_at(setup.invert_steps)  # a student has no other counts than its own
        manifest = replace(manifest, invert=replace(manifest.invert, steps=setup.invert_steps))
        chosen = choose(
            setup.bundle, manifest, backend=setup.backend, precision=setup.precision,
            device=self._device, threads=self._threads,
        )  # fmt: skip
        loop = open_loop(
            setup.bundle, manifest, steps=setup.steps, also=self._steps, backend=chosen.backend,
            device=self._device, precision=chosen.precision, threads=self._threads,
        )  # fmt: skip
        return Reenactor(manifest, loop, settings)


def method_of(name: str, models: Models, setup: Setup, mean: Image | None = None) -> Method:
    """Return a method by name.

    mean: the mean picture, of the mean face. Raises: SettingsError for an unknown name.
    """
    if name == "true":
        return _true
    if name == "copy":
        return lambda moment: moment.source
    if name == "mean" and mean is not None:
        return lambda moment: mean
    if name == "ours":
        return lambda moment: models.of(setup).ours(moment, setup)
    if name == "oracle":
        return lambda moment: models.of(setup).oracle(moment, setup)
    raise SettingsError(f"method {name!r}; choose from: {', '.join(METHODS)}")


def mean_reading(readings: Sequence[Reading]) -> Reading:
    """Return the mean of what several faces show, unknown values left out."""
    expressions = [r.expression for r in readings if r.expression is not None]
    return Reading(
        np.mean([r.points for r in readings], axis=0),
        np.nanmean([r.gaze for r in readings], axis=0),
        np.mean([r.pose for r in readings], axis=0),
        np.mean(expressions, axis=0) if expressions else None,
    )


def backends_here(wanted: Sequence[str], device: str) -> Iterator[tuple[str, str]]:
    """Yield (backend, precision) for every word: NAME, NAME:PRECISION, "auto", or "all" for those
    of this device that can be opened here.

    Raises: SettingsError for a word that is none of these.
    """
    from diffusionact.runtime.component import BACKENDS

    for word in wanted:
        name, _, precision = word.partition(":")
        if word == "all":
            for backend in BACKENDS:
                if backend != "torch":  # the reference of training, not of the product
                    yield from ((backend, each) for each in _precisions(backend, device))
        elif name != "auto" and name not in BACKENDS:
            raise SettingsError(f"--backend {word}; choose from: auto, all, {', '.join(BACKENDS)}")
        else:
            yield name, precision or "auto"


def _precisions(backend: str, device: str) -> Sequence[str]:
    import importlib

    from diffusionact.runtime.component import BACKENDS, precisions

    try:
        module = importlib.import_module(BACKENDS[backend])
    except (ImportError, DiffusionActError):
        return ()
    chosen = "cpu" if device == "auto" else device
    return precisions(module, chosen) if chosen in module.DEVICES else ()


def _true(moment: Moment) -> Image:
    if moment.target is None:
        raise SettingsError("there is no true picture of these frames; leave out the method true")
    return moment.target


def _noise(name: str, side: int) -> Any:
    """x_T of a person without inversion, of a random stream that the name fixes."""
    seed = [ord(letter) for letter in name]
    return np.random.default_rng(seed).standard_normal((1, 3, side, side), np.float32)
