"""`diffusionact import`: published checkpoints are read whole or refused with the reason, and
nothing in a file is ever run."""

from __future__ import annotations

import copy
import gzip
import json
import os
import pickle
import shutil
import subprocess
import sys
import tarfile
import types
import zipfile
from collections import OrderedDict
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from diffusionact import cli
from diffusionact.errors import SettingsError
from diffusionact.morphable import load_flame
from diffusionact.training import imports, published, weights, weights_folder
from diffusionact.training.imports import Report, Request, import_published
from diffusionact.training.models import FFHQ64, FFHQ256, NetworkConfig
from diffusionact.training.models.frozen import FAN, S3FD, Emoca, FrozenNetwork, Gaze
from diffusionact.training.origins import ORIGINS, TRACKER
from tests.golden import rule

pytestmark = pytest.mark.torch

GOLDEN = Path(__file__).parent / "golden"
SMALL = NetworkConfig(64, 32, (1, 2, 2), (1, 2, 2, 2), embed=64)
MODEL = "diffusionact_model.pt"
FIRST, LAST = "input_blocks.0.0.weight", "out.2.bias"

Content = dict[str, Any]


@cache
def _golden() -> Content:
    tables = json.loads(gzip.decompress((GOLDEN / "networks.json.gz").read_bytes()))
    content: Content = {"best_val_loss": 0.0}
    for full, shape in tables["small"]["keys"].items():
        top, name = full.split("/", 1)
        content.setdefault(top, {})[name] = torch.from_numpy(rule.tensor(full, shape))
    return content


def checkpoint() -> Content:
    """The small checkpoint that the rule makes, its tables new, its tensors shared."""
    return {key: dict(v) if isinstance(v, dict) else v for key, v in _golden().items()}


def diffae() -> Content:
    """A Lightning checkpoint of DiffAE with the same names."""
    state = {name: value + 1 for name, value in _golden()["state_dict_diff"].items()}
    return {"state_dict": {**state, "x_T": torch.zeros(2, 3, 4, 4)}, "epoch": 3, "callbacks": {}}


def read(path: Path, other: Path | None = None) -> published.Published:
    return published.read(path, other, SMALL)


@pytest.fixture
def model(tmp_path: Path) -> Path:
    path = tmp_path / MODEL
    torch.save(checkpoint(), path)
    return path


@pytest.fixture
def sizes(tmp_path: Path) -> Path:
    path = tmp_path / "small.json"
    path.write_text(json.dumps(SMALL.to_dict()))
    return path


def assert_tensors(seen: Any, top: str, prefix: str = "", plus: float = 0.0) -> None:
    """The part holds just the golden tensors under the prefix."""
    due = {
        name.removeprefix(prefix): value + plus
        for name, value in _golden()[top].items()
        if name.startswith(prefix) and (top == "state_dict_net" or ".encoder." not in name)
    }
    assert seen.keys() == due.keys()
    for name, value in due.items():
        assert seen[name].dtype == torch.float32 and torch.equal(seen[name], value), name


@pytest.mark.parametrize("new", [True, False])
def test_both_weight_sets_and_the_encoder_are_read(tmp_path: Path, new: bool) -> None:
    path = tmp_path / MODEL
    torch.save(checkpoint(), path, _use_new_zipfile_serialization=new)
    found = read(path)
    assert set(found.parts) == {"render", "invert", "reenactment"}
    assert_tensors(found.parts["render"], "state_dict_diff", "model.")
    assert_tensors(found.parts["invert"], "state_dict_diff", "ema_model.")
    assert_tensors(found.parts["reenactment"], "state_dict_net")
    (findings,) = found.findings
    assert findings.warnings == []
    used = [(count.found, count.wanted) for count in findings.counts if count.wanted]
    assert all(count == due for count, due in used) and len(used) == 3
    for part in found.parts:
        weights.Weights(SMALL, found.parts).network(part)


def test_the_published_network_is_found_by_its_names_and_shapes() -> None:
    tables = json.loads(gzip.decompress((GOLDEN / "networks.json.gz").read_bytes()))
    net, unet = {}, {}
    for full, shape in tables["full"]["keys"].items():
        if full.startswith("state_dict_net/"):
            net[full.removeprefix("state_dict_net/")] = torch.empty(shape, device="meta")
        elif full.startswith("state_dict_diff/model.") and ".encoder." not in full:
            name = full.removeprefix("state_dict_diff/model.")
            unet[name] = torch.empty(shape, device="meta")
    assert (len(net), len(unet)) == (118, 590), "REFERENCE's counts"
    assert published._config_of(unet, net) == FFHQ256
    assert published._config_of({}, net) == FFHQ256
    tables64 = {
        part: {
            name: torch.empty(shape, device="meta")
            for name, shape in published._shapes(FFHQ64, part).items()
        }
        for part in ("render", "reenactment")
    }
    assert published._config_of(tables64["render"], tables64["reenactment"]) == FFHQ64


class Bomb:
    """Makes a pickle that calls a function when it is read."""

    def __init__(self, function: Callable[..., Any], *arguments: Any) -> None:
        self.call = (function, arguments)

    def __reduce__(self) -> Any:
        return self.call


