from __future__ import annotations

import numpy as np
import numpy.typing as npt
import pytest

from diffusionact.image import warp_crop
from diffusionact.landmarks import invert_affine
from diffusionact.runtime.paste import FEATHER, Paster, on_whole_pixels

GREY_LEVEL = 1  # rounding of fixed-point interpolation and blending
UInt8Array = npt.NDArray[np.uint8]
FloatArray = npt.NDArray[np.float64]


def portrait(height: int = 300, width: int = 260) -> UInt8Array:
    rng = np.random.default_rng(0)
    return rng.integers(0, 256, (height, width, 3), dtype=np.uint8)


def upright(scale: float, left: float, top: float) -> npt.NDArray[np.float64]:
    """portrait px -> crop px of a crop whose first pixel lies at (left, top)."""
    return np.array([[scale, 0.0, -scale * left], [0.0, scale, -scale * top]])


@pytest.mark.parametrize("scale", [0.5, 1.0, 2.3])
def test_only_the_rectangle_of_the_crop_is_touched(scale: float) -> None:
    picture = portrait()
    paster = Paster(picture, upright(scale, 60.25, 80.5), 64)
    frame = paster.paste(np.full((64, 64, 3), 255, np.uint8))
    changed = np.any(frame != picture, axis=2)
    rows, columns = paster.where
    assert changed[rows, columns].any()
    changed[rows, columns] = False
    assert not changed.any()
    assert frame.shape == picture.shape and frame is not picture


def test_the_middle_is_the_crop_and_the_edge_is_the_portrait() -> None:
    picture = np.full((200, 200, 3), 40, np.uint8)
    crop = np.full((64, 64, 3), 200, np.uint8)
    frame = Paster(picture, upright(0.5, 30.0, 30.0), 64).paste(crop).astype(int)
    feather_px = FEATHER * 64 / 0.5
    middle = frame[30 + 40 : 30 + 88, 30 + 40 : 30 + 88]
    assert np.all(np.abs(middle - 200) <= GREY_LEVEL)
    across = frame[94, :, 0]
    assert across[28] == 40 and abs(across[29] - 40) < 10
    rising = across[29 : 29 + int(feather_px)]
    assert np.all(np.diff(rising) >= 0) and 100 < across[29 + int(feather_px / 2)] < 140


@pytest.mark.parametrize("scale", [0.25, 1.0])
def test_what_was_cut_out_goes_back_to_its_own_place(scale: float) -> None:
    ramp = np.zeros((220, 240, 3), np.uint8)
    ramp[..., 0] = np.arange(240)[None]
    ramp[..., 1] = np.arange(220)[:, None]
    matrix = upright(scale, 20.0, 10.0)
    side = int(180 * scale)
    inverse = invert_affine(matrix)
    grid = np.stack(np.meshgrid(np.arange(side), np.arange(side)), axis=-1)
    crop = np.zeros((side, side, 3), np.uint8)
    crop[..., :2] = np.rint(grid @ inverse[:, :2].T + inverse[:, 2])
    frame = Paster(ramp, matrix, side).paste(crop).astype(int)
    inner = (slice(40, 160), slice(40, 180))
    assert np.abs(frame[inner] - ramp[inner]).max() <= GREY_LEVEL


def test_a_crop_finer_than_the_portrait_is_averaged() -> None:
    stripes = np.zeros((128, 128, 3), np.uint8)
    stripes[:, ::2] = 200
    picture = np.zeros((80, 80, 3), np.uint8)
    frame = Paster(picture, upright(4.0, 20.0, 20.0), 128).paste(stripes)
    middle = frame[32:40, 32:40].astype(int)
    assert np.all(np.abs(middle - 100) <= GREY_LEVEL)


@pytest.mark.parametrize("place", [(-40.0, -30.0), (230.0, 280.0)])
def test_a_crop_over_the_edge_of_the_portrait_is_cut(place: tuple[float, float]) -> None:
    picture = portrait()
    paster = Paster(picture, upright(1.0, *place), 96)
    frame = paster.paste(np.full((96, 96, 3), 255, np.uint8))
    assert frame.shape == picture.shape and np.any(frame != picture)


def test_a_crop_outside_the_portrait_leaves_it_alone() -> None:
    picture = portrait()
    frame = Paster(picture, upright(1.0, 900.0, 900.0), 32).paste(np.zeros((32, 32, 3), np.uint8))
    assert np.array_equal(frame, picture)


