"""A weight as a file has it, in codes, and the leaf that is made of it."""

import math
from collections.abc import Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from ..._quantized import FP4, FP8, NF4, Form, Int4, Int8, Nested, Quantized, Scheme
from ..names._leaves import Leaf
from ._tensors import Unreadable


class Stored(NamedTuple):
    """One parameter in codes.

    Attributes:
        scheme: the scheme.
        codes: a code for each entry, (…, rows, columns), in PyTorch's order.
        scale: of each block, (…, blocks of rows, blocks of columns) or their product.
        zero: what a scheme has of each block besides, or None.
        nested: of which the scales are computed, or None.
        dtype: of the weight; None for that of the leaf it is read for.
    """

    scheme: Any
    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray | None = None
    nested: tuple[Any, Any] | None = None
    dtype: Any = None


class Dense(NamedTuple):
    """One parameter that no scheme has, dequantized.

    Attributes:
        values: its values in float32.
        what: what it was, in words.
        bits: how many an entry had.
        dtype: of the weight; None for that of the leaf it is read for.
    """

    values: np.ndarray
    what: str
    bits: int
    dtype: Any = None


# The largest magnitude that a code may stand for, times its scale.
_LARGEST = {NF4: 1, FP4: 1, Int4: 16, Int8: 128, FP8: 448}


def check_finite(m: Stored | Dense, name: str, dtype: Any) -> None:
    """`Unreadable` if a value of `dtype` may not be finite."""
    if isinstance(m, Dense):
        with np.errstate(over="ignore"):
            if not np.isfinite(m.values.astype(dtype).astype(np.float32)).all():
                raise Unreadable(f"{name}: has values that are not finite in {dtype}")
        return
    if m.codes.dtype.kind not in "iu" and _has_nan(m.codes):
        raise Unreadable(f"{name}: has values that are NaN")
    limit = float(jnp.finfo(dtype).max)
    if m.scale.dtype == np.uint8 and m.nested is None:  # powers of 2
        largest = 6 * 2.0 ** (float(m.scale.max(initial=0)) - 127)
    else:
        parts = m.nested or (m.scale, m.zero if m.zero is not None else np.zeros(()))
        scale, added = (float(np.abs(x.astype(np.float64)).max(initial=0)) for x in parts)
        by_row = type(m.scheme) is Int8 and m.scheme.block is None
        added = 0.0 if m.zero is not None and m.zero.dtype.kind in "iu" else added
        largest = scale * (1 if by_row else _LARGEST[type(m.scheme)]) + added
    if not largest <= limit:
        raise Unreadable(f"{name}: has scales beyond what {jnp.dtype(dtype)} holds")


def _has_nan(codes: np.ndarray) -> bool:
    """Whether floats of 8 bits have one, by a table, as converting takes long."""
    every = np.arange(256, dtype=np.uint8)
    return bool(np.isnan(every.view(codes.dtype).astype(np.float32))[codes.view(np.uint8)].any())


def leaf_of(leaf: Leaf, modules: Sequence[Stored | Dense]) -> Any:
    """The leaf of which `modules` are the stack.

    Quantized if its axes can be cut into the blocks of the file; else dequantized, exactly.
    """
    name, dtype = leaf.name, modules[0].dtype or leaf.value.dtype
    stack, first, last = name.where("les"), name.where("o"), name.where("i")
    if name.kind == "embedding":
        first, last = name.where("v"), name.where("o")
    order, coded = (*first, *last), [m for m in modules if isinstance(m, Stored)]
    alike = len(coded) == len(modules) and all(_form_of(m) == _form_of(coded[0]) for m in coded)
    form = _form(coded[0].scheme, leaf.shape, stack, order, len(last)) if alike else None
    if form is not None:
        return _quantized(_joined(coded), form, dtype)
    x = jnp.stack([array_of(m, dtype) for m in modules]).reshape(
        [leaf.shape[d] for d in (*stack, *order)]
    )
    return jnp.transpose(x, [int(d) for d in np.argsort((*stack, *order))])


def array_of(m: Stored | Dense, dtype: Any) -> jax.Array:
    """The values, (…, rows, columns)."""
    if isinstance(m, Dense):
        return jnp.asarray(m.values).astype(dtype)
    *lead, i, j = range(m.codes.ndim)
    return _quantized(m, m.scheme.form(m.codes.shape, tuple(lead), (i, j), 1), dtype).array()


def _form_of(m: Stored) -> Any:
    return m.scheme, jax.tree.map(lambda x: (x.shape, x.dtype), (m.scale, m.zero, m.nested))


