"""The recipe of a training run: frozen dataclasses, read from one TOML file."""

from __future__ import annotations

import dataclasses
import hashlib
import sys
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal, TypeVar, get_args

from diffusionact.errors import SettingsError
from diffusionact.schedule import timesteps

if sys.version_info >= (3, 11):
    import tomllib
else:
    import tomli as tomllib

Kind = Literal["scene", "autoencoder", "reenact", "pretrain", "sampler", "student"]
Method = Literal["sampler", "consistency", "progressive"]
T = TypeVar("T")


@dataclass(frozen=True)
class PoolRecipe:
    """Which rendered faces: `identities` x `frames` images, the last `held_out` identities for
    evaluation only."""

    folder: str
    identities: int = 4000
    frames: int = 8
    size: int = 128
    held_out: int = 64
    seed: int = 1


@dataclass(frozen=True)
class ShardsRecipe:
    """Which prepared faces, in place of rendered ones: what `diffusionact prepare` left in
    `folder`. The last `held_out` people, by name, are for evaluation only; pairs are of frames of
    one take (a piece of a clip without a cut), or of all that a person has."""

    folder: str
    held_out: int = 16
    pairs: Literal["take", "person"] = "take"


@dataclass(frozen=True)
class LossRecipe:
    """Weights of the pixel regions (before the mean is brought to 1) and of the heads on z."""

    background: float = 1.0
    skin: float = 1.0
    eyes: float = 8.0
    mouth: float = 7.0
    brows: float = 4.0
    hair: float = 1.0
    clothes: float = 1.0
    glasses: float = 2.0
    gaze: float = 8.0  # a bump around each iris, also where glasses or lids hide the label
    gaze_sigma_px: float = 3.0
    heads: float = 0.3
    keypoints: float = 0.1  # a px of error of the points that z places; eyes and irises count more
    texture: float = 0.0  # of a student's last picture: as much fine detail as the true one has

    def regions(self) -> tuple[float, ...]:
        """The weights in the order of the renderer's labels 0..7."""
        return (self.background, self.skin, self.eyes, self.mouth, self.brows, self.hair,
                self.clothes, self.glasses)  # fmt: skip


@dataclass(frozen=True)
class InversionRecipe:
    """The cache of inverted sources that takes the place of Gaussian noise for some samples."""

    steps: int | list[int] = 10  # or the timesteps themselves
    capacity: int = 4096
    fill: int = 256
    every: int = 50  # training steps between two refreshes
    batch: int = 64
    most_gb: float = 100.0  # of the disk, that stage sampler's noise may take; then it is made anew
    folder: str = ""  # of stage sampler's noise, made once for each source; "": in the run's folder


@dataclass(frozen=True)
class StudentRecipe:
    """What a few-step student practises: for each step count its timesteps, ascending, and the
    share of the training steps it takes. It inverts at the timesteps of `inversions.steps`."""

    of: str = "training/checkpoints/teacher.safetensors"
    steps: int = 4  # what the runtime takes unless told otherwise
    render: dict[str, list[int]] = field(default_factory=dict)
    shares: list[float] = field(default_factory=list)
    # of methods consistency and progressive:
    substeps: int = 5  # of the teacher within one of the student's
    inversion: float = 1.0  # weight of what inversion learns
    preserve: float = 1.5  # weight of the way there and back (consistency)
    # of method sampler:
    teacher: float = 0.0  # weight of the distance to the teacher's picture
    teacher_steps: int = 20
    criteria: float = 0.0  # factor on the losses of [criteria]; 0: without


@dataclass(frozen=True)
class StageRecipe:
    """One stage. It ends when `images` are seen or `minutes` are over, whichever comes first; the
    learning rate falls to 0 by the same measure, so a run ends on time on any machine."""

    kind: Kind
    images: int
    method: Method = "sampler"  # of a student; `distill` says what each is
    render: list[int] = field(default_factory=list)  # timesteps of a round of method progressive;
    invert: list[int] = field(default_factory=list)  # none: the student's own
    inverter: bool = False  # of a student: inversion has weights of its own
    minutes: float | None = None
    batch: int = 64  # of one step of the optimiser, over all processes and turns
    accumulate: int = 1  # turns that a process takes for its part of a batch; saves memory
    lr: float = 1.5e-3
    matrix_lr: float = 0.0  # above 0: Muon steps this long for weight matrices, AdamW for the rest
    warmup_steps: int = 100
    constant_lr: bool = False  # after warm-up, instead of falling to 0
    weight_decay: float = 1e-3
    clip: float = 1.0  # the norm of the gradient is brought down to it; 0 lets it be
    ema: float = 0.998
    timestep_power: float = 0.5  # t = floor(1000 * u**power): below 1, more high noise
    same_frame: float = 0.15
    cached_noise: float = 0.4
    cached_from: float = 0.3  # fraction of the stage after which cached noise is used
    unet_lr: float = 1.0  # factor on lr
    heads_lr: float = 1.0
    drawing_gain: float = 0.0  # of the reenactment encoder's drawing input at its start
    encoder_lr: float = 0.0  # of the semantic encoder in stage reenact; 0 leaves it as it is
    true_keypoints_until: float = 0.0  # fraction of the stage in which true points fade out
    code: float = 1.0  # weight of |z_r - z_t|
    diffusion: float = 1.0
    train_steps: int = 8  # T_tr, the steps that stage sampler renders in
    split: bool = True  # stage sampler: half a batch reenacts, half reconstructs; else all reenact
    recompute: bool = True  # stage sampler: activations of one step at a time, for 1/3 more work

    @property
    def pairing(self) -> Literal["share", "other", "halves"]:
        """What the target is: "share", the source itself in `same_frame` of the samples, by chance;
        "other", never; "halves", in every second sample."""
        if self.kind != "sampler":
            return "share"
        return "halves" if self.split else "other"


