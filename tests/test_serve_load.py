"""What the load on the server of the page counts; and, slow, a soak of it."""

from __future__ import annotations

import asyncio
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any, cast

import pytest

from benchmarks.serve_load import COUNT, Client, Driver, options, replay
from diffusionact.runtime.web.messages import Moments
from tests.chromium import FOUND, chromium
from tests.pages import Page, Picture


class Answers:
    """A page that is told whether its faces were seen: leave for a frame, then its picture."""

    def __init__(self, seen: Sequence[bool]) -> None:
        self._heard: list[Picture | None] = []
        for frame, was_seen in enumerate(seen, start=1):
            moments = Moments(0, 1000, 0, 0, 0, 0, steps=4)
            self._heard += [None, Picture(frame, frame, was_seen, False, moments, b"")]
        self.socket = self

    async def begin(self, portrait: str, transport: str) -> None:
        """At once."""

    async def send_bytes(self, data: bytes) -> None:
        """Taken."""

    async def hear(self) -> Picture | dict[str, Any] | None:
        await asyncio.sleep(0.001)
        if not self._heard:
            raise ConnectionError
        return self._heard.pop(0)


def test_a_picture_of_nobody_is_no_face(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("benchmarks.serve_load.WARM_S", 0.0)
    page = cast(Page, Answers([True] * 5 + [False] * 3 + [True] * 2))
    client = Client(Driver("landmarks"), 0.0)
    with pytest.raises(ConnectionError):
        asyncio.run(client.run(page, "landmarks", "ada", float("inf")))
    assert len(client.stages) == len(client.recent) == client.steps[4] == 7
    assert client.unseen == 3


@pytest.mark.skipif(FOUND is None, reason="no chromium: apt-get install chromium")
@pytest.mark.slow
def test_what_a_browser_draws_is_a_face_where_the_page_says_so(tmp_path: Path) -> None:
    async def counted() -> Any:
        async with chromium(tmp_path / "no-camera.mjpeg") as browser:
            tab = await browser.tab("about:blank")
            await tab.run(
                "document.body.innerHTML = '<p id=status></p><canvas id=screen></canvas>"
                "<canvas id=own></canvas>'; 0"
            )
            await tab.run(COUNT)
            for canvas, status in (
                *[("screen", "Live")] * 3,
                ("own", "Live"),
                ("screen", "No face"),
            ):
                await tab.run(
                    f"document.querySelector('#{canvas}').getContext('2d')"
                    f".drawImage(document.querySelector('#own'), 0, 0);"
                    f"document.querySelector('#status').textContent = '{status}'; 0"
                )
            return await tab.run("globalThis.shown")

    assert asyncio.run(counted()) == [3, 1]


@pytest.mark.skipif(sys.platform != "linux", reason="figures are of /proc")
@pytest.mark.slow
@pytest.mark.timeout(400)
def test_a_minute_and_a_half_of_four_visitors_is_flat() -> None:
    words = ["--clients", "4", "--fps", "10", "--seconds", "90", "--soak", "--quiet"]
    report = asyncio.run(replay(options().parse_args(words)))
    assert report["soak"]["flat"], report
    assert report["soak"]["faces"] > 120 and all(rate > 0.3 for rate in report["each"]), report