def saved(content: Any, new: bool = True) -> Callable[[Path], None]:
    return lambda path: torch.save(content, path, _use_new_zipfile_serialization=new)


def bomb(function: Callable[..., Any], *arguments: str, new: bool = True) -> Callable[[Path], None]:
    """A whole checkpoint with a call beside the weights; "RAN" becomes a file to leave."""

    def write(path: Path) -> None:
        told = [text.replace("RAN", str(path.parent / "ran")) for text in arguments]
        torch.save(
            {**checkpoint(), "x": Bomb(function, *told)}, path, _use_new_zipfile_serialization=new
        )

    return write


def edited(change: Callable[[Content], object], new: bool = True) -> Callable[[Path], None]:
    """The checkpoint after a change to its content."""

    def write(path: Path) -> None:
        content = checkpoint()
        change(content)
        torch.save(content, path, _use_new_zipfile_serialization=new)

    return write


def cut(keep: Callable[[int], int], new: bool = True) -> Callable[[Path], None]:
    """The checkpoint file without its end."""

    def write(path: Path) -> None:
        torch.save(checkpoint(), path, _use_new_zipfile_serialization=new)
        os.truncate(path, keep(path.stat().st_size))

    return write


def flipped(path: Path) -> None:
    torch.save(checkpoint(), path)
    content = bytearray(path.read_bytes())
    at = content.find(_golden()["state_dict_diff"][f"model.{FIRST}"].numpy().tobytes())
    content[at] ^= 1
    path.write_bytes(content)


def repacked(path: Path) -> None:
    torch.save(checkpoint(), path)
    with zipfile.ZipFile(path) as source:
        entries = {name: source.read(name) for name in source.namelist()}
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as target:
        for name, content in entries.items():
            target.writestr(name, content)


def archived(*names: str) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        with zipfile.ZipFile(path, "w") as target:
            for name in names:
                target.writestr(name, b"x")

    return write


def in_tar(path: Path) -> None:
    torch.save({}, path.with_name("inside.pt"))
    with tarfile.open(path, "w", format=tarfile.USTAR_FORMAT) as target:
        target.add(path.with_name("inside.pt"), "inside.pt")


def renamed(change: Callable[[str], str]) -> Callable[[Content], None]:
    """The names of state_dict_diff, changed."""

    def apply(content: Content) -> None:
        diff = content["state_dict_diff"]
        content["state_dict_diff"] = {change(name): value for name, value in diff.items()}

    return apply


def replaced(name: str, value: Any, group: str = "state_dict_diff") -> Callable[[Content], None]:
    return lambda content: content[group].update({name: value})


def laughs() -> list[Any]:
    """Ten thousand million entries in a few hundred bytes: harmless until somebody prints it."""
    value: list[Any] = ["ha"] * 10
    for _ in range(10):
        value = [value] * 10
    return value


def holed(value: float, name: str = f"model.{FIRST}") -> Callable[[Content], None]:
    def apply(content: Content) -> None:
        group = "state_dict_diff" if name in content["state_dict_diff"] else "state_dict_net"
        content[group][name] = content[group][name].clone()
        content[group][name].view(-1)[1] = value

    return apply


def no_ema(content: Content) -> None:
    diff = content["state_dict_diff"]
    content["state_dict_diff"] = {n: v for n, v in diff.items() if not n.startswith("ema_model.")}


def without(*names: str, group: str = "state_dict_diff") -> Callable[[Content], None]:
    def apply(content: Content) -> None:
        for name in names:
            del content[group][name]

    return apply


