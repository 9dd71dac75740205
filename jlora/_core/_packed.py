"""A weight in fewer bits on its way through the model: it is unpacked next to its use.

Its codes and scales are arrays whose axes follow those of W, as A's and B's do. What the model does
with W along an axis of which each entry has codes and scales of its own, as it slices a layer out
of a stack, is done to those; all else is remembered, and done to W when it is unpacked.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from ._axes import Along, Axis, Factor, Group

Move = Callable[[Factor], Factor]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """W as the arrays from which it is computed.

    Attributes:
        parts: a pytree of `Factor`.
        unpack: W of `parts`.
        shape: of W as it stands.
        dtype: of W as it stands.
        free: axes along which every part has an entry for each of W's.
        even: axes along which the parts of a piece of W are pieces of the parts, if it is of equal
            pieces that all parts can be cut into.
        loosened: the same W of `parts` that have more free and even axes, if there are such.
        moves: what the model did with W, and `unpack` knows nothing of.
        touched: the axes along which it did that, which are neither free nor even.
        last: the highest name that an axis of it had.
    """

    parts: Any
    unpack: Callable[[Any], Factor] = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    free: frozenset[Axis] = dataclasses.field(default=frozenset(), metadata={"static": True})
    even: frozenset[Axis] = dataclasses.field(default=frozenset(), metadata={"static": True})
    loosened: "Callable[[Packed], Packed] | None" = dataclasses.field(
        default=None, metadata={"static": True}
    )
    moves: tuple[Move, ...] = dataclasses.field(default=(), metadata={"static": True})
    touched: frozenset[Axis] = dataclasses.field(default=frozenset(), metadata={"static": True})
    last: int = dataclasses.field(default=-1, metadata={"static": True})

    @property
    def factors(self) -> list[Factor]:
        """The parts."""
        return jax.tree.leaves(self.parts, is_leaf=_is_factor)

    def map(self, f: Callable[[Factor], Any]) -> "Packed":
        """`f` of each part."""
        return self.replace(parts=jax.tree.map(f, self.parts, is_leaf=_is_factor))

    def replace(self, **fields: Any) -> "Packed":
        """The same with other fields."""
        return dataclasses.replace(self, **fields)

    def like(self, aval: Any) -> "Packed":
        """The same, of which it is known that it has the shape and dtype of `aval`."""
        return self.replace(shape=aval.shape, dtype=aval.dtype)

    def named(self, axes: Sequence[Axis]) -> "Packed":
        """The same, of which it is known that W has `axes` now."""
        return self.replace(last=max(self.last, *(a.name for a in axes), -1))

    def then(self, move: Move, axes: Collection[Axis] = ()) -> "Packed":
        """The same after `move`, which acts along `axes` and is put off."""
        return self.replace(
            moves=(*self.moves, move),
            free=self.free.difference(axes),
            even=self.even.difference(axes),
            touched=self.touched.union(axes),
        )

    def without(self, axes: Collection[Axis]) -> "Packed":
        """The same without some axes of length 1."""
        if not axes:
            return self
        now = self.free.intersection(axes)
        packed = self.map(lambda f: f.without(now))
        return packed.then(lambda f: f.without(axes), axes)

    def along(self, functions: Along) -> "Packed":
        """Each of `functions` of the axis that it is given for."""
        now = {axis: f for axis, f in functions.items() if axis in self.free}
        rest = {axis: f for axis, f in functions.items() if axis not in self.free}
        packed = self.map(lambda f: f.along(now)) if now else self
        return packed.then(lambda f: f.along(rest), rest) if rest else packed

    def reshaped(self, groups: Sequence[Group]) -> "Packed":
        """Through a reshape."""
        now = [g for g in groups if self.free.issuperset(g.old)]
        rest = [g for g in groups if g not in now]
        free = self.free.union(*(g.new for g in now))
        packed = self.map(lambda f: f.reshaped(now, ())).replace(free=free) if now else self
        old = frozenset[Axis]().union(*(g.old for g in groups))
        return packed.then(lambda f: f.reshaped(rest, ()), old)

    def cut(self, pieces: Mapping[Axis, int]) -> "Packed | None":
        """Parts that can be cut into so many pieces along axes, or None."""
        fits = self.even.issuperset(pieces) and all(
            f.length(a) % n == 0 for f in self.factors for a, n in pieces.items() if a in f.axes
        )
        if fits:
            return self
        return None if self.loosened is None else self.loosened(self).cut(pieces)

    def freed(self, axes: Collection[Axis]) -> "Packed | None":
        """Parts along which some axes are free, or None."""
        if self.free.issuperset(axes):
            return self
        return None if self.loosened is None else self.loosened(self).freed(axes)

    def factor(self) -> Factor:
        """W, unpacked."""
        f = self.unpack(self.parts)
        for move in self.moves:
            f = move(f)
        return f

    def array(self, axes: Sequence[Axis]) -> jax.Array:
        """W, unpacked, with its axes in the order of `axes`."""
        f = self.factor()
        return jnp.broadcast_to(f.arranged(axes), self.shape).astype(self.dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def unpacked_for(
    product: Callable[..., jax.Array], packed: Packed, x: jax.Array, *others: jax.Array
) -> jax.Array:
    """`product(packed, x, *others)`, linear in x, by which the packed weight is frozen.

    The backward pass keeps the packed weight and nothing else. Neither pass unpacks it before its
    activation is there: XLA would unpack the weights of many layers at once.
    """
    packed, _ = lax.optimization_barrier((packed, x))
    return product(packed, x, *others)


@unpacked_for.defjvp
def _unpacked_for_jvp(product: Any, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    packed, _, *others = primals
    tangent = jax.checkpoint(lambda packed, dx, *others: product(packed, dx, *others))
    return unpacked_for(product, *primals), tangent(packed, tangents[1], *others)


def laid(f: Factor, sharding: NamedSharding | PartitionSpec, axes: Sequence[Axis]) -> Factor:
    """A part of a weight with `axes` where that lies as `sharding` says, as far as it can be cut.

    A PartitionSpec is along the axes of `jax.set_mesh`.
    """
    named = isinstance(sharding, NamedSharding)
    mesh = sharding.mesh if named else jax.sharding.get_abstract_mesh()
    spec = sharding.spec if named else sharding
    if unknown := {n for e in spec for n in mesh_axes(e)} - set(mesh.axis_names):
        raise ValueError(
            f"{spec} names {', '.join(sorted(unknown))}, which no mesh in scope has. Give a "
            "NamedSharding, or call it under jax.set_mesh(mesh)."
        )
    entries = f.spec(dict(zip(axes, spec, strict=False)))
    cut = [
        e if n % math.prod(mesh.shape[name] for name in mesh_axes(e)) == 0 else None
        for e, n in zip(entries, f.value.shape, strict=True)
    ]
    place = NamedSharding(mesh, PartitionSpec(*cut)) if named else PartitionSpec(*cut)
    return f.replace(lax.with_sharding_constraint(f.value, place))


def mesh_axes(entry: Any) -> tuple[Any, ...]:
    """The mesh axes of an entry of a partition."""
    if entry is None or entry is PartitionSpec.UNCONSTRAINED:
        return ()
    return entry if isinstance(entry, tuple) else (entry,)


def _is_factor(x: Any) -> bool:
    return isinstance(x, Factor)
