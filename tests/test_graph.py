"""The loop on a device, on a device of NumPy: it must give the pictures of `Loop`, to the bit."""

from __future__ import annotations

import logging
import sys
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest

from diffusionact import manifest as manifest_file
from diffusionact.errors import DeviceError, MediaError, SettingsError
from diffusionact.image import to_tensor, to_uint8
from diffusionact.runtime import choice as choice_file
from diffusionact.runtime import component as component_file
from diffusionact.runtime import cuda, gpu_choice, graph, ort, trt
from diffusionact.runtime.choice import choose
from diffusionact.runtime.graph import GraphLoop, open_graph_loop
from diffusionact.runtime.loop import Loop, open_loop
from diffusionact.runtime.reenactor import Reenactor
from diffusionact.runtime.settings import Settings
from tests.recording_device import OnDevice, RecordingDevice

SIDE, K, Z = 32, 4, 8  # of the toy bundle
MODES = ("step", "turbo", "eager")


@pytest.fixture
def open_on(monkeypatch: pytest.MonkeyPatch) -> Callable[..., GraphLoop]:
    """Opens a bundle's loop over ONNX Runtime's networks, on a recording device."""

    def make(folder: Path, device: RecordingDevice, **settings: Any) -> GraphLoop:
        inner = component_file.open_component

        def on_device(bundle: Path, manifest: Any, name: str, **how: Any) -> OnDevice:
            assert how.pop("device") == "cuda" and how.pop("stream") == device.stream
            assert how.pop("backend") == "toy"
            return OnDevice(device, name, inner(bundle, manifest, name, **how, threads=1))

        monkeypatch.setattr(graph, "open_component", on_device)
        manifest = manifest_file.read(folder)
        return open_graph_loop(folder, manifest, device, backend="toy", **settings)

    return make


@pytest.fixture
def reference(toy_bundle: Path) -> Loop:
    return open_loop(toy_bundle, manifest_file.read(toy_bundle), also=(2, 5), threads=1)


class FromToy:
    """Networks of the "trt" backend, which are ONNX Runtime's on a recording device."""

    DEVICES = ("cuda",)
    PRECISIONS = ("fp16", "fp32")

    def __init__(self, device: RecordingDevice) -> None:
        self.device = device

    def open_model(self, path: Path, inputs: Any, outputs: Any, **how: Any) -> OnDevice:
        assert (how.pop("device"), how.pop("stream")) == ("cuda", self.device.stream)
        del how["precision"]
        inner = ort.open_model(path, inputs, outputs, device="cpu", precision="fp32", **how)
        return OnDevice(self.device, path.stem, inner)


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> RecordingDevice:
    """Backend "trt" and device "cuda" work here, on a recording device."""
    device = RecordingDevice()
    monkeypatch.setitem(sys.modules, component_file.BACKENDS["trt"], FromToy(device))  # type: ignore[arg-type]
    monkeypatch.setattr(cuda, "Device", lambda index=0: device)
    return device


def noise(seed: int) -> Any:
    return np.random.default_rng(seed).standard_normal((1, 3, SIDE, SIDE)).astype(np.float32)


def drawing(seed: int) -> Any:
    return np.random.default_rng(seed).integers(0, 256, (SIDE, SIDE, 3), np.uint8)


def wanted_frame(loop: Loop, portrait: Any, condition: Any, x_T: Any) -> Any:
    z = loop.encode(to_tensor(portrait), to_tensor(condition))
    return to_uint8(loop.render(x_T, z))


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("bundle", ["toy_bundle", "own_inversion_bundle"])
def test_it_gives_the_pictures_of_the_loop(
    bundle: str, mode: Any, open_on: Any, request: pytest.FixtureRequest
) -> None:
    folder: Path = request.getfixturevalue(bundle)
    wanted = open_loop(folder, manifest_file.read(folder), threads=1)
    seen = open_on(folder, RecordingDevice(), mode=mode)
    assert seen.mode == mode and (seen.steps, seen.prepared) == (4, (4,))
    for seed in (1, 5):
        image, condition, x_T = np.clip(noise(seed), -1, 1), noise(seed + 1), noise(seed + 2)
        z = wanted.encode(image, condition)
        np.testing.assert_array_equal(seen.encode(image, condition), z)
        z_seen = seen.encode(image, condition).copy()
        np.testing.assert_array_equal(seen.invert(image, z_seen), wanted.invert(image, z))
        np.testing.assert_array_equal(seen.render(x_T, z_seen), wanted.render(x_T, z))


