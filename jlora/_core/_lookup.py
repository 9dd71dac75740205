"""Lookups of rows of a weight."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._axes import RANK, Axis, Factor, ProductAxes, Unfactorable, map_factors
from ._change import Delta, plus
from ._interpret import Equation, primitive
from ._packed import Packed
from ._product import Product
from ._weight import Operand, Weight


@primitive("gather", is_move=False)
def _gather(eqn: Equation, w: Operand, indices: jax.Array) -> Operand:
    # For example, x = W[ids] with W of axes (v, d) and ids of shape (batch, t): one entry of v is
    # picked, d is whole, and the result has axes (batch, t, d), of which two are of the indices.
    # W[i] of a stack (layers, inputs, outputs) picks one of the layers, and is a weight again.
    numbers, sizes = eqn.params["dimension_numbers"], eqn.params["slice_sizes"]
    if not isinstance(w, Weight) or numbers.operand_batching_dims:
        raise Unfactorable("the indices are a weight, or rows of a batch of arrays are looked up")
    size_of = dict(zip(w.axes, sizes, strict=True))
    indexed = {w.axes[d] for d in numbers.start_index_map}
    collapsed = {w.axes[d] for d in numbers.collapsed_slice_dims}
    fills = eqn.params["mode"] == lax.GatherScatterMode.FILL_OR_DROP
    whole = {a for a, n in w.lengths.items() if size_of[a] == n} - collapsed
    whole -= indexed if fills else set()
    picked = tuple(a for a in w.axes if a not in whole)
    if any(size_of[a] != 1 or a not in indexed for a in picked):
        raise Unfactorable("more than whole rows of the weight are looked up")
    names = w.new_names()
    leaf = frozenset().union(*(a.leaf for a in picked))
    # An axis that is neither whole nor collapsed has length 1 in the result.
    kept = (a if a in whole else Axis(next(names)) for a in w.axes if a not in collapsed)
    dims = range(len(w.axes) - len(collapsed) + indices.ndim - 1)
    axes = [next(kept) if i in numbers.offset_dims else Axis(next(names), leaf) for i in dims]
    batch = [axes[i] for i in dims if i not in numbers.offset_dims]
    if fills:  # such rows have no change: what is looked up must have all axes of the indices
        w = w.replace(w.w, w.change.repeat({a: w.lengths[a] for a in indexed}))
    roles = ProductAxes((), picked, tuple(a for a in w.axes if a in whole))
    found = _Lookup(eqn, w, indices, roles, tuple(axes), tuple(batch), fills)
    return found.weight() if found.is_weight else found.result()


@dataclasses.dataclass(frozen=True)
class _Lookup(Product):
    """Rows of W that an array x of indices picks.

    Attributes:
        x: the indices.
        roles: axes along which one entry is picked, as inputs, and whole axes, as outputs.
        axes: the axes of the result.
        batch: the axes of the result that are axes of the indices.
        fills: whether rows at indices out of bounds are filled.
    """

    axes: tuple[Axis, ...]
    batch: tuple[Axis, ...]
    fills: bool
    kind = "embed"

    def base(self, x: jax.Array) -> jax.Array:
        return self.weight().array

    def low_rank(self, delta: Delta, x: jax.Array) -> jax.Array:
        if any(axis in delta.a.axes and axis in delta.b.axes for axis in self.roles.inputs):
            raise Unfactorable("rows and stacked matrices are looked up at once")
        rows = map_factors(self.take, dataclasses.replace(delta, key=None))
        value = rows.form(self.axes, self.w.dtype)
        if delta.key is not None:
            # A lookup is an input of 1 at its row: dropout keeps or drops it.
            keep = Factor(delta.drop(jnp.ones(x.shape[:-1], value.dtype)), self.batch)
            value = value * keep.expand_to(self.axes)
        return self._within_bounds(value)

    def spread(self, gain: Factor, on_x: bool) -> jax.Array:
        return self._within_bounds(self.take(gain).expand_to(self.axes))

    def add(self, y: jax.Array, term: jax.Array) -> jax.Array:
        return plus(y, term)  # rounded as rows of the merged W are

    @property
    def is_weight(self) -> bool:
        """Whether the result is a weight again: a row of a stack is, a row of a matrix is not."""
        w = self.w
        kept = {*self.roles.outputs}
        if not w.change.deltas:  # a gain is applied to the rows at once
            stays = w.origin.uses is not None or isinstance(w.w, Packed)
            return stays and w.change.gain is None and len(kept) >= 2
        return all(kept & {*d.a.axes} and kept & {*d.b.axes} for d in w.change.deltas)

    def weight(self) -> Weight:
        """Looks up rows of W and of its change."""
        w = self.w
        change = map_factors(self.take, w.change)
        found = w.w.with_pieces({a: w.lengths[a] for a in self.roles.inputs})
        if isinstance(found, Packed):
            rows = map_factors(self.take, found).with_axes(self.axes, self.eqn.outputs[0].shape)
            rows = self._fill(rows) if self.fills else rows
        else:
            rows = Factor(self.eqn.bind(found.array, self.x), self.axes)
        return w.replace(rows, change).mark_picked(self.roles.inputs).mark_varying()

    def take(self, f: Factor) -> Factor:
        """Takes the rows of a factor; where W's rows are filled, they are 0, or 1 for a gain."""
        picked = [a for a in self.roles.inputs if a in f.axes]
        if not picked:
            return f
        order = [self.w.axes[d] for d in self.eqn.params["dimension_numbers"].start_index_map]
        f = f.to_front(picked)
        value = f.value.at[tuple(self.x[..., order.index(a)] for a in picked)].get(
            mode=self.eqn.params["mode"],
            fill_value=0 if RANK in f.axes else 1,
            wrap_negative_indices=False,
        )
        return f.replace(value, (*self.batch, *f.axes[len(picked) :]))

    def _within_bounds(self, x: jax.Array) -> jax.Array:
        """Zeroes the gradient of `x` at indices out of bounds, as JAX does for a lookup in W."""
        if self.eqn.params["mode"] == lax.GatherScatterMode.CLIP:
            return x
        return jnp.where(self._is_row().expand_to(self.axes), x, lax.stop_gradient(x))

    def _is_row(self) -> Factor:
        """Whether each index is in bounds."""
        i, sizes = self.x, self.eqn.params["slice_sizes"]
        dims = self.eqn.params["dimension_numbers"].start_index_map
        last = [min(self.w.shape[d] - sizes[d], jnp.iinfo(i.dtype).max) for d in dims]
        last = np.asarray(last, i.dtype).reshape((1,) * (i.ndim - 1) + (-1,))
        return Factor(jnp.all((i >= 0) & (i <= last), -1), self.batch)

    def _fill(self, rows: Packed) -> Packed:
        """Fills rows of a packed weight where the indices are out of bounds."""
        fill = self.eqn.params["fill_value"]
        fill = jnp.nan if fill is None else fill

        def unpack(parts: tuple[Packed, Factor]) -> Factor:
            f = parts[0].factor()
            return f.each(lambda x: jnp.where(parts[1].expand_to(f.axes), x, fill))

        return Packed((rows, self._is_row()), unpack, rows.axes, rows.shape, rows.dtype)
