"""Samplers that need no training: DDIM, DPM-Solver++ (2M) and UniPC, as yardsticks for students.

Each is a way down the same probability-flow ODE, written for predictions of x_0, which are clipped
to [-1, 1] as the runtime does. With alpha = sqrt(alpha_bar), sigma = sqrt(1 - alpha_bar) and
lambda = log(alpha / sigma), a step from s to t has the size h = lambda_t - lambda_s.

Of ready-made solvers those of diffusers are the best kept. They choose timesteps of their own
(UniPC takes no list), and a step of theirs would have to be told that its prediction is clipped
already; the equations are shorter than that, and tests hold them to the exact solution.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeAlias, TypeVar

from diffusionact.schedule import Float64Array

X = TypeVar("X")  # an array or tensor
Predict: TypeAlias = Callable[[X, int], X]  # x_t, t -> x_0
SOLVERS = ("ddim", "dpm++2m", "unipc")


@dataclass(frozen=True)
class _Level:
    """One place on the way. lam: half the logarithm of the signal-to-noise ratio."""

    alpha: float
    sigma: float

    @property
    def lam(self) -> float:
        return math.log(self.alpha / self.sigma) if self.sigma else math.inf


def walk(solver: str, predict: Predict[X], at: Sequence[int], table: Float64Array, x: X) -> X:
    """The picture at the end of the way down from x at the last timestep.

    Args:
        solver: one of SOLVERS.
        at: timesteps, ascending; the network is asked once at each.
        table: alpha_bars().

    Raises:
        ValueError: the solver is not known.
    """
    if solver not in SOLVERS:
        raise ValueError(f"solver {solver!r}; choose from {', '.join(SOLVERS)}")
    levels = [_Level(math.sqrt(table[t]), math.sqrt(1.0 - table[t])) for t in reversed(at)]
    levels.append(_Level(1.0, 0.0))
    seen: list[tuple[_Level, X]] = []  # levels behind us and what was predicted there
    before: X | None = None  # x at the level behind, for the corrector
    for t, here, to in zip(reversed(at), levels, levels[1:], strict=False):
        x_0 = predict(x, int(t))
        if solver == "unipc" and before is not None:
            x = _corrected(before, seen, here, x_0)
        seen = [*seen[-1:], (here, x_0)]
        # The last step, to no noise at all, is infinitely long: of first order in every solver.
        second = solver != "ddim" and len(seen) > 1 and to.sigma > 0
        before, x = x, (_second_order if second else _first_order)(x, seen, to)
    return x


def _first_order(x: X, seen: Sequence[tuple[_Level, X]], to: _Level) -> X:
    """x at `to`. Source: DDIM, Eq. 12 with sigma = 0; DPM-Solver++, Eq. 9 with k = 1."""
    (here, x_0) = seen[-1]
    return _moved(x, here, to, x_0)


def _second_order(x: X, seen: Sequence[tuple[_Level, X]], to: _Level) -> X:
    """x at `to`, x_0 continued along a line through the last two predictions.

    Source: DPM-Solver++, Algorithm 2 (2M); UniPC, Eq. 3 with p = 2 and B(h) = e^h - 1, the same.
    """
    (behind, older), (here, x_0) = seen
    ratio = (here.lam - behind.lam) / (to.lam - here.lam)
    along = x_0 + (x_0 - older) * (0.5 / ratio)  # type: ignore[operator]
    return _moved(x, here, to, along)


def _corrected(x: X, seen: Sequence[tuple[_Level, X]], to: _Level, x_0: X) -> X:
    """x at `to` once more from the level behind it, now that x_0 at `to` is known.

    Source: UniPC, Eq. 5 and Theorem 3.1, with p up to 2, B(h) = e^h - 1, predictions of x_0.
    """
    here, last = seen[-1]
    h = to.lam - here.lam
    change = x_0 - last  # type: ignore[operator]
    if len(seen) == 1:
        return _moved(x, here, to, last + 0.5 * change)
    behind, older = seen[0]
    ratio = (behind.lam - here.lam) / h  # negative
    # a + b = first and a ratio + b = second: the weights of both differences, for B(h)
    phi = math.expm1(-h) / -h - 1.0
    first, phi = phi / math.expm1(-h), phi / -h - 0.5
    second = 2.0 * phi / math.expm1(-h)
    a = (second - first) / (ratio - 1.0)
    slope = (older - last) * (a / ratio)  # type: ignore[operator]
    return _moved(x, here, to, last + slope + (first - a) * change)


def _moved(x: X, here: _Level, to: _Level, x_0: X) -> X:
    """x at `to` if the prediction were x_0 all the way. Source: DPM-Solver++, Eq. 8."""
    decay = math.exp(here.lam - to.lam)
    return x * (to.sigma / here.sigma) + x_0 * (to.alpha * (1.0 - decay))  # type: ignore[operator]
