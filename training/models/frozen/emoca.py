"""EMOCA's coarse encoders: picture -> FLAME's codes.

Source: Danecek et al., "EMOCA: Emotion Driven Monocular Face Capture and Animation", 2022, and
Feng et al., "Learning an Animatable Detailed 3D Face Model from In-The-Wild Images" (DECA), 2021;
names as in the Lightning checkpoint, less the leading `deca.`.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from typing_extensions import Self

from diffusionact.errors import SettingsError
from diffusionact.training.models.frozen.network import FrozenNetwork, batch_counter, named
from diffusionact.training.models.frozen.resnet import FEATURES, ResNet50

PREFIX = "deca."
HIDDEN = 1024
SHAPE, TEXTURE, EXPRESSION, POSE, CAMERA, LIGHT = 100, 50, 50, 6, 3, 27  # columns, in this order
CODES = SHAPE + TEXTURE + EXPRESSION + POSE + CAMERA + LIGHT
STAGE = "detail"  # the part of cfg.yaml that belongs to the published checkpoint
EXPRESSION_ROWS = "E_expression.layers.2.weight"


class Emoca(FrozenNetwork):
    """Shape, expression, pose and camera of a face.

    The expression comes from a network of its own, which may give turns of the head and of the jaw
    as well.

    Args:
        clone: that network has a ResNet of its own (`deca_clone`); else it is a second head on
            the same features (`deca_parallel`).
        global_pose, jaw_pose: which turns it gives.
    """

    NAME = "emoca"
    INPUT = (1, 3, 224, 224)
    OUTPUTS = ("shape", "expression", "pose", "camera")

    def __init__(
        self, clone: bool = True, global_pose: bool = False, jaw_pose: bool = True
    ) -> None:
        super().__init__()
        self.clone, self.global_pose, self.jaw_pose = clone, global_pose, jaw_pose
        self.E_flame = Encoder(CODES, own_features=True)
        rows = EXPRESSION + 3 * (global_pose + jaw_pose)
        self.E_expression = Encoder(rows, own_features=clone)

    def config(self) -> dict[str, Any]:
        return {
            "clone": self.clone, "global_pose": self.global_pose, "jaw_pose": self.jaw_pose
        }  # fmt: skip

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        """Shape [N,100], expression [N,50], pose [N,6] (axis-angle: global, jaw), camera [N,3].

        image: float32 [N,3,224,224], RGB, 0..1
        """
        features = self.E_flame.encoder(image)
        own = self.E_expression.encoder(image) if self.clone else features
        codes = self.E_flame.layers(features)
        shape, _, _, pose, camera, _ = codes.split(
            [SHAPE, TEXTURE, EXPRESSION, POSE, CAMERA, LIGHT], dim=1
        )
        found = self.E_expression.layers(own)
        head = found[:, EXPRESSION : EXPRESSION + 3] if self.global_pose else pose[:, :3]
        jaw = found[:, -3:] if self.jaw_pose else pose[:, 3:]
        return shape, found[:, :EXPRESSION], torch.cat([head, jaw], dim=1), camera

    @classmethod
    def from_published(cls, state: Mapping[str, Any], cfg_yaml: str = "") -> Self:
        """The network from the checkpoint's `state_dict`; other parts of it are only counted.

        cfg_yaml: the text of cfg.yaml beside the checkpoint.
        Raises: SettingsError: tensors are missing, unknown, of another shape or not finite, or
            cfg.yaml contradicts them.
        """
        ours = {name.removeprefix(PREFIX): value for name, value in named(cls.NAME, state).items()}
        return cls._load(ours, config_of(ours, cfg_yaml), _spare)


class Encoder(nn.Module):
    """Two linear layers on a ResNet's features; the ResNet is absent where another's serve."""

    def __init__(self, rows: int, own_features: bool) -> None:
        super().__init__()
        if own_features:
            self.encoder = ResNet50()
        self.layers = nn.Sequential(
            nn.Linear(FEATURES, HIDDEN), nn.ReLU(), nn.Linear(HIDDEN, rows)
        )  # fmt: skip


def _spare(name: str) -> str | None:
    """The group of a tensor that inference does not need.

    With two heads on one ResNet, the checkpoint holds all of E_flame twice.
    """
    if name.startswith("E_expression.resnet."):
        return "second copy of E_flame"
    if name.startswith(("E_flame.", "E_expression.")):
        return batch_counter(name)
    return name.split(".", 1)[0]


def config_of(state: Mapping[str, Any], cfg_yaml: str) -> dict[str, bool]:
    """The constructor's arguments for a checkpoint.

    The tensors say them all but one: whether 53 rows turn the head or the jaw. That is in
    cfg.yaml; without it the jaw, as in its makers' default.

    state: names without `deca.`.
    Raises: SettingsError: the rows are none of EMOCA's, or cfg.yaml contradicts them.
    """
    clone = any(name.startswith("E_expression.encoder.") for name in state)
    last = state.get(EXPRESSION_ROWS)
    rows = last.shape[0] if isinstance(last, Tensor) and last.ndim else 0
    if rows not in (EXPRESSION, EXPRESSION + 3, EXPRESSION + 6):
        raise SettingsError(
            f"emoca: {EXPRESSION_ROWS} should have 50, 53 or 56 rows, "
            f"{f'it has {rows}' if rows else 'there is none'}; give the checkpoint of "
            "EMOCA_v2_lr_mse_20/detail/checkpoints"
        )
    said = {flag: _flag(cfg_yaml, f"exp_deca_{flag}") for flag in ("global_pose", "jaw_pose")}
    head, jaw = said["global_pose"], said["jaw_pose"]
    if head is None:
        head = rows == EXPRESSION + (3 if jaw is False else 6)
    if jaw is None:
        jaw = rows == EXPRESSION + 3 + 3 * head
    flags = {"global_pose": head, "jaw_pose": jaw}
    if rows != EXPRESSION + 3 * sum(flags.values()):
        raise SettingsError(
            f"emoca: the checkpoint has {rows} rows of expression and pose, but cfg.yaml says "
            f"{', '.join(f'exp_deca_{key}: {value}' for key, value in said.items())}; give the "
            "cfg.yaml that belongs to the checkpoint"
        )
    return {"clone": clone, **flags}


def _flag(cfg_yaml: str, key: str) -> bool | None:
    """The value of `key: true|false` in cfg.yaml, in its part for the detail stage if it has
    one; None where the file does not say."""
    part = re.search(rf"^{STAGE}:\s*\n((?:[ #].*\n|\n)*)", cfg_yaml + "\n", re.MULTILINE)
    text = part[1] if part else cfg_yaml
    found = re.search(rf"^\s*{key}:\s*(true|false)\b", text, re.MULTILINE | re.IGNORECASE)
    return found[1].lower() == "true" if found else None
