r"""A weight on its way through the model, with the change that an adapter makes to it.

$$W' = g \odot \Big(W + \sum_i s_i A_i B_i\Big)$$

where each $A_i B_i$ is summed over the rank, and the gain g is constant along some axes of W. That
is all that the interpreter knows of any method. ΔW is never formed on the way.
"""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from .. import _compat
from ._axes import RANK, Along, Axis, Factor, Unfactorable, axes_of_leaf, reshape_groups
from ._product import einsum, letters, promote
from ._uses import Uses

FUSED = 16  # the largest rank at which a sum of outer products is faster than a matrix product


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Delta:
    """ΔW = scale · A·B; with keys, as a map of activations, a dropout before A."""

    a: Factor
    b: Factor
    scale: float = dataclasses.field(metadata={"static": True})
    key: Factor | None = None
    dropout: float = dataclasses.field(default=0.0, metadata={"static": True})

    def formed(self, axes: Sequence[Axis], dtype: Any) -> jax.Array:
        """ΔW, of length 1 along axes of W that neither A nor B follows."""
        wide = promote(dtype, self.a.value.dtype, self.b.value.dtype, jnp.float32)
        a, b = (f.replace(f.value.astype(wide)) for f in (self.a, self.b))
        a = a.replace(self.scale * self.drop(jnp.ones((), wide)) * a.value)
        return _formed(tuple(axes), a, b)

    def by_order(self, contracted: Sequence[Axis]) -> tuple[Factor, Factor]:
        """A and B, first the one to contract an activation with over `contracted`."""
        in_a, in_b = (sum(axis in f.axes for axis in contracted) for f in (self.a, self.b))
        return (self.a, self.b) if in_a >= in_b else (self.b, self.a)

    def drop(self, x: jax.Array) -> jax.Array:
        """Drops entries of the input `x` of A with probability `dropout`, and rescales the rest."""
        if self.key is None:
            return x
        key = self.key.value if self.key.value.ndim == 0 else self.key.value.ravel()[0]
        # Inside the model's own shard_map, each shard of x has inputs of its own.
        for axis in sorted(_compat.varying(x) - _compat.varying(key), key=str):
            key = jax.random.fold_in(key, lax.axis_index(axis))
        keep = jax.random.bernoulli(key, 1 - self.dropout, x.shape)
        return jnp.where(keep, x / jnp.asarray(1 - self.dropout, x.dtype), jnp.zeros((), x.dtype))

    @property
    def is_row(self) -> bool:
        """Whether ΔW costs no more than an activation: A or B has an entry for each of the rank."""
        return self.a.is_row or self.b.is_row


