"""A weight on its way through the model, with the change that an adapter makes to it.

ΔW is never formed on the way.
"""

import dataclasses
from collections.abc import Callable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from .. import _compat
from ._axes import (
    Along,
    Axis,
    Factor,
    Unfactorable,
    axes_of_leaf,
    new_names,
    reshape_groups,
)
from ._change import Change, Delta
from ._explicit import explicit
from ._packed import Packed, laid, mesh_axes, unpacked_for
from ._product import promote
from ._trace import abstract
from ._uses import Uses


class Source(NamedTuple):
    """Where a weight comes from.

    Attributes:
        paths: of the leaves that it is made of.
        materialize: whether W + ΔW may be formed where there is no other way.
        uses: where its uses are written down while sites are searched, else None.
        unchecked: mesh axes of the enclosing `shard_map`s that do not check what varies.
    """

    paths: tuple[str, ...]
    materialize: bool
    uses: Uses | None = None
    unchecked: frozenset[Any] = frozenset()


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weight:
    """W with the change that is made to it.

    Attributes:
        value: W as it stands, an array or `Packed`.
        change: the change, whose factors follow axes of W.
        axes: the names of the axes of `value`.
        source: the leaves that it comes from.
        picked: axes of the leaves along which one place was looked up.
    """

    value: Any
    change: Change
    axes: tuple[Axis, ...] = dataclasses.field(metadata={"static": True})
    source: Source = dataclasses.field(metadata={"static": True})
    picked: frozenset[tuple[str | None, int]] = dataclasses.field(
        default=frozenset(), metadata={"static": True}
    )

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of W."""
        return self.value.shape

    @property
    def dtype(self) -> Any:
        """The dtype of W."""
        return self.value.dtype

    def replace(self, value: Any, change: Change | None = None, **fields: Any) -> "Weight":
        """The same with another value."""
        change = self.change if change is None else change
        return dataclasses.replace(self, value=value, change=change, **fields)

    @property
    def array(self) -> jax.Array:
        """W as it stands, unpacked."""
        return self.value.array(self.axes) if isinstance(self.value, Packed) else self.value

    @property
    def type(self) -> jax.ShapeDtypeStruct:
        """The type of W, where it lies along explicit mesh axes and varies."""
        if not isinstance(self.value, Packed):
            return abstract(self.value)
        codes = max(self.value.factors, key=lambda f: len(f.axes))
        known = explicit(codes.value)
        if known is not None:
            by_axis = dict(zip(codes.axes, known.spec, strict=True))
            known = NamedSharding(known.mesh, PartitionSpec(*map(by_axis.get, self.axes)))
        return _compat.abstract(self.shape, self.dtype, known, like=codes.value)

    def new_names(self) -> Iterator[int]:
        """Names for axes that none of its own has, nor had while it was packed."""
        last = self.value.last if isinstance(self.value, Packed) else -1
        return new_names([*self.axes, Axis(last)])

    def multiplied(self, f: Callable[..., jax.Array], *xs: jax.Array) -> jax.Array:
        """`f(W, *xs)`, linear in the first of `xs`. A packed W is unpacked for it, in each pass."""
        if not isinstance(self.value, Packed):
            return f(self.value, *xs)
        return unpacked_for(lambda w, *xs: f(w.array(self.axes), *xs), self.value, *xs)

    def unpacked(self) -> "Weight":
        """The same as an array."""
        return self.replace(self.array)

    def _follow(self, new: Any, move: Callable[[Packed], Packed]) -> Any:
        """W after a move: `new` if that is an array, else packed and of the type `new`."""
        if isinstance(self.value, Packed) and not isinstance(new, jax.Array):
            return move(self.value).like(new)
        return new

    def each(self, value: Any, function: Callable[[jax.Array], jax.Array]) -> "Weight":
        """Follows W to `value`, which is `function` of it, element for element."""
        value = self._follow(value, lambda w: w.then(lambda f: f.replace(function(f.value))))
        return self.replace(value)

    def moved(self, value: Any, axes: Sequence[Axis]) -> "Weight":
        """Follows W to `value`, whose axes are some of its own and new ones."""
        lost = [a for a in self.axes if a not in axes]
        change = self.change.map(lambda f: f.without(lost)) if lost else self.change
        value = self._follow(value, lambda w: w.without(lost).named(axes))
        return self.replace(value, change, axes=tuple(axes))

    def along(self, value: Any, functions: Along) -> "Weight":
        """Follows W to `value`, on which `functions` act, each along one axis."""
        value = self._follow(value, lambda w: w.along(functions))
        return self.replace(value, self.change.map(lambda f: f.along(functions)))

    def reshaped(self, value: Any) -> "Weight":
        """Follows W to another shape; `Unfactorable` if that merges axes of A with axes of B."""
        groups, axes = reshape_groups(self.axes, self.shape, value.shape, self.new_names())
        value = self._follow(value, lambda w: w.reshaped(groups).named(axes))
        gain = self.change.gain and self.change.gain.reshaped(groups, ())
        deltas = [
            dataclasses.replace(
                d,
                a=d.a.reshaped(groups, [d.b]),
                b=d.b.reshaped(groups, [d.a]),
                key=d.key and d.key.reshaped(groups, [d.a, d.b]),
                gate=d.gate and d.gate.reshaped(groups, [d.a, d.b]),
            )
            for d in self.change.deltas
        ]
        return self.replace(value, Change(tuple(deltas), gain), axes=axes)

    def padded(self, value: Any, config: Sequence[tuple[int, int, int]]) -> "Weight":
        """Follows W through `lax.pad`: ΔW is 0 where W is padded, a gain 1."""
        pads = {a: c for a, c in zip(self.axes, config, strict=True) if tuple(c) != (0, 0, 0)}
        lengths = dict(zip(self.axes, self.shape, strict=True))

        def pad(f: Factor, fill: int) -> Factor:
            by_axis = [pads.get(a, (0, 0, 0)) for a in f.axes]
            return f.replace(lax.pad(f.value, jnp.asarray(fill, f.value.dtype), by_axis))

        def delta(d: Delta) -> Delta:
            if d.key is not None and set(d.key.axes) & set(pads):
                raise Unfactorable("a stack with dropout keys is padded")
            a = d.a
            for axis in pads:
                a = a if axis in d.b.axes else a.repeated(axis, lengths[axis])
            return dataclasses.replace(
                d, a=pad(a, 0), b=pad(d.b, 0), gate=d.gate and pad(d.gate, 0)
            )

        gain = self.change.gain
        if gain is not None:
            for axis in pads:
                gain = gain.repeated(axis, lengths[axis])
            gain = pad(gain, 1)
        return self.replace(value, Change(tuple(map(delta, self.change.deltas)), gain))

    def scaled(
        self, value: Any, scalar: jax.Array, function: Callable[[jax.Array], jax.Array]
    ) -> "Weight":
        """Follows W to `value`, which is `function` of it: W times `scalar`."""
        varying = frozenset() if _compat.is_concrete(scalar) else self.source.unchecked

        def delta(d: Delta) -> Delta:
            # The scalar may be complex, or beyond the range of B's dtype.
            dtype = promote(d.b.value.dtype, jnp.result_type(scalar))
            b = d.b.value.astype(dtype) * jnp.asarray(scalar).astype(dtype)
            return dataclasses.replace(d, b=d.b.replace(b).may_vary(varying))

        change = Change(tuple(map(delta, self.change.deltas)), self.change.gain)
        return dataclasses.replace(self.each(value, function), change=change)

    def unsteady(self) -> "Weight":
        """The same after a traced value took part, of which an unchecked mesh tells nothing."""
        change = self.change.map(lambda f: f.may_vary(self.source.unchecked))
        return self.replace(self.value, change)

    def with_picked(self, axes: Sequence[Axis]) -> "Weight":
        """The same, one place having been looked up along each of `axes`."""
        return dataclasses.replace(self, picked=self.picked.union(*(a.leaf for a in axes)))

    def stacked(self) -> "Weight":
        """The same with every array stacked along the first axis, as `lax.scan` takes it."""
        first, length = self.axes[0], self.shape[0]

        def stack(f: Factor) -> Factor:
            return f.repeated(first, length).to_front([first])

        value = self.value
        if isinstance(value, Packed):
            value = value.map(stack) if first in value.free else self.array
        return self.replace(value, self.change.map(stack))

    def of_slice(self) -> "Weight":
        """What a scan over a `stacked` weight gives, with its own axes."""

        def unstack(f: Factor) -> Factor:
            return f.replace(f.value, f.axes[1:])

        value = self.value
        if isinstance(value, Packed):
            value = value.map(unstack).replace(shape=value.shape[1:])
        return self.replace(value, self.change.map(unstack), axes=self.axes[1:])

    def specs(self, spec: Any) -> "Weight":
        """The partition of W and of each factor, in their places, where W's is `spec`."""
        by_axis = dict(zip(self.axes, spec, strict=False))

        def place(f: Factor) -> Factor:
            return f.replace(f.spec(by_axis))

        value = self.value.map(place) if isinstance(self.value, Packed) else spec
        return self.replace(value, self.change.map(place))

    def constrained(self, sharding: Any) -> "Weight":
        """The same where W lies as `sharding` says."""
        if not isinstance(self.value, Packed):
            return self.replace(lax.with_sharding_constraint(self.value, sharding))
        if not isinstance(sharding, NamedSharding):
            return self
        return self.replace(self.value.map(lambda f: laid(f, sharding, self.axes)))

    def sliceable(self, pieces: dict[Axis, int]) -> "Weight":
        """The same, W unpacked unless its parts can be cut into so many pieces along axes."""
        if not isinstance(self.value, Packed):
            return self
        value = self.value.cut(pieces)
        return self.replace(self.array if value is None else value)

    def within_shards(self, spec: Any, unchecked: frozenset[Any], aval: Any) -> "Weight":
        """A shard of it, of type `aval`; JAX does not check it over the mesh axes `unchecked`."""
        by_axis = dict(zip(self.axes, spec, strict=False))

        def shard(f: Factor) -> Factor:
            names = {n for a in f.axes for n in mesh_axes(by_axis.get(a))}
            return f.may_vary(names & unchecked)

        for d in self.change.deltas:
            apart = {*d.a.axes} ^ {*d.b.axes}
            if not d.is_matrix and (unchecked or any(map(by_axis.get, apart))):
                raise Unfactorable("a device has a part of each matrix, or that is not checked")
        source = self.source._replace(unchecked=self.source.unchecked | unchecked)
        value = self.value.like(aval) if isinstance(self.value, Packed) else self.value
        return self.replace(value, self.change.map(shard), source=source)

    def placed(self, mesh: Any, spec: Any) -> "Weight":
        """With the factors resharded to lie on `mesh` as those of a weight of partition `spec`."""

        def place(x: jax.Array, spec: Any) -> jax.Array:
            return jax.sharding.reshard(x, NamedSharding(mesh, spec))

        at = self.specs(spec)
        value = self.value
        if isinstance(value, Packed):
            value = jax.tree.map(place, value, at.value)
        return self.replace(value, jax.tree.map(place, self.change, at.change))

    @property
    def is_changed(self) -> bool:
        """Whether an adapter changes it, or it is watched."""
        change, uses = self.change, self.source.uses
        return bool(change.deltas) or change.gain is not None or uses is not None

    @property
    def is_row(self) -> bool:
        """Whether the change costs no more than an activation."""
        if not self.change.deltas:
            return sum(n > 1 for n in self.shape) <= 1
        return all(d.is_row for d in self.change.deltas)

    def materialized(self, why: str) -> Any:
        """The changed W; ValueError where a dropout has no input to drop, `why` it is formed."""
        for d in self.change.deltas:
            if d.key is not None and not d.a.is_row:
                raise ValueError(
                    f"dropout cannot act where W + ΔW is formed ({why}): there is no input to "
                    "drop. Give this site a rule with dropout=0."
                )
        return self.change.of(self.array, self.axes)


def leaf_weight(value: Any, change: Change, path: str, materialize: bool) -> Weight:
    """The weight that is the leaf at `path`: an array, or what gives a `Packed` by its axes."""
    axes, unchecked = axes_of_leaf(path, value.ndim), _compat.unchecked_axes()
    value = value.packed(axes) if hasattr(value, "packed") else value
    names = {Axis(d): axis for d, axis in enumerate(axes)}
    change = change.map(lambda f: f.renamed(names).may_vary(unchecked))
    # The model must be traced with a weight that varies over a mesh as W' does.
    value = jax.tree.map(lambda x: _compat.vary_with(x, jax.tree.leaves(change)), value)
    return Weight(value, change, axes, Source((path,), materialize, unchecked=unchecked))


def value_of(x: Any) -> Any:
    """W of a `Weight`; an array as it is."""
    return x.array if isinstance(x, Weight) else x
