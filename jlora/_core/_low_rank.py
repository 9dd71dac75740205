r"""What ΔW adds to a product with W.

$$h = s\,x A,\quad y = h B;\qquad \bar B = h^T \bar y,\quad \bar h = s\,\bar y B^T,\quad
\bar A = x^T \bar h,\quad \bar x = \bar h A^T.$$

The gradient of W, $x^T \bar y$, is never formed. JAX derives all of this from the two products, so
derivatives exist to any order, in both modes.
"""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding

from ._arrays import einsum
from ._axes import RANK, Axis

KEPT = 16  # h is kept for the backward pass where it is this many times smaller than x


class Spec(NamedTuple):
    """Which axes meet in x·p·q: axes that are contracted or batched have one name.

    Attributes:
        x: axes of the activation.
        p: axes of the factor that is contracted with x first.
        q: axes of the other factor.
        y: axes of the result.
        scale: s.
        dtype: dtype of the result.
        precision: as for `jax.lax.dot_general`.
        sharding: that of the result along explicit mesh axes, if there are any.
        gating: what becomes of s·x·p, a function of it and of the gate.
    """

    x: tuple[Axis, ...]
    p: tuple[Axis, ...]
    q: tuple[Axis, ...]
    y: tuple[Axis, ...]
    scale: float
    dtype: Any
    precision: Any
    sharding: NamedSharding | None
    gating: Callable[[jax.Array, jax.Array], jax.Array]

    @property
    def h(self) -> tuple[Axis, ...]:
        """Axes of s·x·p: those of x and p that y or q still needs."""
        return tuple(a for a in dict.fromkeys(self.x + self.p) if a in self.y + self.q)

    def with_small_names(self) -> "Spec":
        """Gives the axes names that are the same for all products of one form."""
        known = dict.fromkeys(self.x + self.p + self.q + self.y)
        names = {a: Axis(i) for i, a in enumerate(known)} | {RANK: RANK}
        x, p, q, y = (tuple(names[a] for a in axes) for axes in self[:4])
        return self._replace(x=x, p=p, q=q, y=y)


def low_rank(
    specs: Sequence[Spec],
    x: jax.Array,
    ps: Sequence[jax.Array],
    qs: Sequence[jax.Array],
    gates: Sequence[jax.Array | None],
) -> list[jax.Array]:
    """s·(x·p)·q for each p and q, over the axes that `specs` name.

    The activation is read once for all p, which are concatenated, forward and backward, and what
    they add to its gradient is written once.

    Args:
        specs: for each product the axes, scale, dtype and precision. Where there are several, p has
            the contracted axes in the order of x, then the rank.
        x: activation, of any floating dtype; sums are in float32 or better.
        ps: factors in the dtype of `x`.
        qs: factors in the dtype of `x`.
        gates: for each product None, or what x·p is multiplied by, with the axes `spec.h`.

    Returns:
        Arrays with the axes `spec.y` and the dtype `spec.dtype`.
    """
    return _low_rank(tuple(spec.with_small_names() for spec in specs), x, ps, qs, gates)


# One program for all products of one form: traced once, however many layers there are.
@functools.partial(jax.jit, static_argnums=0)
def _low_rank(specs: tuple[Spec, ...], x: jax.Array, ps: Any, *rest: Any) -> list[jax.Array]:
    def products(x: jax.Array, ps: Any, *rest: Any) -> list[jax.Array]:
        # The backward pass keeps x, p, h and q, and not what becomes of them in either half.
        h = _recompute(functools.partial(_reduce, specs))(x, ps)
        return _recompute(functools.partial(_expand, specs))(h, *rest)

    products = products if is_kept(specs[0], x, ps[0]) else _recompute(products)
    return products(x, ps, *rest)


def _recompute(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f`; the backward pass keeps its arguments alone."""
    return jax.checkpoint(f, prevent_cse=False)


def is_kept(spec: Spec, x: jax.Array, p: jax.Array) -> bool:
    """Whether h is so small beside x that it is kept for the backward pass."""
    sizes = dict(zip(spec.x + spec.p, x.shape + p.shape, strict=True))
    return KEPT * math.prod(sizes[a] for a in spec.h) <= x.size


def _reduce(specs: tuple[Spec, ...], x: jax.Array, ps: Sequence[jax.Array]) -> jax.Array:
    """s·x·p for all p, concatenated along the rank."""
    spec = specs[0]
    ps = [p * jnp.asarray(s.scale, p.dtype) for s, p in zip(specs, ps, strict=True)]
    p = jnp.concatenate(ps, spec.p.index(RANK)) if len(ps) > 1 else ps[0]
    # Where a mesh leaves h in parts, XLA adds these up along with the model's own activations, in
    # one collective, if they have one dtype.
    return einsum(spec.x, spec.p, spec.h, x, p, dtype=x.dtype, precision=spec.precision)


def _expand(
    specs: tuple[Spec, ...],
    h: jax.Array,
    qs: Sequence[jax.Array],
    gates: Sequence[jax.Array | None],
) -> list[jax.Array]:
    """For each q its part of h, times its gate and it."""
    parts = [h]
    if len(qs) > 1:
        ends = np.cumsum([q.shape[s.q.index(RANK)] for s, q in zip(specs, qs, strict=True)])
        parts = jnp.split(h, ends[:-1], specs[0].h.index(RANK))
    parts = [
        part if gate is None else spec.gating(part, gate)
        for spec, part, gate in zip(specs, parts, gates, strict=True)
    ]
    return list(map(_expand_part, specs, parts, qs))


def _expand_part(spec: Spec, h: jax.Array, q: jax.Array) -> jax.Array:
    """h·q; on a CPU as a product of two matrices, because only their hᵀ·ȳ is fast there."""
    how = {"precision": spec.precision, "dtype": spec.dtype}

    def straight(h: jax.Array, q: jax.Array) -> jax.Array:
        return einsum(spec.h, spec.q, spec.y, h, q, sharding=spec.sharding, **how)

    def flat(h: jax.Array, q: jax.Array) -> jax.Array:
        tokens, outputs = h.shape[:-1], q.shape[1:]
        h, q = h.reshape(math.prod(tokens), len(q)), q.reshape(len(q), math.prod(outputs))
        return einsum("ab", "bc", "ac", h, q, **how).reshape(*tokens, *outputs)

    tokens, outputs = spec.h[:-1], spec.q[1:]
    in_order = spec.h == tokens + spec.q[:1] and spec.y == tokens + outputs
    if not in_order or len(spec.y) == 2 or spec.sharding is not None:
        return straight(h, q)
    return lax.platform_dependent(h, q, cpu=flat, default=straight)
