"""Products with one matrix for each group of rows, and convolutions."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._axes import RANK, Axis, Factor, Unfactorable
from ._change import Delta
from ._interpret import Equation, rule
from ._product import Product, Roles
from ._weight import Weight


@rule("ragged_dot_general", is_move=False)
def _ragged_dot_general(eqn: Equation, x: Any, w: Any, group_sizes: jax.Array) -> jax.Array:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (x_contracted, contracted), batch = numbers.dot_dimension_numbers
    groups = tuple(numbers.rhs_group_dimensions)
    rows = tuple(numbers.lhs_ragged_dimensions)
    if isinstance(x, Weight) or len(w.shape) != 3 or (rows, tuple(x_contracted)) != ((0,), (1,)):
        raise Unfactorable("the groups are not rows of a matrix")
    if len(groups) != 1 or len(contracted) != 1 or tuple(batch) != ((), ()):
        raise Unfactorable("the weight is not one matrix a group")
    [outer] = {0, 1, 2} - {groups[0], contracted[0]}
    roles = Roles(*((w.axes[d],) for d in (groups[0], contracted[0], outer)))
    return _Ragged(eqn, w, x, roles, group_sizes).result()


@dataclasses.dataclass(frozen=True)
class _Ragged(Product):
    """Rows x, of which each group is multiplied with its own matrix of W."""

    group_sizes: jax.Array

    def base(self, x: jax.Array) -> jax.Array:
        return self.w.w.multiply(
            lambda w, x, sizes: self.eqn.bind(x, w, sizes), x, self.group_sizes
        )

    def low_rank(self, delta: Delta, x: jax.Array) -> jax.Array:
        p, q = self.factors(delta)
        [inner], [outer] = self.roles.inputs, self.roles.outputs
        if inner in q.axes or outer in p.axes:
            raise Unfactorable("its inputs and outputs are mixed")
        h = self._dot(delta.drop(x.astype(self.dtype)), p, inner, RANK)
        if delta.gate is not None:
            h = delta.gating(h, self._by_row(delta.gate, RANK))
        return self._dot(delta.scale * h, q, RANK, outer)

    def spread(self, gain: Factor, on_x: bool) -> jax.Array:
        [axis] = self.roles.inputs if on_x else self.roles.outputs
        return self._by_row(gain, axis)

    def _dot(self, x: jax.Array, f: Factor, *axes: Axis) -> jax.Array:
        value = f.expand_to((*self.roles.stack, *axes))
        value = jnp.broadcast_to(value, (len(self.group_sizes), *value.shape[1:]))
        how = {name: self.eqn.params[name] for name in ("precision", "group_offset")}
        return lax.ragged_dot(x, value, self.group_sizes, **how)

    def _by_row(self, f: Factor, axis: Axis) -> jax.Array:
        """Gives `f` along rows and `axis`."""
        [group] = self.roles.stack
        value = f.expand_to((group, axis))
        if group not in f.axes:
            return value
        return jnp.repeat(value, self.group_sizes, 0, total_repeat_length=len(self.x))


@rule("conv_general_dilated", is_move=False)
def _conv_general_dilated(eqn: Equation, x: Any, w: Any) -> jax.Array:
    if not isinstance(w, Weight) or isinstance(x, Weight):
        raise Unfactorable("the weight is not the kernel")
    outer, inner, *spatial = eqn.params["dimension_numbers"].rhs_spec
    inputs = tuple(w.axes[d] for d in (*sorted(spatial), inner))
    return _Convolution(eqn, w, x, Roles((), inputs, (w.axes[outer],))).result()


@dataclasses.dataclass(frozen=True)
class _Convolution(Product):
    """A convolution of x with the kernel W."""

    kind = "conv"

    def base(self, x: jax.Array) -> jax.Array:
        return self.w.w.multiply(lambda w, x: self.eqn.bind(x, w), x)

    def low_rank(self, delta: Delta, x: jax.Array) -> jax.Array:
        p, numbers, (axes, [outer]) = self.eqn.params, self._numbers, self.roles[1:]
        groups, batches = p["feature_group_count"], p["batch_group_count"]
        a, b = self.factors(delta)
        if outer in a.axes or set(axes) & set(b.axes):
            raise Unfactorable("its inputs and outputs are mixed")
        # A is a kernel with r outputs, the same for every group; B is a product over them.
        kernel = a.expand_to([RANK if axis == outer else axis for axis in self.w.axes])
        kernel = jnp.concatenate([kernel] * groups, numbers.rhs_spec[0])
        window = (p["window_strides"], p["padding"], p["lhs_dilation"], p["rhs_dilation"])
        how = {"precision": p["precision"]}
        x = delta.drop(x.astype(self.dtype))
        h = lax.conv_general_dilated(x, kernel, *window, numbers, groups, **how)
        order = (numbers.out_spec[0], *numbers.out_spec[2:], numbers.out_spec[1])
        h = h.transpose(order)  # (batch, *spatial, groups * r)
        h = h.reshape(*h.shape[:-1], groups, a.length(RANK))
        h = delta.scale * delta.apply_gate(h, [*[None] * (h.ndim - 1), RANK])
        b = b.expand_to((RANK, outer))
        rank, outputs = b.shape
        b = b.reshape(rank, batches, groups, outputs // (groups * batches))
        h = h.reshape(batches, h.shape[0] // batches, *h.shape[1:])
        y = jnp.einsum("bn...gr,rbgo->n...bgo", h, b, **how)
        return y.reshape(*y.shape[:-3], outputs).transpose(np.argsort(order))

    def spread(self, gain: Factor, on_x: bool) -> jax.Array:
        if on_x:
            axis, at = self.w.axes[self._numbers.rhs_spec[1]], self._numbers.lhs_spec[1]
        else:
            axis, at = self.w.axes[self._numbers.rhs_spec[0]], self._numbers.out_spec[1]
        if set(gain.axes) != {axis} or (on_x and self.eqn.params["feature_group_count"] > 1):
            raise Unfactorable("its gain differs within the window or between groups")
        return gain.expand_to([axis if d == at else None for d in range(self.x.ndim)])

    @property
    def _numbers(self) -> Any:
        return self.eqn.params["dimension_numbers"]
