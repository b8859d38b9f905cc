"""The networks of a run, their moving averages, how far the run is, and its checkpoint file."""

from __future__ import annotations

import copy
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, cast

import torch
from torch import Tensor, nn

from diffusionact.errors import SettingsError
from diffusionact.training import savepoints, weights
from diffusionact.training.config import Recipe
from diffusionact.training.critics import Critics
from diffusionact.training.losses import Heads, HeadTargets
from diffusionact.training.models import PRESETS, ReenactmentEncoder, SemanticEncoder, UNet
from diffusionact.training.models.config import NetworkConfig
from diffusionact.training.teacher import Teacher
from diffusionact.training.weights_folder import MODEL_FILE

log = logging.getLogger(__name__)

BACKGROUND = 1 / 127.5 - 1  # of a drawing, as the network sees it


@dataclass
class Progress:
    """Where the run is: the stage, and within it steps, images and seconds so far; `seen` counts
    the images of the whole run."""

    stage: int = 0
    step: int = 0
    images: int = 0
    seconds: float = 0.0
    seen: int = 0

    def next_stage(self) -> None:
        self.stage, self.step, self.images, self.seconds = self.stage + 1, 0, 0, 0.0


def _start(recipe: Recipe) -> weights.Weights:
    """The weights to begin from: those of a run, of a bundle, or of a folder that `diffusionact
    import` wrote.

    Raises:
        SettingsError: there are none, or without the encoder that says what a picture's z is.
    """
    path = Path(recipe.start)
    imported = path / MODEL_FILE
    found = weights.load(imported if imported.is_file() else path)
    if "encoder" not in found.parts and any(s.kind != "student" for s in recipe.stages):
        raise SettingsError(
            f"start = {recipe.start!r}: has no semantic encoder, only "
            f"{', '.join(sorted(found.parts))}, from which only a student can begin; the encoder is "
            "in the weights of a run, and in the Diffusion Autoencoder's file: diffusionact import "
            "diffusionact_model.pt --diffae last.ckpt -o WEIGHTS"
        )
    return found


