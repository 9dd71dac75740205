"""A weight in the codes of a file, and the leaf that is made from it."""

import math
from collections.abc import Hashable, Sequence
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax.typing import DTypeLike

from ..._arrays import put
from ..._quantized import (
    FP4,
    FP8,
    NF4,
    Form,
    Int4,
    Int8,
    Nested,
    Quantized,
    Scheme,
    dequantize,
    spell,
)
from ..names._kinds import EMBEDDING
from ..names._leaves import NamedLeaf
from ..names._names import Name
from ..names._torch_layout import take_part

# The largest magnitude that a code may stand for, times its scale.
_LARGEST = {NF4: 1, FP4: 1, Int4: 16, Int8: 128, FP8: 448}


class Codes(NamedTuple):
    """A parameter in codes.

    Attributes:
        scheme: the scheme.
        codes: a code for each entry, (…, rows, columns), in PyTorch's order.
        scale: a number for each block, (…, blocks of rows, blocks of columns) or their product.
        zero: the number that the scheme adds or subtracts in each block, or None.
        nested: if the scales are codes too, their own scale and offset; otherwise None.
        dtype: the dtype of the weight; None for that of the leaf.
    """

    scheme: Scheme
    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None = None
    nested: tuple[np.ndarray, np.ndarray] | None = None
    dtype: DTypeLike | None = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.codes.shape

    @property
    def spelling(self) -> str:
        """The scheme in words."""
        return spell(self.scheme)

    @property
    def nbytes(self) -> int:
        """The bytes of codes and scales."""
        parts = [x for x in (self.scale, self.zero, *(self.nested or ())) if x is not None]
        return self.codes.size * self.scheme.bits // 8 + sum(x.nbytes for x in parts)

    def array(self, dtype: DTypeLike) -> jax.Array:
        """Computes the values, (…, rows, columns)."""
        *lead, i, j = range(self.codes.ndim)
        form = self.scheme.form(self.codes.shape, tuple(lead), (i, j), 1)
        return dequantize(_quantize(self, form, dtype))

    @property
    def bound(self) -> float:
        """A bound for the magnitudes of the values with any codes; NaN if an FP8 code is NaN."""
        if self.codes.dtype.kind not in "iu" and _has_nan(self.codes):
            return math.nan
        if self.scale.dtype == np.uint8 and self.nested is None:  # powers of 2
            return 6 * 2.0 ** (float(self.scale.max(initial=0)) - 127)
        zero = np.zeros(()) if self.zero is None or self.zero.dtype.kind in "iu" else self.zero
        scale, added = map(_largest, self.nested or (self.scale, zero))
        largest = scale * _LARGEST[type(self.scheme)] + added
        if type(self.scheme) is not Int8 or self.scheme.block is not None:
            return largest
        # Codes times scale are divided by 127; before that they must fit into float32.
        return largest / 127 if largest <= float(np.finfo(np.float32).max) else math.inf