@pytest.mark.parametrize("mode", MODES)
def test_frames_are_the_loops_pictures(
    mode: Any, open_on: Any, toy_bundle: Path, reference: Loop
) -> None:
    loop = open_on(toy_bundle, RecordingDevice(), mode=mode)
    portrait, x_T = drawing(1), noise(2)
    loop.set_source(portrait, x_T)
    for seed in (3, 4, 3):
        wanted = wanted_frame(reference, portrait, drawing(seed), x_T)
        np.testing.assert_array_equal(loop.frame(drawing(seed)), wanted)
        np.testing.assert_array_equal(loop.device_picture.host, wanted)
        # What callers of the other members leave behind does not reach the next frame.
        loop.invert(noise(8), loop.encode(noise(9), noise(10)))
        loop.render(noise(11), np.ones((1, Z), np.float32))


def test_two_frames_are_on_their_way(open_on: Any, toy_bundle: Path, reference: Loop) -> None:
    device = RecordingDevice()
    loop = open_on(toy_bundle, device, mode="step")
    portrait, x_T, canvas = drawing(1), noise(2), np.zeros((SIDE, SIDE, 3), np.uint8)
    loop.set_source(portrait, x_T)
    wanted = [wanted_frame(reference, portrait, drawing(seed), x_T) for seed in range(5)]
    waits, tickets = device.waits, []
    for seed in range(5):
        canvas[...] = drawing(seed)
        tickets.append(loop.submit(canvas))
        canvas[...] = 0  # it is the caller's again
        if seed:
            np.testing.assert_array_equal(loop.result(tickets[seed - 1]), wanted[seed - 1])
    np.testing.assert_array_equal(loop.result(tickets[4]), wanted[4])
    np.testing.assert_array_equal(loop.result(tickets[3]), wanted[3])
    assert device.waits == waits, "a frame waits for its own mark, not for the stream"
    for gone in (tickets[2], tickets[4] + 1, -1):
        with pytest.raises(SettingsError, match="5 were submitted"):
            loop.result(gone)


def test_a_frame_is_these_operations_in_this_order(open_on: Any, toy_bundle: Path) -> None:
    device = RecordingDevice()
    loop = open_on(toy_bundle, device, mode="step")
    loop.set_source(drawing(1), noise(2))
    loop.frame(drawing(3))
    device.launched.clear()
    loop.frame(drawing(4))
    assert [operation[0] for operation in device.launched] == [
        "upload", "pack", "pack", "graph", "start", "graph", *["graph"] * 4, "unpack",
        "download", "event",
    ]  # fmt: skip
    encode, modulate, *steps = (o[1] for o in device.launched if o[0] == "graph")
    assert len({encode, modulate, *steps}) == 3


