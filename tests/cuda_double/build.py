"""Builds the stand-in for the driver: driver.cpp with the package's kernels compiled for the host."""

from __future__ import annotations

import re
import shutil
import subprocess
from collections.abc import Iterable
from pathlib import Path

HERE = Path(__file__).parent
TOY = HERE / "toy.cu"
_ENTRY = re.compile(r'extern "C" __global__ void (\w+)\(([^)]*)\)')

_HEAD = """
#include <math.h>
#include <stdint.h>
#define __global__
#define __device__
#define __forceinline__ inline
struct Dim { unsigned x; };
static Dim blockIdx, blockDim, threadIdx;
struct Kernel { const char* name; const char* kinds; void (*call)(const uint64_t*); };
#pragma GCC visibility push(hidden)  // a C library may have functions of these names
"""


def entries(source: str) -> list[tuple[str, list[str]]]:
    """Return the kernels of a source, each with the types of its parameters."""
    found = []
    for name, parameters in _ENTRY.findall(source):
        words = parameters.replace("__restrict__", "").split(",")
        found.append((name, [" ".join(word.split()[:-1]) for word in words]))
    return found


def build(folder: Path, sources: Iterable[Path]) -> Path | None:
    """Return the folder for LD_LIBRARY_PATH, or None where there is no C++ compiler."""
    compiler = shutil.which("c++") or shutil.which("g++")
    if compiler is None:
        return None
    text, table = _HEAD, ""
    for source in sources:
        text += f'#include "{source}"\n'
        for name, types in entries(source.read_text()):
            kinds = "".join("p" if "*" in kind else "i" for kind in types)
            values = ", ".join(
                f"({kind})v[{i}]" if "*" in kind else f"({kind})(int32_t)v[{i}]"
                for i, kind in enumerate(types)
            )
            text += f"static void call_{name}(const uint64_t* v) {{ {name}({values}); }}\n"
            table += f'  {{"{name}", "{kinds}", call_{name}}},\n'
    text += f"#pragma GCC visibility pop\nstatic Kernel kernels[] = {{\n{table}}};\n"
    (folder / "kernels.inc").write_text(text)
    command = [
        compiler,
        "-std=c++17",
        "-shared",
        "-fPIC",
        "-O1",
        "-ffp-contract=off",
        f"-I{folder}",
    ]
    command += ["-Wl,-soname,libcuda.so.1", "-o", str(folder / "libcuda.so.1")]
    subprocess.run([*command, str(HERE / "driver.cpp")], check=True)
    return folder