class NotInvertibleError(ValueError):
    """The weight before a change does not follow from that after it."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Change:
    """What an adapter makes of W: gain · (W + the sum of the deltas)."""

    deltas: tuple[Delta, ...] = ()
    gain: Factor | None = None

    def map(self, f: Callable[[Factor], Any]) -> "Change":
        """`f` of each factor."""
        return jax.tree.map(f, self, is_leaf=is_factor)

    def of(self, w: jax.Array, axes: Sequence[Axis], sign: int = 1) -> jax.Array:
        """The changed `w`, computed in float32 or better and rounded once to its dtype.

        With `sign` -1 the weight of which `w` is the changed one.
        """
        if self.gain is not None and sign < 0:
            raise NotInvertibleError("its gain may depend on the weight before")
        wide = promote(w.dtype, jnp.float32)
        delta = sum((d.formed(axes, w.dtype) for d in self.deltas), start=jnp.zeros((), wide))
        if self.deltas:
            w = _plus(w if self.gain is None else w.astype(wide), sign * delta)
        if self.gain is None:
            return w
        return (w.astype(wide) * self.gain.arranged(axes).astype(wide)).astype(w.dtype)


def is_factor(x: Any) -> bool:
    """Whether `x` is a `Factor`."""
    return isinstance(x, Factor)


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
        value: W as it stands.
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

    def replace(self, value: Any, change: Change | None = None, **fields: Any) -> "Weight":
        """The same with another value."""
        change = self.change if change is None else change
        return dataclasses.replace(self, value=value, change=change, **fields)

    def moved(self, value: Any, axes: Sequence[Axis]) -> "Weight":
        """Follows W to `value`, whose axes are some of its own and new ones."""
        lost = [a for a in self.axes if a not in axes]
        change = self.change.map(lambda f: f.without(lost)) if lost else self.change
        return self.replace(value, change, axes=tuple(axes))

    def along(self, value: Any, functions: Along) -> "Weight":
        """Follows W to `value`, on which `functions` act, each along one axis."""
        return self.replace(value, self.change.map(lambda f: f.along(functions)))

    def reshaped(self, value: Any) -> "Weight":
        """Follows W to another shape; `Unfactorable` if that merges axes of A with axes of B."""
        groups, axes = reshape_groups(self.axes, self.shape, value.shape)
        gain = self.change.gain and self.change.gain.reshaped(groups, ())
        deltas = [
            dataclasses.replace(
                d,
                a=d.a.reshaped(groups, [d.b]),
                b=d.b.reshaped(groups, [d.a]),
                key=d.key and d.key.reshaped(groups, [d.a, d.b]),
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
            return dataclasses.replace(d, a=pad(a, 0), b=pad(d.b, 0))

        gain = self.change.gain
        if gain is not None:
            for axis in pads:
                gain = gain.repeated(axis, lengths[axis])
            gain = pad(gain, 1)
        return self.replace(value, Change(tuple(map(delta, self.change.deltas)), gain))

    def scaled(self, value: Any, scalar: jax.Array) -> "Weight":
        """Follows W, times `scalar`, to `value`."""
        varying = frozenset() if _compat.is_concrete(scalar) else self.source.unchecked

        def delta(d: Delta) -> Delta:
            # The scalar may be complex, or beyond the range of B's dtype.
            dtype = promote(d.b.value.dtype, jnp.result_type(scalar))
            b = d.b.value.astype(dtype) * jnp.asarray(scalar).astype(dtype)
            return dataclasses.replace(d, b=d.b.replace(b).may_vary(varying))

        return self.replace(value, Change(tuple(map(delta, self.change.deltas)), self.change.gain))

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
        change = self.change.map(lambda f: f.repeated(first, length).to_front([first]))
        return self.replace(self.value, change)

    def of_slice(self) -> "Weight":
        """What a scan over a `stacked` weight gives, with its own axes."""
        change = self.change.map(lambda f: f.replace(f.value, f.axes[1:]))
        return self.replace(self.value, change, axes=self.axes[1:])

    def specs(self, spec: Any) -> "Weight":
        """The partition of W and of each factor, in their places, where W's is `spec`."""
        by_axis = dict(zip(self.axes, spec, strict=False))
        return self.replace(spec, self.change.map(lambda f: f.replace(f.spec(by_axis))))

    def within_shards(self, spec: Any, unchecked: frozenset[Any]) -> "Weight":
        """The same within a `shard_map` over whose axes `unchecked` JAX does not check it."""
        by_axis = dict(zip(self.axes, spec, strict=False))

        def shard(f: Factor) -> Factor:
            names = {n for a in f.axes for n in _mesh_axes(by_axis.get(a))}
            return f.may_vary(names & unchecked)

        source = self.source._replace(unchecked=self.source.unchecked | unchecked)
        return self.replace(self.value, self.change.map(shard), source=source)

    def placed(self, mesh: Any, spec: Any) -> "Weight":
        """With the factors resharded to lie on `mesh` as those of a weight of partition `spec`."""

        def place(x: jax.Array, spec: Any) -> jax.Array:
            return jax.sharding.reshard(x, NamedSharding(mesh, spec))

        return self.replace(self.value, jax.tree.map(place, self.change, self.specs(spec).change))

    @property
    def is_row(self) -> bool:
        """Whether the change costs no more than an activation."""
        if not self.change.deltas:
            return sum(n > 1 for n in self.shape) <= 1
        return all(d.is_row for d in self.change.deltas)

    def formed(self, why: str) -> Any:
        """The changed W; ValueError where a dropout has no input to drop, `why` it is formed."""
        for d in self.change.deltas:
            if d.key is not None and not d.a.is_row:
                raise ValueError(
                    f"dropout cannot act where W + ΔW is formed ({why}): there is no input to "
                    "drop. Give this site a rule with dropout=0."
                )
        return self.change.of(self.value, self.axes)


