"""What `diffusionact eval` measures with: trackers, the judge, the user's metric networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from diffusionact.assets import judge_path
from diffusionact.errors import NoFace
from diffusionact.evaluation.expression import ExpressionFit
from diffusionact.evaluation.judge import Float32Array, Network, RenderedJudge, judge_tensors
from diffusionact.evaluation.measure import Instruments
from diffusionact.evaluation.networks import (
    described,
    embedder_of,
    find_networks,
    lpips_of,
)
from diffusionact.evaluation.reading import Reading
from diffusionact.manifest import TensorSpec, file_sha256

if TYPE_CHECKING:
    from diffusionact.evaluation.compared import Image
    from diffusionact.landmarks import Landmarks
    from diffusionact.runtime.tracker import Tracker

NO_NETWORK = "no {} in the folder of --networks; docs/evaluation.md says how to make it"
OF_IDENTITY = ("csim", "tl_id", "tg_id", "tl_id_ratio", "tg_id_ratio")


def open_network(
    path: Path, inputs: Mapping[str, TensorSpec], outputs: Mapping[str, TensorSpec]
) -> Network:
    """Return a network on the CPU as a function of arrays. Raises: BundleError."""
    from diffusionact.runtime import ort

    component = ort.open_model(path, inputs, outputs, device="cpu", threads=0, precision="fp32")
    held = {
        name: np.zeros([int(size) for size in spec.shape], np.float32)
        for name, spec in {**inputs, **outputs}.items()
    }
    component.bind(**held)

    def run(arrays: Mapping[str, Float32Array]) -> Mapping[str, Float32Array]:
        for name, array in arrays.items():
            np.copyto(held[name], array)
        component.run()
        return {name: held[name].copy() for name in outputs}

    return run


def published_networks(folder: Path | None) -> Instruments:
    """Return LPIPS and ArcFace from a folder, and the reasons for those that are not there.

    Raises: MediaError, BundleError.
    """
    found = {} if folder is None else find_networks(folder)
    opened = {
        name: open_network(folder / each.file, *each.tensors)
        for name, each in found.items()
        if folder is not None
    }
    absent = {} if "lpips" in found else {"lpips": NO_NETWORK.format("lpips.onnx")}
    if "arcface" not in found:
        absent |= dict.fromkeys(OF_IDENTITY, NO_NETWORK.format("arcface.onnx"))
    return Instruments(
        lpips=lpips_of(found["lpips"], opened["lpips"]) if "lpips" in found else None,
        embed=embedder_of(found["arcface"], opened["arcface"]) if "arcface" in found else None,
        absent=absent,
        described=described(found),
    )


def rendered_instruments(folder: Path | None) -> Instruments:
    """Return what measures rendered faces: the judge that ships, and what the folder has."""
    from diffusionact.morphable import rendered_face

    judge = _judge()
    fit = ExpressionFit(rendered_face())

    def read(image: Image) -> Reading:
        seen = judge.read(image)
        return replace(seen, expression=fit(seen.points))

    made = published_networks(folder)
    return replace(
        made,
        read=read,
        perceptual=judge.distance,
        described={
            **made.described,
            "reader": f"the judge of rendered faces, sha256 {file_sha256(judge_path())}",
            "aed": "coefficients of our face model, fitted to the judge's landmarks",
        },
    )


def photo_instruments(
    folder: Path | None, tracker: Callable[[], Tracker], name: str
) -> Instruments:
    """Return what measures pictures of people: a tracker, and what the folder has.

    tracker: opened at the first picture; name: what it is, for the head of the run.
    """
    from diffusionact.morphable import angles, rendered_face
    from diffusionact.runtime.headpose import take_apart

    face = rendered_face()
    mean = np.asarray(face.landmarks(face.template), np.float64)
    fit = ExpressionFit(face)

    def read(image: Image) -> Reading | None:
        try:
            found = tracker().detect(image)
        except NoFace:
            return None
        return reading(found[0]) if found else None

    def reading(seen: Landmarks) -> Reading:
        points = np.asarray(seen.points[:, :2], np.float64)
        pose = np.asarray(angles(take_apart(seen, mean).rotation), np.float64)
        return Reading(points, np.asarray(seen.gaze, np.float64), pose, fit(points))

    made = published_networks(folder)
    absent = {"perceptual_rendered": "reads rendered faces only", "psnr_face": "no true mask"}
    return replace(
        made,
        read=read,
        absent={**made.absent, **absent},
        described={
            **made.described,
            "reader": name,
            "apd": "angles of the rigid fit of our mean face to the tracker's landmarks",
            "aed": "coefficients of our face model, fitted to the tracker's landmarks",
        },
    )


def picture_instruments(folder: Path | None, why: str) -> Instruments:
    """Return what measures pictures where no face can be read; why: the reason."""
    made = published_networks(folder)
    names = ("nme", "gaze_px", "apd", "aed", "jitter", "jitter_real", *OF_IDENTITY)
    absent = {**dict.fromkeys(names, why), "psnr_face": "no true mask"}
    absent["perceptual_rendered"] = "reads rendered faces only"
    return replace(made, embed=None, absent={**made.absent, **absent})


def _judge() -> RenderedJudge:
    inputs, outputs = judge_tensors()
    specs = [{spec.name: spec for spec in side} for side in (inputs, outputs)]
    return RenderedJudge(open_network(judge_path(), *specs))
