"""The term of ΔW that `apply` computes with: two factors, a scale and the keys of a dropout."""

import dataclasses
import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import PartitionSpec

from . import _compat
from ._factor import RANK, Along, Dims, Factor, Unfactorable, reshape_groups
from ._matmul import einsum, letters, promote
from ._weight import Roles

FUSED = 8  # the largest rank at which a sum of outer products is faster than a matrix product


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

    def pad(self, config: Sequence[tuple[int, int, int]], shape: tuple[int, ...]) -> "Delta":
        """See `Term.pad`."""
        padded = [d for d, c in enumerate(config) if tuple(c) != (0, 0, 0)]
        a, b = self.a, self.b
        for d in padded:
            a = a if d in b.dims else a.carry(d, shape[d])

        def pad(f: Factor) -> Factor:
            value = f.value
            pads = [config[d] if d in padded else (0, 0, 0) for d in f.dims]
            return Factor(lax.pad(value, jnp.zeros((), value.dtype), pads), f.dims)

        if self.key is not None and set(padded) & set(self.key.dims):
            raise Unfactorable("a stack with dropout keys is padded")
        return dataclasses.replace(self, a=pad(a), b=pad(b))

    def map(self, f: Callable[[jax.Array], jax.Array]) -> "Delta":
        """See `Term.map`."""
        a, b = (Factor(f(x.value), x.dims) for x in (self.a, self.b))
        return dataclasses.replace(self, a=a, b=b)

    def scale_by(self, scalar: jax.Array) -> "Delta":
        """See `Term.scale_by`."""
        # The scalar may be complex, or beyond the range of B's dtype.
        dtype = promote(self.b.value.dtype, jnp.result_type(scalar))
        value = self.b.value.astype(dtype) * jnp.asarray(scalar).astype(dtype)
        return dataclasses.replace(self, b=Factor(value, self.b.dims))

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
        return _is_row(self.a) or _is_row(self.b)

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

    def dense(self, w: Any, why: str) -> jax.Array:
        """See `Term.dense`."""
        if self.key is not None and not _is_row(self.a):
            raise ValueError(
                f"dropout cannot act where W + ΔW is formed ({why}): there is no input to drop. "
                "Give this site a rule with dropout=0."
            )
        wide = promote(w.dtype, self.a.value.dtype, self.b.value.dtype, jnp.float32)
        a, b = (Factor(f.value.astype(wide), f.dims) for f in (self.a, self.b))
        a = Factor(self.scale * self.drop(jnp.ones((), wide)) * a.value, a.dims)
        delta = _product(w.ndim, a, b)
        return lax.broadcast_in_dim(delta, w.shape, range(w.ndim))

    def split(self, contracted: Sequence[int]) -> tuple[Factor, Factor]:
        """The two factors, first the one to contract an activation with over `contracted`."""
        first = lambda f: sum(d in f.dims for d in contracted)  # noqa: E731
        return (self.a, self.b) if first(self.a) >= first(self.b) else (self.b, self.a)

    def complete(self, shape: tuple[int, ...], contracted: Sequence[int]) -> tuple[Factor, Factor]:
        """`split`, with the first factor along every dimension of W that neither follows."""
        p, q = self.split(contracted)
        for dim, length in enumerate(shape):
            p = p if dim in q.dims else p.carry(dim, length)
        return p, q

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


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def _product(ndim: int, a: Factor, b: Factor) -> jax.Array:
    """A·B with `ndim` dimensions, those of W, of length 1 where neither factor follows.

    Of low rank it is a sum of outer products, which XLA fuses with the sum with W: no array of the
    size of W is written for it. Its derivative is matrix products.
    """
    rank = a.value.shape[a.axis(RANK)]
    return _outer_products(ndim, a, b) if rank <= FUSED else _matrix_product(ndim, a, b)


@_product.defjvp
def _product_jvp(ndim: int, primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    (a, b), (da, db) = primals, tangents
    return _product(ndim, a, b), _matrix_product(ndim, da, b) + _matrix_product(ndim, a, db)


def _outer_products(ndim: int, a: Factor, b: Factor) -> jax.Array:
    def column(f: Factor, r: int) -> jax.Array:
        value = lax.slice_in_dim(f.value, r, r + 1, axis=f.axis(RANK))
        return Factor(value, f.dims).arrange(range(ndim))

    rank = a.value.shape[a.axis(RANK)]
    return functools.reduce(jnp.add, [column(a, r) * column(b, r) for r in range(rank)])


def _matrix_product(ndim: int, a: Factor, b: Factor) -> jax.Array:
    names, precision = letters(ndim), lax.Precision.HIGHEST
    dims = [d for d in range(ndim) if d in a.dims or d in b.dims]
    out = "".join(names[d] for d in dims)
    delta = einsum(a.label(names), b.label(names), out, a.value, b.value, precision=precision)
    return lax.expand_dims(delta, [d for d in range(ndim) if d not in dims])


def _is_row(factor: Factor) -> bool:
    """Whether it has one entry for each of the rank."""
    sizes = zip(factor.dims, factor.value.shape, strict=True)
    return all(n == 1 for d, n in sizes if d != RANK)
