from __future__ import annotations

import numpy as np
import pytest

from diffusionact import image
from diffusionact.errors import MediaError


def test_every_grey_level_survives_the_way_to_float_and_back() -> None:
    levels = np.arange(256, dtype=np.uint8).reshape(16, 16, 1).repeat(3, axis=2)
    x = image.to_tensor(levels)
    assert x.shape == (1, 3, 16, 16) and x.dtype == np.float32
    assert x.min() == -1.0 and x.max() == 1.0
    assert np.array_equal(image.to_uint8(x), levels)


def test_to_tensor_fills_the_buffer_it_is_given() -> None:
    picture = np.random.default_rng(0).integers(0, 256, (4, 6, 3), dtype=np.uint8)
    out = np.empty((1, 3, 4, 6), np.float32)
    assert image.to_tensor(picture, out) is out
    assert np.array_equal(out, image.to_tensor(picture))
    assert np.array_equal(out[0, 2], picture[..., 2] / np.float32(127.5) - np.float32(1))


def test_to_uint8_clips_and_rounds() -> None:
    x = np.array([-1.4, -1.0, 0.0, 0.001, 1.0, 7.0], np.float32).reshape(1, 1, 1, 6)
    assert image.to_uint8(x.repeat(3, axis=1))[0, :, 0].tolist() == [0, 0, 128, 128, 255, 255]


def test_colour_order_is_swapped_not_mirrored() -> None:
    picture = np.zeros((1, 2, 3), np.uint8)
    picture[0, 0] = (1, 2, 3)
    swapped = image.bgr_to_rgb(picture)
    assert swapped[0, 0].tolist() == [3, 2, 1] and swapped.flags.c_contiguous


@pytest.mark.parametrize(
    ("wrong", "seen"),
    [
        (None, "NoneType"),
        (np.zeros((4, 4), np.uint8), r"uint8 \[4, 4\]"),
        (np.zeros((4, 4, 3), np.float32), "float32"),
        (np.zeros((0, 4, 3), np.uint8), r"\[0, 4, 3\]"),
    ],
)
def test_what_is_no_picture_is_refused_by_name(wrong: np.ndarray, seen: str) -> None:
    with pytest.raises(MediaError, match=f"portrait: .*{seen}"):
        image.check_image(wrong, "portrait")


def test_shrinking_averages_and_growing_keeps_the_range() -> None:
    stripes = np.zeros((64, 64, 3), np.uint8)
    stripes[:, ::2] = 200
    small = image.resize_area(stripes, 16, 16)
    assert np.all(small == 100)
    assert image.resize_area(stripes, 80, 90).shape == (90, 80, 3)


def test_a_crop_that_shrinks_does_not_alias() -> None:
    stripes = np.zeros((512, 512, 3), np.uint8)
    stripes[:, ::2] = 200
    matrix = np.array([[0.25, 0.0, -8.0], [0.0, 0.25, -8.0]])
    crop = image.warp_crop(stripes, matrix, 96)
    assert np.all(np.abs(crop.astype(int) - 100) <= 1)


def test_a_crop_at_scale_one_is_the_picture_itself() -> None:
    picture = np.random.default_rng(2).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    crop = image.warp_crop(picture, np.array([[1.0, 0.0, -4.0], [0.0, 1.0, -6.0]]), 32)
    assert np.array_equal(crop, picture[6:38, 4:36])


def test_a_shrinking_crop_keeps_its_place() -> None:
    ramp = np.tile(np.arange(240, dtype=np.uint8)[None, :, None], (240, 1, 3))
    matrix = np.array([[1 / 3, 0.0, -10.0], [0.0, 1 / 3, -10.0]])
    crop = image.warp_crop(ramp, matrix, 40)
    wanted = (np.arange(40) + 10.0) * 3.0  # the picture px at the centre of each crop px
    assert np.all(np.abs(crop[20, :, 0] - wanted) <= 1.0)
