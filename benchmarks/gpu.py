"""How fast each backend is on a GPU machine, and how close to what the GPU could do.

    make gpu-check        the tests that need a GPU, then this, within 8 minutes
    make gpu-bench        this alone

Runs from the source tree with the python3 that is there (3.11 to 3.13, torch 2.11 or later),
installs nothing, and brings its network: the published 256 px one at full size, its weights made by
the rule of the golden vectors, its pictures noise. What is missing is skipped with the reason. Each
way to run it is a process of its own: its time limit, crash and memory stay there, and what it had
measured before is kept. The results are written after each.

The floor is the network's operations over what the GPU makes of one large matrix product.
`--device cpu --tiny` goes the same way with a toy network on the CPU, which is how it is tested.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from diffusionact.files import write_whole

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
PYTEST_SHARE = 0.4  # of the time, at most
LEAST_S = 20.0  # a child that would have less is not started
LIMIT_S = 60.0  # of a child on a GPU: it takes half of it, so this is for one that hangs
BUNDLE_LIMIT_S = 120.0  # of the export, which is PyTorch's and slow, and of the engines
STEPS = 20
TOLD_LINES = 60  # of pytest, beside the skips
TARGETS_MS = {"one-step or unrolled graph": 40.0, "compiled, graph": 30.0, "tensorrt": 30.0}


@dataclass(frozen=True)
class Variant:
    """A backend in a precision. compiled: by torch.compile; needs_bundle: its ONNX files; limit_s:
    of its process, None for all the time that is left."""

    name: str
    backend: str
    precision: str
    modes: tuple[str, ...]
    compiled: bool = False
    needs_bundle: bool = False
    limit_s: float | None = LIMIT_S


GRAPHS = ("step", "turbo")
# The first is the reference; the last is the one that may take minutes.
ON_GPU = (
    Variant("torch-fp32", "torch", "fp32", ("eager",)),
    Variant("torch-fp16", "torch", "fp16", ("eager", *GRAPHS)),
    Variant("trt-fp16", "trt", "fp16", GRAPHS, needs_bundle=True),
    Variant("torch-bf16", "torch", "bf16", GRAPHS),
    Variant("ort-fp32", "ort", "fp32", ("eager",), needs_bundle=True),
    Variant(
        "torch-fp16-compiled", "torch", "fp16", (*GRAPHS, "eager"), compiled=True, limit_s=None
    ),
)
ON_CPU = (
    Variant("torch-fp32", "torch", "fp32", ("eager",), limit_s=None),
    Variant("torch-bf16", "torch", "bf16", ("eager",), limit_s=None),
    Variant("torch-fp32-compiled", "torch", "fp32", ("eager",), compiled=True, limit_s=None),
)


class Clock:
    """The time that is left."""

    def __init__(self, minutes: float) -> None:
        self._end = time.monotonic() + 60.0 * minutes

    def left_s(self) -> float:
        return self._end - time.monotonic()


def missing(device: str) -> str | None:
    """Why nothing can be measured here; None if it can."""
    if not (3, 11) <= sys.version_info[:2] <= (3, 13):
        print(f"Python {sys.version.split()[0]}: untested, 3.11 to 3.13 are", file=sys.stderr)
    for module in ("numpy", "torch"):
        if importlib.util.find_spec(module) is None:
            return f"no {module} in {sys.executable}"
    if device == "cpu":
        return None
    from diffusionact.runtime import cuda

    if problem := cuda.why_not():
        return problem
    import torch

    return None if torch.cuda.is_available() else f"torch {torch.__version__} sees no GPU"


def environment(folder: Path) -> dict[str, str]:
    """That of a child: this tree is its package, what it compiles stays in the folder."""
    caches = {"TORCHINDUCTOR_CACHE_DIR": "inductor", "DIFFUSIONACT_CACHE": "cache"}
    own = {name: str(folder / place) for name, place in caches.items() if name not in os.environ}
    path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH", ""))))
    return {**os.environ, **own, "PYTHONPATH": path}


def ended(words: list[str], folder: Path, limit_s: float) -> tuple[int | None, list[str]]:
    """The status of a child, None where its time was over, and the lines that it has said.

    They go to a file, because the child's own children, such as compilers, may hold a pipe open
    after its end; at the end all of them are ended.
    """
    with open(folder / "said.txt", "w+b") as said:
        child = subprocess.Popen(
            [sys.executable, *words], cwd=ROOT, env=environment(folder),
            stdin=subprocess.DEVNULL, stdout=said, stderr=subprocess.STDOUT,
            start_new_session=True,
        )  # fmt: skip
        try:
            status: int | None = child.wait(limit_s)
        except subprocess.TimeoutExpired:
            status = None
        finally:
            try:
                os.killpg(child.pid, signal.SIGKILL)
            except ProcessLookupError:
                pass
            child.wait()
        said.seek(0)
        return status, said.read().decode(errors="replace").strip().splitlines()


def run_child(words: list[str], folder: Path, limit_s: float) -> str | None:
    """Why the child did not do its work; None if it did."""
    status, said = ended(words, folder, limit_s)
    if status == 0:
        return None
    how = f"not done after {limit_s:.0f} s" if status is None else f"status {status}"
    return f"{how}: {' | '.join(said[-3:]) or 'no words'}"


def run_tests(folder: Path, limit_s: float) -> dict[str, Any]:
    """What `pytest -m gpu` says, without the plugins that the project's own settings ask for."""
    if importlib.util.find_spec("pytest") is None:
        return {"skipped": "no pytest"}
    marked = [p for p in sorted((ROOT / "tests").glob("test_*.py")) if "mark.gpu" in p.read_text()]
    settings = folder / "pytest.ini"
    settings.write_text(
        "[pytest]\naddopts = --import-mode=importlib -ra\nmarkers =\n"
        + "".join(f"    {mark}: as in pyproject.toml\n" for mark in ("gpu", "trt", "torch", "slow"))
    )
    words = [
        "-m",
        "pytest",
        "-v",
        "--tb=short",
        "-c",
        str(settings),
        f"--rootdir={ROOT}",
        "-m",
        "gpu",
    ]
    words += ["-p", "no:cacheprovider", *map(str, marked)]
    status, said = ended(words, folder, limit_s)
    if status is None:
        said.append(f"not done after {limit_s:.0f} s")
    return {"status": status, "said": shortened(said)}