def test_addresses_lead_from_the_drawing_to_the_picture(open_on: Any, toy_bundle: Path) -> None:
    device = RecordingDevice()
    loop = open_on(toy_bundle, device, mode="step")
    loop.set_source(drawing(1), noise(2))
    loop.frame(drawing(3))  # sends the tables of this run
    device.launched.clear()
    loop.frame(drawing(3))
    done: list[Any] = []
    for operation in device.launched:
        parts = device.graphs[operation[1]].parts if operation[0] == "graph" else None
        done.extend([part[0] for part in parts] if parts is not None else [operation])
    upload, pack_image, pack, encoder, start, modulation, *steps, unpack, download, _ = done
    assert [step[0] for step in steps] == ["take_row", "unet_step", "ddim_step", "next_step"] * 4
    assert steps[:4] == steps[4:8] == steps[8:12] == steps[12:], "one step serves all"
    _, image, condition, z = encoder
    assert upload[1] == pack[1] != pack_image[1]
    assert (pack_image[2], pack[2]) == (image, condition)
    _, z_of_modulation, _, scales, shifts = modulation
    assert z_of_modulation == z
    take_row, network, ddim_step, next_step = steps[:4]
    _, x, scale, shift, prediction = network
    counter = next_step[1]
    assert take_row[1:3] == (scales, shifts) and take_row[4:] == (counter, scale, shift)
    assert start[1] == x and start[3] == counter
    assert (ddim_step[1], ddim_step[2], ddim_step[4]) == (x, prediction, counter)
    assert unpack == ("unpack", x, download[1])
    assert download[1] == loop.device_picture.ptr


def test_the_tables_are_the_schedules(open_on: Any, toy_bundle: Path) -> None:
    device = RecordingDevice()
    loop = open_on(toy_bundle, device, also=(2,), mode="step")
    manifest = manifest_file.read(toy_bundle)
    loop.set_source(drawing(1), noise(2))
    for steps in (4, 2):
        loop.set_steps(steps)
        loop.frame(drawing(3))
        run = graph.runs(manifest, steps)[0]
        recorded = {part[0][0]: part[0] for g in device.graphs for part in g.parts}
        coefficients = device.places[recorded["ddim_step"][3]].host[:steps]
        rows = device.places[recorded["take_row"][3]].host[:steps]
        np.testing.assert_array_equal(coefficients, np.array([s[1:] for s in run.steps], "f4"))
        np.testing.assert_array_equal(rows, [s.row for s in run.steps])


@pytest.mark.parametrize("mode", MODES)
def test_steps_change_between_frames_and_nothing_is_recorded_anew(
    mode: Any, open_on: Any, toy_bundle: Path, reference: Loop
) -> None:
    device = RecordingDevice()
    loop = open_on(toy_bundle, device, also=(2, 5), mode=mode)
    portrait, x_T = drawing(1), noise(2)
    loop.set_source(portrait, x_T)
    graphs, allocated = len(device.graphs), device.allocated
    for steps in (2, 4, 5, 2):
        loop.set_steps(steps)
        reference.set_steps(steps)
        assert loop.steps == steps
        wanted = wanted_frame(reference, portrait, drawing(3), x_T)
        np.testing.assert_array_equal(loop.frame(drawing(3)), wanted)
        loop.invert(noise(4), np.ones((1, Z), np.float32))  # its tables replace those of render
        np.testing.assert_array_equal(loop.frame(drawing(3)), wanted)
    assert (len(device.graphs), device.allocated) == (graphs, allocated)
    with pytest.raises(SettingsError, match="steps=3: prepared are 2, 4, 5"):
        loop.set_steps(3)


def test_tables_are_sent_only_when_the_run_changes(open_on: Any, toy_bundle: Path) -> None:
    device = RecordingDevice()
    loop = open_on(toy_bundle, device, also=(2,), mode="step")
    loop.set_source(drawing(1), noise(2))
    loop.frame(drawing(3))
    device.launched.clear()
    loop.frame(drawing(3))
    assert sum(operation[0] == "upload" for operation in device.launched) == 1  # the drawing
    loop.set_steps(2)
    device.launched.clear()
    loop.frame(drawing(3))
    assert sum(operation[0] == "upload" for operation in device.launched) == 3


@pytest.mark.parametrize("mode", MODES)
def test_a_run_of_one_step(mode: Any, open_on: Any, toy_bundle: Path) -> None:
    """Its tables have one row: what is done to warm up must not read a second."""
    wanted = open_loop(toy_bundle, manifest_file.read(toy_bundle), steps=[500], threads=1)
    loop = open_on(toy_bundle, RecordingDevice(), steps=[500], mode=mode)
    z = np.ones((1, Z), np.float32)
    np.testing.assert_array_equal(loop.render(noise(1), z), wanted.render(noise(1), z))


