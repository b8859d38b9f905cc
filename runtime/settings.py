"""What a caller of the reenactor may choose."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from diffusionact.errors import SettingsError
from diffusionact.runtime.component import BACKENDS, PRECISIONS
from diffusionact.runtime.loop import APPROXIMATIONS, Approximation
from diffusionact.runtime.tracker import TRACKERS, TrackerKind


@dataclass(frozen=True)
class Settings:
    """What a caller may choose; everything else is in the bundle's manifest."""

    steps: int | tuple[int, ...] | None = None  # of render: a count, timesteps, or the bundle's
    # Further counts that `Reenactor.set_steps` may choose; None: those of the bundle.
    step_choices: tuple[int, ...] | None = ()
    backend: str = "auto"  # the fastest here, by measurement (runtime/choice.py)
    precision: str = "auto"  # the fastest that is as good as fp32 to the eye; or its name
    approximate: Approximation | None = None  # faster and less exact: "reuse", see docs/cpu.md
    threads: int = 0  # 0: one for each physical core
    at_once: int | None = None  # frames of a clip; None: as many as are fastest here
    paste: bool = True  # into the portrait; otherwise Result.frame is the bare crop
    smoothing: float = 1.0  # of the driver's motion: 0 is off, 2 twice as strong
    absolute_pose: bool = False  # the driver's head pose itself, not its change
    tracker: TrackerKind = "auto"  # "published" where the bundle has it, else "mediapipe"
    compat: Literal["published"] | None = None  # the authors' surprises, docs/compatibility.md

    def __post_init__(self) -> None:
        for what, seen, known in (
            ("backend", self.backend, BACKENDS),
            ("precision", self.precision, PRECISIONS),
        ):
            if seen != "auto" and seen not in known:
                choices = ", ".join(("auto", *known))
                raise SettingsError(f"{what} {seen!r} is not known; choose from: {choices}")
        if self.approximate not in (None, *APPROXIMATIONS):
            ways = ", ".join(APPROXIMATIONS)
            raise SettingsError(f"approximate={self.approximate!r}; choose from: {ways}, or None")
        if self.threads < 0:
            raise SettingsError(f"threads={self.threads}; wanted 0 (one a core) or more")
        if self.at_once is not None and self.at_once < 1:
            raise SettingsError(f"at_once={self.at_once}; wanted 1 or more, or None")
        if not self.smoothing >= 0.0:
            raise SettingsError(f"smoothing={self.smoothing}; wanted 0 (off) or more")
        if self.tracker not in TRACKERS:
            raise SettingsError(f"tracker={self.tracker!r}; choose from: {', '.join(TRACKERS)}")
        if self.compat not in (None, "published"):
            raise SettingsError(f"compat={self.compat!r}; wanted 'published', or None")
