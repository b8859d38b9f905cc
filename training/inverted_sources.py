"""The x_T of source pictures by networks that do not move any more, each made once and kept on disk.

Stage `sampler` renders from the source's own x_T. To invert a picture takes more passes of the
network than a training step through the sampler, and a source comes back in every epoch.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import shutil
import uuid
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import numpy.typing as npt
import torch
from torch import nn

from diffusionact.schedule import Prediction, inversion_timesteps
from diffusionact.training.config import Recipe
from diffusionact.training.diffusion import invert, to_batch
from diffusionact.training.state import State

log = logging.getLogger(__name__)

U8 = npt.NDArray[np.uint8]
F32 = npt.NDArray[np.float32]

FORMAT = 1
KEEP_FREE_BYTES = 2 << 30  # of the disk: a full one would end the run at its next checkpoint


@dataclass(frozen=True)
class Inverter:
    """Frozen networks that turn pictures into their x_T: DDIM backwards, under the picture's own
    code. In float32 on any device: all that is rendered from an x_T has its errors."""

    unet: nn.Module
    encoder: nn.Module
    prediction: Prediction
    timesteps: tuple[int, ...]
    device: torch.device

    @torch.no_grad()
    def __call__(self, images: U8) -> F32:
        """Returns x_T float32 [B,3,S,S] of pictures uint8 [B,S,S,3] RGB.

        Source: DiffusionAct, Eq. 2, under the semantic code z_s of the source.
        """
        x_0 = to_batch(images, self.device)
        with torch.autocast(self.device.type, enabled=False):
            x_T = invert(self.unet, self.prediction, x_0, self.encoder(x_0), self.timesteps)
        return np.ascontiguousarray(x_T.cpu().numpy())

    def digest(self) -> str:
        """Returns the SHA-256 of all that x_T depends on beside the picture."""
        settings = [FORMAT, self.prediction, *self.timesteps]
        found = hashlib.sha256(json.dumps(settings).encode())
        for network in (self.encoder, self.unet):
            for name, tensor in sorted(network.state_dict().items()):
                found.update(name.encode())
                found.update(tensor.cpu().contiguous().numpy().tobytes())
        return found.hexdigest()


class InvertedSources:
    """The x_T of source pictures, each inverted when it is first asked for and kept in a file.

    Files are named by the picture, their folder by networks and timesteps: none can be out of
    date, and runs and processes may share them.
    """

    def __init__(self, folder: Path, inverter: Inverter, most_gb: float) -> None:
        self._inverter, self._most_bytes = inverter, most_gb * 1e9
        self._folder = folder / inverter.digest()[:16]
        self._folder.mkdir(parents=True, exist_ok=True)
        self._bytes = sum(file.stat().st_size for file in self._folder.rglob("*.npy"))
        self._keeps = True

    def __call__(self, images: U8) -> F32:
        """Returns x_T float32 [B,3,S,S] of pictures uint8 [B,S,S,3] RGB."""
        names = [hashlib.sha256(image.tobytes()).hexdigest() for image in images]
        count, side, _, colours = images.shape
        found = {name: self._read(name, (colours, side, side)) for name in names}
        new = [name for name, x_T in found.items() if x_T is None]
        if new:
            made = self._inverter(images[[names.index(name) for name in new]])
            for name, x_T in zip(new, made, strict=True):
                found[name] = x_T
                self._keep(name, x_T)
        return np.stack([x_T for name in names if (x_T := found[name]) is not None])

    def _path(self, name: str) -> Path:
        return self._folder / name[:2] / f"{name[2:]}.npy"

    def _read(self, name: str, shape: tuple[int, ...]) -> F32 | None:
        """x_T of a picture; None where there is no whole file of it."""
        try:
            x_T: F32 = np.load(self._path(name))
        except (OSError, ValueError, EOFError):
            return None
        return x_T if x_T.shape == shape and x_T.dtype == np.float32 else None

    def _keep(self, name: str, x_T: F32) -> None:
        if not self._keeps:
            return
        path = self._path(name)
        part = path.with_name(f".part-{uuid.uuid4().hex}.npy")  # another process may write it too
        try:
            if shutil.disk_usage(self._folder).free < KEEP_FREE_BYTES:
                raise OSError(f"less than {KEEP_FREE_BYTES >> 30} GiB free")
            if self._bytes + x_T.nbytes > self._most_bytes:
                raise OSError(f"[inversions] most_gb = {self._most_bytes / 1e9:g} are full")
            path.parent.mkdir(exist_ok=True)
            np.save(part, x_T)
            os.replace(part, path)
            self._bytes += x_T.nbytes
        except OSError as error:
            part.unlink(missing_ok=True)
            self._keeps = False
            log.warning(
                "%s: %s; sources not inverted so far are inverted anew each time, which takes long",
                self._folder, error,
            )  # fmt: skip


def inverted_sources(
    state: State, recipe: Recipe, run_folder: Path, device: torch.device
) -> InvertedSources:
    """Returns the x_T of sources by the networks of a run that invert."""
    steps, kind = recipe.inversions.steps, state.config.prediction
    at = inversion_timesteps(kind, steps) if isinstance(steps, int) else steps
    inverter = Inverter(
        state.inverter, state.ema["encoder"], kind, tuple(int(t) for t in at), device
    )
    folder = Path(recipe.inversions.folder or run_folder / "inversions")
    return InvertedSources(folder, inverter, recipe.inversions.most_gb)