WIDE = torch.zeros(1).expand(10**7, 10**7)  # 400 TB, were it written out
REFUSED: dict[str, tuple[Callable[[Path], object], str]] = {
    # no checkpoint at all
    "absent": (lambda path: None, "not readable .No such file"),
    "a folder": (lambda path: path.mkdir(), "is a folder"),
    "empty": (lambda path: path.touch(), "is empty"),
    "web page": (
        lambda path: path.write_text("\n<!DOCTYPE html><html><title>Google Drive - Virus scan"),
        "is a web page, .* open its address in a browser",
    ),
    "git lfs": (
        lambda path: path.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0"),
        "pointer of Git LFS.*git lfs pull",
    ),
    "text": (lambda path: path.write_text("error 404: not found"), "is no PyTorch checkpoint"),
    "picture": (lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(99)), "is a picture"),
    "gzip": (lambda path: path.write_bytes(gzip.compress(b"x" * 99)), "gzip archive; unpack it"),
    "tar": (in_tar, "is a tar archive; unpack it"),
    "zip of files": (archived("EMOCA/cfg.yaml", "EMOCA/x.ckpt"), "zip archive .*; unpack it"),
    "torchscript": (archived("m/data.pkl", "m/constants.pkl"), "TorchScript archive, a program"),
    "safetensors": (
        lambda path: save_file({"a": torch.zeros(2)}, path), "is a safetensors file"
    ),
    # damaged on the way
    "half": (cut(lambda size: size // 2), r"cut off or damaged .* MB are here"),
    "end lost": (cut(lambda size: size - 64), "cut off or damaged"),
    "first bytes": (cut(lambda size: 4), "cut off or damaged"),
    "old, half": (cut(lambda size: size // 2, new=False), "not readable as a checkpoint"),
    "old, end lost": (cut(lambda size: size - 8, new=False), "not readable as a checkpoint"),
    "old, first bytes": (cut(lambda size: 20, new=False), "not readable as a checkpoint"),
    "a flipped bit": (flipped, "damaged: the checksum of .*data/.* is wrong"),
    "compressed": (repacked, "is a compressed archive"),
    # pickles that are programs
    "os.system": (bomb(os.system, "touch RAN"), "asks to run posix.system. Nothing of it was run"),
    "os.system, old": (bomb(os.system, "touch RAN", new=False), "asks to run posix.system"),
    "eval": (bomb(eval, "open('RAN', 'w').close()"), "asks to run eval"),
    "exec": (bomb(exec, "open('RAN', 'w').close()"), "asks to run exec"),
    "open": (bomb(open, "RAN", "w"), r"asks to run (_)?io\.open"),
    "popen": (bomb(subprocess.Popen, "touch RAN"), r"asks to run (subprocess|commands)\.Popen"),
    "rmtree": (bomb(shutil.rmtree, "RAN"), r"asks to run shutil\.rmtree"),
    "torch.load": (bomb(torch.load, "RAN"), r"asks to run torch\.serialization\.load"),
    "getattr": (bomb(getattr, "RAN", "upper"), "asks to run getattr"),
    "a network object": (
        edited(lambda c: c.update(net=torch.nn.Linear(1, 1))), "asks to run torch.nn.modules"
    ),
    "plain pickle": (
        lambda path: path.write_bytes(pickle.dumps(Bomb(os.system, f"touch {path.parent}/ran"))),
        "not readable as a checkpoint",
    ),
    # something else inside
    "a tensor": (saved(torch.zeros(3)), "holds Tensor, no table of tensors"),
    "a list": (saved([1, 2]), "holds list, no table of tensors"),
    "another network": (
        saved({"features.0.weight": torch.zeros(3)}),
        r"holds features\.0\.weight: of none of the networks",
    ),
    "the detector": (
        saved(OrderedDict({"conv3_3_norm.weight": torch.zeros(3)})),
        r"is the file of S3FD, face detector: give it as --s3fd",
    ),
    "diffae": (saved(diffae()), "is the file of DiffAE.*: give it as --diffae"),
    "no net": (edited(lambda c: c.pop("state_dict_net")), "no tensors under 'state_dict_net'"),
    "no diff": (edited(lambda c: c.pop("state_dict_diff")), "no tensors under 'state_dict_diff'"),
    "empty diff": (edited(lambda c: c["state_dict_diff"].clear()), "no tensors under"),
    "diff a list": (edited(lambda c: c.update(state_dict_diff=[1])), "no tensors under"),
    # not the network
    "a name lost": (
        edited(without(f"model.{FIRST}")),
        rf"model\.\* has \d+ of the \d+ tensors wanted; missing: model\.{FIRST}\. Download",
    ),
    "net, a name lost": (
        edited(without("zero_conv_1.bias", group="state_dict_net")),
        r"state_dict_net has \d+ of the \d+ tensors wanted; missing: zero_conv_1\.bias",
    ),
    "ema, names lost": (
        edited(without(f"ema_model.{FIRST}", f"ema_model.{LAST}")), r"missing: ema_model\."
    ),
    "a name more": (
        edited(replaced("model.out.9.weight", torch.zeros(3))), r"unknown: model\.out\.9\.weight"
    ),
    "net, a name more": (
        edited(replaced("zero_conv_2.bias", torch.zeros(3), "state_dict_net")),
        r"unknown: zero_conv_2\.bias",
    ),
    "another shape": (
        edited(replaced(f"model.{LAST}", torch.zeros(4))),
        rf"model\.{LAST} is of shape \[4\], wanted \[3\]",
    ),
    "a huge shape": (
        edited(replaced(f"model.{FIRST}", WIDE)), r"is of shape \[10000000, 10000000\], wanted"
    ),
    "another prefix": (
        edited(renamed(lambda name: name.replace("model.", "unet."))),
        r"has none of the \d+ tensors model\.\*; its names are .*unet\.",
    ),
    "no prefix": (
        edited(renamed(lambda name: name.split(".", 1)[1])), r"has none of the \d+ tensors model"
    ),
    "no text": (edited(replaced(3, torch.zeros(3))), "names that are no text .a key of type int"),  # type: ignore[arg-type]
    "control characters": (
        edited(replaced("model.\x1b[2Jx", torch.zeros(3))), r"unknown: model\.\\x1b\[2Jx"
    ),
    "no ema": (edited(no_ema), r"has none of the weights that invert .*give its file as well"),
    # no values
    "nan": (edited(holed(float("nan"))), rf"model\.{FIRST} has 1 of 864 values that are not fin"),
    "inf": (edited(holed(float("-inf"), f"ema_model.{FIRST}")), "values that are not finite"),
    "net, nan": (edited(holed(float("nan"), "zero_conv_1.weight")), "values that are not finite"),
    "integers": (
        edited(replaced(f"model.{LAST}", torch.zeros(3, dtype=torch.int64))),
        r"is torch\.int64, wanted floating point",
    ),
    "text for a tensor": (edited(replaced(f"model.{LAST}", "x")), "is str, wanted"),
    "sparse": (
        edited(replaced(f"model.{LAST}", torch.zeros(3).to_sparse())), "holds no plain values"
    ),
    "meta": (
        edited(replaced(f"model.{LAST}", torch.zeros(3, device="meta"))), "holds no plain values"
    ),
}  # fmt: skip


@pytest.mark.parametrize("kind", REFUSED)
def test_a_mutilated_file_is_refused_and_runs_nothing(kind: str, tmp_path: Path) -> None:
    write, message = REFUSED[kind]
    path = tmp_path / MODEL
    write(path)
    with pytest.raises(SettingsError, match=message) as caught:
        import_published(Request(diffusionact=path, network=SMALL), tmp_path / "weights")
    said = str(caught.value)
    assert str(path) in said and said.isprintable() and len(said) < 1200
    assert not (tmp_path / "ran").exists() and not (tmp_path / "weights").exists()


def test_at_least_forty_mutilated_files_are_tried() -> None:
    assert len(REFUSED) + len(ACCEPTED) >= 40


class Trainer:
    """Stands for what Lightning leaves in a checkpoint: its classes are not installed here."""

    ran: list[object] = []

    def __setstate__(self, state: object) -> None:
        self.ran.append(state)

    def __init__(self) -> None:
        self.settings = {"lr": 1e-4}


Trainer.__module__ = "pytorch_lightning.callbacks.model_checkpoint"

# What is read all the same, and the warning that says so; None: there is nothing to say.
ACCEPTED: dict[str, tuple[Callable[[Content], object], str | None]] = {
    "parallel training": (
        renamed(lambda name: f"module.{name}"), "begin with 'module.', .* read without it"
    ),
    "half precision": (
        lambda c: c["state_dict_net"].update(
            {name: value.half() for name, value in c["state_dict_net"].items()}
        ),
        "state_dict_net is stored as torch.float16, made float32",
    ),
    "double precision": (
        lambda c: c["state_dict_net"].update(
            {name: value.double() for name, value in c["state_dict_net"].items()}
        ),
        "state_dict_net is stored as torch.float64, made float32",
    ),
    "unknown tensors": (
        replaced("teacher.weight", torch.zeros(3)), "1 unknown tensors .* left out: teacher.weight"
    ),
    "unknown entries": (lambda c: c.update(optimizer={"lr": 1.0}), "entries .* out: optimizer"),
    "a thousand million entries": (lambda c: c.update(best_val_loss=laughs()), None),
    "previews and noise": (
        lambda c: c.update(
            global_noise={"noise": torch.zeros(3, 64, 64)},
            state_dict_diff={**c["state_dict_diff"], "x_T": torch.zeros(2, 3, 64, 64)},
        ),
        None,
    ),
    "a loss of numpy": (lambda c: c.update(best_val_loss=np.float64(0.25)), None),
    "parameters": (
        lambda c: c["state_dict_net"].update(
            {name: torch.nn.Parameter(value) for name, value in c["state_dict_net"].items()}
        ),
        None,
    ),
    "no loss": (lambda c: c.pop("best_val_loss"), None),
}  # fmt: skip


@pytest.mark.parametrize("kind", ACCEPTED)
def test_what_is_read_all_the_same_is_said(kind: str, tmp_path: Path) -> None:
    change, warning = ACCEPTED[kind]
    edited(change)(tmp_path / MODEL)
    found = read(tmp_path / MODEL)
    (findings,) = found.findings
    if warning is None:
        assert findings.warnings == []
    else:
        (said,) = findings.warnings
        assert said.startswith(MODEL)
        with pytest.raises(AssertionError, match=warning):
            raise AssertionError(said)
    assert_tensors(found.parts["render"], "state_dict_diff", "model.")
    assert_tensors(found.parts["invert"], "state_dict_diff", "ema_model.")
    if "precision" not in kind:
        assert_tensors(found.parts["reenactment"], "state_dict_net")


class Script:
    """Stands for a class of somebody's own program."""


Script.__module__ = "research.training"


def test_objects_of_others_are_left_out_and_told(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("research", "research.training"):
        module = types.ModuleType(name)
        module.Script = Script  # type: ignore[attr-defined]
        monkeypatch.setitem(sys.modules, name, module)
    edited(lambda c: c.update(best_val_loss=Script()))(tmp_path / MODEL)
    for name in ("research", "research.training"):
        monkeypatch.delitem(sys.modules, name)
    (findings,) = read(tmp_path / MODEL).findings
    assert findings.warnings == [
        f"{MODEL}: holds objects that are no weights, left out: research.training.Script"
    ]


@pytest.mark.parametrize("new", [True, False])
def test_what_trainers_leave_beside_the_weights_is_not_made(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, new: bool
) -> None:
    module = types.ModuleType(Trainer.__module__)
    module.Trainer = Trainer  # type: ignore[attr-defined]
    names = ["pytorch_lightning", "pytorch_lightning.callbacks", Trainer.__module__]
    for name in names:
        monkeypatch.setitem(sys.modules, name, module)
    content = diffae()
    content["callbacks"] = {Trainer: {"best": np.float64(1)}}
    content["hyper_parameters"] = Trainer()
    torch.save(content, tmp_path / "last.ckpt", _use_new_zipfile_serialization=new)
    edited(lambda c: None)(tmp_path / MODEL)
    found = read(tmp_path / MODEL, tmp_path / "last.ckpt")
    assert "encoder" in found.parts and Trainer.ran == []
    assert [findings.warnings for findings in found.findings] == [[], []]


def test_missing_weights_of_inversion_are_those_of_diffae(tmp_path: Path) -> None:
    edited(no_ema)(tmp_path / MODEL)
    torch.save(diffae(), tmp_path / "last.ckpt")
    found = read(tmp_path / MODEL, tmp_path / "last.ckpt")
    assert_tensors(found.parts["invert"], "state_dict_diff", "ema_model.", plus=1)
    assert_tensors(found.parts["render"], "state_dict_diff", "model.")
    first, second = found.findings
    assert first.warnings == [
        f"{MODEL}: no ema_model.* in state_dict_diff; inversion uses those of last.ckpt"
    ]
    assert [(c.found, c.wanted) for c in second.counts][0][0] == len(found.parts["invert"])


def test_the_latent_model_of_diffae_is_left_alone(tmp_path: Path, model: Path) -> None:
    content = diffae()
    content["state_dict"].update(
        {"ema_model.latent_net.layers.0.bias": torch.zeros(3), "conds_mean": torch.zeros(1, 64)}
    )
    torch.save(content, tmp_path / "last.ckpt")
    edited(no_ema)(model)
    assert set(read(model, tmp_path / "last.ckpt").parts) >= {"invert", "encoder"}


def test_diffae_gives_its_encoder(tmp_path: Path, model: Path) -> None:
    torch.save(diffae(), tmp_path / "last.ckpt")
    found = read(model, tmp_path / "last.ckpt")
    assert_tensors(found.parts["invert"], "state_dict_diff", "ema_model.")
    due = _golden()["state_dict_diff"]
    for name, value in found.parts["encoder"].items():
        assert torch.equal(value, due[f"ema_model.encoder.{name}"] + 1)
    weights.Weights(SMALL, found.parts).network("encoder")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c["state_dict"].pop(f"ema_model.encoder.{FIRST}"), "missing: ema_model.encoder"),
        (lambda c: c.pop("state_dict"), "of none of the networks known here. Wanted: DiffAE"),
    ],
)
def test_a_mutilated_diffae_is_refused(
    tmp_path: Path, model: Path, change: Callable[[Content], object], message: str
) -> None:
    content = diffae()
    change(content)
    torch.save(content, tmp_path / "last.ckpt")
    with pytest.raises(SettingsError, match=message) as caught:
        read(model, tmp_path / "last.ckpt")
    assert str(tmp_path / "last.ckpt") in str(caught.value)


def test_a_network_of_other_sizes_wants_its_sizes(model: Path) -> None:
    with pytest.raises(SettingsError, match="tensors wanted; .* --network NAME or config.json"):
        published.read(model)


def do_import(request: Request, out: Path) -> Report:
    return import_published(request, out)


def test_the_folder_says_what_it_was_made_from(tmp_path: Path, model: Path) -> None:
    report = do_import(Request(diffusionact=model, network=SMALL), tmp_path / "weights")
    folder = tmp_path / "weights"
    assert {p.name for p in folder.iterdir()} == {"diffusionact.safetensors", "import.json"}
    loaded = weights.load(folder / "diffusionact.safetensors")
    assert loaded.config == SMALL and set(loaded.parts) == {"render", "invert", "reenactment"}
    assert_tensors(loaded.parts["render"], "state_dict_diff", "model.")
    record = json.loads((folder / "import.json").read_text())
    entry = record["files"]["diffusionact"]
    digest = imports.file_sha256(model)
    assert entry["names"] == [MODEL] and entry["sha256"] == [digest]
    assert entry["origin"] == ORIGINS["diffusionact"].url
    assert entry["licence"] == ORIGINS["diffusionact"].licence
    assert loaded.provenance["diffusionact_sha256"] == digest
    seen = imports.file_sha256(folder / "diffusionact.safetensors")
    assert record["outputs"] == {"diffusionact.safetensors": seen}
    assert set(record["missing"]) == set(report.missing) == set(TRACKER)


def detector(change: Callable[[Content], object] = lambda state: None) -> Content:
    """A whole S3FD in a small file: one number stands for each tensor."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in S3FD().state_dict().items()}
    state = {
        name: torch.tensor([0.01 * i]).expand(shape)
        for i, (name, shape) in enumerate(shapes.items())
    }
    change(state)
    return state


def test_a_helper_is_added_to_the_folder(tmp_path: Path, model: Path) -> None:
    out = tmp_path / "weights"
    do_import(Request(diffusionact=model, network=SMALL), out)
    torch.save(detector(), tmp_path / "s3fd.pth")
    report = do_import(Request(s3fd=tmp_path / "s3fd.pth"), out)
    (entry,) = report.imported
    assert [(c.found, c.wanted) for c in entry.counts] == [(65, 65)]
    assert "other weights" in entry.warnings[0], "it is not the published file"
    assert set(report.missing) == set(TRACKER) - {"s3fd"}
    network = weights_folder.load_helper(out, "s3fd")
    assert network is not None and weights_folder.load_helper(out, "fan") is None
    for name, value in network.state_dict().items():
        assert torch.equal(value, detector()[name])
    record = weights_folder.read_record(out)
    assert set(record.files) == {"diffusionact", "s3fd"}
    assert set(record.outputs) == {"diffusionact.safetensors", "s3fd.safetensors"}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (lambda: detector(lambda s: s.pop("fc6.bias")), r"missing \(fc6\.bias\)"),
        (lambda: detector(lambda s: s.update({"x\x1b": torch.zeros(1)})), "unknown"),
        (
            lambda: detector(lambda s: s.update({"fc6.bias": torch.zeros(3)})),
            r"fc6\.bias \[3\] instead",
        ),
        (
            lambda: detector(
                lambda s: s.update({"fc6.bias": torch.tensor([float("nan")]).expand(1024)})
            ),
            "not finite",
        ),
        (
            lambda: detector(lambda s: s.update({"fc6.bias": torch.zeros(1024, device="meta")})),
            "holds no plain values",
        ),
        (lambda: {"model_state": {"a": torch.zeros(1)}}, "is the file of ETH-XGaze.* --gaze"),
        (lambda: {"state_dict": {"deca.E_flame.x": torch.zeros(1)}}, "is the file of EMOCA"),
        (lambda: {"m0.b1_4.bn1.weight": torch.zeros(1)}, "is the file of 2D-FAN-4.* --fan"),
    ],
)
def test_a_mutilated_helper_is_refused(
    tmp_path: Path, content: Callable[[], Content], message: str
) -> None:
    torch.save(content(), tmp_path / "s3fd.pth")
    with pytest.raises(SettingsError, match=message) as caught:
        do_import(Request(s3fd=tmp_path / "s3fd.pth"), tmp_path / "weights")
    said = str(caught.value)
    assert str(tmp_path / "s3fd.pth") in said and said.isprintable()
    assert not (tmp_path / "weights").exists()


def test_the_gaze_file_needs_its_table(tmp_path: Path) -> None:
    torch.save({"model_state": [1]}, tmp_path / "gaze.tar")
    with pytest.raises(SettingsError, match="no tensors under 'model_state'"):
        do_import(Request(gaze=tmp_path / "gaze.tar"), tmp_path / "weights")


def test_emoca_s_checkpoint_is_the_one_with_the_smallest_loss(tmp_path: Path) -> None:
    folder = tmp_path / "EMOCA"
    (folder / "detail" / "checkpoints").mkdir(parents=True)
    (folder / "cfg.yaml").write_text("detail:\n  exp_deca_jaw_pose: true\n")
    for name in ("last", "a=3.5", "b-loss=3.25", "c-loss=3.25", "d=x"):
        (folder / "detail" / "checkpoints" / f"{name}.ckpt").touch()
    (settings, checkpoint_path), text = imports.emoca_files(folder)
    assert checkpoint_path.name == "c-loss=3.25.ckpt" and settings.name == "cfg.yaml"
    assert "exp_deca_jaw_pose" in text
    settings.unlink()
    with pytest.raises(SettingsError, match=r"cfg\.yaml: not readable"):
        imports.emoca_files(folder)
    shutil.rmtree(folder / "detail")
    with pytest.raises(SettingsError, match="wanted a checkpoint .* there is none"):
        imports.emoca_files(folder)


def test_a_new_model_replaces_the_old_one_s_record(tmp_path: Path, model: Path) -> None:
    out, other = tmp_path / "weights", tmp_path / "last.ckpt"
    torch.save(diffae(), other)
    do_import(Request(diffusionact=model, diffae=other, network=SMALL), out)
    assert set(weights_folder.read_record(out).files) == {"diffusionact", "diffae"}
    assert "encoder" in weights.load(out / "diffusionact.safetensors").parts
    do_import(Request(diffusionact=model, network=SMALL), out)
    assert set(weights_folder.read_record(out).files) == {"diffusionact"}
    assert "encoder" not in weights.load(out / "diffusionact.safetensors").parts


def face_model() -> dict[str, Any]:
    """The arrays of a FLAME of random numbers, under its published names."""
    rng = np.random.default_rng(0)
    return {
        "v_template": rng.normal(0, 0.1, (60, 3)), "shapedirs": rng.normal(0, 0.01, (60, 3, 400)),
        "posedirs": rng.normal(0, 0.01, (60, 3, 36)), "J_regressor": np.full((5, 60), 1 / 60),
        "weights": np.full((60, 5), 0.2), "f": np.arange(180).reshape(60, 3) % 60,
        "kintree_table": np.array([[-1, 0, 1, 1, 1], [0, 1, 2, 3, 4]]),
    }  # fmt: skip


def face_landmarks() -> dict[str, Any]:
    return {
        "static_lmk_faces_idx": np.arange(51), "static_lmk_bary_coords": np.full((51, 3), 1 / 3),
        "dynamic_lmk_faces_idx": np.zeros((79, 17), int),
        "dynamic_lmk_bary_coords": np.full((79, 17, 3), 1 / 3),
    }  # fmt: skip


def test_the_face_model_s_two_files_become_one(tmp_path: Path) -> None:
    model, places = tmp_path / "generic_model.pkl", tmp_path / "landmark_embedding.npy"
    model.write_bytes(pickle.dumps(face_model(), 2))
    np.save(places, np.array(face_landmarks(), dtype=object), allow_pickle=True)
    report = do_import(Request(flame=(model, places)), tmp_path / "w")
    (entry,) = report.imported
    assert entry.kind == "flame" and entry.names == (model.name, places.name)
    assert "flame" not in report.missing and "diffusionact" in report.missing
    assert "it makes no bundle yet" in report.lines()[-1]
    codes = np.zeros(100), np.zeros(50), np.zeros(6)
    assert load_flame(tmp_path / "w" / "flame.npz").landmarks(*codes).shape == (68, 3)
    with pytest.raises(SettingsError, match="landmark_embedding.npy"):
        do_import(Request(flame=(model,)), tmp_path / "v")
    model.write_bytes(pickle.dumps(Bomb(os.system, f"touch {tmp_path}/ran")))
    with pytest.raises(SettingsError):
        do_import(Request(flame=(model, places)), tmp_path / "v")
    assert not (tmp_path / "ran").exists() and not (tmp_path / "v").exists()


def flame_of_emoca() -> Content:
    """The face model as EMOCA's checkpoint carries it."""
    names = {
        "weights": "lbs_weights", "f": "faces_tensor",
        "static_lmk_faces_idx": "lmk_faces_idx", "static_lmk_bary_coords": "lmk_bary_coords",
    }  # fmt: skip
    held = {**face_model(), **face_landmarks()}
    held["posedirs"] = held["posedirs"].reshape(-1, 36).T
    held["shapedirs"] = np.concatenate(
        [held["shapedirs"][..., :100], held["shapedirs"][..., 300:350]], axis=2
    )
    held["parents"] = held.pop("kintree_table")[0]
    return {f"deca.flame.{names.get(n, n)}": torch.tensor(value) for n, value in held.items()}


def hollow(network: type[FrozenNetwork], prefix: str = "", norms: bool = True) -> Content:
    """The tensors of a helper's file, each with one value: whole in name and shape, small in
    bytes. norms: with the counters that its makers' norms keep."""
    with torch.device("meta"):
        shapes = {name: value.shape for name, value in network().state_dict().items()}
    state = {prefix + name: torch.tensor([0.5]).expand(shape) for name, shape in shapes.items()}
    counters = [name for name in state if name.endswith("running_mean")] if norms else []
    for name in counters:
        state[name.replace("running_mean", "num_batches_tracked")] = torch.tensor(7)
    return state


@pytest.mark.slow
def test_all_helpers_are_imported_together(tmp_path: Path) -> None:
    at = tmp_path / "EMOCA" / "detail" / "checkpoints"
    at.mkdir(parents=True)
    (tmp_path / "EMOCA" / "cfg.yaml").write_text("detail:\n  exp_deca_jaw_pose: true\n")
    emoca = hollow(Emoca, "deca.") | flame_of_emoca()
    emoca["deca.E_detail.layers.0.bias"] = torch.zeros(3)
    torch.save({"state_dict": emoca}, at / "deca-val=2.5.ckpt")
    gaze = {**hollow(Gaze), "gaze_network.fc.bias": torch.zeros(1000)}
    torch.save({"model_state": gaze}, tmp_path / "gaze.tar", _use_new_zipfile_serialization=False)
    torch.save(hollow(FAN), tmp_path / "fan.tar", _use_new_zipfile_serialization=False)
    torch.save(detector(), tmp_path / "s3fd.pth")
    report = do_import(
        Request(
            s3fd=tmp_path / "s3fd.pth", fan=tmp_path / "fan.tar",
            gaze=tmp_path / "gaze.tar", emoca=tmp_path / "EMOCA",
        ),
        tmp_path / "w",
    )  # fmt: skip
    found = {entry.kind: entry for entry in report.imported}
    assert set(found) == set(TRACKER) and set(report.missing) == {"diffusionact"}
    assert found["flame"].warnings[0].endswith("copy that EMOCA's checkpoint carries")
    counted = {kind: sum(c.found for c in entry.counts) for kind, entry in found.items()}
    assert (counted["s3fd"], counted["fan"]) == (65, 1129), "all that the published files hold"
    assert {(c.what, c.found) for c in found["emoca"].counts} >= {("E_detail", 1)}
    for name in ("s3fd", "fan", "emoca", "gaze"):
        network = weights_folder.load_helper(tmp_path / "w", name)
        assert network is not None
        values = {value.reshape(-1)[0].item() for value in network.state_dict().values()}
        assert name == "s3fd" or values == {0.5}
    load_flame(tmp_path / "w" / "flame.npz")


def test_nothing_is_written_into_a_folder_of_something_else(tmp_path: Path, model: Path) -> None:
    request = Request(diffusionact=model, network=SMALL)
    with pytest.raises(SettingsError, match="holds no import"):
        do_import(request, tmp_path)
    with pytest.raises(SettingsError, match="is a file"):
        do_import(request, model)
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "import.json").write_text("[]")
    with pytest.raises(SettingsError, match="not a record of an import"):
        do_import(request, tmp_path / "weights")


