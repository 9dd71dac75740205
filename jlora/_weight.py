r"""A weight on its way through the model: W, and beside it the factors of what is added to it.

The model transposes, reshapes, slices and scans its weights before it multiplies with them. A
`Weight` follows: each of its terms stands for

$$\Delta W = s \sum_r A[\ldots, r] \, B[r, \ldots]$$

and each axis of A and of B knows along which dimension of W it runs. So a transpose of W touches
neither A nor B, a slice of W's columns slices B alone, and ΔW is never formed.
"""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any, Protocol

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from ._factor import Along, Dims, Factor
from ._matmul import promote


class Term(Protocol):
    """What travels with W: `Delta` in `apply`, `Probe` while sites are searched."""

    @property
    def whole(self) -> bool:
        """Whether W may be joined only with other weights, not with arrays that have no term."""
        ...

    def move(self, dims: Dims, along: Along) -> "Term":
        """Follows W to dimensions `dims`: old ones, `BROADCAST`, or None for one of length 1."""
        ...

    def reshape(self, old: tuple[int, ...], new: tuple[int, ...]) -> "Term":
        """Follows W from shape `old` to `new`; `Unfactorable` if that mixes A's and B's axes."""
        ...

    def pad(self, config: Sequence[tuple[int, int, int]], shape: tuple[int, ...]) -> "Term":
        """Follows W of `shape` through `lax.pad`: ΔW is zero where W is padded."""
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

    def use(self, kind: str, roles: "Roles", product: Callable[[Any], jax.Array]) -> Any:
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

    def look_up(self, f: Callable[[Factor], Factor], dims: Dims, indexed: Sequence[int]) -> "Term":
        """Follows W through a gather: `f` gathers a factor, None in `dims` is an index's axis."""
        ...

    def dense(self, w: Any, why: str) -> jax.Array | None:
        """ΔW for `w`, in float32 or better, or None."""
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
        deltas = [d for t in self.terms if (d := t.dense(self.value, why)) is not None]
        return add(self.value, *deltas)


def placed(term: Any, mesh: Any, spec: PartitionSpec) -> Any:
    """`term` with A and B resharded to lie on `mesh` as a weight does whose partition is `spec`."""

    def place(x: jax.Array, spec: PartitionSpec) -> jax.Array:
        return jax.sharding.reshard(x, NamedSharding(mesh, spec))

    return jax.tree.map(place, term, term.specs(spec))


def add(w: Any, *deltas: jax.Array) -> Any:
    """The sum in float32 or better, rounded once to the dtype of `w`."""
    if not deltas:
        return w
    wide = promote(w.dtype, jnp.float32)
    return sum((d.astype(wide) for d in deltas), start=w.astype(wide)).astype(w.dtype)


def value_of(x: Any) -> Any:
    """W of a `Weight`; an array as it is."""
    return x.value if isinstance(x, Weight) else x
