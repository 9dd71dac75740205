"""The tensors of a checkpoint, each read when it is asked for, and checked before."""

import os
from collections.abc import Collection, Iterator
from typing import Any

import jax.numpy as jnp
import numpy as np

from .._checkpoint import Checkpoint
from .._file import DTYPES, brief, opened

FLOATS = ("F32", "F16", "BF16")
READ = DTYPES | {
    "U8": np.dtype(np.uint8),
    "I8": np.dtype(np.int8),
    "I32": np.dtype(np.int32),
    "I64": np.dtype(np.int64),
    "F8_E4M3": np.dtype(jnp.float8_e4m3fn),
    "F8_E8M0": np.dtype(np.uint8),  # exponents of 2
}


class Unreadable(Exception):  # noqa: N818 - collected into one ValueError
    """A tensor that is not there, or not what its format says."""


class Tensors:
    """The tensors of a checkpoint by name.

    Attributes:
        taken: the names of those that were read.
    """

    def __init__(self, checkpoint: Checkpoint) -> None:
        """Of a checkpoint whose headers are sound."""
        self._checkpoint, self.taken = checkpoint, set[str]()

    def __contains__(self, name: str) -> bool:
        """Whether it is there."""
        return name in self._checkpoint.where

    def __iter__(self) -> Iterator[str]:
        """Their names."""
        return iter(self._checkpoint.where)

    def dtype(self, name: str) -> str:
        """The dtype of a tensor as safetensors calls it."""
        return self._entry(name).dtype

    def shape(self, name: str) -> tuple[int, ...]:
        """The shape of a tensor."""
        return self._entry(name).shape

    def matrix(self, name: str) -> tuple[int, int]:
        """The shape of a tensor that must be a matrix."""
        shape = self.shape(name)
        if len(shape) != 2 or 0 in shape:
            raise Unreadable(f"{name}: expected a matrix, got shape {shape}")
        return shape[0], shape[1]

    def _entry(self, name: str) -> Any:
        if name not in self:
            raise Unreadable(f"{name}: missing")
        return self._checkpoint.entry(name)

    def read(self, name: str, dtypes: Collection[str], shape: tuple[int, ...]) -> np.ndarray:
        """A tensor of one of `dtypes` and of `shape`; `Unreadable` if it is another."""
        entry = self._entry(name)
        if entry.dtype not in dtypes or entry.shape != shape:
            wanted = " or ".join(dtypes)
            raise Unreadable(
                f"{name}: expected {wanted} of shape {shape}, got {entry.dtype} {entry.shape}"
            )
        return self._read(name).view(READ[entry.dtype]).reshape(shape)

    def as_stored(self, name: str) -> np.ndarray:
        """A tensor as it is."""
        entry = self._entry(name)
        if entry.dtype not in READ:
            raise Unreadable(f"{name}: its dtype {entry.dtype} cannot be copied")
        return self.read(name, (entry.dtype,), entry.shape)

    def bytes(self, name: str) -> np.ndarray:
        """A tensor of any dtype as bytes."""
        return self._read(name)

    def _read(self, name: str) -> np.ndarray:
        entry, file = self._entry(name), self._checkpoint.where[name]
        self.taken.add(name)
        with opened(self._checkpoint.source, file) as (source, _):
            source.seek(self._checkpoint.headers[file].data + entry.start, os.SEEK_SET)
            data = source.read(entry.stop - entry.start)
        if len(data) != entry.stop - entry.start:
            raise Unreadable(f"{name}: its file changed while it was read")
        return np.frombuffer(data, np.uint8)


def nibbles(words: np.ndarray, axis: int, order: tuple[int, ...] = tuple(range(8))) -> np.ndarray:
    """The 8 codes of 4 bits in each int32, along an axis; of them number `order[k]` comes k-th."""
    words = np.moveaxis(words.view(np.uint32), axis, -1)
    codes = np.stack([words >> np.uint32(4 * k) & np.uint32(15) for k in order], -1)
    codes = codes.reshape(*words.shape[:-1], 8 * words.shape[-1]).astype(np.uint8)
    return np.moveaxis(codes, -1, axis)


def integer(config: dict[str, Any], field: str, legal: Collection[Any]) -> Any:
    """A field of a configuration that must be one of `legal`."""
    value = config.get(field)
    if type(value) not in {type(x) for x in legal} or value not in legal:
        expected = " or ".join(map(str, legal))
        raise Unreadable(f"`{field}` of the quantization: expected {expected}, got {brief(value)}")
    return value