def _form(
    scheme: Scheme,
    shape: tuple[int, ...],
    stack: tuple[int, ...],
    order: tuple[int, ...],
    inputs: int,
) -> Form | None:
    """How a leaf is cut as the rows and columns of its file are; None if it cannot be."""
    try:
        form = scheme.form(shape, stack, order, inputs)
    except ValueError:
        return None
    if form.flat:
        return form
    # Where several axes are rows or columns, a block must not run from one to the next.
    for dims in (order[:-inputs], order[-inputs:]):
        *outer, last = [d for d in dims if shape[d] > 1] or dims[-1:]
        if any(form.blocks[d] not in (1, shape[d]) for d in outer):
            return None
        torn = form.blocks[last] > 1 and shape[last] % form.blocks[last]
        if outer and torn:
            return None
    return form


def _joined(modules: Sequence[Stored]) -> Stored:
    """All modules as one, with their stack in front."""
    first = modules[0]
    codes, scale, zero, nested = (
        jax.tree.map(lambda *xs: np.stack(xs), *(m[i] for m in modules)) for i in (1, 2, 3, 4)
    )
    return Stored(first.scheme, codes, scale, zero, nested, first.dtype)


def _quantized(m: Stored, form: Form, dtype: Any) -> Quantized:
    data = _laid(m.codes, form)
    if form.flat:
        n, block = data.shape[-1], form.blocks[form.axis]
        data = np.pad(data, [(0, 0)] * (data.ndim - 1) + [(0, -n % block)])
    if m.scheme.bits == 4:
        data = _pack(data, data.ndim - 1 if form.flat else form.axis, form.blocks[form.axis])
    scale, zero = (None if x is None else jnp.asarray(_scales(x, form)) for x in (m.scale, m.zero))
    nested = None
    if m.nested is not None:
        lead = [form.shape[d] for d in form.stack]
        nested = Nested(
            *(
                jnp.asarray(x).reshape(*lead, *x.shape[x.ndim - n :])
                for x, n in zip(m.nested, (1, 0), strict=True)
            )
        )
    return Quantized(jnp.asarray(data), scale, zero, nested, None, m.scheme, form, jnp.dtype(dtype))


def _laid(x: np.ndarray, form: Form) -> np.ndarray:
    """Entries in the order of the file, as a leaf has them."""
    lead = [form.shape[d] for d in form.stack]
    if form.flat:
        return x.reshape(*lead, math.prod(form.matrix))
    axes = (*form.stack, *form.order)
    return np.transpose(x.reshape([form.shape[d] for d in axes]), np.argsort(axes))


def _scales(x: np.ndarray, form: Form) -> np.ndarray:
    """Scales in the order of the file, as a leaf has them."""
    lead = [form.shape[d] for d in form.stack]
    if form.flat:
        return x.reshape(*lead, -1)
    counts = {d: -(-form.shape[d] // form.blocks[d]) for d in form.order}
    axes = (*form.stack, *form.order)
    x = np.transpose(x.reshape(*lead, *(counts[d] for d in form.order)), np.argsort(axes))
    return np.squeeze(x, tuple(d for d in form.order if form.is_whole(d)))


def _pack(codes: np.ndarray, axis: int, block: int) -> np.ndarray:
    """Two a byte, as `Quantized.data` has them."""
    before, n, after = codes.shape[:axis], codes.shape[axis], codes.shape[axis + 1 :]
    halves = codes.reshape(*before, n // block, 2, block // 2, *after)
    first, second = (np.take(halves, i, axis + 1) for i in (0, 1))
    return (first << 4 | second).reshape(*before, n // 2, *after)


def codes_of(leaf: Quantized) -> np.ndarray:
    """The codes in the order of the file, (stack…, rows, columns): the inverse of `_quantized`."""
    form, data = leaf.form, np.asarray(leaf.data)
    if leaf.scheme.bits == 4:
        axis = data.ndim - 1 if form.flat else form.axis
        block = form.blocks[form.axis]
        before, n, after = data.shape[:axis], data.shape[axis], data.shape[axis + 1 :]
        halves = data.reshape(*before, 2 * n // block, 1, block // 2, *after)
        data = np.concatenate([halves >> 4, halves & 15], axis + 1).reshape(*before, 2 * n, *after)
    return _filed(data, form, form.coded)[..., : math.prod(form.matrix)]


def scales_of(leaf: Quantized) -> np.ndarray:
    """The scales in the order of the file, (stack…, blocks)."""
    return _filed(np.asarray(leaf.scale), leaf.form, leaf.form.scaled)


def _filed(x: np.ndarray, form: Form, dims: Sequence[int | None]) -> np.ndarray:
    lead = [form.shape[d] for d in form.stack]
    if not form.flat:
        axes = [d for d in (*form.stack, *form.order) if d in dims]
        x = np.transpose(x, [list(dims).index(d) for d in axes])
    return x.reshape(*lead, -1)
