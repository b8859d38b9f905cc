"""The stages of the authors' pipeline, each held to numbers that their own code made."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import cv2
import numpy as np
import numpy.typing as npt
import pytest

from diffusionact.errors import NoFace, SettingsError
from diffusionact.landmarks import crop_matrix, invert_affine
from diffusionact.runtime.published import crop_ffhq, emoca, fan, gaze, ranges, resample, s3fd
from diffusionact.runtime.published.codes import FaceCodes
from tests.golden import rule

HERE = Path(__file__).parent
GOLDEN = np.load(HERE / "golden" / "pipeline_small.npz")
IMAGE = np.load(HERE / "golden" / "image_small.npz")
SHARED = HERE.parent.parent / "shared" / "golden"
NEAR = 1e-4  # the golden manifest's, of crops and landmarks
STRIDE = 4  # every fourth pixel of the aligned crops is kept
LEVELS, SHARE = 1, 1e-3  # of aligned crops: one grey level in a thousandth of the values


def block_means(pictures: npt.NDArray[Any], block: int) -> npt.NDArray[Any]:
    rows, columns = (size // block for size in pictures.shape[-2:])
    return pictures.reshape(*pictures.shape[:-2], rows, block, columns, block).mean((-3, -1))


@pytest.mark.parametrize("case", ["pad_edge", "large"])
def test_the_aligned_crop(case: str) -> None:
    wanted = GOLDEN[f"crop_{case}_out"]
    made = crop_ffhq.crop_ffhq(IMAGE["img"], GOLDEN[f"crop_{case}_lm"], 256)[::STRIDE, ::STRIDE]
    error = np.abs(made.astype(int) - wanted)
    assert error.max() <= LEVELS and (error > 0).mean() <= SHARE


def test_the_aligned_crop_has_the_geometry_of_our_own() -> None:
    points = GOLDEN["crop_large_lm"]
    quad, size = crop_ffhq.crop_quad(points.astype(np.float64))
    corners = np.array([[-0.5, -0.5], [-0.5, 255.5], [255.5, 255.5], [255.5, -0.5]])
    back = invert_affine(crop_matrix(points, 256, rotate=True))
    np.testing.assert_allclose(corners @ back[:, :2].T + back[:, 2], quad, atol=1e-9)
    assert size == pytest.approx(np.hypot(*(quad[3] - quad[0])))


def test_a_crop_without_a_face_is_refused() -> None:
    points = np.zeros((68, 2), np.float32)
    with pytest.raises(NoFace, match="one point"):
        crop_ffhq.crop_ffhq(IMAGE["img"], points, 64)
    with pytest.raises(NoFace, match="outside the picture"):
        crop_ffhq.crop_ffhq(IMAGE["img"], GOLDEN["crop_large_lm"] + np.float32(5000.0), 64)


def test_the_gaze_crop() -> None:
    image = ranges.to_signed(IMAGE["img"])
    made = np.concatenate([gaze.crop(image, points, 224) for points in GOLDEN["fan_lm"]])
    assert np.abs(block_means(made, 8) - GOLDEN["gaze_input_block8"]).max() < NEAR


def test_the_emoca_crop() -> None:
    image = ranges.to_unit(ranges.to_signed(IMAGE["img"]))
    made = np.concatenate([emoca.crop(image, points, 224) for points in GOLDEN["fan_lm"]])
    assert np.abs(block_means(made, 8) - GOLDEN["emoca_crop_block8"]).max() < NEAR


def test_the_landmark_crop_averages_only_when_asked() -> None:
    window = fan.Window.of_box(GOLDEN["fan_bbox"])
    wanted = GOLDEN["fan_crop_block8_tv029_antialias"]
    made = block_means(fan.crop(IMAGE["img"], window, 256, antialias=True), 8)
    assert np.abs(made - wanted).max() < NEAR * 255.0
    plain = block_means(fan.crop(IMAGE["img"], window, 256, antialias=False), 8)
    assert np.abs(plain - wanted).max() > 1.0


def test_landmarks_of_heat_maps_are_the_same_numbers() -> None:
    heatmaps = rule.tensor("input/heatmap", (1, 68, 64, 64), "image")
    window = fan.Window.of_box(GOLDEN["fan_bbox"])
    np.testing.assert_array_equal(fan.peaks(heatmaps), GOLDEN["fan_pts64"])
    whole = fan.landmarks(heatmaps, window, whole=True)
    np.testing.assert_array_equal(whole, GOLDEN["fan_pts_img"][0])
    fine = fan.landmarks(heatmaps, window, whole=False)
    assert (np.trunc(fine) == whole).all() and (fine != whole).any()


def test_boxes_and_their_suppression() -> None:
    boxes = s3fd.decode(GOLDEN["sfd_loc"], GOLDEN["sfd_priors"])
    assert np.abs(boxes - GOLDEN["sfd_boxes"]).max() < NEAR
    kept = s3fd.suppress(GOLDEN["sfd_boxes"], GOLDEN["sfd_scores"], s3fd.OVERLAP)
    assert kept.tolist() == GOLDEN["sfd_nms_keep"].tolist()


def heads() -> list[tuple[npt.NDArray[np.float32], npt.NDArray[np.float32]]]:
    """The detector's maps of 256 px with no face in them."""
    sides = (64, 32, 16, 12, 6, 3)
    blank = [np.zeros((1, 2, n, n), np.float32) for n in sides]
    for logits in blank:
        logits[0, 0], logits[0, 1] = 6.0, -6.0
    return [
        (logits, np.zeros((1, 4, n, n), np.float32)) for logits, n in zip(blank, sides, strict=True)
    ]


