"""How many faces a second does `serve` give, and how old are they?

    python -m benchmarks.serve_load --clients 1 --transport landmarks
    python -m benchmarks.serve_load --clients 4 --transport frames --seconds 30
    python -m benchmarks.serve_load --chromium --transport frames      # a real page, on this machine
    python -m benchmarks.serve_load --clients 4 --fps 10 --seconds 1800 --soak --json out/soak.json

Starts a server of its own as another process, and replays the shipped driver to it over its
protocol: recorded landmarks, or camera pictures that the server tracks. A client answers at once
when it is asked, or keeps to --fps as a camera would. Latency is from then until its picture is
back; decoding and showing are the page's. Faces are pictures of a face that was seen; the others
are counted apart, as unseen. With --soak the server is watched as well, and the exit
status is 1 when it grew.
"""

from __future__ import annotations

import argparse
import asyncio
import json
import sys
import tempfile
import time
from collections import Counter, deque
from collections.abc import AsyncIterator, Sequence
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import aiohttp
import av
import cv2

from benchmarks.soak import record, tell, watch
from diffusionact.assets import driver_path, portrait_paths
from diffusionact.files import write_whole
from diffusionact.landmarks import Track, sidecar_path
from diffusionact.runtime.timing import summarise
from diffusionact.runtime.web.messages import frame_message, landmarks_message
from diffusionact.runtime.web.server import SUBPROTOCOL
from tests.chromium import chromium, write_mjpeg
from tests.pages import Page, Picture

STARTED_S = 120.0
WARM_S = 2.0  # at the begin of each client, not counted: neutral face, first frames
FRAME_SIDE = 480  # as the page sends them
JPEG_QUALITY = 80
LIVE = "document.querySelector('#status').textContent === 'Live'"
READY = "document.documentElement?.dataset.ready"
# [faces, others] drawn: the page says in the same task whether a picture is of a face.
COUNT = (
    "globalThis.shown = [0, 0]; const draw = CanvasRenderingContext2D.prototype.drawImage;"
    "CanvasRenderingContext2D.prototype.drawImage = function (...how) {"
    "if (this.canvas.id === 'screen')"
    f"  queueMicrotask(() => {{ globalThis.shown[{LIVE} ? 0 : 1] += 1; }});"
    "return draw.apply(this, how); };0"
)


class Driver:
    """Messages of the shipped driver, over and over."""

    def __init__(self, transport: str) -> None:
        self._track = Track.load(sidecar_path(driver_path()))
        self._jpegs = _jpegs() if transport == "frames" else []

    def message(self, frame: int, at_us: int) -> bytes:
        if self._jpegs:
            return frame_message(self._jpegs[frame % len(self._jpegs)], frame, at_us)
        face = self._track[frame % len(self._track)]
        return landmarks_message(face, float(max(self._track.size)), frame, at_us)


def _jpegs() -> list[bytes]:
    quality = (cv2.IMWRITE_JPEG_QUALITY, JPEG_QUALITY)
    with av.open(str(driver_path())) as container:
        images = [frame.to_ndarray(format="bgr24") for frame in container.decode(video=0)]
    scale = min(1.0, FRAME_SIDE / max(images[0].shape))
    small = [cv2.resize(i, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA) for i in images]
    return [cv2.imencode(".jpg", image, quality)[1].tobytes() for image in small]


