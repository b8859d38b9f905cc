"""The lists that must agree: sub-packages in the build table, links, excludes, pins, README."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path
from typing import Any

import pytest
import tomllib
from packaging.requirements import Requirement
from packaging.version import Version

from diffusionact import __version__
from diffusionact.runtime.tracker import LEAN_INSTALL, MEDIAPIPE_VERSION
from diffusionact.runtime.web.server import TRACKER_FILES

ROOT = Path(__file__).parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text())
BUILD = PROJECT["tool"]["scikit-build"]
SUB_PACKAGES = {path.parent.name for path in ROOT.glob("*/__init__.py")} - {"diffusionact"}
PINNED_PYTHON = "3.11"  # constraints.txt is for this one and the next


def pins() -> dict[str, Version]:
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    pairs = (line.split("==") for line in lines if line and not line.startswith("#"))
    return {name.lower().replace("_", "-"): Version(version) for name, version in pairs}


def test_the_designs_folders_are_the_sub_packages() -> None:
    assert {"engines", "export", "runtime", "training"} == SUB_PACKAGES


def test_build_table() -> None:
    wanted = {"diffusionact": "diffusionact"} | {f"diffusionact/{s}": s for s in SUB_PACKAGES}
    assert BUILD["wheel"]["packages"] == wanted


@pytest.mark.parametrize("name", sorted(SUB_PACKAGES))
def test_link(name: str) -> None:
    link = ROOT / "diffusionact" / name
    target = os.readlink(link) if link.is_symlink() else link.read_text()  # Windows, by git
    assert target == f"../{name}"


def test_links_are_excluded_everywhere() -> None:
    links = {f"diffusionact/{name}" for name in SUB_PACKAGES}
    assert {f"/{link}" for link in links} <= set(BUILD["sdist"]["exclude"])
    assert links == set(PROJECT["tool"]["ruff"]["extend-exclude"])


def test_bare_names_are_banned() -> None:
    banned = PROJECT["tool"]["ruff"]["lint"]["flake8-tidy-imports"]["banned-api"]
    assert set(banned) == SUB_PACKAGES


def test_coverage_and_pyright_see_all() -> None:
    assert set(PROJECT["tool"]["coverage"]["run"]["source"]) == SUB_PACKAGES | {"diffusionact"}
    assert set(PROJECT["tool"]["pyright"]["include"]) >= SUB_PACKAGES


def test_pins_satisfy_the_ranges() -> None:
    extras = PROJECT["project"]["optional-dependencies"]
    lists = [
        PROJECT["project"]["dependencies"],
        *extras.values(),
        PROJECT["build-system"]["requires"],
    ]
    wanted = [Requirement(text) for texts in lists for text in texts]
    here = [
        r for r in wanted if not r.marker or r.marker.evaluate({"python_version": PINNED_PYTHON})
    ]
    pinned = pins()
    for requirement in here:
        name = requirement.name.lower().replace("_", "-")
        if name != "diffusionact":
            assert pinned[name] in requirement.specifier, f"constraints.txt: {requirement}"


def test_one_version_of_the_tracker() -> None:
    extra = Requirement(PROJECT["project"]["optional-dependencies"]["track"][0])
    assert str(extra.specifier) == f"=={MEDIAPIPE_VERSION}"
    assert MEDIAPIPE_VERSION in LEAN_INSTALL and "--no-deps" in LEAN_INSTALL


def test_changelog_and_citation_know_this_version() -> None:
    changelog = (ROOT / "CHANGELOG.md").read_text()
    assert f"## [{__version__}]" in changelog or "## [Unreleased]" in changelog
    assert f"\nversion: {__version__}\n" in (ROOT / "CITATION.cff").read_text()


def hook(call: str, folder: Path, **settings: str) -> Path:
    """Return the file that a hook of the build backend made of a copy of this checkout."""
    copy = folder / "checkout"
    ignored = shutil.ignore_patterns(
        ".venv", ".git", "__pycache__", "build", "out", "runs", ".*_cache", "node_modules"
    )
    shutil.copytree(ROOT, copy, symlinks=True, ignore=ignored)
    code = f"import scikit_build_core.build as b; print(b.{call}({str(folder)!r}, {settings!r}))"
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=copy, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr
    return folder / done.stdout.split()[-1]


def is_product(name: str) -> bool:
    return re.match(rf"diffusionact(-{re.escape(__version__)}\.dist-info)?/", name) is not None


def test_wheel_holds_the_package_and_nothing_else(tmp_path: Path) -> None:
    off = {"cmake.define.DIFFUSIONACT_CUDA": "OFF", "cmake.define.DIFFUSIONACT_WEB_TRACKER": "OFF"}
    wheel = hook("build_wheel", tmp_path, **off)
    assert wheel.name == f"diffusionact-{__version__}-py3-none-any.whl"
    names = set(zipfile.ZipFile(wheel).namelist())
    assert {name for name in names if not is_product(name)} == set()
    sources = {f"diffusionact/{path.relative_to(ROOT / 'diffusionact').as_posix()}"
               for path in (ROOT / "diffusionact").glob("*.py")}  # fmt: skip
    for name in SUB_PACKAGES:
        sources |= {f"diffusionact/{path.relative_to(ROOT).as_posix()}"
                    for path in (ROOT / name).rglob("*.py")}  # fmt: skip
    assert sources | {"diffusionact/py.typed"} <= names
    shipped = {path for path in (ROOT / "diffusionact" / "assets").rglob("*") if path.is_file()
               and not {"__pycache__", "engines"} & {*path.parts}}  # fmt: skip
    assert {path.relative_to(ROOT).as_posix() for path in shipped} <= names
    page = {path.name for path in (ROOT / "runtime" / "web" / "page").iterdir()}
    assert {f"diffusionact/runtime/web/page/{name}" for name in page} <= names
    kernels = {path.name for path in (ROOT / "runtime" / "kernels").glob("*.cu")}
    assert {f"diffusionact/runtime/kernels/{name}" for name in kernels} <= names  # for NVRTC
    unwanted = re.compile(
        r"\.engine$|/face\.bundle/engines/|/checkpoints/|/__pycache__/|node_modules|/tracker/"
    )
    assert [name for name in names if unwanted.search(name)] == []


def test_the_pages_tracker_is_locked_to_one_version() -> None:
    web = ROOT / "runtime" / "web"
    wanted = json.loads((web / "package.json").read_text())["dependencies"]
    locked = json.loads((web / "package-lock.json").read_text())["packages"]
    assert set(locked) == {"", *(f"node_modules/{name}" for name in wanted)}
    for name, version in wanted.items():
        package = locked[f"node_modules/{name}"]
        assert package["version"] == version and package["integrity"].startswith("sha512-")


@pytest.mark.skipif(shutil.which("npm") is None, reason="no npm on this machine")
def test_wheel_holds_the_pages_tracker_where_npm_works(tmp_path: Path) -> None:
    reach = subprocess.run(["npm", "view", "@mediapipe/face_mesh", "name"], capture_output=True)
    if reach.returncode != 0:
        pytest.skip("the npm registry cannot be reached")
    wheel = hook("build_wheel", tmp_path, **{"cmake.define.DIFFUSIONACT_CUDA": "OFF"})
    folder = "diffusionact/runtime/web/tracker"
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if name.startswith(folder)}
        assert b"Apache License" in archive.read(f"{folder}/LICENSE")
    assert {f"{folder}/{name}" for name in TRACKER_FILES} < names


@pytest.mark.slow  # compiles for every GPU generation
@pytest.mark.skipif(shutil.which("nvcc") is None, reason="no nvcc on this machine")
def test_wheel_holds_the_kernels_where_nvcc_works(tmp_path: Path) -> None:
    names = zipfile.ZipFile(hook("build_wheel", tmp_path)).namelist()
    for source in (ROOT / "runtime" / "kernels").glob("*.cu"):
        assert f"diffusionact/runtime/kernels/{source.stem}.fatbin" in names


def test_sdist_holds_the_folders_not_the_links(tmp_path: Path) -> None:
    with tarfile.open(hook("build_sdist", tmp_path)) as archive:
        names = {name.split("/", 1)[1] for name in archive.getnames() if "/" in name}
    assert {"pyproject.toml", "CMakeLists.txt", "LICENSE", "runtime/kernels/pack.cu"} <= names
    assert {f"runtime/web/{name}" for name in ("CMakeLists.txt", "package-lock.json")} <= names
    for name in SUB_PACKAGES:
        assert f"{name}/__init__.py" in names
        assert not any(other.startswith(f"diffusionact/{name}") for other in names)
