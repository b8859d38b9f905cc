"""When to ask a page for its next frame: so that it comes just when the renderer is free for it."""

from __future__ import annotations

GAIN = 0.5  # of what the last frame was early or late, how much the next one is asked for otherwise
EARLY_MS = 2.0  # a little early: an idle renderer costs frames, a waiting frame only age


class Pace:
    """One visitor's. A frame asked for too early waits, and shows what is past; one asked for too
    late leaves the renderer idle. Network, page and other visitors decide how early is right:
    it is learned from every frame."""

    def __init__(self) -> None:
        self.delay_ms = 0.0  # from the begin of one frame's rendering to the asking for the next

    def learn(self, ready_ns: int, begun_ns: int, free_ns: int, round_ns: int) -> None:
        """Return nothing. ready_ns: when the frame was there; begun_ns: when its rendering began;
        free_ns: when the renderer had last ended something; round_ns: what one frame of each
        visitor takes. A visitor is asked again within a round: one who waited behind the others
        would give way to them more and more."""
        if ready_ns < free_ns:
            early_ms = (begun_ns - ready_ns) / 1e6
        else:
            early_ms = (free_ns - ready_ns) / 1e6  # negative: it was waited for
        change = GAIN * (early_ms - EARLY_MS)
        self.delay_ms = min(max(self.delay_ms + change, 0.0), round_ns / 1e6)