class Client:
    """One page's worth of load. recent: (monotonic ns, latency ns) of the last second's faces."""

    def __init__(self, driver: Driver, fps: float) -> None:
        self._driver, self._fps = driver, fps
        self.stages: list[dict[str, int]] = []
        self.steps: Counter[int] = Counter()
        self.unseen = 0  # pictures of no face: cheap ones, and of nobody's motion
        self.begun_s = self.ended_s = 0.0
        self.recent: deque[tuple[int, int]] = deque(maxlen=200)

    async def run(self, page: Page, transport: str, portrait: str, until_s: float) -> None:
        """Return when the time is up."""
        await page.begin(portrait, transport)
        warm_s = time.monotonic() + WARM_S
        frame, sent, free = 0, dict[int, int](), True
        due_s = time.monotonic()
        while (now_s := time.monotonic()) < until_s:
            if free:
                if self._fps:  # the newest picture of a camera that does not wait
                    due_s = max(due_s + 1.0 / self._fps, now_s - 1.0 / self._fps)
                    await asyncio.sleep(max(due_s - now_s, 0.0))
                frame += 1
                at_ns = time.monotonic_ns()
                sent[frame], free = at_ns, False
                await page.socket.send_bytes(self._driver.message(frame, at_ns // 1000))
            heard = await page.hear()
            if heard is None:
                free = True
            elif isinstance(heard, Picture):
                self._count(heard, sent.pop(heard.frame), warm_s)

    def _count(self, picture: Picture, sent_ns: int, warm_s: float) -> None:
        now_ns = time.monotonic_ns()
        counted = now_ns / 1e9 >= warm_s
        if not picture.seen:
            self.unseen += counted
            return
        self.recent.append((now_ns, now_ns - sent_ns))
        if not counted:
            return
        self.begun_s = self.begun_s or now_ns / 1e9
        self.ended_s = now_ns / 1e9
        m = picture.moments
        self.steps[m.steps] += 1
        there_ns = m.sent_ns - m.received_ns
        self.stages.append(
            {"network": now_ns - sent_ns - there_ns, "track": m.track_ns, "wait": m.wait_ns,
             "render": m.render_ns, "encode": m.encode_ns}
        )  # fmt: skip

    @property
    def rate(self) -> float:
        """Faces a second."""
        return (len(self.stages) - 1) / max(self.ended_s - self.begun_s, 1e-9)


@asynccontextmanager
async def server(options: Sequence[str]) -> AsyncIterator[tuple[str, int]]:
    """Run `diffusionact serve`; its address and process."""
    process = await asyncio.create_subprocess_exec(
        sys.executable, "-m", "diffusionact.cli", "serve", "--json", "--port", "0", *options,
        stdout=asyncio.subprocess.PIPE,
    )  # fmt: skip
    assert process.stdout is not None
    try:
        line = await asyncio.wait_for(process.stdout.readline(), STARTED_S)
        yield json.loads(line)["url"], process.pid
    finally:
        if process.returncode is None:
            process.terminate()
        await process.wait()


async def replay(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what the clients saw."""
    driver = Driver(arguments.transport)
    clients = [Client(driver, arguments.fps) for _ in range(arguments.clients)]
    names = [path.stem for path in portrait_paths()]
    report: dict[str, Any] = {}
    options = ("--sessions", str(arguments.clients), *_model(arguments))
    async with server(options) as (url, pid), aiohttp.ClientSession() as http:
        until_s = time.monotonic() + arguments.seconds + WARM_S

        async def one(client: Client, portrait: str) -> None:
            address = f"{url}api/drive"
            async with http.ws_connect(address, protocols=(SUBPROTOCOL,), max_msg_size=0) as socket:
                await client.run(Page(socket), arguments.transport, portrait, until_s)

        watched = None
        if arguments.soak:
            watched = asyncio.create_task(
                asyncio.to_thread(
                    watch, pid, arguments.seconds, lambda: _merged(clients), arguments.quiet
                )
            )
        pairs = zip(clients, (names[i % len(names)] for i in range(len(clients))), strict=True)
        await asyncio.gather(*(one(client, name) for client, name in pairs))
        if watched is not None:
            report["soak"] = record(await watched)
    stages = summarise(times for client in clients for times in client.stages)
    return {
        "faces_per_second": round(sum(client.rate for client in clients), 2),
        "each": [round(client.rate, 2) for client in clients],
        "unseen": sum(client.unseen for client in clients),
        "latency_ms": _values(stages["total"]),
        "steps": dict(sorted(sum((client.steps for client in clients), Counter()).items())),
        "stages_ms": {name: _values(times) for name, times in stages.items() if name != "total"},
        **report,
    }


async def in_chromium(arguments: argparse.Namespace) -> dict[str, Any]:
    """Return what a real page shows of itself, driven by a clip for a camera."""
    with tempfile.TemporaryDirectory() as folder:
        camera = write_mjpeg(driver_path(), Path(folder) / "camera.mjpeg")
        async with server(_model(arguments)) as (url, _), chromium(camera) as browser:
            tab = await browser.tab(url)
            await tab.until(READY, STARTED_S)
            await tab.click(f"input[value={arguments.transport}]")
            await tab.click("#start")
            await tab.until(LIVE, STARTED_S)
            await tab.run(COUNT)
            await asyncio.sleep(WARM_S)
            begun_s, before = time.monotonic(), await tab.run("globalThis.shown")
            await asyncio.sleep(arguments.seconds)
            after = await tab.run("globalThis.shown")
            faces, unseen = (b - a for a, b in zip(before, after, strict=True))
            rate = faces / (time.monotonic() - begun_s)
            rows = await tab.run(
                "[...document.querySelectorAll('#times tr')].map((row) =>"
                "[...row.children].map((cell) => cell.textContent))"
            )
            tracking = await tab.run("document.querySelector('#tracking').textContent")
            return {
                "faces_per_second": round(rate, 2),
                "unseen": unseen,
                "tracked_per_second": tracking,
                "p50_p95_ms_of_the_last_5_s": {name: [a, b] for name, a, b in rows},
                "problems": tab.problems,
            }


def _merged(clients: Sequence[Client]) -> list[tuple[int, int]]:
    return sorted(entry for client in clients for entry in tuple(client.recent))


def _model(arguments: argparse.Namespace) -> list[str]:
    return [] if arguments.serve is None else arguments.serve.split()


def _values(times: Any) -> dict[str, float]:
    return {name: round(getattr(times, f"{name}_ms"), 1) for name in ("p50", "p95", "p99")}


def options() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description="Load on the server of the page.")
    parser.add_argument("--clients", type=int, default=1)
    parser.add_argument("--transport", choices=("landmarks", "frames"), default="landmarks")
    parser.add_argument("--seconds", type=float, default=20.0)
    parser.add_argument("--fps", type=float, default=0.0, help="of each camera (default: at once)")
    parser.add_argument("--chromium", action="store_true", help="a real page in place of clients")
    parser.add_argument("--soak", action="store_true", help="watch the server for what grows")
    parser.add_argument("--serve", metavar="OPTIONS", help="more options of serve, in one text")
    parser.add_argument("--json", type=Path)
    parser.add_argument("-q", "--quiet", action="store_true")
    return parser


def main() -> None:
    arguments = options().parse_args()
    report = asyncio.run(in_chromium(arguments) if arguments.chromium else replay(arguments))
    for name, value in report.items():
        if name != "soak":
            print(f"{name:20} {value}")
    if "soak" in report:
        tell(report["soak"])
    if arguments.json:
        arguments.json.parent.mkdir(parents=True, exist_ok=True)
        write_whole(arguments.json, json.dumps(report) + "\n")
    sys.exit(0 if report.get("soak", {}).get("flat", True) else 1)


if __name__ == "__main__":
    main()
