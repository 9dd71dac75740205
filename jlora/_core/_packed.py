"""A quantized weight on its way through the model: it is unpacked next to its use.

Its codes and scales are factors, with the axes of W that they follow. An axis of W is *free*
if each entry along it has codes and scales of its own. What the model does along a free axis, such
as slicing a layer out of a stack, is done to the codes and scales; all else is remembered, and done
to W when it is unpacked.
"""

import dataclasses
import functools
import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from .. import _compat
from ._arrays import explicit, mesh_axes
from ._axes import Along, Axis, Factor, Group, is_factor, new_names

Move = Callable[[Factor], Factor]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """W as the arrays from which it is computed; it moves as a `Factor` that has every axis.

    Attributes:
        parts: a pytree of `Factor`.
        unpack: computes W from `parts`.
        axes: the axes of W now.
        shape: the shape of W now.
        dtype: the dtype of W now.
        even: axes along which W can be split into equal pieces by splitting each part.
        loosen: computes larger parts of the same W that have more even axes; None if there are
            none such.
        loose: the even axes of those.
        moves: what the model did with W along other axes, which `unpack` does not know of.
        last: the highest name of an axis that W had before and has no more.
    """

    parts: Any
    unpack: Callable[[Any], Factor] = dataclasses.field(metadata={"static": True})
    axes: tuple[Axis, ...] = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    even: frozenset[Axis] = dataclasses.field(default=frozenset(), metadata={"static": True})
    loosen: Callable[[Any], Any] | None = dataclasses.field(default=None, metadata={"static": True})
    loose: frozenset[Axis] = dataclasses.field(default=frozenset(), metadata={"static": True})
    moves: tuple[Move, ...] = dataclasses.field(default=(), metadata={"static": True})
    last: int = dataclasses.field(default=-1, metadata={"static": True})

    def replace(self, **fields: Any) -> "Packed":
        """Returns a copy with other fields."""
        return dataclasses.replace(self, **fields)

    @property
    def factors(self) -> list[Factor]:
        """The parts."""
        return jax.tree.leaves(self.parts, is_leaf=is_factor)

    @property
    def array(self) -> jax.Array:
        """W, unpacked."""
        return jnp.broadcast_to(self.factor().arranged(self.axes), self.shape).astype(self.dtype)

    def factor(self) -> Factor:
        """W, unpacked, with its axes in any order and without those along which it is constant."""
        f = self.unpack(self.parts)
        for move in self.moves:
            f = move(f)
        return f

    @property
    def type(self) -> jax.ShapeDtypeStruct:
        """The type of W: its codes say how it is sharded and varies."""
        codes = max(self.factors, key=lambda f: len(f.axes))
        known = explicit(codes.value)
        if known is not None:
            by_axis = dict(zip(codes.axes, known.spec, strict=True))
            known = NamedSharding(known.mesh, PartitionSpec(*map(by_axis.get, self.axes)))
        return _compat.abstract(self.shape, self.dtype, known, like=codes.value)

    @property
    def free(self) -> set[Axis]:
        """Axes along which every part has an entry for each of W's."""
        lengths = {a: n for a, n in zip(self.axes, self.shape, strict=True) if a in self.even}
        shapes = [dict(zip(f.axes, f.shape, strict=True)) for f in self.factors]
        return {a for a, n in lengths.items() if all(shape.get(a) == n for shape in shapes)}

    def new_names(self) -> Iterator[int]:
        """Names that no axis of W has or had."""
        return new_names([*self.axes, Axis(self.last)])

    def map(self, f: Callable[[Factor], Any]) -> "Packed":
        """Applies `f` to each part."""
        return self.replace(parts=jax.tree.map(f, self.parts, is_leaf=is_factor))

    def with_type(self, axes: Sequence[Axis], aval: Any) -> "Packed":
        """Sets the axes of W, and its shape and dtype, which are those of `aval`."""
        last = max(self.last, *(a.name for a in self.axes), -1)
        return self.replace(axes=tuple(axes), shape=aval.shape, dtype=aval.dtype, last=last)

    def _with_shape(self, lengths: Mapping[Axis, int]) -> "Packed":
        aval = jax.ShapeDtypeStruct(tuple(lengths.values()), self.dtype)
        return self.with_type(tuple(lengths), aval)

    def then(self, move: Move, axes: Collection[Axis] = ()) -> "Packed":
        """Remembers `move`, which acts along `axes`, until W is unpacked."""
        return self.replace(
            moves=(*self.moves, move),
            even=self.even.difference(axes),
            loose=self.loose.difference(axes),
        )

    def each(self, f: Callable[[jax.Array], jax.Array]) -> "Packed":
        """Applies `f`, an operation on each element, to W."""
        return self.then(lambda w: w.each(f)).with_type(self.axes, jax.eval_shape(f, self.type))

    def along(self, functions: Along) -> "Packed":
        """Applies each function along the axis that it is given for."""
        now = {axis: f for axis, f in functions.items() if axis in self.free}
        rest = {axis: f for axis, f in functions.items() if axis not in self.free}
        packed = self.map(lambda f: f.along(now)) if now else self
        packed = packed.then(lambda f: f.along(rest), rest) if rest else packed
        w = Factor(self.type, self.axes)
        return packed.with_type(self.axes, jax.eval_shape(lambda w: w.along(functions), w))

    def without(self, axes: Collection[Axis]) -> "Packed":
        """Removes `axes`, each of length 1."""
        if not axes:
            return self
        now = self.free.intersection(axes)
        packed = self.map(lambda f: f.without(now))
        kept = {a: n for a, n in zip(self.axes, self.shape, strict=True) if a not in axes}
        return packed.then(lambda f: f.without(axes), axes)._with_shape(kept)

    def moved(self, axes: Sequence[Axis], shape: Sequence[int], sharding: Any = None) -> "Packed":
        """Puts all axes of W into the order of `axes`; W is repeated along the others."""
        del sharding
        return self._with_shape(dict(zip(axes, shape, strict=True)))

    def reshaped(
        self, groups: Sequence[Group], others: Sequence[Factor] = (), sharding: Any = None
    ) -> "Packed":
        """Reshapes W."""
        del others, sharding
        new = {a: n for group in groups for a, n in group.new.items()}
        groups = [g for g in groups if g.old != g.new]
        now = [g for g in groups if self.free.issuperset(g.old)]
        rest = [g for g in groups if g not in now]
        even, loose = (axes.union(*(g.new for g in now)) for axes in (self.even, self.loose))
        packed = self.map(lambda f: f.reshaped(now)).replace(even=even, loose=loose)
        old = frozenset[Axis]().union(*(g.old for g in groups))
        return packed.then(lambda f: f.reshaped(rest), old)._with_shape(new)

    def specs(self, of_weight: Mapping[Axis, Any]) -> "Packed":
        """The partition of each part in the place of its array, where that of W is `of_weight`."""
        return self.map(lambda f: f.specs(of_weight))

    def to_dense(self) -> Factor:
        """W as an array with named axes."""
        return Factor(self.array, self.axes)

    def cut(self, pieces: Mapping[Axis, int]) -> "Packed | Factor":
        """W with parts that can be split into so many pieces along axes, or else unpacked."""
        fits = self.even.issuperset(pieces) and all(
            f.length(a) % n == 0 for f in self.factors for a, n in pieces.items() if a in f.axes
        )
        if fits:
            return self
        return self.to_dense() if self.loosen is None else self._loosened(self.loosen).cut(pieces)

    def freed(self, axes: Collection[Axis]) -> "Packed | Factor":
        """W with parts along which `axes` are free, or else unpacked."""
        if self.free.issuperset(axes):
            return self
        return self.to_dense() if self.loosen is None else self._loosened(self.loosen).freed(axes)

    def _loosened(self, loosen: Callable[[Any], Any]) -> "Packed":
        return self.replace(parts=loosen(self.parts), even=self.loose, loosen=None)

    def multiply(self, f: Callable[..., jax.Array], *xs: jax.Array) -> jax.Array:
        """`f(W, *xs)`, linear in the first of `xs`; W is unpacked for it in each pass."""
        return unpacked_for(lambda w, *xs: f(w.array, *xs), self, *xs)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def unpacked_for(
    product: Callable[..., jax.Array], packed: Packed, x: jax.Array, *others: jax.Array
) -> jax.Array:
    """`product(packed, x, *others)`, linear in x; the packed weight gets no gradient.

    The backward pass keeps the packed weight and nothing else. In both passes the weight waits for
    its activation: otherwise XLA would unpack the weights of many layers at once.
    """
    packed, _ = lax.optimization_barrier((packed, x))
    return product(packed, x, *others)


@unpacked_for.defjvp
def _unpacked_for_jvp(product: Any, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    packed, _, *others = primals
    tangent = jax.checkpoint(lambda packed, dx, *others: product(packed, dx, *others))
    return unpacked_for(product, *primals), tangent(packed, tangents[1], *others)


def shard_part(f: Factor, sharding: Any, axes: Sequence[Axis]) -> Factor:
    """Shards a part of a weight with `axes` as that is sharded, where the part can be split so.

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
    entries = f.specs(dict(zip(axes, spec, strict=False))).value
    cut = [
        e if n % math.prod(mesh.shape[name] for name in mesh_axes(e)) == 0 else None
        for e, n in zip(entries, f.shape, strict=True)
    ]
    place = NamedSharding(mesh, PartitionSpec(*cut)) if named else PartitionSpec(*cut)
    return f.replace(lax.with_sharding_constraint(f.value, place))