def turned(degrees: float, scale: float, left: float, top: float) -> npt.NDArray[np.float64]:
    """As `upright`, the crop turned about its first pixel."""
    angle = np.radians(degrees)
    turn = scale * np.array([[np.cos(angle), np.sin(angle)], [-np.sin(angle), np.cos(angle)]])
    return np.concatenate([turn, -turn @ [[left], [top]]], axis=1)


def blended(picture: UInt8Array, crop: UInt8Array, matrix: npt.NDArray[np.float64]) -> FloatArray:
    """What `paste` does to a crop that needs no match of tone, pixel by pixel in float64."""
    side = len(crop)
    y, x = np.mgrid[: picture.shape[0], : picture.shape[1]]
    u, v = np.einsum("ij,jyx->iyx", matrix, np.stack([x, y, np.ones_like(x)]))
    inside = np.minimum.reduce([u, side - 1 - u, v, side - 1 - v]) + 0.5
    ramp = np.clip(inside / (FEATHER * side), 0.0, 1.0)
    weight = (ramp * ramp * (3.0 - 2.0 * ramp))[..., None]
    u, v = np.clip(u, 0, side - 1), np.clip(v, 0, side - 1)
    left, top = np.minimum(u.astype(int), side - 2), np.minimum(v.astype(int), side - 2)
    right, down = (u - left)[..., None], (v - top)[..., None]
    above = crop[top, left] * (1.0 - right) + crop[top, left + 1] * right
    below = crop[top + 1, left] * (1.0 - right) + crop[top + 1, left + 1] * right
    return np.asarray(weight * (above * (1.0 - down) + below * down) + (1.0 - weight) * picture)


@pytest.mark.parametrize(
    "matrix",
    [
        on_whole_pixels(upright(0.43, 40.3, 50.6), 64),  # the way of a resize
        upright(0.43, 40.3, 50.6),
        turned(17.0, 0.5, 70.2, 60.9),
        turned(-40.0, 0.9, 60.0, 90.0),
        on_whole_pixels(upright(0.43, -20.3, -9.6), 64),  # over the edge
    ],
)
def test_a_paste_is_interpolation_and_blending(matrix: npt.NDArray[np.float64]) -> None:
    y, x = np.mgrid[:260, :280] / 280
    picture = np.rint(np.stack([70 + 90 * x, 160 - 60 * y, 90 + 50 * x * y], -1)).astype(np.uint8)
    crop = warp_crop(picture, matrix, 64)  # its own: no tone is off
    crop[28:36, 20:44] = (30, 200, 90)  # something new in the middle
    frame = Paster(picture, matrix, 64).paste(crop)
    # A map's places are 1/32 px apart, and the step of the middle is 170 levels high.
    assert np.abs(frame - blended(picture, crop, matrix)).max() <= GREY_LEVEL + 170 / 32


@pytest.mark.parametrize("scale", [0.31, 0.43081325, 1.0, 2.7])
def test_an_upright_crop_moves_half_a_pixel_at_most_onto_whole_ones(scale: float) -> None:
    matrix = upright(scale, 40.37, 33.81)
    whole = on_whole_pixels(matrix, 128)
    corners = np.array([[-0.5, -0.5, 1.0], [127.5, 127.5, 1.0]])
    before, after = (corners @ invert_affine(one).T for one in (matrix, whole))
    np.testing.assert_allclose(after + 0.5, np.rint(after + 0.5), atol=1e-9)
    assert np.abs(after.mean(axis=0) - before.mean(axis=0)).max() <= 0.5
    assert np.abs(np.ptp(after, axis=0) - np.ptp(before, axis=0)).max() <= 0.5
    np.testing.assert_allclose(on_whole_pixels(whole, 128), whole)


def test_a_turned_crop_stays_where_it_is() -> None:
    matrix = turned(3.0, 0.5, 20.2, 30.7)
    assert on_whole_pixels(matrix, 64) is matrix


def test_a_turned_crop_lands_turned() -> None:
    picture = np.zeros((200, 200, 3), np.uint8)
    turn = np.array([[0.0, 1.0, -60.0], [-1.0, 0.0, 139.0]])  # a quarter; crop spans 60..139
    crop = np.zeros((80, 80, 3), np.uint8)
    crop[:40] = 250  # the upper half lies where portrait x is large
    frame = Paster(picture, turn, 80).paste(crop)
    assert frame[100, 120, 0] >= 249 and frame[100, 80, 0] <= 1
