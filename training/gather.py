"""What a loss needs to know of the other processes' samples."""

from __future__ import annotations

import torch
from torch import Tensor, distributed


@torch.no_grad()
def gathered(rows: Tensor) -> Tensor:
    """Returns the rows [n,...] of all processes, [processes * n,...], in their order in the batch;
    without a gradient. Every process must ask, with as many rows: a statistic of the batch is then
    that of the whole batch, however it is split."""
    if not distributed.is_initialized() or distributed.get_world_size() == 1:
        return rows.detach()
    parts = [torch.empty_like(rows) for _ in range(distributed.get_world_size())]
    distributed.all_gather(parts, rows.detach().contiguous())
    return torch.cat(parts)
