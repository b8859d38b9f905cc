"""cuda.py without a GPU: what it says then, its names, its kernels' cache; and all of test_on_gpu.py
on a stand-in for the driver that cuda.bindings loads as it would the real one."""

from __future__ import annotations

import ast
import builtins
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from diffusionact.errors import BackendMissing, DeviceError
from diffusionact.runtime import cuda, kernel_code
from tests.cuda_double.build import TOY, build

ROOT = Path(__file__).parent.parent
KERNELS = sorted((ROOT / "runtime" / "kernels").glob("*.cu"))

pytest.importorskip("cuda.bindings", reason="no cuda-bindings; make dev installs them")


@pytest.fixture(scope="module")
def double(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = build(tmp_path_factory.mktemp("cuda_double"), [*KERNELS, TOY])
    if folder is None or sys.platform != "linux":
        pytest.skip("no C++ compiler on this machine, or not Linux")
    return folder


def on_double(folder: Path, *command: str, **more: str) -> subprocess.CompletedProcess[str]:
    """The command's end, where the stand-in is the driver."""
    environment = {**os.environ, "LD_LIBRARY_PATH": str(folder), "PYTHONPATH": str(ROOT), **more}
    return subprocess.run(
        [sys.executable, *command], cwd=ROOT, env=environment, capture_output=True, text=True
    )


def test_the_gpu_tests_pass_on_the_double(double: Path) -> None:
    done = on_double(double, "-m", "pytest", "-q", "-m", "gpu", "tests/test_on_gpu.py")
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-2000:]
    assert re.search(r"^\d\d passed in", done.stdout, re.MULTILINE), "none skipped"


WHY = "from diffusionact.runtime import cuda; print(cuda.why_not())"


def test_a_driver_without_a_gpu_is_said(double: Path) -> None:
    done = on_double(double, "-W", "error", "-c", WHY, CUDA_DOUBLE_NO_GPU="1")
    assert "CUDA_ERROR_NO_DEVICE" in done.stdout and "--device cpu" in done.stdout
    assert on_double(double, "-c", WHY).stdout == "None\n"


def test_a_driver_too_old_is_said(tmp_path: Path, double: Path) -> None:
    """One that lacks the functions: the loader's own exception does not come out."""
    source = tmp_path / "old.c"
    source.write_text("int cuDriverGetVersion(int *v) { *v = 9000; return 0; }\n")
    command = ["cc", "-shared", "-fPIC", "-Wl,-soname,libcuda.so.1", "-o"]
    subprocess.run([*command, str(tmp_path / "libcuda.so.1"), str(source)], check=True)
    done = on_double(tmp_path, "-c", WHY)
    assert done.returncode == 0, done.stderr
    assert "no NVIDIA driver here" in done.stdout and "nvidia-smi" in done.stdout


def test_without_a_driver_nothing_foreign_comes_out() -> None:
    if cuda.why_not() is None:
        pytest.skip("there is a GPU here")
    with pytest.raises(DeviceError, match="--device cpu"):
        cuda.Device()
    assert "driver" in str(cuda.why_not())


def test_without_cuda_bindings_the_command_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    inner = builtins.__import__

    def refuse(name: str, *rest: Any) -> Any:
        if name.startswith("cuda"):
            raise ImportError("No module named 'cuda'")
        return inner(name, *rest)

    monkeypatch.setattr(builtins, "__import__", refuse)
    cuda._driver.cache_clear()
    try:
        with pytest.raises(BackendMissing, match=r"pip install 'diffusionact\[cuda\]'"):
            cuda.probe()
        assert "cuda-bindings" in str(cuda.why_not())
        with pytest.raises(BackendMissing, match="NVRTC"):
            kernel_code.nvrtc_version()
    finally:
        cuda._driver.cache_clear()


@pytest.mark.parametrize("silent", [True, False])
def test_a_driver_whose_tool_does_not_answer_still_works(
    silent: bool, tmp_path: Path, double: Path
) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text("#!/bin/sh\n" + ("exit 9" if silent else "echo 'Double, 9.0, 580.65.06'"))
    tool.chmod(0o755)
    code = "from diffusionact.runtime import cuda; print(cuda.probe())"
    done = on_double(double, "-c", code, PATH=f"{tmp_path}:{os.environ['PATH']}")
    assert f"target='sm_90', driver_major={0 if silent else 580}" in done.stdout, done.stderr


def test_engines_are_built_for_the_gpu_that_they_will_run_on(tmp_path: Path, double: Path) -> None:
    """nvidia-smi's first GPU may be another: CUDA_VISIBLE_DEVICES and MIG do not reach it."""
    calls = tmp_path / "calls"
    tool = tmp_path / "nvidia-smi"
    tool.write_text(f"#!/bin/sh\necho . >> {calls}; echo 'Another, 8.9, 580.65.06'")
    tool.chmod(0o755)
    code = "from diffusionact.runtime import cuda; cuda.probe(); print(cuda.gpu_to_build_for())"
    path = f"{tmp_path}:{os.environ['PATH']}"
    done = on_double(double, "-c", code, PATH=path)
    assert "name='Double of a GPU', target='sm_90', driver_major=580" in done.stdout, done.stderr
    assert calls.read_text() == ".\n", "a slow tool: asked once"
    done = on_double(double, "-c", code.replace("cuda.probe();", ""), PATH=path,
                     CUDA_DOUBLE_NO_GPU="1")  # fmt: skip
    assert "name='Another', target='sm_89'" in done.stdout, done.stderr


