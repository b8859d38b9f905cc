"""The pool on disk, the batches drawn from it, and the cache of inverted sources."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest

from diffusionact.errors import SettingsError
from diffusionact.training import data
from diffusionact.training.config import StageRecipe
from diffusionact.training.data import PairSampler, Pool, Prefetcher, render_pool
from diffusionact.training.inversions import InversionCache

IDENTITIES, FRAMES, SIDE = 6, 3, 32


def write_pool(folder: Path) -> Pool:
    """A pool whose every value tells its identity and frame."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    rows = (IDENTITIES, FRAMES)
    tag = (np.arange(IDENTITIES)[:, None] * 10 + np.arange(FRAMES)).astype(np.uint8)
    arrays = {
        "images": np.broadcast_to(tag[..., None, None, None], (*rows, SIDE, SIDE, 3)),
        "labels": rng.integers(0, 8, (*rows, SIDE, SIDE), dtype=np.uint8),
        "points": rng.uniform(0, SIDE, (*rows, 68, 3)).astype(np.float32),
        "gaze": rng.uniform(0, SIDE, (*rows, 2, 2)).astype(np.float32),
        "pose": np.zeros((*rows, 3), np.float32),
        "expression": np.zeros((*rows, 4), np.float32),
        "gaze_angles": np.zeros((*rows, 2), np.float32),
        "parameters": rng.standard_normal((*rows, 5)).astype(np.float32),
    }
    for name, array in arrays.items():
        np.save(folder / f"{name}.npy", array)
    meta = {"format": 1, "identities": IDENTITIES, "frames": FRAMES, "size": SIDE, "seed": 1}
    (folder / "meta.json").write_text(json.dumps(meta))
    return Pool.open(folder)


@pytest.fixture
def pool(tmp_path: Path) -> Pool:
    return write_pool(tmp_path / "pool")


def stage(kind: str = "reenact", **values: float) -> StageRecipe:
    return StageRecipe(kind=kind, images=100, batch=16, **values)  # type: ignore[arg-type]


def sampler(pool: Pool, recipe: StageRecipe, cache: InversionCache | None = None) -> PairSampler:
    empty = InversionCache(8, SIDE)
    return PairSampler(pool, IDENTITIES - 2, recipe, cache or empty, (1, 0))


def test_pairs_are_frames_of_one_identity_that_is_not_held_out(pool: Pool) -> None:
    batch = sampler(pool, stage())(0)
    assert batch.source is not None and batch.condition is not None
    identities = batch.target[:, 0, 0, 0] // 10
    np.testing.assert_array_equal(batch.source[:, 0, 0, 0] // 10, identities)
    np.testing.assert_array_equal(identities, batch.identity)
    assert identities.max() < IDENTITIES - 2
    np.testing.assert_array_equal(batch.points, pool.points[batch.identity, batch.frame])


def test_the_condition_is_the_drawing_of_the_target(pool: Pool) -> None:
    batch = sampler(pool, stage())(0)
    np.testing.assert_array_equal(batch.condition, pool.draw(batch.identity, batch.frame))


def test_same_frame_makes_source_and_target_equal(pool: Pool) -> None:
    always = sampler(pool, stage(same_frame=1.0))(0)
    assert always.source is not None
    np.testing.assert_array_equal(always.source, always.target)
    never = sampler(pool, stage(same_frame=0.0))(0)
    assert never.source is not None and not np.array_equal(never.source, never.target)


def test_a_batch_depends_on_its_step_alone(pool: Pool) -> None:
    first, second = sampler(pool, stage()), sampler(pool, stage())
    first(0)
    np.testing.assert_array_equal(first(7).target, second(7).target)
    assert not np.array_equal(first(7).target, first(8).target)


def test_cached_noise_comes_with_its_own_identity(pool: Pool) -> None:
    cache = InversionCache(8, SIDE)
    identity = np.array([0, 1, 2, 3])
    noise = identity[:, None, None, None] * np.ones((1, 3, SIDE, SIDE))
    cache.add(noise, identity, np.zeros(4, np.int64))
    batch = sampler(pool, stage("autoencoder", cached_noise=0.5), cache)(0)
    assert len(batch.noise) == 8
    np.testing.assert_array_equal(batch.noise[:, 0, 0, 0], batch.identity[:8])
    assert batch.source is None


def test_the_ring_forgets_the_oldest() -> None:
    cache = InversionCache(4, 2)
    for value in range(6):
        noise = np.full((1, 3, 2, 2), value, np.float32)
        cache.add(noise, np.array([value]), np.array([value]))
    assert len(cache) == 4
    noise, identity, frame = cache.pick(np.random.default_rng(0), 100)
    assert set(identity) == {2, 3, 4, 5}
    np.testing.assert_array_equal(noise[:, 0, 0, 0], identity)
    np.testing.assert_array_equal(frame, identity)


def test_an_empty_ring_gives_nothing() -> None:
    noise, identity, _ = InversionCache(4, 2).pick(np.random.default_rng(0), 0)
    assert noise.shape == (0, 3, 2, 2) and len(identity) == 0


def test_prefetching_keeps_the_order_and_hands_errors_over() -> None:
    def make(step: int) -> int:
        if step == 5:
            raise ValueError("five")
        return step

    batches = Prefetcher(make, 2)
    assert [next(batches) for _ in range(3)] == [2, 3, 4]
    with pytest.raises(ValueError, match="five"):
        next(batches)
    batches.close()


def test_a_missing_pool_names_the_command(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match=r"python -m diffusionact\.training\.data"):
        Pool.open(tmp_path / "nothing")


def test_a_pool_of_other_size_is_not_taken_for_this_one(pool: Pool, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="wanted"):
        render_pool(tmp_path / "pool", identities=IDENTITIES + 1, frames=FRAMES, size=SIDE)


@pytest.mark.slow
def test_rendering_is_taken_up_again_and_gives_the_same_pool(tmp_path: Path) -> None:
    request = {"identities": 3, "frames": 2, "size": 64, "seed": 4}
    whole = render_pool(tmp_path / "whole", **request, workers=1)
    partial = tmp_path / "broken.partial"
    done = data._prepare(partial, {"format": 1, **request})
    data._render_identity((str(partial), 1, 2, 64, 4))
    done[1] = 1
    done.flush()
    mended = render_pool(tmp_path / "broken", **request, workers=1)
    assert not partial.exists()
    for name in data.FIELDS:
        np.testing.assert_array_equal(getattr(whole, name), getattr(mended, name))
