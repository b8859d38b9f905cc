"""Engines against the bundle's graphs, on the same real inputs: the gate of `diffusionact build`."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TypeAlias

import numpy as np

from diffusionact import manifest as manifest_file
from diffusionact import trt_library
from diffusionact.engine_files import EngineManifest, Parity
from diffusionact.manifest import Manifest
from diffusionact.runtime import cuda, trt
from diffusionact.runtime.component import Array, Component, open_component
from diffusionact.runtime.recorder import Feed, record_step

# Runs an engine once: inputs by name -> outputs by name.
Run: TypeAlias = Callable[[Mapping[str, Array]], Mapping[str, Array]]
# Opens an engine, and says where it runs; None where it cannot be run.
Opener: TypeAlias = Callable[[EngineManifest, Path], "tuple[Run, str] | None"]

# What an engine may be from fp32 on the CPU, as a part of the largest value. fp16 rounds to 5e-4
# and 1e-3 of it is what the shipped networks show; a wrong kernel or layer is off by its own size.
# 8 bits are held to a quality of their own at calibration; here only what is broken is to fail.
ALLOWED: Mapping[str, float] = {"fp32": 1e-3, "fp16": 1e-2, "int8": 0.25, "fp8": 0.25}


class Gate:
    """Compares the engines of one bundle; a `engines.build.Gate`."""

    def __init__(self, bundle_dir: Path, opener: Opener) -> None:
        self._bundle_dir = bundle_dir
        self._opener = opener
        self._manifest: Manifest | None = None
        self._feeds: dict[str, Feed] = {}

    def __call__(self, engine: EngineManifest, path: Path) -> Parity | None:
        """Return how far the engine is from the graph; None where it cannot be run.

        Raises: DeviceError when it is opened and fails as it runs.
        """
        opened = self._opener(engine, path)
        if opened is None:
            return None
        run, place = opened
        name, shapes = engine.key.component, engine.key.shapes
        feed = self._feed(name, shapes)
        due = self._reference(name, shapes, feed)
        seen = run(feed)
        far, largest = 0.0, 1.0
        for output, values in due.items():
            apart = np.abs(seen[output].astype(np.float64) - values)
            # NaN is far from everything, and JSON has no infinity.
            worst = float(apart.max()) if np.isfinite(apart).all() else float(np.finfo("f4").max)
            far = max(far, worst)
            largest = max(largest, float(np.abs(values).max()))
        return Parity(far, ALLOWED[engine.key.precision] * largest, place)

    def _read(self) -> Manifest:
        if self._manifest is None:
            self._manifest = manifest_file.read(self._bundle_dir)
            self._feeds = record_step(self._bundle_dir, self._manifest)
        return self._manifest

    def _feed(self, name: str, shapes: Mapping[str, tuple[int, ...]]) -> Feed:
        """Recorded inputs of a component, in these shapes: more timesteps are all over the run."""
        manifest = self._read()
        kind, suffix = name.removesuffix("_invert"), name[len(name.removesuffix("_invert")) :]
        recorded = self._feeds.get(name) or self._feeds[kind]
        if kind not in ("time", "modulation"):
            return recorded
        count = shapes["time_rows"][0]
        t = np.linspace(0, manifest.schedule.total - 1, count, dtype=np.float32)
        if kind == "time":
            return {"t": t}
        rows = self._reference("time" + suffix, {"time_rows": shapes["time_rows"]}, {"t": t})
        return {"z": recorded["z"], **rows}

    def _reference(
        self, name: str, shapes: Mapping[str, tuple[int, ...]], feed: Mapping[str, Array]
    ) -> Feed:
        """What the bundle's graph answers, in fp32 on the CPU."""
        count = shapes["time_rows"][0] if "time_rows" in shapes else 1
        part = open_component(
            self._bundle_dir, self._read(), name, backend="ort", device="cpu", sizes={"N": count}
        )
        return answers(part, feed)


def on_gpu(engine: EngineManifest, path: Path) -> tuple[Run, str] | None:
    """Return how an engine runs on the GPU that is here, and the GPU's name; None where there is
    none, or another than the engine is for. An `Opener`.

    Raises: EngineError when it does not open, DeviceError when the GPU has no memory for it.
    """
    if cuda.why_not() is not None:
        return None
    gpu, key = cuda.probe(), engine.key
    if gpu.target not in key.targets or key.gpu not in ("", gpu.name):
        return None
    device = cuda.Device()
    inputs, outputs = ({s.name: s for s in specs} for specs in (engine.inputs, engine.outputs))
    library = trt_library.find(key.library)
    place = (library, gpu, "build it again with --force")
    part = trt.open_plan(path, place, inputs, outputs, device.stream)
    shapes = {name: (key.shapes[name], spec.dtype) for name, spec in {**inputs, **outputs}.items()}
    arrays = {name: device.empty(shape, dtype) for name, (shape, dtype) in shapes.items()}
    part.bind(**arrays)

    def run(feed: Mapping[str, Array]) -> dict[str, Array]:
        for name in inputs:
            device.upload(arrays[name], np.ascontiguousarray(feed[name]))
        part.run()
        made = {name: np.zeros(*shapes[name]) for name in outputs}
        for name, array in made.items():
            device.download(array, arrays[name])
        device.synchronize()
        return made

    return run, gpu.name


def answers(part: Component, feed: Mapping[str, Array]) -> Feed:
    """Return what a component on the CPU makes of inputs."""
    made = {
        name: np.zeros([int(size) for size in spec.shape], spec.dtype)
        for name, spec in part.outputs.items()
    }
    part.bind(**{name: np.ascontiguousarray(feed[name]) for name in part.inputs}, **made)
    part.run()
    return made