def test_importing_it_loads_no_driver() -> None:
    code = (
        "import diffusionact.runtime.cuda, sys; print([m for m in sys.modules if m[:4] == 'cuda'])"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.stdout == "[]\n", done.stdout + done.stderr


def used(file: str, module: str) -> list[tuple[str, int | None]]:
    """The names of a library's module that a file uses, with how many arguments it gives."""
    tree = ast.parse((ROOT / "runtime" / file).read_text())
    called = {
        id(node.func): len(node.args) for node in ast.walk(tree) if isinstance(node, ast.Call)
    }
    passed = {
        id(node.args[0]): len(node.args) - 1
        for node in ast.walk(tree)
        if isinstance(node, ast.Call) and ast.unparse(node.func) == "_call"
    }
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Attribute):
            owner = ast.unparse(node.value)
            if owner in (module, f"self._{module}", f"_{module}()"):
                found.append((node.attr, called.get(id(node), passed.get(id(node)))))
    return found


@pytest.mark.parametrize(
    ("file", "module", "least"), [("cuda.py", "driver", 25), ("kernel_code.py", "nvrtc", 9)]
)
def test_every_name_and_number_of_arguments_is_the_bindings(
    file: str, module: str, least: int
) -> None:
    library = __import__("cuda.bindings", fromlist=[module])
    functions = getattr(library, module)
    names = used(file, module)
    assert len({name for name, _ in names}) >= least
    for name, given in names:
        assert hasattr(functions, name), f"{file}: no {module}.{name}"
        head = re.match(r"\w+\((.*?)\)$", (getattr(functions, name).__doc__ or "").split("\n")[0])
        if given is None or head is None:
            continue
        wanted = len([word for word in head[1].split(", ") if word])
        assert given == wanted, f"{file}: {module}.{name} takes {head[0]}, given {given}"


def test_enumerations_have_the_members() -> None:
    from cuda.bindings import driver

    tree = (ROOT / "runtime" / "cuda.py").read_text()
    members = re.findall(r"\b(CU_[A-Z_]+|CUDA_ERROR_[A-Z_]+)\b", tree)
    owners = [driver.CUstream_flags, driver.CUdevice_attribute, driver.CUstreamCaptureMode]
    owners.append(driver.CUresult)
    assert len(set(members)) >= 7
    for member in members:
        assert any(hasattr(owner, member) for owner in owners), member


def test_kernels_are_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("DIFFUSIONACT_CACHE", str(tmp_path))
    first = list(kernel_code.kernel_image("steps", "sm_90"))
    kept = list(tmp_path.glob("kernels/steps-*.bin"))
    assert len(first) == len(kept) == 1 and kept[0].read_bytes() == first[0]
    monkeypatch.setattr(kernel_code, "compiled", lambda *_: pytest.fail("it is kept"))
    assert next(kernel_code.kernel_image("steps", "sm_90")) == first[0]


def test_the_cache_is_named_by_what_it_was_made_from() -> None:
    path = kernel_code.cached_path("steps", b"source", "sm_90")
    others = [
        kernel_code.cached_path("steps", b"other source", "sm_90"),
        kernel_code.cached_path("steps", b"source", "sm_89"),
    ]
    assert len({path, *others}) == 3


def test_a_cache_that_cannot_be_written_is_no_failure(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "kernels").write_text("a file where the folder would be")
    monkeypatch.setenv("DIFFUSIONACT_CACHE", str(tmp_path))
    assert [image[:4] for image in kernel_code.kernel_image("pack", "sm_89")] == [b"\x7fELF"]


def test_a_fatbin_of_the_installation_comes_first(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "steps.fatbin").write_bytes(b"as installed")
    (tmp_path / "steps.cu").write_bytes((ROOT / "runtime" / "kernels" / "steps.cu").read_bytes())
    monkeypatch.setattr(kernel_code, "FOLDER", tmp_path)
    images = kernel_code.kernel_image("steps", "sm_90")
    assert next(images) == b"as installed"
    assert next(images)[:4] == b"\x7fELF", "and where the GPU refuses it, the source is compiled"


def test_where_the_kernels_come_from_is_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(kernel_code, "FOLDER", tmp_path)
    (tmp_path / "steps.fatbin").write_bytes(b"")
    usable, told = kernel_code.described()
    assert usable and told.startswith("NVRTC 1"), "one of three is not all"
    for source in KERNELS:
        (tmp_path / f"{source.stem}.fatbin").write_bytes(b"")
    assert kernel_code.described() == (True, "compiled with the installation")


def test_a_gpu_newer_than_nvrtc_gets_ptx_and_an_older_one_an_error() -> None:
    source = (ROOT / "runtime" / "kernels" / "steps.cu").read_bytes()
    assert b".target sm_" in kernel_code.compiled("steps", source, "sm_990")
    with pytest.raises(DeviceError, match="compiles for no GPU as old as sm_20"):
        kernel_code.compiled("steps", source, "sm_20")


def test_a_kernel_that_does_not_compile_says_where() -> None:
    with pytest.raises(
        DeviceError, match=r"broken.cu does not compile for sm_90: .*broken.cu\(1\)"
    ):
        kernel_code.compiled("broken", b"int x = ;", "sm_90")


def test_the_double_has_every_function_that_is_called() -> None:
    known = (ROOT / "tests" / "cuda_double" / "driver.cpp").read_text()
    for name, _ in used("cuda.py", "driver"):
        if name.startswith("cu") and name != "cuGraphInstantiate":  # ...WithFlags, since CUDA 12
            assert f'"{name}"' in known, f"driver.cpp lacks {name}"


def test_arrays_of_the_host_and_of_the_device_must_fit() -> None:
    array = cuda.DeviceArray(None, 0x100, (2, 3), "float32")
    assert (array.nbytes, array.first(1).shape, array.first(1).ptr) == (24, (1, 3), 0x100)
    with pytest.raises(AssertionError):
        cuda._same_size(array, np.zeros((2, 2), np.float32))