@dataclass(frozen=True)
class CriticRecipe:
    """The frozen networks that judge a picture in training (`critics.open_critics`): our own small
    one for rendered faces, and published files; of what both read, the published file is asked."""

    guide: str = ""  # training/checkpoints/guide.safetensors
    vgg19: str = ""
    arcface: str = ""
    farl: str = ""
    bisenet: str = ""
    xgaze: str = ""
    emoca: str = ""  # the folder with cfg.yaml and detail/checkpoints, or a checkpoint of it


@dataclass(frozen=True)
class CriteriaRecipe:
    """The weights of the eight losses of `criteria`; 0 leaves one out, and needs no network.

    Source: DiffusionAct, implementation details.
    """

    pixel: float = 20.0
    perceptual: float = 20.0
    identity: float = 20.0
    style: float = 20.0
    background: float = 10.0
    shape: float = 0.5
    gaze: float = 2.0
    head_pose: float = 2.0


@dataclass(frozen=True)
class LoopRecipe:
    """What happens beside the steps: how often, and how."""

    log_every_steps: int = 25
    checkpoint_minutes: float = 4.0
    keep_checkpoints: int = 2  # the last ones
    sheet_minutes: float = 10.0  # between two sample sheets; 0: none, not at the end either
    evaluation_pairs: int = 32
    tensorboard: bool = True  # where it is installed; curves.jsonl is always written
    compile: bool = False  # torch.compile: pays on a GPU, not on a CPU
    fused_norm: bool = True  # on a CPU: one C++ operation for norm, modulation and SiLU
    bf16: bool = True


@dataclass(frozen=True)
class Recipe:
    """A whole run. `digest` is the SHA-256 of the file it was read from."""

    name: str
    network: str
    pool: PoolRecipe | ShardsRecipe  # [pool] rendered, or [data] prepared
    stages: tuple[StageRecipe, ...]
    loss: LossRecipe = field(default_factory=LossRecipe)
    inversions: InversionRecipe = field(default_factory=InversionRecipe)
    critics: CriticRecipe = field(default_factory=CriticRecipe)
    criteria: CriteriaRecipe = field(default_factory=CriteriaRecipe)
    student: StudentRecipe = field(default_factory=StudentRecipe)
    loop: LoopRecipe = field(default_factory=LoopRecipe)
    seed: int = 1
    weights: str = ""  # what is written at the end; "": weights.safetensors in the run's folder
    start: str = ""  # weights to begin from instead of random ones
    digest: str = ""


def _build(cls: type[T], values: object, where: str) -> T:
    if not isinstance(values, dict):
        raise SettingsError(f"{where}: {values!r}, wanted a table of settings")
    known = {f.name for f in dataclasses.fields(cls)}  # type: ignore[arg-type]
    unknown = sorted(set(values) - known)
    if unknown:
        raise SettingsError(
            f"{where}: unknown setting {', '.join(unknown)}; known: {', '.join(sorted(known))}"
        )
    try:
        return cls(**values)
    except TypeError as error:
        raise SettingsError(f"{where}: {error}") from error


def parse_recipe(text: str, where: str = "recipe") -> Recipe:
    """Returns the recipe written in TOML `text`.

    Raises:
        SettingsError: not TOML, an unknown or missing setting, or a value out of range.
    """
    try:
        values = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        raise SettingsError(f"{where}: not TOML: {error}") from error
    tables = {"pool": PoolRecipe, "loss": LossRecipe, "inversions": InversionRecipe,
              "critics": CriticRecipe, "criteria": CriteriaRecipe, "student": StudentRecipe,
              "loop": LoopRecipe}  # fmt: skip
    for key, cls in tables.items():
        if key in values:
            values[key] = _build(cls, values[key], f"{where} [{key}]")
    if "data" in values:
        if "pool" in values:
            raise SettingsError(f"{where}: [pool] and [data]; wanted rendered or prepared faces")
        values["pool"] = _build(ShardsRecipe, values.pop("data"), f"{where} [data]")
    stages = values.pop("stages", [])
    values["stages"] = tuple(_build(StageRecipe, s, f"{where} [[stages]]") for s in stages)
    values["digest"] = hashlib.sha256(text.encode()).hexdigest()
    recipe = _build(Recipe, values, where)
    _check(recipe, where)
    return recipe


