"""Quantizes a weight: from its values to codes and scales."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._linalg import norm
from ._dynamic import quantize_scales
from ._form import Form, joined, pack, split
from ._leaf import Nested, Quantized
from ._scheme import Scheme


@functools.partial(jax.jit, static_argnums=(1, 2))
def quantize_weight(w: jax.Array, scheme: Scheme, form: Form) -> Quantized:
    """Quantizes a weight, and measures the error of each of its matrices."""
    wide = w.astype(jnp.float32)
    x, blocks, axis = wide, form.blocks, form.axis
    if form.flat:
        lead = [form.shape[d] for d in form.stack]
        x = lax.transpose(wide, (*form.stack, *form.order)).reshape(*lead, math.prod(form.matrix))
        blocks, axis = (*[1] * len(lead), form.blocks[form.axis]), len(lead)
    cut, within = split(x, blocks)
    code = scheme.encode(cut, within, _is_padded(x.shape, blocks, cut.shape, axis))
    if scheme.bits == 4:
        counts = zip(cut.shape[::2], blocks, strict=True)
        bytes_of = [c * b // (2 if d == axis else 1) for d, (c, b) in enumerate(counts)]
        data = joined(pack(code.codes, axis), bytes_of)
    else:
        data = joined(code.codes, x.shape)
    kept = form.scaled if not form.flat else range(x.ndim)
    lost = [*within, *(2 * d for d in range(x.ndim) if d not in kept)]
    scale: Any = lax.squeeze(code.scale, lost)
    zero = None if code.zero is None else lax.squeeze(code.zero, lost)
    nested = None
    if getattr(scheme, "double", False):
        scale, nested = _nested(scale, form)
    scheme = dataclasses.replace(scheme, pattern=None)
    leaf = Quantized(data, scale, zero, nested, None, scheme, form, w.dtype)
    size = norm(wide, form.order)
    difference = norm(leaf.array(jnp.float32) - wide, form.order)
    error = jnp.where(size > 0, difference / jnp.where(size > 0, size, 1), 0)
    return dataclasses.replace(leaf, error=error)


def _is_padded(
    shape: Sequence[int], blocks: Sequence[int], cut: Sequence[int], axis: int
) -> jax.Array | None:
    """Marks the last block along `axis` if it is not full, for arrays of shape `cut`."""
    if shape[axis] % blocks[axis] == 0:
        return None
    place = lax.broadcasted_iota(
        jnp.int32, [1 if i % 2 else n for i, n in enumerate(cut)], 2 * axis
    )
    return place == cut[2 * axis] - 1


def _nested(scale: jax.Array, form: Form) -> tuple[jax.Array, Nested]:
    """Returns scales as codes of 8 bits, and the scales of these."""
    at = [d for d in form.scaled if d is not None]
    order = [*form.stack, *(d for d in form.order if d in at)] if not form.flat else at
    x = lax.transpose(scale, [at.index(d) for d in order]) if not form.flat else scale
    lead = x.shape[: len(form.stack)]
    codes, of_groups, offset = quantize_scales(x.reshape(*lead, math.prod(x.shape[len(lead) :])))
    codes = codes.reshape(x.shape)
    if not form.flat:
        codes = lax.transpose(codes, [order.index(d) for d in at])
    return codes, Nested(of_groups, offset)