class State:
    """`live` are the networks that the optimiser moves, `ema` their moving averages, without
    dropout; `invert` the U-Net that inverts, where it is not the one that renders; `teacher` whom a
    student learns from, `before` the averages as a round of progressive distillation found them;
    `critics` the frozen networks of the losses, where a stage asks them;
    `earlier_recipes` the digests, oldest first, of the recipes that the run began under."""

    def __init__(self, recipe: Recipe, targets: HeadTargets, device: torch.device) -> None:
        if recipe.network.lower() not in PRESETS:
            raise SettingsError(f"network = {recipe.network!r}, wanted one of {', '.join(PRESETS)}")
        config = PRESETS[recipe.network.lower()]
        torch.manual_seed(recipe.seed)
        live = nn.ModuleDict({
            "unet": UNet(config),
            "encoder": SemanticEncoder(config),
            "reenactment": ReenactmentEncoder(config),
            "heads": Heads(config.embed, targets),
            **({"inverter": UNet(config)} if any(s.inverter for s in recipe.stages) else {}),
        })  # fmt: skip
        self.config: NetworkConfig = config
        live.to(memory_format=torch.channels_last)  # type: ignore[call-overload]  # not in stubs
        self.live = live.to(device)
        self.ema = copy.deepcopy(self.live).requires_grad_(False).eval()
        self.invert: nn.Module | None = None
        self.teacher: Teacher | None = None
        self.before: nn.ModuleDict | None = None
        self.critics: Critics | None = None
        self.progress = Progress()
        self.earlier_recipes: list[str] = []
        self.optimizer: torch.optim.Optimizer | None = None
        self._memory: dict[str, Tensor] = {}  # of the optimiser, from a checkpoint
        self.has_reenactment = False
        if recipe.start:
            self._start_from(_start(recipe))

    def _start_from(self, start: weights.Weights) -> None:
        """Takes over the networks of finished weights; the heads begin anew."""
        if start.config != self.config:
            raise SettingsError(
                f"start: weights of {start.config}, wanted {self.config}; name another file, or "
                "remove `start` to begin from random weights"
            )
        names = {"render": "unet", "encoder": "encoder", "reenactment": "reenactment"}
        if "inverter" in self.live:
            self._take(start.network("invert" if "invert" in start.parts else "render"), "inverter")
        for part, name in names.items():
            if part not in start.parts and part != "render":
                continue  # an autoencoder has no reenactment encoder yet, a bundle no other
            self._take(start.network(part), name)
        self.has_reenactment = "reenactment" in start.parts
        if "invert" in start.parts:
            self._invert_with(start.network("invert").state_dict())

    def _take(self, network: nn.Module, name: str) -> None:
        for networks in (self.live, self.ema):
            networks[name].load_state_dict(network.state_dict())

    @property
    def heads(self) -> Heads:
        """The live heads on z."""
        return cast(Heads, self.live["heads"])

    @property
    def unet(self) -> UNet:
        """The live U-Net."""
        return cast(UNet, self.live["unet"])

    @property
    def inverter(self) -> nn.Module:
        """The U-Net that makes x_T of a source."""
        own = self.ema["inverter" if "inverter" in self.ema else "unet"]
        return own if self.invert is None else self.invert

    def keep_inverter(self) -> None:
        """Lets the U-Net invert as it does now, whatever becomes of the one that renders.

        Source: DiffusionAct code, whose inversion keeps the weights from before fine-tuning.
        """
        if self.invert is None:
            self._invert_with(self.ema["unet"].state_dict())

    def keep_before(self, names: Sequence[str]) -> None:
        """Keeps these averages as they are now: the teacher of a round."""
        kept = {name: copy.deepcopy(self.ema[name]) for name in names}
        self.before = nn.ModuleDict(kept)

    def _invert_with(self, values: dict[str, Tensor]) -> None:
        self.invert = copy.deepcopy(self.ema["unet"])
        self.invert.load_state_dict(values)

    def start_reenactment(self, gain: float) -> None:
        """Sets the reenactment encoder to the averaged semantic encoder, and its drawing input to
        `gain` times the drawing, its background at 0.

        Source: DiffusionAct, the initialisation of the reenactment encoder, where the gain is 0;
        in a short run the drawing is then never found.
        """
        self.has_reenactment = True
        self.restart_from_average()
        encoder = self.ema["encoder"].state_dict()
        for networks in (self.live, self.ema):
            reenactment = cast(ReenactmentEncoder, networks["reenactment"])
            reenactment.controlnet.load_state_dict(encoder)
            drawing = cast(nn.Conv2d, reenactment.zero_conv_1)
            with torch.no_grad():
                drawing.weight.copy_(gain * torch.eye(3)[:, :, None, None])
                cast(Tensor, drawing.bias).fill_(-gain * BACKGROUND)

    def restart_from_average(self) -> None:
        """Sets the live networks to their averages."""
        self.live.load_state_dict(self.ema.state_dict())

    @torch.no_grad()
    def average(self, decay: float, names: list[str]) -> None:
        """Moves the averages of the networks `names` by one step."""
        for name in names:
            averaged = [p.data for p in self.ema[name].parameters()]
            fresh = [p.data for p in self.live[name].parameters()]
            torch._foreach_lerp_(averaged, fresh, 1 - decay)

    def tensors(self) -> dict[str, Tensor]:
        """Returns all that a checkpoint holds of the networks and the optimiser, by name."""
        found: dict[str, Tensor] = {}
        for part, network in self._parts().items():
            found |= savepoints.named(part, network.state_dict().items())
        if self.optimizer is not None:
            memory = savepoints.optimizer_tensors(self.optimizer, self._names())
            found |= savepoints.named("optimizer", memory.items())
        return found

    def record(self, recipe: Recipe) -> dict[str, Any]:
        """Returns what a checkpoint says beside the tensors, as JSON values."""
        return {"recipe": recipe.digest, "earlier_recipes": self.earlier_recipes,
                "progress": vars(self.progress),
                "has_reenactment": self.has_reenactment}  # fmt: skip

    def load(self, path: Path, recipe: Recipe) -> dict[str, Any]:
        """Takes over the checkpoint, but for the optimiser's memory, which waits for the optimiser;
        returns its record. A recipe that was edited since is taken, with a warning.

        Raises:
            SettingsError: it is of another format or network.
        """
        tensors, content = savepoints.read(path)
        self.invert = self.before = None  # a stage may have put away what `start` had
        try:
            if kept := savepoints.under("invert", tensors):
                self._invert_with(kept)
            if before := savepoints.under("before", tensors):
                self.keep_before(sorted({name.split(".")[0] for name in before}))
            for part, network in self._parts().items():
                network.load_state_dict(savepoints.under(part, tensors))
        except RuntimeError as error:
            raise SettingsError(f"{path} holds another network than the recipe: {error}") from error
        self._memory = savepoints.under("optimizer", tensors)
        self.progress = Progress(**content["progress"])
        self.has_reenactment = content["has_reenactment"]
        self.earlier_recipes = content["earlier_recipes"]
        if content["recipe"] != recipe.digest:
            self.earlier_recipes.append(content["recipe"])
            log.warning(
                "%s was saved under recipe %s and goes on under %s: the run is no longer what "
                "either of them says alone; the weights will name both",
                path, content["recipe"], recipe.digest,
            )  # fmt: skip
        return content

    def optimize_with(self, optimizer: torch.optim.Optimizer) -> None:
        """Takes the optimiser, which remembers from here what the checkpoint holds of it, if the
        state was just loaded.

        Raises:
            SettingsError: the checkpoint's stage trains other parameters.
        """
        self.optimizer, memory, self._memory = optimizer, self._memory, {}
        try:
            savepoints.restore_optimizer(optimizer, self._names(), memory)
        except KeyError as error:
            raise SettingsError(
                f"the checkpoint remembers {error}, which the stage does not train: the recipe's "
                "stages were changed; begin anew, with `start` and another folder"
            ) from error

    def _parts(self) -> dict[str, nn.Module]:
        parts = {"live": self.live, "ema": self.ema, "invert": self.invert, "before": self.before}
        return {name: network for name, network in parts.items() if network is not None}

    def _names(self) -> dict[Tensor, str]:
        return {parameter: name for name, parameter in self.live.named_parameters()}
