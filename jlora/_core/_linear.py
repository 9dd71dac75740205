"""A product of an activation with a changed weight: that with W, plus what the deltas add."""

import math
from collections.abc import Callable, Iterable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from ._axes import Axis, Factor, Unfactorable
from ._change import Delta, plus
from ._product import promote
from ._weight import Weight

OTHER = Axis(-2)  # of an activation, not of the weight
LEAST = 2.0**-60  # a gain


class Roles(NamedTuple):
    """The axes of W that a product batches, contracts and keeps."""

    stack: tuple[Axis, ...]
    inputs: tuple[Axis, ...]
    outputs: tuple[Axis, ...]


def product(
    w: Weight,
    kind: str,
    roles: Roles,
    activations: tuple[jax.Array, jax.Array],
    base: Callable[..., jax.Array],
    lowrank: Callable[[Delta, jax.Array], jax.Array],
    spread: Callable[[Factor, bool], jax.Array],
    *operands: jax.Array,
) -> jax.Array:
    """The product of an activation with the changed weight.

    Args:
        w: the weight.
        kind: as in `Product`.
        roles: of its axes.
        activations: the activation, and what the low-rank path sees of it.
        base: the product of W with the first, of `operands`.
        lowrank: the product of the second with a delta.
        spread: the gain along the axes of the activation, if it is said that it has those of the
            inputs, or else along the axes of the result.
        *operands: what the product is of besides.
    """
    gain, (x, z) = w.change.gain, activations
    of_inputs = gain is not None and bool(set(gain.axes) & set(roles.inputs))
    if gain is not None and of_inputs:
        if set(gain.axes) & set(roles.outputs):
            raise Unfactorable("its gain has axes of the inputs and of the outputs")
        x, z = (times(y, spread(gain, True)) for y in (x, z))
    out = plus_deltas(
        w.w.multiply(base, x, *operands), w, kind, roles, (lowrank(d, z) for d in w.change.deltas)
    )
    return out if gain is None or of_inputs else times(out, spread(gain, False))


def plus_deltas(
    out: jax.Array, w: Weight, kind: str, roles: Roles, products: Iterable[jax.Array]
) -> jax.Array:
    """`out`, the product with W, plus those with its deltas; of rows as the merged W has them."""
    if w.origin.uses is not None:
        w.origin.uses.product(w, kind, roles)
    for product in products:
        out = plus(out, product) if kind == "embed" else out + product.astype(out.dtype)
    return out


def times(x: jax.Array, gain: jax.Array) -> jax.Array:
    """`x` times `gain`, in the dtype of `x`.

    Of a dtype with the exponents of float32 the backward pass keeps the result, which the model
    most often keeps too, in the place of `x`. So a gain is not quite 0 there, but `LEAST`.
    """
    return _scaled(x, gain) if jnp.finfo(x.dtype).minexp < math.log2(LEAST) else _product(x, gain)


def _product(x: jax.Array, gain: jax.Array) -> jax.Array:
    wide = promote(x.dtype, gain.dtype)
    return (x.astype(wide) * gain.astype(wide)).astype(x.dtype)


@jax.custom_jvp
def _scaled(x: jax.Array, gain: jax.Array) -> jax.Array:
    return _product(x, _not_zero(gain))


def _not_zero(gain: jax.Array) -> jax.Array:
    least = jnp.asarray(LEAST, gain.dtype)
    return jnp.where(jnp.abs(gain) < least, least, gain)


@_scaled.defjvp
def _scaled_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (_, gain), (dx, dgain) = primals, tangents
    y, gain = _scaled(*primals), _not_zero(gain)
    # Without the barrier XLA would compute y again, from x, and keep both.
    of_gain = jax.checkpoint(_product, prevent_cse=True)(y, dgain / gain)
    return y, _product(dx, gain) + of_gain


def ordered(delta: Delta, w: Weight, roles: Roles, dtype: Any) -> tuple[Factor, Factor]:
    """A and B in `dtype` and the order of a product, also along axes that neither follows."""
    p, q = (f.replace(f.value.astype(dtype)) for f in delta.by_order(roles.inputs))
    for axis, length in zip(w.axes, w.shape, strict=True):
        if axis not in (*p.axes, *q.axes):
            p, q = (
                (p, q.repeated(axis, length))
                if axis in roles.outputs
                else (p.repeated(axis, length), q)
            )
    return p, q
