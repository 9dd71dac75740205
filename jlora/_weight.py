r"""A weight on its way through the model: W, and beside it the factors of what is added to it.

The model transposes, reshapes, slices and scans its weights before it multiplies with them. A
`Weight` follows: each of its terms stands for

$$\Delta W = s \sum_r A[\ldots, r] \, B[r, \ldots]$$

and each axis of A and of B knows along which dimension of W it runs. So a transpose of W touches
neither A nor B, a slice of W's columns slices B alone, and ΔW is never formed.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from ._matmul import einsum, letters, promote

RANK = -1  # stands for the rank axis where an axis is named by its dimension of W
BROADCAST = -2  # stands for a new dimension along which W repeats

Dims = Sequence[int | None]
Along = Mapping[int, Callable[[jax.Array, int], jax.Array]]


class Unfactorable(Exception):  # noqa: N818 - a signal to the interpreter, never the user's error
    """The result of an operation on W has no factored form."""


class Term(Protocol):
    """What travels with W: `Delta` in `apply`, `Probe` while sites are searched."""

    @property
    def whole(self) -> bool:
        """Whether W may be joined only with other weights, not with arrays that have no term."""
        ...

    def move(self, dims: Dims, along: Along) -> "Term":
        """Follows W to dimensions `dims`: old ones, `BROADCAST`, or None for a new one of length 1."""
        ...

    def reshape(self, old: tuple[int, ...], new: tuple[int, ...]) -> "Term":
        """Follows W from shape `old` to `new`; `Unfactorable` if that mixes A's and B's axes."""
        ...

    def pad(self, config: Sequence[tuple[int, int, int]]) -> "Term":
        """Follows W through `lax.pad`: ΔW is zero where W is padded."""
        ...

    def map(self, f: Callable[[jax.Array], jax.Array]) -> "Term":
        """Applies to A and B what was applied to W, element for element."""
        ...

    def scale_by(self, scalar: jax.Array) -> "Term":
        """ΔW times a scalar."""
        ...

    def unstack(self) -> tuple[Any, Callable[[Any], "Term"]]:
        """What a scan over dimension 0 of W scans over, and the term made from one slice of it."""
        ...

    def specs(self, spec: PartitionSpec) -> "Term":
        """The partition of A and B, in their places, where W's is `spec`."""
        ...

    def use(self, kind: str, roles: "Roles", product: Callable[["Delta"], jax.Array]) -> Any:
        """`product(self)`, what ΔW adds to a linear use of W, or None."""
        ...

    def indexed(self, dims: Sequence[int]) -> "Term":
        """Notes that one place was picked, at run time, along each of `dims`."""
        ...

    @property
    def row(self) -> bool:
        """Whether W has come down to one row, so that ΔW costs no more than an activation."""
        ...

    def follows(self, indexed: Sequence[int], others: int) -> bool:
        """Whether looking up rows along `indexed`, with `others` whole, gives a weight again."""
        ...

    def look_up(self, f: Callable[["Factor"], "Factor"], dims: Dims, indexed: Sequence[int]) -> "Term":
        """Follows W through a gather: `f` gathers a factor, None in `dims` is an index's axis."""
        ...

    def dense(self, shape: tuple[int, ...], why: str) -> jax.Array | None:
        """ΔW of shape `shape`, or None."""
        ...


@dataclasses.dataclass(frozen=True)
class Roles:
    """The dimensions of W that a linear operation batches, contracts and keeps."""

    stack: tuple[int, ...]
    inputs: tuple[int, ...]
    outputs: tuple[int, ...]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Weight:
    """W with the terms of ΔW."""

    value: Any
    terms: tuple[Any, ...]
    path: str = dataclasses.field(metadata={"static": True})
    materialize: bool = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of W."""
        return self.value.shape

    def with_terms(self, value: Any, f: Callable[[Any], Any] = lambda t: t) -> "Weight":
        """W replaced by `value`, each term by `f` of it."""
        return dataclasses.replace(self, value=value, terms=tuple(f(t) for t in self.terms))

    def move(self, value: Any, dims: Dims, along: Along | None = None) -> "Weight":
        """See `Term.move`."""
        return self.with_terms(value, lambda t: t.move(dims, along or {}))

    def dense(self, why: str) -> Any:
        """W + ΔW, added in float32 or better and rounded once to W's dtype."""
        deltas = [d for t in self.terms if (d := t.dense(self.shape, why)) is not None]
        return add(self.value, *deltas)


