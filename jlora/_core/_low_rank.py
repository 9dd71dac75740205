r"""What ΔW adds to a product with W.

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
    """s·(x·p)·q, where axes that are contracted or batched have one name.

    Attributes:
        p: the factor that is contracted with the activation first.
        q: the other factor.
        gate: what x·p is multiplied by, or None.
        x: axes of the activation.
        y: axes of the result.
        scale: s.
        dtype: dtype of the result.
        precision: as for `jax.lax.dot_general`.
        sharding: that of the result along explicit mesh axes, if there are any.
        gating: computes what s·x·p becomes from it and the gate.
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
        """Axes of s·x·p: those of x and p that y or q still needs."""
        known = dict.fromkeys(self.x + self.p.axes)
        return tuple(a for a in known if a in self.y + self.q.axes)

    def with_small_names(self) -> "Term":
        """Gives the axes names that are the same for all products of one form."""
        known = dict.fromkeys(self.x + self.p.axes + self.q.axes + self.y)
        names = {a: Axis(i) for i, a in enumerate(known)} | {RANK: RANK}
        x, y = (tuple(names[a] for a in axes) for axes in (self.x, self.y))
        return dataclasses.replace(map_factors(lambda f: f.rename(names), self), x=x, y=y)

    def is_kept(self, x: jax.Array) -> bool:
        """Whether h is so small beside the activation `x` that the backward pass keeps it."""
        sizes = dict(zip(self.x + self.p.axes, x.shape + self.p.shape, strict=True))
        return KEPT * math.prod(sizes[a] for a in self.h) <= x.size


def low_rank(terms: Sequence[Term], x: jax.Array) -> list[jax.Array]:
    """Computes s·(x·p)·q for each term.

    The activation is read once for all p, which are concatenated, forward and backward, and what
    they add to its gradient is written once.

    Args:
        terms: factors in the dtype of `x`. Where there are several, each p has the contracted axes
            in the order of x, then the rank.
        x: activation, of any floating dtype; sums are in float32 or better.

    Returns:
        Arrays with the axes and the dtype that each term tells.
    """
    return _low_rank([term.with_small_names() for term in terms], x)


@jax.jit  # one program for all products of one form: traced once, however many layers there are
def _low_rank(terms: list[Term], x: jax.Array) -> list[jax.Array]:
    def products(x: jax.Array, terms: list[Term]) -> list[jax.Array]:
        # The backward pass keeps x, p, h and q, and not what becomes of them in either half.
        return _recompute(_expand)(_recompute(_reduce)(x, terms), terms)

    return (products if terms[0].is_kept(x) else _recompute(products))(x, terms)


def _recompute(f: Callable[..., Any]) -> Callable[..., Any]:
    """Makes the backward pass of `f` keep nothing but its arguments."""
    return jax.checkpoint(f, prevent_cse=False)


def _reduce(x: jax.Array, terms: list[Term]) -> jax.Array:
    """Computes s·x·p for all p, concatenated along the rank."""
    first = terms[0]
    # float16 would overflow, or round to 0, before the scale is applied.
    late = jnp.finfo(x.dtype).minexp < -100
    ps = [t.p.value if late else t.p.value * jnp.asarray(t.scale, t.p.dtype) for t in terms]
    p = jnp.concatenate(ps, first.p.axis(RANK)) if len(ps) > 1 else ps[0]
    # Where a mesh leaves h in parts, XLA adds these up along with the model's own activations, in
    # one collective, if they have one dtype.
    how = {"dtype": x.dtype, "precision": first.precision}
    h = einsum(first.x, first.p.axes, first.h, x, p, **how)
    if not late:
        return h
    # XLA for TPUs would write a scaled A to memory, and fuse less around the products.
    scales = np.concatenate([np.full(term.q.length(RANK), term.scale) for term in terms])
    return h * jnp.asarray(scales.reshape([-1 if a == RANK else 1 for a in first.h]), h.dtype)


def _expand(h: jax.Array, terms: list[Term]) -> list[jax.Array]:
    """Multiplies each q with its part of h, to which its gate is applied."""
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
    """Computes h·q; on a CPU as a product of matrices, because only their hᵀ·ȳ is fast there."""
    how, of_q = {"precision": term.precision, "dtype": term.dtype}, term.q.axes

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
