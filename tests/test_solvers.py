"""The training-free solvers against the exact solution for Gaussian data, and each other."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from benchmarks.solvers import SOLVERS, walk
from diffusionact import schedule

TABLE = schedule.alpha_bars()
MEAN, DEVIATION = 0.3, 0.2  # of the data
Array = npt.NDArray[np.float64]


def predict(x: Array, t: int) -> Array:
    """x_0 as the best network would predict it: the mean of the data given x_t."""
    alpha, variance = np.sqrt(TABLE[t]), 1.0 - TABLE[t]
    gain = alpha * DEVIATION**2 / (alpha**2 * DEVIATION**2 + variance)
    return np.asarray(MEAN + gain * (x - alpha * MEAN))


def exact(x: Array, start: int, end: int) -> Array:
    """x at `end` on the probability flow through x at `start`: its place in the Gaussian stays."""

    def at(t: int) -> tuple[float, float]:
        alpha = float(np.sqrt(TABLE[t]))
        return alpha * MEAN, float(np.sqrt(alpha**2 * DEVIATION**2 + 1.0 - TABLE[t]))

    (from_mean, from_deviation), (to_mean, to_deviation) = at(start), at(end)
    return np.asarray(to_mean + to_deviation * (x - from_mean) / from_deviation)


def error(solver: str, steps: int) -> float:
    """At the lowest timestep, before the last step, which is of first order in all solvers; the
    timesteps are even in lambda, as far as they are whole numbers."""
    lam = 0.5 * np.log(TABLE / (1.0 - TABLE))
    wanted = np.linspace(lam[960], lam[160], steps + 1)
    at = sorted({int(np.abs(lam - each).argmin()) for each in wanted})
    assert len(at) == steps + 1
    reached: list[Array] = []

    def watched(x: Array, t: int) -> Array:
        reached.append(x)
        return predict(x, t)

    x = np.linspace(-2.0, 2.0, 9)
    walk(solver, watched, at, TABLE, x)
    return float(np.abs(reached[-1] - exact(x, at[-1], at[0])).max())


@pytest.mark.parametrize(("solver", "order"), [("ddim", 1), ("dpm++2m", 2), ("unipc", 3)])
def test_the_error_falls_with_the_order(solver: str, order: int) -> None:
    """A quarter of the step: 4^order times less, or nearly so. UniPC's corrector adds an order."""
    assert 4 ** (order - 0.2) < error(solver, 16) / error(solver, 64) < 4 ** (order + 0.2)


def test_each_solver_is_better_than_the_one_before() -> None:
    first, second, third = (error(solver, 16) for solver in SOLVERS)
    assert first > 3 * second > 6 * third


def test_ddim_is_the_runtimes() -> None:
    at = (100, 300, 700, 980)
    x = np.linspace(-2.0, 2.0, 9)
    due, run = x, schedule.render_run("x0", at, TABLE)
    for step in run.steps:
        levels = float(run.alpha_bar[step.row]), float(run.alpha_bar_to[step.row])
        due = schedule.ddim_step("x0", due, predict(due, at[step.row]), *levels)
    seen = walk("ddim", lambda x, t: predict(x, t).clip(-1.0, 1.0), at, TABLE, x)
    np.testing.assert_allclose(seen, due, atol=1e-12)


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_network_that_knows_the_picture_is_right_at_once(solver: str) -> None:
    """And is asked once at each timestep, the highest first."""
    asked: list[int] = []

    def certain(x: Array, t: int) -> Array:
        asked.append(t)
        return np.full_like(x, 0.7)

    seen = walk(solver, certain, (50, 500, 900), TABLE, np.ones(3))
    np.testing.assert_allclose(seen, 0.7, atol=1e-12)
    assert asked == [900, 500, 50]


def test_one_and_two_steps_are_the_same_in_all() -> None:
    x = np.linspace(-2.0, 2.0, 9)
    for at in ((980,), (300, 980)):
        ways = [walk(solver, predict, at, TABLE, x) for solver in SOLVERS]
        np.testing.assert_allclose(ways[1], ways[0])
    with pytest.raises(ValueError, match="choose from ddim"):
        walk("euler", predict, (980,), TABLE, x)
