"""Published checkpoints to a folder of weights: `diffusionact import`."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from numpy.typing import NDArray
from torch import Tensor

from diffusionact.errors import SettingsError
from diffusionact.manifest import file_sha256
from diffusionact.training import published, weights, weights_folder
from diffusionact.training.models import NetworkConfig
from diffusionact.training.models.frozen import NETWORKS, Emoca, FrozenNetwork, flame
from diffusionact.training.origins import MODEL, ORIGINS, TRACKER
from diffusionact.training.tensor_table import Count, Findings, group, unwrapped

HELPERS = ("s3fd", "fan", "emoca", "gaze")


@dataclass(frozen=True)
class Request:
    """The files that are given, and the sizes of the diffusion model where they are known.

    emoca: the folder EMOCA_v2_lr_mse_20, or a checkpoint of it; flame: the model's file, then
    that of its landmarks.
    """

    diffusionact: Path | None = None
    diffae: Path | None = None
    s3fd: Path | None = None
    fan: Path | None = None
    emoca: Path | None = None
    gaze: Path | None = None
    flame: tuple[Path, ...] = ()
    network: NetworkConfig | None = None


@dataclass(frozen=True)
class Imported:
    """What one published file was found to be."""

    kind: str  # of origins.ORIGINS
    names: tuple[str, ...]
    sha256: tuple[str, ...]
    counts: tuple[Count, ...]
    warnings: tuple[str, ...] = ()

    def lines(self) -> list[str]:
        """What the file is, what is in it and what is odd about it, as text."""
        origin, names = ORIGINS[self.kind], " + ".join(self.names)
        said = [f"{names}: {origin.title}; from {origin.url}; licence: {origin.licence}"]
        for count in self.counts:
            wanted = "not used" if count.wanted is None else f"of {count.wanted}"
            said.append(f"  {count.found:5} {wanted:>9}  {count.what}")
        return said + [f"  warning: {text}" for text in self.warnings]

    def record(self) -> dict[str, Any]:
        """The entry of import.json."""
        origin = ORIGINS[self.kind]
        known = {"title": origin.title, "origin": origin.url, "licence": origin.licence}
        return {**known, **asdict(self)}


@dataclass(frozen=True)
class Report:
    """What an import did.

    missing: name of `origins.ORIGINS` -> what it is, where it is published, under which licence.
    """

    folder: Path
    network: NetworkConfig | None
    imported: tuple[Imported, ...]
    missing: Mapping[str, str] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """The report as text."""
        said = [line for entry in self.imported for line in entry.lines()]
        said += [f"still missing: {text}" for text in self.missing.values()]
        kinds = self.missing.keys()
        use = "`diffusionact export` makes a bundle of it"
        if set(kinds) & set(MODEL):
            use = "without the diffusion model it makes no bundle yet"
            if any(entry.kind == "diffae" for entry in self.imported):
                use += "; training begins from it: start in a recipe"
        elif kinds:
            use += ", without the published tracker's missing parts"
        return [*said, f"wrote {self.folder}; {use}"]


def import_published(request: Request, out_dir: Path) -> Report:
    """What was imported into `out_dir` and what is still missing there.

    All files are read and checked before anything is written. A folder of an earlier import keeps
    what this one does not give.

    Raises:
        SettingsError: a file is not what it should be, or `out_dir` is something else.
    """
    record = _record_of(out_dir)
    imported: list[Imported] = []
    model = _model(request, imported, record)
    helpers = {
        name: _helper(name, path, imported)
        for name in HELPERS
        if (path := getattr(request, name)) is not None
    }
    face = _flame(request, imported)
    if not imported:
        raise SettingsError(
            "no file to import; wanted diffusionact_model.pt, or one of "
            + ", ".join(ORIGINS[kind].option for kind in TRACKER)
        )
    out_dir.mkdir(parents=True, exist_ok=True)
    written = [_save_model(out_dir, model, imported)] if model else []
    digests = {entry.kind: entry.sha256[-1] for entry in imported}
    written += [
        weights_folder.save_helper(out_dir, network, digests[name])
        for name, network in helpers.items()
    ]
    written += [weights_folder.save_flame(out_dir, face)] if face else []
    kept = {k: v for k, v in record.files.items() if not (model and k == "diffae")}
    files = {**kept, **{entry.kind: entry.record() for entry in imported}}
    outputs = {**record.outputs, **{path.name: file_sha256(path) for path in written}}
    missing = _missing(files)
    weights_folder.write_record(out_dir, replace(record, files=files, outputs=outputs), missing)
    return Report(out_dir, model.config if model else None, tuple(imported), missing)


def _record_of(out_dir: Path) -> weights_folder.Record:
    if out_dir.exists() and not out_dir.is_dir():
        raise SettingsError(f"{out_dir}: is a file; wanted a folder for the weights: another -o")
    if out_dir.is_dir() and any(out_dir.iterdir()):
        if not (out_dir / weights_folder.RECORD_FILE).is_file():
            raise SettingsError(
                f"{out_dir}: is there and holds no import; give another -o, or remove it"
            )
    return weights_folder.read_record(out_dir)


def _model(
    request: Request, imported: list[Imported], record: weights_folder.Record
) -> published.Published | None:
    if request.diffusionact is not None:
        found = published.read(request.diffusionact, request.diffae, request.network)
    elif request.diffae is None:
        return None
    elif "diffusionact" in record.files:
        raise SettingsError(
            "--diffae alone: the folder holds the weights of diffusionact_model.pt, which this file "
            "completes: give both again, or another -o. " + ORIGINS["diffusionact"].told()
        )
    else:
        found = published.read_autoencoder(request.diffae, request.network)
    imported += [_entry(findings, (findings.path,)) for findings in found.findings]
    return found


def _save_model(out_dir: Path, model: published.Published, imported: list[Imported]) -> Path:
    path = out_dir / weights_folder.MODEL_FILE
    sources = {e.kind: e.sha256[0] for e in imported if e.kind in ("diffusionact", "diffae")}
    provenance = {
        "made_by": "diffusionact import",
        **{f"{kind}_sha256": digest for kind, digest in sources.items()},
        "licence": "; ".join(f"{ORIGINS[k].title}: {ORIGINS[k].licence}" for k in sources),
    }
    weights.save_tensors(
        path, model.config, model.parts, provenance=provenance, dtype=torch.float32
    )
    return path


def _helper(name: str, path: Path, imported: list[Imported]) -> FrozenNetwork:
    """One network of the tracker, out of its published file."""
    files, cfg_yaml = emoca_files(path) if name == "emoca" else ((path,), "")
    findings = Findings(files[-1], name)
    content = published.content_of(findings)
    inside = {"emoca": "state_dict", "gaze": "model_state"}.get(name)
    state = group(findings, content, inside) if inside else unwrapped(findings, content, "the file")
    _refuse_hollow(findings, state)
    try:
        network = (
            Emoca.from_published(state, cfg_yaml)
            if name == "emoca"
            else NETWORKS[name].from_published(state)
        )
    except SettingsError as error:
        raise findings.error(_printable(str(error)).rstrip(".")) from error
    counts = network.counts
    assert counts is not None
    findings.counts.append(Count(name, counts.used, counts.used))
    findings.counts += [Count(what, number, None) for what, number in counts.spare.items()]
    imported.append(_entry(findings, files))
    return network


def _flame(request: Request, imported: list[Imported]) -> dict[str, NDArray[Any]] | None:
    """The arrays of the face model, reduced, out of its own files or else out of EMOCA's."""
    if request.flame:
        arrays = flame.reduced(flame.read(*request.flame))
        imported.append(_entry(Findings(request.flame[0], "flame"), request.flame))
        return arrays
    if request.emoca is None:
        return None
    files, _ = emoca_files(request.emoca)
    state = published.content_of(Findings(files[-1], "emoca"))["state_dict"]
    if not any(str(name).startswith(flame.EMOCA_PREFIX) for name in state):
        return None
    findings = Findings(files[-1], "flame")
    findings.warn("the face model is the copy that EMOCA's checkpoint carries")
    arrays = flame.reduced(flame.from_emoca(state))
    imported.append(_entry(findings, files[-1:]))
    return arrays


