"""What a bundle holds and how to run it: manifest.json, its types, its checks."""

from __future__ import annotations

import hashlib
import json
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path

from diffusionact import schedule
from diffusionact.condition import Drawing
from diffusionact.decode import DecodeError, decode
from diffusionact.errors import BundleError, SettingsError
from diffusionact.files import write_whole
from diffusionact.schedule import Int64Array, Prediction

FORMAT = 1
FILE_NAME = "manifest.json"
REQUIRED = ("encoder", "time", "modulation", "unet_step")
OWN_INVERSION = ("time_invert", "modulation_invert", "unet_step_invert")
DETECTOR_SIDES = (64, 32, 16, 12, 6, 3)  # of the maps of s3fd's six heads at 256 px
ASSETS = ("flame",)
SETTLED_NS = 2 * 10**9  # the coarsest clock of a file system
MOST_HASHES = 256  # that are remembered


@dataclass(frozen=True)
class TensorSpec:
    """One input or output of a component. A size that is a word is fixed when it is opened."""

    name: str
    dtype: str  # as NumPy names it
    shape: tuple[int | str, ...]
    range: tuple[float, float] | None = None  # None: any value


@dataclass(frozen=True)
class ComponentSpec:
    """One network of the bundle, in a file of its own."""

    file: str
    sha256: str
    inputs: tuple[TensorSpec, ...]
    outputs: tuple[TensorSpec, ...]


@dataclass(frozen=True)
class AssetSpec:
    """One file of the bundle that is no network."""

    file: str
    sha256: str


@dataclass(frozen=True)
class Schedule:
    """The noise schedule that the network was trained on."""

    total: int = 1000
    beta_start: float = 1e-4
    beta_end: float = 0.02
    kind: str = "linear"


@dataclass(frozen=True)
class Sampling:
    """One direction of the sampler: its step count, the counts that work well, and the timesteps
    of those counts that do not take the constant stride, ascending."""

    steps: int
    choices: tuple[int, ...] = ()
    timesteps: Mapping[str, tuple[int, ...]] = field(default_factory=dict)

    @property
    def counts(self) -> tuple[int, ...]:
        """`steps` and `choices`, ascending."""
        return tuple(sorted({self.steps, *self.choices}))

    @property
    def fewer(self) -> tuple[int, ...]:
        """The counts below `steps`, which a session may fall back to."""
        return tuple(count for count in self.counts if count < self.steps)

    def at(
        self, steps: int | Sequence[int] | None = None, total: int = schedule.TOTAL_STEPS
    ) -> Int64Array:
        """Return the timesteps of a count, int64 [T], ascending: those listed for it, else those
        of the constant stride. None is the count of this sampling; a sequence is itself.

        Raises: SettingsError as `schedule.timesteps`.
        """
        wanted = self.steps if steps is None else steps
        listed = self.timesteps.get(str(wanted)) if isinstance(wanted, int) else None
        return schedule.timesteps(wanted if listed is None else listed, total)


@dataclass(frozen=True)
class Crop:
    """How a face is cut out of its picture."""

    rotate: bool  # False: the picture stays upright and keeps the head's roll
    scale: float = 1.0  # side of the crop over the side of an FFHQ crop


@dataclass(frozen=True)
class Training:
    """What the network has seen."""

    data: str
    licence: str
    domain: str  # such as "rendered faces"
    pose_range_deg: Mapping[str, tuple[float, float]] = field(default_factory=dict)
    provenance: Mapping[str, str | int | float] = field(default_factory=dict)


@dataclass(frozen=True)
class Manifest:
    """All that the runtime must know of a bundle; it has no constant of its own for these."""

    name: str
    image_size: int  # S, px
    z_size: int  # Z
    modulation_size: int  # K, channels of all modulated blocks
    time_row_size: int  # Kt
    prediction: Prediction
    schedule: Schedule
    render: Sampling
    invert: Sampling
    crop: Crop
    drawing: Drawing
    landmark_layout: str
    training: Training
    licence: str
    weights_sha256: str
    components: Mapping[str, ComponentSpec]
    student_of: str | None = None  # sha256 of the teacher's weights
    format: int = FORMAT
    # the sizes that the weights file states, with which weights come back out of the bundle
    network: Mapping[str, bool | int | float | str | tuple[int, ...]] = field(default_factory=dict)
    # of the published tracker; a bundle has them when the helper networks were imported
    tracker: Mapping[str, ComponentSpec] = field(default_factory=dict)
    assets: Mapping[str, AssetSpec] = field(default_factory=dict)

    def render_at(self, steps: int | Sequence[int] | None = None) -> Int64Array:
        """Return the timesteps of a render, as `Sampling.at`.

        Raises: SettingsError as there, and for a count that a student was not made for.
        """
        return self._at("renders", self.render, steps)

    def invert_at(self, steps: int | Sequence[int] | None = None) -> Int64Array:
        """Return the timesteps of an inversion, and raise, as `render_at`."""
        return self._at("inverts", self.invert, steps)

    def _at(self, does: str, sampling: Sampling, steps: int | Sequence[int] | None) -> Int64Array:
        if self.student_of and isinstance(steps, int) and steps not in sampling.counts:
            raise SettingsError(
                f"steps={steps}: this model is a student, which {does} in "
                f"{', '.join(map(str, sampling.counts))} steps alone. Take one of these; for other "
                f"counts its teacher, the weights of sha256 {self.student_of[:12]}: diffusionact "
                "export TEACHER.safetensors -o teacher.bundle, then --bundle teacher.bundle"
            )
        return sampling.at(steps, self.schedule.total)


