"""The golden weights and inputs, from their names and shapes alone.

Rule: bits = PCG64(crc32(name)), u = its top 24 of 40 bits in [0,1), v = 2u - 1. Weights of two or
more axes are v sqrt(3 / fan_in), of one axis (norms) 1 + 0.2 v; all other parameters 0.1 v.
Inputs of kind "image" are v, of kind "noise" and "code" v sqrt(3).
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Mapping, Sequence

import numpy as np
import numpy.typing as npt

F32 = npt.NDArray[np.float32]


def tensor(name: str, shape: Sequence[int], kind: str = "parameter") -> F32:
    """The tensor, float32, of a full name such as "state_dict_diff/model.out.2.weight"."""
    count = math.prod(shape)
    bits = np.random.PCG64(zlib.crc32(name.encode())).random_raw(count)
    v = 2.0 * ((bits >> np.uint64(40)).astype(np.float64) / 2**24) - 1.0
    if kind in ("noise", "code"):
        v *= math.sqrt(3.0)
    elif kind == "parameter":
        v = _parameter(v, name, shape)
    return v.astype(np.float32).reshape(tuple(shape))


def _parameter(
    v: npt.NDArray[np.float64], name: str, shape: Sequence[int]
) -> npt.NDArray[np.float64]:
    if not name.endswith(".weight"):
        return 0.1 * v
    return v * math.sqrt(3.0 / math.prod(shape[1:])) if len(shape) > 1 else 1.0 + 0.2 * v


def part(keys: Mapping[str, Sequence[int]], prefix: str) -> dict[str, F32]:
    """The parameters whose full name begins with `prefix`, under the rest of their name."""
    return {
        name.removeprefix(prefix): tensor(name, shape)
        for name, shape in keys.items()
        if name.startswith(prefix)
    }