def _check_shards(data: ShardsRecipe, where: str) -> None:
    if data.held_out < 1:
        raise SettingsError(f"{where} [data]: held_out = {data.held_out}, wanted 1 or more")
    if data.pairs not in ("take", "person"):
        raise SettingsError(f"{where} [data]: pairs = {data.pairs!r}, wanted 'take' or 'person'")


def load_recipe(path: str | Path) -> Recipe:
    """Returns the recipe in the file `path`. Raises: SettingsError as `parse_recipe`."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError as error:
        raise SettingsError(f"cannot read the recipe {path}: {error.strerror}") from error
    return parse_recipe(text, str(path))


def _check(recipe: Recipe, where: str) -> None:
    if not recipe.stages:
        raise SettingsError(f"{where}: no [[stages]]; add at least one with kind and images")
    if isinstance(recipe.pool, ShardsRecipe):
        _check_shards(recipe.pool, where)
    elif not 0 < recipe.pool.held_out < recipe.pool.identities:
        raise SettingsError(
            f"{where} [pool]: held_out = {recipe.pool.held_out}, wanted between 1 and "
            f"identities - 1 = {recipe.pool.identities - 1}"
        )
    _check_inversions(recipe.inversions, where)
    for name, weight in dataclasses.asdict(recipe.criteria).items():
        if not 0 <= weight < float("inf"):
            raise SettingsError(f"{where} [criteria]: {name} = {weight}, wanted 0 or above")
    if any(stage.kind == "student" for stage in recipe.stages):
        _check_student(recipe, where)
    for stage in recipe.stages:
        if stage.kind not in get_args(Kind):
            kinds = ", ".join(repr(kind) for kind in get_args(Kind))
            raise SettingsError(f"{where} [[stages]]: kind = {stage.kind!r}, wanted one of {kinds}")
        if stage.kind == "reenact" and stage.batch % 2:
            raise SettingsError(
                f"{where} [[stages]]: batch = {stage.batch}, wanted an even number: half of it is "
                "decoded from z_r, half from z_t"
            )
        if stage.kind == "sampler":
            _check_sampler(stage, where)
        fractions = {"same_frame": stage.same_frame, "cached_noise": stage.cached_noise,
                     "cached_from": stage.cached_from,
                     "true_keypoints_until": stage.true_keypoints_until}  # fmt: skip
        for name, value in fractions.items():
            if not 0 <= value <= 1:
                raise SettingsError(f"{where} [[stages]]: {name} = {value}, wanted 0..1")
        above = {"images": stage.images, "batch": stage.batch, "lr": stage.lr,
                 "accumulate": stage.accumulate, "minutes": stage.minutes}  # fmt: skip
        for name, number in above.items():
            if number is not None and number <= 0:
                raise SettingsError(f"{where} [[stages]]: {name} = {number}, wanted above 0")


def _check_inversions(inversions: InversionRecipe, where: str) -> None:
    if not isinstance(inversions.steps, int):  # which counts there are depends on the network
        timesteps(inversions.steps)
    for name in ("capacity", "fill", "every", "batch"):
        if getattr(inversions, name) < 1:
            seen = getattr(inversions, name)
            raise SettingsError(f"{where} [inversions]: {name} = {seen}, wanted 1 or more")


def _check_sampler(stage: StageRecipe, where: str) -> None:
    timesteps(stage.train_steps)
    if stage.split and stage.batch % 2:
        raise SettingsError(
            f"{where} [[stages]]: batch = {stage.batch}, wanted an even number: half of it "
            "reenacts, half reconstructs; or set split = false"
        )


def _check_student(recipe: Recipe, where: str) -> None:
    student, example = recipe.student, '{ "4" = [300, 550, 800, 980], "1" = [980] }'
    if not student.render:
        raise SettingsError(
            f"{where} [student]: no render; name the timesteps of each step count: {example}"
        )
    for count, steps in student.render.items():
        if str(len(timesteps(steps))) != count:
            raise SettingsError(
                f"{where} [student]: render has {steps} for {count!r}, which are {len(steps)} "
                f"steps, wanted as in {example}"
            )
    if len(student.shares) != len(student.render) or not all(s > 0 for s in student.shares):
        raise SettingsError(
            f"{where} [student]: shares = {student.shares}, wanted one above 0 for each of "
            f"{', '.join(student.render)}"
        )
    if str(student.steps) not in student.render:
        raise SettingsError(
            f"{where} [student]: steps = {student.steps}, wanted one of {', '.join(student.render)}"
        )
    if student.substeps < 1:
        raise SettingsError(f"{where} [student]: substeps = {student.substeps}, wanted 1 or more")
    stages = [stage for stage in recipe.stages if stage.kind == "student"]
    for stage in stages:
        if stage.method not in get_args(Method):
            methods = ", ".join(repr(method) for method in get_args(Method))
            raise SettingsError(
                f"{where} [[stages]]: method = {stage.method!r}, wanted one of {methods}"
            )
    if len({stage.inverter for stage in stages}) > 1:
        raise SettingsError(
            f"{where} [[stages]]: inverter = true in some stages of the student, wanted in all or "
            "in none: the network that inverts is one"
        )
