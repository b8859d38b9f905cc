"""The seam between the loop and what runs a network: four members that every backend honours."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Mapping
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Protocol, TypeAlias

import numpy as np
import numpy.typing as npt

from diffusionact.errors import BundleError, DeviceError, SettingsError
from diffusionact.manifest import Manifest, TensorSpec
from diffusionact.runtime.trace import recording

Array: TypeAlias = npt.NDArray[Any]

# backend -> the module that opens it; a new backend is a module and a line here. A module has
# DEVICES and PRECISIONS, the best first (precisions: of those that work on this machine, by device
# where they differ), and open_model(path, inputs, outputs, device, threads, precision) -> Component.
# One that runs a network for several frames at once has open_together, the same with `frames`, and
# AT_ONCE: precision -> how many of a clip's frames it is fastest with, for files of up to
# AT_ONCE_BYTES.
BACKENDS: Mapping[str, str] = {
    "ort": "diffusionact.runtime.ort",
    "openvino": "diffusionact.runtime.openvino",
    "torch": "diffusionact.runtime.torch",
    "trt": "diffusionact.runtime.trt",
}
PRECISIONS = ("fp32", "bf16", "fp16", "int8", "fp8")  # all that any backend may have


class Component(Protocol):
    """A network with fixed shapes, run over memory that its caller owns."""

    @property
    def inputs(self) -> Mapping[str, TensorSpec]:
        """The input tensors by name, all sizes fixed."""

    @property
    def outputs(self) -> Mapping[str, TensorSpec]:
        """The output tensors by name, all sizes fixed."""

    def bind(self, **arrays: Any) -> None:
        """Return nothing; from now on `run` reads and writes these arrays, all of them at once.

        Raises: SettingsError for a tensor too few, too many or not as its spec says.
        """

    def run(self) -> None:
        """Return nothing; the outputs are complete in their arrays when it returns."""


def open_component(
    bundle_dir: Path,
    manifest: Manifest,
    name: str,
    *,
    backend: str = "ort",
    device: str = "cpu",
    precision: str = "auto",
    threads: int = 0,
    sizes: Mapping[str, int] | None = None,
    frames: int = 1,
    stream: int | None = None,
) -> Component:
    """Return component `name` of the bundle, or of its tracker, opened but not bound.

    device, precision: "auto" takes the backend's best; threads: 0 leaves the number to the
    backend; sizes: what the manifest's named sizes are in this run, such as {"N": steps}; frames:
    at once, each with its own row of every tensor (see `frames_at_once`); stream: of device "cuda",
    the handle of the one that the component runs on.

    Raises: SettingsError for an unknown backend or a precision it lacks here, BackendMissing when
    its library is not installed, DeviceError for a device it cannot use, BundleError when the
    model is not as the manifest says.
    """
    parts = {**manifest.components, **manifest.tracker}
    if name not in parts:
        raise BundleError(
            f"{bundle_dir}: has no component {name!r}, only {', '.join(sorted(parts))}; "
            "export the bundle again"
        )
    module, chosen, rounding = _resolved(backend, device, precision)
    spec = parts[name]
    on_stream = {"stream": stream} if chosen == "cuda" else {}
    inputs, outputs = (fixed(specs, sizes or {}) for specs in (spec.inputs, spec.outputs))
    opener = partial(module.open_together, frames=frames) if frames > 1 else module.open_model
    component: Component = opener(
        bundle_dir / spec.file,
        inputs,
        outputs,
        device=chosen,
        threads=threads,
        precision=rounding,
        **on_stream,
    )
    recorder = recording()
    return component if recorder is None else recorder.watched(name, component)


def open_reusing(
    bundle_dir: Path,
    manifest: Manifest,
    *,
    backend: str,
    device: str = "cpu",
    precision: str = "auto",
    threads: int = 0,
) -> tuple[Component, Component]:
    """Return the step network twice: whole, and without its deep part, whose features are those
    that the whole one had when it last ran. Both have the tensors of `unet_step`.

    Raises: as open_component; SettingsError for a backend that cannot cut a network.
    """
    module, chosen, rounding = _resolved(backend, device, precision)
    if not hasattr(module, "open_reusing"):
        raise SettingsError(
            f"backend {backend!r} cannot reuse a network's features; choose 'openvino' on a CPU, "
            "or approximate nothing"
        )
    spec = manifest.components["unet_step"]
    inputs, outputs = (fixed(specs, {}) for specs in (spec.inputs, spec.outputs))
    pair: tuple[Component, Component] = module.open_reusing(
        bundle_dir / spec.file, inputs, outputs,
        device=chosen, threads=threads, precision=rounding,
    )  # fmt: skip
    recorder = recording()
    if recorder is None:
        return pair
    names = ("unet_step", "unet_step_shallow")
    whole, shallow = (recorder.watched(n, part) for n, part in zip(names, pair, strict=True))
    return whole, shallow


def frames_at_once(
    model: Path, backend: str, device: str, precision: str, asked: int | None = None
) -> int:
    """Return how many frames of a clip one network takes at once: what was asked for, or what the
    backend is fastest with for a model of this size in a precision. Raises: as open_component, and
    SettingsError where several were asked for and the backend takes one."""
    module, chosen, rounding = _resolved(backend, device, precision)
    several = hasattr(module, "open_together") and chosen == "cpu"
    if not several and (asked or 1) > 1:
        raise SettingsError(
            f"at_once={asked}: backend {backend!r} renders one frame at a time; choose 'openvino' "
            "on a CPU, or leave it out"
        )
    if asked or not several or model.stat().st_size > module.AT_ONCE_BYTES:
        return asked or 1
    return int(module.AT_ONCE[rounding])


def device_of(backend: str, device: str) -> str:
    """Return what "auto" is for a backend here, or the device itself. Raises: as open_component."""
    return _resolved(backend, device, "auto")[1]


def _resolved(backend: str, device: str, precision: str) -> tuple[Any, str, str]:
    """The backend's module, and what "auto" is in it."""
    if backend not in BACKENDS:
        raise SettingsError(f"backend {backend!r} is not known; choose from: {', '.join(BACKENDS)}")
    module = importlib.import_module(BACKENDS[backend])
    chosen = module.DEVICES[0] if device == "auto" else device
    if chosen not in module.DEVICES:
        raise DeviceError(
            f"backend {backend!r} runs on {', '.join(module.DEVICES)}, not on {chosen!r}; "
            f"choose one of these, or 'auto'"
        )
    known = precisions(module, chosen)
    rounding = known[0] if precision == "auto" else precision
    if rounding not in known:
        raise SettingsError(
            f"backend {backend!r} computes in {', '.join(known)} on this machine, not "
            f"in {rounding!r}; choose one of these, or 'auto'"
        )
    return module, chosen, rounding


