"""Who may import whom: read from the sources, and seen in fresh interpreters."""

from __future__ import annotations

import ast
import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
SUB_PACKAGES = ("engines", "export", "runtime", "training")
HEAVY = ("numpy", "cv2", "onnxruntime", "av", "onnx", "torch", "mediapipe", "matplotlib", "tqdm")

# What the files of a folder must not import; "shared" is what lies in diffusionact/ itself.
BANNED: dict[str, tuple[str, ...]] = {
    "shared": (
        *(f"diffusionact.{name}" for name in SUB_PACKAGES),
        "torch", "onnx", "onnxruntime", "av", "mediapipe", "safetensors", "numba",
    ),
    "runtime": (
        "torch", "onnx", "safetensors", "numba",
        "diffusionact.export", "diffusionact.training", "diffusionact.engines",
    ),
    "export": ("diffusionact.runtime", "diffusionact.engines"),
    "engines": ("torch", "diffusionact.training", "diffusionact.export", "diffusionact.runtime"),
    "training": (
        "onnx", "onnxruntime",
        "diffusionact.runtime", "diffusionact.export", "diffusionact.engines",
    ),
}  # fmt: skip
# The files, and a folder of files, that may, and why.
ALLOWED: dict[str, tuple[str, ...]] = {
    # the files that know all sub-packages, each imported inside `run`
    "diffusionact/commands": tuple(f"diffusionact.{name}" for name in SUB_PACKAGES),
    # the backend that is PyTorch, opened by name only
    "runtime/torch.py": ("torch", "safetensors", "diffusionact.training"),
}
# A library that one file, or one job, is behind.
ONLY_IN: dict[str, tuple[str, ...]] = {
    "aiohttp": ("runtime/web/server.py",),
    "mediapipe": ("runtime/tracker.py",),
    "cuda": ("runtime/cuda.py", "runtime/kernel_code.py"),
    "onnxruntime": ("runtime/ort.py", "export/parity.py"),
    "openvino": ("runtime/openvino_library.py",),
    "lightning_fabric": ("training/world.py",),
    "numba": ("training/rasterizer.py",),
    "nvtx": ("runtime/trace.py",),
    "pygame": ("runtime/window.py",),
    "pyvirtualcam": ("runtime/sinks.py",),
    "torch.utils.tensorboard": ("training/curves.py",),
}
WITHOUT_TORCH = ("training/faces.py",)  # the renderer works in an environment without PyTorch


def sources() -> list[Path]:
    folders = [*(ROOT / name for name in SUB_PACKAGES), ROOT / "diffusionact"]
    found = {path for folder in folders for path in folder.rglob("*.py")}
    links = [ROOT / "diffusionact" / name for name in SUB_PACKAGES]
    return sorted(p for p in found if not any(link in p.parents for link in links))


def relative(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def module_of(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    parts = parts if parts[0] == "diffusionact" else ("diffusionact", *parts)
    return ".".join(parts).removesuffix(".__init__")


def imports(tree: ast.AST) -> Iterator[str]:
    """Yield the full dotted names imported anywhere in the file, functions included, but not
    what stands under `if TYPE_CHECKING`."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and "TYPE_CHECKING" in ast.unparse(node.test):
            continue
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"line {node.lineno}: relative import"
            yield from (f"{node.module}.{alias.name}" for alias in node.names)
        yield from imports(node)


def is_within(name: str, package: str) -> bool:
    return name == package or name.startswith(package + ".")


SOURCES = {relative(path): sorted(set(imports(ast.parse(path.read_text())))) for path in sources()}


@pytest.mark.parametrize("path", SOURCES)
def test_arrows(path: str) -> None:
    folder = path.split("/")[0]
    banned = BANNED["shared" if folder == "diffusionact" else folder]
    allowed = next((names for place, names in ALLOWED.items() if path.startswith(place)), ())
    wrong = [
        name
        for name in SOURCES[path]
        if any(is_within(name, b) for b in banned) and not any(is_within(name, a) for a in allowed)
    ]
    assert wrong == []


@pytest.mark.parametrize("path", [path for path in SOURCES if path.startswith("export/")])
def test_export_takes_networks_from_training_and_nothing_else(path: str) -> None:
    taken = [name for name in SOURCES[path] if is_within(name, "diffusionact.training")]
    files = ("diffusionact.training.weights", "diffusionact.training.weights_folder")
    doors = ("diffusionact.training.models", *files)
    assert [name for name in taken if not any(is_within(name, door) for door in doors)] == []


@pytest.mark.parametrize("library", ONLY_IN)
def test_a_library_has_one_door(library: str) -> None:
    users = {path for path, names in SOURCES.items() if any(is_within(n, library) for n in names)}
    assert users <= set(ONLY_IN[library])


def loaded_by(code: str) -> set[str]:
    """Return the modules that a fresh interpreter has loaded after `code`."""
    code += "\nimport sys; print('\\n' + ' '.join(sys.modules))"
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return set(done.stdout.splitlines()[-1].split())


def test_importing_the_package_loads_nothing_heavy() -> None:
    assert loaded_by("import diffusionact; diffusionact.__version__").isdisjoint(HEAVY)


def test_help_loads_neither_numpy_nor_torch() -> None:
    run = "from diffusionact.cli import main\ntry: main({!r})\nexcept SystemExit: pass"
    for arguments in (["--help"], ["run", "--help"], ["--version"]):
        assert loaded_by(run.format(arguments)).isdisjoint(HEAVY), arguments


def test_the_runtime_needs_no_torch_and_no_gui() -> None:
    assert loaded_by("import diffusionact.runtime").isdisjoint(("torch", "onnx", "cv2"))
    modules = [module_of(ROOT / path) for path in SOURCES if path.startswith("runtime/")]
    loaded = loaded_by(
        "\n".join(f"import {m}" for m in modules if m != "diffusionact.runtime.torch")
    )
    assert loaded.isdisjoint(("torch", "onnx", "mediapipe", "matplotlib", "tkinter"))
    loaded_by("import cv2, re; assert re.search(r'GUI: +NONE', cv2.getBuildInformation())")


@pytest.mark.parametrize("path", WITHOUT_TORCH)
def test_the_renderer_needs_no_torch(path: str) -> None:
    assert "torch" not in loaded_by(f"import {module_of(ROOT / path)}")


@pytest.mark.torch
def test_every_module_imports_without_side_effects(tmp_path: Path) -> None:
    modules = "\n".join(f"import {module_of(ROOT / path)}" for path in SOURCES)
    loaded = loaded_by(f"import os; os.chdir({str(tmp_path)!r})\n{modules}")
    assert {module_of(ROOT / path) for path in SOURCES} <= loaded
    assert list(tmp_path.iterdir()) == []
