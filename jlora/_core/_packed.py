"""A quantized weight on its way through the model; it is unpacked next to its use.

Its codes and scales are factors, with the axes of W that they follow. If each entry of W along an
axis has its own codes and scales, operations along this axis, such as slicing a layer out of a
stack, are applied to the codes and scales. All other operations are remembered, and applied to W
when it is unpacked.
"""

import dataclasses
import functools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from .. import _compat
from .._arrays import explicit, fit_spec, mesh_axes
from ._axes import Along, Axis, Factor, Group, map_factors

Move = Callable[[Factor], Factor]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Packed:
    """W as the arrays from which it is computed; it has the methods of a `Factor` with every axis.

    Attributes:
        parts: a pytree of `Factor`.
        unpack: computes W from `parts`, before `moves`. That of a leaf, which alone has splittable
            axes, takes `in_turn`, one of them: TPUs unpack its entries one after another.
        axes: the current axes of W.
        shape: the current shape of W.
        dtype: the current dtype of W.
        splittable: axes along which splitting each part splits W, if its scales are plain.
        with_plain_scales: writes out the scales of double quantization; None if they are plain.
        moves: remembered operations, to apply to the unpacked W.
    """

    parts: Any
    unpack: Callable[..., Factor] = dataclasses.field(metadata={"static": True})
    axes: tuple[Axis, ...] = dataclasses.field(metadata={"static": True})
    shape: tuple[int, ...] = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    splittable: frozenset[Axis] = dataclasses.field(default=frozenset(), metadata={"static": True})
    with_plain_scales: Callable[[Any], Any] | None = dataclasses.field(
        default=None, metadata={"static": True}
    )
    moves: tuple[Move, ...] = dataclasses.field(default=(), metadata={"static": True})

    def replace(self, **fields: Any) -> "Packed":
        """Returns a copy with other fields."""
        return dataclasses.replace(self, **fields)

    @property
    def factors(self) -> list[Factor]:
        """The parts."""
        return jax.tree.leaves(self.parts, is_leaf=lambda x: isinstance(x, Factor))

    @property
    def array(self) -> jax.Array:
        """W, unpacked."""
        return jnp.broadcast_to(self.factor().expand_to(self.axes), self.shape).astype(self.dtype)

    def factor(self) -> Factor:
        """Unpacks W; its axes may be in any order, and lack those along which it is constant."""
        return functools.reduce(lambda f, move: move(f), self.moves, self.unpack(self.parts))

    @property
    def type(self) -> jax.ShapeDtypeStruct:
        """The type of W, which is sharded and varies as its codes do."""
        codes = max(self.factors, key=lambda f: len(f.axes))
        known = explicit(codes.value)
        if known is not None:
            by_axis = dict(zip(codes.axes, known.spec, strict=True))
            known = NamedSharding(known.mesh, PartitionSpec(*map(by_axis.get, self.axes)))
        return _compat.abstract(self.shape, self.dtype, known, like=codes.value)

    @property
    def lengths(self) -> dict[Axis, int]:
        """The length of each axis of W."""
        return dict(zip(self.axes, self.shape, strict=True))

    def with_axes(self, axes: Iterable[Axis], shape: Iterable[int]) -> "Packed":
        """Sets the axes of W and its shape."""
        return self.replace(axes=tuple(axes), shape=tuple(shape))

    # ------------------------------------------------------------------------------ how it moves

    def _move(self, move: Move, old: Collection[Axis], new: Collection[Axis] = ()) -> "Packed":
        """Applies `move`, which turns the axes `old` into `new`, to the parts, or remembers it.

        It applies the move if each part has an entry for each entry of W along `old`. If a part
        lacks an axis, as scales do, it remembers the move: moved codes would be kept for the
        backward pass.
        """
        lengths = {axis: self.lengths[axis] for axis in old}
        has_all = all(lengths.items() <= f.lengths.items() for f in self.factors)
        if has_all and self.splittable.issuperset(old):
            parts = map_factors(move, self.parts)
            return self.replace(parts=parts, splittable=self.splittable.union(new))
        return self._remember(move, old)

    def _remember(self, move: Move, axes: Collection[Axis] = ()) -> "Packed":
        return self.replace(moves=(*self.moves, move), splittable=self.splittable.difference(axes))

    def each(self, f: Callable[[jax.Array], jax.Array]) -> "Packed":
        """Applies `f`, an operation on each element, to W."""
        dtype = jax.eval_shape(f, self.type).dtype
        return self._remember(lambda w: w.each(f)).replace(dtype=dtype)

    def along(self, functions: Along) -> "Packed":
        """Applies each function along its axis."""
        packed, lengths = self, self.lengths
        for axis, f in functions.items():
            packed = packed._move(lambda w, f={axis: f}: w.along(f), [axis])
            w = jax.ShapeDtypeStruct((lengths[axis],), self.dtype)
            [lengths[axis]] = jax.eval_shape(lambda x, f=f: f(x, 0), w).shape
        return packed.with_axes(lengths, lengths.values())

    def without(self, axes: Collection[Axis]) -> "Packed":
        """Removes `axes`, each of length 1."""
        packed = self
        for axis in axes:
            packed = packed._move(lambda w, axis=axis: w.without([axis]), [axis])
        kept = {a: n for a, n in self.lengths.items() if a not in axes}
        return packed.with_axes(kept, kept.values())

    def transpose(self, axes: Sequence[Axis], shape: Sequence[int], *_: object) -> "Packed":
        """Transposes W to the order of `axes`, and repeats it along new axes to `shape`.

        A sharding is for a result that is computed now.
        """
        return self.with_axes(axes, shape)

    def reshape(self, groups: Sequence[Group], **_: object) -> "Packed":
        """Reshapes W. A sharding is for a result that is computed now."""
        packed = self
        lengths = dict[Axis, int]()
        for group in groups:
            lengths |= group.new
            if group.old != group.new:
                packed = packed._move(lambda f, g=group: f.reshape([g]), group.old, group.new)
        return packed.with_axes(lengths, lengths.values())

    def with_pieces(self, pieces: Mapping[Axis, int]) -> "Packed | Factor":
        """Returns W such that its parts can be split into `pieces`, or unpacks it."""
        is_plain = self.with_plain_scales is None
        # Scales of scales lack axes along which they differ.
        can_split = self.splittable.issuperset(pieces) and all(
            is_plain if a not in f.axes else f.length(a) == n or (n > 0 and f.length(a) % n == 0)
            for f in self.factors
            for a, n in pieces.items()
        )
        if can_split:
            return self
        if self.with_plain_scales is None:
            return Factor(self.array, self.axes)
        plain = self.replace(parts=self.with_plain_scales(self.parts), with_plain_scales=None)
        return plain.with_pieces(pieces)

    def multiply(
        self, f: Callable[..., jax.Array], *xs: jax.Array, in_turn: Axis | None = None
    ) -> jax.Array:
        """Computes `f(W, *xs)`, which is linear in the first of `xs`; unpacks W in each pass.

        TPUs unpack the entries along the axis `in_turn` one after another, if they can. The loop is
        over the shard of a device: a mesh must not shard this axis.
        """
        packed = self
        if in_turn in self.splittable and explicit(self.factors[0].value) is None:
            packed = self.replace(unpack=functools.partial(self.unpack, in_turn=in_turn))
        return multiply_unpacked(lambda w, *xs: f(w.array, *xs), packed, *xs)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def multiply_unpacked(
    product: Callable[..., jax.Array], packed: Packed, x: jax.Array, *others: jax.Array
) -> jax.Array:
    """Computes `product(packed, x, *others)`, linear in x; the packed weight gets no gradient.

    The backward pass keeps only the packed weight. In both passes the weight waits for its
    activation; otherwise XLA would unpack the weights of many layers at once.
    """
    packed, _ = lax.optimization_barrier((packed, x))
    return product(packed, x, *others)


