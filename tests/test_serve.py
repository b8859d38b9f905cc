"""The server of the page: what visitors get, and what they do not see of each other."""

from __future__ import annotations

import asyncio
import gc
import struct
import time
import weakref
from collections.abc import Iterator
from contextlib import AsyncExitStack
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from diffusionact.errors import BackendMissing
from diffusionact.landmarks import Landmarks
from diffusionact.runtime.control import Goal
from diffusionact.runtime.reenactor import Reenactor, Result
from diffusionact.runtime.session import Session
from diffusionact.runtime.settings import Settings
from diffusionact.runtime.source import Source
from diffusionact.runtime.web import messages
from diffusionact.runtime.web import studio as studio_module
from diffusionact.runtime.web.pictures import BadPicture, decode, size_of
from diffusionact.runtime.web.studio import Studio
from diffusionact.runtime.web.visitor import Close
from tests.live_parts import moved, steps_px, turning
from tests.pages import (
    FRAME_US,
    PATIENCE_S,
    SIDE,
    TRACK,
    Browser,
    FakeTracker,
    Page,
    drive,
    grey_frame,
    png,
    png_of_size,
    visit,
)

UInt8Array = npt.NDArray[np.uint8]
Portrait = tuple[UInt8Array, Landmarks]


@pytest.fixture(scope="module")
def act(toy_bundle: Path) -> Iterator[Reenactor]:
    settings = Settings(threads=1, backend="ort")
    with Reenactor.load(toy_bundle, settings=settings, tracker=FakeTracker([])) as act:
        yield act


# ---- sessions ----


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


def test_a_picture_says_how_many_steps_it_took(act: Reenactor) -> None:
    async def use(browser: Browser) -> None:
        async with browser.page() as page:
            await page.begin()
            (picture,) = await drive(page, range(1, 2))
        assert picture.moments.steps == act.steps == 4

    visit(act, use)


def test_a_studio_without_the_label_leaves_pictures_as_they_are(act: Reenactor) -> None:
    grey = np.full((96, 128, 3), 90, np.uint8)

    async def stray(label: bool) -> int:
        """How far its JPEG is from the picture."""
        studio = Studio(act, label=label)
        shown = decode(await studio.jpeg(grey.copy()), 1280)
        await studio.close()
        return int(np.abs(shown.astype(int) - grey).max())

    assert asyncio.run(stray(label=False)) <= 1 and asyncio.run(stray(label=True)) > 100


def test_sessions_are_not_seen_by_each_other(act: Reenactor) -> None:
    """Portraits and drivers of their own: of the same driver, crossed points would show nothing."""
    visitors = (("ada", 0), ("bruno", 25), ("chidi", 50))  # and where in TRACK each begins

    async def driven(page: Page, begin: int) -> list[bytes]:
        jpegs = []
        for i in range(1, 46):
            jpegs.append((await page.drive(TRACK[begin + i], SIDE, i, i * FRAME_US)).jpeg)
        return jpegs

    async def alone(browser: Browser, name: str, begin: int) -> list[bytes]:
        async with browser.page() as page:
            await page.begin(name)
            return await driven(page, begin)

    async def use(browser: Browser) -> None:
        wanted = [await alone(browser, *visitor) for visitor in visitors]
        assert len({jpegs[-1] for jpegs in wanted}) == len(visitors)
        crossed = await alone(browser, visitors[0][0], visitors[1][1])
        assert all(a != b for a, b in zip(crossed[30:], wanted[0][30:], strict=True))
        async with AsyncExitStack() as stack:
            pages = [await stack.enter_async_context(browser.page()) for _ in visitors]
            both = list(zip(pages, visitors, strict=True))
            await asyncio.gather(*(page.begin(name) for page, (name, _) in both))
            together = await asyncio.gather(*(driven(page, begin) for page, (_, begin) in both))
        assert together == wanted

    visit(act, use)


