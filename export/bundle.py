"""Weights to a bundle: the folder that the runtime opens."""

from __future__ import annotations

import json
import logging
import os
import shutil
import uuid
from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, cast

from torch import nn

from diffusionact import manifest as manifest_file
from diffusionact import schedule
from diffusionact.condition import Drawing
from diffusionact.errors import BundleError
from diffusionact.export import parity, to_onnx, wrap
from diffusionact.manifest import (
    AssetSpec,
    ComponentSpec,
    Crop,
    Manifest,
    Sampling,
    Schedule,
    TensorSpec,
    Training,
)
from diffusionact.morphable import load_flame
from diffusionact.training import weights as weights_file
from diffusionact.training import weights_folder
from diffusionact.training.models import ReenactmentEncoder, UNet
from diffusionact.training.models.frozen import NETWORKS

log = logging.getLogger(__name__)

PARITY_FILE = "parity.json"


@dataclass(frozen=True)
class Card:
    """What the manifest says that the weights do not: how to run the network, and its terms."""

    name: str = "face128"
    # At high noise z decides; steps at low noise sharpen what the source left in x_T.
    render: Sampling = Sampling(4, (2, 4, 8, 10, 20), {"4": (300, 550, 800, 980)})
    invert: Sampling = Sampling(20, (10, 20, 50))
    crop: Crop = Crop(rotate=False, scale=1.07)  # the frame that training/faces.py renders
    drawing: Drawing = Drawing(thickness_px=1, disc_radius_px=1.5, antialias=True)
    training: Training = Training(
        data="faces rendered by diffusionact's own face model",
        licence="MIT",
        domain="rendered faces",
        pose_range_deg={"yaw": (-45.0, 45.0), "pitch": (-25.0, 25.0), "roll": (-25.0, 25.0)},
    )
    licence: str = "MIT"
    student_of: str | None = None


FACE128_CARD = Card()
# Source: DiffusionAct code, how its authors run their network.
PUBLISHED_CARD = Card(
    name="diffusionact",
    render=Sampling(20, (10, 20, 50)),
    invert=Sampling(50, (20, 50, 100)),
    crop=Crop(rotate=True),
    drawing=Drawing(),
    training=Training(
        data="VoxCeleb1 (DiffusionAct), after FFHQ (DiffAE)",
        licence="faces of VoxCeleb and FFHQ: research only",
        domain="photographs of faces",
    ),
    licence="",
)


@dataclass(frozen=True)
class _Content:
    """What goes into a bundle.

    tracker: the networks of the published tracker that there are; flame: its face model's file.
    """

    weights: weights_file.Weights
    sha256: str
    card: Card
    tracker: Mapping[str, nn.Module]
    flame: Path | None = None


def export_bundle(weights_path: Path, out_dir: Path, card: Card | None = None) -> Manifest:
    """The manifest of the bundle, which is in `out_dir` when this returns, whole or not at all.

    A bundle that is there already is replaced.

    Args:
        weights_path: a file of training, or the folder that `diffusionact import` wrote.
        card: None takes that of the shipped network for a file, the published one for a folder.

    Raises:
        SettingsError: the weights are missing, damaged, changed since their import, or lack a part.
        BundleError: `out_dir` is something else than a bundle, or ONNX Runtime's answers are too
            far from PyTorch's.
    """
    content = _content(weights_path, card)
    _check_free(out_dir)
    weights = content.weights
    encoder = cast(ReenactmentEncoder, weights.network("reenactment"))
    render = cast(UNet, weights.network("render"))
    invert = cast(UNet, weights.network("invert")) if "invert" in weights.parts else None
    modules = wrap.components(encoder, render, invert)
    bare = _bare_manifest(weights, render, content.sha256, content.card)
    out_dir.parent.mkdir(parents=True, exist_ok=True)
    folder = out_dir.with_name(f".part-{out_dir.name}-{uuid.uuid4().hex[:8]}")
    try:
        folder.mkdir()
        manifest = _write_components(folder, bare, modules, content.tracker)
        manifest = replace(manifest, assets=_write_assets(folder, content.flame))
        rows = parity.measure(folder, manifest, {**modules, **content.tracker})
        _write_parity(folder, rows)
        manifest_file.write(folder, manifest)
        _put_in_place(folder, out_dir)
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    return manifest


def _content(path: Path, card: Card | None) -> _Content:
    """What a weights file, or a folder of an import, has for a bundle."""
    if not path.is_dir():
        weights = weights_file.load(path)
        card = _of_student(card or _card_of(weights), weights.student)
        return _Content(weights, manifest_file.file_sha256(path), card, {})
    record = weights_folder.checked_record(path)
    weights = weights_file.load(path / weights_folder.MODEL_FILE)
    if card is None:
        terms = {entry["title"]: entry["licence"] for entry in record.files.values()}
        licence = "; ".join(f"{title}: {licence}" for title, licence in terms.items())
        name = f"{PUBLISHED_CARD.name}{weights.config.image_size}"
        card = replace(PUBLISHED_CARD, name=name, licence=licence)
    tracker = {
        name: network for name in NETWORKS if (network := weights_folder.load_helper(path, name))
    }
    flame = path / weights_folder.FLAME_FILE
    digest = record.outputs[weights_folder.MODEL_FILE]
    return _Content(weights, digest, card, tracker, flame if flame.is_file() else None)


