"""Products of groups of rows, each with its own matrix; a `vmap` along `ROWS` can map them."""

import functools
from collections.abc import Callable
from typing import NoReturn

import jax
import jax.numpy as jnp
from jax import lax

from . import _compat

ROWS = "rows of jlora.many.route"  # the axis that `route` maps over
Dot = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # of x, W and the sizes of groups


def multiply(dot: Dot, x: jax.Array, w: jax.Array, sizes: jax.Array, group: int = 0) -> jax.Array:
    """Computes `dot(x, w, sizes)`, also where `many.route` maps it over rows, as JAX cannot.

    `group` is the axis of groups of W.
    """
    row = _compat.mapped_index(ROWS)
    if row is None:
        return dot(x, w, sizes)
    # JAX differentiates this function, rather than its rule, only within the function of `route`.
    mapped = jax.custom_batching.custom_vmap(lambda *xs: _refuse_gradient(dot(*xs[:3])))

    @mapped.def_vmap
    def _(rows: int, batched: list[bool], *xs: jax.Array) -> tuple[jax.Array, bool]:
        x, w, sizes, _ = xs
        x = x if batched[0] else jnp.broadcast_to(x, (rows, *x.shape))
        sizes = sizes if batched[2] else jnp.broadcast_to(sizes, (rows, *sizes.shape))
        if batched[1]:
            return _own(dot, x, w, sizes, group), True
        # A `vmap` within the function of `route` leaves the rows to be mapped.
        of_all = dot if batched[3] else functools.partial(multiply, dot, group=group)
        return _shared(of_all, x, w, sizes), True

    return mapped(x, w, sizes, row)  # mapped with `row`, whatever else is


@jax.custom_jvp
def _refuse_gradient(y: jax.Array) -> jax.Array:
    return y


@_refuse_gradient.defjvp
def _refuse_gradient_jvp(*_: object) -> NoReturn:
    raise ValueError(
        "a derivative is taken inside of the function given to jlora.many.route, through a "
        "ragged_dot, which JAX cannot map over rows there. Differentiate the routed function "
        "instead, as in jax.grad(lambda table: jlora.many.route(loss)(base, table, ids, x).sum())."
    )


def _shared(dot: Dot, x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """Sorts the tokens of all rows by their groups, so that one product serves all rows."""
    ends = jnp.cumsum(sizes, 1, dtype=jnp.int32)
    tokens = jnp.arange(x.shape[1], dtype=jnp.int32)[None, :, None]
    order = jnp.argsort((tokens >= ends[:, None]).sum(2, dtype=jnp.int32).ravel())
    y = dot(x.reshape(-1, x.shape[2])[order], w, sizes.sum(0, dtype=sizes.dtype))
    return y[jnp.argsort(order)].reshape(*x.shape[:2], y.shape[1])


def _own(dot: Dot, x: jax.Array, w: jax.Array, sizes: jax.Array, group: int) -> jax.Array:
    """Multiplies each row with its own matrices; on TPUs the groups of all rows are one axis."""

    def join(x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
        w = jnp.moveaxis(w, group + 1, 1)
        w = jnp.pad(w, ((0, 0), (0, 1), (0, 0), (0, 0)))  # for what is in no group
        w = jnp.moveaxis(w.reshape(-1, *w.shape[2:]), 0, group)
        rest = x.shape[1] - sizes.sum(1, keepdims=True, dtype=sizes.dtype)
        sizes = jnp.concatenate([sizes, rest], 1).ravel()
        y = dot(x.reshape(-1, x.shape[2]), w, sizes)
        return y.reshape(*x.shape[:2], y.shape[1])

    return lax.platform_dependent(x, w, sizes, tpu=join, default=jax.vmap(dot))
