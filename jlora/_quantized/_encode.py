"""Quantizes a weight: from its values to codes and scales."""

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from .._arrays import automatically, back, count_not_finite, explicit, follow, to_device
from .._errors import InputError
from .._linalg import norm
from ._dynamic import quantize_scales
from ._leaf import BaseLeaf, Nested, Quantized
from ._scheme import Form, Scheme, divisor, join, pack, split


def check_finite(w: BaseLeaf, argument: str, name: str, which: str) -> None:
    """Raises if a weight, which is `name` in `argument`, has values that are not finite."""
    if bad := count_not_finite(w):
        why = f"has {bad} values that are NaN or infinite at {name!r}, which {which}."
        raise InputError(argument, f"{why} Use a checkpoint whose values are finite.")


def quantize_weight(w: jax.Array, scheme: Scheme, form: Form) -> Quantized:
    """Quantizes a weight, and measures the error of each of its matrices.

    Along explicit mesh axes, codes and scales are sharded like W.
    """
    own = to_device(w)
    if (known := explicit(w)) is None:
        return back(_encode(own, scheme, form), w)
    encode = functools.partial(_encode, scheme=scheme, form=form)
    shapes = jax.eval_shape(encode, jax.ShapeDtypeStruct(w.shape, w.dtype))
    places = shapes.map_arrays(functools.partial(follow, known))
    return back(automatically(encode, places)(own), w)


@functools.partial(jax.jit, static_argnames=("scheme", "form"))
def _encode(w: jax.Array, scheme: Scheme, form: Form) -> Quantized:
    x = w.astype(jnp.float32)
    inner = form.of_codes
    if form.flat:
        x = lax.transpose(x, (*form.stack, *form.order)).reshape(inner.shape)
    cut, within = split(x, inner.blocks)
    code = scheme.encode(cut, within, _is_padded(inner, cut.shape))
    if scheme.bits == 4:
        data = join(pack(code.codes, inner.axis))
    else:
        data = lax.slice(join(code.codes), [0] * x.ndim, x.shape)
    lost = [*within, *(2 * d for d in range(x.ndim) if inner.is_whole(d))]
    scale: Any = lax.squeeze(code.scale, lost)
    zero = None if code.zero is None else lax.squeeze(code.zero, lost)
    nested = None
    if getattr(scheme, "double", False):
        scale, nested = _nested(scale, inner)
    leaf = Quantized(data, scale, zero, nested, None, scheme, form, w.dtype)
    wide = w.astype(jnp.float32)
    size = norm(wide, form.order)
    difference = norm(leaf.array(jnp.float32) - wide, form.order)
    return dataclasses.replace(leaf, error=difference / divisor(size))


def _is_padded(form: Form, cut: Sequence[int]) -> jax.Array | None:
    """Marks the last block of codes for arrays of shape `cut`; None if it is full."""
    axis = form.axis
    if form.shape[axis] % form.blocks[axis] == 0:
        return None
    shape = [1 if i % 2 else n for i, n in enumerate(cut)]
    return lax.broadcasted_iota(jnp.int32, shape, 2 * axis) == cut[2 * axis] - 1


def _nested(scale: jax.Array, form: Form) -> tuple[jax.Array, Nested]:
    """Returns scales as codes of 8 bits, and the scales of these codes."""
    at = [d for d in range(len(form.shape)) if not form.is_whole(d)]
    order = [*form.stack, *(d for d in form.order if d in at)]
    x = lax.transpose(scale, [at.index(d) for d in order])
    lead = x.shape[: len(form.stack)]
    codes, of_groups, offset = quantize_scales(x.reshape(*lead, math.prod(x.shape[len(lead) :])))
    codes = lax.transpose(codes.reshape(x.shape), [order.index(d) for d in at])
    return codes, Nested(of_groups, offset)
