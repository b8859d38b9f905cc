"""The diffusion schedule and the deterministic sampler (DDIM), one function per equation.

Tables are float64 and made once on the CPU. The equations take NumPy arrays and torch tensors
alike; `alpha_bar` may be a float or anything that broadcasts against the picture.
Notation: x_t = sqrt(alpha_bar) x_0 + sqrt(1 - alpha_bar) eps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeAlias

import numpy as np
import numpy.typing as npt

from diffusionact.errors import SettingsError

Prediction: TypeAlias = Literal["eps", "v", "x0"]
Float64Array: TypeAlias = npt.NDArray[np.float64]
Int64Array: TypeAlias = npt.NDArray[np.int64]

TOTAL_STEPS = 1000
FIRST_INVERTED_X0 = 150  # errors grow twofold there, a hundredfold at 0


def betas(
    total: int = TOTAL_STEPS, beta_start: float = 1e-4, beta_end: float = 0.02
) -> Float64Array:
    """Return the linear noise variances, float64 [total]. Source: DDPM, section 4."""
    return np.asarray(np.linspace(beta_start, beta_end, total), np.float64)


def alpha_bars(
    total: int = TOTAL_STEPS, beta_start: float = 1e-4, beta_end: float = 0.02
) -> Float64Array:
    """Return the share of signal variance left at every timestep, float64 [total].

    Source: DDPM, Eq. 4.
    """
    return np.asarray(np.cumprod(1.0 - betas(total, beta_start, beta_end)), np.float64)


def valid_steps(total: int = TOTAL_STEPS) -> tuple[int, ...]:
    """Return the step counts that a constant stride can give, ascending."""
    return tuple(sorted({math.ceil(total / stride) for stride in range(1, total)}))


def timesteps(steps: int | Sequence[int], total: int = TOTAL_STEPS) -> Int64Array:
    """Return the timesteps of a run, int64 [T], ascending.

    An integer is a step count: 0, d, 2d, ... with the smallest stride d that gives it.
    A sequence is taken as the timesteps themselves.

    Raises: SettingsError for a count that no stride gives, or a list that is empty, not
    ascending or outside 0..total-1.
    Source: DiffAE code, respaced schedule ("ddimT").
    """
    if not isinstance(steps, (int, np.integer)):
        return _explicit_timesteps(steps, total)
    for stride in range(1, total):
        if math.ceil(total / stride) == steps:
            return np.arange(0, total, stride, dtype=np.int64)
    valid = valid_steps(total)
    nearby = sorted(valid, key=lambda count: (abs(count - int(steps)), count))[:3]
    raise SettingsError(
        f"steps={steps}: no constant stride over {total} timesteps gives that many; "
        f"the nearest valid counts are {', '.join(map(str, sorted(nearby)))}. "
        "Give one of these, or the list of timesteps itself."
    )


def _explicit_timesteps(steps: Sequence[int], total: int) -> Int64Array:
    values = np.asarray(steps)
    ascending = values.ndim == 1 and values.size > 0 and bool(np.all(np.diff(values) > 0))
    integers = ascending and bool(np.all(values == np.floor(values)))
    if not integers or values[0] < 0 or values[-1] >= total:
        raise SettingsError(
            f"timesteps {list(steps)}: wanted ascending, different integers in 0..{total - 1}"
        )
    return values.astype(np.int64)


def inversion_timesteps(kind: Prediction, steps: int, total: int = TOTAL_STEPS) -> Int64Array:
    """Return the timesteps of an inversion in `steps` steps, int64 [steps], ascending.

    A network that predicts x_0 does not start at 0: eps is its error divided by the noise level,
    and a hundred times the error of a clean picture is no noise.

    Raises: SettingsError for a count that the schedule does not give.
    """
    if kind != "x0":
        return timesteps(steps, total)
    first = FIRST_INVERTED_X0 * total // TOTAL_STEPS
    return timesteps([first + i * (total - first) // steps for i in range(steps)], total)


def add_noise(x_0: Any, eps: Any, alpha_bar: Any) -> Any:
    """Return x_t, the picture under noise. Source: DDPM, Eq. 4."""
    return x_0 * _like(_sqrt(alpha_bar), x_0) + eps * _like(_sqrt(1.0 - alpha_bar), x_0)


def prediction_target(kind: Prediction, x_0: Any, eps: Any, alpha_bar: Any) -> Any:
    """Return what a network of this kind should predict: eps, x_0, or v.

    v = sqrt(alpha_bar) eps - sqrt(1 - alpha_bar) x_0.
    Source: Progressive Distillation (Salimans & Ho), appendix D.
    """
    if kind == "eps":
        return eps
    if kind == "x0":
        return x_0
    _check_kind(kind)
    return eps * _like(_sqrt(alpha_bar), x_0) - x_0 * _like(_sqrt(1.0 - alpha_bar), x_0)


def x0_weights(kind: Prediction, alpha_bar: Any) -> tuple[Any, Any]:
    """Return (a, b) of the estimate x_0 = a x_t + b prediction, in the type of `alpha_bar`.

    Source: DDIM, Eq. 9 for eps; Progressive Distillation, appendix D for v.
    """
    if kind == "eps":
        return _sqrt(1.0 / alpha_bar), -_sqrt(1.0 / alpha_bar - 1.0)
    if kind == "v":
        return _sqrt(alpha_bar), -_sqrt(1.0 - alpha_bar)
    _check_kind(kind)
    return 0.0 * alpha_bar, 0.0 * alpha_bar + 1.0


def x0_from_prediction(kind: Prediction, x: Any, prediction: Any, alpha_bar: Any) -> Any:
    """Return the estimate of x_0, not clipped. Source: DDIM, Eq. 9."""
    on_x, on_prediction = x0_weights(kind, alpha_bar)
    return x * _like(on_x, x) + prediction * _like(on_prediction, x)


def eps_from_x0(x: Any, x_0: Any, alpha_bar: Any) -> Any:
    """Return the noise that makes x of this x_0. Source: DDIM, Eq. 9 solved for eps."""
    scale, spread = _sqrt(1.0 / alpha_bar), _sqrt(1.0 / alpha_bar - 1.0)
    return (x * _like(scale, x) - x_0) / _like(spread, x)


def ddim_update(x_0: Any, eps: Any, alpha_bar_to: Any) -> Any:
    """Return x at the noise level `alpha_bar_to`: 1 for a picture, 0 for pure noise.

    The level is rounded to the precision of x before its roots are taken, as published.
    Source: DDIM, Eq. 12 with sigma = 0; DiffusionAct, Eq. 1-3.
    """
    level = _like(alpha_bar_to, x_0)
    return x_0 * _like(_sqrt(level), x_0) + eps * _like(_sqrt(1.0 - level), x_0)


def ddim_step(kind: Prediction, x: Any, prediction: Any, alpha_bar: Any, alpha_bar_to: Any) -> Any:
    """Return x moved from noise level `alpha_bar` to `alpha_bar_to`.

    x_0 is clipped to [-1, 1] and eps re-derived from the clipped x_0, in both directions.
    Source: DDIM, Eq. 12; the clipping is DiffAE code.
    """
    x_0 = x0_from_prediction(kind, x, prediction, alpha_bar).clip(-1.0, 1.0)
    return ddim_update(x_0, eps_from_x0(x, x_0, alpha_bar), alpha_bar_to)


class Step(NamedTuple):
    """float32 scalars of one step, and the row of the time table it belongs to."""

    row: int
    x0_on_x: np.float32
    x0_on_prediction: np.float32
    sqrt_recip: np.float32  # sqrt(1 / alpha_bar)
    sqrt_recip_minus_one: np.float32  # sqrt(1 / alpha_bar - 1)
    to_signal: np.float32  # sqrt(alpha_bar_to)
    to_noise: np.float32  # sqrt(1 - alpha_bar_to)


@dataclass(frozen=True)
class Run:
    """The tables of one run; arrays ascend in t, `steps` stands in the order of execution.

    timesteps: int64 [T]; alpha_bar: float64 [T], level at which the network is asked;
    alpha_bar_to: float64 [T], level that the step leads to.
    """

    prediction: Prediction
    timesteps: Int64Array
    alpha_bar: Float64Array
    alpha_bar_to: Float64Array
    steps: tuple[Step, ...]


def render_run(kind: Prediction, steps: Sequence[int] | Int64Array, table: Float64Array) -> Run:
    """Return the run from x_T down to the picture: every step leads to the one below, the last
    to alpha_bar = 1. `table` is alpha_bars(). Source: DDIM, Eq. 12; DiffusionAct, Eq. 1-3.
    """
    at = np.asarray(steps, np.int64)
    return _run(kind, at, table, np.append(1.0, table[at[:-1]]), range(len(at) - 1, -1, -1))


def inversion_run(kind: Prediction, steps: Sequence[int] | Int64Array, table: Float64Array) -> Run:
    """Return the run from the picture up to x_T: every step leads to the one above, the last
    to alpha_bar = 0, so that x_T is a pure noise estimate. `table` is alpha_bars().

    Source: DiffusionAct, Eq. 1-3; the last level is DiffAE code (the paper writes alpha_bar_T).
    """
    at = np.asarray(steps, np.int64)
    return _run(kind, at, table, np.append(table[at[1:]], 0.0), range(len(at)))


def _run(
    kind: Prediction, at: Int64Array, table: Float64Array, level_to: Float64Array, order: range
) -> Run:
    level = table[at]
    on_x, on_prediction = x0_weights(kind, level)
    rounded = level_to.astype(np.float32)
    columns = (
        on_x,
        on_prediction,
        np.sqrt(1.0 / level),
        np.sqrt(1.0 / level - 1.0),
        np.sqrt(rounded),
        np.sqrt(np.float32(1.0) - rounded),
    )
    rows = np.stack([np.asarray(column, np.float32) for column in columns], axis=1)
    return Run(kind, at, level, level_to, tuple(Step(i, *rows[i]) for i in order))


def _check_kind(kind: str) -> None:
    if kind not in ("eps", "v", "x0"):
        raise SettingsError(f"prediction {kind!r} is not known; wanted 'eps', 'v' or 'x0'")


def _sqrt(value: Any) -> Any:
    return value.sqrt() if hasattr(value, "sqrt") else np.sqrt(value)


def _like(weight: Any, x: Any) -> Any:
    """Return `weight` in the precision of x, so that float64 tables never widen a picture."""
    if hasattr(weight, "to"):
        return weight.to(x.dtype)
    return np.asarray(weight, x.dtype) if isinstance(x, (np.ndarray, np.generic)) else float(weight)
