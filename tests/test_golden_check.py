"""golden_check on directories of its own: another rule, other sizes, other step counts."""

from __future__ import annotations

import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

from tests import golden_check
from tests.golden_maker import (
    BATCH,
    RULE,
    TOLERANCES,
    Arrays,
    Made,
    as_arrays,
    flow,
    inner,
    write,
    write_cut,
    write_schedules,
)

pytestmark = [pytest.mark.torch, pytest.mark.timeout(900)]  # one run exports eleven networks

ROOT = Path(__file__).parents[1]
SHARED = ROOT.parent / "shared" / "golden"
CUT = "cut/render_T3"
WRONG = "render_T3/patch_corner"


@pytest.fixture(scope="module")
def network() -> Made:
    config = {"image_size": 16, "model_channels": 8, "ch_mult": [1, 2], "enc_ch_mult": [1, 2, 2]}
    return Made("a", {**config, "attn": [8]}, BATCH)


@pytest.fixture(scope="module")
def inner_arrays(network: Made) -> Arrays:
    return as_arrays(inner(network))


@pytest.fixture(scope="module")
def checked(
    tmp_path_factory: pytest.TempPathFactory, network: Made, inner_arrays: Arrays
) -> subprocess.CompletedProcess[str]:
    """golden_check on a whole directory, in which a single value is wrong."""
    folder = tmp_path_factory.mktemp("golden")
    arrays = {**inner_arrays, **as_arrays(flow(network, renders=4, inverts=5))}
    stored = {f"in_{key}": value for key, value in as_arrays(network.given).items()}
    write(folder, network, {**arrays, **stored}, T_render=4, T_reverse=5)
    write_cut(folder, changed=(WRONG, (1, 2, 3)))
    write_schedules(folder, 1000, {"4": [0, 250, 500, 750], "5": [0, 200, 400, 600, 800]})
    command = [sys.executable, ROOT / "tests" / "golden_check.py", folder, "--threads", "1"]
    return subprocess.run(command, capture_output=True, text=True, cwd=folder, check=False)


def table(output: str) -> dict[str, list[str]]:
    """Name -> the other columns."""
    lines = [[part.strip() for part in line.split("|")] for line in output.splitlines()]
    rows = [line for line in lines if len(line) == 5]
    assert rows[0] == ["name", "max abs", "mean abs", "tolerance", "ok"]
    return {row[0]: row[1:] for row in rows[1:]}


def test_another_rule_size_and_step_count(
    checked: subprocess.CompletedProcess[str], network: Made, inner_arrays: Arrays
) -> None:
    rows = table(checked.stdout)
    exported = {*flow(network, 4, 5)}
    wanted = {f"a/{name} torch" for name in (*inner_arrays, *exported)}
    wanted |= {f"a/{name} onnx" for name in exported}
    wanted |= {"a/flow_xT reenactor", "a/flow_out reenactor", "a/in_stick_tgt rule"}
    for through in ("torch", "onnx"):
        wanted |= {f"a/render_traj_sample[0] {through}", f"cut/render_T3 statistics {through}"}
        for place in ("patch_center", "patch_corner", "block4_mean"):
            wanted |= {f"cut/{name}/{place} {through}" for name in ("render_T3", "eps_model_t801")}
    wanted |= {"schedules/timesteps.4", "schedules/T5_alphas_cumprod_next", "schedules/base_betas"}
    assert wanted <= set(rows), checked.stderr
    for key, name in (("eps_a", "a/eps_ema_t7 onnx"), ("render_cut", f"{CUT}/block4_mean torch")):
        assert float(rows[name][2]) == TOLERANCES[key]


def test_a_single_wrong_value_fails_in_every_runtime(
    checked: subprocess.CompletedProcess[str],
) -> None:
    failed = {name for name, row in table(checked.stdout).items() if row[-1] != "yes"}
    assert failed == {f"cut/{WRONG} torch", f"cut/{WRONG} onnx"}
    assert checked.returncode == 1


def failures(folder: Path, capsys: pytest.CaptureFixture[str]) -> set[str]:
    """The names of the rows that failed; the exit status says so too."""
    status = golden_check.main([str(folder), "--threads", "1"])
    rows = table(capsys.readouterr().out)
    failed = {name for name, row in rows.items() if row[-1] == "NO"}
    assert rows and status == (1 if failed else 0)
    return failed


