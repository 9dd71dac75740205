"""A matrix for each group of rows: `ragged_dot`, as experts have it; also under `many.route`."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
from jax import lax

from .._grouped import multiply
from ._axes import RANK, Axis, Factor, ProductAxes, Unfactorable
from ._change import Delta
from ._interpret import Equation, primitive
from ._product import Product
from ._weight import Operand, Weight


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
        return multiply(eqn.bind, x, w, group_sizes, groups[0])
    [outer] = {0, 1, 2} - {groups[0], contracted[0]}
    roles = ProductAxes(*((w.axes[d],) for d in (groups[0], contracted[0], outer)))
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
        dot = lambda w, x, sizes: multiply(self.eqn.bind, x, w, sizes, group)  # noqa: E731
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
        return multiply(functools.partial(lax.ragged_dot, **how), x, value, self.group_sizes)

    def _by_row(self, f: Factor, axis: Axis) -> jax.Array:
        """Returns `f` along rows and `axis`."""
        [group] = self.roles.stack
        value = f.expand_to((group, axis))
        if group not in f.axes:
            return value
        return jnp.repeat(value, self.group_sizes, 0, total_repeat_length=len(self.x))
