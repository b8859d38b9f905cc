"""`diffusionact eval`: the paper's measures and protocols."""

from __future__ import annotations

import argparse
from pathlib import Path

from diffusionact.assets import bundle_path
from diffusionact.commands.exits import DONE, FAILED
from diffusionact.commands.model import counts, words
from diffusionact.commands.output import talk_options

HELP = "Measure: self or cross-subject reenactment, folders of frames, steps; compare, report."

CROSS_PAIRS, LARGE_POSE_DEG = 35, 15.0


def options(parser: argparse.ArgumentParser) -> None:
    protocols = parser.add_subparsers(title="protocols", metavar="PROTOCOL", required=True)

    def add(name: str, text: str, *parents: argparse.ArgumentParser) -> argparse.ArgumentParser:
        talk = talk_options()
        for action in talk._actions:
            action.default = argparse.SUPPRESS  # `eval --json self` says the same as `self --json`
        made = protocols.add_parser(name, parents=[talk, *parents], help=text, description=text)
        made.set_defaults(protocol=name)
        return made

    measuring, model, data = _measuring(), _model(), _data()
    made = add("self", "A first frame, moved by the rest of its own clip.", measuring, model, data)
    made = add("cross", "Pairs of people at random: one's face, the other's motion.", measuring,
               model, data)  # fmt: skip
    made.add_argument(
        "--pairs", type=int, default=CROSS_PAIRS, metavar="N", help=f"(default: {CROSS_PAIRS})"
    )
    made.add_argument("--pair-seed", type=int, default=0, metavar="N", help="(default: 0)")
    made = add("steps", "Step ablation: render steps, steps of x_T, and random x_T.", measuring,
               model, data)  # fmt: skip
    made.add_argument(
        "--invert-steps", type=counts, default=(), metavar="N,N", help="of x_T (default: bundle's)"
    )
    made.add_argument("--random", action="store_true", help="also with a random x_T")
    _pairs(add("pairs", "Frames of a method (B) against the true ones (A).", measuring))
    _compare(add("compare", "What changed between two runs, and whether it is noise."))
    _report(add("report", "One page, with tables, distributions and worst cases, of runs."))
    _study(add("study", "One page of blind pairs to choose from; --count for the choices."))
    _time(add("time", "Seconds for 20 and for 200 frames, all included; as a live user feels it."))


def run(arguments: argparse.Namespace) -> int:
    """Measure, compare or report."""
    if arguments.protocol in ("self", "cross", "steps", "pairs"):
        from diffusionact.commands.eval import runs

        made = runs.run_pairs if arguments.protocol == "pairs" else runs.run_model
        made(arguments)
        return DONE
    if arguments.protocol == "time":
        from diffusionact.commands.eval import time

        time.run_time(arguments)
        return DONE
    from diffusionact.commands.eval import reports

    if arguments.protocol == "compare":
        return FAILED if reports.compare(arguments) and arguments.fail else DONE
    {"report": reports.report, "study": reports.study}[arguments.protocol](arguments)
    return DONE


def _measuring() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(add_help=False)
    made.add_argument(
        "-o", "--output", type=Path, metavar="DIR",
        help="keep the run: it can be resumed, compared and reported (a page is written too)",
    )  # fmt: skip
    made.add_argument(
        "--pictures", action="store_true", help="with -o: keep every result as a picture"
    )
    made.add_argument("--networks", type=Path, metavar="DIR", help="with lpips.onnx, arcface.onnx")
    made.add_argument(
        "--reader", choices=("auto", "judge", "tracker", "none"), default="auto",
        help="of faces: the judge reads rendered ones, the tracker photos (default: auto)",
    )  # fmt: skip
    kinds = ("auto", "mediapipe", "published")
    made.add_argument("--tracker", default="auto", choices=kinds, help="(default: auto)")
    return made


