"""The options of commands that move a face, and the reenactor that they describe."""

from __future__ import annotations

import argparse
import math
from pathlib import Path
from typing import TYPE_CHECKING

from diffusionact.assets import bundle_path

if TYPE_CHECKING:
    from diffusionact.runtime.control import Goal
    from diffusionact.runtime.reenactor import Reenactor

RATE = 25.0  # faces a second: a usual camera's, and what looks smooth


def model_options() -> argparse.ArgumentParser:
    """Return the options that choose a bundle, its steps and where it runs."""
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--bundle",
        default=bundle_path(),
        metavar="DIR",
        help="the model (default: the shipped one)",
    )
    options.add_argument(
        "--steps",
        type=steps,
        metavar="N",
        help="diffusion steps, or timesteps as 0,250,500 (default: the bundle's)",
    )
    options.add_argument("--device", default="auto", help="auto, cpu or cuda (default: auto)")
    options.add_argument(
        "--backend", default="auto", help="auto, or the name of one, such as ort (default: auto)"
    )
    options.add_argument(
        "--precision",
        default="auto",
        help="auto, or one that the backend has here, such as fp32 (default: auto)",
    )
    options.add_argument(
        "--approximate",
        choices=("reuse",),
        help="twice as fast, less exact: reuse deep features between steps; says how far it is",
    )
    options.add_argument(
        "--threads", type=int, default=0, metavar="N", help="CPU threads (default: one a core)"
    )
    return options


def bundle_argument(parser: argparse.ArgumentParser) -> None:
    """Give a command its BUNDLE, the shipped one where none is named."""
    parser.add_argument(
        "bundle",
        nargs="?",
        default=bundle_path(),
        metavar="BUNDLE",
        help="(default: the shipped one)",
    )


def load_reenactor(arguments: argparse.Namespace) -> Reenactor:
    """Return the reenactor of `model_options` and of what the command adds to them."""
    from diffusionact.runtime.reenactor import Reenactor
    from diffusionact.runtime.settings import Settings

    settings = Settings(
        steps=arguments.steps,
        step_choices=getattr(arguments, "step_choices", ()),
        backend=arguments.backend,
        precision=arguments.precision,
        threads=arguments.threads,
        approximate=arguments.approximate,
        paste=not arguments.crop,
        smoothing=arguments.smoothing,
        absolute_pose=arguments.absolute_pose,
        tracker=arguments.tracker,
        compat=arguments.compat,
    )
    return Reenactor.load(arguments.bundle, device=arguments.device, settings=settings)


def steps(text: str) -> int | tuple[int, ...]:
    """Return a count, or the timesteps themselves. Raises: argparse.ArgumentTypeError."""
    try:
        numbers = tuple(int(word) for word in text.split(","))
    except ValueError:
        message = f"{text!r}; wanted a count such as 8, or timesteps such as 0,250,500"
        raise argparse.ArgumentTypeError(message) from None
    return numbers[0] if len(numbers) == 1 else numbers


def goal_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the step control, for `goal_or_rate`."""
    add = parser.add_argument
    add(
        "--latency",
        type=_milliseconds,
        metavar="T",
        help="keep to this latency, such as 100ms, by the number of steps",
    )
    add(
        "--fps",
        type=float,
        metavar="N",
        help="keep to this rate by the number of steps "
        f"(default: {RATE:g}, with the bundle's steps at most; 0, or --steps: always as many)",
    )


def _asked_goal(arguments: argparse.Namespace) -> Goal | None:
    """The goal that was asked for, for which the bundle's counts of steps are prepared; None
    without one. Raises: SettingsError."""
    from diffusionact.runtime.control import Goal

    if arguments.latency is None and arguments.fps is None:
        return None
    arguments.step_choices = None
    return Goal(arguments.latency, arguments.fps)


def goal_or_rate(arguments: argparse.Namespace, rate: float | None) -> Goal | None:
    """Return the goal that was asked for; else, of a `rate`, for which the bundle's own number of
    steps and all below it are prepared: as good as it is meant to be where the machine is fast
    enough, and moving where it is not. None where `--steps` or `--fps 0` pins the steps, the
    bundle lists no fewer, or there is no rate to keep to. Raises: SettingsError, BundleError."""
    from diffusionact import manifest
    from diffusionact.runtime.control import Goal

    pinned = arguments.fps == 0.0 or arguments.steps is not None
    arguments.fps = arguments.fps or None
    goal = _asked_goal(arguments)
    if goal is not None or pinned or rate is None:
        return goal
    arguments.step_choices = manifest.read(Path(arguments.bundle)).render.fewer
    return Goal(fps=rate) if arguments.step_choices else None


def warn_of_missing_label() -> None:
    """Log what `--no-label` lays upon its user."""
    import logging

    logging.getLogger("diffusionact").warning(
        "--no-label: nothing on the picture says that it was generated; whoever shows it to "
        "others has to say so"
    )


def positive(text: str) -> float:
    """Return a number above 0. Raises: argparse.ArgumentTypeError."""
    try:
        number = float(text)
    except ValueError:
        number = math.nan
    if not 0.0 < number < math.inf:
        raise argparse.ArgumentTypeError(f"{text!r}; wanted a number above 0")
    return number


def _milliseconds(text: str) -> float:
    """Return milliseconds of a time such as 100, 100ms or 0.1s."""
    number, unit = text, 1.0
    for ending, factor in (("ms", 1.0), ("s", 1000.0)):
        if text.endswith(ending):
            number, unit = text.removesuffix(ending), factor
            break
    try:
        return float(number) * unit
    except ValueError:
        message = f"{text!r}; wanted a time such as 100ms or 0.1s"
        raise argparse.ArgumentTypeError(message) from None


def words(text: str) -> tuple[str, ...]:
    """Return what stands between commas. Raises: argparse.ArgumentTypeError where nothing does."""
    found = tuple(word for word in text.split(",") if word)
    if not found:
        raise argparse.ArgumentTypeError(f"{text!r}; wanted a name, or names between commas")
    return found


def counts(text: str) -> tuple[int, ...]:
    """Return the numbers between commas. Raises: argparse.ArgumentTypeError."""
    numbers = steps(text)
    return numbers if isinstance(numbers, tuple) else (numbers,)
