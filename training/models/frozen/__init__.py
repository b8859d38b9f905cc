"""The published helper networks, only what inference needs. Needs torch.

NETWORKS are the tracker's, CRITICS those that only training asks (`training.critics`).

`NETWORKS[name].from_published(state_dict)` takes the state dict of the published file (for gaze
its `model_state`, for EMOCA the Lightning `state_dict` and, as `cfg_yaml`, the text of cfg.yaml),
accounts for every name in it, and gives the network, whose `counts` say what was used. Stored
weights are `network.state_dict()` and `network.config()`, and
`NETWORKS[name].from_tensors(tensors, config)` reads them.
"""

from __future__ import annotations

from collections.abc import Mapping

from diffusionact.training.models.frozen.arcface import ArcFace
from diffusionact.training.models.frozen.bisenet import BiSeNet
from diffusionact.training.models.frozen.emoca import Emoca
from diffusionact.training.models.frozen.fan import FAN
from diffusionact.training.models.frozen.farl import FaRL
from diffusionact.training.models.frozen.gaze import Gaze
from diffusionact.training.models.frozen.network import Counts, FrozenNetwork
from diffusionact.training.models.frozen.s3fd import S3FD
from diffusionact.training.models.frozen.vgg import VGG19

NETWORKS: Mapping[str, type[FrozenNetwork]] = {
    network.NAME: network for network in (S3FD, FAN, Emoca, Gaze)
}

CRITICS: Mapping[str, type[FrozenNetwork]] = {
    network.NAME: network for network in (VGG19, ArcFace, FaRL, BiSeNet)
}

__all__ = [
    "CRITICS",
    "FAN",
    "NETWORKS",
    "S3FD",
    "VGG19",
    "ArcFace",
    "BiSeNet",
    "Counts",
    "Emoca",
    "FaRL",
    "FrozenNetwork",
    "Gaze",
]