def add(w: Any, *deltas: jax.Array) -> Any:
    """The sum in float32 or better, rounded once to the dtype of `w`."""
    if not deltas:
        return w
    wide = promote(w.dtype, jnp.float32)
    return sum((d.astype(wide) for d in deltas), start=w.astype(wide)).astype(w.dtype)


# ------------------------------------------------------------------------------------- factors


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Factor:
    """A, B or the dropout keys: an array, and the dimension of W that each of its axes follows."""

    value: Any
    dims: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    def axis(self, dim: int) -> int:
        """The axis that follows dimension `dim`."""
        return self.dims.index(dim)

    def move(self, dims: Dims, along: Along) -> "Factor":
        """See `Term.move`."""
        value = self.value
        for axis, dim in enumerate(self.dims):
            if dim in along:
                value = along[dim](value, axis)
        new = {old: i for i, old in enumerate(dims) if old is not None and old >= 0} | {RANK: RANK}
        lost = [axis for axis, dim in enumerate(self.dims) if dim not in new]
        kept = tuple(new[dim] for dim in self.dims if dim in new)
        return Factor(lax.squeeze(value, lost) if lost else value, kept)

    def carry(self, dim: int, length: int = 1) -> "Factor":
        """The same with a leading axis for a dimension of W that it does not follow."""
        if dim in self.dims:
            return self
        value = jnp.broadcast_to(self.value, (length, *self.value.shape))
        return Factor(value, (dim, *self.dims))

    def reshape(self, groups: Sequence["Group"]) -> "Factor":
        """Follows W through a reshape that is the product of `groups`."""
        value, dims = self.value, self.dims
        for group in groups:
            mine = [d for d in group.old if d in dims]
            if not mine:
                continue
            if missing := [d for d in group.old if d not in dims and group.sizes[d] > 1]:
                if any(group.sizes[d] > 1 for d in mine):
                    raise Unfactorable(f"dimensions {missing} and {mine} are merged")
                squeezed = [dims.index(d) for d in mine]
                value = lax.squeeze(value, squeezed)
                dims = tuple(d for d in dims if d not in mine)
                continue
            # Bring the group's axes together, in W's order, at the place of the first of them.
            rest = [i for i, d in enumerate(dims) if d not in mine]
            at = sum(i < dims.index(mine[0]) for i in rest)
            order = rest[:at] + [dims.index(d) for d in mine] + rest[at:]
            value = lax.transpose(value, order)
            lengths = [value.shape[i] for i in range(len(order))]
            value = lax.reshape(value, (*lengths[:at], *group.lengths, *lengths[at + len(mine) :]))
            left, right = [dims[i] for i in rest[:at]], [dims[i] for i in rest[at:]]
            # New dimensions are negative until every group is done, as old ones still mean old.
            dims = (*left, *(_fresh(d) for d in group.new), *right)
        return Factor(value, tuple(_settled(d) for d in dims))

    def arrange(self, dims: Sequence[int]) -> jax.Array:
        """The array with its axes in the order of `dims`, of length 1 where it follows none."""
        value = self.value
        lost = [axis for axis, d in enumerate(self.dims) if d not in dims]
        value = lax.squeeze(value, lost) if lost else value
        kept = [d for d in self.dims if d in dims]
        value = lax.transpose(value, [kept.index(d) for d in dims if d in kept])
        return lax.expand_dims(value, [i for i, d in enumerate(dims) if d not in kept])

    def label(self, names: Sequence[str], rank: str = "Z") -> str:
        """A letter an axis: that of its dimension in `names`, or `rank`."""
        return "".join(rank if d == RANK else names[d] for d in self.dims)

    def spec(self, spec: PartitionSpec) -> "Factor":
        """The partition of this factor, in its place."""
        full = tuple(spec)
        parts = [full[d] if 0 <= d < len(full) else None for d in self.dims]
        return Factor(PartitionSpec(*parts), self.dims)


