"""The bytes of one merged tensor, in blocks of bounded size."""

from collections.abc import Callable, Iterator
from typing import BinaryIO, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._file import COUNTS, DTYPES, Tensor
from ..adapter._tokens import Tokens, placed
from ._changes import Changes
from ._orientation import Sum

BLOCK = 2**20  # numbers
# Whose multiples XLA sums in the order of the rank, on CPUs with fused multiply-adds.
_SIDE = 64


class Chunk(NamedTuple):
    """Bytes of a tensor, in the order of the file."""

    data: bytes
    bad: int = 0  # values that are not finite


def tensor(source: BinaryIO, entry: Tensor, name: str, todo: Changes) -> Iterator[Chunk]:
    """The bytes of one tensor of the result, read along `source`."""
    if name in todo.sums:
        yield from _added(source, entry, todo.sums[name])
    elif name in todo.full:
        for _ in chunks(source, entry.stop - entry.start):
            pass
        yield _chunk(todo.full[name], (DTYPES | COUNTS)[entry.dtype])
    elif name in todo.rows:
        yield from _with_rows(source, entry, todo.rows[name])
    else:
        yield from map(Chunk, chunks(source, entry.stop - entry.start))


def _with_rows(source: BinaryIO, entry: Tensor, new: Tokens) -> Iterator[Chunk]:
    """W with other rows."""
    (rows, columns), dtype = entry.shape, DTYPES[entry.dtype]
    step = max(1, BLOCK // max(columns, 1))
    for start in range(0, rows, step):
        count = min(step, rows - start)
        w = np.frombuffer(_read(source, count * columns * dtype.itemsize), dtype)
        block = w.reshape(count, columns).copy()
        placed(new, block, start)
        yield _chunk(block, dtype)


def _added(source: BinaryIO, entry: Tensor, change: Sum) -> Iterator[Chunk]:
    """W + s·B·A in blocks of rows, with the norms that DoRA gives it if it is that."""
    gains = None
    if change.m is not None and not change.by_rows:  # all of W comes before the norm of a column
        start = source.tell()
        squares = np.zeros(change.m.shape)
        for _, block in _sums(source, entry, change):
            squares += _squares(block, 0)
        gains = _gain(change.m, squares)
        source.seek(start)
    for rows, block in _sums(source, entry, change):
        if gains is not None:
            block = _times(block, gains)
        elif change.m is not None:
            block = _times(block, _gain(change.m[rows], _squares(block, 1))[:, None])
        yield _chunk(block, DTYPES[entry.dtype])


def _sums(source: BinaryIO, entry: Tensor, change: Sum) -> Iterator[tuple[slice, np.ndarray]]:
    """W + s·B·A in blocks, each with its rows."""
    (count, rows, _), columns = change.left.shape, change.right.shape[2]
    step = max(1, min(rows, BLOCK // max(columns, 1)))
    dtype = DTYPES[entry.dtype]
    for i in range(count):
        times = _product(change.right[i], step)
        for start in range(0, rows, step):
            own = slice(start, start + step)
            product = times(change.left[i, own])
            w = np.frombuffer(_read(source, product.size * dtype.itemsize), dtype)
            yield own, _sum(w.reshape(product.shape), product, change.scale)


@np.errstate(over="ignore", invalid="ignore")
def _squares(block: np.ndarray, axis: int) -> np.ndarray:
    return np.square(block, dtype=np.float64).sum(axis)


def _gain(m: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """What is multiplied with rows or columns: m over their norms, 0 where these are 0."""
    n = np.sqrt(squares)
    return np.divide(m.astype(np.float64), n, out=np.zeros_like(n), where=n > 0)


@np.errstate(over="ignore", invalid="ignore")
def _times(block: np.ndarray, gain: np.ndarray) -> np.ndarray:
    return block * gain.astype(block.dtype)


# What overflows is counted by `_chunk`.
@np.errstate(over="ignore", invalid="ignore")
def _sum(w: np.ndarray, product: np.ndarray, scale: float) -> np.ndarray:
    """W + s·B·A in float32 or better."""
    return w.astype(np.promote_types(w.dtype, np.float32)) + product * np.float32(scale)


def _product(right: np.ndarray, rows: int) -> Callable[[np.ndarray], np.ndarray]:
    """The product of matrices of up to so many `rows` with `right`, by one program."""
    cpu = jax.local_devices(backend="cpu")[0]
    rank, columns = right.shape
    factor = jax.device_put(_padded(right, (rank, _up(columns))), cpu)

    def times(left: np.ndarray) -> np.ndarray:
        block = jax.device_put(_padded(left, (_up(rows), rank)), cpu)
        found = jnp.matmul(block, factor, precision=jax.lax.Precision.HIGHEST)
        return np.asarray(found)[: len(left), :columns]

    return times


def _up(n: int) -> int:
    return -(-n // _SIDE) * _SIDE


def _padded(x: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """As float32, with zeros after its rows and columns."""
    new = np.zeros(shape, np.float32)
    new[: x.shape[0], : x.shape[1]] = x
    return new


@np.errstate(over="ignore")
def _chunk(x: np.ndarray, dtype: np.dtype) -> Chunk:
    x = x.astype(dtype)
    return Chunk(x.tobytes(), x.size - int(np.count_nonzero(np.isfinite(x))))


def chunks(source: BinaryIO, size: int) -> Iterator[bytes]:
    """The next `size` bytes, in pieces."""
    for start in range(0, size, 4 * BLOCK):
        yield _read(source, min(4 * BLOCK, size - start))


def _read(source: BinaryIO, size: int) -> bytes:
    data = source.read(size)
    if len(data) != size:
        raise ValueError("`src_dir`: a file changed while it was read; start again.")
    return data
