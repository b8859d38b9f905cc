"""Reading ahead and writing behind: at the same time, all of it, in order, and ended by errors."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import closing

import pytest

from diffusionact.errors import MediaError
from diffusionact.runtime.ahead import read_ahead, write_behind

WAIT_S = 20.0  # for what happens at once; longer means it never does


@pytest.fixture(autouse=True)
def no_thread_is_left() -> Iterator[None]:
    before = threading.active_count()
    yield
    assert threading.active_count() == before


def failing(count: int, error: BaseException) -> Iterator[int]:
    yield from range(count)
    raise error


def test_every_item_is_read_in_order_with_the_time_it_took() -> None:
    pairs = list(read_ahead(range(200)))
    assert [item for item, _ in pairs] == list(range(200))
    assert all(spent_ns > 0 for _, spent_ns in pairs)


def test_every_item_is_written_in_order() -> None:
    written: list[int] = []
    write_behind(range(200), written.append)
    assert written == list(range(200))


def test_the_next_is_read_while_one_is_in_use() -> None:
    second = threading.Event()

    def items() -> Iterator[int]:
        yield 1
        second.set()
        yield 2

    with closing(read_ahead(items())) as pairs:
        assert next(pairs)[0] == 1
        assert second.wait(WAIT_S)  # made although nobody has asked for it yet


def test_the_next_is_made_while_one_is_written() -> None:
    second = threading.Event()

    def items() -> Iterator[int]:
        yield 1
        second.set()
        yield 2

    def write(item: int) -> None:
        assert second.wait(WAIT_S), item

    write_behind(items(), write)


def test_an_error_of_the_reader_comes_after_what_it_read() -> None:
    seen = []
    with pytest.raises(MediaError, match="unplugged"):
        for item, _ in read_ahead(failing(3, MediaError("unplugged"))):
            seen.append(item)
    assert seen == [0, 1, 2]


def test_who_leaves_early_ends_the_reader() -> None:
    ended = threading.Event()

    def items() -> Iterator[int]:
        try:
            yield from range(1_000_000)
        finally:
            ended.set()

    with pytest.raises(ZeroDivisionError), closing(read_ahead(items())) as pairs:
        for item, _ in pairs:
            print(1 / (item - 2))
    assert ended.wait(WAIT_S)  # what it had open is closed


@pytest.mark.parametrize("error", [MediaError("no render"), KeyboardInterrupt()])
def test_an_error_of_the_maker_ends_the_writer_behind_what_was_made(error: BaseException) -> None:
    written: list[int] = []
    with pytest.raises(type(error)):
        write_behind(failing(3, error), written.append)
    assert written == [0, 1, 2]


def test_an_error_of_the_writer_ends_the_maker() -> None:
    made = []

    def items() -> Iterator[int]:
        for i in range(1_000_000):
            made.append(i)
            yield i

    def write(item: int) -> None:
        if item == 2:
            raise MediaError("disk full")

    with pytest.raises(MediaError, match="disk full"):
        write_behind(items(), write)
    assert len(made) < 10