@pytest.mark.parametrize("refused", ["unet_step", "encoder", "modulation"])
def test_what_cannot_be_recorded_is_launched_as_it_comes(
    refused: str, open_on: Any, toy_bundle: Path, reference: Loop, caplog: pytest.LogCaptureFixture
) -> None:
    device = RecordingDevice(refuses=[refused])
    with caplog.at_level(logging.WARNING, "diffusionact"):
        loop = open_on(toy_bundle, device)
    assert loop.mode == "eager" and f"{refused} cannot be recorded" in str(loop.why_eager)
    assert len(caplog.records) == 1, "once, not for each network"
    portrait, x_T = drawing(1), noise(2)
    loop.set_source(portrait, x_T)
    wanted = wanted_frame(reference, portrait, drawing(3), x_T)
    np.testing.assert_array_equal(loop.frame(drawing(3)), wanted)


def test_when_only_the_long_graph_fails_the_step_stays_recorded(
    open_on: Any, toy_bundle: Path, reference: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = RecordingDevice()
    capture = device.capture

    def short(work: Any) -> Any:
        made = capture(work)
        if len(made.parts) > 4:
            raise DeviceError("too many nodes")
        return made

    monkeypatch.setattr(device, "capture", short)
    loop = open_on(toy_bundle, device)
    assert (loop.mode, loop.why_eager) == ("step", None)
    loop.set_source(drawing(1), noise(2))
    wanted = wanted_frame(reference, drawing(1), drawing(3), noise(2))
    np.testing.assert_array_equal(loop.frame(drawing(3)), wanted)


def test_when_the_graph_of_another_step_count_fails_its_steps_stay_recorded(
    open_on: Any, toy_bundle: Path, reference: Loop, monkeypatch: pytest.MonkeyPatch
) -> None:
    device = RecordingDevice()
    capture = device.capture

    def short(work: Any) -> Any:
        made = capture(work)
        if len(made.parts) > 4 * 4:  # a step is four operations, the bundle's run four steps
            raise DeviceError("too many nodes")
        return made

    monkeypatch.setattr(device, "capture", short)
    loop = open_on(toy_bundle, device, also=(5,), mode="turbo")
    assert (loop.mode, loop.why_eager) == ("turbo", None)
    loop.set_source(drawing(1), noise(2))
    for steps, graphs in ((5, 2 + 5), (4, 2 + 1)):
        loop.set_steps(steps)
        reference.set_steps(steps)
        device.launched.clear()
        wanted = wanted_frame(reference, drawing(1), drawing(3), noise(2))
        np.testing.assert_array_equal(loop.frame(drawing(3)), wanted)
        assert sum(operation[0] == "graph" for operation in device.launched) == graphs


@pytest.mark.parametrize(("launch_s", "node_s", "mode"), [(10.0, 1.0, "turbo"), (1.0, 1.0, "step")])
def test_the_faster_way_is_taken(
    launch_s: float, node_s: float, mode: str,
    open_on: Any, toy_bundle: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """Of a device where a launch takes so long, and a node of a graph so long."""
    device = RecordingDevice()
    now = [0.0]
    enqueue = device.enqueue

    def timed(operation: Any, work: Any) -> None:
        if not device.is_recording:
            nodes = len(device.graphs[operation[1]].parts) if operation[0] == "graph" else 1
            penalty = node_s * nodes if mode == "turbo" or nodes <= 4 else 2 * node_s * nodes
            now[0] += launch_s + penalty
        enqueue(operation, work)

    monkeypatch.setattr(device, "enqueue", timed)
    monkeypatch.setattr(graph.time, "perf_counter", lambda: now[0])
    loop = open_on(toy_bundle, device, also=(2,))
    assert loop.mode == mode
    assert (loop.seconds["turbo"] < loop.seconds["step"]) == (mode == "turbo")
    loop.set_source(drawing(1), noise(2))
    for steps, count in ((4, 4), (2, 2)):
        loop.set_steps(steps)
        device.launched.clear()
        loop.frame(drawing(3))
        launched = sum(operation[0] == "graph" for operation in device.launched)
        assert launched == 2 + (1 if mode == "turbo" else count)


def test_frames_of_the_device_are_not_copied_to_the_host(
    open_on: Any, toy_bundle: Path, reference: Loop
) -> None:
    device = RecordingDevice()
    loop = open_on(toy_bundle, device, mode="step")

    def there(array: Any) -> Any:
        made = device.empty(array.shape, str(array.dtype))
        made.host[...] = array
        return made

    loop.set_source(there(drawing(1)), there(noise(2)))
    loop.frame(there(drawing(4)))  # sends the tables of this run
    device.launched.clear()
    picture = loop.frame(there(drawing(3)))
    assert [o[0] for o in device.launched if o[0] in ("upload", "download")] == ["download"]
    wanted = wanted_frame(reference, drawing(1), drawing(3), noise(2))
    np.testing.assert_array_equal(picture, wanted)


@pytest.mark.parametrize("named", ["cuda", "auto"])
def test_open_loop_takes_the_gpu(
    named: str, on_gpu: RecordingDevice, toy_bundle: Path, reference: Loop
) -> None:
    manifest = manifest_file.read(toy_bundle)
    loop = open_loop(toy_bundle, manifest, backend="trt", device=named, also=(2,))
    assert isinstance(loop, GraphLoop) and loop.prepared == (2, 4)
    z = np.ones((1, Z), np.float32)
    np.testing.assert_array_equal(loop.render(noise(1), z), reference.render(noise(1), z))
    with pytest.raises(SettingsError, match="for the CPU"):
        open_loop(toy_bundle, manifest, backend="trt", device=named, approximate="reuse")


def test_components_can_be_wrapped_on_the_gpu_too(
    on_gpu: RecordingDevice, toy_bundle: Path
) -> None:
    seen: list[str] = []

    def wrap(name: str, part: Any) -> Any:
        seen.append(name)
        return part

    open_loop(toy_bundle, manifest_file.read(toy_bundle), backend="trt", wrap=wrap)
    assert sorted(set(seen)) == ["encoder", "modulation", "time", "unet_step"]


def test_onnx_runtime_is_not_recorded(
    open_on: Any, toy_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(graph, "NOT_RECORDABLE", ("toy",))
    device = RecordingDevice()
    loop = open_on(toy_bundle, device)
    assert (loop.mode, loop.why_eager, device.graphs) == ("eager", "asked for", [])


def test_a_reenactor_renders_the_same_on_the_gpu(
    on_gpu: RecordingDevice, toy_bundle: Path, portrait: Any
) -> None:
    picture, face = portrait
    results, sources = [], []
    for backend in ("trt", "ort"):
        settings = Settings(backend=backend, threads=1, steps=4, step_choices=(2,))
        with Reenactor.load(toy_bundle, settings=settings) as act:
            first = act.prepare(picture, landmarks=face)
            second = act.prepare(picture[::-1].copy(), landmarks=face)
            sources.append(first.x_T)
            for steps, source in ((4, first), (2, second), (4, first), (4, first)):
                act.set_steps(steps)
                results.append(act.rest(source))
    np.testing.assert_array_equal(*sources)
    assert list(results[0].times) == ["condition", "render", "paste"]
    for seen, wanted in zip(results[:4], results[4:], strict=True):
        assert seen.steps == wanted.steps
        np.testing.assert_array_equal(seen.crop, wanted.crop)
        np.testing.assert_array_equal(seen.frame, wanted.frame)
    assert not np.array_equal(results[0].crop, results[1].crop)
    uploads = [o for o in on_gpu.launched if o[0] == "upload"]
    assert uploads, "the GPU rendered"


class Foreign:
    """A picture of another library, in the host's memory."""

    def __init__(self, array: Any) -> None:
        self.array = array

    def __dlpack_device__(self) -> tuple[int, int]:
        return 1, 0

    def __dlpack__(self, **how: Any) -> Any:
        return self.array.__dlpack__(max_version=how.get("max_version"))


def test_a_reenactor_takes_pictures_of_other_libraries(toy_bundle: Path, portrait: Any) -> None:
    picture, face = portrait

    class Knows:
        """A tracker that sees the face it is told, and keeps the picture."""

        def __init__(self) -> None:
            self.seen: list[Any] = []

        def track(self, frame: Any) -> Any:
            self.seen.append(frame)
            return face

        def close(self) -> None: ...

    tracker: Any = Knows()
    settings = Settings(backend="ort", threads=1)
    with Reenactor.load(toy_bundle, "cpu", settings, tracker) as act:
        source = act.prepare(Foreign(picture), landmarks=face)
        np.testing.assert_array_equal(source.portrait, picture)
        wanted = act.reenact(picture, source).frame
        act.retargeter(source).reset()
        np.testing.assert_array_equal(act.reenact(Foreign(picture), source).frame, wanted)
        assert tracker.seen[1].ctypes.data == picture.ctypes.data, "nothing is copied"
        for wrong in ("driver.png", [1, 2]):
            with pytest.raises(MediaError, match="driver frame: not an array but"):
                act.reenact(wrong, source)  # type: ignore[arg-type]


def test_the_gpu_is_taken_where_it_can_be_used(
    toy_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = manifest_file.read(toy_bundle)

    def taken(device: str, **problems: str | None) -> str | None:
        for name in gpu_choice.ORDER:
            module = SimpleNamespace(
                PRECISIONS=("fp16",), problem=lambda where, name=name: problems.get(name)
            )
            monkeypatch.setitem(sys.modules, component_file.BACKENDS[name], module)  # type: ignore[arg-type]
        choice = choose(toy_bundle, manifest, device=device)
        return choice.backend

    monkeypatch.setattr(cuda, "why_not", lambda: None)
    assert taken("auto") == taken("cuda") == "trt"
    assert taken("auto", trt="no engines") == "torch"
    no = {"trt": "no engines", "torch": "built without CUDA"}
    assert taken("cuda", **no) == "ort"
    monkeypatch.setattr(choice_file, "installed", lambda name: False)
    assert taken("auto", **no) == "ort"  # the CPU's
    with pytest.raises(DeviceError, match="trt: no engines; torch: built without CUDA; ort: no pr"):
        taken("cuda", **no, ort="no provider")
    with pytest.raises(DeviceError, match="trt: computes in fp16, not in fp32"):
        choose(toy_bundle, manifest, device="cuda", precision="fp32")
    monkeypatch.setattr(cuda, "why_not", lambda: "no NVIDIA driver here")
    assert taken("auto") == "ort"
    with pytest.raises(DeviceError, match="device 'cuda': no NVIDIA driver here"):
        taken("cuda")


def test_an_engine_that_is_missing_is_a_reason(
    toy_bundle: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = manifest_file.read(toy_bundle)
    monkeypatch.setattr(cuda, "probe", lambda index=0: RecordingDevice.gpu)
    monkeypatch.setattr(cuda, "why_not", lambda: None)
    monkeypatch.setattr(gpu_choice, "ORDER", ("trt", "trt"))
    library = SimpleNamespace(name="tensorrt_rtx", version="1.2", module=None)
    monkeypatch.setattr(trt.trt_library, "installed", lambda: ("tensorrt_rtx",))
    monkeypatch.setattr(trt.trt_library, "find", lambda name=None: library)
    with pytest.raises(DeviceError, match="trt: .*no engine of encoder .* run: diffusionact build"):
        gpu_choice.gpu_backend(toy_bundle, manifest, "auto", asked=True)
    assert gpu_choice.gpu_backend(toy_bundle, manifest, "auto", asked=False) is None
