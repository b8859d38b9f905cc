"""Which source is moved by whom: pairs at random with a fixed seed, and heads that are far apart."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from diffusionact.errors import SettingsError

CROSS_PAIRS = 35  # of the paper
CROSS_SEED = 0
LARGE_POSE_DEG = 15.0


@dataclass(frozen=True)
class Pair:
    """Indices of a source and of the one who drives it."""

    source: int
    driver: int


def random_pairs(
    identities: Sequence[str], count: int = CROSS_PAIRS, seed: int = CROSS_SEED
) -> list[Pair]:
    """Return `count` different pairs of different people, at random; all there are if fewer.

    The same people in the same order, count and seed give the same pairs on every machine.
    Raises: SettingsError for fewer than two people.
    """
    if len(set(identities)) < 2:
        raise SettingsError(
            f"{len(set(identities))} person; cross-subject pairs need clips of two or more people"
        )
    n = len(identities)
    order = np.random.default_rng(seed).permutation(n * n)
    pairs = (Pair(int(place) // n, int(place) % n) for place in order)
    chosen: list[Pair] = []
    for pair in pairs:
        if len(chosen) == count:
            break
        if identities[pair.source] != identities[pair.driver]:
            chosen.append(pair)
    return chosen


def far_apart(a: ArrayLike, b: ArrayLike, least_deg: float = LARGE_POSE_DEG) -> bool:
    """Return whether any of yaw, pitch and roll differs by more than `least_deg`; any pose when
    that is zero or less. a, b: [3] degrees."""
    if least_deg <= 0:
        return True
    difference = np.abs(np.asarray(a, np.float64) - np.asarray(b, np.float64)) % 360
    return bool(np.minimum(difference, 360 - difference).max() > least_deg)
