"""Every TensorRT name and signature in our sources exists in both libraries' own bindings.

The names are read from the sources, so that no list of them can be out of date. The bindings of
`tensorrt` are imported over libraries of nothing but the symbols that they ask for: their classes
and signatures are there, and nothing in them can be called.
"""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TypeAlias

import pytest

ROOT = Path(__file__).parent.parent
SOURCES = [
    ROOT / "engines" / "plan.py",
    *(ROOT / "runtime" / n for n in ("trt.py", "jit_cache.py")),
]

# What our variables, and the results of their methods, are.
CLASSES = {
    "builder": "Builder",
    "network": "INetworkDefinition",
    "parser": "OnnxParser",
    "config": "IBuilderConfig",
    "layer": "ILayer",
    "tensor": "ITensor",
    "t": "ITensor",
    "plan": "IHostMemory",
    "engine": "ICudaEngine",
    "inspector": "EngineInspector",
    "context": "IExecutionContext",
    "runtime": "Runtime",
    "runtime_config": "IRuntimeConfig",
    "cache": "IRuntimeCache",
}
ATTRIBUTES = ("_context", "runtime")  # of our objects, named as in CLASSES
RETURNS = {
    "get_error": "ParserError",
    "get_output": "ITensor",
    "get_timing_cache": "ITimingCache",
    "Runtime": "Runtime",
}
# What one library alone has; the sources ask for it with hasattr.
RTX_ONLY = {
    "ComputeCapability", "ComputeCapability.CURRENT",
    "IBuilderConfig.num_compute_capabilities", "IBuilderConfig.set_compute_capability",
    "IRuntimeConfig.create_runtime_cache", "IRuntimeConfig.set_runtime_cache",
    "IRuntimeCache.serialize", "IRuntimeCache.deserialize",
}  # fmt: skip
OUR_OVERRIDES = {
    "ILogger": {"log": ["severity", "msg"]},
    "IProgressMonitor": {
        "phase_start": ["phase_name", "parent_phase", "num_steps"],
        "step_complete": ["phase_name", "step"],
        "phase_finish": ["phase_name"],
    },
}  # fmt: skip

Names: TypeAlias = dict[str, str]  # dotted name -> its docstring, which holds the signature

DUMP = """
import inspect, json, {module} as trt
names = {{}}
for name in dir(trt):
    value = getattr(trt, name)
    names[name] = getattr(value, "__init__", value).__doc__ or ""
    if inspect.isclass(value):
        for member in dir(value):
            if member[0] != "_":
                names[name + "." + member] = getattr(value, member).__doc__ or ""
                for deeper in dir(getattr(value, member)) if inspect.isclass(
                        getattr(value, member)) else ():
                    names[name + "." + member + "." + deeper] = ""
print(json.dumps(names))
"""
SYMBOLS = (
    "createInferBuilder_INTERNAL", "createInferRefitter_INTERNAL", "createInferRuntime_INTERNAL",
    "getPluginRegistry", "getBuilderPluginRegistry", "initLibNvInferPlugins",
    "createNvOnnxParser_INTERNAL", "createNvOnnxParserRefitter_INTERNAL", "getNvOnnxParserVersion",
)  # fmt: skip


def dumped(code: str) -> Names:
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    names: Names = json.loads(done.stdout.splitlines()[-1])
    return names


@pytest.fixture(scope="module")
def rtx() -> Names:
    if importlib.util.find_spec("tensorrt_rtx_bindings") is None:
        pytest.skip("no tensorrt_rtx; make dev installs it")
    return dumped(DUMP.format(module="tensorrt_rtx_bindings"))


@pytest.fixture(scope="module")
def enterprise(tmp_path_factory: pytest.TempPathFactory) -> Names:
    compiler = shutil.which("cc")
    if compiler is None or importlib.util.find_spec("tensorrt_bindings") is None:
        pytest.skip("no C compiler, or no bindings of tensorrt; make dev installs these")
    folder = tmp_path_factory.mktemp("stub")
    (folder / "stub.c").write_text("".join(f"void *{s}(void) {{ return 0; }}\n" for s in SYMBOLS))
    load = "import ctypes\n"
    for name in ("libnvinfer.so.11", "libnvinfer_plugin.so.11", "libnvonnxparser.so.11"):
        command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", name, "stub.c"]
        subprocess.run(command, cwd=folder, check=True)
        load += f"ctypes.CDLL({str(folder / name)!r}, mode=ctypes.RTLD_GLOBAL)\n"
    return dumped(load + DUMP.format(module="tensorrt_bindings"))


def chain(node: ast.expr) -> list[str]:
    """The names of a.b.c, [] if it starts with something else."""
    if isinstance(node, ast.Name):
        return [node.id]
    if isinstance(node, ast.Attribute) and (before := chain(node.value)):
        return [*before, node.attr]
    return []