def test_faces_are_read_from_their_cell_the_surest_first() -> None:
    maps = heads()
    assert s3fd.detect(maps).shape == (0, 5)
    for level, row, column, odds in (
        (2, 3, 5, 1.0),
        (1, 20, 8, 3.0),
        (1, 20, 9, 2.0),
        (4, 1, 1, -1),
    ):
        maps[level][0][0, :, row, column] = 0.0, odds
    found = s3fd.detect(maps)
    # the second neighbour is the same face; the last is too unsure
    assert found[:, 4] == pytest.approx([1 / (1 + np.exp(-3.0)), 1 / (1 + np.exp(-1.0))])
    np.testing.assert_allclose(found[0, :4], [68 - 16, 164 - 16, 68 + 16, 164 + 16])
    np.testing.assert_allclose(found[1, :4], [88 - 32, 56 - 32, 88 + 32, 56 + 32])


def test_ranges_of_values() -> None:
    levels = np.arange(256, dtype=np.uint8)
    cut = ranges.truncated_uint8(ranges.to_signed(levels))
    np.testing.assert_array_equal(cut, GOLDEN["u8_to_tensor_to_u8_trunc"])
    assert (cut != levels).sum() == 63
    ends = ranges.to_unit(np.array([-1.0, -0.5, 0.0, 0.3, 1.0, 2.0], np.float32)) * 255.0
    np.testing.assert_allclose(ends, GOLDEN["range_1_to_255_of_pm1"], atol=NEAR)
    np.testing.assert_array_equal(ranges.stretched_uint8(GOLDEN["png_in"]), GOLDEN["png_out_u8"])


def test_sampling_is_bilinear_and_black_outside() -> None:
    image = np.arange(12, dtype=np.float32).reshape(3, 4, 1)
    made = resample.sample_affine(image, np.array([[1.0, 0.0, -1.5], [0.0, 1.0, 0.25]]), 4)[..., 0]
    lines = np.array([[0.25 * 4 + x for x in range(4)]])
    np.testing.assert_allclose(made[0], [0.0, lines[0, 0] / 2, *(lines[0, :2] + 0.5)], atol=1e-6)
    np.testing.assert_allclose(made[3], 0.0, atol=1e-6)


