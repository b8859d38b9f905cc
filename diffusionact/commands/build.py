"""`diffusionact build`: a bundle's engines."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import TYPE_CHECKING

from diffusionact.commands.exits import DONE
from diffusionact.commands.extras import extra
from diffusionact.commands.model import bundle_argument, counts, words
from diffusionact.commands.output import say

if TYPE_CHECKING:
    from diffusionact.engine_files import EngineManifest

HELP = "A bundle -> TensorRT engines, for this GPU or for named ones."


def options(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    bundle_argument(parser)
    add(
        "--gpu",
        type=words,
        default=(),
        metavar="SM,...",
        help="ahead of time, for GPUs such as sm_89,sm_120 (default: the one here)",
    )
    add("--precision", default="fp16", choices=("fp16", "fp32", "int8", "fp8"))
    add("--calibration", type=Path, metavar="DIR", help="of 8 bits: what calibrate wrote")
    add("--library", choices=("tensorrt", "tensorrt_rtx"), help="(default: what is installed)")
    add(
        "--level", type=int, default=3, metavar="N", help="0 is quick, 5 searches long (default: 3)"
    )
    add("--workspace", type=int, default=4096, metavar="MIB", help="scratch (default: 4096)")
    add("--steps", type=counts, default=(), metavar="N,...", help="(default: the bundle's)")
    add("--force", action="store_true", help="build what is valid again")


def run(arguments: argparse.Namespace) -> int:
    """Make engines of a bundle."""
    from diffusionact.progress import StageProgress
    from diffusionact.runtime.gate import Gate, on_gpu

    with extra("build", "rtx"):
        from diffusionact.engines.build import Settings, describe
        from diffusionact.engines.build import build as build_engines
        from diffusionact.runtime.cuda import gpu_to_build_for

        settings = Settings(
            here=None if arguments.gpu else gpu_to_build_for(),
            gpus=arguments.gpu,
            library=arguments.library,
            precision=arguments.precision,
            level=arguments.level,
            workspace_mib=arguments.workspace,
            steps=arguments.steps,
            force=arguments.force,
            calibration=arguments.calibration,
        )
        bundle_dir = Path(arguments.bundle)
        gate = Gate(bundle_dir, on_gpu)
        with StageProgress("percent", quiet=arguments.quiet) as progress:
            for built in build_engines(bundle_dir, settings, progress, gate):
                told = built.manifest
                census = told.engine if told.engine is not None else told.network
                text = (
                    f"{'built' if built.new else 'valid':<7}{built.title:<18} "
                    f"{_precision(told)}, {told.plan_bytes / 1e6:.1f} MB, {told.build_s:.1f} s, "
                    f"{describe(census)}; {_parity(told)}; {built.path.name}"
                )
                say(arguments, {**dataclasses.asdict(built), "path": str(built.path)}, text)
    return DONE


def _precision(told: EngineManifest) -> str:
    quality = f" {told.psnr_db:.1f} dB" if told.psnr_db is not None else ""
    return f"{told.key.precision}{quality}, level {told.key.level}"


def _parity(told: EngineManifest) -> str:
    if told.parity is None:
        return "parity not run here"
    return f"parity {told.parity.max_error:.1e} of {told.parity.max_allowed:.1e} allowed"
