"""Exit statuses of the commands."""

from __future__ import annotations

DONE, FAILED, REFUSED, INTERRUPTED, TERMINATED = 0, 1, 2, 130, 143