def _model() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(add_help=False)
    add = made.add_argument
    add("--bundle", type=words, default=(str(bundle_path()),), metavar="DIR,DIR",
        help="models, such as those of training ablations (default: the shipped one)")  # fmt: skip
    add("--steps", type=counts, default=None, metavar="N,N", help="(default: the bundle's)")
    add("--methods", type=words, default=("ours",), metavar="NAME,NAME",
        help="ours, and the yardsticks copy, oracle, mean and true (default: ours)")  # fmt: skip
    add("--backend", type=words, default=("auto",), metavar="NAME,NAME",
        help="auto, NAME, NAME:PRECISION, or all that are here (default: auto)")  # fmt: skip
    add("--device", default="auto", help="auto or cpu (default: auto)")
    add("--threads", type=int, default=0, metavar="N", help="CPU threads (default: one a core)")
    return made


def _data() -> argparse.ArgumentParser:
    made = argparse.ArgumentParser(add_help=False)
    add = made.add_argument
    add("data", nargs="*", type=Path, metavar="DATA",
        help="clips or data sets; none: the rendered benchmark")  # fmt: skip
    add("--layout", default="auto", help="of the data (default: auto; docs/evaluation.md)")
    add("--split", type=Path, metavar="FILE", help="names of the clips to take, one a line")
    add("--identities", type=int, metavar="N", help="people, of the benchmark or of the data")
    add("--seed", type=int, default=2026, metavar="N", help="of the benchmark (default: 2026)")
    add("--frames", type=int, metavar="N", help="of each clip at most")
    add("--landmarks", choices=("auto", "eq8", "detector"), default="auto",
        help="auto: detector on one's own clip, Eq. 8 across people")  # fmt: skip
    add("--large-pose", nargs="?", type=float, const=LARGE_POSE_DEG, default=0.0, metavar="DEG",
        help=f"only heads more than DEG apart (default: {LARGE_POSE_DEG:.0f})")  # fmt: skip
    return made


def _pairs(parser: argparse.ArgumentParser) -> None:
    place = "a folder of pictures, a video, a picture, or a folder of these, one a clip"
    parser.add_argument("reference", type=Path, metavar="A", help=f"the true frames: {place}")
    parser.add_argument("result", type=Path, metavar="B", help="what a method made of them")
    parser.add_argument(
        "--source", type=Path, metavar="PICTURE", help="whose identity B should have (CSIM)"
    )


def _compare(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("a", type=Path, metavar="A", help="a run, or its JSON lines")
    parser.add_argument("b", type=Path, metavar="B", help="another, of the same frames")
    parser.add_argument(
        "--fail", action="store_true", help="exit with status 1 when B is worse in any measure"
    )


def _report(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "runs", nargs="+", type=Path, metavar="RUN", help="runs, or folders of them"
    )
    parser.add_argument("-o", "--output", type=Path, default=Path("report.html"), metavar="FILE")
    parser.add_argument(
        "--published", type=Path, metavar="FILE", help="rows of papers, to stand beside ours"
    )


def _study(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("methods", nargs="*", metavar="NAME=DIR", help="results by method, named alike in each")
    add("--source", type=Path, metavar="DIR", help="source pictures, named as the results")
    add("--driver", type=Path, metavar="DIR", help="target pictures, named as the results")
    add("-o", "--output", type=Path, default=Path("study.html"), metavar="FILE")
    add("--questions", type=int, default=20, metavar="N", help="(default: 20)")
    add("--seed", type=int, default=0, metavar="N", help="of what is shown where (default: 0)")
    add("--count", nargs="+", type=Path, default=(), metavar="FILE", help="saved choices to count")


def _time(parser: argparse.ArgumentParser) -> None:
    add = parser.add_argument
    add("--bundle", default=str(bundle_path()), metavar="DIR", help="(default: the shipped one)")
    add("--steps", type=counts, default=None, metavar="N,N", help="(default: the bundle's)")
    add("--backend", type=words, default=("auto",), metavar="NAME,NAME",
        help="auto, NAME, NAME:PRECISION, or all that are here (default: auto)")  # fmt: skip
    add("--device", default="auto", help="auto or cpu (default: auto)")
    add("--threads", type=int, default=0, metavar="N", help="CPU threads (default: one a core)")
    add("--frames", type=counts, default=(20, 200), metavar="N,N", help="(default: 20,200)")
    add("--live-seconds", type=float, default=10.0, metavar="S", help="0: none (default: 10)")
