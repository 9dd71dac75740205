"""The safetensors file: a strict, bounded reader.

The header is checked as a whole before a byte of data is read, so that a file can make the reader
allocate no more than what it is long itself, and only for tensors of the expected shapes.
"""

import math
from collections.abc import Callable
from typing import Any, BinaryIO, NamedTuple

import jax.numpy as jnp
import numpy as np

from ._json import TENSORS, Source, brief, opened, parse

HEADER_LIMIT = 32 * 2**20  # bytes; the names of 200,000 tensors
NAME_LIMIT, DEPTH_LIMIT = 1000, 100  # characters and dots of a name; real ones have a tenth
DTYPES = {
    "F64": np.dtype(np.float64),
    "F32": np.dtype(np.float32),
    "F16": np.dtype(np.float16),
    "BF16": np.dtype(jnp.bfloat16),
}
# Known so that their place in the file can be checked; none of them is loaded.
OTHERS = {
    **dict.fromkeys(("I64", "U64", "C64"), 8),
    **dict.fromkeys(("I32", "U32"), 4),
    **dict.fromkeys(("I16", "U16"), 2),
    **dict.fromkeys(("I8", "U8", "BOOL", "F8_E4M3", "F8_E5M2"), 1),
    **dict.fromkeys(("F8_E8M0", "F8_E4M3FNUZ", "F8_E5M2FNUZ"), 1),
}


class Entry(NamedTuple):
    """One tensor of the header; `start` and `stop` count from the end of the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int
    stop: int


class Header(NamedTuple):
    """The tensors of a file by name, where their data starts, and where it ends."""

    entries: dict[str, Entry]
    data: int
    size: int


def read_header(source: Source, name: str = TENSORS) -> Header:
    """The header of a file of `source`; `ValueError` if the file is not whole and sound."""
    what = f"`{source.argument}`: {name}"
    with opened(source, name) as (file, size):
        count = int.from_bytes(file.read(8), "little")
        if not 2 <= count <= min(size - 8, HEADER_LIMIT):
            raise ValueError(
                f"{what} of {size} bytes claims a header of {count}; the file is cut off "
                "or is no safetensors file. Save it again."
            )
        raw = parse(file.read(count), f"`{source.argument}`: the header of {name}")
    metadata = raw.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(x, str) for x in metadata.values()):
        raise ValueError(
            f"{what} has the `__metadata__` {brief(metadata)}; expected an object of strings."
        )
    entries = {}
    for key, fields in raw.items():
        if len(key) > NAME_LIMIT or key.count(".") > DEPTH_LIMIT or not key.isprintable():
            raise ValueError(
                f"{what} names a tensor {brief(key)}; expected at most {NAME_LIMIT} printable "
                f"characters, with at most {DEPTH_LIMIT} dots."
            )
        entry = _entry(fields)
        if entry is None:
            raise ValueError(f"{what} describes {brief(key)} wrongly: {brief(fields)}.")
        entries[key] = entry
    _check_extents(entries, size - 8 - count, what)
    return Header(entries, 8 + count, size)


def _entry(fields: Any) -> Entry | None:
    if not isinstance(fields, dict) or set(fields) != {"dtype", "shape", "data_offsets"}:
        return None
    dtype, shape, offsets = (fields[k] for k in ("dtype", "shape", "data_offsets"))
    known = isinstance(dtype, str) and (dtype in DTYPES or dtype in OTHERS)
    if not known or not _naturals(shape) or not _naturals(offsets) or len(offsets) != 2:
        return None
    itemsize = DTYPES[dtype].itemsize if dtype in DTYPES else OTHERS[dtype]
    if len(shape) > 16 or math.prod(shape) * itemsize != offsets[1] - offsets[0]:
        return None
    return Entry(dtype, tuple(shape), *offsets)


def _naturals(values: Any) -> bool:
    return isinstance(values, list) and all(type(n) is int and 0 <= n < 2**63 for n in values)


def _check_extents(entries: dict[str, Entry], size: int, what: str) -> None:
    """The tensors must fill the data without a hole and without an overlap."""
    end = 0
    for name, entry in sorted(entries.items(), key=lambda item: item[1][2:]):
        if entry.start != end:
            raise ValueError(
                f"{what} has {brief(name)} at byte {entry.start} of the data; "
                f"expected byte {end}. The file is damaged; save it again."
            )
        end = entry.stop
    if end != size:
        raise ValueError(
            f"{what} describes {end} bytes of data but holds {size}; the file is cut off "
            "or damaged. Save it again."
        )


def reader(file: BinaryIO, header: Header) -> Callable[[str], np.ndarray]:
    """A function that reads one tensor by name."""

    def read(name: str) -> np.ndarray:
        entry = header.entries[name]
        file.seek(header.data + entry.start)
        data = file.read(entry.stop - entry.start)
        return np.frombuffer(data, DTYPES[entry.dtype]).reshape(entry.shape)

    return read
