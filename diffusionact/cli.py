"""The command line: parsing and printing.

The one file that knows all sub-packages, each imported inside its own subcommand, so that --help
loads neither NumPy nor torch. Exit status: 0 done, 1 a check failed, 2 the message says what to
do, 130 and 143 ended by SIGINT and SIGTERM; any other error is a bug and keeps its trace.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import logging
import os
import signal
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from diffusionact._version import __version__
from diffusionact.assets import bundle_path
from diffusionact.errors import BackendMissing, DiffusionActError, SettingsError

if TYPE_CHECKING:
    from diffusionact.runtime.clip import ClipReport
    from diffusionact.runtime.demo import DemoReport
    from diffusionact.runtime.reenactor import Reenactor

DONE, FAILED, REFUSED, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143
LOG_VARIABLE = "DIFFUSIONACT_LOG"
LEVELS = ("debug", "info", "warning", "error")


def main(argv: Sequence[str] | None = None) -> int:
    """Return the exit status of one command."""
    arguments = _parser().parse_args(argv)
    try:
        with _terminable():
            _start_log(arguments)
            status: int = arguments.command(arguments)
            return status
    except DiffusionActError as error:
        print(f"diffusionact: {error}", file=sys.stderr)
        return REFUSED
    except KeyboardInterrupt:
        print("diffusionact: interrupted", file=sys.stderr)
        return INTERRUPTED
    except _Terminated:
        print("diffusionact: terminated", file=sys.stderr)
        return TERMINATED


def demo(arguments: argparse.Namespace) -> int:
    """Move the shipped portrait with the shipped clip."""
    from diffusionact.progress import Progress
    from diffusionact.runtime.demo import run_demo

    with _reenactor(arguments) as act, Progress("demo", quiet=arguments.quiet) as progress:
        report = run_demo(act, Path(arguments.output), progress)
    _report(arguments, report, f"wrote {report.video} and {report.sheet}: {report.frames} frames")
    return DONE


def run(arguments: argparse.Namespace) -> int:
    """Move a portrait with a driver."""
    from diffusionact.progress import StageProgress
    from diffusionact.runtime.clip import run_clip

    with _reenactor(arguments) as act, StageProgress(quiet=arguments.quiet) as progress:
        report = run_clip(
            act,
            arguments.source,
            arguments.driver,
            arguments.output,
            face=arguments.face,
            progress=progress,
        )
    faces = f"{report.frames} frames, {report.seen} with a face"
    _report(arguments, report, f"wrote {report.output}: {faces}")
    return DONE


def import_(arguments: argparse.Namespace) -> int:
    """Read published checkpoints into a folder of weights."""
    with _extra("import", "export"):
        from diffusionact.training.imports import Request, import_published
        from diffusionact.training.published import load_network

        given = {
            name: Path(value)
            for name in ("diffusionact", "diffae", "s3fd", "fan", "emoca", "gaze")
            if (value := getattr(arguments, name)) is not None
        }
        flame = tuple(Path(file) for file in arguments.flame or ())
        network = load_network(arguments.network) if arguments.network else None
        report = import_published(
            Request(**given, flame=flame, network=network), Path(arguments.output)
        )
    _say(arguments, dataclasses.asdict(report), "\n".join(report.lines()))
    return DONE


def export(arguments: argparse.Namespace) -> int:
    """Make a bundle from weights."""
    with _extra("export"):
        from diffusionact.export.bundle import export_bundle

        made = export_bundle(Path(arguments.weights), Path(arguments.output))
    told = {"bundle": arguments.output, "name": made.name, "weights_sha256": made.weights_sha256}
    _say(arguments, told, f"wrote {arguments.output}; `diffusionact check` tries it")
    return DONE


def build(arguments: argparse.Namespace) -> int:
    """Make engines of a bundle."""
    from diffusionact.progress import StageProgress

    with _extra("build", "rtx"):
        from diffusionact.engines.build import Settings, describe
        from diffusionact.engines.build import build as build_engines
        from diffusionact.engines.gpu import gpu_here

        settings = Settings(
            here=None if arguments.gpu else gpu_here(),
            gpus=arguments.gpu,
            library=arguments.library,
            precision=arguments.precision,
            level=arguments.level,
            workspace_mib=arguments.workspace,
            steps=arguments.steps,
            force=arguments.force,
            calibration=arguments.calibration,
        )
        with StageProgress("percent", quiet=arguments.quiet) as progress:
            for built in build_engines(Path(arguments.bundle), settings, progress):
                told = built.manifest
                counts = told.engine if told.engine is not None else told.network
                parity = f"{told.parity.max_error:.1e}" if told.parity else "not run here"
                text = (
                    f"{'built' if built.new else 'valid':<7}{built.title:<18} "
                    f"{told.key.precision}, {told.plan_bytes / 1e6:.1f} MB, {told.build_s:.1f} s, "
                    f"{describe(counts)}; parity {parity}; {built.path.name}"
                )
                _say(arguments, {**dataclasses.asdict(built), "path": str(built.path)}, text)
    return DONE


def train(arguments: argparse.Namespace) -> int:
    """Train what a recipe says, rendering its faces first where they are not there yet."""
    with _extra("train"):
        from diffusionact.training.config import load_recipe
        from diffusionact.training.data import render_pool
        from diffusionact.training.loop import finish_early
        from diffusionact.training.loop import train as train_recipe

        if arguments.finish:
            path = finish_early(arguments.recipe, out=arguments.output)
            _say(arguments, {"weights": str(path)}, f"wrote {path}")
            return DONE
        pool = load_recipe(arguments.recipe).pool
        render_pool(
            pool.folder,
            identities=pool.identities,
            frames=pool.frames,
            size=pool.size,
            seed=pool.seed,
        )
        folder = train_recipe(
            arguments.recipe, resume=arguments.resume, out=arguments.output, device=arguments.device
        )
    _say(arguments, {"run": str(folder)}, f"the run is in {folder}")
    return DONE


def check(arguments: argparse.Namespace) -> int:
    """Report what works here."""
    from diffusionact.runtime.check import findings

    passed = True
    for finding in findings(Path(arguments.bundle)):
        passed = passed and finding.passed is not False
        mark = {True: "ok", False: "FAILED", None: "-"}[finding.passed]
        _say(arguments, vars(finding), f"{mark:<7}{finding.subject:<24} {finding.detail}")
    return DONE if passed else FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="diffusionact", description="One-shot face reenactment with a diffusion autoencoder."
    )
    parser.add_argument("--version", action="version", version=f"diffusionact {__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True)
    talk, model = _talk_options(), _model_options()

    def add(
        command: Callable[[argparse.Namespace], int], text: str, *parents: argparse.ArgumentParser
    ) -> argparse.ArgumentParser:
        made = commands.add_parser(
            command.__name__.rstrip("_"), parents=[*parents, talk], help=text, description=text
        )
        made.set_defaults(command=command, log="warning")
        return made

    _fill_demo(add(demo, "Shipped portrait, shipped driver -> a video and a picture.", model))
    _fill_run(add(run, "Move a portrait with the face in a picture, video or track.", model))
    _fill_import(add(import_, "Published checkpoints -> a folder of weights."))
    _fill_export(add(export, "Weights -> a bundle of ONNX files."))
    _fill_build(add(build, "A bundle -> TensorRT engines, for this GPU or for named ones."))
    _fill_train(add(train, "Train what a recipe says."))
    _fill_check(add(check, "Versions, devices, backends, tracker, and a bundle's health."))
    return parser


def _talk_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--json",
        action="store_true",
        help="one JSON object a line on stdout, and nothing else there",
    )
    options.add_argument("-q", "--quiet", action="store_true", help="errors only")
    return options


def _model_options() -> argparse.ArgumentParser:
    options = argparse.ArgumentParser(add_help=False)
    options.add_argument(
        "--bundle",
        default=bundle_path(),
        metavar="DIR",
        help="the model (default: the shipped one)",
    )
    options.add_argument(
        "--steps",
        type=_steps,
        metavar="N",
        help="diffusion steps, or timesteps as 0,250,500 (default: the bundle's)",
    )
    options.add_argument("--device", default="auto", help="auto or cpu (default: auto)")
    options.add_argument(
        "--threads", type=int, default=0, metavar="N", help="CPU threads (default: one a core)"
    )
    return options


def _fill_demo(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "-o",
        "--output",
        default="out",
        metavar="DIR",
        help="where demo.mp4 and demo.png go (default: out)",
    )
    parser.set_defaults(crop=False, absolute_pose=False, smoothing=1.0, tracker="auto", compat=None)


def _fill_run(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("-s", "--source", required=True, metavar="PORTRAIT", help="the face to move, a picture")
    add(
        "-d",
        "--driver",
        required=True,
        metavar="DRIVER",
        help="the motion: a picture, folder, video or landmark track (.npz)",
    )
    add(
        "-o",
        "--output",
        required=True,
        metavar="OUT",
        help="a video (the driver's sound is kept), picture, landmark track, or folder",
    )
    add("--crop", action="store_true", help="the bare face, not pasted into the portrait")
    add("--face", type=int, metavar="N", help="which face of the portrait, from 1, largest first")
    add(
        "--absolute-pose",
        action="store_true",
        help="the driver's head pose as it is, not its change from rest",
    )
    add(
        "--smoothing",
        type=float,
        default=1.0,
        metavar="X",
        help="of the driver's motion: 0 is off, 2 twice as strong (default: 1)",
    )
    kinds = ("auto", "mediapipe", "published")
    add("--tracker", default="auto", choices=kinds, help="auto: the bundle's own where it has one")
    add("--compat", choices=("published",), help="the authors' results, surprises included")


def _fill_import(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("diffusionact", nargs="?", metavar="diffusionact_model.pt", help="DiffusionAct's file")
    add("-o", "--output", required=True, metavar="DIR", help="the folder; one there is added to")
    add("--diffae", metavar="last.ckpt", help="DiffAE's file, for what the first one lacks")
    add("--s3fd", metavar="FILE", help="the face detector's file")
    add("--fan", metavar="FILE", help="the landmark detector's file")
    add("--emoca", metavar="DIR", help="EMOCA_v2_lr_mse_20, the face encoder's folder")
    add("--gaze", metavar="FILE", help="the gaze estimator's file")
    add("--flame", nargs="+", metavar="FILE", help="generic_model.pkl and landmark_embedding.npy")
    add("--network", metavar="NAME", help="its sizes: ffhq256, ffhq128, ffhq64 or a JSON file")


def _fill_export(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "weights",
        metavar="WEIGHTS",
        help="a .safetensors file of training, or the folder that `import` wrote",
    )
    parser.add_argument("-o", "--output", required=True, metavar="BUNDLE", help="the new folder")
    parser.set_defaults(log="info")


def _fill_build(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add(
        "bundle",
        nargs="?",
        default=bundle_path(),
        metavar="BUNDLE",
        help="(default: the shipped one)",
    )
    add(
        "--gpu",
        type=_words,
        default=(),
        metavar="SM,...",
        help="ahead of time, for GPUs such as sm_89,sm_120 (default: the one here)",
    )
    add("--precision", default="fp16", choices=("fp16", "fp32", "int8", "fp8"))
    add("--calibration", type=Path, metavar="DIR", help="of 8 bits: see docs/engines.md")
    add("--library", choices=("tensorrt", "tensorrt_rtx"), help="(default: what is installed)")
    add(
        "--level", type=int, default=3, metavar="N", help="0 is quick, 5 searches long (default: 3)"
    )
    add("--workspace", type=int, default=4096, metavar="MIB", help="scratch (default: 4096)")
    add("--steps", type=_counts, default=(), metavar="N,...", help="(default: the bundle's)")
    add("--force", action="store_true", help="build what is valid again")


def _fill_train(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("recipe", metavar="RECIPE.toml")
    add("--resume", action="store_true", help="go on from the run's last checkpoint")
    add(
        "--finish",
        action="store_true",
        help="write the weights of the run's last checkpoint, and train no further",
    )
    add("-o", "--output", metavar="DIR", help="the run's folder (default: runs/NAME)")
    add("--device", default="auto", choices=("auto", "cpu", "cuda"))
    parser.set_defaults(log="info")


def _fill_check(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "bundle",
        nargs="?",
        default=bundle_path(),
        metavar="BUNDLE",
        help="(default: the shipped one)",
    )


def _steps(text: str) -> int | tuple[int, ...]:
    try:
        numbers = tuple(int(word) for word in text.split(","))
    except ValueError:
        message = f"{text!r}; wanted a count such as 8, or timesteps such as 0,250,500"
        raise argparse.ArgumentTypeError(message) from None
    return numbers[0] if len(numbers) == 1 else numbers


def _words(text: str) -> tuple[str, ...]:
    return tuple(word for word in text.split(",") if word)


def _counts(text: str) -> tuple[int, ...]:
    steps = _steps(text)
    return steps if isinstance(steps, tuple) else (steps,)


def _start_log(arguments: argparse.Namespace) -> None:
    """Send the package's log to stderr, from the level that the variable or the command says."""
    level = os.environ.get(LOG_VARIABLE, "error" if arguments.quiet else arguments.log).lower()
    if level not in LEVELS:
        raise SettingsError(f"{LOG_VARIABLE}={level}; wanted one of {', '.join(LEVELS)}")
    logging.basicConfig(
        format="%(levelname)s: %(message)s", level=logging.WARNING, stream=sys.stderr
    )
    logging.getLogger("diffusionact").setLevel(level.upper())


