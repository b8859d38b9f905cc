"""The README: what it tells people to type works, and what it points at is there."""

from __future__ import annotations

import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import tomllib
from packaging.requirements import Requirement

from diffusionact import bundle_path, cli

ROOT = Path(__file__).parent.parent
TEXT = (ROOT / "README.md").read_text(encoding="utf-8")
MAX_PYTHON_LINES = 8  # of the example: more would not be read
# How the README calls what the package depends on.
DEPENDENCIES = {
    "av": "PyAV",
    "numpy": "NumPy",
    "onnxruntime": "ONNX Runtime",
    "opencv-python-headless": "OpenCV",
    "tqdm": "tqdm",
}


def blocks(language: str) -> list[str]:
    """The contents of the fenced blocks of a language."""
    return re.findall(rf"^```{language}\n(.*?)^```$", TEXT, re.DOTALL | re.MULTILINE)


COMMANDS = [
    words
    for text in blocks("bash")
    for line in text.replace("\\\n", " ").splitlines()
    if (words := shlex.split(line, comments=True))
]
MAKE = [words for words in COMMANDS if words[0] == "make"]
OURS = [words for words in COMMANDS if words[0] == "diffusionact"]


def spans(program: str) -> list[list[str]]:
    """The words of every `code` in the text that starts with `program`."""
    prose = re.sub(r"^```.*?^```$", "", TEXT, flags=re.DOTALL | re.MULTILINE)
    return [code.split() for code in re.findall(rf"`({program} [^`]+)`", prose)]


def joined(words: list[str]) -> str:
    return " ".join(words)


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty working folder where the README's relative paths lead into this checkout."""
    if not bundle_path().is_dir():
        pytest.fail(f"{bundle_path()} is missing: the README's examples need the shipped model")
    (tmp_path / "diffusionact").symlink_to(ROOT / "diffusionact", target_is_directory=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(cli, "_start_log", lambda arguments: None)  # other tests have their own
    return tmp_path


def test_there_are_examples() -> None:
    assert MAKE and OURS and len(blocks("python")) == 1


def test_every_command_is_one_that_is_tested() -> None:
    assert [words for words in COMMANDS if words not in MAKE + OURS] == []


@pytest.mark.parametrize("words", [*MAKE, *spans("make")], ids=joined)
def test_make_has_the_target(words: list[str]) -> None:
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    for target in words[1:]:
        assert re.search(rf"^{re.escape(target)}:", makefile, re.MULTILINE), target


@pytest.mark.parametrize("words", OURS, ids=joined)
def test_the_command_line_takes_the_command(words: list[str]) -> None:
    arguments = cli._parser().parse_args(words[1:])
    for name in ("source", "driver", "bundle", "recipe", "weights"):
        given = vars(arguments).get(name) or []
        for value in given if isinstance(given, list) else [given]:
            assert (ROOT / value).exists(), f"{value} is not among what ships"


@pytest.mark.parametrize("words", spans("diffusionact"), ids=joined)
def test_the_command_line_knows_the_subcommand(
    words: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as ended:
        cli._parser().parse_args([words[1], "--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert [word for word in words if word.startswith("-") and word not in text] == []


@pytest.mark.parametrize("words", OURS, ids=joined)
def test_the_command_works(words: list[str], folder: Path) -> None:
    """With the fewest steps: that the picture is good is tested elsewhere."""
    arguments = cli._parser().parse_args(words[1:])
    quick = ["--steps", "2"] if hasattr(arguments, "steps") else []
    assert cli.main([*words[1:], *quick, "--quiet"]) == 0
    if output := vars(arguments).get("output"):
        made = folder / output
        assert made.stat().st_size > 0 and (made.is_file() or any(made.iterdir()))


def test_the_python_example_works(folder: Path) -> None:
    import cv2
    import numpy as np

    (example,) = blocks("python")
    assert len([line for line in example.splitlines() if line.strip()]) <= MAX_PYTHON_LINES
    names: dict[str, Any] = {}
    exec(compile(example, "README.md", "exec"), names)
    (picture,) = folder.glob("*.png")
    moved, portrait = cv2.imread(str(picture)), names["source"].portrait
    assert moved is not None and moved.shape == portrait.shape
    assert np.abs(moved.astype(int) - portrait).max() > 30, "the face has moved"


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\(([^)\s]+)\)", TEXT))))
def test_what_it_links_to_is_there(target: str) -> None:
    if not target.startswith("https://"):
        assert (ROOT / target).exists(), target


def test_it_names_every_dependency() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    needed = {Requirement(text).name for text in project["dependencies"]}
    assert needed == set(DEPENDENCIES)
    assert [name for name in DEPENDENCIES.values() if name not in TEXT] == []


def test_nothing_is_left_to_fill_in() -> None:
    comments = re.findall(r"<!--.*?-->", TEXT, re.DOTALL)
    places = [r"<!-- measured: \w+: (begin|end) -->"]  # filled by benchmarks/readme_tables.py
    assert [c for c in comments if not any(re.fullmatch(place, c) for place in places)] == []