def precisions(module: Any, device: str) -> tuple[str, ...]:
    """Return the precisions of a backend's module on a device, the best first."""
    listed: Mapping[str, tuple[str, ...]] | tuple[str, ...] = module.PRECISIONS
    return listed[device] if isinstance(listed, Mapping) else listed


def fixed(specs: Iterable[TensorSpec], sizes: Mapping[str, int]) -> dict[str, TensorSpec]:
    """Return the specs by name with every named size replaced by its number.

    Raises: SettingsError for a named size that `sizes` lacks.
    """
    known = {}
    for spec in specs:
        missing = [size for size in spec.shape if isinstance(size, str) and size not in sizes]
        if missing:
            raise SettingsError(f"tensor {spec.name!r}: give a number for size {missing[0]!r}")
        shape = tuple(sizes[size] if isinstance(size, str) else size for size in spec.shape)
        known[spec.name] = replace(spec, shape=shape)
    return known


def check_bound(
    specs: Mapping[str, TensorSpec], arrays: Mapping[str, Any], device: str = "cpu"
) -> None:
    """Return nothing when `arrays` are just what `specs` describe, each in C order, in the memory
    of the device: NumPy's on the CPU, else anything with a `__cuda_array_interface__`.

    Raises: SettingsError naming the first tensor that is not.
    """
    if set(arrays) != set(specs):
        raise SettingsError(f"bound {sorted(arrays)}; wanted {sorted(specs)}, all of them")
    for name, spec in specs.items():
        array = arrays[name]
        if isinstance(array, np.ndarray) != (device == "cpu"):
            raise SettingsError(
                f"tensor {name!r} is a {type(array).__name__}; wanted memory of {device!r}"
            )
        if tuple(array.shape) != spec.shape or array.dtype != np.dtype(spec.dtype):
            raise SettingsError(
                f"tensor {name!r} is {array.dtype} {list(array.shape)}; "
                f"wanted {spec.dtype} {list(spec.shape)}"
            )
        strides = None if device == "cpu" else array.__cuda_array_interface__.get("strides")
        if strides is not None or (device == "cpu" and not array.flags.c_contiguous):
            raise SettingsError(f"tensor {name!r} is not contiguous; wanted C order")
