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

from ._arrays import einsum
from ._axes import RANK, Axis, Factor, map_factors

KEPT = 16  # h is kept for the backward pass where it is this many times smaller than x


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Term:
    """s·(x·p)·q, in which contracted and batched axes have the same name.

    Attributes:
        p: the factor that is contracted with the activation first.
        q: the other factor.
        gate: the gate of x·p, or None.
        x: axes of the activation.
        y: axes of the result.
        scale: s.
        dtype: dtype of the result.
        precision: as for `jax.lax.dot_general`.
        sharding: the sharding of the result along explicit mesh axes, or None.
        gating: a function of s·x·p and the gate, whose result replaces s·x·p.
    """

    p: Factor
    q: Factor
    gate: Factor | None
    x: tuple[Axis, ...] = dataclasses.field(metadata={"static": True})
    y: tuple[Axis, ...] = dataclasses.field(metadata={"static": True})
    scale: float = dataclasses.field(metadata={"static": True})
    dtype: Any = dataclasses.field(metadata={"static": True})
    precision: Any = dataclasses.field(metadata={"static": True})
    sharding: NamedSharding | None = dataclasses.field(metadata={"static": True})
    gating: Callable[..., jax.Array] = dataclasses.field(metadata={"static": True})

    @property
    def h(self) -> tuple[Axis, ...]:
        """Axes of s·x·p: the axes of x and p that y or q has too."""
        known = dict.fromkeys(self.x + self.p.axes)
        return tuple(a for a in known if a in self.y + self.q.axes)

    def with_small_names(self) -> "Term":
        """Renames the axes so that all products of one form have the same names."""
        known = dict.fromkeys(self.x + self.p.axes + self.q.axes + self.y)
        names = {a: Axis(i) for i, a in enumerate(known)} | {RANK: RANK}
        x, y = (tuple(names[a] for a in axes) for axes in (self.x, self.y))
        return dataclasses.replace(map_factors(lambda f: f.rename(names), self), x=x, y=y)

    def is_kept(self, x: jax.Array) -> bool:
        """Whether the backward pass keeps h: it is much smaller than the activation `x`."""
        sizes = dict(zip(self.x + self.p.axes, x.shape + self.p.shape, strict=True))
        return KEPT * math.prod(sizes[a] for a in self.h) <= x.size


def low_rank(terms: Sequence[Term], x: jax.Array) -> list[jax.Array]:
    """Computes s·(x·p)·q for each term.

    All p are concatenated. So x is read once for all of them, forward and backward, and their
    contributions to its gradient are written once.

    Args:
        terms: factors in the dtype of `x`. If there are several, each p has the contracted axes in
            the order of x, then the rank.
        x: activation, of any floating dtype; sums are in float32 or better.

    Returns:
        Arrays with the axes and the dtype of each term.
    """
    return _low_rank([term.with_small_names() for term in terms], x)


@jax.jit  # traced once for all products of one form, however many layers there are
def _low_rank(terms: list[Term], x: jax.Array) -> list[jax.Array]:
    def products(x: jax.Array, terms: list[Term]) -> list[jax.Array]:
        # The backward pass keeps x, p, h and q, but nothing else of either half.
        return _recompute(_expand)(_recompute(_reduce)(x, terms), terms)

    return (products if terms[0].is_kept(x) else _recompute(products))(x, terms)


def _recompute(f: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the backward pass of `f` keep nothing but its arguments."""
    return jax.checkpoint(f, prevent_cse=False)


def _reduce(x: jax.Array, terms: list[Term]) -> jax.Array:
    """Computes s·x·p for all p, concatenated along the rank."""
    first = terms[0]
    ps = [term.p.value for term in terms]
    p = jnp.concatenate(ps, first.p.axis(RANK)) if len(ps) > 1 else ps[0]
    # If a mesh leaves h in partial sums, XLA adds them up in one collective with the activations
    # of the model, provided that both have one dtype.
    how = {"dtype": x.dtype, "precision": first.precision}
    h = einsum(first.x, first.p.axes, first.h, x, p, **how)
    # Scaling h, not A: on TPUs XLA would write a scaled A to memory, and fuse less.
    scales = np.concatenate([np.full(term.q.length(RANK), term.scale) for term in terms])
    return h * jnp.asarray(scales.reshape([-1 if a == RANK else 1 for a in first.h]), h.dtype)


def _expand(h: jax.Array, terms: list[Term]) -> list[jax.Array]:
    """Applies each gate to its part of h, and multiplies the part with q."""
    parts = [h]
    if len(terms) > 1:
        ends = np.cumsum([term.q.length(RANK) for term in terms])
        parts = jnp.split(h, ends[:-1], terms[0].h.index(RANK))
    parts = [
        part if term.gate is None else term.gating(part, term.gate.expand_to(term.h))
        for term, part in zip(terms, parts, strict=True)
    ]
    return list(map(_expand_part, terms, parts))


def _expand_part(term: Term, h: jax.Array) -> jax.Array:
    """Computes h·q; on CPUs as a product of matrices, because hᵀ·ȳ is slow there for more axes."""
    how = {"precision": term.precision, "dtype": term.dtype}
    of_q = term.q.axes

    def straight(h: jax.Array, q: jax.Array) -> jax.Array:
        return einsum(term.h, of_q, term.y, h, q, sharding=term.sharding, **how)

    def flat(h: jax.Array, q: jax.Array) -> jax.Array:
        tokens, outputs = h.shape[:-1], q.shape[1:]
        h, q = h.reshape(math.prod(tokens), len(q)), q.reshape(len(q), math.prod(outputs))
        return einsum("ab", "bc", "ac", h, q, **how).reshape(*tokens, *outputs)

    tokens, outputs = term.h[:-1], of_q[1:]
    in_order = term.h == tokens + of_q[:1] and term.y == tokens + outputs
    if not in_order or len(term.y) == 2 or term.sharding is not None:
        return straight(h, term.q.value)
    return lax.platform_dependent(h, term.q.value, cpu=flat, default=straight)
