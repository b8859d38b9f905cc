"""The number of steps against synthetic machines: busy, spiky, recovering, too slow."""

from __future__ import annotations

import logging

import numpy as np
import pytest

from diffusionact.errors import SettingsError
from diffusionact.runtime.control import Goal, StepControl

NS = 1_000_000_000
CHOICES = (2, 4, 8, 20)
FIXED_MS = 30.0


class Machine:
    """Frames at the pace of their own times; a step takes `step_ms`, with noise and spikes."""

    def __init__(self, control: StepControl, step_ms: float = 5.0, noise: float = 0.05) -> None:
        self.control, self.step_ms, self.noise = control, step_ms, noise
        self.now_ns, self.steps = 0, control.steps
        self._rng = np.random.default_rng(0)

    def run(self, seconds: float, spike_ms: float = 0.0) -> list[int]:
        """Return the steps of each frame; spike_ms: of the first frame, besides."""
        taken, end_ns = [], self.now_ns + round(seconds * NS)
        while self.now_ns < end_ns:
            factor = max(1.0 + self.noise * self._rng.standard_normal(), 0.1)
            render_ms = self.steps * self.step_ms * factor + spike_ms
            self.now_ns += round((FIXED_MS + render_ms) * 1e6)
            time_ns = round((FIXED_MS + render_ms) * 1e6)
            taken.append(self.steps)
            self.steps = self.control.observe(
                self.now_ns, self.steps, time_ns, round(render_ms * 1e6)
            )
            spike_ms = 0.0
        return taken


def control(latency_ms: float = 100.0, steps: int = 4) -> StepControl:
    return StepControl(Goal(latency_ms=latency_ms), CHOICES, steps)


def test_a_goal_is_one_number_above_nothing() -> None:
    assert Goal(fps=25.0).time_ms == 40.0
    for wrong in ({}, {"fps": 0.0}, {"latency_ms": -1.0}, {"fps": 25.0, "latency_ms": 100.0}):
        with pytest.raises(SettingsError, match="--latency"):
            Goal(**wrong)


def test_the_most_steps_that_fit_are_found() -> None:
    machine = Machine(control())
    machine.run(30.0)
    assert machine.steps == 8  # 30 + 8 * 5 = 70 ms; 20 would take 130
    assert len(machine.control.changes) == 1


def test_a_busy_machine_gets_fewer_steps_within_a_second_and_recovers() -> None:
    machine = Machine(control(steps=8))
    machine.run(10.0)
    machine.step_ms = 15.0  # 30 + 8 * 15 = 150 ms
    machine.run(2.0)
    assert machine.steps == 4  # 90 ms
    assert set(machine.run(20.0)) == {4}
    machine.step_ms = 5.0
    assert machine.run(20.0)[-1] == 8
    assert [change.steps for change in machine.control.changes] == [4, 8]


@pytest.mark.parametrize("every_s", [0.8, 1.5, 3.0])
def test_spikes_change_nothing(every_s: float) -> None:
    machine = Machine(control(steps=8))
    for _ in range(40):
        assert set(machine.run(every_s, spike_ms=200.0)) == {8}
    assert not machine.control.changes


def test_more_steps_that_fail_are_not_tried_again_soon() -> None:
    """A machine that shows its load only when it is asked for more."""
    machine = Machine(control(latency_ms=110.0))
    seen: list[int] = []
    for _ in range(600):
        machine.step_ms = 5.0 if machine.steps <= 4 else 12.0
        seen += machine.run(1.0)
    ups = [c.at_s for c in machine.control.changes if c.steps == 8]
    assert len(ups) <= 15  # without the doubling it would be 140 in ten minutes
    gaps = np.diff(ups)
    assert (gaps[1:4] > 1.5 * gaps[:3]).all() and gaps[-1] > 50.0
    assert np.mean(np.array(seen) == 4) > 0.9


@pytest.mark.parametrize("load", [1.0, 1.2, 1.5, 2.0])
def test_noise_at_the_border_does_not_swing(load: float) -> None:
    """Wherever the border between two counts lies, a steady machine comes to rest."""
    machine = Machine(control(), step_ms=5.0 * load, noise=0.15)
    machine.run(60.0)
    before = len(machine.control.changes)
    machine.run(300.0)
    assert len(machine.control.changes) - before <= 2


def test_a_goal_out_of_reach_takes_the_fewest_and_says_so_once(
    caplog: pytest.LogCaptureFixture,
) -> None:
    machine = Machine(control(latency_ms=40.0), noise=0.2)  # 40 ms with 2 steps: at the border
    with caplog.at_level(logging.INFO, "diffusionact"):
        machine.run(200.0)
    assert machine.steps == 2
    assert [c.steps for c in machine.control.changes] == [2]
    warnings = [r for r in caplog.records if r.levelno == logging.WARNING]
    assert len(warnings) == 1 and "out of reach" in warnings[0].message
    assert any("steps 4 -> 2" in r.message for r in caplog.records)


def test_a_rate_is_kept_by_what_the_renderer_is_busy() -> None:
    machine = Machine(StepControl(Goal(fps=10.0), CHOICES, 20))  # 130 ms at 20 steps
    machine.run(10.0)
    assert machine.steps == 8
    assert machine.run(60.0).count(8) > 100


def test_load_that_comes_and_goes_does_not_swing_the_steps() -> None:
    """Two busy seconds in every fifteen: each attempt lasts longer than a burst is away."""
    machine = Machine(control(steps=8))
    for _ in range(40):
        machine.step_ms = 15.0
        machine.run(2.0)
        machine.step_ms = 5.0
        machine.run(13.0)
    assert len(machine.control.changes) < 30


@pytest.mark.parametrize(
    ("goal", "steps"), [(Goal(fps=1000.0 / 85.0), 8), (Goal(latency_ms=85.0), 4)]
)
def test_a_step_costs_a_latency_more_than_the_renderer(goal: Goal, steps: int) -> None:
    """50 ms at 4 steps, 70 at 8: busy for less than 85, but the next frame has waited as well."""
    machine = Machine(StepControl(goal, CHOICES, 4))
    machine.run(20.0)
    assert machine.steps == steps


def test_a_slow_machine_is_judged_too() -> None:
    machine = Machine(StepControl(Goal(latency_ms=400.0), CHOICES, 20), step_ms=100.0)
    machine.run(30.0)  # two seconds a frame to begin with
    assert machine.steps == 2


def test_frames_under_way_when_the_steps_change_do_not_count() -> None:
    made = control()
    for i in range(40):  # of a count that is not in use any more
        assert made.observe(i * 40_000_000, 20, 400_000_000, 380_000_000) == 4
    assert not made.changes
