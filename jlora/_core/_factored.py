r"""The product with ΔW, which is added to the product with W.

$$h = s\,x A,\quad y = h B;\qquad \bar B = h^T \bar y,\quad \bar h = s\,\bar y B^T,\quad
\bar A = x^T \bar h,\quad \bar x = \bar h A^T.$$

The gradient of W, $x^T \bar y$, is never formed. JAX derives all of this from the two products, so
derivatives exist to any order, in both modes.
"""

import dataclasses
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding

from .._arrays import einsum
from ._axes import RANK, Axis, map_factors
from ._change import Delta

KEPT = 16  # h is kept for the backward pass where it is this many times smaller than x


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Term:
    """s·(x·A)·B, in which contracted and batched axes have the same name.

    Attributes:
        delta: A, B, s and the gate, as of `Product.ordered`.
        x: axes of the activation.
        y: axes of the result.
        dtype: dtype of the result.
        precision: as for `jax.lax.dot_general`.
        sharding: the sharding of the result along explicit mesh axes, or None.
    """

    delta: Delta
    x: tuple[Axis, ...] = dataclasses.field(metadata={"static": True})
    y: tuple[Axis, ...] = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    precision: Any = dataclasses.field(metadata={"static": True})
    sharding: NamedSharding | None = dataclasses.field(metadata={"static": True})

    @property
    def h(self) -> tuple[Axis, ...]:
        """Axes of s·x·A: the axes of x and A that y or B has too."""
        known = dict.fromkeys(self.x + self.delta.a.axes)
        return tuple(a for a in known if a in self.y + self.delta.b.axes)

    def with_small_names(self) -> "Term":
        """Renames the axes so that all products of one form have the same names."""
        known = dict.fromkeys(self.x + self.delta.a.axes + self.delta.b.axes + self.y)
        names = {a: Axis(i) for i, a in enumerate(known)} | {RANK: RANK}
        x, y = (tuple(names[a] for a in axes) for axes in (self.x, self.y))
        return dataclasses.replace(map_factors(lambda f: f.rename(names), self), x=x, y=y)

    def is_kept(self, x: jax.Array) -> bool:
        """Whether the backward pass keeps h: it is much smaller than the activation `x`."""
        a = self.delta.a
        sizes = dict(zip(self.x + a.axes, x.shape + a.shape, strict=True))
        return KEPT * math.prod(sizes[a] for a in self.h) <= x.size


def low_rank(terms: Sequence[Term], x: jax.Array) -> list[jax.Array]:
    """Computes s·(x·A)·B for each term.

    All A are concatenated. So x is read once for all of them, forward and backward, and their
    contributions to its gradient are written once.

    Args:
        terms: factors in the dtype of `x`. If there are several, each A has the contracted axes in
            the order of x, then the rank.
        x: activation, of any floating dtype; sums are in float32 or better.

    Returns:
        Arrays with the axes and the dtype of each term.
    """
    return _low_rank([term.with_small_names() for term in terms], x)


@jax.jit  # traced once for all products of one form, however many layers there are
def _low_rank(terms: list[Term], x: jax.Array) -> list[jax.Array]:
    def products(x: jax.Array, terms: list[Term]) -> list[jax.Array]:
        # The backward pass keeps x, A, h and B, but nothing else of either half.
        return _recompute(_expand)(_recompute(_reduce)(x, terms), terms)

    return (products if terms[0].is_kept(x) else _recompute(products))(x, terms)


def _recompute(f: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the backward pass of `f` keep nothing but its arguments."""
    return jax.checkpoint(f, prevent_cse=False)


def _reduce(x: jax.Array, terms: list[Term]) -> jax.Array:
    """Computes s·x·A for all A, concatenated along the rank."""
    first, of_a = terms[0], terms[0].delta.a
    each = [term.delta.a.value for term in terms]
    a = jnp.concatenate(each, of_a.axis(RANK)) if len(each) > 1 else each[0]
    # If a mesh leaves h in partial sums, XLA adds them up in one collective with the activations
    # of the model, provided that both have one dtype.
    h = einsum(first.x, of_a.axes, first.h, x, a, dtype=x.dtype, precision=first.precision)
    # Scaling h, not A: on TPUs XLA would write a scaled A to memory, and fuse less.
    deltas = [term.delta for term in terms]
    scales = np.concatenate([np.full(d.b.length(RANK), d.scale) for d in deltas])
    return h * jnp.asarray(scales.reshape([-1 if a == RANK else 1 for a in first.h]), h.dtype)


def _expand(h: jax.Array, terms: list[Term]) -> list[jax.Array]:
    """Applies each gate to its part of h, and multiplies the part with B."""
    parts = [h]
    if len(terms) > 1:
        ends = np.cumsum([term.delta.b.length(RANK) for term in terms])
        parts = jnp.split(h, ends[:-1], terms[0].h.index(RANK))
    parts = [term.delta.apply_gate(h, term.h) for term, h in zip(terms, parts, strict=True)]
    return list(map(_expand_part, terms, parts))


def _expand_part(term: Term, h: jax.Array) -> jax.Array:
    """Computes h·B; on CPUs as a product of matrices, because hᵀ·ȳ is slow there for more axes."""
    how = {"precision": term.precision, "dtype": term.dtype}
    value, of_b = term.delta.b.value, term.delta.b.axes

    def straight(h: jax.Array, b: jax.Array) -> jax.Array:
        return einsum(term.h, of_b, term.y, h, b, sharding=term.sharding, **how)

    def flat(h: jax.Array, b: jax.Array) -> jax.Array:
        tokens, outputs = h.shape[:-1], b.shape[1:]
        h, b = h.reshape(math.prod(tokens), len(b)), b.reshape(len(b), math.prod(outputs))
        return einsum("ab", "bc", "ac", h, b, **how).reshape(*tokens, *outputs)

    tokens, outputs = term.h[:-1], of_b[1:]
    in_order = term.h == tokens + of_b[:1] and term.y == tokens + outputs
    if not in_order or len(term.y) == 2 or term.sharding is not None:
        return straight(h, value)
    return lax.platform_dependent(h, value, cpu=flat, default=straight)
