"""One variant of a measurement, loaded and bound: what a process of a contest holds."""

from __future__ import annotations

import importlib
import itertools
import time
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np

from diffusionact import machine
from diffusionact.errors import SettingsError
from diffusionact.landmarks import Track
from diffusionact.runtime.component import BACKENDS, device_of
from diffusionact.runtime.component import precisions as precisions_on
from diffusionact.runtime.contest import peak_memory_mib
from diffusionact.runtime.loop import Approximation
from diffusionact.runtime.media import FRAME_NS, open_reader, read_image
from diffusionact.runtime.motion import driver_motion
from diffusionact.runtime.reenactor import Reenactor
from diffusionact.runtime.settings import Settings
from diffusionact.runtime.sidecar import Sidecar
from diffusionact.runtime.source import Source
from diffusionact.runtime.timing import StopWatch
from diffusionact.runtime.trace import record, spent_ms

Record: TypeAlias = dict[str, Any]

WARM_UP_S, WARM_UP_FRAMES = 1.0, 3
PREPARE_S = 20.0  # an inversion that takes longer is told as an estimate


@dataclass(frozen=True)
class Task:
    """What is rendered. frame: "render", the driver's landmarks are known; or "whole", each
    picture of the driver is read, and tracked where no track lies beside it."""

    bundle: Path
    portrait: Path
    driver: Path
    device: str = "auto"
    frame: str = "render"


@dataclass(frozen=True)
class Variant:
    """How it is rendered; fields as those of Settings, and batch: frames at once, each by networks
    of its own in a thread of its own."""

    backend: str = "auto"
    precision: str = "auto"
    steps: int | tuple[int, ...] | None = None
    threads: int = 0
    approximate: Approximation | None = None
    batch: int = 1


@dataclass(frozen=True)
class Round:
    """Some frames. times: stage -> milliseconds of each; wall_s: of a stopwatch around them all;
    cpu_s: of the whole process."""

    times: Mapping[str, list[float]]
    wall_s: float
    cpu_s: float