def test_another_portrait_and_a_new_neutral_face_within_a_session(act: Reenactor) -> None:
    async def use(browser: Browser) -> None:
        async with browser.page() as page:
            await page.begin("ada")
            first = (await drive(page, range(1, 31)))[-1]
            await page.say(do="recalibrate")
            again = await drive(page, range(31, 40))
            assert not first.neutral and again[-1].neutral
            await page.begin("goro")
            other = await drive(page, range(41, 43))
            assert not np.array_equal(other[-1].image, first.image)

    visit(act, use)


def test_a_new_neutral_face_comes_without_a_jump(act: Reenactor, portrait: Portrait) -> None:
    """The portrait eases to rest while it is looked for, as in `live`."""
    image, face = portrait
    faces = [face] * 40 + turning(face) + [moved(face)] * 75

    async def story() -> list[Result]:
        studio, results = Studio(act), []
        session = await studio.session(act.prepare(image, landmarks=face))
        for i, driver in enumerate(faces):
            if i == 65:
                await studio.recalibrate(session)
            made = await studio.frame(session, driver, i * FRAME_US * 1000, lambda: None)
            results.append(made.result)
        await studio.close()
        return results

    results = asyncio.run(story())
    at_rest, turned, last = (results[i].landmarks.points for i in (0, 64, -1))
    assert np.abs(turned - at_rest).max() > 2.0  # 25 degrees to the side
    assert steps_px(results).max() < np.abs(turned - at_rest).max() / 3.0
    assert np.abs(last - at_rest).max() < 0.5  # which is neutral now


