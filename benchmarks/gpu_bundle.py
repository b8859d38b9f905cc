"""The rule-made network as a bundle, and its TensorRT engines: see benchmarks/gpu.py.

python -m benchmarks.gpu_bundle NETWORK WEIGHTS.pt FOLDER STEPS BACKEND
"""

from __future__ import annotations

import importlib
import importlib.util
import os
import shutil
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu_variant import CONFIGS, PARTS, bare_manifest
from diffusionact import manifest as manifest_file
from diffusionact.errors import BackendMissing
from diffusionact.manifest import ComponentSpec
from diffusionact.runtime.component import BACKENDS
from diffusionact.runtime.cuda import gpu_to_build_for


def write_bundle(network: str, weights: Path, folder: Path, steps: int) -> None:
    """Nothing; the folder is a bundle. Made of the exporter's parts, whose comparison over 70 steps
    would take longer than all else."""
    from diffusionact.export import to_onnx, wrap

    bare = bare_manifest(network, steps)
    kept = torch.load(weights, mmap=True, weights_only=True)
    networks: dict[str, Any] = {}
    for part, (kind, _) in PARTS.items():
        with torch.device("meta"):
            networks[part] = kind(CONFIGS[network])
        networks[part].load_state_dict(kept[part], assign=True)
    part_folder = folder.with_name(f".part-{folder.name}")
    shutil.rmtree(part_folder, ignore_errors=True)  # of one whose time was over
    part_folder.mkdir()
    tensors, components = manifest_file.component_tensors(bare), {}
    for name, module in wrap.components(networks["encoder"], networks["render"], None).items():
        path = part_folder / f"{name}.onnx"
        to_onnx.export(module, *tensors[name], path)
        digest = manifest_file.file_sha256(path)
        components[name] = ComponentSpec(path.name, digest, *tensors[name])
    manifest_file.write(part_folder, replace(bare, components=components))
    os.replace(part_folder, folder)


def build_engines(folder: Path, steps: int) -> None:
    """Nothing; the engines for the GPU that is here are in the bundle, past the gate where what it
    compares with is installed."""
    from diffusionact.engines import build

    gate = None
    if all(importlib.util.find_spec(name) for name in ("onnxruntime", "cv2")):
        from diffusionact.runtime.gate import Gate, on_gpu

        gate = Gate(folder, on_gpu)
    settings = build.Settings(here=gpu_to_build_for(), steps=(steps,))
    for built in build.build(folder, settings, gate=gate):
        print(built.title, built.manifest.parity)


def main() -> None:
    network, weights, folder, steps, backend = sys.argv[1:]
    module = importlib.import_module(BACKENDS[backend])
    if problem := module.problem("cuda"):  # before the export, which takes a minute
        raise BackendMissing(problem)
    if not Path(folder).exists():
        write_bundle(network, Path(weights), Path(folder), int(steps))
    if backend == "trt":
        build_engines(Path(folder), int(steps))


if __name__ == "__main__":
    main()
