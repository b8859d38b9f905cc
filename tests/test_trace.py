"""Traces: well formed, spans nest, and what they tell agrees with a stopwatch."""

from __future__ import annotations

import json
import threading
import time
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import pytest

from diffusionact import cli
from diffusionact.landmarks import sidecar_path
from diffusionact.runtime import bench, rig, trace
from diffusionact.runtime.component import BACKENDS
from diffusionact.runtime.timing import StopWatch
from diffusionact.runtime.writer import make_track

# Of a trace's frames: what the stages may leave of a frame, and the frames of the stopwatch. A toy
# frame takes a millisecond, of which the recorder's own notes are a part.
LEFT_SHARE, LEFT_MS = 0.05, 0.3
FRAMES = 5
PROFILING = ["ort"]
try:
    import openvino  # noqa: F401
except ImportError:
    pass
else:
    if "openvino" in BACKENDS:
        PROFILING.append("openvino")


@pytest.fixture
def media(tmp_path: Path, portrait: Any) -> tuple[Path, Path]:
    image, face = portrait
    still, driver = tmp_path / "face.png", tmp_path / "driver.npz"
    cv2.imwrite(str(still), image)
    make_track([face], [0], (80, 90)).save(sidecar_path(still))
    make_track([face] * 5, [i * 40_000_000 for i in range(5)], (80, 90)).save(driver)
    return still, driver


class within:
    """The moments of a span, us."""

    def __init__(self, event: dict[str, Any]) -> None:
        self._begin, self._end = event["ts"], event["ts"] + event["dur"]

    def __contains__(self, moment: float) -> bool:
        return self._begin <= moment <= self._end


@pytest.mark.parametrize("backend", PROFILING)
def test_a_trace_agrees_with_the_stopwatch(
    backend: str, toy_bundle: Path, media: tuple[Path, Path], tmp_path: Path
) -> None:
    file = tmp_path / "trace.json"
    task = rig.Task(toy_bundle, *media, device="cpu")
    shown = bench.write_trace(task, rig.Variant(backend, "fp32", 4, 1), file, frames=FRAMES)
    document = json.loads(file.read_text())
    assert trace.faults(document) == []
    spans = [event for event in document["traceEvents"] if event["ph"] == "X"]
    begun = next(e["ts"] for e in spans if e["name"] == "frame 0")
    frames = [e for e in spans if e["cat"] == "frame" and e["ts"] >= begun]
    assert [e["name"] for e in frames] == [f"frame {i}" for i in range(FRAMES)]

    stages = [e for e in spans if e["cat"] == "stage" and e["ts"] >= begun]
    left_ms = [
        (frame["dur"] - sum(e["dur"] for e in stages if e["ts"] in within(frame))) / 1e3
        for frame in frames
    ]
    gaps_ms = [
        (later["ts"] - one["ts"] - one["dur"]) / 1e3
        for one, later in zip(frames, frames[1:], strict=False)
    ]
    for outside_ms in (left_ms, gaps_ms):
        # The middle one, for the machine may have stopped one of them between two stages.
        allowed_ms = LEFT_SHARE * shown["stopwatch_ms"] / FRAMES + LEFT_MS
        assert 0 <= min(outside_ms) and np.median(outside_ms) <= allowed_ms
    assert shown["frames_ms"] <= shown["stopwatch_ms"]
    stages_ms = sum(e["dur"] for e in stages) / 1e3
    assert sum(shown["stages_ms"].values()) == pytest.approx(stages_ms, rel=1e-6)
    assert list(shown["stages_ms"]) == ["retarget", "condition", "encode", "render", "paste"]

    calls = [e["name"] for e in spans if e["cat"] == "call" and e["ts"] >= begun]
    assert calls == ["encoder", "modulation", *["unet_step"] * 4] * FRAMES
    for stage, components in (("encode", ["encoder"]), ("render", ["modulation", "unet_step"])):
        inside_ms = sum(shown["calls_ms"][name] for name in components)
        assert 0 < inside_ms <= shown["stages_ms"][stage]
    layers_ms = sum(shown["layers_ms"].values())
    assert 0 < layers_ms <= sum(shown["calls_ms"].values()) + 0.01
    assert any("Conv" in kind for kind in shown["layers_ms"])


