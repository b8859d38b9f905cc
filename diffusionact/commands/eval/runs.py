"""The runs of `diffusionact eval`: what is opened, measured, told and kept."""

from __future__ import annotations

import argparse
import json
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from diffusionact import __version__
from diffusionact import manifest as manifest_file
from diffusionact.commands.eval.clips import (
    Plan,
    cross_clips,
    cross_person_clips,
    pair_clips,
    person_clips,
    self_clips,
)
from diffusionact.commands.eval.instruments import (
    photo_instruments,
    picture_instruments,
    rendered_instruments,
)
from diffusionact.commands.eval.methods import (
    METHODS,
    OF_THE_MODEL,
    Models,
    Setup,
    backends_here,
    mean_reading,
    method_of,
)
from diffusionact.commands.eval.people import people
from diffusionact.errors import BackendMissing, SettingsError
from diffusionact.evaluation.columns import FRAME_COLUMNS, text_of
from diffusionact.evaluation.compared import Clip
from diffusionact.evaluation.expression import ExpressionFit
from diffusionact.evaluation.layouts import Footage, footage
from diffusionact.evaluation.measure import Instruments
from diffusionact.evaluation.protocols import random_pairs
from diffusionact.evaluation.rendered import Person
from diffusionact.evaluation.run import run_clips
from diffusionact.morphable import rendered_face
from diffusionact.progress import Progress

if TYPE_CHECKING:
    from diffusionact.runtime.tracker import Tracker

RENDERED = "rendered benchmark"
TOLD = ("psnr", "ssim", "l1", "lpips", "perceptual_rendered", "csim", "nme", "apd", "aed")


@dataclass(frozen=True)
class Planned:
    """One run to make. clips: made anew for each; total: frames, where it is known."""

    name: str
    head: Mapping[str, Any]
    clips: Callable[[], Iterator[Clip]]
    total: int | None


def run_model(arguments: argparse.Namespace) -> None:
    """Measure the model and its yardsticks, one run a configuration."""
    unknown = [name for name in arguments.methods if name not in METHODS]
    if unknown:
        raise SettingsError(f"--methods {unknown[0]}; choose from: {', '.join(METHODS)}")
    setups = _setups(arguments)
    steps = sorted({setup.steps for setup in setups})
    with Models(steps, arguments.device, arguments.threads) as models:
        instruments = _instruments(arguments, models, setups[0])
        planner = _on_footage if arguments.data else _on_people
        _make(arguments, list(planner(arguments, models, setups)), instruments)


def run_pairs(arguments: argparse.Namespace) -> None:
    """Measure what a method left in a folder or a video."""
    from diffusionact.runtime.media import open_reader, read_image

    for place in (arguments.reference, arguments.result):
        if not place.is_dir():
            open_reader(place)  # a missing or unreadable file is told before anything is measured
    source = None if arguments.source is None else partial(read_image, arguments.source)
    if source is not None:
        source()
    if arguments.reader == "judge":
        instruments = rendered_instruments(arguments.networks)
    elif arguments.reader == "none":
        instruments = picture_instruments(arguments.networks, "--reader none")
    else:
        instruments = _tracking(arguments.networks, arguments.tracker)
    head = {
        "protocol": "pairs",
        "data": str(arguments.reference),
        "result": str(arguments.result),
        "source": arguments.source and str(arguments.source),
    }
    clips = partial(pair_clips, arguments.reference, arguments.result, source)
    _make(arguments, [Planned(arguments.result.stem, head, clips, None)], instruments)


def _setups(arguments: argparse.Namespace) -> list[Setup]:
    made = []
    backends = list(backends_here(arguments.backend, arguments.device))
    if not backends:
        raise BackendMissing("--backend all: none can be opened here; run `diffusionact check`")
    for bundle in map(Path, arguments.bundle):
        manifest = manifest_file.read(bundle, verify=False)
        steps = arguments.steps or (manifest.render.steps,)
        for backend, precision in backends:
            for count in steps:
                setup = Setup(bundle, count, backend, precision)
                made.append(setup)
                if arguments.protocol == "steps":
                    made.extend(replace(setup, invert_steps=n) for n in arguments.invert_steps)
                    if arguments.random:
                        made.append(replace(setup, random_x_T=True))
    return made


def _instruments(arguments: argparse.Namespace, models: Models, setup: Setup) -> Instruments:
    rendered = not arguments.data
    if arguments.reader == "none":
        return picture_instruments(arguments.networks, "--reader none")
    if arguments.reader == "judge" or (arguments.reader == "auto" and rendered):
        return rendered_instruments(arguments.networks)
    return photo_instruments(
        arguments.networks, lambda: models.of(setup).act.tracker, f"tracker {arguments.tracker}"
    )