class Rig:
    """One variant, loaded; lives in a process of its own."""

    def __init__(self, task: Task, variant: Variant) -> None:
        self._task = task
        begun_s = time.perf_counter()
        chosen = asdict(variant)
        if chosen.pop("batch") < 1:
            raise SettingsError(f"batch={variant.batch}; wanted one frame at once or more")
        settings = Settings(**chosen)
        self._acts = [
            Reenactor.load(task.bundle, device=task.device, settings=settings)
            for _ in range(variant.batch)
        ]
        self._act = self._acts[0]
        self._threads = ThreadPoolExecutor(variant.batch)
        self._load_s = time.perf_counter() - begun_s
        self._loaded_mib = peak_memory_mib()
        self._variant = variant
        self._frames: Iterator[tuple[Any, int]] | None = None

    def look(self) -> Track:
        """Return the driver's landmarks."""
        return driver_motion(self._act, open_reader(self._task.driver)).track

    def start(self, track: Track) -> Record:
        """Return what came before steady state, milliseconds, and what runs."""
        first_ms = self._begin(track)
        self._settle()
        return {
            "ran": self._ran(),
            "start": {
                "load_ms": self.load_ms(), "first_frame_ms": first_ms, **self._preparation(track)
            },
        }  # fmt: skip

    def _begin(self, track: Track) -> float:
        """Prepare the portrait with noise for its x_T, which takes the same time to render as any;
        milliseconds of the first frame."""
        side = self._act.manifest.image_size
        noise = np.random.default_rng(0).standard_normal((1, 3, side, side), np.float32)
        self._take(self._prepared(noise), track)
        self._frames = self._driver_frames(track)
        return self.round(1).wall_s * 1e3

    def _take(self, source: Source, track: Track) -> None:
        self._source = source
        for act in self._acts:
            act.start_session(source, track)

    def warm_up(self) -> float:
        """Return seconds a frame, once it is steady."""
        return self._settle()

    def round(self, count: int) -> Round:
        """Return how long the next frames took."""
        times: dict[str, list[float]] = {}
        begun_s, cpu_begun_s = time.perf_counter(), time.process_time()
        for _ in range(-(-count // len(self._acts))):
            for parts in self._frames_at_once():
                for stage, spent_ns in itertools.chain.from_iterable(p.items() for p in parts):
                    times.setdefault(stage, []).append(spent_ns / 1e6)
        return Round(times, time.perf_counter() - begun_s, time.process_time() - cpu_begun_s)

    def _frames_at_once(self) -> list[list[Mapping[str, int]]]:
        """The stages of the next frames, one for each reenactor."""
        if len(self._acts) == 1:
            return [self._frame(self._act, *self._next())]
        waiting = [self._threads.submit(self._frame, act, *self._next()) for act in self._acts]
        return [frame.result() for frame in waiting]

    def _next(self) -> tuple[StopWatch, Any, int]:
        """A watch that has seen the driver's frame being read, the frame, and its time."""
        assert self._frames is not None, "start() comes first"
        watch = StopWatch()
        driver, pts_ns = next(self._frames)
        if self._task.frame == "whole":
            watch.lap("read")
        return watch, driver, pts_ns

    def _frame(
        self, act: Reenactor, watch: StopWatch, driver: Any, pts_ns: int
    ) -> list[Mapping[str, int]]:
        """The stages of a frame: those before the reenactor, where there are, and its own."""
        return [watch.times, act.reenact(driver, self._source, pts_ns).times]

    def load_ms(self) -> float:
        """Return how long the model took to load."""
        return self._load_s * 1e3

    def memory(self) -> dict[str, float | None]:
        """Return the most memory held, MiB: until the model was loaded, and until now."""
        return {"loaded_mib": self._loaded_mib, "peak_mib": peak_memory_mib()}

    def _prepared(self, x_T: Any = None) -> Source:
        image = read_image(self._task.portrait)
        known = Sidecar.beside(self._task.portrait)
        size = image.shape[1], image.shape[0]
        (landmarks,) = known.faces(1, size) if known else (None,)
        return self._act.prepare(image, landmarks=landmarks, x_T=x_T)

    def _preparation(self, track: Track) -> dict[str, Any]:
        """How long a portrait takes, measured where the inversion's steps promise few seconds."""
        rendered = self.round(1).times["render"][0] / 1e3
        plan = self._act.manifest
        inverts = len(plan.invert_at())
        expected_s = rendered / max(len(self._ran()["timesteps"]), 1) * inverts
        if expected_s > PREPARE_S:
            return {"prepare_ms": expected_s * 1e3, "prepare_measured": False}
        begun_s = time.perf_counter()
        source = self._prepared()
        prepare_ms = (time.perf_counter() - begun_s) * 1e3
        self._take(source, track)
        return {"prepare_ms": prepare_ms, "prepare_measured": True}

    def _driver_frames(self, track: Track) -> Iterator[tuple[Any, int]]:
        """The driver for ever, its clock going on: landmarks, or pictures where they are tracked."""
        length_ns = int(track.pts_ns[-1] - track.pts_ns[0]) + FRAME_NS
        whole = self._task.frame == "whole"
        known = track if Sidecar.beside(self._task.driver) or not whole else None
        for turn in itertools.count():
            pictures = open_reader(self._task.driver) if whole else itertools.repeat(None)
            for i, picture in zip(range(len(track)), pictures, strict=False):
                image = None if known is not None or picture is None else picture.image_bgr
                yield track[i] if image is None else image, int(track.pts_ns[i]) + turn * length_ns

    def _settle(self) -> float:
        spent: list[float] = []
        while len(spent) < WARM_UP_FRAMES and sum(spent) < WARM_UP_S:
            spent.append(self.round(1).wall_s)
        return min(spent) / len(self._acts)

    def _ran(self) -> dict[str, Any]:
        """What the variant came to on this machine."""
        plan, variant, chosen = self._act.manifest, self._variant, self._act.settings
        device, known = of_backend(chosen.backend, self._task.device)
        at = plan.render_at(variant.steps)
        return {
            "backend": chosen.backend,
            "precision": known[0] if chosen.precision == "auto" else chosen.precision,
            "steps": len(at),
            "timesteps": [int(t) for t in at],
            "threads": variant.threads or machine.cores(),
            "approximate": variant.approximate,
            "batch": variant.batch,
            "device": device,
        }


class TracedRig(Rig):
    """The same with its components watched and their profilers on."""

    def __init__(self, task: Task, variant: Variant) -> None:
        begun_ns = time.monotonic_ns()
        with record() as self._recorder:
            super().__init__(task, variant)
        self._recorder.add("load", "start", begun_ns, time.monotonic_ns() - begun_ns)

    def trace(self, path: Path, count: int) -> Record:
        """Return what the file shows of so many frames after a first one: milliseconds by stage,
        call and kind of layer, and what a stopwatch around the frames says."""
        self._frame_span("first frame", lambda: self._begin(self.look()))
        begun_ns = time.monotonic_ns()
        for i in range(count):
            self._frame_span(f"frame {i}", self._traced_frame)
        stopwatch_ms = (time.monotonic_ns() - begun_ns) / 1e6
        about = {"machine": machine.describe(), "versions": machine.versions(), "ran": self._ran()}
        spans = [s for s in self._recorder.save(path, about) if s.begun_ns >= begun_ns]
        return {
            "frames": count,
            "stopwatch_ms": stopwatch_ms,
            "frames_ms": sum(spent_ms(spans, "frame").values()),
            "stages_ms": spent_ms(spans, "stage"),
            "calls_ms": spent_ms(spans, "call"),
            "layers_ms": spent_ms(spans, "layer", by="kind"),
        }

    def _traced_frame(self) -> None:
        for part in self._frame(self._act, *self._next()):
            self._recorder.stages(part)

    def _frame_span(self, name: str, work: Callable[[], object]) -> None:
        begun_ns = time.monotonic_ns()
        work()
        self._recorder.add(name, "frame", begun_ns, time.monotonic_ns() - begun_ns)


def of_backend(name: str, device: str) -> tuple[str, tuple[str, ...]]:
    """Return the device that a backend takes, and its precisions there, the best first.

    Raises: SettingsError for one that is not known, DeviceError for a device it has not,
    BackendMissing.
    """
    if name not in BACKENDS:
        known = ", ".join(("auto", *BACKENDS))
        raise SettingsError(f"backend {name!r} is not known; choose from: {known}")
    module = importlib.import_module(BACKENDS[name])
    chosen = device_of(name, device)
    return chosen, precisions_on(module, chosen)