def _fresh(dim: int) -> int:
    return -2 - dim


def _settled(dim: int) -> int:
    return -2 - dim if dim <= -2 else dim


@dataclasses.dataclass(frozen=True)
class Group:
    """The dimensions `old` that a reshape turns into the dimensions `new` of `lengths`."""

    old: tuple[int, ...]
    sizes: Mapping[int, int]
    new: tuple[int, ...]
    lengths: tuple[int, ...]


def reshape_groups(old: tuple[int, ...], new: tuple[int, ...]) -> list[Group]:
    """The finest factorization of a reshape of `old` to `new` into independent reshapes.

    >>> [(g.old, g.new) for g in reshape_groups((6, 4, 5), (2, 3, 20))]
    [((0,), (0, 1)), ((1, 2), (2,))]
    """
    if 0 in old:
        raise Unfactorable("a dimension is empty")
    groups, i, j = [], 0, 0
    while i < len(old) or j < len(new):
        i0, j0, a, b = i, j, 1, 1
        while (i, j) == (i0, j0) or a != b:
            if i < len(old) and (a <= b or j == len(new)):
                a, i = a * old[i], i + 1
            else:
                b, j = b * new[j], j + 1
        groups.append(
            Group(tuple(range(i0, i)), dict(enumerate(old)), tuple(range(j0, j)), new[j0:j])
        )
    return groups


