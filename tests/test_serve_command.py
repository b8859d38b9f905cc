"""How many steps `serve` and `live` may take, by what they were asked."""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import pytest

from diffusionact.cli import main
from diffusionact.commands import serve
from diffusionact.commands.model import RATE, goal_or_rate, model_options
from diffusionact.errors import SettingsError
from diffusionact.runtime.control import Goal


def offer(bundle: Path, steps: int, *choices: int) -> None:
    """Make a bundle list these counts."""
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    manifest["render"] = {"steps": steps, "choices": choices}
    path.write_text(json.dumps(manifest))


@pytest.fixture
def bundle(toy_bundle: Path, tmp_path: Path) -> Path:
    """Four steps, and other counts on both sides."""
    made = Path(shutil.copytree(toy_bundle, tmp_path / "face.bundle"))
    offer(made, 4, 2, 3, 8)
    return made


def asked(bundle: Path, *words: str) -> argparse.Namespace:
    parser = argparse.ArgumentParser(parents=[model_options()])
    serve.options(parser)
    return parser.parse_args(["--bundle", str(bundle), *words])


def test_a_camera_s_rate_is_kept_to_with_the_bundle_s_steps_at_most(bundle: Path) -> None:
    arguments = asked(bundle)
    assert goal_or_rate(arguments, RATE) == Goal(fps=25.0)
    assert arguments.step_choices == (2, 3)  # besides the four


@pytest.mark.parametrize("words", [("--fps", "0"), ("--steps", "4"), ("--steps", "8")])
def test_steps_that_are_pinned_stay(bundle: Path, words: tuple[str, ...]) -> None:
    arguments = asked(bundle, *words)
    assert goal_or_rate(arguments, RATE) is None
    assert not hasattr(arguments, "step_choices")


@pytest.mark.parametrize(
    ("words", "goal"),
    [
        (("--fps", "12"), Goal(fps=12.0)),
        (("--latency", "80ms"), Goal(latency_ms=80.0)),
        (("--latency", "80ms", "--fps", "0"), Goal(latency_ms=80.0)),
        (("--steps", "8", "--fps", "12"), Goal(fps=12.0)),
    ],
)
def test_a_goal_of_one_s_own_may_take_every_count(
    bundle: Path, words: tuple[str, ...], goal: Goal
) -> None:
    arguments = asked(bundle, *words)
    assert goal_or_rate(arguments, RATE) == goal
    assert arguments.step_choices is None  # the bundle's, all of them


def test_a_bundle_of_one_count_has_nothing_to_choose_from(bundle: Path) -> None:
    offer(bundle, 4)
    assert goal_or_rate(asked(bundle), RATE) is None


def test_a_rate_below_nothing_is_refused(bundle: Path) -> None:
    with pytest.raises(SettingsError, match="above 0"):
        goal_or_rate(asked(bundle, "--fps", "-1"), RATE)


def test_what_has_no_clock_is_not_hurried(bundle: Path) -> None:
    assert goal_or_rate(asked(bundle), None) is None
    assert goal_or_rate(asked(bundle, "--fps", "12"), None) == Goal(fps=12.0)


@pytest.mark.parametrize("command", ["serve", "live"])
def test_the_help_says_what_is_usual(command: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([command, "--help"])
    told = " ".join(capsys.readouterr().out.split())
    assert "(default: 25, with the bundle's steps at most; 0, or --steps: always as many)" in told
    assert "--no-label" in told
