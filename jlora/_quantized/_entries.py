"""Quantizes a weight while it is read, in the host's memory."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from .._arrays import on_host, put, put_like
from ._encode import check_finite, quantize_weight
from ._leaf import Quantized, dequantize, is_quantized


def quantize_entries(
    like: Quantized, axis: int | None, read: Callable[[int], Any], argument: str, name: str
) -> Quantized:
    """Quantizes a weight entry by entry, and puts only its codes on the devices of `like`.

    Args:
        like: the quantized weight, or its shapes; its arrays may have shardings.
        axis: the axis of W's stack along which each entry has length 1; None for a single entry.
        read: returns an entry, an array or a quantized weight. Codes like those of `like` are kept;
            then the error is unknown.
        argument: the argument with the values, for errors.
        name: the path of the weight, for errors.
    """
    shape = tuple(1 if d == axis else n for d, n in enumerate(like.shape))
    entry = dataclasses.replace(like, form=like.form._replace(shape=shape))
    whole = like.map_arrays(lambda x, _: np.empty(x.shape, x.dtype))
    with on_host():
        for i in range(1 if axis is None else like.shape[axis]):
            part = _quantize(read(i), entry, argument, name)
            if whole.error is None or part.error is None:
                whole, part = (dataclasses.replace(x, error=None) for x in (whole, part))
            at: dict[int | None, slice] = {} if axis is None else {axis: slice(i, i + 1)}
            views = whole.map_arrays(
                lambda x, axes, at=at: x[*(at.get(d, slice(None)) for d in axes), ...]
            )
            for view, new in zip(jax.tree.leaves(views), jax.tree.leaves(part), strict=True):
                view[...] = new
    if whole.error is None:
        like = dataclasses.replace(like, error=None)
    return jax.tree.map(put_like, whole, like)


def _quantize(x: Any, like: Quantized, argument: str, name: str) -> Quantized:
    if is_quantized(x):
        if _kind(x) == _kind(like):
            return x
        x = dequantize(x, like.dtype)
    x = put(np.asarray(x).astype(like.dtype, copy=False))
    check_finite(x, argument, name, f"{type(like.scheme).__name__} has no codes for")
    return quantize_weight(x, like.scheme, like.form)


def _kind(x: Quantized) -> tuple[Any, ...]:
    """Returns what two weights share if their codes mean the same."""
    leaves, structure = jax.tree.flatten(dataclasses.replace(x, error=None, dtype=None))
    return structure, *(leaf.dtype for leaf in leaves)