def component_tensors(
    manifest: Manifest,
) -> dict[str, tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]]:
    """Return name -> (inputs, outputs) that a bundle of these sizes has, without inversion's own.

    "N" is the number of timesteps that are computed together.
    """
    side, k = manifest.image_size, manifest.modulation_size
    picture: tuple[int | str, ...] = (1, 3, side, side)

    def spec(name: str, *shape: int | str, limits: tuple[float, float] | None = None) -> TensorSpec:
        return TensorSpec(name, "float32", shape, limits)

    image = spec("image", *picture, limits=(-1.0, 1.0))
    condition = spec("condition", *picture, limits=(-1.0, 1.0))
    t = spec("t", "N", limits=(0.0, float(manifest.schedule.total - 1)))
    z, rows = spec("z", 1, manifest.z_size), spec("time_rows", "N", manifest.time_row_size)
    step = (spec("x_t", *picture), spec("scale", 1, k), spec("shift", 1, k))
    return {
        "encoder": ((image, condition), (z,)),
        "time": ((t,), (rows,)),
        "modulation": ((z, rows), (spec("scale", "N", k), spec("shift", "N", k))),
        "unet_step": (step, (spec("prediction", *picture),)),
    }


def tracker_tensors(
    shape_codes: int = 100, expression_codes: int = 50
) -> dict[str, tuple[tuple[TensorSpec, ...], tuple[TensorSpec, ...]]]:
    """Return name -> (inputs, outputs) of the networks of the published tracker.

    `emoca`'s pose is the head's axis-angle, then the jaw's; its camera scale, x, y.
    """

    def spec(name: str, *shape: int, limits: tuple[float, float] | None = None) -> TensorSpec:
        return TensorSpec(name, "float32", (1, *shape), limits)

    boxes = tuple(spec(f"box_logits_{i}", 2, n, n) for i, n in enumerate(DETECTOR_SIDES))
    offsets = tuple(spec(f"offsets_{i}", 4, n, n) for i, n in enumerate(DETECTOR_SIDES))
    codes = {"shape": shape_codes, "expression": expression_codes, "pose": 6, "camera": 3}
    return {
        "s3fd": ((spec("image", 3, 256, 256, limits=(0.0, 255.0)),), boxes + offsets),
        "fan": (
            (spec("image", 3, 256, 256, limits=(0.0, 1.0)),),
            (spec("heatmaps", 68, 64, 64),),
        ),
        "emoca": (
            (spec("image", 3, 224, 224, limits=(0.0, 1.0)),),
            tuple(spec(name, count) for name, count in codes.items()),
        ),
        "gaze": ((spec("image", 3, 224, 224),), (spec("pitch_yaw", 2),)),
    }


def read(bundle_dir: Path, verify: bool = True) -> Manifest:
    """Return the manifest of a bundle, checked; with `verify` also the hash of every file.

    Raises: BundleError when the folder, a file or a field is missing, damaged or of another format.
    """
    path = Path(bundle_dir) / FILE_NAME
    try:
        values = json.loads(path.read_bytes())
    except OSError as error:
        raise BundleError(
            f"{path}: not readable ({error.strerror}); wanted the folder of a bundle. {_MEND}"
        ) from error
    except ValueError as error:
        raise BundleError(f"{path}: not JSON ({error}). {_MEND}") from error
    seen = values.get("format") if isinstance(values, dict) else None
    if seen != FORMAT:
        raise BundleError(f"{path}: format {seen!r}, this version reads {FORMAT}. {_MEND}")
    try:
        manifest = decode(Manifest, values)
    except DecodeError as error:
        raise BundleError(f"{path}: {error}. {_MEND}") from error
    try:
        check(manifest)
    except BundleError as error:
        raise BundleError(f"{path}: {error}") from error
    if verify:
        _check_files(Path(bundle_dir), manifest)
    return manifest


def write(bundle_dir: Path, manifest: Manifest) -> None:
    """Return nothing; manifest.json is in the folder, whole or not at all.

    Raises: BundleError when the manifest contradicts itself.
    """
    check(manifest)
    write_whole(Path(bundle_dir) / FILE_NAME, json.dumps(asdict(manifest), indent=2) + "\n")


