"""The measure of the driver's face shape in a drawing, and what it must say of Eq. 8."""

from __future__ import annotations

import numpy as np
import pytest

pytest.importorskip("numba")  # of the renderer

from benchmarks import shape_leak
from diffusionact.errors import BackendMissing
from diffusionact.morphable import rendered_face
from diffusionact.runtime.tracker import MediaPipeTracker

pytestmark = pytest.mark.torch  # the development environment, where the renderer's numba is

FIT_PX = 1.0  # mean distance after the fit; two people differ by about five
PAIRS = 4


def test_the_fit_finds_a_face_again() -> None:
    rng, face = np.random.default_rng(2), rendered_face()
    for _ in range(3):
        expression = np.clip(rng.normal(0, 0.4, len(face.expression_basis)), 0, 1)
        codes = shape_leak.Codes(
            rng.normal(0, 1, len(face.identity_basis)), expression, rng.normal(0, 8, 3)
        )
        wanted = shape_leak.aligned(shape_leak.drawn(face, codes))
        found = shape_leak.fitted(wanted)
        again = shape_leak.aligned(shape_leak.drawn(face, found))
        assert np.linalg.norm(again - wanted, axis=1).mean() < FIT_PX
        other = rng.normal(0, 1, len(codes.identity))
        nearer = np.linalg.norm(found.identity - codes.identity)
        assert nearer < np.linalg.norm(found.identity - other)


def test_detected_landmarks_leak_and_eq_8_does_not(monkeypatch: pytest.MonkeyPatch) -> None:
    try:
        tracker = MediaPipeTracker()
    except BackendMissing as missing:
        pytest.skip(str(missing))
    monkeypatch.setattr(shape_leak, "LAYOUT_PICTURES", 4)
    with tracker:
        leaks = shape_leak.measure(PAIRS, seed=1, tracker=tracker)
    assert set(leaks) == set(shape_leak.METHODS)
    assert all(leak.pairs == PAIRS for leak in leaks.values())
    exact = leaks["driver_exact"], leaks["eq8_exact"]
    assert [leak.share for leak in exact] == pytest.approx([1.0, 0.0], abs=1e-3)
    assert [leak.nearer_driver for leak in exact] == [1.0, 0.0]
    assert leaks["eq8_fitted"].share < 0.35 < leaks["driver_detected"].share
    assert leaks["eq8_read"].share < leaks["driver_detected"].share