def test_a_damaged_helper_of_the_folder_is_refused(tmp_path: Path) -> None:
    path = weights_folder.helper_file(tmp_path, "s3fd")
    path.write_bytes(b"x" * 100)
    with pytest.raises(SettingsError, match="not a readable safetensors file"):
        weights_folder.load_helper(tmp_path, "s3fd")
    save_file({"a": torch.zeros(1)}, path, {"format": "1", "network": "fan"})
    with pytest.raises(SettingsError, match="wanted .*'s3fd'"):
        weights_folder.load_helper(tmp_path, "s3fd")


def test_nothing_to_import_is_said(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="no file to import"):
        do_import(Request(), tmp_path / "weights")


def test_a_diffusion_autoencoder_alone_is_what_training_begins_from(
    tmp_path: Path, model: Path
) -> None:
    torch.save(diffae(), tmp_path / "last.ckpt")
    folder = tmp_path / "weights"
    report = do_import(Request(diffae=tmp_path / "last.ckpt", network=SMALL), folder)
    assert "no bundle yet; training begins from it" in report.lines()[-1]
    assert "diffusionact" in report.missing
    found = weights.load(folder / weights_folder.MODEL_FILE)
    assert set(found.parts) == {"render", "encoder"}
    assert_tensors(found.parts["render"], "state_dict_diff", "ema_model.", plus=1)
    due = _golden()["state_dict_diff"]
    for name, value in found.parts["encoder"].items():
        assert torch.equal(value, due[f"ema_model.encoder.{name}"] + 1)
    do_import(Request(diffusionact=model, network=SMALL), folder)
    with pytest.raises(SettingsError, match="--diffae alone: .* give both again, or another -o"):
        do_import(Request(diffae=tmp_path / "last.ckpt", network=SMALL), folder)