def drop(folder: Path, arrays: Arrays) -> None:
    del arrays["temb_mlp"]
    np.savez(folder / "a.npz", **arrays)


def reshape(folder: Path, arrays: Arrays) -> None:
    np.savez(folder / "a.npz", **{**arrays, "temb_mlp": arrays["temb_mlp"][:2]})


def spoil(folder: Path, arrays: Arrays) -> None:
    arrays["temb_mlp"][1, 1] = np.nan
    np.savez(folder / "a.npz", **arrays)


def rename(folder: Path, arrays: Arrays) -> None:
    np.savez(folder / "a.npz", temb_what=arrays.pop("temb_mlp"), **arrays)


def only_the_tensor_rule(folder: Path, _arrays: Arrays) -> None:
    (folder / "regen.py").write_text(RULE[: RULE.index("def state_dicts")])


def no_tolerance(folder: Path, _arrays: Arrays) -> None:
    rest = {key: value for key, value in TOLERANCES.items() if key != "temb"}
    (folder / "manifest.json").write_text(json.dumps({"tolerances_float32": rest}))


@pytest.mark.parametrize(
    ("mutilate", "failed"),
    [
        (drop, {"temb_mlp"}), (reshape, {"temb_mlp"}), (spoil, {"temb_mlp"}),
        (rename, {"temb_mlp", "temb_what"}), (only_the_tensor_rule, set()), (no_tolerance, {"temb_mlp", "temb_sincos"}),
    ],
)  # fmt: skip
def test_a_mutilated_vector_fails_alone(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    network: Made,
    inner_arrays: Arrays,
    mutilate: Callable[[Path, Arrays], None],
    failed: set[str],
) -> None:
    arrays = {name: array.copy() for name, array in inner_arrays.items()}
    write(tmp_path, network, arrays, outputs={name: {} for name in arrays})
    assert failures(tmp_path, capsys) == set()
    mutilate(tmp_path, arrays)
    assert failures(tmp_path, capsys) == {f"a/{name} torch" for name in failed}


def test_another_rule_than_the_vectors_were_made_by_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], network: Made, inner_arrays: Arrays
) -> None:
    write(tmp_path, network, inner_arrays)
    (tmp_path / "regen.py").write_text(RULE.replace("0.05", "0.06"))
    failed = failures(tmp_path, capsys)
    assert failed == {f"a/{name} torch" for name in inner_arrays if name != "temb_sincos"}


@pytest.mark.parametrize("damage", ["truncated", "rule", "keys"])
def test_a_network_that_cannot_be_made_is_a_failed_row(
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    network: Made,
    inner_arrays: Arrays,
    damage: str,
) -> None:
    write(tmp_path, network, inner_arrays)
    if damage == "truncated":
        path = tmp_path / "a.npz"
        path.write_bytes(path.read_bytes()[:-500])
    elif damage == "rule":
        (tmp_path / "regen.py").unlink()
    else:
        keys = {k: v for k, v in network.spec["keys"].items() if "model.out.2" not in k}
        write(tmp_path, network, inner_arrays, keys=keys)
    assert failures(tmp_path, capsys) == {"a.json"}


def test_schedules_of_another_length(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "manifest.json").write_text(json.dumps({"tolerances_float32": TOLERANCES}))
    write_schedules(tmp_path, 400, {"8": list(range(0, 400, 50))})
    assert failures(tmp_path, capsys) == set()
    write_schedules(tmp_path, 400, {"8": [*range(0, 350, 50), 351]})
    failed = failures(tmp_path, capsys)
    assert {"schedules/T8_timesteps", "schedules/timesteps.8"} <= failed
    assert "schedules/base_betas" not in failed


def test_nothing_to_run_is_a_failure(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert golden_check.main([str(tmp_path)]) == 1
    assert "no manifest.json" in capsys.readouterr().err
    (tmp_path / "manifest.json").write_text("{}")
    assert golden_check.main([str(tmp_path)]) == 1
    assert "no vector ran" in capsys.readouterr().err


@pytest.mark.slow
@pytest.mark.timeout(3000)
@pytest.mark.skipif(not SHARED.is_dir(), reason=f"{SHARED} is not part of the repository")
def test_the_published_vectors(capsys: pytest.CaptureFixture[str]) -> None:
    assert failures(SHARED, capsys) == set()
