"""Computes new values of a checkpoint's tensor, in blocks of bounded size."""

import dataclasses
import functools
import math
from collections.abc import Callable, Iterator, Mapping
from typing import BinaryIO

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ..._errors import InputError
from .._checkpoint import read_exactly
from .._file import DTYPES, TensorInfo
from .._write import Edit

RowIndex = slice | np.ndarray
BLOCK = 2**19  # numbers
# On CPUs with fused multiply-adds, XLA sums matrices with such sides in the order of the rank.
_SIDE = 64


@dataclasses.dataclass
class NewValues(Edit):
    """Replaces a tensor."""

    value: np.ndarray

    def blocks(self, data: BinaryIO, tensor: TensorInfo) -> Iterator[np.ndarray]:
        """Yields the value."""
        data.seek(tensor.stop - tensor.start, 1)
        yield self.value

    def of_rows(self, expert: int | None, rows: RowIndex) -> "NewValues":
        """Returns the values of some rows, of one matrix if there is a stack of them."""
        return NewValues((self.value if expert is None else self.value[expert])[rows])


@dataclasses.dataclass
class Sum(Edit):
    """Adds s·B·A to a weight whose axes are flattened to (stack, rows, columns).

    Attributes:
        left: (stack, rows, r).
        right: (stack, r, columns).
        scale: s.
        m: the norms of the rows (or columns) of DoRA's sum, (rows,); None for LoRA.
        by_rows: whether `m` belongs to the rows.
    """

    left: np.ndarray
    right: np.ndarray
    scale: float
    m: np.ndarray | None = None
    by_rows: bool = True

    @property
    def transpose(self) -> "Sum":
        """The sum for the transposed weights."""
        left, right = self.right.swapaxes(1, 2), self.left.swapaxes(1, 2)
        return Sum(left, right, self.scale, self.m, not self.by_rows)

    def of_rows(self, expert: int | None, rows: RowIndex) -> "Sum":
        """Returns the sum for some rows, of one matrix if there is a stack of them."""
        own = slice(None) if expert is None else slice(expert, expert + 1)
        m = self.m if self.m is None or not self.by_rows else self.m[rows]
        return Sum(self.left[own, rows], self.right[own], self.scale, m, self.by_rows)

    def blocks(self, data: BinaryIO, tensor: TensorInfo) -> Iterator[np.ndarray]:
        """Yields W + s·B·A in blocks of rows, normalized for DoRA."""
        gains = None
        dtype = DTYPES[tensor.dtype]
        wide = np.promote_types(dtype, np.float32)
        if self.m is not None and not self.by_rows:  # the norm of a column needs all of W
            start = data.tell()
            squares = (_squares(block, 0) for _, block in self._sums(data, dtype, wide))
            gains = _gain(self.m, sum(squares, np.zeros(self.m.shape)))
            data.seek(start)
        for rows, block in self._sums(data, dtype, dtype if self.m is None else wide):
            if self.m is not None and self.by_rows:
                gains = _gain(self.m[rows], _squares(block, 1))[:, None]
            yield block if gains is None else block * gains.astype(block.dtype)

    def _sums(
        self, data: BinaryIO, dtype: np.dtype, to: np.dtype
    ) -> Iterator[tuple[slice, np.ndarray]]:
        """Yields blocks of W + s·B·A with their rows, rounded once to the dtype `to`."""
        (count, rows, _), columns = self.left.shape, self.right.shape[2]
        step = max(1, min(rows, BLOCK // max(columns, 1)))
        for i in range(count):
            add = _adder(self.right[i], self.scale, step)
            for start in range(0, rows, step):
                own = slice(start, start + step)
                left = self.left[i, own]
                yield own, add(_read(data, dtype, (len(left), columns)), left, to)


@dataclasses.dataclass
class Parts(Edit):
    """Changes some of the parameters that follow each other in the rows of a tensor.

    Attributes:
        parts: the number of rows of each, and its edit, by its first row.
    """

    parts: Mapping[int, tuple[int, Edit]]

    def blocks(self, data: BinaryIO, tensor: TensorInfo) -> Iterator[np.ndarray]:
        """Yields the rows of these parameters, and those between them as they are."""
        count, *rest = tensor.shape
        dtype = DTYPES[tensor.dtype]
        at = 0
        columns = math.prod(rest)
        step = max(1, BLOCK // max(columns, 1))
        for start, (rows, edit) in [*sorted(self.parts.items()), (count, (0, None))]:
            for i in range(at, start, step):
                yield _read(data, dtype, (min(step, start - i), columns))
            if edit is not None:
                size = rows * columns * dtype.itemsize
                yield from edit.blocks(
                    data, tensor._replace(shape=(rows, *rest), start=0, stop=size)
                )
            at = start + rows


def check_cpu() -> None:
    """Raises if JAX has no CPU: other devices sum in other orders."""
    try:
        jax.local_devices(backend="cpu")
    except RuntimeError:
        given = jax.config.jax_platforms
        raise InputError(
            "JAX_PLATFORMS",
            f"must have the CPU, on which weights are merged; got {given!r}.",
            remedy=f"Set it to '{given},cpu'.",
        ) from None


def _squares(block: np.ndarray, axis: int) -> np.ndarray:
    return np.square(block, dtype=np.float64).sum(axis)


def _gain(m: np.ndarray, squares: np.ndarray) -> np.ndarray:
    """Computes m ÷ norm of each row or column; 0 where the norm is 0."""
    n = np.sqrt(squares)
    return np.divide(m.astype(np.float64), n, out=np.zeros_like(n), where=n > 0)


def _adder(right: np.ndarray, scale: float, rows: int) -> Callable[..., np.ndarray]:
    """Makes a function (W, B, dtype) that computes W + s·B·`right` for up to `rows` rows."""
    cpu = jax.local_devices(backend="cpu")[0]
    rank, columns = right.shape
    factor = _pad(right, (rank, _round_up(columns)), np.dtype(np.float32))
    rest = jax.device_put((factor, np.float32(scale), np.uint32(0)), cpu)
    alone = jax.sharding.Mesh([cpu], ("cpu",))  # instead of the caller's jax.set_mesh

    def add(w: np.ndarray, left: np.ndarray, to: np.dtype) -> np.ndarray:
        if w.dtype == np.float64:  # JAX may not have it; -0 + x is x
            return w + add(np.full(w.shape, -0.0, np.float32), left, np.dtype(np.float32))
        b = _pad(left, (_round_up(rows), rank), np.dtype(np.float32))
        x = _pad(w, (_round_up(rows), columns), w.dtype)
        with jax.set_mesh(alone):
            return np.asarray(_add(x, b, *rest, to))[: len(w)]

    return add


@functools.partial(jax.jit, static_argnums=5)
def _add(
    w: jax.Array, b: jax.Array, a: jax.Array, scale: jax.Array, zero: jax.Array, to: np.dtype
) -> jax.Array:
    change = (jnp.matmul(b, a, precision=lax.Precision.HIGHEST) * scale)[:, : w.shape[1]]
    # Through integers: otherwise XLA would fuse product and sum into one rounding.
    bits = lax.bitcast_convert_type(change, jnp.uint32) ^ zero
    wide = w.astype(jnp.float32)
    added = (wide + lax.bitcast_convert_type(bits, jnp.float32)).astype(to)
    # XLA flushes subnormal numbers to 0. They are kept where ΔW is 0.
    size = lax.bitcast_convert_type(wide, jnp.uint32) << 1
    is_kept = (size - 1 < 2**24 - 1) & (bits << 1 < 2**24)
    return jnp.where(is_kept, w.astype(to), added)


def _round_up(n: int) -> int:
    return -(-n // _SIDE) * _SIDE


def _pad(x: np.ndarray, shape: tuple[int, int], dtype: np.dtype) -> np.ndarray:
    """Converts an array to a dtype, and pads its rows and columns with zeros."""
    if x.shape == shape and x.dtype == dtype:
        return x
    new = np.zeros(shape, dtype)
    new[: x.shape[0], : x.shape[1]] = x
    return new


def _read(data: BinaryIO, dtype: np.dtype, shape: tuple[int, ...]) -> np.ndarray:
    """Reads the next numbers of a file."""
    count = int(np.prod(shape)) * dtype.itemsize
    return np.frombuffer(read_exactly(data, count), dtype).reshape(shape)
