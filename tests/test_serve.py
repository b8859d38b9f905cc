"""The server of the page: what visitors get, what they do not, and what strangers may not."""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from diffusionact.landmarks import Landmarks
from diffusionact.runtime.reenactor import Reenactor, Settings
from diffusionact.runtime.web.server import Site
from tests.pages import Browser, Page, Picture, serving, shipped_track

UInt8Array = npt.NDArray[np.uint8]
Portrait = tuple[UInt8Array, Landmarks]
FRAME_US = 40_000
TRACK = shipped_track()
SIDE = float(max(TRACK.size))
TOKEN = "a token of more than sixteen"


@pytest.fixture(scope="module")
def act(toy_bundle: Path) -> Iterator[Reenactor]:
    with Reenactor.load(toy_bundle, settings=Settings(threads=1, backend="ort")) as act:
        yield act


def visit(
    act: Reenactor,
    use: Callable[[Browser], Awaitable[None]],
    site: Site | None = None,
    **studio: object,
) -> None:
    """Run one story against a server of its own."""

    async def story() -> None:
        async with serving(act, site or Site(), **studio) as browser:
            await use(browser)

    asyncio.run(story())


async def drive(page: Page, frames: range) -> list[Picture]:
    return [await page.drive(TRACK[i], SIDE, i, i * FRAME_US) for i in frames]


def test_a_session_follows_its_driver_and_echoes_what_it_was_sent(act: Reenactor) -> None:
    async def use(browser: Browser) -> None:
        async with browser.page() as page:
            await page.begin()
            pictures = await drive(page, range(1, 61))
        assert [p.frame for p in pictures] == list(range(1, 61))
        assert [p.captured_us for p in pictures] == [i * FRAME_US for i in range(1, 61)]
        assert all(p.seen for p in pictures)
        # The neutral face is the first second's: at rest until then, moving after.
        assert pictures[5].neutral and not pictures[-1].neutral
        assert np.array_equal(pictures[5].image, pictures[6].image)
        assert not np.array_equal(pictures[-1].image, pictures[-10].image)
        for picture in pictures:
            m = picture.moments
            spent = m.track_ns + m.wait_ns + m.render_ns + m.encode_ns
            assert abs(m.sent_ns - m.received_ns - spent) < 10_000  # us, rounded one by one

    visit(act, use)
