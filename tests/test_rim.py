"""The tone of a crop at its rim: what is off in colour is matched, what is something else is not."""

from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from diffusionact.runtime.paste import Paster
from diffusionact.runtime.rim import CELLS, LARGEST, RimMatch

GREY_LEVEL = 1  # rounding
SIDE = 96
# Of a difference of tone, what the falling weight of larger ones leaves.
LEFT_OF_TONE = 0.1
UInt8Array = npt.NDArray[np.uint8]


def landscape() -> UInt8Array:
    """Smooth colours, far from black and white."""
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    return np.rint(np.stack([90 + 60 * x, 100 + 50 * y, 150 - 40 * x * y], -1)).astype(np.uint8)


@pytest.mark.parametrize("side", [SIDE, 10, 1])
def test_the_portraits_own_crop_stays_as_it_is(side: int) -> None:
    own = landscape()[:side, :side].copy()
    assert np.array_equal(RimMatch(own).matched(own), own)


def test_a_wrong_tone_is_matched_all_over() -> None:
    own = landscape()
    y, x = np.mgrid[0:SIDE, 0:SIDE] / SIDE
    wrong = np.stack([12 * x, 8 - 14 * y, 10 + 0 * x], -1)
    crop = np.rint(own + wrong).astype(np.uint8)
    off = RimMatch(own).matched(crop).astype(float) - own
    assert np.abs(off).max() <= LEFT_OF_TONE * np.abs(wrong).max() + GREY_LEVEL


def test_no_square_shows_where_a_crop_of_a_wrong_tone_is_pasted() -> None:
    portrait = np.full((200, 200, 3), 100, np.uint8)
    matrix = np.array([[0.8, 0.0, -30.0], [0.0, 0.8, -40.0]])
    frame = Paster(portrait, matrix, 64).paste(np.full((64, 64, 3), 112, np.uint8))
    assert np.abs(frame.astype(int) - 100).max() <= LEFT_OF_TONE * 12 + GREY_LEVEL


def test_what_has_moved_over_the_rim_colours_nothing() -> None:
    """A face in the middle, and dark hair that now hangs over the edge."""
    own = landscape()
    crop = own.copy()
    crop[:, :20] = 20
    crop[40:56, 40:56] = 250
    assert (own[:, :20].astype(int) - 20 > LARGEST).all()
    assert np.array_equal(RimMatch(own).matched(crop), crop)


def test_the_rim_of_one_crop_is_not_kept_for_the_next() -> None:
    own, match = landscape(), RimMatch(landscape())
    match.matched(np.clip(own.astype(int) + 15, 0, 255).astype(np.uint8))
    assert np.array_equal(match.matched(own), own)
    assert CELLS < SIDE