def test_every_file_has_a_maker_and_a_licence() -> None:
    for origin in ORIGINS.values():
        assert origin.url.startswith("https://") and origin.licence and origin.option


def test_the_command_line(
    tmp_path: Path, model: Path, sizes: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = ["import", str(model), "-o", str(tmp_path / "w"), "--network", str(sizes)]
    assert cli.main(words) == 0
    said = capsys.readouterr().out
    assert said.startswith(f"{MODEL}: DiffusionAct, ")
    assert "still missing: ETH-XGaze" in said and "licence: CC BY-NC-SA 4.0" in said
    assert cli.main([*words, "--json"]) == 0
    (line,) = capsys.readouterr().out.splitlines()
    report = json.loads(line)
    assert report["imported"][0]["kind"] == "diffusionact" and set(report["missing"]) == {*TRACKER}
    assert cli.main([*words[:-1], "nowhere.json"]) == 2
    assert "nowhere.json: neither a file" in capsys.readouterr().err
    model.write_text("<html>")
    assert cli.main(words) == 2
    assert "is a web page" in capsys.readouterr().err


def test_a_missing_library_is_named(tmp_path: Path) -> None:
    words = ["import", "x.pt", "-o", str(tmp_path / "w")]
    code = "import sys; sys.modules.update(torch=None)\nfrom diffusionact.cli import main\n"
    code += f"sys.exit(main({words!r}))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 2 and "pip install 'diffusionact[export]'" in done.stderr


def test_the_network_s_sizes_are_checked(tmp_path: Path) -> None:
    assert published.load_network("ffhq256") == FFHQ256
    for text, message in (("{", "not JSON"), ("[]", "wanted a JSON object"), ("{}", "is missing")):
        (tmp_path / "c.json").write_text(text)
        with pytest.raises(SettingsError, match=message):
            published.load_network(str(tmp_path / "c.json"))


def test_the_golden_checkpoint_is_not_changed_by_these_tests() -> None:
    before = copy.deepcopy(_golden()["state_dict_diff"][f"model.{FIRST}"])
    due = rule.tensor(f"state_dict_diff/model.{FIRST}", before.shape)
    assert torch.equal(before, torch.from_numpy(due))
