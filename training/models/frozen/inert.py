"""Pickles read without running anything of theirs: objects become records of what was asked for.

No class or function named in a pickle is looked up or called. Arrays, sparse matrices, chumpy's
wrapped arrays and torch tensors are then rebuilt from the records' numbers.
"""

from __future__ import annotations

import io
import pickle
import warnings
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray

from diffusionact.errors import SettingsError

PLAIN_DTYPES = frozenset("b1 i1 i2 i4 i8 u1 u2 u4 u8 f2 f4 f8".split())


class Record:
    """Stands for an object of a pickle: its class or function, by name only, and what it got."""

    called: ClassVar[str] = ""  # "module.name"

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args, self.kwargs = args, kwargs
        self.state: Any = None
        self.items: list[Any] = []

    def __new__(cls, *args: Any, **kwargs: Any) -> Record:
        record = super().__new__(cls)
        Record.__init__(record, *args, **kwargs)
        return record

    def __setstate__(self, state: Any) -> None:
        self.state = state

    def __setitem__(self, key: Any, value: Any) -> None:
        self.items.append((key, value))

    def append(self, value: Any) -> None:
        self.items.append(value)

    @property
    def name(self) -> str:
        """What it is an object of; pickles of Python 2 may wrap the class in a constructor."""
        if self.called.endswith("._reconstructor") and self.args:
            wrapped = self.args[0]
            if isinstance(wrapped, type) and issubclass(wrapped, Record):
                return wrapped.called
        return self.called


class _Reader(pickle._Unpickler):
    """Python's own unpickler, the one written in Python: a pickle cannot make it set aside memory
    for a table whose size the pickle names."""

    def find_class(self, module: str, name: str) -> type[Record]:
        return type("Record", (Record,), {"called": f"{module}.{name}"})


def read(data: bytes, what: str) -> Any:
    """The content of a pickle: plain values, arrays, and `Record` where it is anything else.

    what: the file's name, for messages.
    Raises: SettingsError: it is no pickle, is cut off, or its arrays do not fit their own sizes.
    """
    try:
        return _plain(_Reader(io.BytesIO(data), encoding="latin1").load())
    except Exception as error:  # what a broken pickle raises can be anything, says its manual
        raise SettingsError(
            f"{what} is not a readable pickle ({type(error).__name__}: {error}); fetch it again"
        ) from error


def _plain(value: Any) -> Any:
    """A value with the records that are arrays rebuilt, down to two levels of containers."""
    if isinstance(value, dict):
        return {key: _rebuilt(item) for key, item in value.items()}
    value = _rebuilt(value)
    if isinstance(value, list):  # an array of objects: numpy.save's way to store a dict
        return [_plain(item) if isinstance(item, dict) else _rebuilt(item) for item in value]
    return value


def _rebuilt(value: Any) -> Any:
    """The array that a record stands for; anything else as it is."""
    if not isinstance(value, Record):
        return value
    module, _, name = value.name.rpartition(".")
    if name == "_reconstruct" and module in ("numpy.core.multiarray", "numpy._core.multiarray"):
        return _array(value)
    if value.name == "chumpy.ch.Ch" and isinstance(value.state, dict):
        return _rebuilt(value.state.get("x"))
    if module.startswith("scipy.sparse") and name in ("csc_matrix", "csr_matrix"):
        return _dense(value.state, by_column=name == "csc_matrix")
    if value.name == "torch._utils._rebuild_tensor_v2":
        return _tensor(value)
    return value


def _array(record: Record) -> Any:
    """The array of NumPy's record, or the list of its entries where they are objects."""
    _, shape, dtype, by_column, raw = record.state
    code = str(dtype.args[0])
    if code.startswith("O"):
        return list(raw)
    order = dtype.state[1] if dtype.state else "|"
    if code not in PLAIN_DTYPES or order not in "<>=|":
        raise ValueError(f"an array of {order}{code}")
    flat = np.frombuffer(_bytes(raw), np.dtype(f"{order}{code}"))
    if min(shape, default=0) < 0:
        raise ValueError(f"an array of shape {shape}")
    array = flat.reshape(shape, order="F" if by_column else "C")
    return array.astype(array.dtype.newbyteorder("="))


def _bytes(raw: Any) -> bytes:
    """Bytes as pickles of any protocol hold them."""
    if isinstance(raw, Record) and raw.called == "_codecs.encode":
        raw = raw.args[0]
    return raw.encode("latin1") if isinstance(raw, str) else bytes(raw)


def _dense(state: dict[str, Any], by_column: bool) -> NDArray[Any]:
    """A sparse matrix written out."""
    data, indices, starts = (_rebuilt(state[key]) for key in ("data", "indices", "indptr"))
    rows, columns = state["_shape"] if "_shape" in state else state["shape"]
    lines, length = (columns, rows) if by_column else (rows, columns)
    if len(starts) != lines + 1 or not len(indices) == len(data) == starts[-1]:
        raise ValueError(f"a sparse matrix of {rows} x {columns} with {len(data)} entries")
    dense = np.zeros((lines, length), data.dtype)
    np.add.at(dense, (np.repeat(np.arange(lines), np.diff(starts)), indices), data)
    return dense.T if by_column else dense


def _tensor(record: Record) -> NDArray[Any]:
    """The values of torch's record, whose storage is a torch file of its own."""
    storage, offset, size, stride = record.args[:4]
    if not isinstance(storage, Record) or storage.called != "torch.storage._load_from_bytes":
        raise ValueError("a tensor without its numbers")
    file = io.BytesIO(_bytes(storage.args[0]))
    with warnings.catch_warnings():  # torch writes tensors of a pickle so, and deprecates the class
        warnings.filterwarnings("ignore", "TypedStorage is deprecated")
        held = torch.load(file, map_location="cpu", weights_only=True)
        flat = torch.tensor([], dtype=held.dtype).set_(held.untyped())
    values: NDArray[Any] = flat.as_strided(size, stride, offset).numpy().copy()
    return values
