"""A matrix for each group of rows: `ragged_dot`, as experts have it; also under `many.route`."""

import dataclasses
import functools
from collections.abc import Callable
from typing import NoReturn

import jax
import jax.numpy as jnp
from jax import lax

from .. import _compat
from ._axes import RANK, Axis, Factor, Roles, Unfactorable
from ._change import Delta
from ._interpret import ROWS, Equation, primitive
from ._product import Product
from ._weight import Operand, Weight

Dot = Callable[[jax.Array, jax.Array, jax.Array], jax.Array]  # of x, W and the sizes of groups


@primitive("ragged_dot_general", is_move=False, for_rows=True)
def _ragged_dot_general(eqn: Equation, x: Operand, w: Operand, group_sizes: jax.Array) -> jax.Array:
    numbers = eqn.params["ragged_dot_dimension_numbers"]
    (x_contracted, contracted), batch = numbers.dot_dimension_numbers
    groups = tuple(numbers.rhs_group_dimensions)
    rows = tuple(numbers.lhs_ragged_dimensions)
    are_rows = (rows, tuple(x_contracted)) == ((0,), (1,))
    if not are_rows or isinstance(x, Weight) or len(w.shape) != 3:
        raise Unfactorable("the groups are not rows of a matrix")
    if len(groups) != 1 or len(contracted) != 1 or tuple(batch) != ((), ()):
        raise Unfactorable("the weight is not one matrix for each group")
    if not isinstance(w, Weight):
        return _multiply(eqn.bind, x, w, group_sizes, groups[0])
    [outer] = {0, 1, 2} - {groups[0], contracted[0]}
    roles = Roles(*((w.axes[d],) for d in (groups[0], contracted[0], outer)))
    try:
        return _Ragged(eqn, w, x, roles, group_sizes).result()
    except NotImplementedError as e:  # JAX's, within `vmap`
        raise NotImplementedError(
            f"the weight {' + '.join(w.origin.paths)!r} reaches {eqn.where}, which JAX cannot map: "
            f"{e}. Use jlora.many.route or jax.lax.map instead of jax.vmap; or multiply the "
            "experts by jnp.einsum, as models of transformers do with "
            'experts_implementation="batched_mm".'
        ) from e


@dataclasses.dataclass(frozen=True)
class _Ragged(Product):
    """A product of groups of rows x, each with its own matrix of W."""

    group_sizes: jax.Array

    def base(self, x: jax.Array) -> jax.Array:
        group = self.w.axes.index(self.roles.stack[0])
        dot = lambda w, x, sizes: _multiply(self.eqn.bind, x, w, sizes, group)  # noqa: E731
        return self.w.w.multiply(dot, x, self.group_sizes, in_turn=self.roles.stack[0])

    def low_rank(self, delta: Delta, x: jax.Array) -> jax.Array:
        x = delta.drop(x.astype(self.dtype))
        delta = self.ordered(delta)
        [inner], [outer] = self.roles.inputs, self.roles.outputs
        if inner in delta.b.axes or outer in delta.a.axes:
            raise Unfactorable("its inputs and outputs are mixed")
        h = self._dot(x, delta.a, inner, RANK)
        if delta.gate is not None:
            h = delta.gating(h, self._by_row(delta.gate, RANK))
        return self._dot(delta.scale * h, delta.b, RANK, outer)

    def spread(self, gain: Factor, on_x: bool) -> jax.Array:
        [axis] = self.roles.inputs if on_x else self.roles.outputs
        return self._by_row(gain, axis)

    def _dot(self, x: jax.Array, f: Factor, *axes: Axis) -> jax.Array:
        precision = self.eqn.params["precision"]
        if {*f.axes}.isdisjoint(self.roles.stack):  # all groups share it
            return jnp.matmul(x, f.expand_to(axes), precision=precision)
        value = f.expand_to((*self.roles.stack, *axes))
        how = {"precision": precision, "group_offset": self.eqn.params["group_offset"]}
        return _multiply(functools.partial(lax.ragged_dot, **how), x, value, self.group_sizes)

    def _by_row(self, f: Factor, axis: Axis) -> jax.Array:
        """Returns `f` along rows and `axis`."""
        [group] = self.roles.stack
        value = f.expand_to((group, axis))
        if group not in f.axes:
            return value
        return jnp.repeat(value, self.group_sizes, 0, total_repeat_length=len(self.x))


# --------------------------------------------------------------------------- rows of `many.route`


def _multiply(dot: Dot, x: jax.Array, w: jax.Array, sizes: jax.Array, group: int = 0) -> jax.Array:
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
            return _multiply_own(dot, x, w, sizes, group), True
        # A `vmap` within the function of `route` leaves the rows to be mapped.
        of_all = dot if batched[3] else functools.partial(_multiply, dot, group=group)
        return _multiply_shared(of_all, x, w, sizes), True

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


def _multiply_shared(dot: Dot, x: jax.Array, w: jax.Array, sizes: jax.Array) -> jax.Array:
    """Sorts the tokens of all rows by their groups, so that one product serves all rows."""
    ends = jnp.cumsum(sizes, 1, dtype=jnp.int32)
    tokens = jnp.arange(x.shape[1], dtype=jnp.int32)[None, :, None]
    order = jnp.argsort((tokens >= ends[:, None]).sum(2, dtype=jnp.int32).ravel())
    y = dot(x.reshape(-1, x.shape[2])[order], w, sizes.sum(0, dtype=sizes.dtype))
    return y[jnp.argsort(order)].reshape(*x.shape[:2], y.shape[1])


def _multiply_own(dot: Dot, x: jax.Array, w: jax.Array, sizes: jax.Array, group: int) -> jax.Array:
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
