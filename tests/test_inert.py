"""Pickles read without running anything of theirs, and the arrays in them."""

from __future__ import annotations

import os
import pickle
from pathlib import Path
from typing import Any

import pytest

from diffusionact.errors import SettingsError
from diffusionact.training.models.frozen import flame, inert

pytestmark = pytest.mark.torch


class Bomb:
    """Unpickled by Python itself, it would make a folder."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.makedirs, (str(self.marker), 0o700, True)


@pytest.mark.parametrize("protocol", range(pickle.HIGHEST_PROTOCOL + 1))
def test_nothing_in_a_pickle_is_executed(protocol: int, tmp_path: Path) -> None:
    marker = tmp_path / "executed"
    data = pickle.dumps({"v_template": Bomb(marker), "f": [Bomb(marker)]}, protocol)
    content = inert.read(data, "bomb.pkl")
    assert isinstance(content["v_template"], inert.Record) and not marker.exists()
    (tmp_path / "bomb.pkl").write_bytes(data)
    with pytest.raises(SettingsError):
        flame.read(tmp_path / "bomb.pkl")
    assert not marker.exists()
    pickle.loads(data)
    assert marker.exists(), "the bomb is one"


@pytest.mark.parametrize(
    "data",
    [
        b"cposix\nsystem\n(S'touch executed'\ntR.",
        b"(S'touch executed'\nios\nsystem\n.",
        b"\x80\x04\x8c\x08builtins\x8c\x04eval\x93\x8c\x031/0\x85R.",
        b"cbuiltins\nexec\n(Vraise SystemExit\ntR}b.",
    ],
)
def test_every_way_to_name_a_function_gives_a_record(data: bytes) -> None:
    content = inert.read(data, "bomb")
    assert isinstance(content, inert.Record) and content.called.split(".")[1] in (
        "system", "eval", "exec"
    )  # fmt: skip


@pytest.mark.parametrize(
    "data",
    [
        b"",
        b"\x80\x04.",
        b"(" * 50 + b".",
        b"\x82\x01.",  # a registered extension
        b"Pid\n.",  # a persistent object
        b"\x80\x05\x96" + (2**62).to_bytes(8, "little") + b".",  # room for 2^62 bytes
    ],
)
def test_broken_pickles_are_errors(data: bytes) -> None:
    with pytest.raises(SettingsError, match="broken.pkl is not a readable pickle"):
        inert.read(data, "broken.pkl")


def test_a_table_index_of_a_pickle_takes_no_memory() -> None:
    content = inert.read(b"N" + b"r" + (2**31 - 1).to_bytes(4, "little") + b".", "index")
    assert content is None


ARRAY = (
    b"cnumpy.core.multiarray\n_reconstruct\n(cnumpy\nndarray\n(I0\ntS'b'\ntR(I1\n(I2\ntcnumpy\n"
    b"dtype\n(S'f8'\nI0\nI1\ntR(I3\nS'>'\nNNNI-1\nI-1\nI0\ntbI00\n"
    b"S'\\x3f\\xf0\\x00\\x00\\x00\\x00\\x00\\x00\\xc0\\x00\\x00\\x00\\x00\\x00\\x00\\x00'\ntb"
)


def test_pickles_of_python_2_are_read() -> None:
    """Protocol 0, as cPickle wrote it: raw strings, big-endian, an old-style constructor."""
    assert inert.read(ARRAY + b".", "array").tolist() == [1.0, -2.0]
    wrapped = b"ccopy_reg\n_reconstructor\n(cchumpy.ch\nCh\nc__builtin__\nobject\nNtR"
    content = inert.read(b"(dS'a'\n" + wrapped + b"(dS'x'\n" + ARRAY + b"sbs.", "chumpy")
    assert content["a"].tolist() == [1.0, -2.0]


@pytest.mark.parametrize(
    "change", [(b"(I2\nt", b"(I3\nt"), (b"(I2\nt", b"(I-1\nt"), (b"S'f8'", b"S'V8'")]
)
def test_an_array_that_does_not_fit_its_size_is_an_error(change: tuple[bytes, bytes]) -> None:
    with pytest.raises(SettingsError, match="array.pkl"):
        inert.read(ARRAY.replace(*change) + b".", "array.pkl")
