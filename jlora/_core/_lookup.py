"""Rows of a weight that are looked up."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._axes import RANK, Axis, Factor, Unfactorable, map_factors
from ._change import Change, Delta, plus
from ._interpret import Equation, rule
from ._packed import Packed
from ._product import Product, Roles
from ._weight import Weight


@rule("gather", is_move=False)
def _gather(eqn: Equation, w: Any, indices: jax.Array) -> Any:
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    if not isinstance(w, Weight) or numbers.operand_batching_dims:
        raise Unfactorable("an index is a weight, or rows of several arrays are looked up")
    index_of = {w.axes[d]: i for i, d in enumerate(numbers.start_index_map)}
    may_fill = eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    fills = tuple(a for a in w.axes if may_fill and a in index_of)
    by_axis = dict(zip(w.axes, sizes, strict=True))
    collapsed = {w.axes[d] for d in numbers.collapsed_slice_dims}
    whole = {a for a, n in w.lengths.items() if by_axis[a] == n} - collapsed - {*fills}
    picked = tuple(a for a in w.axes if a not in whole)
    if any(by_axis[a] != 1 or a not in index_of for a in picked):
        raise Unfactorable("more than whole rows of the weight are looked up")
    names, kept = w.new_names(), iter(a for a in w.axes if a not in collapsed)
    leaf = frozenset().union(*(a.leaf for a in picked))
    axes, batch = [], []
    for i in range(len(w.axes) - len(collapsed) + indices.ndim - 1):
        if i not in numbers.offset_dims:  # an axis of the indices
            axes.append(Axis(next(names), leaf))
            batch.append(axes[-1])
        elif (axis := next(kept)) in whole:
            axes.append(axis)
        else:  # of length 1
            axes.append(Axis(next(names)))
    roles = Roles((), picked, tuple(a for a in w.axes if a in whole))
    last = {a: w.lengths[a] - by_axis[a] for a in index_of}
    w = w.replace(w.w, _fill(w, fills))
    found = _Lookup(eqn, w, indices, roles, index_of, last, fills, tuple(axes), tuple(batch))
    return found.weight() if found.is_weight else found.result()


def _fill(w: Weight, axes: tuple[Axis, ...]) -> Change:
    """The change with a gain along `axes`, in which rows may be filled: it is 1 on those."""
    if any(a not in d.a.axes + d.b.axes for d in w.change.deltas for a in axes):
        raise Unfactorable("rows may be filled along an axis that neither A nor B has")
    gain = w.change.gain
    if gain is not None:
        for axis in axes:
            gain = gain.repeated(axis, w.lengths[axis])
    return Change(w.change.deltas, gain)


@dataclasses.dataclass(frozen=True)
class _Lookup(Product):
    """Rows of W that an array x of indices picks.

    Attributes:
        eqn: the equation.
        w: the weight.
        x: the indices.
        roles: axes along which one place is picked, as inputs, and axes taken whole, as outputs.
        index_of: for each axis that is indexed, which of the indices that is.
        last: for each of these, in this order, the last index within bounds.
        fills: those of them along which an index may be out of bounds, so that the row is filled.
        axes: the axes of the result.
        batch: those of them that are axes of the indices.
    """

    eqn: Equation
    w: Weight
    x: jax.Array
    roles: Roles
    index_of: dict[Axis, int]
    last: dict[Axis, int]
    fills: tuple[Axis, ...]
    axes: tuple[Axis, ...]
    batch: tuple[Axis, ...]
    kind = "embed"

    def base(self, x: jax.Array) -> jax.Array:
        return self.weight().array

    def low_rank(self, delta: Delta, x: jax.Array) -> jax.Array:
        if any(axis in delta.a.axes and axis in delta.b.axes for axis in self.roles.inputs):
            raise Unfactorable("rows and stacked matrices are looked up at once")
        rows = map_factors(self.take, dataclasses.replace(delta, key=None))
        value = rows.materialized(self.axes, self.w.dtype)
        if delta.key is not None:
            # A row that is looked up is an input of A that is 1: dropout keeps it or not.
            keep = Factor(delta.drop(jnp.ones(x.shape[:-1], value.dtype)), self.batch)
            value = value * keep.arranged(self.axes)
        return self.detach_out_of_bounds(value)

    def spread(self, gain: Factor, on_x: bool) -> jax.Array:
        return self.detach_out_of_bounds(self.take(gain).arranged(self.axes))

    def add(self, y: jax.Array, term: jax.Array) -> jax.Array:
        return plus(y, term)  # rounded as rows of the merged W are

    @property
    def is_weight(self) -> bool:
        """Whether the result is a weight again: a row of a stack is a matrix, of a matrix none."""
        w, kept = self.w, {*self.roles.outputs}
        if not w.change.deltas:  # a gain is applied to the rows at once
            stays = w.origin.uses is not None or isinstance(w.w, Packed)
            return stays and w.change.gain is None and len(kept) >= 2
        stack = {axis for axis in self.roles.inputs if w.lengths[axis] > 1}
        each = [(set(d.a.axes), set(d.b.axes)) for d in w.change.deltas]
        return all(stack <= a & b and bool(kept & a) and bool(kept & b) for a, b in each)

    def weight(self) -> Weight:
        """The rows, with the rows of the change."""
        w, change = self.w, map_factors(self.take, self.w.change)
        found = w.w.divisible({a: w.lengths[a] for a in self.roles.inputs})
        if isinstance(found, Packed):
            rows = map_factors(self.take, found)
            rows = self._filled(rows) if self.fills else rows
            rows = rows.with_axes(self.axes, self.eqn.outputs[0].shape)
        else:
            rows = Factor(self.eqn.bind(found.array, self.x), self.axes)
        return w.replace(rows, change).mark_picked(self.roles.inputs).mark_varying()

    def detach_out_of_bounds(self, x: jax.Array) -> jax.Array:
        """`x`, a part of the result, with a gradient only where the indices are within bounds.

        So is the gradient of W, as JAX derives it, unless the mode clips the indices.
        """
        if self.eqn.params["mode"] == lax.GatherScatterMode.CLIP:
            return x
        return jnp.where(self._is_row().arranged(self.axes), x, lax.stop_gradient(x))

    def _is_row(self) -> Factor:
        """Whether the indices are within bounds."""
        i = self.x
        last = np.minimum(list(self.last.values()), jnp.iinfo(i.dtype).max).astype(i.dtype)
        within = (i >= 0) & (i <= np.expand_dims(last, tuple(range(i.ndim - 1))))
        return Factor(jnp.all(within, -1), self.batch)

    def _filled(self, rows: Packed) -> Packed:
        """Rows of a packed weight, filled where the indices are out of bounds."""
        fill = self.eqn.params["fill_value"]
        fill = jnp.nan if fill is None else fill

        def unpack(parts: tuple[Packed, Factor]) -> Factor:
            f = parts[0].factor()
            return f.each(lambda x: jnp.where(parts[1].arranged(f.axes), x, fill))

        return Packed((rows, self._is_row()), unpack, rows.axes, rows.shape, rows.dtype)

    def take(self, f: Factor) -> Factor:
        """The rows of a factor: 0 where those of W are filled, 1 for a gain."""
        picked = [a for a in self.roles.inputs if a in f.axes]
        if not picked:
            return f
        f = f.to_front(picked)
        value = f.value.at[tuple(self.x[..., self.index_of[a]] for a in picked)].get(
            mode=self.eqn.params["mode"],
            fill_value=0 if RANK in f.axes else 1,
            wrap_negative_indices=False,
        )
        return f.replace(value, (*self.batch, *f.axes[len(picked) :]))
