"""Rows of a weight that are looked up."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._axes import RANK, Axis, Factor, Unfactorable
from ._change import Change, Delta
from ._interpret import Equation, rule
from ._linear import Roles, plus_deltas, times
from ._packed import Packed
from ._weight import Weight


@rule("gather", multiplies=True)
def _gather(eqn: Equation, w: Any, indices: jax.Array) -> Any:
    found = _Lookup(eqn, w, indices)
    rows = found.filled(w).map(found.rows)
    moved = w.replace(found.value(w), rows).mark_picked(found.picked)
    if found.is_weight(w):
        return moved.mark_varying()
    out = moved.array

    def product(delta: Delta, rows: Delta) -> jax.Array:
        if any(axis in delta.a.axes and axis in delta.b.axes for axis in found.picked):
            raise Unfactorable("rows and stacked matrices are looked up at once")
        value = dataclasses.replace(rows, key=None).materialized(found.axes, out.dtype)
        if delta.key is None:
            return value
        # A row that is looked up is an input of A that is 1: dropout keeps it or not.
        lengths = [n for axis, n in zip(found.axes, out.shape, strict=True) if axis in found.batch]
        keep = Factor(delta.drop(jnp.ones(lengths, value.dtype)), found.batch)
        return value * keep.arranged(found.axes)

    products = map(product, w.change.deltas, moved.change.deltas)
    out = plus_deltas(out, w, "embed", found.roles, map(found.detach_out_of_bounds, products))
    gain = moved.change.gain
    if gain is None:
        return out
    return times(out, found.detach_out_of_bounds(gain.arranged(found.axes)))


class _Lookup:
    """Rows of a weight, looked up by an array of indices.

    Attributes:
        picked: the axes of the weight along which one place is looked up.
        roles: those, and the axes that are taken whole.
        last: for each axis that is indexed, in this order, the last index within bounds.
        axes: the axes of the result.
        batch: those of them that are axes of the indices.
    """

    def __init__(self, eqn: Equation, w: Any, indices: Any):
        """`Unfactorable` if it is not whole rows of a weight."""
        self.eqn, self.params, self.indices = eqn, eqn.params, indices
        numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
        if not isinstance(w, Weight) or numbers.operand_batching_dims:
            raise Unfactorable("an index is a weight, or rows of several arrays are looked up")
        self.index_of = {w.axes[d]: i for i, d in enumerate(numbers.start_index_map)}
        by_axis = dict(zip(w.axes, sizes, strict=True))
        lengths = dict(zip(w.axes, w.shape, strict=True))
        self.last = {a: lengths[a] - by_axis[a] for a in self.index_of}
        collapsed = {w.axes[d] for d in numbers.collapsed_slice_dims}
        whole = tuple(
            a
            for a in w.axes
            if by_axis[a] == lengths[a] and a not in collapsed and not self.fills(a)
        )
        self.picked = tuple(a for a in w.axes if a not in whole)
        if any(by_axis[a] != 1 or a not in self.index_of for a in self.picked):
            raise Unfactorable("more than whole rows of the weight are looked up")
        self.roles = Roles((), self.picked, whole)
        names = w.new_names()
        kept = iter(a for a in w.axes if a not in collapsed)
        leaf = frozenset().union(*(a.leaf for a in self.picked))
        axes, batch = [], []
        for i in range(len(w.axes) - len(collapsed) + indices.ndim - 1):
            if i not in numbers.offset_dims:  # an axis of the indices
                axes.append(Axis(next(names), leaf))
                batch.append(axes[-1])
            elif (axis := next(kept)) in whole:
                axes.append(axis)
            else:  # of length 1
                axes.append(Axis(next(names)))
        self.axes, self.batch = tuple(axes), tuple(batch)

    def fills(self, axis: Axis) -> bool:
        """Whether an index along `axis` may be out of bounds, so that the row is filled."""
        mode = self.params["mode"]
        return axis in self.index_of and mode == lax.GatherScatterMode.FILL_OR_DROP

    def is_weight(self, w: Weight) -> bool:
        """Whether the result is a weight again: a row of a stack is a matrix, of a matrix none."""
        if not w.change.deltas:  # a gain is applied to the rows at once
            stays = w.origin.uses is not None or isinstance(w.w, Packed)
            return stays and w.change.gain is None and len(self.roles.outputs) >= 2
        lengths = dict(zip(w.axes, w.shape, strict=True))
        stack = {axis for axis in self.picked if lengths[axis] > 1}
        kept = set(self.roles.outputs)
        each = [(set(d.a.axes), set(d.b.axes)) for d in w.change.deltas]
        return all(stack <= a & b and kept & a and kept & b for a, b in each)

    def filled(self, w: Weight) -> Change:
        """The change with a gain along all axes in which rows may be filled: it is 1 on those."""
        axes = {a: n for a, n in zip(w.axes, w.shape, strict=True) if self.fills(a)}
        if any(a not in d.a.axes + d.b.axes for d in w.change.deltas for a in axes):
            raise Unfactorable("rows may be filled along an axis that neither A nor B has")
        gain = w.change.gain
        if gain is not None:
            for axis, length in axes.items():
                gain = gain.repeated(axis, length)
        return Change(w.change.deltas, gain)

    def value(self, w: Weight) -> Any:
        """The rows of W; if it is packed and its parts have such rows, packed."""
        found = w.w.freed(self.picked)
        if not isinstance(found, Packed):
            return Factor(self.eqn.bind(found.array, self.indices), self.axes)
        rows = found.map(self.rows)
        if any(map(self.fills, w.axes)):
            rows = self._filled_rows(rows, self._is_row())
        return rows.with_type(self.axes, self.eqn.outputs[0])

    def detach_out_of_bounds(self, x: jax.Array) -> jax.Array:
        """`x`, a part of the result, with a gradient only where the indices are within bounds.

        So is the gradient of W, as JAX derives it, unless the mode clips the indices.
        """
        if self.params["mode"] == lax.GatherScatterMode.CLIP:
            return x
        return jnp.where(self._is_row().arranged(self.axes), x, lax.stop_gradient(x))

    def _is_row(self) -> Factor:
        """Whether the indices are within bounds."""
        i = self.indices
        last = np.minimum(list(self.last.values()), jnp.iinfo(i.dtype).max).astype(i.dtype)
        within = (i >= 0) & (i <= np.expand_dims(last, tuple(range(i.ndim - 1))))
        return Factor(jnp.all(within, -1), self.batch)

    def _filled_rows(self, rows: Packed, is_row: Factor) -> Packed:
        """Rows of a packed weight, filled where `is_row` is false."""
        fill = self.params["fill_value"]
        fill = jnp.nan if fill is None else fill

        def unpack(parts: tuple[Packed, Factor]) -> Factor:
            f = parts[0].factor()
            return f.replace(jnp.where(parts[1].arranged(f.axes), f.value, fill))

        return Packed((rows, is_row), unpack, rows.axes, rows.shape, rows.dtype)

    def rows(self, f: Factor) -> Factor:
        """The rows of a factor: 0 where those of W are filled, 1 for a gain."""
        mine = [a for a in self.picked if a in f.axes]
        if not mine:
            return f
        f = f.to_front(mine)
        value = f.value.at[tuple(self.indices[..., self.index_of[a]] for a in mine)].get(
            mode=self.params["mode"],
            fill_value=0 if RANK in f.axes else 1,
            wrap_negative_indices=False,
        )
        return f.replace(value, (*self.batch, *f.axes[len(mine) :]))
