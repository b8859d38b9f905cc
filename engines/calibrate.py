"""The calibrations of a bundle: one file for each component that 8 bits are for."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TypeAlias

import onnx

from diffusionact import manifest as manifest_file
from diffusionact.engine_files import ONCE
from diffusionact.engines import quantize
from diffusionact.engines.quantize import Array, Calibration, Feed
from diffusionact.errors import EngineError

# Runs an ONNX graph: its content and its inputs -> its outputs by name.
RunGraph: TypeAlias = Callable[[bytes, Feed], Mapping[str, Array]]


@dataclass(frozen=True)
class Made:
    """One calibration and its file."""

    component: str
    path: Path
    calibration: Calibration


def calibrate(
    bundle_dir: Path,
    kind: str,
    feeds: Mapping[str, Sequence[Feed]],
    out_dir: Path,
    run: RunGraph,
) -> Iterator[Made]:
    """Yield the calibrations as they are written.

    feeds: component -> recorded inputs.

    Raises: BundleError; EngineError for a component that loses too much; as quantize.calibrate.
    """
    manifest = manifest_file.read(bundle_dir)
    out_dir.mkdir(parents=True, exist_ok=True)
    for name, part in manifest.components.items():
        if name in ONCE:
            continue
        model = onnx.load(str(bundle_dir / part.file))

        def answers(graph: onnx.ModelProto, feed: Feed) -> Mapping[str, Array]:
            return run(graph.SerializeToString(), feed)

        try:
            made = quantize.calibrate(model, part.sha256, kind, feeds[name], answers)
        except EngineError as error:
            raise EngineError(f"{name}: {error}") from error
        path = out_dir / f"{name}-{kind}.json"
        quantize.write(path, made)
        yield Made(name, path, made)