PackedOperands = tuple[Packed, jax.Array, *tuple[jax.Array, ...]]  # of `multiply_unpacked`


@multiply_unpacked.defjvp
def _multiply_unpacked_jvp(
    product: Callable[..., jax.Array], primals: PackedOperands, tangents: PackedOperands
) -> tuple[jax.Array, jax.Array]:
    packed, _, *others = primals
    tangent = jax.checkpoint(lambda packed, dx, *others: product(packed, dx, *others))
    return multiply_unpacked(product, *primals), tangent(packed, tangents[1], *others)


NamedPlace = NamedSharding | PartitionSpec  # which refers to the mesh of `jax.set_mesh`


def place_of_part(f: Factor, sharding: NamedPlace, axes: Sequence[Axis]) -> NamedPlace:
    """Shards a part like the weight with the axes `axes`, as far as it can be split evenly."""
    named = isinstance(sharding, NamedSharding)
    mesh = sharding.mesh if named else jax.sharding.get_abstract_mesh()
    spec = sharding.spec if named else sharding
    if unknown := {n for e in spec for n in mesh_axes(e)} - set(mesh.axis_names):
        raise ValueError(
            f"{spec} names the mesh axes {', '.join(sorted(unknown))}, which no mesh in scope has. "
            "Give a NamedSharding, or call the function under jax.set_mesh(mesh)."
        )
    entries = f.specs(dict(zip(axes, spec, strict=False))).value
    cut = fit_spec(entries, f.shape, mesh)
    return sharding.update(spec=cut) if named else cut