def check(manifest: Manifest) -> None:
    """Return nothing when the manifest agrees with itself.

    Raises: BundleError naming the first field that does not.
    """
    names = set(manifest.components)
    own = names & set(OWN_INVERSION)
    wanted = {*REQUIRED, *(OWN_INVERSION if own else ())}
    if names != wanted:
        raise BundleError(f"components {sorted(names)}, wanted {sorted(wanted)}. {_MEND}")
    if manifest.schedule.kind != "linear":
        raise BundleError(f"schedule.kind {manifest.schedule.kind!r}, wanted 'linear'. {_MEND}")
    tensors = component_tensors(manifest)
    for name, part in manifest.components.items():
        _check_component(f"components.{name}", part, *tensors[name.removesuffix("_invert")])
    _check_tracker(manifest)
    for field_name, sampling in (("render", manifest.render), ("invert", manifest.invert)):
        _check_sampling(field_name, sampling, manifest.schedule.total)
    if manifest.student_of is not None:
        fault = student_fault(manifest.student_of, manifest.render, manifest.invert)
        if not fault and manifest.student_of == manifest.weights_sha256:
            fault = "student_of: these are the teacher's own weights"
        if fault:
            raise BundleError(f"{fault}. {_MEND}")


def student_fault(of: str, render: Sampling, invert: Sampling) -> str:
    """Return what is wrong with a student, "" if nothing is: it names its teacher by a SHA-256, and
    lists the timesteps of every count, for it knows no others."""
    if len(of) != 64 or set(of) - set("0123456789abcdef"):
        return (
            f"student_of {of!r}: wanted the SHA-256 of the teacher's weights, 64 digits of 0-9a-f"
        )
    for name, sampling in (("render", render), ("invert", invert)):
        listed = {n: len(sampling.timesteps.get(str(n), ())) for n in sampling.counts}
        if wrong := [n for n, length in listed.items() if n != length]:
            return f"{name}.timesteps: a student lists those of all its counts, not so of {wrong}"
    return ""


def file_sha256(path: Path) -> str:
    """Return the file's SHA-256 as 64 hexadecimal digits.

    This process reads a file once, as long as its inode, size and times stay what they were.
    """
    with open(path, "rb") as file:
        seen = _seen(file.fileno())
        if seen in _hashes:
            return _hashes[seen]
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
        made = digest.hexdigest()
        # One that was written just now may be written again without its times moving.
        settled = time.time_ns() - max(seen[-2:]) > SETTLED_NS
        if settled and seen == _seen(file.fileno()) and len(_hashes) < MOST_HASHES:
            _hashes[seen] = made
    return made


def _seen(file: int) -> tuple[int, ...]:
    """What changes with an open file's content: inode, size, when it was written and changed."""
    found = os.fstat(file)
    return found.st_dev, found.st_ino, found.st_size, found.st_mtime_ns, found.st_ctime_ns


_hashes: dict[tuple[int, ...], str] = {}


def _check_tracker(manifest: Manifest) -> None:
    tensors = tracker_tensors()
    for kind, seen, known in (
        ("tracker", set(manifest.tracker), set(tensors)),
        ("assets", set(manifest.assets), set(ASSETS)),
    ):
        if unknown := sorted(seen - known):
            raise BundleError(f"{kind} {unknown}, wanted some of {sorted(known)}. {_MEND}")
    for name, part in manifest.tracker.items():
        _check_component(f"tracker.{name}", part, *tensors[name])
    for name, asset in manifest.assets.items():
        _check_inside(f"assets.{name}", asset.file)


def _check_component(
    field_name: str,
    part: ComponentSpec,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
) -> None:
    _check_inside(field_name, part.file)
    if part.inputs != inputs or part.outputs != outputs:
        seen, due = (part.inputs, part.outputs), (inputs, outputs)
        raise BundleError(f"{field_name} has tensors {seen}, wanted {due}. {_MEND}")


def _check_inside(field_name: str, file: str) -> None:
    if Path(file).name != file:
        raise BundleError(f"{field_name}.file {file!r} leaves the bundle. {_MEND}")


def _check_sampling(name: str, sampling: Sampling, total: int) -> None:
    for word, listed in sampling.timesteps.items():
        if word != str(len(listed)):
            raise BundleError(f"{name}.timesteps.{word} lists {len(listed)} timesteps. {_MEND}")
    counts = [n for n in (sampling.steps, *sampling.choices) if str(n) not in sampling.timesteps]
    try:
        for count in counts:
            schedule.timesteps(count, total)
        for timesteps in sampling.timesteps.values():
            schedule.timesteps(timesteps, total)
    except SettingsError as error:
        raise BundleError(f"{name}: {error} {_MEND}") from error


def _check_files(bundle_dir: Path, manifest: Manifest) -> None:
    parts: tuple[ComponentSpec | AssetSpec, ...] = (
        *manifest.components.values(),
        *manifest.tracker.values(),
        *manifest.assets.values(),
    )
    for part in parts:
        path = bundle_dir / part.file
        try:
            seen = file_sha256(path)
        except OSError as error:
            raise BundleError(f"{path}: not readable ({error.strerror}). {_MEND}") from error
        if seen != part.sha256:
            raise BundleError(
                f"{path}: sha256 {seen}, the manifest says {part.sha256}: damaged or exchanged. "
                f"{_MEND}"
            )


_MEND = "Make the bundle again: diffusionact export WEIGHTS -o BUNDLE; or reinstall diffusionact"