def _tracking(networks: Path | None, kind: str) -> Instruments:
    """A tracker's instruments; where none is installed, those of pictures, and the reason."""
    from diffusionact.runtime.tracker import open_tracker

    if kind == "published":
        raise SettingsError("--tracker published needs a bundle that has it; eval pairs has none")
    try:
        tracker = open_tracker()
    except BackendMissing as missing:
        return picture_instruments(networks, f"no face tracker: {missing}")

    def opened() -> Tracker:
        return tracker

    return photo_instruments(networks, opened, "mediapipe")


def _on_people(
    arguments: argparse.Namespace, models: Models, setups: list[Setup]
) -> Iterator[Planned]:
    """The runs on the rendered benchmark."""
    side = manifest_file.read(setups[0].bundle, verify=False).image_size
    with Progress("render people", quiet=arguments.quiet) as progress:
        crowd = people(arguments.identities, arguments.seed, side, progress)
    data = {"data": RENDERED, "seed": arguments.seed, "identities": len(crowd), "size": side}
    if arguments.protocol == "cross":
        pairs = random_pairs([p.name for p in crowd], arguments.pairs, arguments.pair_seed)
        exact = arguments.landmarks != "detector"
        data |= {"pairs": len(pairs), "pair_seed": arguments.pair_seed}
        data["landmarks"] = "eq8" if exact else "detector"
    else:
        data["large_pose"] = arguments.large_pose
    mean = _mean_face(crowd)
    for name, setup in _cases(arguments, setups):
        method = method_of(name, models, setup, mean[0])
        if arguments.protocol == "cross":
            clips = partial(cross_person_clips, crowd, pairs, method, exact)
            total = len(pairs)
        else:
            found = mean[1] if name == "mean" else None
            clips = partial(person_clips, crowd, method, found, arguments.large_pose)
            total = len(crowd)
        yield Planned(_run_name(name, setup, setups), _head(arguments, data, name, setup), clips,
                      total)  # fmt: skip


def _on_footage(
    arguments: argparse.Namespace, models: Models, setups: list[Setup]
) -> Iterator[Planned]:
    """The runs on the user's clips."""
    found = _footage(arguments)
    cross = arguments.protocol == "cross"
    retarget = arguments.landmarks == "eq8" or (arguments.landmarks == "auto" and cross)
    plan = Plan(arguments.frames, retarget, arguments.large_pose)
    data: dict[str, Any] = {
        "data": [str(path) for path in arguments.data],
        "clips": [each.name for each in found],
        "frames": arguments.frames,
        "large_pose": arguments.large_pose,
        "landmarks": "eq8" if retarget else "detector",
    }
    pairs = []
    if cross:
        pairs = random_pairs([e.identity for e in found], arguments.pairs, arguments.pair_seed)
        data |= {"pairs": len(pairs), "pair_seed": arguments.pair_seed}
    for name, setup in _cases(arguments, setups):
        if name == "mean":
            raise SettingsError("the mean face is of the rendered benchmark; leave it out")
        method = method_of(name, models, setup)

        def clips(setup: Setup = setup, method: Any = method) -> Iterator[Clip]:
            act = models.of(setup).act
            if cross:
                return cross_clips(act, found, pairs, method, plan)
            return self_clips(act, found, method, plan)

        head = _head(arguments, data, name, setup)
        yield Planned(_run_name(name, setup, setups), head, clips, None)


def _footage(arguments: argparse.Namespace) -> list[Footage]:
    found = [
        each for path in arguments.data for each in footage(path, arguments.layout, arguments.split)
    ]
    if arguments.identities is None:
        return found
    kept = list(dict.fromkeys(each.identity for each in found))[: arguments.identities]
    return [each for each in found if each.identity in kept]


def _cases(arguments: argparse.Namespace, setups: list[Setup]) -> Iterator[tuple[str, Setup]]:
    """Every method with every configuration that makes a difference to it."""
    for setup in setups:
        yield from ((name, setup) for name in arguments.methods if name in OF_THE_MODEL)
    yield from ((name, setups[0]) for name in arguments.methods if name not in OF_THE_MODEL)


def _run_name(method: str, setup: Setup, setups: list[Setup]) -> str:
    """The name of a run's folder: what differs between the runs, and no more than is needed."""
    if method not in OF_THE_MODEL:
        return method
    bundles = {each.bundle for each in setups}
    stems = {bundle.stem for bundle in bundles}
    of_bundle = setup.bundle.stem
    if len(stems) < len(bundles):  # a/face.bundle and b/face.bundle
        of_bundle = f"{setup.bundle.absolute().parent.name}.{of_bundle}"
    return "-".join([method, *([of_bundle] if len(bundles) > 1 else []), setup.name])


