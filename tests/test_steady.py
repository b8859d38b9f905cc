"""A steady stream of frames of the shipped model: what it allocates, and what is not network."""

from __future__ import annotations

import os
import tracemalloc
from collections.abc import Iterator

import cv2
import numpy as np
import pytest

from benchmarks.steady import frame, network_times, summary
from diffusionact import bundle_path, driver_path, portrait_paths
from diffusionact.landmarks import Track
from diffusionact.runtime.reenactor import Reenactor
from diffusionact.runtime.settings import Settings
from diffusionact.runtime.source import Source

# Landmarks, laps and a Result are Python objects of a few kilobytes; the least picture on the way,
# the condition's drawing, has 49 152 bytes.
OBJECTS_BYTES = 32_768
FRAMES = 500
SHARE = 0.05  # of a frame, for drawing, packing, the DDIM update and pasting


@pytest.fixture(scope="module", params=["ort", "openvino"])
def act(request: pytest.FixtureRequest) -> Iterator[Reenactor]:
    pytest.importorskip({"ort": "onnxruntime"}.get(request.param, request.param))
    settings = Settings(backend=request.param, threads=1)
    with Reenactor.load(bundle_path(), device="cpu", settings=settings) as made:
        yield made


@pytest.fixture(scope="module")
def source(act: Reenactor) -> Source:
    path = portrait_paths()[0]
    portrait = cv2.imread(str(path))
    assert portrait is not None
    noise = np.random.default_rng(0).standard_normal((1, 3, 128, 128), np.float32)
    face = Track.load(path.with_suffix(".landmarks.npz"))[0]
    return act.prepare(portrait.astype(np.uint8), landmarks=face, x_T=noise)


@pytest.fixture(scope="module")
def driver() -> Track:
    return Track.load(driver_path().with_suffix(".landmarks.npz"))


def test_a_frame_allocates_no_picture(act: Reenactor, source: Source, driver: Track) -> None:
    session = act.session(source)
    targets = [session.target(driver[i], i * 33_000_000) for i in range(8)]
    shown = [act.render(target, source) for target in targets[:4]]  # the pool has what it needs
    tracemalloc.start()
    try:
        for target in targets[4:]:
            shown.append(act.render(target, source))
            shown.pop(0)
            tracemalloc.reset_peak()
            before = tracemalloc.get_traced_memory()[0]
            shown.append(act.render(target, source))
            shown.pop(0)
            assert tracemalloc.get_traced_memory()[1] - before < OBJECTS_BYTES
    finally:
        tracemalloc.stop()


def test_frames_that_are_held_stay_what_they_were(
    act: Reenactor, source: Source, driver: Track
) -> None:
    session = act.session(source)
    held = [act.reenact(driver[i], session, i * 33_000_000) for i in (0, 20, 40)]
    copies = [(one.frame.copy(), one.crop.copy()) for one in held]
    for i in (60, 80, 99):
        act.reenact(driver[i], session, i * 33_000_000)
    for one, (whole, crop) in zip(held, copies, strict=True):
        np.testing.assert_array_equal(one.frame, whole)
        np.testing.assert_array_equal(one.crop, crop)
    assert not np.array_equal(held[0].crop, held[2].crop)


@pytest.mark.slow
def test_what_is_not_network_is_little_of_a_frame(
    act: Reenactor, source: Source, driver: Track
) -> None:
    """Of the processor's time, in half of 500 frames."""
    session = act.session(source)
    with network_times(act) as inside_ns:
        frames = [frame(act, session, driver, i, inside_ns) for i in range(FRAMES)]
    assert {one.calls for one in frames} == {act.steps + 2}, "encoder, modulation and steps"
    told = summary(frames)
    print(act.settings.backend, told, "load average", os.getloadavg())
    assert 0.0 < told["not_network_share"] < SHARE


@pytest.mark.slow
def test_what_is_allocated_does_not_grow(act: Reenactor, source: Source, driver: Track) -> None:
    session = act.session(source)
    held = []
    tracemalloc.start()
    try:
        for i in range(FRAMES):
            act.reenact(driver[i % len(driver)], session, i * 33_000_000)
            held.append(tracemalloc.get_traced_memory()[0])
    finally:
        tracemalloc.stop()
    assert held[-1] - held[FRAMES // 5] < OBJECTS_BYTES
