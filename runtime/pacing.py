"""Which of a camera's frames are tracked when the renderer is slower than the camera.

Of the faces that become ready while it renders, the renderer takes the newest; the others were
tracked for nothing, on the processor that it renders with.
"""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

RECENT = 16  # frames, whose median is expected of the next


class Pacing:
    """Leaves out a frame when the next one's face will still be ready before it can be rendered.

    One thread tracks, one renders. All times are ns of the monotonic clock.
    """

    def __init__(self) -> None:
        self._captured_ns: int | None = None
        self._free_ns: int | None = None  # when the renderer will be; None: it is, or nobody knows
        self._periods, self._tracks, self._renders = (deque[int](maxlen=RECENT) for _ in range(3))

    def leaves_out(self, captured_ns: int, now_ns: int) -> bool:
        """Return whether the frame captured at captured_ns, in hand now, is not worth tracking."""
        if self._captured_ns is not None:
            self._periods.append(captured_ns - self._captured_ns)
        self._captured_ns, free_ns = captured_ns, self._free_ns
        if free_ns is None or not self._periods or not self._tracks:
            return False
        return now_ns + _median(self._periods) + _median(self._tracks) < free_ns

    @contextmanager
    def tracking(self) -> Iterator[None]:
        """The tracker works on a frame."""
        begun_ns = time.monotonic_ns()
        yield
        self._tracks.append(time.monotonic_ns() - begun_ns)

    @contextmanager
    def rendering(self) -> Iterator[None]:
        """The renderer works on a face."""
        begun_ns = time.monotonic_ns()
        self._free_ns = begun_ns + _median(self._renders) if self._renders else None
        yield
        self._free_ns = None
        self._renders.append(time.monotonic_ns() - begun_ns)


def _median(times: Sequence[int]) -> int:
    """NumPy's way takes longer than all else here."""
    return sorted(times)[len(times) // 2]
