from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from diffusionact.errors import MediaError, SettingsError
from diffusionact.landmarks import Landmarks, save_npz
from diffusionact.runtime.source import Source

SIDE = 32


@pytest.fixture
def source(face: Landmarks) -> Source:
    rng = np.random.default_rng(0)
    return Source(
        portrait=rng.integers(0, 256, (50, 60, 3), dtype=np.uint8),
        crop=rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8),
        landmarks=face,
        matrix=np.array([[0.8, 0.0, -3.0], [0.0, 0.8, -2.0]]),
        x_T=rng.standard_normal((1, 3, SIDE, SIDE)).astype(np.float32),
        weights_sha256="ab" * 32,
    )


def test_a_source_comes_back_as_it_was_saved(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "me.npz"
    source.save(path)
    seen = Source.load(path)
    for name in ("portrait", "crop", "matrix", "x_T"):
        wanted = getattr(source, name)
        assert np.array_equal(getattr(seen, name), wanted)
        assert getattr(seen, name).dtype == wanted.dtype
    assert np.array_equal(seen.landmarks.points, source.landmarks.points)
    assert np.array_equal(seen.landmarks.gaze, source.landmarks.gaze)
    assert seen.weights_sha256 == source.weights_sha256
    assert [p.name for p in tmp_path.iterdir()] == ["me.npz"]


def test_image_is_the_crop_as_the_networks_see_it(source: Source) -> None:
    assert source.image.shape == (1, 3, SIDE, SIDE) and source.image is source.image
    assert source.image[0, 2, 4, 5] == source.crop[4, 5, 2] / np.float32(127.5) - np.float32(1)


def test_a_source_of_other_weights_is_refused(source: Source) -> None:
    source.check_made_by("ab" * 32)
    with pytest.raises(SettingsError, match=r"abababababab.*cdcdcdcdcdcd.*prepare.*again"):
        source.check_made_by("cd" * 32)


def test_another_npz_is_not_a_source(source: Source, tmp_path: Path) -> None:
    save_npz(tmp_path / "other.npz", a=np.zeros(3))
    with pytest.raises(MediaError, match=r"other\.npz: not a prepared source"):
        Source.load(tmp_path / "other.npz")
    save_npz(tmp_path / "part.npz", format=np.array(1), portrait=source.portrait)
    with pytest.raises(MediaError, match=r"part\.npz: .*lacks"):
        Source.load(tmp_path / "part.npz")


def test_a_truncated_file_is_named(source: Source, tmp_path: Path) -> None:
    path = tmp_path / "me.npz"
    source.save(path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(MediaError, match=r"me\.npz"):
        Source.load(path)
    with pytest.raises(MediaError, match="no such file"):
        Source.load(tmp_path / "none.npz")