def _mesh_axes(entry: Any) -> tuple[Any, ...]:
    return entry if isinstance(entry, tuple) else (entry,)


def leaf_weight(value: Any, change: Change, path: str, materialize: bool) -> Weight:
    """The weight that is the leaf at `path`."""
    axes, unchecked = axes_of_leaf(path, value.ndim), _compat.unchecked_axes()
    names = {Axis(d): axis for d, axis in enumerate(axes)}
    change = change.map(lambda f: f.renamed(names).may_vary(unchecked))
    # The model must be traced with a weight that varies over a mesh as W' does.
    value = _compat.vary_with(value, jax.tree.leaves(change))
    return Weight(value, change, axes, Source((path,), materialize, unchecked=unchecked))


def value_of(x: Any) -> Any:
    """W of a `Weight`; an array as it is."""
    return x.value if isinstance(x, Weight) else x


@jax.custom_jvp
def _plus(w: jax.Array, change: jax.Array) -> jax.Array:
    # A change of zero leaves every bit, also of -0.0 and of subnormals; the derivative is a sum's.
    wide = promote(w.dtype, jnp.float32)
    old = w.astype(wide)
    new = old + change.astype(wide)
    return jnp.where(new == old, old, new).astype(w.dtype)


@_plus.defjvp
def _plus_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    wide = promote(primals[0].dtype, jnp.float32)
    tangent = tangents[0].astype(wide) + tangents[1].astype(wide)
    return _plus(*primals), tangent.astype(primals[0].dtype)


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _formed(axes: tuple[Axis, ...], a: Factor, b: Factor) -> jax.Array:
    """A·B with the axes `axes`, of length 1 where neither factor follows.

    Of low rank it is a sum of outer products, which XLA fuses with the sum with W: no array of the
    size of W is written for it. Its derivative is matrix products.
    """
    rank = a.length(RANK)
    return _outer_products(axes, a, b) if rank <= FUSED else _matrix_product(axes, a, b)


@_formed.defjvp
def _formed_jvp(axes: tuple[Axis, ...], primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (a, b), (da, db) = primals, tangents
    return _formed(axes, a, b), _matrix_product(axes, da, b) + _matrix_product(axes, a, db)


def _outer_products(axes: Sequence[Axis], a: Factor, b: Factor) -> jax.Array:
    def column(f: Factor, r: int) -> jax.Array:
        value = lax.index_in_dim(f.value, r, f.axis(RANK), keepdims=False)
        return f.replace(value, [x for x in f.axes if x != RANK]).arranged(axes)

    return functools.reduce(jnp.add, [column(a, r) * column(b, r) for r in range(a.length(RANK))])


def _matrix_product(axes: Sequence[Axis], a: Factor, b: Factor) -> jax.Array:
    names = lettered(axes)
    known = [axis for axis in axes if axis in a.axes or axis in b.axes]
    out = "".join(names[axis] for axis in known)
    delta = einsum(a.label(names), b.label(names), out, a.value, b.value, precision="highest")
    return lax.expand_dims(delta, [i for i, axis in enumerate(axes) if axis not in known])


def lettered(axes: Sequence[Axis]) -> dict[Axis, str]:
    """A letter for each axis and for the rank."""
    return dict(zip(axes, letters(len(axes)), strict=True)) | {RANK: "Z"}