def _refuse_hollow(findings: Findings, state: Mapping[str, Any]) -> None:
    """Nothing; raises SettingsError for tensors without values of their own."""
    for name, value in state.items():
        if isinstance(value, Tensor) and (
            value.device.type != "cpu" or value.layout != torch.strided or value.is_quantized
        ):
            raise findings.error(f"{_printable(name)} holds no plain values")


def emoca_files(folder: Path) -> tuple[tuple[Path, ...], str]:
    """The files of EMOCA's folder, its checkpoint last, and the text of cfg.yaml; a checkpoint
    itself may be given in the folder's place.

    The checkpoint is the one with the smallest loss, the number behind the last "=" of its name;
    of equal ones the later name.
    """
    if folder.is_file():
        return (folder,), ""
    settings, at = folder / "cfg.yaml", folder / "detail" / "checkpoints"
    found = sorted(at.glob("*.ckpt")) if at.is_dir() else []
    losses = [(loss, path) for path in found if (loss := _loss(path)) is not None]
    if not losses:
        seen = ", ".join(path.name for path in found) or "none"
        raise SettingsError(
            f"{at}: wanted a checkpoint such as deca-epoch=10-val_loss/dataloader_idx_0=3.2.ckpt, "
            f"there is {seen}. {ORIGINS['emoca'].told()}"
        )
    best = min(loss for loss, _ in losses)
    checkpoint = [path for loss, path in losses if loss == best][-1]
    try:
        text = settings.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise SettingsError(
            f"{settings}: not readable ({error}); it says which pose EMOCA's expression network "
            f"gives. {ORIGINS['emoca'].told()}"
        ) from error
    return (settings, checkpoint), text


def _loss(path: Path) -> float | None:
    number = re.search(r"=([0-9.eE+-]+?)\.ckpt$", path.name)
    try:
        return float(number[1]) if number and "last" not in path.name else None
    except ValueError:
        return None


def _entry(findings: Findings, paths: tuple[Path, ...]) -> Imported:
    digests, due = tuple(file_sha256(path) for path in paths), ORIGINS[findings.kind].sha256
    if not digests[0].startswith(due):
        findings.warn(
            f"its sha256 begins {digests[-1][:10]}, that of the published file {due}: the same "
            "network, other weights"
        )
    names = tuple(path.name for path in paths)
    counts, warnings = tuple(findings.counts), tuple(findings.warnings)
    return Imported(findings.kind, names, digests, counts, warnings)


def _missing(files: Mapping[str, Any]) -> dict[str, str]:
    wanted = (*MODEL, *TRACKER)
    return {
        kind: f"{ORIGINS[kind].told()}; give {ORIGINS[kind].option}"
        for kind in wanted
        if kind not in files
    }


def _printable(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)
