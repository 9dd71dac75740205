"""Products with one matrix a group of rows, and convolutions."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._axes import RANK, Axis, Factor, Unfactorable
from ._change import Delta
from ._interpret import Equation, rule
from ._linear import OTHER, Roles, ordered, product
from ._product import promote
from ._weight import Weight


@rule("ragged_dot_general", multiplies=True)
def _ragged_dot_general(eqn: Equation, x: Any, w: Any, group_sizes: jax.Array) -> jax.Array:
    p = eqn.params
    numbers = p["ragged_dot_dimension_numbers"]
    (x_contracted, contracted), batch = numbers.dot_dimension_numbers
    groups = tuple(numbers.rhs_group_dimensions)
    rows = tuple(numbers.lhs_ragged_dimensions)
    if isinstance(x, Weight) or len(w.shape) != 3 or (rows, tuple(x_contracted)) != ((0,), (1,)):
        raise Unfactorable("the groups are not rows of a matrix")
    if len(groups) != 1 or len(contracted) != 1 or tuple(batch) != ((), ()):
        raise Unfactorable("the weight is not one matrix a group")
    [outer] = {0, 1, 2} - {groups[0], contracted[0]}
    group, inner, outer = (w.axes[d] for d in (groups[0], contracted[0], outer))
    roles = Roles((group,), (inner,), (outer,))
    dtype = promote(x.dtype, w.dtype)

    def ragged(z: jax.Array, f: Factor, *axes: Axis) -> jax.Array:
        value = f.arranged((group, *axes))
        value = jnp.broadcast_to(value, (len(group_sizes), *value.shape[1:]))
        how = {"precision": p["precision"], "group_offset": p["group_offset"]}
        return lax.ragged_dot(z, value, group_sizes, **how)

    def lowrank(delta: Delta, z: jax.Array) -> jax.Array:
        first, second = ordered(delta, w, roles, dtype)
        if inner in second.axes or outer in first.axes:
            raise Unfactorable("its inputs and outputs are mixed")
        h = ragged(delta.drop(z.astype(dtype)), first, inner, RANK)
        if delta.gate is not None:
            h = delta.gating(h, by_row(delta.gate, RANK))
        return ragged(delta.scale * h, second, RANK, outer)

    def by_row(f: Factor, rest: Axis) -> jax.Array:
        if group not in f.axes:
            return f.arranged((OTHER, rest))
        return jnp.repeat(f.arranged((group, rest)), group_sizes, 0, total_repeat_length=len(x))

    def spread(gain: Factor, of_inputs: bool) -> jax.Array:
        return by_row(gain, inner if of_inputs else outer)

    def base(value: jax.Array, z: jax.Array, group_sizes: jax.Array) -> jax.Array:
        return eqn.bind(z, value, group_sizes)

    z = (x, eqn.low_rank_operand(0))
    return product(w, "dense", roles, z, base, lowrank, spread, group_sizes)


@rule("conv_general_dilated", multiplies=True)
def _conv_general_dilated(eqn: Equation, x: Any, w: Any) -> jax.Array:
    p, numbers = eqn.params, eqn.params["dimension_numbers"]
    if not isinstance(w, Weight) or isinstance(x, Weight):
        raise Unfactorable("the weight is not the kernel")
    out_dim, in_dim, *spatial = numbers.rhs_spec
    groups, batches = p["feature_group_count"], p["batch_group_count"]
    out_axis, inputs = w.axes[out_dim], tuple(w.axes[d] for d in (*sorted(spatial), in_dim))
    roles = Roles((), inputs, (out_axis,))
    dtype, how = promote(x.dtype, w.dtype), {"precision": p["precision"]}
    order = (numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1])

    def lowrank(delta: Delta, z: jax.Array) -> jax.Array:
        a, b = ordered(delta, w, roles, dtype)
        if out_axis in a.axes or set(inputs) & set(b.axes):
            raise Unfactorable("its inputs and outputs are mixed")
        # A is a kernel with r outputs, the same for every group; B is a product over them.
        kernel = a.arranged([RANK if axis == out_axis else axis for axis in w.axes])
        kernel = jnp.concatenate([kernel] * groups, out_dim)
        window = (p["window_strides"], p["padding"], p["lhs_dilation"], p["rhs_dilation"])
        z = delta.drop(z.astype(dtype))
        h = lax.conv_general_dilated(z, kernel, *window, numbers, groups, **how)
        h = h.transpose(order)  # (batch, *spatial, groups * r)
        h = h.reshape(*h.shape[:-1], groups, a.length(RANK))
        h = delta.scale * delta.gated(h, [*[OTHER] * (h.ndim - 1), RANK])
        b = b.arranged((RANK, out_axis))
        rank, outputs = b.shape
        b = b.reshape(rank, batches, groups, outputs // (groups * batches))
        h = h.reshape(batches, h.shape[0] // batches, *h.shape[1:])
        y = jnp.einsum("bn...gr,rbgo->n...bgo", h, b, **how)
        return y.reshape(*y.shape[:-3], outputs).transpose(np.argsort(order))

    def spread(gain: Factor, of_inputs: bool) -> jax.Array:
        if of_inputs:
            axis, at = w.axes[in_dim], numbers.lhs_spec[1]
        else:
            axis, at = out_axis, numbers.out_spec[1]
        if set(gain.axes) != {axis} or (of_inputs and groups > 1):
            raise Unfactorable("its gain differs within the window or between groups")
        return gain.arranged([axis if d == at else OTHER for d in range(x.ndim)])

    def base(value: jax.Array, z: jax.Array) -> jax.Array:
        return eqn.bind(z, value)

    return product(w, "conv", roles, (x, eqn.low_rank_operand(0)), base, lowrank, spread)