def shortened(said: list[str]) -> list[str]:
    """What pytest says: each reason for skipping once, the last that is no skip and no pass, and at
    the end where it was, or how it ended."""
    reasons = Counter[str]()
    kept = []
    for line in said:
        skipped = re.match(r"SKIPPED \[(\d+)\] [^ ]+: (.*)", line)
        if skipped:
            reasons[skipped[2]] += int(skipped[1])
        elif not re.search(r" (PASSED|SKIPPED)\b.*\[ *\d+%\]$", line):
            kept.append(line)
    folded = [f"skipped {count}: {reason}" for reason, count in reasons.items()]
    return [*folded, *kept[-TOLD_LINES:]]


def peak_flops(device: str, folder: Path, limit_s: float) -> tuple[float | None, str | None]:
    """What the GPU makes of one large matrix product, operations a second; or why it is not known."""
    answered = folder / "peak.json"
    words = ["-m", "benchmarks.gpu_floor", device, str(answered)]
    if problem := run_child(words, folder, limit_s):
        return None, problem
    return float(json.loads(answered.read_text())["peak_flops"]), None


def measured(
    variants: tuple[Variant, ...], given: argparse.Namespace, folder: Path, clock: Clock
) -> Iterator[tuple[Variant, dict[str, Any]]]:
    """Each variant with its rows, or with the reason why there are none."""
    from benchmarks import gpu_variant

    network = "tiny" if given.tiny else "ffhq256"
    weights, bundle = folder / "weights.pt", folder / "rule.bundle"
    gpu_variant.make_weights(network, weights)
    for index, variant in enumerate(variants):
        if clock.left_s() < LEAST_S:
            yield variant, {"skipped": "no time left"}
            continue
        if variant.needs_bundle:
            words = ["-m", "benchmarks.gpu_bundle", network, str(weights), str(bundle)]
            words += [str(given.steps), variant.backend]
            if problem := run_child(words, folder, min(BUNDLE_LIMIT_S, clock.left_s())):
                yield variant, {"skipped": problem}
                continue
        request = gpu_variant.Request(
            backend=variant.backend, precision=variant.precision, compiled=variant.compiled,
            modes=variant.modes, device=given.device, network=network, steps=given.steps,
            frames=given.frames, weights=str(weights), picture=str(folder / "picture.npy"),
            bundle=str(bundle),
        )  # fmt: skip
        asked, answered = folder / f"{index}.json", folder / f"{index}.result.json"
        asked.write_text(json.dumps(asdict(request)))
        words = ["-m", "benchmarks.gpu_variant", str(asked), str(answered)]
        limit_s = min(variant.limit_s or clock.left_s(), clock.left_s())
        problem = run_child(words, folder, limit_s)
        answer: dict[str, Any] = {"skipped": problem} if problem else {}
        if answered.is_file():
            answer["rows"] = json.loads(answered.read_text())["rows"]
        yield variant, answer


