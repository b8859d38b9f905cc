from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from diffusionact import schedule
from diffusionact.errors import SettingsError

GOLDEN = Path(__file__).parent / "golden"
TABLE_RTOL = 1e-12  # float64 tables against the published code; cumprod re-derived there
FLOAT32_ATOL = 2e-6  # a handful of float32 roundings on values of order one
KINDS: tuple[schedule.Prediction, ...] = ("eps", "v", "x0")


@pytest.fixture(scope="module")
def table() -> schedule.Float64Array:
    return schedule.alpha_bars()


def golden_runs() -> dict[str, list[int]]:
    runs: dict[str, list[int]] = json.loads((GOLDEN / "schedules.json").read_text())["timesteps"]
    return runs


@pytest.mark.parametrize("steps", golden_runs())
def test_timesteps_and_tables_are_the_published_ones(
    steps: str, table: schedule.Float64Array
) -> None:
    arrays = np.load(GOLDEN / "schedules.npz")
    at = schedule.timesteps(int(steps))
    assert at.tolist() == golden_runs()[steps]
    render = schedule.render_run("eps", at, table)
    invert = schedule.inversion_run("eps", at, table)
    name = f"T{steps}_"
    for seen, wanted in (
        (render.alpha_bar, "alphas_cumprod"),
        (render.alpha_bar_to, "alphas_cumprod_prev"),
        (invert.alpha_bar_to, "alphas_cumprod_next"),
        (schedule.x0_weights("eps", render.alpha_bar)[0], "sqrt_recip_alphas_cumprod"),
        (-schedule.x0_weights("eps", render.alpha_bar)[1], "sqrt_recipm1_alphas_cumprod"),
    ):
        np.testing.assert_allclose(seen, arrays[name + wanted], rtol=TABLE_RTOL, atol=1e-17)
    np.testing.assert_allclose(schedule.betas(), arrays["base_betas"], rtol=TABLE_RTOL)


def test_valid_step_counts_are_the_published_ones() -> None:
    published = json.loads((GOLDEN / "schedules.json").read_text())["valid_T"]
    assert list(schedule.valid_steps()) == published


@pytest.mark.parametrize(("steps", "nearby"), [(37, "36, 38"), (60, "59"), (1, "2"), (0, "2")])
def test_a_step_count_without_stride_names_its_neighbours(steps: int, nearby: str) -> None:
    with pytest.raises(SettingsError, match=f"steps={steps}.*{nearby}"):
        schedule.timesteps(steps)


@pytest.mark.parametrize("listed", [[], [5, 5], [9, 3], [-1, 4], [0, 1000], [0.5, 2], [[1, 2]]])
def test_a_wrong_list_of_timesteps_is_refused(listed: list[int]) -> None:
    with pytest.raises(SettingsError, match=r"wanted ascending.*0\.\.999"):
        schedule.timesteps(listed)


@pytest.mark.parametrize("kind", ["eps", "v"])
def test_an_inversion_takes_the_constant_stride(kind: schedule.Prediction) -> None:
    at = schedule.inversion_timesteps(kind, 20)
    assert at.tolist() == schedule.timesteps(20).tolist()


def test_an_inversion_by_x0_starts_where_there_is_noise() -> None:
    assert schedule.inversion_timesteps("x0", 4).tolist() == [150, 362, 575, 787]
    fifty = schedule.inversion_timesteps("x0", 50)
    assert len(fifty) == 50 and fifty[0] == 150 and np.ptp(np.diff(fifty)) <= 1
    assert schedule.inversion_timesteps("x0", 4, total=500).tolist() == [75, 181, 287, 393]


@pytest.mark.parametrize("steps", [-1, 0, 961])
def test_an_inversion_of_no_or_too_many_steps_is_refused(steps: int) -> None:
    with pytest.raises(SettingsError, match="wanted ascending"):
        schedule.inversion_timesteps("x0", steps)


def test_an_explicit_list_is_taken_as_it_is(table: schedule.Float64Array) -> None:
    at = schedule.timesteps((20, 300, 999))
    run = schedule.render_run("v", at, table)
    assert run.timesteps.tolist() == [20, 300, 999]
    assert [step.row for step in run.steps] == [2, 1, 0]
    assert run.alpha_bar_to.tolist() == [1.0, table[20], table[300]]


