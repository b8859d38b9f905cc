"""A timeline of frames in Chrome's trace format: stages, network calls and the layers in them.

While a `Recorder` records, `open_component` hands out components that note their calls, and
backends open their models with their own profilers on (`recording()` tells them). The profilers
cost time: a trace shows where it goes, figures are measured without one.
Source: Trace Event Format (complete events, "ph": "X"; times in microseconds).
"""

from __future__ import annotations

import json
import os
import threading
import time
from bisect import bisect
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple, Protocol, TypeAlias, runtime_checkable

from diffusionact.errors import MediaError
from diffusionact.files import write_whole
from diffusionact.runtime.timing import Times

Event: TypeAlias = dict[str, Any]

US = 1000.0  # nanoseconds
OVERLAP_US = 0.5  # that rounding may leave between neighbours


class Layer(NamedTuple):
    """One operator of one call. begun_ns: since the call began; kind: such as "Conv"; averaged:
    the duration is the mean over all calls, the profiler tells no other."""

    name: str
    kind: str
    begun_ns: int
    spent_ns: int
    averaged: bool = False


@runtime_checkable
class Profiled(Protocol):
    """What a component may have beside its four members while a Recorder records."""

    def layers(self) -> Sequence[Sequence[Layer]]:
        """Return the layers of every call so far, in order; no call may follow."""


class Span(NamedTuple):
    """Something that took time. category: "frame", "stage", "call" or "layer"."""

    name: str
    category: str
    begun_ns: int  # of time.monotonic_ns
    spent_ns: int
    thread: int
    about: Mapping[str, Any] = {}


@dataclass
class _Calls:
    """The calls of one component."""

    name: str
    component: Any
    spans: list[tuple[int, int, int]] = field(default_factory=list)  # begin, duration, thread


class Recorder:
    """Collects spans of any thread; `save` writes them."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._spans: list[Span] = []
        self._calls: list[_Calls] = []
        self._threads: dict[int, str] = {}

    def add(self, name: str, category: str, begun_ns: int, spent_ns: int, **about: Any) -> None:
        """Return nothing; something of the calling thread is noted."""
        thread = threading.get_ident()
        with self._lock:
            self._threads.setdefault(thread, threading.current_thread().name)
            self._spans.append(Span(name, category, begun_ns, spent_ns, thread, about))

    def stages(self, times: Mapping[str, int]) -> None:
        """Return nothing; the stages of one frame, as `Result.times` has them, are noted."""
        if not isinstance(times, Times):
            raise TypeError("times that do not say when they began have no place on a timeline")
        for stage, begun_ns, spent_ns in times.spans():
            self.add(stage, "stage", begun_ns, spent_ns)

    def watched(self, name: str, component: Any) -> Any:
        """Return the component, whose calls are noted from now on."""
        calls = _Calls(name, component)
        self._calls.append(calls)
        return _Watched(calls)

    def spans(self) -> list[Span]:
        """Return all spans, layers among them; the profilers are read, no call may follow."""
        made = list(self._spans)
        for calls in self._calls:
            made += _call_spans(calls)
        return sorted(made, key=lambda span: (span.thread, span.begun_ns, -span.spent_ns))

    def save(self, path: Path, about: Mapping[str, Any]) -> list[Span]:
        """Return the spans; the file has them as a trace. about: what they were measured on.

        Raises: MediaError when it cannot be written.
        """
        spans = self.spans()
        document = {
            "traceEvents": [*self._names(spans), *events(spans)],
            "displayTimeUnit": "ms",
            "otherData": dict(about),
        }
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_whole(path, json.dumps(document, separators=(",", ":")))
        except OSError as error:
            raise MediaError(f"{path}: cannot write the trace ({error})") from error
        return spans

    def _names(self, spans: Iterable[Span]) -> Iterator[Event]:
        yield {
            "name": "process_name", "ph": "M", "pid": os.getpid(), "tid": 0,
            "args": {"name": "diffusionact"},
        }  # fmt: skip
        for thread in sorted({span.thread for span in spans}):
            name = self._threads.get(thread, "networks")
            yield {
                "name": "thread_name", "ph": "M", "pid": os.getpid(), "tid": thread,
                "args": {"name": name},
            }  # fmt: skip


_recorder: ContextVar[Recorder | None] = ContextVar("recorder", default=None)


def recording() -> Recorder | None:
    """Return the recorder that records now, or None."""
    return _recorder.get()


@contextmanager
def record() -> Iterator[Recorder]:
    """Yield a recorder; components that are opened meanwhile are watched and profiled."""
    recorder = Recorder()
    token = _recorder.set(recorder)
    try:
        yield recorder
    finally:
        _recorder.reset(token)


class _Watched:
    """A component that notes when it ran, and marks it for NVIDIA's tools where they are here."""

    def __init__(self, calls: _Calls) -> None:
        self._calls = calls
        self._run, self._spans = calls.component.run, calls.spans
        self._mark = _nvtx_range()

    def __getattr__(self, name: str) -> Any:  # inputs, outputs, bind and what a backend adds
        return getattr(self._calls.component, name)

    def run(self) -> None:
        begun_ns = time.monotonic_ns()
        with self._mark(self._calls.name):
            self._run()
        spent_ns = time.monotonic_ns() - begun_ns
        self._spans.append((begun_ns, spent_ns, threading.get_ident()))