def test_the_command_writes_a_trace(
    toy_bundle: Path, media: tuple[Path, Path], tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    monkeypatch.setattr(cli, "_start_log", lambda arguments: None)
    file = tmp_path / "deep" / "trace.json"
    words = ["bench", str(toy_bundle), "-s", str(media[0]), "-d", str(media[1]), "--backend", "ort"]
    assert cli.main([*words, "--frames", "2", "--rounds", "1", "--trace", str(file)]) == 0
    assert f"wrote {file}: 3 frames" in capsys.readouterr().out
    assert json.loads(file.read_text())["otherData"]["ran"]["backend"] == "ort"


def test_threads_have_tracks_of_their_own(tmp_path: Path) -> None:
    with trace.record() as recorder:
        assert trace.recording() is recorder
        watch = StopWatch()
        watch.lap("render")
        recorder.stages(watch.times)
        other = threading.Thread(target=recorder.stages, args=(watch.times,), name="writer")
        other.start()
        other.join()
    assert trace.recording() is None
    recorder.save(tmp_path / "t.json", {"on": "test"})
    document = json.loads((tmp_path / "t.json").read_text())
    names = {e["args"]["name"] for e in document["traceEvents"] if e["name"] == "thread_name"}
    assert names == {"MainThread", "writer"} and document["otherData"] == {"on": "test"}
    tracks = {e["tid"] for e in document["traceEvents"] if e["ph"] == "X"}
    assert len(tracks) == 2


def test_times_without_a_beginning_have_no_place() -> None:
    with pytest.raises(TypeError, match="when they began"):
        trace.Recorder().stages({"render": 1})


class Slow:
    """A component that takes its time, with layers that outlast it."""

    inputs: dict[str, Any] = {"x": 1}

    def run(self) -> None:
        time.sleep(0.002)

    def layers(self) -> list[list[trace.Layer]]:
        return [[trace.Layer("a", "Conv", 0, 1_000_000), trace.Layer("b", "Add", 1_000_000, 10**9)]]


def test_layers_end_with_their_call() -> None:
    recorder = trace.Recorder()
    watched = recorder.watched("unet_step", Slow())
    assert watched.inputs == {"x": 1}
    watched.run()
    call, first, second = recorder.spans()
    assert (call.category, first.name, second.name) == ("call", "a", "b")
    assert call.spent_ns >= 2_000_000 and first.begun_ns == call.begun_ns
    assert second.begun_ns == first.begun_ns + first.spent_ns
    assert second.begun_ns + second.spent_ns == call.begun_ns + call.spent_ns
    assert second.spent_ns / first.spent_ns == pytest.approx(1000, rel=0.01), "shortened alike"
    assert trace.faults({"traceEvents": list(trace.events([call, first, second]))}) == []


def test_a_profiler_that_lost_a_call_is_found_out() -> None:
    recorder = trace.Recorder()
    watched = recorder.watched("unet_step", Slow())
    watched.run()
    watched.run()
    with pytest.raises(RuntimeError, match="saw 1 calls, there were 2"):
        recorder.spans()


def event(name: str, ts: float, dur: float, tid: int = 1) -> dict[str, Any]:
    return {"name": name, "cat": "stage", "ph": "X", "ts": ts, "dur": dur, "pid": 1, "tid": tid}


@pytest.mark.parametrize(
    "document, words",
    [
        ({}, "no trace"),
        ({"traceEvents": []}, "empty"),
        ({"traceEvents": [{"ph": "X", "name": "a"}]}, "no trace"),
        ({"traceEvents": [event("a", 0, 10), event("b", 5, 10)]}, "b begins inside a"),
        ({"traceEvents": [event("a", 0, 9), event("b", 1, 3), event("c", 2, 9)]}, "c begins"),
        ({"traceEvents": [event("a", 0, -1)]}, "lasts -1"),
    ],
)
def test_what_no_viewer_shows_rightly_is_found(document: dict[str, Any], words: str) -> None:
    assert words in trace.faults(document)[0]


def test_spans_that_nest_follow_or_lie_on_other_threads_are_right() -> None:
    good = [event("a", 0, 10), event("b", 0, 4), event("c", 4, 6), event("d", 10, 1)]
    assert trace.faults({"traceEvents": [*good, event("e", 5, 10, tid=2)]}) == []


def test_the_profile_of_onnxruntime_is_read_by_runs(tmp_path: Path) -> None:
    def node(name: str, ts: int) -> dict[str, Any]:
        return {"cat": "Node", "name": f"{name}_kernel_time", "ts": ts, "dur": 3,
                "args": {"op_name": "Conv"}}  # fmt: skip

    profile = [
        {"cat": "Session", "name": "model_run", "ts": 100, "dur": 10, "args": {}},
        node("a", 101), node("b", 105),
        {"cat": "Session", "name": "model_run", "ts": 200, "dur": 10, "args": {}},
        node("a", 204),
    ]  # fmt: skip
    (tmp_path / "p.json").write_text(json.dumps(profile))
    runs = trace.onnxruntime_layers(tmp_path / "p.json")
    assert [[(layer.name, layer.begun_ns) for layer in run] for run in runs] == [
        [("a", 1000), ("b", 5000)],
        [("a", 4000)],
    ]


def test_nothing_is_watched_without_a_recorder(toy_bundle: Path) -> None:
    from diffusionact import manifest
    from diffusionact.runtime.component import open_component

    part = open_component(toy_bundle, manifest.read(toy_bundle), "encoder", backend="ort")
    assert type(part).__name__ == "OrtComponent"
    assert np.prod([int(n) for n in part.outputs["z"].shape]) == 8