# --------------------------------------------------------------------------------------- delta


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Delta:
    """ΔW = scale · A·B; with keys, as a map of activations, a dropout before A."""

    a: Factor
    b: Factor
    key: Factor | None
    scale: float = dataclasses.field(metadata={"static": True})
    dropout: float = dataclasses.field(metadata={"static": True})

    @property
    def whole(self) -> bool:
        """See `Term.whole`: what has no term may be a weight that no rule names."""
        return False

    def map_factors(self, f: Callable[[Factor], Factor]) -> "Delta":
        """`f` of A, of B and of the keys."""
        key = None if self.key is None else f(self.key)
        return dataclasses.replace(self, a=f(self.a), b=f(self.b), key=key)

    def move(self, dims: Dims, along: Along) -> "Delta":
        """See `Term.move`."""
        return self.map_factors(lambda f: f.move(dims, along))

    def reshape(self, old: tuple[int, ...], new: tuple[int, ...]) -> "Delta":
        """See `Term.reshape`."""
        groups = reshape_groups(old, new)
        return self.map_factors(lambda f: f.reshape(groups))

    def pad(self, config: Sequence[tuple[int, int, int]]) -> "Delta":
        """See `Term.pad`."""
        padded = [d for d, c in enumerate(config) if tuple(c) != (0, 0, 0)]
        a, b = self.a, self.b
        for d in padded:
            a = a if d in b.dims else a.carry(d)

        def pad(f: Factor) -> Factor:
            value = f.value
            pads = [config[d] if d in padded else (0, 0, 0) for d in f.dims]
            return Factor(lax.pad(value, jnp.zeros((), value.dtype), pads), f.dims)

        if self.key is not None and set(padded) & set(self.key.dims):
            raise Unfactorable("a stack with dropout keys is padded")
        return dataclasses.replace(self, a=pad(a), b=pad(b))

    def map(self, f: Callable[[jax.Array], jax.Array]) -> "Delta":
        """See `Term.map`."""
        return self.map_factors(lambda x: Factor(f(x.value), x.dims))

    def scale_by(self, scalar: jax.Array) -> "Delta":
        """See `Term.scale_by`."""
        value = self.b.value
        return dataclasses.replace(
            self, b=Factor(value * jnp.asarray(scalar).astype(value.dtype), self.b.dims)
        )

    def unstack(self) -> tuple[Any, Callable[[Any], "Delta"]]:
        """See `Term.unstack`."""
        stacked = self.map_factors(
            lambda f: (
                Factor(jnp.moveaxis(f.value, f.axis(0), 0), (0, *(d for d in f.dims if d != 0)))
                if 0 in f.dims
                else f
            )
        )
        factors = [f for f in (stacked.a, stacked.b, stacked.key) if f is not None]
        xs = [f.value if 0 in f.dims else None for f in factors]

        def inside(xs: list[Any]) -> "Delta":
            new = [
                Factor(
                    f.value if x is None else x,
                    tuple(d if d == RANK else d - 1 for d in f.dims if d != 0),
                )
                for f, x in zip(factors, xs, strict=True)
            ]
            key = new[2] if len(new) > 2 else None
            return dataclasses.replace(self, a=new[0], b=new[1], key=key)

        return xs, inside

    def specs(self, spec: PartitionSpec) -> "Delta":
        """See `Term.specs`."""
        return self.map_factors(lambda f: f.spec(spec))

    def use(self, kind: str, roles: Roles, product: Callable[["Delta"], jax.Array]) -> Any:
        """See `Term.use`."""
        del kind, roles
        return product(self)

    def indexed(self, dims: Sequence[int]) -> "Delta":
        """See `Term.indexed`."""
        del dims
        return self

    @property
    def row(self) -> bool:
        """See `Term.row`."""
        return any(
            all(n == 1 for d, n in zip(f.dims, f.value.shape, strict=True) if d != RANK)
            for f in (self.a, self.b)
        )

    def follows(self, indexed: Sequence[int], others: int) -> bool:
        """See `Term.follows`."""
        del others
        return all(d in self.a.dims and d in self.b.dims for d in indexed)

    def look_up(self, f: Callable[[Factor], Factor], dims: Dims, indexed: Sequence[int]) -> "Delta":
        """See `Term.look_up`."""
        del dims, indexed
        return self.map_factors(f)

    def form(self) -> Any:
        """Structure and shapes: terms of one form can be joined."""
        return jax.tree.structure(self), jax.tree.map(jnp.shape, self)

    def dense(self, shape: tuple[int, ...], why: str) -> jax.Array:
        """See `Term.dense`."""
        if self.key is not None and not self.row:
            raise ValueError(
                f"dropout cannot act where W + ΔW is formed ({why}): there is no input to drop. "
                "Call `apply` without `jlora.dropout`, or give this site a rule with dropout=0."
            )
        names = letters(len(shape))
        a, b = self.a, self.b
        out = [d for d in range(len(shape)) if d in a.dims or d in b.dims]
        wide = promote(a.value.dtype, b.value.dtype, jnp.float32)
        delta = einsum(
            a.label(names),
            b.label(names),
            "".join(names[d] for d in out),
            a.value.astype(wide),
            b.value.astype(wide),
            precision=lax.Precision.HIGHEST,
        )
        return self.scale * self.drop(jnp.ones((), wide)) * lax.broadcast_in_dim(delta, shape, out)

    def split(self, contracted: Sequence[int]) -> tuple[Factor, Factor]:
        """The two factors, first the one to contract an activation with over `contracted`."""
        first = lambda f: sum(d in f.dims for d in contracted)  # noqa: E731
        return (self.a, self.b) if first(self.a) >= first(self.b) else (self.b, self.a)

    def drop(self, x: jax.Array) -> jax.Array:
        """Drops entries of the input `x` of A with probability `dropout`, and rescales the rest."""
        if self.key is None:
            return x
        key = self.key.value
        keep = jax.random.bernoulli(key if key.ndim == 0 else key.ravel()[0], 1 - self.dropout, x.shape)
        return jnp.where(keep, x / jnp.asarray(1 - self.dropout, x.dtype), jnp.zeros((), x.dtype))
