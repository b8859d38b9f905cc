"""The page in a real browser, its camera a rendered clip: headless Chromium over DevTools."""

from __future__ import annotations

import asyncio
import base64
from collections.abc import AsyncIterator, Awaitable, Callable, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from diffusionact.assets import bundle_path, driver_path, portrait_paths
from diffusionact.errors import BackendMissing, NoFace
from diffusionact.landmarks import EYE_A, EYE_B, Landmarks
from diffusionact.runtime.reenactor import Reenactor
from diffusionact.runtime.settings import Settings
from diffusionact.runtime.tracker import MediaPipeTracker
from diffusionact.runtime.web import server as server_module
from diffusionact.runtime.web.messages import Kind, landmarks_of, read_packet
from diffusionact.runtime.web.server import Site, web_tracker
from diffusionact.runtime.web.visitor import Limits
from tests.chromium import FOUND, Chromium, Tab, chromium, write_mjpeg
from tests.pages import Browser, serving

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(600),
    pytest.mark.skipif(FOUND is None, reason="no chromium: apt-get install chromium"),
]
needs_web_tracker = pytest.mark.skipif(
    web_tracker() is None, reason="no web tracker: (cd runtime/web && npm ci)"
)
PATIENCE_S = 120.0  # software GL on a busy machine
STATUS = "document.querySelector('#status').textContent"
READY = "document.documentElement?.dataset.ready"
LIVE = f"{STATUS} === 'Live'"
UInt8Array = npt.NDArray[np.uint8]
# What the correlation of two motions has to be: noise gives 0, the same motion 1.
ALIKE = 0.7


@pytest.fixture(scope="module")
def act() -> Iterator[Reenactor]:
    with Reenactor.load(bundle_path(), settings=Settings(tracker="mediapipe")) as act:
        try:
            act.tracker  # noqa: B018
        except BackendMissing as error:
            pytest.skip(str(error))
        yield act


