"""A live session: what is shown, what counts as new, and what goes wrong before a camera."""

from __future__ import annotations

import itertools
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pytest

from diffusionact.errors import BackendMissing, MediaError, SettingsError
from diffusionact.landmarks import Landmarks
from diffusionact.runtime.camera import open_camera
from diffusionact.runtime.control import Goal
from diffusionact.runtime.live import LiveReport, LiveSession, LiveSettings
from diffusionact.runtime.media import Frame, open_reader
from diffusionact.runtime.reenactor import Reenactor, Result
from diffusionact.runtime.settings import Settings
from diffusionact.runtime.sinks import SeveralSinks, open_sink
from diffusionact.runtime.source import Source
from diffusionact.runtime.tracker import open_tracker
from tests.clips import grey
from tests.live_parts import Camera, Found, Screen, moved, patient, run, steps_px, turning

UInt8Array = npt.NDArray[np.uint8]
MEDIA = Path(__file__).parents[2] / "shared" / "media"
SIDE = 32  # of the toy bundle's crop
# A face that comes and goes eases; at once it would be a step of several pixels.
LARGEST_STEP_PX = 1.2
WARM_UPS = 2  # pictures that a session tracks before its camera's
needs_media = pytest.mark.skipif(not MEDIA.is_dir(), reason="needs the shared test media")


@pytest.fixture
def act(toy_bundle: Path) -> Iterator[Reenactor]:
    settings = Settings(backend="ort", threads=1, step_choices=(2, 3, 4))
    with Reenactor.load(toy_bundle, settings=settings) as made:
        yield made


@pytest.fixture
def source(act: Reenactor, portrait: tuple[UInt8Array, Landmarks]) -> Source:
    return act.prepare(portrait[0], landmarks=portrait[1])


@pytest.fixture
def results(act: Reenactor, monkeypatch: pytest.MonkeyPatch) -> list[Result]:
    """What is rendered for the driver, in order."""
    kept: list[Result] = []
    reenact = act.reenact

    def noted(*arguments: object) -> Result:
        kept.append(reenact(*arguments))  # type: ignore[arg-type]
        return kept[-1]

    monkeypatch.setattr(act, "reenact", noted)
    return kept


# What counts.


def test_new_faces_latency_and_stages_are_counted(
    act: Reenactor, source: Source, face: Landmarks
) -> None:
    screen, faces = Screen(), [face] * 40 + [None] * 20
    report = run(act, source, Camera(faces), screen)
    assert len(screen.pictures) == report.shown + 1  # and the portrait at rest, to begin with
    assert 0 < report.faces <= 40 and report.shown > report.faces
    assert report.faces_per_second == pytest.approx(report.faces / report.seconds)
    assert report.latency is not None and report.latency.count == report.faces
    stages = {"read", "track", "retarget", "encode", "render", "paste", "show", "total"}
    assert stages <= set(report.times)
    parts = sum(t.p50_ms for stage, t in report.times.items() if stage != "total")
    assert parts == pytest.approx(report.latency.p50_ms, rel=0.5)
    assert report.faces + sum(report.dropped.values()) >= 40
    assert (screen.open, screen.failed) == (0, False)


