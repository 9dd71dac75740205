"""The matrices of a site, and the core space of several."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._adapters import LowRank
from .._alike import joined
from .._core import explicit
from .._linalg import qr, svd_of, times


def matrices(node: LowRank) -> tuple[jax.Array, jax.Array]:
    """s·A as (stack and slots…, inputs, r) and B as (stack and slots…, r, outputs)."""
    wide = jnp.promote_types(jnp.result_type(node.a, node.b), jnp.float32)
    a, b = (jnp.asarray(x, wide) for x in (node.a, node.b))
    n = len(node.layout.stack) + (node.layout.slots is not None)
    lead, rank = a.shape[:n], a.shape[-1]
    return node.scale * a.reshape(*lead, -1, rank), b.reshape(*lead, rank, -1)


def made(
    make: Callable[..., tuple[jax.Array, jax.Array]], nodes: Sequence[LowRank], *operands: Any
) -> LowRank:
    """The node of such matrices that `make` makes, of scale 1, in the dtypes of `nodes`.

    Along explicit axes of a mesh its A and B lie as those of the first node.
    """
    like = nodes[0]
    n = len(like.layout.stack) + (like.layout.slots is not None)

    def shaped(nodes: Sequence[LowRank], *operands: Any) -> tuple[jax.Array, jax.Array]:
        a, b = make(nodes, *operands)
        rank = a.shape[-1]
        a = a.reshape(*like.a.shape[:-1], rank).astype(jnp.result_type(*(x.a for x in nodes)))
        b = b.reshape(*like.b.shape[:n], rank, *like.b.shape[n + 1 :])
        return a, b.astype(jnp.result_type(*(x.b for x in nodes)))

    places = explicit(like.a), explicit(like.b)
    in_place: Any = shaped
    if None not in places:
        in_place = jax.sharding.auto_axes(shaped, out_sharding=places)
    a, b = in_place(nodes, *operands)
    return joined(nodes, a, b, 1.0)._replace(frozen=())


def in_core_space(
    nodes: Sequence[LowRank],
    weights: Sequence[Any],
    merge: Callable[..., jax.Array],
    *operands: Any,
) -> LowRank:
    """The node of what `merge` makes of the coordinates of each weighted ΔW, and of `operands`.

    Along Q U, from the singular vectors of [ΔW_1, ΔW_2, …], and along those of the ΔW above one
    another: bases that follow from the ΔW, and not from how they are factored.
    """

    def make(nodes: Sequence[LowRank], weights: Any, *operands: Any) -> Any:
        pairs = [matrices(x) for x in nodes]
        ends = np.cumsum([a.shape[-1] for a, _ in pairs])[:-1]
        scaled = [w * a for (a, _), w in zip(pairs, weights, strict=True)]
        q_a, r_a = qr(jnp.concatenate(scaled, -1))
        q_b, r_b = qr(jnp.concatenate([b.mT for _, b in pairs], -1))
        parts = zip(jnp.split(r_a, ends, -1), jnp.split(r_b, ends, -1), strict=True)
        cores = [times(x, y.mT) for x, y in parts]
        u, v = svd_of(jnp.concatenate(cores, -1))[0], svd_of(jnp.concatenate(cores, -2))[2].mT
        core = merge([times(times(u.mT, m), v) for m in cores], *operands)
        a, b = times(q_a, u), times(q_b, v).mT
        # The rank is that of the smaller side of the core.
        return (times(a, core), b) if core.shape[-1] <= core.shape[-2] else (a, times(core, b))

    return made(make, nodes, weights, *operands)
