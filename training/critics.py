"""The frozen networks that judge a picture while a generator learns.

Our own small one for rendered faces (`models.guide`) and published files may be mixed: of what
both read, the published one is asked. All pass gradients towards the picture and none into
themselves.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from typing_extensions import Self

from diffusionact import morphable
from diffusionact.errors import SettingsError
from diffusionact.training import critic_inputs as inputs
from diffusionact.training import published
from diffusionact.training.config import CriteriaRecipe, CriticRecipe
from diffusionact.training.imports import emoca_files
from diffusionact.training.models.frozen import CRITICS, Emoca, FrozenNetwork, Gaze, flame
from diffusionact.training.models.frozen.bisenet import BACKGROUND
from diffusionact.training.models.frozen.bisenet import SIDE as MASK_SIDE
from diffusionact.training.models.guide import Guide, load_guide
from diffusionact.training.origins import ORIGINS
from diffusionact.training.tensor_table import Findings, group, unwrapped

LOG = logging.getLogger(__name__)
T = TypeVar("T")

# Loss of [criteria] -> the file of [critics] that it asks; the pixels ask none.
ASKS = {
    "perceptual": "vgg19",
    "identity": "arcface",
    "style": "farl",
    "background": "bisenet",
    "shape": "emoca",
    "gaze": "xgaze",
    "head_pose": "emoca",
}
KINDS = {"xgaze": "gaze"}  # field of [critics] -> name in origins.ORIGINS, where they differ
# What the guide reads.
GUIDES = frozenset({"perceptual", "identity", "style", "shape", "gaze", "head_pose"})
EXACT_BACKGROUND = 0  # the renderer's label


@dataclass(frozen=True)
class Reading:
    """What the critics read off B pictures; None is what nobody asked.

    features: maps [B,C,H,W]; identity: [B,E], of length 1; style: [B,E]; landmarks: [B,68,2] px
    (of the guide's picture, or of EMOCA's crop); gaze: [B,2] radians; head_pose: [B,3] yaw,
    pitch, roll, degrees.
    """

    features: list[Tensor] | None = None
    identity: Tensor | None = None
    style: Tensor | None = None
    landmarks: Tensor | None = None
    gaze: Tensor | None = None
    head_pose: Tensor | None = None


class Critics(nn.Module):
    """The networks by their field in [critics]; always in evaluation, never with a gradient.

    Pictures x: float [B,3,S,S], RGB, -1..1; points: float [B,68,2] px, where the face is in x,
    which places the crops of published networks (None: as in FFHQ's crop; EMOCA: all of x).
    """

    def __init__(self, networks: Mapping[str, nn.Module]) -> None:
        super().__init__()
        self.networks = nn.ModuleDict(dict(networks))
        self.requires_grad_(False).eval()

    def train(self, mode: bool = True) -> Self:
        """Itself, in evaluation: what is around it may train."""
        return super().train(False)

    def features(self, x: Tensor) -> list[Tensor]:
        """Maps that say how alike two pictures look: [B,C,H,W], finest first."""
        return _given(self.read(x, asked=frozenset({"perceptual"})).features)

    def identity(self, x: Tensor, points: Tensor | None = None) -> Tensor:
        """Who it is: [B,E], of length 1."""
        return _given(self.read(x, points, frozenset({"identity"})).identity)

    def style(self, x: Tensor) -> Tensor:
        """How it looks: [B,E]."""
        return _given(self.read(x, asked=frozenset({"style"})).style)

    def landmarks(self, x: Tensor, points: Tensor | None = None) -> Tensor:
        """The 68 landmarks: [B,68,2] px, of the guide's picture or of EMOCA's crop of 224 px."""
        return _given(self.read(x, points, frozenset({"shape"})).landmarks)

    def gaze(self, x: Tensor, points: Tensor | None = None) -> Tensor:
        """Where it looks: [B,2] radians, pitch and yaw by ETH-XGaze, yaw and pitch by the guide."""
        return _given(self.read(x, points, frozenset({"gaze"})).gaze)

    def head_pose(self, x: Tensor, points: Tensor | None = None) -> Tensor:
        """How the head is turned: [B,3] yaw, pitch, roll, degrees."""
        return _given(self.read(x, points, frozenset({"head_pose"})).head_pose)

    def background(self, x: Tensor, labels: Tensor | None) -> Tensor:
        """How far each pixel is background: [B,1,S,S], 0..1.

        labels: integer [B,S,S], the renderer's regions, whose mask is exact; None: BiSeNet's.
        Raises: SettingsError: there are neither labels nor BiSeNet.
        """
        if labels is not None:
            return (labels == EXACT_BACKGROUND)[:, None].to(x.dtype)
        if "bisenet" not in self.networks:
            raise missing("background")
        share = self.networks["bisenet"](inputs.for_bisenet(x, MASK_SIDE)).softmax(1)
        return F.interpolate(
            share[:, BACKGROUND : BACKGROUND + 1], x.shape[2:], mode="bilinear", antialias=True
        )

    def read(
        self, x: Tensor, points: Tensor | None = None, asked: frozenset[str] = GUIDES
    ) -> Reading:
        """What the losses `asked` (names of [criteria]) need of x, each network run once.

        Raises: SettingsError: a network is not there, or x is not of the guide's size.
        """
        asked = asked & GUIDES
        by_guide = {loss for loss in asked if ASKS[loss] not in self.networks}
        if by_guide and "guide" not in self.networks:
            raise missing(*sorted(by_guide))
        found = self._ask_guide(x, by_guide) if by_guide else {}
        nets, by_file = self.networks, asked - by_guide
        if "perceptual" in by_file:
            found["features"] = list(nets["vgg19"](inputs.imagenet(x)))
        if "identity" in by_file:
            arcface: Any = nets["arcface"]
            found["identity"] = arcface(inputs.for_arcface(x, points, arcface.side))
        if "style" in by_file:
            farl: Any = nets["farl"]
            found["style"] = farl(inputs.for_farl(x, farl.sizes["side"]))
        if "gaze" in by_file:
            found["gaze"] = nets["xgaze"](inputs.for_gaze(x, points, Gaze.INPUT[-1]))
        if by_file & {"shape", "head_pose"}:
            face = nets["emoca"](inputs.for_emoca(x, points))
            wanted = {"landmarks": "shape", "head_pose": "head_pose"}
            found |= {n: v for n, v in zip(wanted, face, strict=True) if wanted[n] in by_file}
        return Reading(**found)

    def _ask_guide(self, x: Tensor, asked: set[str]) -> dict[str, Any]:
        guide: Any = self.networks["guide"]
        side = guide.config.image_size
        factor, rest = divmod(side, x.shape[-1])
        if rest or not factor:
            raise SettingsError(
                f"[critics]: guide reads pictures of {side} px, these have {x.shape[-1]}; give a "
                "guide that was trained at that size, or published files"
            )
        if factor > 1:  # small pictures are enlarged: it still reads them, if less exactly
            x = F.interpolate(x, scale_factor=factor, mode="bicubic", align_corners=False)
        seen = guide(x)
        reading = {
            "features": ("perceptual", guide.scaled(seen.maps)),
            "identity": ("identity", F.normalize(seen.person, dim=1)),
            "style": ("style", guide.style_of(seen.maps)),
            "landmarks": ("shape", seen.points),
            "gaze": ("gaze", seen.gaze),
            "head_pose": ("head_pose", seen.pose),
        }
        return {name: value for name, (loss, value) in reading.items() if loss in asked}


class FaceModel(nn.Module):
    """EMOCA's codes, and what FLAME makes of them.

    Source: DiffusionAct, Eq. 7, and the Euler angles of its head pose loss.
    """

    def __init__(self, network: nn.Module, model: morphable.Flame) -> None:
        """network: picture [B,3,224,224] -> shape, expression, pose and camera, as `Emoca`."""
        super().__init__()
        self.network = network
        self._model = model
        self._names: list[str] = []
        model.map(self._keep)

    def forward(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Landmarks [B,68,2], px of the crop, and yaw, pitch, roll [B,3], degrees.

        image: float [B,3,224,224], RGB, 0..1
        """
        shape, expression, pose, camera = self.network(image)
        held = iter(self._names)
        model = self._model.map(lambda _: self.get_buffer(next(held)))
        points = morphable.flame_pixels(model.landmarks(shape, expression, pose), camera)
        # FLAME's axes are y up and z towards the camera, those of the angles y down and z away
        flip = torch.tensor([1.0, -1.0, -1.0], dtype=pose.dtype, device=pose.device)
        turn = morphable.axis_angle(pose[:, :3]) * flip[:, None] * flip
        return points[..., :2], morphable.angles(turn)

    def _keep(self, values: Any) -> Tensor:
        """The values as a buffer, which follows the module from device to device."""
        name = f"flame_{len(self._names)}"
        self._names.append(name)
        tensor = torch.from_numpy(np.array(values, np.float32))
        self.register_buffer(name, tensor, persistent=False)
        return tensor


def open_critics(
    recipe: CriticRecipe,
    weights: CriteriaRecipe,
    device: torch.device | str = "cpu",
    masks: bool = True,
) -> Critics:
    """The critics that the weights above 0 ask, on the device; no other file is opened.

    masks: the dataset has exact masks of the background.
    Raises: SettingsError: a network is missing, or a file is damaged or another one.
    """
    asked = {loss for loss in ASKS if getattr(weights, loss) > 0}
    if masks and not recipe.bisenet:
        asked.discard("background")
    by_guide = GUIDES if recipe.guide else frozenset()
    if lost := [n for n in ASKS if n in asked and n not in by_guide and not _file(recipe, n)]:
        raise missing(*lost)
    given = {n: Path(_file(recipe, n)) for n in ASKS if n in asked and _file(recipe, n)}
    if lost := [n for n, path in given.items() if not path.exists()]:
        raise missing(*lost, seen=given)
    networks: dict[str, nn.Module] = {}
    for field in sorted({ASKS[loss] for loss in asked}):
        if path := getattr(recipe, field):
            networks[field] = _opened(field, Path(path))
    if any(loss in GUIDES and ASKS[loss] not in networks for loss in asked):
        guide: Guide = load_guide(recipe.guide)
        networks["guide"] = guide
    return Critics(networks).to(device)


def missing(*losses: str, seen: Mapping[str, Path] | None = None) -> SettingsError:
    """The error that names the files which losses ask, their licences, and the ways on.

    seen: loss -> the file that the recipe names, and that is not there."""
    named = {ASKS[loss]: str(path) for loss, path in (seen or {}).items()}
    asking: dict[str, list[str]] = {}
    for loss in losses:
        asking.setdefault(ASKS[loss], []).append(loss)
    said = [
        f'{field} = "{named.get(field, "FILE")}" for {" and ".join(names)}'
        f"{' (no such file)' if field in named else ''}: {ORIGINS[KINDS.get(field, field)].told()}"
        for field, names in asking.items()
    ]
    ways = ["give them in [critics]", f"leave the losses out ({losses[0]} = 0 in [criteria])"]
    if GUIDES & {*losses}:
        guide = 'guide = "training/checkpoints/guide.safetensors" in [critics]'
        ways.append(f"on rendered faces give our own network instead ({guide})")
    if "background" in losses:
        ways.append("for background take a dataset with masks (rendered faces have them)")
    return SettingsError(
        "losses of [criteria] ask networks that are not there:\n  " + "\n  ".join(said)
        + "\nThe ways on: " + "; or ".join(ways)
    )  # fmt: skip


def _file(recipe: CriticRecipe, loss: str) -> str:
    """The published file that a loss asks, as the recipe gives it."""
    return str(getattr(recipe, ASKS[loss]))


def _opened(field: str, path: Path) -> nn.Module:
    """The network of a published file."""
    kind = KINDS.get(field, field)
    files, cfg_yaml = emoca_files(path) if field == "emoca" else ((path,), "")
    findings = Findings(files[-1], kind)
    content = published.content_of(findings)
    inside = {"emoca": "state_dict", "farl": "state_dict", "gaze": "model_state"}.get(kind)
    state = group(findings, content, inside) if inside else unwrapped(findings, content, "the file")
    network: FrozenNetwork
    if kind == "emoca":
        network = Emoca.from_published(state, cfg_yaml)
        model = morphable.flame_from(flame.reduced(flame.from_emoca(state)))
    else:
        network = (Gaze if kind == "gaze" else CRITICS[kind]).from_published(state)
    for text in findings.warnings:
        LOG.warning("%s", text)
    assert network.counts is not None
    LOG.info("%s: %s, %d of %d tensors used", field, files[-1].name, network.counts.used,
             network.counts.total)  # fmt: skip
    return FaceModel(network, model) if kind == "emoca" else network


def _given(value: T | None) -> T:
    assert value is not None  # `read` gives what is asked, or raises
    return value
