"""A headless Chromium with a clip for a camera, driven over its DevTools protocol."""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
import shutil
import tempfile
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import av
import cv2

FOUND = (
    shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
)
FLAGS = (
    "--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--no-first-run",
    "--use-fake-ui-for-media-stream", "--use-fake-device-for-media-stream",
    "--enable-unsafe-swiftshader", "--use-gl=angle", "--use-angle=swiftshader",
    "--disable-background-timer-throttling", "--disable-backgrounding-occluded-windows",
    "--disable-renderer-backgrounding", "--disable-background-networking",
    "--disable-component-update", "--remote-debugging-port=0",
)  # fmt: skip
STARTED_S = 30.0


class Tab:
    """One page. `problems` holds what its console and the browser complained of."""

    def __init__(self, browser: Chromium, target: str, session: str) -> None:
        self._browser, self.target, self._session = browser, target, session
        self.problems: list[str] = []

    async def call(self, method: str, **parameters: Any) -> dict[str, Any]:
        return await self._browser.call(method, parameters, self._session)

    async def go(self, url: str) -> None:
        await self.call("Page.navigate", url=url)

    async def run(self, script: str) -> Any:
        """The value of a script's last expression; promises are waited for."""
        done = await self.call(
            "Runtime.evaluate", expression=script, awaitPromise=True, returnByValue=True,
            userGesture=True,
        )  # fmt: skip
        if "exceptionDetails" in done:
            raise RuntimeError(json.dumps(done["exceptionDetails"])[:800])
        return done["result"].get("value")

    async def until(self, script: str, seconds: float) -> Any:
        """The first true value of a script."""
        value = None
        try:
            async with asyncio.timeout(seconds):
                while not (value := await self.run(script)):
                    await asyncio.sleep(0.1)
        except TimeoutError:
            status = await self.run("document.querySelector('#status')?.textContent")
            raise AssertionError(f"{script}: not within {seconds} s; {status!r}") from None
        return value

    async def click(self, selector: str) -> None:
        await self.run(f"document.querySelector({json.dumps(selector)}).click()")

    async def look(self, width: int, height: int, dark: bool = False) -> None:
        """Set the window's size and theme."""
        await self.call(
            "Emulation.setDeviceMetricsOverride", width=width, height=height,
            deviceScaleFactor=1, mobile=width < 500,
        )  # fmt: skip
        theme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
        await self.call("Emulation.setEmulatedMedia", features=[theme])

    async def shoot(self, path: Path) -> None:
        """Write a PNG of the whole page."""
        shot = await self.call("Page.captureScreenshot", captureBeyondViewport=True)
        path.write_bytes(base64.b64decode(shot["data"]))

    def heard(self, method: str, event: dict[str, Any]) -> None:
        if method == "Runtime.exceptionThrown":
            self.problems.append(json.dumps(event["exceptionDetails"])[:500])
        elif method == "Runtime.consoleAPICalled" and event["type"] in ("error", "assert"):
            self.problems.append(json.dumps(event["args"])[:500])
        elif method == "Log.entryAdded" and event["entry"]["level"] == "error":
            self.problems.append(f"{event['entry']['text']} {event['entry'].get('url', '')}")


class Chromium:
    """A running browser."""

    def __init__(self, socket: aiohttp.ClientWebSocketResponse) -> None:
        self._socket = socket
        self._numbers = itertools.count(1)
        self._waiting: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._tabs: dict[str, Tab] = {}
        self._reading = asyncio.create_task(self._read())

    async def call(
        self, method: str, parameters: dict[str, Any], session: str | None = None
    ) -> dict[str, Any]:
        number = next(self._numbers)
        self._waiting[number] = asyncio.get_running_loop().create_future()
        message = {"id": number, "method": method, "params": parameters}
        await self._socket.send_json(message | ({"sessionId": session} if session else {}))
        return await asyncio.wait_for(self._waiting[number], 60.0)

    async def tab(self, url: str = "about:blank") -> Tab:
        """A new tab in a window of its own, so that none of them sleeps."""
        made = await self.call("Target.createTarget", {"url": "about:blank", "newWindow": True})
        attached = await self.call(
            "Target.attachToTarget", {"targetId": made["targetId"], "flatten": True}
        )
        tab = Tab(self, made["targetId"], attached["sessionId"])
        self._tabs[attached["sessionId"]] = tab
        for domain in ("Page", "Runtime", "Log", "Network"):
            await tab.call(f"{domain}.enable")
        if url != "about:blank":
            await tab.go(url)
        return tab

    async def close(self) -> None:
        self._reading.cancel()
        await self._socket.close()

    async def _read(self) -> None:
        async for message in self._socket:
            event = json.loads(message.data)
            if (number := event.get("id")) is not None:
                waiting = self._waiting.pop(number)
                if waiting.done():
                    continue
                if "error" in event:
                    waiting.set_exception(RuntimeError(json.dumps(event["error"])))
                else:
                    waiting.set_result(event["result"])
            elif (session := event.get("sessionId")) in self._tabs:
                self._tabs[session].heard(event["method"], event["params"])


@asynccontextmanager
async def chromium(camera: Path, *more: str) -> AsyncIterator[Chromium]:
    """A browser whose camera is a clip (.mjpeg); it is gone afterwards, its profile too."""
    assert FOUND is not None
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        process = await asyncio.create_subprocess_exec(
            FOUND, *FLAGS, *more, f"--use-file-for-fake-video-capture={camera}",
            f"--user-data-dir={profile}", "about:blank",
            stdout=asyncio.subprocess.DEVNULL, stderr=asyncio.subprocess.DEVNULL,
        )  # fmt: skip
        try:
            address = await _address(Path(profile) / "DevToolsActivePort")
            async with (
                aiohttp.ClientSession() as http,
                http.ws_connect(address, max_msg_size=0) as socket,
            ):
                browser = Chromium(socket)
                try:
                    yield browser
                finally:
                    await browser.close()
        finally:
            process.terminate()
            await process.wait()


async def _address(file: Path) -> str:
    async with asyncio.timeout(STARTED_S):
        while not file.exists() or len(lines := file.read_text().split()) < 2:
            await asyncio.sleep(0.1)
    return f"ws://127.0.0.1:{lines[0]}{lines[1]}"


def write_mjpeg(video: Path, path: Path, width: int = 480, height: int = 360) -> Path:
    """Write a clip as the camera file that Chromium reads: JPEG after JPEG, letterboxed."""
    with av.open(str(video)) as container, path.open("wb") as file:
        for frame in container.decode(video=0):
            image = frame.to_ndarray(format="bgr24")
            scale = min(width / image.shape[1], height / image.shape[0])
            fitted = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
            top, left = (height - fitted.shape[0]) // 2, (width - fitted.shape[1]) // 2
            around = (
                top, height - fitted.shape[0] - top, left, width - fitted.shape[1] - left,
            )  # fmt: skip
            framed = cv2.copyMakeBorder(fitted, *around, cv2.BORDER_REPLICATE)
            file.write(cv2.imencode(".jpg", framed)[1].tobytes())
    return path