def _nvtx_range() -> Any:
    """A context manager over a name: an NVTX range, or nothing where the package is missing."""
    try:
        import nvtx  # type: ignore[import-not-found, unused-ignore]
    except ImportError:
        return nullcontext
    return nvtx.annotate


def _call_spans(calls: _Calls) -> Iterator[Span]:
    """A component's calls, each with its layers inside it."""
    profiled = isinstance(calls.component, Profiled)
    runs = calls.component.layers() if profiled else []
    if profiled and len(runs) != len(calls.spans):
        raise RuntimeError(
            f"{calls.name}: the profiler saw {len(runs)} calls, there were {len(calls.spans)}"
        )
    for i, (begun_ns, spent_ns, thread) in enumerate(calls.spans):
        yield Span(calls.name, "call", begun_ns, spent_ns, thread)
        yield from _fitted(runs[i] if profiled else (), begun_ns, spent_ns, thread)


def _fitted(layers: Sequence[Layer], begun_ns: int, spent_ns: int, thread: int) -> Iterator[Span]:
    """The layers of a call as spans inside of it; those that together outlast it, as averages may
    and coarse clocks make them, are shortened alike."""
    end_ns = max((layer.begun_ns + layer.spent_ns for layer in layers), default=0)
    share = min(1.0, spent_ns / end_ns) if end_ns else 1.0
    for layer in layers:
        begin, end = (int(at * share) for at in (layer.begun_ns, layer.begun_ns + layer.spent_ns))
        if end > begin:
            about = {"kind": layer.kind, **({"averaged": True} if layer.averaged else {})}
            yield Span(layer.name, "layer", begun_ns + begin, end - begin, thread, about)


def events(spans: Iterable[Span]) -> Iterator[Event]:
    """Yield the trace events of spans."""
    for span in spans:
        event: Event = {
            "name": span.name,
            "cat": span.category,
            "ph": "X",
            "ts": span.begun_ns / US,
            "dur": span.spent_ns / US,
            "pid": os.getpid(),
            "tid": span.thread,
        }
        if span.about:
            event["args"] = dict(span.about)
        yield event


def faults(document: Any) -> list[str]:
    """Return what keeps a trace from being shown rightly: keys that are missing, spans of one
    thread that overlap without one holding the other. Empty for a good one."""
    try:
        found = [event for event in document["traceEvents"] if event["ph"] == "X"]
        found.sort(key=lambda e: (e["pid"], e["tid"], e["ts"], -e["dur"]))
        wrong = [f"{e['name']}: lasts {e['dur']} us" for e in found if e["dur"] < 0]
    except (KeyError, TypeError) as error:
        return [f"no trace: {error!r}"]
    if not found:
        return ["no trace: it is empty"]
    open_spans: list[Event] = []
    for event in found:
        while open_spans and not _within(event, open_spans[-1]):
            before = open_spans.pop()
            same = (before["pid"], before["tid"]) == (event["pid"], event["tid"])
            if same and event["ts"] < before["ts"] + before["dur"] - OVERLAP_US:
                wrong.append(f"{event['name']} begins inside {before['name']} and ends after it")
        open_spans.append(event)
    return wrong


def _within(inner: Event, outer: Event) -> bool:
    return (
        (inner["pid"], inner["tid"]) == (outer["pid"], outer["tid"])
        and inner["ts"] >= outer["ts"]
        and inner["ts"] + inner["dur"] <= outer["ts"] + outer["dur"] + OVERLAP_US
    )


def spent_ms(spans: Iterable[Span], category: str, by: str = "name") -> dict[str, float]:
    """Return milliseconds of all spans of a category by name, or by something of their `about`."""
    total: dict[str, float] = {}
    for span in spans:
        if span.category == category:
            key = span.name if by == "name" else str(span.about[by])
            total[key] = total.get(key, 0.0) + span.spent_ns / 1e6
    return total


def onnxruntime_layers(path: Path) -> list[list[Layer]]:
    """Return the layers of every run in a profile that ONNX Runtime wrote.

    Source: ONNX Runtime, profiling: "model_run" events hold those of category "Node".
    """
    found = json.loads(path.read_text(encoding="utf-8"))
    runs = sorted((e for e in found if e.get("name") == "model_run"), key=lambda e: e["ts"])
    nodes = sorted(
        (e for e in found if e.get("cat") == "Node" and e["name"].endswith("_kernel_time")),
        key=lambda e: e["ts"],
    )
    made: list[list[Layer]] = [[] for _ in runs]
    ends = [run["ts"] + run["dur"] for run in runs]
    for node in nodes:
        i = bisect(ends, node["ts"])
        if i == len(runs):
            break
        made[i].append(
            Layer(
                node["name"].removesuffix("_kernel_time"),
                node["args"]["op_name"],
                round((node["ts"] - runs[i]["ts"]) * US),
                round(node["dur"] * US),
            )
        )
    return made