class _Terminated(BaseException):
    """SIGTERM came; like KeyboardInterrupt, no `except Exception` on the way may swallow it."""


@contextmanager
def _terminable() -> Iterator[None]:
    """Turn SIGTERM into an exception, so that writers remove what they have not finished."""

    def terminate(number: int, frame: object) -> None:
        signal.signal(number, signal.SIG_IGN)  # a second one must not disturb the clean-up
        raise _Terminated

    before = signal.signal(signal.SIGTERM, terminate)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _extra(command: str, extra: str | None = None) -> Iterator[None]:
    """Turn a library that is not installed into a message that names the extra it comes with."""
    try:
        yield
    except ModuleNotFoundError as error:
        if error.name is None or error.name.split(".")[0] == "diffusionact":
            raise
        raise BackendMissing(
            f"`diffusionact {command}` needs {error.name}, which is not installed; "
            f"run: pip install 'diffusionact[{extra or command}]', or `make dev` in a checkout"
        ) from error


def _reenactor(arguments: argparse.Namespace) -> Reenactor:
    from diffusionact.runtime.reenactor import Reenactor, Settings

    settings = Settings(
        steps=arguments.steps,
        threads=arguments.threads,
        paste=not arguments.crop,
        smoothing=arguments.smoothing,
        absolute_pose=arguments.absolute_pose,
        tracker=arguments.tracker,
        compat=arguments.compat,
    )
    return Reenactor.load(arguments.bundle, device=arguments.device, settings=settings)


def _say(arguments: argparse.Namespace, values: Mapping[str, Any], text: str) -> None:
    """Print one result: as JSON, as text, or not at all."""
    if arguments.json:
        print(json.dumps(values, separators=(",", ":"), default=str), flush=True)
    elif not arguments.quiet:
        print(text, flush=True)


def _report(arguments: argparse.Namespace, report: DemoReport | ClipReport, first: str) -> None:
    """Print what was written, how fast, and milliseconds a stage."""
    lines = [f"{first}, in {report.seconds:.1f} s"]
    if report.times:
        lines.append(f"{'ms a frame':<12}{'p50':>9}{'p95':>9}{'p99':>9}")
    lines += [
        f"{stage:<12}{t.p50_ms:>9.1f}{t.p95_ms:>9.1f}{t.p99_ms:>9.1f}"
        for stage, t in report.times.items()
    ]
    _say(arguments, dataclasses.asdict(report), "\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