def test_the_latency_is_from_capture_to_the_moment_shown(
    act: Reenactor, source: Source, face: Landmarks, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Frames that are 70 ms old when they come, and a screen that takes 30 ms."""

    class Late(Camera):
        def __iter__(self) -> Iterator[Frame]:
            for frame in super().__iter__():
                yield Frame(None, frame.pts_ns - 70_000_000, 0, frame.landmarks)

    class Slow(Screen):
        def show(self, image_bgr: UInt8Array) -> int:
            time.sleep(0.03)
            return super().show(image_bgr)

    report = run(act, source, Late([face] * 30, 0.04), Slow())
    assert report.latency is not None and 100.0 <= report.latency.p50_ms < 300.0
    assert 70.0 <= report.times["read"].p50_ms < 140.0
    assert 30.0 <= report.times["show"].p50_ms < 100.0


def test_a_slow_screen_drops_frames_and_does_not_grow_the_delay(
    act: Reenactor, source: Source, face: Landmarks
) -> None:
    class Slow(Screen):
        def show(self, image_bgr: UInt8Array) -> int:
            time.sleep(0.05)
            return super().show(image_bgr)

    report = run(act, source, Camera([face] * 150, 0.005), Slow())
    assert sum(report.dropped.values()) > 80
    assert (
        report.latency is not None and report.latency.p99_ms < 1000.0
    )  # not the seconds of 150 waiting


# What is shown.


def test_the_label_is_on_unless_it_is_switched_off(
    act: Reenactor, source: Source, face: Landmarks
) -> None:
    corners = []
    for label in (True, False):
        screen = Screen()
        run(act, source, Camera([face] * 3), screen, label=label)
        corners.append(screen.pictures[-1][-8:, -30:])
    assert (corners[0] != corners[1]).mean() > 0.3


def test_figures_are_for_windows_and_a_key_hides_them(
    act: Reenactor, source: Source, face: Landmarks
) -> None:
    def lit(screen: Screen) -> list[bool]:
        return [bool((p[:12, :12] != screen.pictures[0][:12, :12]).any()) for p in screen.pictures]

    hidden, shown = Screen(), Screen({12: "o"}, wants_overlay=True)
    run(act, source, Camera([face] * 12, 0.02), hidden)
    run(act, source, Camera([face] * 40, 0.02), shown)
    assert not any(lit(hidden))
    assert all(lit(shown)[1:12]) and not any(lit(shown)[14:])


def test_the_camera_picture_is_never_shown(
    toy_bundle: Path, portrait: tuple[UInt8Array, Landmarks]
) -> None:
    green = np.zeros((90, 80, 3), np.uint8)
    green[..., 1] = 255
    tracker = Found(None)
    with Reenactor.load(toy_bundle, settings=Settings(backend="ort"), tracker=tracker) as act:
        source = act.prepare(portrait[0], landmarks=portrait[1])
        for found in (None, portrait[1]):
            tracker.face = found
            screen = Screen()
            report = run(act, source, Camera([None] * 20, image=green), screen)
            assert report.shown > 3 and (report.faces > 0) == (found is not None)
            for picture in screen.pictures:
                assert (picture == (0, 255, 0)).all(axis=2).mean() < 0.01
    assert threading.get_ident() in tracker.threads and len(tracker.threads) >= 2  # warm-up, then


def test_keys_change_the_portrait_and_keep_the_neutral_face(
    act: Reenactor, source: Source, face: Landmarks, portrait: tuple[UInt8Array, Landmarks]
) -> None:
    other = act.prepare(255 - portrait[0], landmarks=portrait[1])
    screen = Screen({60: "n", 75: "1", 90: "2"})
    faces = [face] * 45 + [moved(face)] * 80
    run(act, [source, other], patient(faces), screen)
    is_first = [np.array_equal(p[:3, :3], source.portrait[:3, :3]) for p in screen.pictures]
    assert all(is_first[:60])
    changes = np.flatnonzero(np.diff(np.array(is_first, int)))
    assert len(changes) == 3
    assert not np.array_equal(screen.pictures[-1], other.portrait)
    assert (screen.pictures[-1] != act.rest(other).frame).mean() > 0.05  # moved, not calibrating


def test_a_neutral_face_found_anew_comes_without_a_jump(
    act: Reenactor, source: Source, face: Landmarks, results: list[Result]
) -> None:
    faces = [face] * 40 + turning(face) + [moved(face)] * 135
    run(act, source, patient(faces), Screen({80: "r"}))
    assert steps_px(results).max() < LARGEST_STEP_PX
    at_rest = results[0].landmarks.points
    assert np.abs(results[75].landmarks.points - at_rest).max() > 2.0  # 25 degrees to the side
    assert np.abs(results[-1].landmarks.points - at_rest).max() < 0.5  # which is neutral now


# What goes wrong.


def test_a_driver_who_leaves_for_ten_seconds(
    act: Reenactor, source: Source, face: Landmarks, results: list[Result]
) -> None:
    away, back = 40 + 30, 40 + 30 + 250  # frames of 40 ms
    faces = [face] * 40 + turning(face) + [moved(face)] * 15 + [None] * 250 + [moved(face)] * 40
    report = run(act, source, patient(faces), Screen())
    assert report.faces == len(faces) - 250 and report.shown == len(faces)
    points = [result.landmarks.points for result in results]
    np.testing.assert_allclose(points[away + 12], points[away - 1], atol=0.1)  # held
    np.testing.assert_allclose(points[away + 60], points[0], atol=0.1)  # at rest
    np.testing.assert_allclose(points[back - 1], points[0], atol=0.1)
    np.testing.assert_allclose(points[-1], points[away - 1], atol=0.3)  # and back in motion
    assert steps_px(results).max() < LARGEST_STEP_PX


def test_a_silent_camera_lets_the_portrait_rest_and_counts_nothing(
    act: Reenactor, source: Source, face: Landmarks, results: list[Result]
) -> None:
    faces = [face] * 40 + turning(face) + [moved(face)] * 15
    camera = Camera(faces, 0.033, pauses={len(faces) - 2: 2.5})
    report = run(act, source, camera, Screen())
    silent = np.flatnonzero([not result.seen for result in results])
    assert len(silent) >= 10  # the session goes on, at the pace of an idle camera
    assert report.faces <= len(results) - len(silent)
    at_rest = results[0].landmarks.points
    assert np.abs(results[silent[0] - 1].landmarks.points - at_rest).max() > 2.0
    np.testing.assert_allclose(results[silent[-1]].landmarks.points, at_rest, atol=0.2)
    # Fewer pictures a second than of a camera that sends.
    assert steps_px(results[: silent[-1]]).max() < 2.0 * LARGEST_STEP_PX


@pytest.mark.parametrize("how", ["end", "stop", "seconds", "key"])
def test_a_session_ends_in_order(
    act: Reenactor, source: Source, face: Landmarks, tmp_path: Path, how: str
) -> None:
    stop, before = threading.Event(), threading.active_count()
    camera = Camera([face] * (20 if how == "end" else 100_000))
    if how == "stop":
        threading.Timer(0.3, stop.set).start()
    screen = Screen({10: "q"} if how == "key" else None)
    settings = LiveSettings(seconds=0.3 if how == "seconds" else None)
    sinks = SeveralSinks([screen, open_sink(str(tmp_path / "out.mp4"))])
    begun_s = time.monotonic()
    LiveSession(act, [source], camera, sinks, settings).run(stop)
    assert time.monotonic() - begun_s < 5.0
    assert threading.active_count() == before and camera.closed.is_set()
    assert len(list(open_reader(tmp_path / "out.mp4"))) == len(screen.pictures)


@pytest.mark.parametrize("where", ["camera", "tracker", "renderer", "screen"])
def test_an_error_anywhere_ends_all_and_is_told(
    toy_bundle: Path, portrait: tuple[UInt8Array, Landmarks], face: Landmarks, where: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    def broken(*_: object) -> None:
        raise MediaError(f"the {where} is broken")

    tracker, screen = Found(face), Screen()
    with Reenactor.load(toy_bundle, settings=Settings(backend="ort"), tracker=tracker) as act:
        source = act.prepare(portrait[0], landmarks=portrait[1])
        act.rest(source)
        camera = Camera([None] * 5000, image=grey(9), fails=True)
        if where == "camera":
            camera.faces = camera.faces[:5]
        session = LiveSession(act, [source], camera, SeveralSinks([screen]))
        if where == "renderer":
            monkeypatch.setattr(act, "reenact", broken)
        elif where == "screen":
            threading.Timer(0.3, lambda: monkeypatch.setattr(screen, "show", broken)).start()
        elif where == "tracker":
            threading.Timer(0.3, lambda: monkeypatch.setattr(tracker, "track", broken)).start()
        before = threading.active_count()
        with pytest.raises(MediaError, match=f"the {where} is broken"):
            session.run()
    time.sleep(0.05)
    assert threading.active_count() <= before and screen.failed is True
    assert camera.closed.is_set()


# The steps.


def test_the_steps_follow_the_goal(
    act: Reenactor, source: Source, face: Landmarks, monkeypatch: pytest.MonkeyPatch
) -> None:
    loop, render = act._loop, act._loop.render

    def slow(x_T: npt.NDArray[np.float32], z: npt.NDArray[np.float32]) -> object:
        time.sleep(0.02 * loop.steps)
        return render(x_T, z)

    monkeypatch.setattr(loop, "render", slow)
    report = run(act, source, Camera([face] * 100, 0.02), Screen(), goal=Goal(fps=18.0))
    assert report.steps == 2 and [change.steps for change in report.changes] == [2]


def test_a_goal_needs_something_to_choose(toy_bundle: Path, source: Source) -> None:
    with Reenactor.load(toy_bundle, settings=Settings(backend="ort")) as one:
        with pytest.raises(SettingsError, match="leave the goal out"):
            run(one, source, Camera([]), Screen(), goal=Goal(fps=25.0))


# People before the camera, with the shipped model and the tracker.


def before_the_camera(act: Reenactor, source: Source, file: str) -> LiveReport:
    try:
        open_tracker().close()
    except BackendMissing as missing:
        pytest.skip(str(missing))
    return run(act, source, open_camera(str(MEDIA / "edge" / file)), Screen())


@needs_media
def test_hands_over_the_face(act: Reenactor, source: Source, results: list[Result]) -> None:
    report = before_the_camera(act, source, "asl_C_book.mkv")
    seen = np.array([result.seen for result in results])
    assert report.shown == 109 and report.faces == seen.sum()
    lost = np.flatnonzero(~seen)
    assert len(lost) > 10
    # Neither when the face is lost nor when it is found is there a jump.
    assert steps_px(results)[np.clip(lost - 1, 0, None)].max() < LARGEST_STEP_PX
    found = lost[(lost + 1 < len(seen))]
    assert steps_px(results)[found].max() < LARGEST_STEP_PX


@needs_media
@pytest.mark.parametrize("file", ["two_adults.jpg", "three_people_walk.gif"])
def test_of_several_people_one_is_followed(
    act: Reenactor, source: Source, results: list[Result], file: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    """One person's face, from picture to picture, as long as it is seen."""
    found: list[Landmarks | None] = []

    class Spy:
        def __init__(self) -> None:
            self.tracker = open_tracker()

        def track(self, image_bgr: UInt8Array) -> Landmarks:
            found.append(None)
            found[-1] = self.tracker.track(image_bgr)
            return found[-1]

        detect = property(lambda self: self.tracker.detect)
        close = property(lambda self: self.tracker.close)

    try:
        monkeypatch.setattr(act, "_tracker", Spy())
    except BackendMissing as missing:
        pytest.skip(str(missing))
    report = run(act, source, open_camera(str(MEDIA / "edge" / file)), Screen())
    assert report.shown == len(results)
    assert report.faces == sum(result.seen for result in results) >= 1
    if len(results) > 1:
        assert report.faces > 10
        assert steps_px(results).max() < 2.0 * LARGEST_STEP_PX  # at 12.5 pictures a second
    pairs = [(a, b) for a, b in itertools.pairwise(found[WARM_UPS:]) if a and b]
    for before, after in pairs:
        moved_px = np.linalg.norm((after.points - before.points)[:, :2].mean(axis=0))
        assert moved_px < np.ptp(before.points[:, 0]) / 2, "another person's face"