class Dense(NamedTuple):
    """A dequantized parameter, whose codes no scheme of jlora has.

    Attributes:
        values: its values in float32.
        spelling: the scheme of its codes, in words.
        bits: the bits of each entry in the file.
    """

    values: np.ndarray
    spelling: str
    bits: int

    dtype = None

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of the weight."""
        return self.values.shape

    @property
    def nbytes(self) -> int:
        """The bytes of the codes."""
        return self.values.size * self.bits // 8

    def array(self, dtype: DTypeLike) -> jax.Array:
        """Computes the values, (…, rows, columns)."""
        return put(self.values).astype(dtype)

    @property
    def bound(self) -> float:
        """The largest magnitude of the values; NaN if a value is NaN."""
        return _largest(self.values)


def take_part_of_codes(x: Codes | Dense, name: Name) -> Codes | Dense:
    """Takes the part of a parameter that a row names."""
    if name.part is None:
        return x
    if isinstance(x, Dense):
        return x._replace(values=take_part(x.values, name, -2))
    if x.nested is None and x.scale.shape[:-1] == x.shape[:-1]:
        return x._make(take_part(y, name, -2) if isinstance(y, np.ndarray) else y for y in x)
    values = take_part(np.asarray(x.array(np.float32)), name, -2)
    return Dense(values, x.spelling, x.scheme.bits)


def _largest(x: np.ndarray) -> float:
    return float(np.abs(x).max(initial=0))


def _has_nan(codes: np.ndarray) -> bool:
    """Whether 8-bit floats include NaN; comparing codes is faster than converting them."""
    every = np.arange(256, dtype=np.uint8)
    nan = every[np.isnan(every.view(codes.dtype).astype(np.float32))]
    return any((codes.view(np.uint8) == x).any() for x in nan)


def make_leaf(leaf: NamedLeaf, modules: Sequence[Codes | Dense]) -> jax.Array | Quantized:
    """Makes a leaf from its modules.

    It is quantized if its axes can be split into the blocks of the file, and otherwise dequantized.
    """
    name = leaf.name
    dtype = modules[0].dtype or leaf.value.dtype
    first, last = name.where("o"), name.where("i")
    if leaf.kind is EMBEDDING:
        first, last = name.where("v"), name.where("o")
    order = (*first, *last)
    stack = (*name.where("ls"), *name.where("e"))  # experts are within modules
    coded = [m for m in modules if isinstance(m, Codes)]
    if len(coded) == len(modules) and len(set(map(_signature, coded))) == 1:
        form = _cut(coded[0].scheme, leaf.shape, tuple(sorted(stack)), order, len(last))
        if form is not None:
            lengths = [leaf.shape[d] for d in stack]
            axes = [*map(int, np.argsort(stack)), len(stack)]
            join = lambda *xs: np.stack(xs).reshape(*lengths, -1).transpose(axes)  # noqa: E731
            stacked = jax.tree.map(join, *(m[1:5] for m in coded))
            return _quantize(Codes(coded[0].scheme, *stacked), form, dtype)
    x = jnp.stack([m.array(dtype) for m in modules]).reshape(
        [leaf.shape[d] for d in (*stack, *order)]
    )
    return jnp.transpose(x, [int(d) for d in np.argsort((*stack, *order))])


def _signature(m: Codes) -> tuple[Hashable, ...]:
    """Returns the properties that all modules of a quantized leaf must share."""
    arrays, tree = jax.tree.flatten((m.scale, m.zero, m.nested))
    return m.scheme, tree, *((x.shape, x.dtype) for x in arrays)


def _cut(
    scheme: Scheme,
    shape: tuple[int, ...],
    stack: tuple[int, ...],
    order: tuple[int, ...],
    inputs: int,
) -> Form | None:
    """Splits a leaf into the blocks of its file; None if the axes do not allow it."""
    try:
        form = scheme.form(shape, stack, order, inputs)
    except ValueError:
        return None
    if form.flat:
        return form
    # If several axes are rows or columns, a block must not cross the outer ones.
    for dims in (order[:-inputs], order[-inputs:]):
        *outer, last = [d for d in dims if shape[d] > 1] or dims[-1:]
        if any(form.blocks[d] not in (1, shape[d]) for d in outer):
            return None
        torn = form.blocks[last] > 1 and shape[last] % form.blocks[last]
        if outer and torn:
            return None
    return form


def _quantize(m: Codes, form: Form, dtype: DTypeLike) -> Quantized:
    inner = form.of_codes
    axes = (*inner.stack, *inner.order)
    block = inner.blocks[inner.axis]

    def arrange(x: np.ndarray, lengths: Sequence[int]) -> np.ndarray:
        """Reorders numbers of a file to the axes of the codes, of the given lengths."""
        return np.transpose(x.reshape([lengths[d] for d in axes]), np.argsort(axes))

    data = arrange(m.codes, inner.shape)
    if form.flat:
        data = np.pad(data, [(0, 0)] * (data.ndim - 1) + [(0, -data.shape[-1] % block)])
    if m.scheme.bits == 4:
        data = _pack(data, inner.axis, block)
    counts = [-(-n // block) for n, block in zip(inner.shape, inner.blocks, strict=True)]
    whole = tuple(d for d in inner.order if inner.is_whole(d))
    scale, zero = (
        None if x is None else put(np.squeeze(arrange(x, counts), whole)) for x in (m.scale, m.zero)
    )
    nested = None
    if m.nested is not None:
        lead = [form.shape[d] for d in form.stack]
        scales, offset = map(put, m.nested)
        nested = Nested(scales.reshape(*lead, scales.shape[-1]), offset.reshape(lead))
    return Quantized(put(data), scale, zero, nested, None, m.scheme, form, jnp.dtype(dtype))


def _pack(codes: np.ndarray, axis: int, block: int) -> np.ndarray:
    """Packs two codes into each byte, in the order of `Quantized.data`."""
    before, n, after = codes.shape[:axis], codes.shape[axis], codes.shape[axis + 1 :]
    halves = codes.reshape(*before, n // block, 2, block // 2, *after)
    first, second = (np.take(halves, i, axis + 1) for i in (0, 1))
    return (first << 4 | second).reshape(*before, n // 2, *after)
