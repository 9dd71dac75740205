"""The edits of a tensor of a checkpoint, in blocks of bounded size."""

import dataclasses
from collections.abc import Callable, Iterator
from typing import BinaryIO, Protocol

import jax
import jax.numpy as jnp
import numpy as np

from .._checkpoint import read_exactly
from .._file import DTYPES, TensorInfo
from ..adapter._tokens import Tokens

BLOCK = 2**20  # numbers
# Whose multiples XLA sums in the order of the rank, on CPUs with fused multiply-adds.
_SIDE = 64


class Edit(Protocol):
    """Computes the new values of a tensor from the old ones."""

    def blocks(self, data: BinaryIO, tensor: TensorInfo) -> Iterator[np.ndarray]:
        """Yields the new values of a tensor in any dtype; its old bytes are next in `data`."""
        ...


@dataclasses.dataclass
class NewValues(Edit):
    """Replaces a tensor."""

    value: np.ndarray

    def blocks(self, data: BinaryIO, tensor: TensorInfo) -> Iterator[np.ndarray]:
        """Yields the value."""
        data.seek(tensor.stop - tensor.start, 1)
        yield self.value


@dataclasses.dataclass
class NewRows(Edit):
    """Replaces rows of a table."""

    tokens: Tokens

    def blocks(self, data: BinaryIO, tensor: TensorInfo) -> Iterator[np.ndarray]:
        """Yields the table with the other rows."""
        (count, columns), dtype = tensor.shape, DTYPES[tensor.dtype]
        rows, values = np.asarray(self.tokens.rows), self.tokens.v.astype(dtype)
        step = max(1, BLOCK // max(columns, 1))
        for start in range(0, count, step):
            block = _read(data, dtype, (min(step, count - start), columns)).copy()
            here = (rows >= start) & (rows < start + len(block))
            block[rows[here] - start] = values[here]
            yield block


@dataclasses.dataclass
class Sum(Edit):
    """Adds s·B·A to a weight whose axes are flattened to (stack, rows, columns).

    Attributes:
        left: (stack, rows, r).
        right: (stack, r, columns).
        scale: s.
        m: the norms that DoRA gives the rows of the sum, (rows,), or its columns; or None.
        by_rows: whether `m` belongs to the rows.
    """

    left: np.ndarray
    right: np.ndarray
    scale: float
    m: np.ndarray | None = None
    by_rows: bool = True

    @property
    def transpose(self) -> "Sum":
        """The sum for the transposed weight."""
        left, right = self.right.swapaxes(1, 2), self.left.swapaxes(1, 2)
        return Sum(left, right, self.scale, self.m, not self.by_rows)

    def of_rows(self, expert: int, start: int, rows: int) -> "Sum":
        """Returns the sum for some rows of one matrix of the stack."""
        left = self.left[expert : expert + 1, start : start + rows]
        return Sum(left, self.right[expert : expert + 1], self.scale)

    def blocks(self, data: BinaryIO, tensor: TensorInfo) -> Iterator[np.ndarray]:
        """Yields W + s·B·A in blocks of rows, with the norms of DoRA if it has them."""
        gains, dtype = None, DTYPES[tensor.dtype]
        if self.m is not None and not self.by_rows:  # the norm of a column needs all of W
            start = data.tell()
            squares = (_squares(block, 0) for _, block in self._sums(data, dtype))
            gains = _gain(self.m, sum(squares, np.zeros(self.m.shape)))
            data.seek(start)
        for rows, block in self._sums(data, dtype):
            if self.m is not None and self.by_rows:
                gains = _gain(self.m[rows], _squares(block, 1))[:, None]
            yield block if gains is None else block * gains.astype(block.dtype)

    def _sums(self, data: BinaryIO, dtype: np.dtype) -> Iterator[tuple[slice, np.ndarray]]:
        """Yields W + s·B·A in float32 or better, in blocks, each with its rows."""
        (count, rows, _), columns = self.left.shape, self.right.shape[2]
        step = max(1, min(rows, BLOCK // max(columns, 1)))
        for i in range(count):
            times = _product(self.right[i], step)
            for start in range(0, rows, step):
                own = slice(start, start + step)
                change = times(self.left[i, own]) * np.float32(self.scale)
                w = _read(data, dtype, change.shape)
                yield own, w.astype(np.promote_types(dtype, np.float32)) + change


def _squares(block: np.ndarray, axis: int) -> np.ndarray:
    return np.square(block, dtype=np.float64).sum(axis)


def _gain(m: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """Computes the factors of rows or columns: m over their norms, 0 where these are 0."""
    n = np.sqrt(squares)
    return np.divide(m.astype(np.float64), n, out=np.zeros_like(n), where=n > 0)


def _product(right: np.ndarray, rows: int) -> Callable[[np.ndarray], np.ndarray]:
    """Makes a function that multiplies matrices of up to `rows` rows by `right`, in one program."""
    cpu = jax.local_devices(backend="cpu")[0]
    rank, columns = right.shape
    factor = jax.device_put(_pad(right, (rank, _round_up(columns))), cpu)
    alone = jax.sharding.Mesh([cpu], ("cpu",))  # in the place of the caller's jax.set_mesh

    def times(left: np.ndarray) -> np.ndarray:
        block = jax.device_put(_pad(left, (_round_up(rows), rank)), cpu)
        with jax.set_mesh(alone):
            found = jnp.matmul(block, factor, precision=jax.lax.Precision.HIGHEST)
        return np.asarray(found)[: len(left), :columns]

    return times


def _round_up(n: int) -> int:
    return -(-n // _SIDE) * _SIDE


def _pad(x: np.ndarray, shape: tuple[int, int]) -> np.ndarray:
    """Converts an array to float32, and pads its rows and columns with zeros."""
    new = np.zeros(shape, np.float32)
    new[: x.shape[0], : x.shape[1]] = x
    return new


def _read(data: BinaryIO, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Reads the next numbers of a file."""
    count = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer(read_exactly(data, count), dtype).reshape(shape)


def encode(x: np.ndarray, dtype: np.dtype) -> tuple[bytes, int]:
    """Returns the bytes of numbers in a dtype, and how many of them are not finite."""
    x = x.astype(dtype)
    return x.tobytes(), x.size - int(np.count_nonzero(np.isfinite(x)))