@pytest.mark.parametrize("size", [(300, 256), (256, 311), (100, 200), (40, 256), (256, 90)])
def test_resizing_is_pillows(size: tuple[int, int]) -> None:
    image_module = pytest.importorskip("PIL.Image")
    image = np.random.default_rng(3).integers(0, 256, (*size, 3)).astype(np.uint8)
    wanted = image_module.fromarray(image).resize((256, 256), image_module.BILINEAR)
    np.testing.assert_array_equal(resample.resize_pillow(image, 256, 256), np.asarray(wanted))


@pytest.mark.torch
@pytest.mark.parametrize("antialias", [True, False])
@pytest.mark.parametrize("size", [(300, 211), (90, 100)])
def test_resizing_is_torchs(size: tuple[int, int], antialias: bool) -> None:
    torch = pytest.importorskip("torch")
    image = np.random.default_rng(4).random((*size, 3), dtype=np.float32)
    chw = torch.from_numpy(image).permute(2, 0, 1)[None]
    resize = torch.nn.functional.interpolate
    wanted = resize(chw, (256, 256), mode="bilinear", align_corners=False, antialias=antialias)
    made = resample.resize_linear(image, 256, antialias)
    np.testing.assert_allclose(made, wanted[0].permute(1, 2, 0).numpy(), atol=1e-6)


def test_codes_go_into_a_row_and_back() -> None:
    row = np.arange(100 + 50 + 11, dtype=np.float32)
    codes = FaceCodes.of_vector(row, 100)
    sizes = [len(part) for part in (codes.shape, codes.expression, codes.pose, codes.camera)]
    assert sizes == [100, 50, 6, 3] and codes.gaze.tolist() == [159.0, 160.0]
    np.testing.assert_array_equal(codes.vector, row)
    with pytest.raises(SettingsError, match="20 face codes"):
        FaceCodes.of_vector(row[:20], 100)


def small_directory(folder: Path) -> Path:
    """A directory of golden vectors: ours that are whole, under the tolerances of theirs."""
    kept = {name: GOLDEN[name] for name in GOLDEN.files if not name.startswith("crop_")}
    kept |= {name: IMAGE[name] for name in ("img", "stick_lm", "gaze_left_pt", "gaze_right_pt")}
    np.savez(folder / "image.npz", **kept)
    limits = f'{{"gaze_and_flame": {NEAR}, "emoca_crop": {NEAR}}}'
    (folder / "manifest.json").write_text(f'{{"tolerances_float32": {limits}}}')
    (folder / "README.md").write_text("`range_1_to_255_of_pm1` (inputs -1,-.5,0,.3,1,2)")
    shutil.copy(HERE / "golden" / "rule.py", folder / "regen.py")
    return folder


@pytest.mark.torch
def test_rows_of_a_directory_pass_and_a_changed_vector_fails(tmp_path: Path) -> None:
    pytest.importorskip("torch")
    from tests import golden_images

    folder = small_directory(tmp_path)
    rows = {row[0]: row for row in golden_images.rows(folder)}
    assert len(rows) >= 12 and all(row[4] for row in rows.values()), rows
    arrays = dict(np.load(folder / "image.npz"))
    arrays["fan_pts_img"][0, 7, 1] += 1.0
    arrays["gaze_theta"][0, 0, 0] += 2 * NEAR
    arrays["png_out_u8"][3, 3, 0] ^= 1
    np.savez(folder / "image.npz", **arrays, new_kind_of_vector=np.zeros(3))
    failed = [row[0] for row in golden_images.rows(folder) if not row[4]]
    unknown = "new_kind_of_vector (nothing checks it)"
    assert sorted(failed) == sorted(["fan_pts_img", "gaze_theta", "png_out_u8", unknown])


@pytest.mark.torch
def test_every_vector_of_the_shared_directory() -> None:
    pytest.importorskip("torch")
    if not (SHARED / "image.npz").is_file():
        pytest.skip(f"{SHARED} holds the whole vectors and is not part of the project")
    from tests import golden_images

    rows = list(golden_images.rows(SHARED))
    assert len(rows) >= 30
    assert [row for row in rows if not row[4]] == [], f"OpenCV {cv2.__version__}"
