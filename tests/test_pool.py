from __future__ import annotations

import sys
import threading

import numpy as np
import pytest

from diffusionact.runtime.pool import Pool

SHAPE = (4, 5, 3)


@pytest.fixture
def pool() -> Pool:
    return Pool()


def test_what_nobody_holds_is_handed_out_again(pool: Pool) -> None:
    first = id(pool.take(SHAPE))
    for _ in range(3):
        assert id(pool.take(SHAPE)) == first


def test_what_somebody_holds_is_not(pool: Pool) -> None:
    held = [pool.take(SHAPE) for _ in range(5)]
    assert len({id(array) for array in held}) == 5
    del held[2]
    again = pool.take(SHAPE)
    assert all(again is not array for array in held)


def test_a_view_a_memoryview_and_a_thread_hold_it_too(pool: Pool) -> None:
    view = pool.take(SHAPE)[1:, ::2]
    assert not np.shares_memory(pool.take(SHAPE), view)
    with memoryview(pool.take(SHAPE)) as seen:
        assert not np.shares_memory(pool.take(SHAPE), np.asarray(seen))
    told, done = threading.Event(), threading.Event()

    def keep(array: np.ndarray) -> None:
        told.set()
        done.wait(10)
        array[:] = 7

    thread = threading.Thread(target=keep, args=(pool.take(SHAPE),))
    thread.start()
    told.wait(10)
    mine = pool.take(SHAPE)
    mine[:] = 1
    done.set()
    thread.join()
    assert (mine == 1).all()


def test_a_listener_who_keeps_everything_gets_arrays_of_its_own(pool: Pool) -> None:
    kept = [pool.take(SHAPE) for _ in range(3 * Pool.LIMIT)]
    assert len({id(array) for array in kept}) == len(kept)
    assert sys.getrefcount(kept[-1]) < sys.getrefcount(kept[0]), "the pool kept them all"


def test_another_size_is_another_picture(pool: Pool) -> None:
    small, large = pool.take(SHAPE), pool.take((8, 8, 3))
    assert small.shape == SHAPE and large.shape == (8, 8, 3) and large.dtype == np.uint8