@pytest.mark.parametrize("kind", KINDS)
def test_a_perfect_prediction_gives_x0_and_eps_back(
    kind: schedule.Prediction, table: schedule.Float64Array
) -> None:
    rng = np.random.default_rng(0)
    x_0 = rng.uniform(-1, 1, (1, 3, 4, 4))
    eps = rng.standard_normal((1, 3, 4, 4))
    for t in (0, 20, 500, 980):
        x_t = schedule.add_noise(x_0, eps, table[t])
        prediction = schedule.prediction_target(kind, x_0, eps, table[t])
        seen = schedule.x0_from_prediction(kind, x_t, prediction, table[t])
        np.testing.assert_allclose(seen, x_0, atol=1e-9)
        np.testing.assert_allclose(schedule.eps_from_x0(x_t, x_0, table[t]), eps, atol=1e-9)
        stepped = schedule.ddim_step(kind, x_t, prediction, table[t], table[t // 2])
        np.testing.assert_allclose(stepped, schedule.add_noise(x_0, eps, table[t // 2]), atol=1e-9)


def test_eps_is_derived_anew_from_the_clipped_picture(table: schedule.Float64Array) -> None:
    x, prediction = np.full((1, 1), 3.0, np.float32), np.zeros((1, 1), np.float32)
    stepped = schedule.ddim_step("eps", x, prediction, table[500], table[250])
    a, to = table[500], table[250]
    noise = (np.sqrt(1 / a) * 3.0 - 1.0) / np.sqrt(1 / a - 1)
    np.testing.assert_allclose(
        stepped, np.sqrt(to) + np.sqrt(1 - to) * noise, atol=FLOAT32_ATOL * 3
    )


@pytest.mark.parametrize("kind", KINDS)
def test_the_ends_of_a_run(kind: schedule.Prediction, table: schedule.Float64Array) -> None:
    at = schedule.timesteps(8)
    last = schedule.render_run(kind, at, table).steps[-1]
    assert (last.row, last.to_signal, last.to_noise) == (0, 1.0, 0.0)
    top = schedule.inversion_run(kind, at, table).steps[-1]
    assert (top.row, top.to_signal, top.to_noise) == (7, 0.0, 1.0)
    assert all(type(value) is np.float32 for value in top[1:])


def test_float64_tables_do_not_widen_a_float32_picture(table: schedule.Float64Array) -> None:
    x = np.zeros((1, 3, 2, 2), np.float32)
    assert schedule.ddim_step("v", x, x, table[900], table[10]).dtype == np.float32
    assert schedule.add_noise(x, x, table[10]).dtype == np.float32


def test_an_unknown_prediction_is_refused(table: schedule.Float64Array) -> None:
    with pytest.raises(SettingsError, match=r"'noise'.*'eps', 'v' or 'x0'"):
        schedule.x0_weights("noise", table[0])  # type: ignore[arg-type]


@pytest.mark.torch
@pytest.mark.parametrize("kind", KINDS)
def test_torch_tensors_give_the_same_numbers(
    kind: schedule.Prediction, table: schedule.Float64Array
) -> None:
    import torch

    rng = np.random.default_rng(1)
    x = rng.standard_normal((2, 3, 4, 4)).astype(np.float32)
    prediction = rng.standard_normal((2, 3, 4, 4)).astype(np.float32)
    at, to = table[[300, 900]].reshape(2, 1, 1, 1), table[[100, 700]].reshape(2, 1, 1, 1)
    wanted = schedule.ddim_step(kind, x, prediction, at, to)
    tensors = [torch.from_numpy(array) for array in (x, prediction, at, to)]
    seen = schedule.ddim_step(kind, *tensors)
    assert seen.dtype == torch.float32
    np.testing.assert_allclose(seen.numpy(), wanted, atol=FLOAT32_ATOL)
    one = schedule.ddim_step(kind, tensors[0], tensors[1], float(at[0, 0, 0, 0]), 1.0)
    assert one.dtype == torch.float32