@pytest.fixture(scope="module")
def camera(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_mjpeg(driver_path(), tmp_path_factory.mktemp("camera") / "driver.mjpeg")


Story = Callable[[Chromium, Browser], Awaitable[None]]


@pytest.fixture
def tell(act: Reenactor, camera: Path) -> Callable[..., None]:
    """Run a story with a browser and a server; idle seats are given up late."""

    def run(story: Story, **site: Any) -> None:
        async def told() -> None:
            where = Site(limits=Limits(idle_s=300.0), **site)
            async with chromium(camera) as browser, serving(act, where) as server:
                await story(browser, server)

        asyncio.run(told())

    return run


def address(server: Browser, more: str = "") -> str:
    return f"http://localhost:{server.server.port}/{more}"


@asynccontextmanager
async def visiting(
    browser: Chromium, server: Browser, portrait: str, transport: str
) -> AsyncIterator[Tab]:
    """A tab that is live; it has complained of nothing by the end."""
    tab = await browser.tab(address(server))
    await tab.until(READY, PATIENCE_S)
    await tab.click(f"input[value={portrait}]")
    await tab.click(f"input[value={transport}]")
    await tab.click("#start")
    await tab.until(LIVE, PATIENCE_S)
    yield tab
    assert tab.problems == []


def image_of(url: str) -> UInt8Array:
    encoded = base64.b64decode(url.partition(",")[2])
    return np.asarray(cv2.imdecode(np.frombuffer(encoded, np.uint8), cv2.IMREAD_COLOR), np.uint8)


async def drop(tab: Tab, file: Path) -> None:
    """Choose a picture of one's own."""
    document = await tab.call("DOM.getDocument")
    node = await tab.call("DOM.querySelector", nodeId=document["root"]["nodeId"], selector="#file")
    await tab.call("DOM.setFileInputFiles", files=[str(file)], nodeId=node["nodeId"])


async def screen(tab: Tab) -> UInt8Array:
    return image_of(await tab.run("document.querySelector('#screen').toDataURL()"))


def yaw_of(face: Landmarks) -> float:
    """How far the nose is from the middle of the eyes, in eye distances: a turned head."""
    eyes = [face.points[eye, :2].mean(axis=0) for eye in (EYE_A, EYE_B)]
    return float((face.points[30, 0] - (eyes[0][0] + eyes[1][0]) / 2) / np.ptp(eyes, axis=0)[0])


def gap_of(face: Landmarks) -> float:
    """How far the inner lips are open, in mouth widths."""
    width = np.linalg.norm(face.points[54, :2] - face.points[48, :2])
    return float(np.linalg.norm(face.points[66, :2] - face.points[62, :2]) / width)


# What a page is made to keep of each frame that it shows.
KEEP = """
  (() => {
    const paper = CanvasRenderingContext2D.prototype;
    const draw = paper.drawImage;
    globalThis.kept = [];
    paper.drawImage = function (image, ...where) {
      draw.call(this, image, ...where);
      if (this.canvas.id === "screen" && globalThis.kept.length < 90) {
        globalThis.kept.push(this.canvas.toDataURL("image/jpeg", 0.9));
      }
    };
  })()
"""


# What a page is made to keep of what it sends, and of the sockets it sends it by.
KEEP_SENT = """
  (() => {
    const send = WebSocket.prototype.send;
    Object.assign(globalThis, { sent: [], said: [], sockets: new Set() });
    WebSocket.prototype.send = function (data) {
      globalThis.sockets.add(this);
      if (typeof data === "string") globalThis.said.push(JSON.parse(data));
      else if (data[0] === 1) globalThis.sent.push(btoa(String.fromCharCode(...data)));
      return send.call(this, data);
    };
  })()
"""


def motions(pictures: list[UInt8Array]) -> npt.NDArray[np.float64]:
    """Yaw and lip gap of the face in every picture, [N,2]; NaN where none is found."""
    found = np.full((len(pictures), 2), np.nan)
    with MediaPipeTracker() as tracker:
        for i, picture in enumerate(pictures):
            try:
                found[i] = motion_of(tracker.track(picture))
            except NoFace:
                continue
    return found


def motion_of(face: Landmarks | None) -> tuple[float, float]:
    return (np.nan, np.nan) if face is None else (yaw_of(face), gap_of(face))


def likeness(driver: npt.NDArray[np.float64], shown: npt.NDArray[np.float64]) -> float:
    """The correlation of two series of which some are NaN."""
    both = np.isfinite(driver) & np.isfinite(shown)
    assert both.sum() >= 40
    return float(np.corrcoef(driver[both], shown[both])[0, 1])


def assert_alike(driver: npt.NDArray[np.float64], portrait: npt.NDArray[np.float64]) -> None:
    """Yaw and lip gap of the one follow the other; how many frames were on their way when the
    keeping began is not known: a few, three were seen where the page tracks in software."""
    count = len(driver)
    alike = [
        [likeness(driver[: count - lag, i], portrait[lag:, i]) for lag in range(6)]
        for i in range(2)
    ]
    print(
        "yaw, lips:", np.round(np.max(alike, axis=1), 3), "on their way:", np.argmax(alike, axis=1)
    )
    assert max(alike[0]) > ALIKE and max(alike[1]) > ALIKE


def test_the_face_on_the_screen_moves_with_the_driver(tell: Callable[..., None]) -> None:
    sent: list[UInt8Array] = []

    async def story(browser: Chromium, server: Browser) -> None:
        async with visiting(browser, server, "goro", "frames") as tab:
            # The picture that a frame was rendered of, beside the frame: both are kept in order.
            await tab.run(f"{KEEP}; globalThis.taken = [];"
                          "globalThis.toBlobOf = HTMLCanvasElement.prototype.toBlob;"
                          " HTMLCanvasElement.prototype.toBlob = function (...how) {"
                          "globalThis.taken.push(this.toDataURL('image/jpeg', 0.9));"
                          "return toBlobOf.apply(this, how); }")  # fmt: skip
            await tab.until("globalThis.kept.length >= 75", PATIENCE_S)
            taken = await tab.run("globalThis.taken.slice(0, 75)")
            shown = await tab.run("globalThis.kept.slice(0, 75)")
            sent.extend(image_of(url) for url in taken)
            pictures.extend(image_of(url) for url in shown)

    pictures: list[UInt8Array] = []
    tell(story)
    assert_alike(motions(sent), motions(pictures))


@needs_web_tracker
def test_the_face_on_the_screen_moves_with_the_browsers_own_tracker(
    tell: Callable[..., None],
) -> None:
    sent: list[Landmarks | None] = []
    shown: list[UInt8Array] = []

    async def story(browser: Chromium, server: Browser) -> None:
        tab = await browser.tab(address(server))
        await tab.until(READY, PATIENCE_S)
        await tab.run(KEEP_SENT)
        # Stopped and started again while the tracker is on its way: it is loaded once, and one
        # portrait is begun.
        await tab.click("#start")
        await tab.until(f"{STATUS}.startsWith('Loading')", PATIENCE_S)
        await tab.click("#start")
        assert await tab.run(STATUS) == "Stopped."
        await tab.click("#start")
        await tab.until(LIVE, PATIENCE_S)
        assert [said["do"] for said in await tab.run("globalThis.said")] == ["begin"]
        scripts = "document.querySelectorAll('script[src$=\"/face_mesh.js\"]')"
        assert await tab.run(f"{scripts}.length") == 1
        # Both at once: a page that tracks in software is so busy that frames pass between two calls.
        await tab.run(f"globalThis.sent.length = 0; {KEEP}")
        await tab.until("globalThis.kept.length >= 50", 3 * PATIENCE_S)
        packets = [base64.b64decode(m) for m in await tab.run("globalThis.sent.slice(0, 50)")]
        assert all(packet[0] == Kind.LANDMARKS for packet in packets)
        sent.extend(landmarks_of(read_packet(packet)) for packet in packets)
        shown.extend(image_of(u) for u in await tab.run("globalThis.kept.slice(0, 50)"))
        rate = await tab.run("document.querySelector('#tracking').textContent")
        print(f"the browser's own tracking, software GL: {rate} faces a second")
        assert "436" in await tab.run("document.querySelector('#sent-text').textContent")
        # It is slow here, so that the page suggests the other way, and takes it.
        if float(rate) < 10:
            await tab.until("!document.querySelector('#notice').hidden", PATIENCE_S)
            await tab.run("document.querySelector('#notice-yes').focus()")
            await tab.click("#notice-yes")
            assert await tab.run("document.activeElement.id") == "start"
            await tab.until(
                "Number(document.querySelector('#sent-text').textContent.replace(/\\D/g, '')) > 999",
                PATIENCE_S,
            )
            await tab.until(LIVE, PATIENCE_S)
        assert tab.problems == []

    tell(story)
    driver = np.array([motion_of(face) for face in sent])
    assert_alike(driver, motions(shown))


def test_two_tabs_with_two_portraits_stay_apart(tell: Callable[..., None]) -> None:
    names = ("elif", "iris")
    files = {path.stem: cv2.imread(str(path)) for path in portrait_paths()}

    async def story(browser: Chromium, server: Browser) -> None:
        async with (
            visiting(browser, server, names[0], "frames") as one,
            visiting(browser, server, names[1], "frames") as two,
        ):
            for _ in range(20):
                for tab, mine, others in ((one, *names), (two, *reversed(names))):
                    shown = (await screen(tab))[:40].astype(float)  # above the face: as it was
                    assert np.abs(shown - files[mine][:40]).mean() < 6
                    assert np.abs(shown - files[others][:40]).mean() > 20
                await asyncio.sleep(0.1)

    tell(story)


def test_reload_a_full_house_and_a_seat_that_gets_free(tell: Callable[..., None]) -> None:
    async def story(browser: Chromium, server: Browser) -> None:
        async with visiting(browser, server, "ada", "frames") as first:
            second = await browser.tab(address(server))
            await second.until(READY, PATIENCE_S)
            await second.click("input[value=frames]")
            await second.click("#start")
            await second.until(f"{STATUS}.startsWith('All seats')", PATIENCE_S)
            await first.run("location.reload()")
            await asyncio.sleep(0.5)
            await second.until(LIVE, PATIENCE_S)  # by itself
            await second.click("#start")  # Stop
            await first.until(READY, PATIENCE_S)
            await first.click("input[value=frames]")
            await first.click("#start")
            await first.until(LIVE, PATIENCE_S)

    tell(story, sessions=1)


def test_portraits_are_walked_through_by_keyboard(tell: Callable[..., None]) -> None:
    """Faster than a server takes commands; the one where the walk ends is shown, and nothing of
    those before it is drawn any more."""

    async def story(browser: Chromium, server: Browser) -> None:
        async with visiting(browser, server, "ada", "frames") as tab:
            await tab.run("document.querySelector('#gallery input').focus()")
            for _ in range(43):
                for kind in ("keyDown", "keyUp"):
                    await tab.call("Input.dispatchKeyEvent", type=kind, key="ArrowRight",
                                   code="ArrowRight", windowsVirtualKeyCode=39)  # fmt: skip
            chosen = "document.querySelector('#gallery input:checked').value"
            assert await tab.run(chosen) == portrait_paths()[43 % len(portrait_paths())].stem
            await tab.until(f"{STATUS} !== 'Live'", PATIENCE_S)
            await tab.until(LIVE, PATIENCE_S)
            own = cv2.imread(str(portrait_paths()[43 % len(portrait_paths())]))
            assert np.abs((await screen(tab))[:40].astype(float) - own[:40]).mean() < 6

    tell(story)


def test_the_focus_stays_where_it_was_and_a_server_that_is_gone_is_told(
    act: Reenactor, camera: Path
) -> None:
    async def told() -> None:
        async with chromium(camera) as browser:
            async with serving(act, Site()) as server:
                tab = await browser.tab(address(server))
                await tab.until(READY, PATIENCE_S)
                await tab.run("document.querySelector('#start').focus()")
                await tab.click("input[value=frames]")
                await tab.click("#start")
                await tab.until(LIVE, PATIENCE_S)
                assert await tab.run("document.activeElement.id") == "start"
                await tab.call("Network.setBlockedURLs", urls=["*/api/site"])
                await tab.run("location.reload()")
                status = "document.querySelector('#status')?.textContent"
                await tab.until(f"{status}?.startsWith('The server does not answer')", PATIENCE_S)

    asyncio.run(told())


def test_a_lost_connection_comes_back_by_itself(act: Reenactor, camera: Path) -> None:
    async def told() -> None:
        site = Site(limits=Limits(idle_s=300.0))
        async with chromium(camera) as browser:
            async with serving(act, site) as server:
                tab = await browser.tab(address(server))
                port = server.server.port
                await tab.until(READY, PATIENCE_S)
                await tab.click("input[value=hana]")
                await tab.click("input[value=frames]")
                await tab.click("#start")
                await tab.until(LIVE, PATIENCE_S)
            await tab.until(f"{STATUS}.startsWith('Connection lost')", PATIENCE_S)
            async with serving(act, site, port=port):
                await tab.until(LIVE, PATIENCE_S)

    asyncio.run(told())


def two_faces(path: Path) -> UInt8Array:
    """Write a picture of two; return it."""
    names = ("bruno", "elif")
    both = np.concatenate([cv2.imread(str(p)) for p in portrait_paths() if p.stem in names], 1)
    cv2.imwrite(str(path), both)
    return np.asarray(both, np.uint8)


def test_a_picture_of_ones_own_with_two_faces_is_asked_about(
    tell: Callable[..., None], tmp_path: Path
) -> None:
    both = two_faces(tmp_path / "both.png")

    async def story(browser: Chromium, server: Browser) -> None:
        async with visiting(browser, server, "ada", "frames") as tab:
            await drop(tab, tmp_path / "both.png")
            faces = "document.querySelectorAll('#faces button')"
            await tab.until(f"{faces}.length === 2", PATIENCE_S)
            use = "document.querySelector('#use')"
            await tab.run(f"{faces}[1].click()")
            left = float(await tab.run(f"parseFloat({faces}[1].style.left)"))  # per cent
            assert await tab.run(f"{use}.disabled")  # nobody has agreed yet
            await tab.click("#consent")
            assert not await tab.run(f"{use}.disabled")
            await tab.click("#use")
            await tab.until("document.querySelector('#screen').width === 768", PATIENCE_S)
            await tab.until(LIVE, PATIENCE_S)
            moved = np.abs((await screen(tab)).astype(float) - both)[100:300].mean(axis=(0, 2))
            picked, other = (moved[92:292], moved[476:676])[:: 1 if left < 50 else -1]
            assert picked.mean() > 3 * other.mean()  # of which the rest is JPEG's

    tell(story)


@needs_web_tracker
def test_a_picture_that_was_cancelled_is_never_the_portrait(
    tell: Callable[..., None], tmp_path: Path
) -> None:
    own = two_faces(tmp_path / "own.png")
    another = next(path for path in portrait_paths() if path.stem == "goro")  # of one face

    async def story(browser: Chromium, server: Browser) -> None:
        async def still_own() -> None:
            await tab.until(f"{STATUS} !== 'Live'", PATIENCE_S)
            await tab.until(LIVE, PATIENCE_S)
            shown = (await screen(tab))[:40].astype(float)
            assert shown.shape == own[:40].shape
            assert np.abs(shown - own[:40]).mean() < 6

        async with visiting(browser, server, "ada", "frames") as tab:
            await tab.run(KEEP_SENT)
            await drop(tab, tmp_path / "own.png")
            await tab.until("document.querySelectorAll('#faces button').length === 2", PATIENCE_S)
            await tab.run("document.querySelectorAll('#faces button')[1].click()")
            await tab.click("#consent")
            await tab.click("#use")
            await still_own()
            await drop(tab, another)
            await tab.until("document.querySelectorAll('#faces button').length === 1", PATIENCE_S)
            await tab.click("#chooser button[value=cancel]")
            for transport in ("landmarks", "frames"):
                await tab.click(f"input[value={transport}]")
                await still_own()
            # The same once more, and this time the connection is lost while it is asked about.
            await drop(tab, another)
            await tab.until("document.querySelectorAll('#faces button').length === 1", PATIENCE_S)
            await tab.run("globalThis.sockets.forEach((socket) => socket.close())")
            await still_own()
            await tab.click("#chooser button[value=cancel]")
            await tab.click("input[value=landmarks]")
            await still_own()
            begun = await tab.run("globalThis.said")
            assert {(one["portrait"], one["face"]) for one in begun} == {("own", 1)}

    tell(story)


def test_nobody_is_filmed_unasked_where_there_is_no_tracker_for_browsers(
    tell: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(server_module, "web_tracker", lambda: None)
    chosen = "document.querySelector('input[name=transport]:checked')?.value ?? null"

    async def story(browser: Chromium, server: Browser) -> None:
        tab = await browser.tab(address(server))
        await tab.until(READY, PATIENCE_S)
        await tab.run(KEEP_SENT)
        assert await tab.run(chosen) is None
        for answer in ("#notice-no", "#notice-yes"):
            await tab.click("#start")
            assert "camera pictures" in await tab.run(
                "document.querySelector('#notice-text').textContent"
            )
            assert await tab.run("globalThis.said.length") == 0
            await tab.run(f"document.querySelector('{answer}').focus()")
            await tab.click(answer)
            assert await tab.run("document.activeElement.id") == "start"
        assert await tab.run(chosen) == "frames"
        await tab.until(LIVE, PATIENCE_S)
        assert tab.problems == []

    tell(story)


@pytest.mark.parametrize(
    ("error", "said"),
    [
        (RuntimeError("a bug"), "Something went wrong"),
        (BackendMissing("none"), "The server has no"),
    ],
)
def test_a_server_that_cannot_track_is_told_in_words_and_asked_once(
    act: Reenactor, camera: Path, error: Exception, said: str
) -> None:
    def broken() -> MediaPipeTracker:
        raise error

    async def told() -> None:
        async with chromium(camera) as browser, serving(act, Site(), new_tracker=broken) as server:
            tab = await browser.tab(address(server))
            await tab.until(READY, PATIENCE_S)
            await tab.run(KEEP_SENT)
            await tab.click("input[value=frames]")
            await tab.click("#start")
            await tab.until(f"{STATUS}.startsWith('{said}')", PATIENCE_S)
            await asyncio.sleep(1.5)  # a page that tries again has done so by then
            assert await tab.run("globalThis.said.length") == 1

    asyncio.run(told())


def test_a_token_is_asked_for_in_words_and_taken_from_the_address(
    tell: Callable[..., None],
) -> None:
    token = "a-token-of-more-than-sixteen"

    async def story(browser: Chromium, server: Browser) -> None:
        for more, wanted in (
            ("", f"{STATUS}.includes('wants a token')"),
            ("#token=not%20one", f"{STATUS}.includes('no token can have')"),
            (f"#token={token}", LIVE),
        ):
            tab = await browser.tab(address(server, more))
            await tab.until(READY, PATIENCE_S)
            await tab.click("input[value=frames]")
            await tab.click("#start")
            await tab.until(wanted, PATIENCE_S)

    tell(story, token=token)


def test_a_recording_is_a_video_of_the_screen(tell: Callable[..., None], tmp_path: Path) -> None:
    async def story(browser: Chromium, server: Browser) -> None:
        await browser.call(
            "Browser.setDownloadBehavior",
            {"behavior": "allow", "downloadPath": str(tmp_path)},
        )
        async with visiting(browser, server, "chidi", "frames") as tab:
            await tab.run(KEEP)
            await tab.click("#record")
            await tab.until("globalThis.kept.length >= 20", PATIENCE_S)
            await tab.click("#record")
            async with asyncio.timeout(PATIENCE_S):
                while not [p for p in tmp_path.iterdir() if p.suffix in (".webm", ".mp4")]:
                    await asyncio.sleep(0.2)

    tell(story)
    (video,) = tmp_path.iterdir()
    capture = cv2.VideoCapture(str(video))
    frames = 0
    while (read := capture.read())[0]:
        frames += 1
        assert read[1].shape == (384, 384, 3)
    assert frames >= 5


def test_every_control_has_a_name_and_a_place_in_the_order_of_tabs(
    tell: Callable[..., None],
) -> None:
    async def story(browser: Chromium, server: Browser) -> None:
        tab = await browser.tab(address(server))
        await tab.until(READY, PATIENCE_S)
        tree = await tab.call("Accessibility.getFullAXTree")
        for node in tree["nodes"]:
            role = node.get("role", {}).get("value")
            if not node["ignored"] and role in ("button", "radio", "image", "link", "checkbox"):
                assert node.get("name", {}).get("value"), node
        visited = []
        for _ in range(12):
            for kind in ("keyDown", "keyUp"):
                await tab.call("Input.dispatchKeyEvent", type=kind, key="Tab", code="Tab",
                               windowsVirtualKeyCode=9)  # fmt: skip
            visited.append(await tab.run(
                "document.activeElement.id || document.activeElement.name "
                "|| document.activeElement.className || document.activeElement.tagName"
            ))  # fmt: skip
        for wanted in ("skip", "start", "portrait", "file", "transport"):
            assert wanted in visited, visited
        assert tab.problems == []

    tell(story)


# Of every element that is seen and wider than the window, or than what it may scroll in: its name.
TOO_WIDE = """
  [...document.querySelectorAll("body *")].filter((element) => {
    const { left, right, width } = element.getBoundingClientRect();
    if (width <= 1) return false;  // for screen readers, or hidden
    return left < -0.5 || right > innerWidth + 0.5
      || (element.clientWidth > 0 && element.scrollWidth > element.clientWidth + 1);
  }).map(({ tagName, id, className }) => `${tagName}#${id}.${className}`)
"""


def test_the_page_fits_and_complains_of_nothing_light_dark_and_on_a_phone(
    tell: Callable[..., None], tmp_path: Path
) -> None:
    """The screenshots are to be looked at: `--basetemp FOLDER` says where they lie."""
    two_faces(tmp_path / "own.png")

    async def shoot(tab: Tab, state: str) -> None:
        for name, width, dark in (
            ("light", 1280, False), ("dark", 1280, True), ("tablet", 800, False),
            ("phone", 390, False), ("phone-dark", 390, True), ("small", 320, False),
        ):  # fmt: skip
            await tab.look(width, 800, dark)
            await asyncio.sleep(0.3)
            assert await tab.run(TOO_WIDE) == [], name
            assert await tab.run("document.documentElement.scrollWidth") <= width
            if name in ("light", "dark", "phone", "phone-dark"):
                high = await tab.run("document.documentElement.scrollHeight")
                await tab.look(width, high, dark)
                await asyncio.sleep(0.3)  # the backdrop of a dialog comes after
                await tab.shoot(tmp_path / f"{state}-{name}.png")

    async def story(browser: Chromium, server: Browser) -> None:
        async with visiting(browser, server, "iris", "frames") as tab:
            await tab.click("summary")
            await asyncio.sleep(3.0)  # some figures
            await shoot(tab, "live")
            await drop(tab, tmp_path / "own.png")
            await tab.until("document.querySelectorAll('#faces button').length === 2", PATIENCE_S)
            await shoot(tab, "asked")
            await tab.click("#chooser button[value=cancel]")
            await tab.click("#start")
            await asyncio.sleep(1.0)
            assert await tab.run(STATUS) == "Stopped."
            figures = await tab.run(
                "[...document.querySelectorAll('.figures strong, #times td')]"
                ".map((one) => one.textContent)"
            )
            assert set(figures) == {"–"}  # of what is over nothing is shown

    tell(story)
    assert len(list(tmp_path.glob("*-*.png"))) == 8