def class_of(node: ast.expr) -> str | None:
    if isinstance(node, ast.Name):
        return CLASSES.get(node.id)
    if isinstance(node, ast.Attribute):  # lane.runtime, self._context
        return CLASSES.get(node.attr.lstrip("_")) if node.attr in ATTRIBUTES else None
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
        return RETURNS.get(node.func.attr)
    return None


def used(path: Path) -> Iterator[tuple[str, ast.Call | None]]:
    """Yield the dotted TensorRT names of a file, with the call where it is called."""
    tree = ast.parse(path.read_text())
    called = {id(node.func): node for node in ast.walk(tree) if isinstance(node, ast.Call)}
    for node in ast.walk(tree):
        if not isinstance(node, ast.Attribute):
            continue
        names = chain(node)
        call = called.get(id(node))
        if names[:1] == ["trt"]:
            yield ".".join(names[1:]), call
        elif owner := class_of(node.value):
            yield f"{owner}.{node.attr}", call


USES = [(path.name, name, call) for path in SOURCES for name, call in used(path)]


def resolve(name: str, names: Names) -> str | None:
    """The docstring of a dotted name, None if there is no such name."""
    if name.endswith(".__init__"):
        return names.get(name.removesuffix(".__init__"))
    return names.get(name)


def arities(doc: str) -> list[tuple[int, list[str]]]:
    """For each overload in a docstring: how many parameters have no default, and all names."""
    found = []
    for text in re.findall(r"^(?:\d+\. )?\w+\((self: .*)\) -> ", doc, re.MULTILINE):
        flat = re.sub(r"\[[^\[\]]*\]", "", re.sub(r"\[[^\[\]]*\]", "", text))
        parameters = flat.split(", ")[1:]
        required = [p for p in parameters if " = " not in p]
        found.append((len(required), [p.split(":")[0] for p in parameters]))
    return found


def problems(names: Names, skip: set[str]) -> list[str]:
    wrong = []
    for file, name, call in USES:
        if name in skip:
            continue
        doc = resolve(name, names)
        if doc is None:
            wrong.append(f"{file}: no {name}")
        elif call and (overloads := arities(doc)):
            given = len(call.args) + len(call.keywords) - name.endswith(".__init__")
            keywords = {word.arg for word in call.keywords}
            if not any(
                needed <= given <= len(all_) and keywords <= set(all_) for needed, all_ in overloads
            ):
                wrong.append(f"{file}: {name} takes {overloads}, line {call.lineno} gives {given}")
    return wrong


def test_the_sources_use_tensorrt() -> None:
    names = {name for _, name, _ in USES}
    assert {"Builder.build_serialized_network", "OnnxParser.parse", "ILogger.__init__"} <= names
    assert {"ComputeCapability.CURRENT", "ParserError.desc", "ITimingCache.serialize"} <= names
    running = {name for file, name, _ in USES if file != "plan.py"}
    assert {
        "Runtime.deserialize_cuda_engine", "ICudaEngine.device_memory_size_v2",
        "IExecutionContext.set_tensor_address", "IExecutionContext.execute_async_v3",
        "IExecutionContext.set_device_memory", "ICudaEngine.get_tensor_mode",
        "ExecutionContextAllocationStrategy.USER_MANAGED", "TensorIOMode.INPUT",
        "ICudaEngine.create_execution_context", "IRuntimeConfig.set_runtime_cache",
        "IRuntimeCache.deserialize", "IRuntimeCache.serialize",
    } <= running  # fmt: skip


def test_every_name_is_in_tensorrt_rtx(rtx: Names) -> None:
    assert problems(rtx, set()) == []


def test_every_name_is_in_tensorrt(enterprise: Names) -> None:
    assert problems(enterprise, RTX_ONLY) == []
    assert [name for name in RTX_ONLY if name in enterprise] == [], "then it needs no hasattr"


@pytest.mark.parametrize("library", ["rtx", "enterprise"])
def test_our_overrides_have_the_parameters(library: str, request: pytest.FixtureRequest) -> None:
    names: Names = request.getfixturevalue(library)
    for owner, methods in OUR_OVERRIDES.items():
        for method, parameters in methods.items():
            assert parameters in [all_ for _, all_ in arities(names[f"{owner}.{method}"])]


def test_what_is_gone_would_be_found(rtx: Names, monkeypatch: pytest.MonkeyPatch) -> None:
    """Names of TensorRT 8 to 10, and calls with a parameter too many or too few."""
    old = """
builder.build_engine(network, config)
config.max_workspace_size = 1
config.set_flag(trt.BuilderFlag.FP16)
trt.NetworkDefinitionCreationFlag.EXPLICIT_BATCH
builder.build_serialized_network(network)
parser.parse(1, 2, 3)
config.set_timing_cache(1, ignore=False)
context.execute_async_v2([1], 2)
"""
    tree = ROOT / "engines" / "plan.py"
    monkeypatch.setattr(Path, "read_text", lambda self: old)
    monkeypatch.setattr(sys.modules[__name__], "USES", [("old", *use) for use in used(tree)])
    assert len(problems(rtx, set())) == 8