def test_a_page_that_went_is_forgotten_while_nobody_else_comes(
    toy_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its session holds its portrait and its face; a rate is judged by who moves."""
    settings = Settings(threads=1, backend="ort", steps=4, step_choices=(2, 4))
    made: list[weakref.ref[Session]] = []
    ordinary = Studio.session

    async def watched(studio: Studio, source: Source) -> Session:
        session = await ordinary(studio, source)
        made.append(weakref.ref(session))
        return session

    monkeypatch.setattr(Studio, "session", watched)

    async def use(browser: Browser) -> None:
        async with browser.page() as page:
            await page.begin()
            await drive(page, range(1, 10))
            assert made[0]() is not None
            await page.socket.send_bytes(messages.landmarks_message(TRACK[10], SIDE, 10, 10**6))
        async with asyncio.timeout(PATIENCE_S):  # with a frame in the studio when it went
            while made[0]() is not None:
                await asyncio.sleep(0.02)
                gc.collect()
        async with browser.page() as page:
            await page.begin("ada")
            await drive(page, range(1, 3))
            await page.begin("bruno")
            assert made[1]() is None  # nor is one of another portrait kept

    with Reenactor.load(toy_bundle, settings=settings, tracker=FakeTracker([])) as act:
        visit(act, use, goal=Goal(fps=25.0))


def test_a_lost_face_is_told_and_the_portrait_rests(act: Reenactor) -> None:
    async def use(browser: Browser) -> None:
        async with browser.page() as page:
            await page.begin()
            moved = (await drive(page, range(1, 60)))[-1]
            gone = [await page.drive(None, SIDE, i, i * FRAME_US) for i in range(60, 130)]
        assert moved.seen and not any(p.seen for p in gone)
        assert np.array_equal(gone[-1].image, gone[-2].image)

    visit(act, use)


def test_a_page_that_comes_back_gets_what_it_had(act: Reenactor) -> None:
    async def use(browser: Browser) -> None:
        last = []
        for _ in range(2):
            async with browser.page() as page:
                await page.begin("dede")
                last.append((await drive(page, range(1, 40)))[-1].jpeg)
                transport = page.socket.get_extra_info("socket")
                assert transport is not None
        assert last[0] == last[1]

    visit(act, use)


def test_camera_pictures_are_tracked_by_a_tracker_of_the_visitors_own(act: Reenactor) -> None:
    made: list[FakeTracker] = []

    def new_tracker() -> FakeTracker:
        made.append(FakeTracker([]))
        return made[-1]

    async def use(browser: Browser) -> None:
        async with browser.page() as page, browser.page() as other:
            await page.begin(transport="frames")
            await other.begin(transport="frames")
            seen = []
            for i in (*range(1, 40), 0):
                await page.socket.send_bytes(grey_frame(i, (i or 50) * FRAME_US))
                seen.append(await page.picture())
            assert [p.seen for p in seen] == [True] * 39 + [False]
            assert not np.array_equal(seen[30].image, seen[38].image)
            assert all(p.moments.track_ns > 0 for p in seen)

    visit(act, use, new_tracker=new_tracker)
    assert len(made) == 2 and all(tracker.closed for tracker in made)


def test_without_a_tracker_the_server_takes_points_only_and_says_so(act: Reenactor) -> None:
    def none() -> FakeTracker:
        raise BackendMissing("no tracker")

    async def use(browser: Browser) -> None:
        async with browser.page() as page:
            await page.say(do="begin", portrait="ada", transport="frames")
            await page.state("no-tracker")
            await page.begin("ada")

    visit(act, use, new_tracker=none)


# ---- a portrait of the user's own ----


def test_a_portrait_of_ones_own_with_the_face_that_is_picked(
    toy_bundle: Path, portrait: Portrait
) -> None:
    image, face = portrait
    second = face.transformed(np.array([[0.6, 0.0, 40.0], [0.0, 0.6, 5.0]]))
    settings = Settings(threads=1, backend="ort", tracker="mediapipe")

    async def use(browser: Browser) -> None:
        async with browser.page() as page:
            await page.socket.send_bytes(messages.portrait_message(png(image), 7))
            found = await page.state("faces")
            assert found["upload"] == 7
            assert found["size"] == [80, 90] and len(found["faces"]) == 2
            left, top, width, height = found["faces"][0]
            assert 0 <= left < left + width <= 80 and 0 <= top < top + height <= 90
            stills = []
            for number in (0, 1):
                await page.begin("own", face=number)
                stills.append(await page.drive(None, SIDE, number, 1000 + number))
            assert stills[0].image.shape == image.shape
            assert not np.array_equal(stills[0].image, stills[1].image)
            await page.say(do="begin", portrait="own", face=2, transport="landmarks")
            assert await page.closed() == Close.MALFORMED
        async with browser.page() as stranger:  # nobody else's own
            await stranger.say(do="begin", portrait="own", face=0, transport="landmarks")
            assert await stranger.closed() == Close.MALFORMED

    tracker = FakeTracker([face, second])
    with Reenactor.load(toy_bundle, settings=settings, tracker=tracker) as act:
        visit(act, use)


@pytest.mark.parametrize(
    ("encoded", "why"),
    [
        (b"GIF89a" + bytes(100), "neither"),
        (png_of_size(60_000, 60_000), "60000 x 60000"),
        (png_of_size(64, 64), "cannot be decoded"),
        (png(np.zeros((8, 200, 3), np.uint8)), "200 x 8"),
        (b"\xff\xd8\xff\xe0" + bytes(40), "without a size"),
    ],
)
def test_a_portrait_that_is_none_is_refused_and_the_session_goes_on(
    act: Reenactor, encoded: bytes, why: str
) -> None:
    async def use(browser: Browser) -> None:
        async with browser.page() as page:
            await page.socket.send_bytes(messages.portrait_message(encoded))
            assert why in (await page.state("bad-portrait"))["why"]
            await page.begin()

    visit(act, use)


def test_pictures_are_measured_before_they_are_decoded() -> None:
    image = np.zeros((70, 50, 3), np.uint8)
    image[:, 25:] = 200
    for kind in (".png", ".jpg"):
        encoded = cv2.imencode(kind, image)[1].tobytes()
        assert size_of(encoded) == (50, 70)
        assert decode(encoded, 128).shape == (70, 50, 3)
        with pytest.raises(BadPicture, match="50 x 70"):
            decode(encoded, 64)
        with pytest.raises(BadPicture):
            decode(encoded[: len(encoded) // 8], 128)
    progressive = cv2.imencode(".jpg", image, (cv2.IMWRITE_JPEG_PROGRESSIVE, 1))[1].tobytes()
    assert size_of(progressive) == (50, 70)


def frame_header(jpeg: bytes) -> tuple[int, bytes]:
    """Where a JPEG says its size, and all of that segment."""
    at = jpeg.index(b"\xff\xc0")
    return at, jpeg[at : at + 2 + int.from_bytes(jpeg[at + 2 : at + 4], "big")]


@pytest.mark.parametrize("marker", [0x00, 0xC9, 0xC3])
def test_a_jpeg_with_two_sizes_is_refused(marker: int) -> None:
    """A large one for the decoder, behind what a careless reader steps over; a small one after."""
    large = cv2.imencode(".jpg", np.zeros((4000, 4000, 3), np.uint8))[1].tobytes()
    at, header = frame_header(large)
    small = header[:5] + struct.pack(">HH", 64, 64) + header[9:]
    veil = bytes([0xFF, marker]) + struct.pack(">H", 2 + len(header))
    scan = large.index(b"\xff\xda")
    scan += 2 + int.from_bytes(large[scan + 2 : scan + 4], "big")
    for rest in (small + large[at + len(header) :], large[at + len(header) : scan] + small):
        with pytest.raises(BadPicture, match="without a size"):
            decode(large[:at] + veil + header + rest + large[scan:], 1280)


def test_a_jpeg_of_endless_scans_is_refused_before_it_is_decoded() -> None:
    image = np.full((1280, 1280, 3), 99, np.uint8)
    whole = cv2.imencode(".jpg", image, (cv2.IMWRITE_JPEG_PROGRESSIVE, 1))[1].tobytes()
    assert decode(whole, 1280).shape == image.shape
    scan = whole[whole.rindex(b"\xff\xda") : -2]
    begun_s = time.monotonic()
    with pytest.raises(BadPicture, match="scans"):
        decode(whole[:-2] + 40_000 * scan + whole[-2:], 1280)  # 100 s of work in half a megabyte
    assert time.monotonic() - begun_s < 1.0


def test_the_steps_follow_a_rate_that_visitors_share(
    toy_bundle: Path, portrait: Portrait, monkeypatch: pytest.MonkeyPatch
) -> None:
    """24 ms a frame: of the 50 that a rate of 20 leaves, one visitor takes half, three too much."""
    now_ns = 10**9
    monkeypatch.setattr(studio_module, "time", SimpleNamespace(monotonic_ns=lambda: now_ns))
    settings = Settings(threads=1, backend="ort", steps=4, step_choices=(2, 4))

    async def story(act: Reenactor) -> list[int]:
        nonlocal now_ns
        studio, taken = Studio(act, goal=Goal(fps=20.0)), []
        source = act.prepare(portrait[0], landmarks=portrait[1])
        sessions = [act.session(source) for _ in range(3)]
        for count in (1, 3):
            for i in range(40):
                now_ns += 25_000_000
                session = sessions[i % count]
                made = await studio.frame(session, portrait[1], now_ns, lambda: None)
                result = replace(made.result, times={"render": 20_000_000})
                spent = replace(made, result=result, begun_ns=0, done_ns=24_000_000)
                studio.observe(session, spent, 24_000_000)
            taken.append(act.steps)
        await studio.close()
        return taken

    with Reenactor.load(toy_bundle, settings=settings, tracker=FakeTracker([])) as act:
        assert asyncio.run(story(act)) == [4, 2]
