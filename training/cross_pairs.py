"""Pairs across people: whose face, and whose motion."""

from __future__ import annotations

import numpy as np

from diffusionact.errors import SettingsError
from diffusionact.training.data import Batch
from diffusionact.training.dataset import Dataset


class CrossSampler:
    """Draws batches of a source and another person's frame, whose motion it is to make: `target`
    shows that other person, and is what pose, expression and gaze are held against, nothing else.
    Batch `step` has its own random stream."""

    def __init__(self, pool: Dataset, identities: int, batch: int, seed: tuple[int, ...]) -> None:
        """identities: how many people, the first ones, are drawn from. Raises: SettingsError."""
        if identities < 2:
            raise SettingsError(f"{identities} people; pairs across people want at least 2")
        self.pool, self.identities, self.batch, self.seed = pool, identities, batch, seed

    def __call__(self, step: int) -> Batch:
        rng = np.random.default_rng((*self.seed, step))
        source = rng.integers(self.identities, size=self.batch)
        driver = (source + rng.integers(1, self.identities, size=self.batch)) % self.identities
        at, motion = (rng.integers(self.pool.count(who), size=self.batch) for who in
                      (source, driver))  # fmt: skip
        frames, size = self.pool.gather(driver, motion), self.pool.size
        return Batch(
            identity=source,
            frame=motion,
            target=frames.images,
            labels=frames.labels,
            points=frames.points,
            gaze=frames.gaze,
            parameters=frames.parameters,
            source=self.pool.pictures(source, at),
            condition=self.pool.cross((source, at), (driver, motion)),
            noise=np.empty((0, 3, size, size), np.float16),
            source_frame=at,
            mask=frames.mask,
            driver=driver,
        )