def told(name: str, row: dict[str, Any], floor_ms: float | None) -> str:
    """A row as a line of the table."""
    step = f"{row['step']['p50_ms']:9.3f}" if "step" in row else f"{'-':>9}"
    outside = f"{row['outside_networks_ms']:9.3f}" if "step" in row else f"{'-':>9}"
    frame = row["frame"]
    apart = f"{row['mean_levels']:8.3f}" if "mean_levels" in row else f"{'-':>8}"
    above = f"{frame['p50_ms'] / floor_ms:8.1f}" if floor_ms else f"{'-':>8}"
    return (
        f"{name:<22}{row['mode']:<7}{step}{frame['p50_ms']:10.2f}{frame['p95_ms']:10.2f}"
        f"{outside}{above}{apart}"
    )


def measure(
    given: argparse.Namespace, folder: Path, clock: Clock, keep: Callable[[dict[str, Any]], None]
) -> dict[str, Any]:
    """All figures, ready for JSON; the table is printed as it comes, and `keep` is called with what
    there is so far."""
    from benchmarks import gpu_floor, gpu_variant
    from diffusionact import machine

    network = "tiny" if given.tiny else "ffhq256"
    counted = gpu_floor.flops(gpu_variant.CONFIGS[network])
    limit_s = LIMIT_S if given.device == "cuda" else clock.left_s()
    peak, problem = peak_flops(given.device, folder, min(limit_s, clock.left_s()))
    work = counted["encoder"] + given.steps * counted["step"]
    floor_ms = 1e3 * work / peak if peak else None
    print(
        f"{network}, T = {given.steps}: {counted['step'] / 1e9:.1f} GFLOP a step, "
        f"{counted['encoder'] / 1e9:.1f} the encoder; "
        + (
            f"{peak / 1e12:.2f} TFLOP/s measured; floor {floor_ms:.2f} ms a frame"
            if peak
            else f"no floor: {problem}"
        )
    )
    heads = ("ms a step", "frame p50", "p95", "outside", "x floor", "levels")
    widths = (9, 10, 10, 9, 8, 8)
    print(f"{'':<29}" + "".join(f"{h:>{w}}" for h, w in zip(heads, widths, strict=True)))
    chosen = ON_CPU if given.device == "cpu" else ON_GPU
    wanted = tuple(v for v in chosen if not given.only or v.name in given.only.split(","))
    figures: dict[str, Any] = {
        "what": "one frame of a network on weights made by a rule",
        "network": network,
        "steps": given.steps,
        "frames": given.frames,
        "device": given.device,
        "time": machine.now(),
        "commit": machine.commit(),
        "machine": machine.describe(),
        "versions": machine.versions(),
        "flops": counted,
        "peak_flops": peak,
        "floor_ms": round(floor_ms, 3) if floor_ms else None,
        "targets_ms": TARGETS_MS,
        "variants": {},
    }
    for variant, answer in measured(wanted, given, folder, clock):
        figures["variants"][variant.name] = answer
        keep(figures)
        for row in answer.get("rows", ()):
            print(told(variant.name, row, floor_ms), flush=True)
        if "skipped" in answer:
            what = "not all" if answer.get("rows") else "skipped"
            print(f"{variant.name:<22}{what}: {answer['skipped']}", flush=True)
    return figures


def main() -> int:
    form = argparse.RawDescriptionHelpFormatter
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=form)
    add = parser.add_argument
    add("--device", choices=("cuda", "cpu"), default="cuda")
    add("--tiny", action="store_true", help="a toy network")
    add("--check", action="store_true", help="the tests that need a GPU first")
    add("--steps", type=int, default=STEPS, metavar="T")
    add("--frames", type=int, default=100, metavar="N", help="timed of each (default: 100)")
    add("--minutes", type=float, default=7.5, help="for all of it (default: 7.5)")
    add("--only", default="", metavar="NAME,...", help="some of the ways")
    add("--json", type=Path, help="(default: benchmarks/results/gpu.json on a GPU)")
    given = parser.parse_args()
    clock = Clock(given.minutes)
    if reason := missing(given.device):
        print(f"gpu: skipped: {reason}")
        return 0
    status = 0
    with tempfile.TemporaryDirectory(prefix="gpu-") as temporary:
        folder = Path(temporary)
        path = given.json or (RESULTS / "gpu.json" if given.device == "cuda" else None)
        tests = run_tests(folder, PYTEST_SHARE * clock.left_s()) if given.check else {}
        if tests:
            print("\n".join(tests.get("said", [f"tests skipped: {tests.get('skipped')}"])))
            status = 0 if tests.get("status") in (0, 5) or "skipped" in tests else 1

        def keep(figures: dict[str, Any]) -> None:
            if path:
                path.parent.mkdir(parents=True, exist_ok=True)
                write_whole(path, json.dumps({**figures, "tests": tests}, indent=1) + "\n")

        keep({})
        figures = measure(given, folder, clock, keep)
    if path:
        print(path)
    if not any("rows" in answer for answer in figures["variants"].values()):
        status = 1
    return status


if __name__ == "__main__":
    sys.exit(main())