def _head(
    arguments: argparse.Namespace, data: Mapping[str, Any], method: str, setup: Setup
) -> dict[str, Any]:
    head = {"version": __version__, "protocol": arguments.protocol, **data, "method": method}
    if method in OF_THE_MODEL:
        manifest = manifest_file.read(setup.bundle, verify=False)
        head |= {
            "bundle": manifest.name,
            "weights_sha256": manifest.weights_sha256,
            "steps": setup.steps,
            "invert_steps": setup.invert_steps or manifest.invert.steps,
            "x_T": "random" if setup.random_x_T else "inverted",
            "backend": setup.backend,
            "precision": setup.precision,
        }
        if setup.random_x_T:
            head["invert_steps"] = None
    return head


@cache
def _fit() -> ExpressionFit:
    return ExpressionFit(rendered_face())


def _mean_face(crowd: list[Person]) -> tuple[Any, Any]:
    """The mean picture of the sources, and the mean of what they show."""
    picture = np.mean([person.source.image for person in crowd], axis=0)
    return np.rint(picture).astype(np.uint8), mean_reading(
        [person.source.reading(_fit()) for person in crowd]
    )


def _check_names(planned: list[Planned]) -> None:
    names = [plan.name for plan in planned]
    if twice := sorted({name for name in names if names.count(name) > 1}):
        raise SettingsError(f"two runs would both be {twice[0]}; give each configuration once")


def _make(arguments: argparse.Namespace, planned: list[Planned], instruments: Instruments) -> None:
    """Make the runs, tell their lines, keep them, and write the page."""
    _check_names(planned)
    many = len(planned) > 1
    summaries = {}
    for plan in planned:
        folder = None if arguments.output is None else arguments.output / plan.name
        tell = partial(_tell, arguments, plan.name if many else None)
        with Progress(plan.name, quiet=arguments.quiet) as progress:
            summaries[plan.name] = run_clips(
                plan.clips(), instruments, plan.head, folder=folder, tell=tell,
                progress=progress, total=plan.total, pictures=arguments.pictures,
            )  # fmt: skip
    if arguments.output is not None:
        from diffusionact.evaluation.report import write_report

        write_report(arguments.output / "report.html", [arguments.output])
    if not arguments.json and not arguments.quiet:
        print(table(summaries))
        if arguments.output is not None:
            print(f"wrote {arguments.output / 'report.html'}")
    elif arguments.json and many:
        first = next(iter(summaries.values()))
        _print({**first, "run": planned[0].name, "runs": summaries})


def _tell(arguments: argparse.Namespace, run: str | None, row: Mapping[str, Any]) -> None:
    if arguments.json:
        named = row if run is None else {"run": run, **row}
        _print(named)
    elif row.get("damage") and not arguments.quiet:
        print(f"{row['clip']}, frame {row['frame']}: {row['damage']}", file=sys.stderr)
    elif "unusable" in row and not arguments.quiet:
        print(f"{row['clip']}: not measured: {row['unusable']}", file=sys.stderr)


def _print(values: Mapping[str, Any]) -> None:
    print(json.dumps(values, separators=(",", ":"), allow_nan=False), flush=True)


def table(summaries: Mapping[str, Mapping[str, Any]]) -> str:
    """Return the summaries side by side as text, with all that was counted."""
    shown = [name for name in TOLD if any(s.get(name) is not None for s in summaries.values())]
    width = max((len(name) for name in summaries), default=0) + 2
    titles = [FRAME_COLUMNS[name].title for name in shown]
    lines = [" " * width + "".join(f"{title:>{max(len(title), 7) + 2}}" for title in titles)]
    for name, summary in summaries.items():
        cells = "".join(
            f"{text_of(key, summary.get(key)):>{max(len(title), 7) + 2}}"
            for key, title in zip(shown, titles, strict=True)
        )
        lines.append(f"{name:<{width}}{cells}")
    for name, summary in summaries.items():
        counts = [f"{summary['frames']} frames, {summary['compared']} compared"]
        counted = ("missing", "extra", "unreadable_result", "unreadable_reference", "resized",
                   "no_face", "no_face_reference", "unusable_clips")  # fmt: skip
        counts += [f"{key.replace('_', ' ')} {summary[key]}" for key in counted if summary[key]]
        lines.append(f"{name}: {', '.join(counts)}")
    return "\n".join(lines)