def _card_of(weights: weights_file.Weights) -> Card:
    """The card of our own training: for rendered faces the shipped one, for prepared clips with
    the crop and the drawing that they were prepared with."""
    known = weights.provenance
    if not {"crop", "drawing"} <= known.keys():
        return FACE128_CARD
    like = FACE128_CARD if weights.config.prediction == "x0" else PUBLISHED_CARD
    training = Training(
        data=str(known.get("data", "")),
        licence="that of the clips that it was trained on",
        domain=PUBLISHED_CARD.training.domain,
    )
    return replace(
        like,
        name=str(known.get("recipe", like.name)),
        crop=Crop(**known["crop"]),
        drawing=Drawing(**known["drawing"]),
        training=training,
        licence="",
    )


def _of_student(card: Card, student: weights_file.Student | None) -> Card:
    """The card with a student's own counts of steps."""
    if student is None:
        return card
    return replace(card, render=student.render, invert=student.invert, student_of=student.of)


def _bare_manifest(
    weights: weights_file.Weights, unet: UNet, weights_sha256: str, card: Card
) -> Manifest:
    """The manifest without its components."""
    return Manifest(
        name=card.name,
        image_size=weights.config.image_size,
        z_size=weights.config.embed,
        modulation_size=unet.modulation_size,
        time_row_size=2 * unet.modulation_size,
        prediction=weights.config.prediction,
        schedule=Schedule(),
        render=card.render,
        invert=_with_timesteps(card, weights.config.prediction),
        crop=card.crop,
        drawing=card.drawing,
        landmark_layout="ibug68+gaze2",
        training=replace(card.training, provenance=_flat(weights.provenance)),
        licence=card.licence,
        weights_sha256=weights_sha256,
        components={},
        student_of=card.student_of,
        network=_sizes(weights),
    )


def _sizes(weights: weights_file.Weights) -> dict[str, Any]:
    values = weights.config.to_dict().items()
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values}


def _with_timesteps(card: Card, kind: schedule.Prediction) -> Sampling:
    """How to invert, with the timesteps of all counts that do not take a constant stride."""
    invert = card.invert
    if kind != "x0" or card.student_of:  # a student says its own
        return invert
    counts = {*invert.counts, parity.INVERT_STEPS}
    made = {str(n): tuple(schedule.inversion_timesteps(kind, n).tolist()) for n in sorted(counts)}
    return replace(invert, timesteps={**made, **invert.timesteps})


def _flat(provenance: Mapping[str, Any]) -> dict[str, str | int | float]:
    return {k: v if type(v) in (str, int, float) else json.dumps(v) for k, v in provenance.items()}


def _write_components(
    folder: Path,
    bare: Manifest,
    modules: Mapping[str, nn.Module],
    tracker: Mapping[str, nn.Module],
) -> Manifest:
    """The manifest with the components and the tracker's, whose files are in the folder."""
    tensors = manifest_file.component_tensors(bare)
    components = {
        name: _write_component(folder, name, module, *tensors[name.removesuffix("_invert")])
        for name, module in modules.items()
    }
    tensors = manifest_file.tracker_tensors()
    found = {
        name: _write_component(folder, name, module, *tensors[name])
        for name, module in tracker.items()
    }
    return replace(bare, components=components, tracker=found)


def _write_component(
    folder: Path,
    name: str,
    module: nn.Module,
    inputs: tuple[TensorSpec, ...],
    outputs: tuple[TensorSpec, ...],
) -> ComponentSpec:
    path = folder / f"{name}.onnx"
    to_onnx.export(module, inputs, outputs, path)
    log.info("%s: %.1f MB", path.name, path.stat().st_size / 1e6)
    return ComponentSpec(path.name, manifest_file.file_sha256(path), inputs, outputs)


def _write_assets(folder: Path, flame: Path | None) -> dict[str, AssetSpec]:
    """The bundle's files that are no networks, by name; they are in the folder.

    Raises:
        BundleError: the face model is damaged.
    """
    if flame is None:
        return {}
    load_flame(flame)
    path = folder / weights_folder.FLAME_FILE
    shutil.copyfile(flame, path)
    return {"flame": AssetSpec(path.name, manifest_file.file_sha256(path))}


def _write_parity(folder: Path, rows: tuple[parity.Row, ...]) -> None:
    """Nothing; writes the table that the bundle passed.

    Raises:
        BundleError: a row did not pass.
    """
    log.info("%s", parity.table(rows))
    if not all(row.passed for row in rows):
        raise BundleError(
            "the exported graphs do not answer as the weights do; no bundle was written.\n"
            f"{parity.table(rows)}\nTry other versions than {parity.VERSIONS}"
        )
    content = {"versions": parity.VERSIONS, "rows": [asdict(row) for row in rows]}
    (folder / PARITY_FILE).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def _check_free(out_dir: Path) -> None:
    if not out_dir.exists() or (out_dir / manifest_file.FILE_NAME).is_file():
        return
    if not out_dir.is_dir() or any(out_dir.iterdir()):
        raise BundleError(f"{out_dir} is there and is no bundle; give another -o, or remove it")


def _put_in_place(folder: Path, out_dir: Path) -> None:
    """Nothing; `folder` is now `out_dir`, and what was there before is gone."""
    if not out_dir.exists():
        os.replace(folder, out_dir)
        return
    old = folder.with_name(folder.name + "-old")
    os.replace(out_dir, old)
    os.replace(folder, out_dir)
    shutil.rmtree(old)
