"""Nodes from matrices, and the core space of several ΔW."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._adapters import LowRank, from_matrices, matrices, weight_shape
from .._core import explicit
from .._linalg import qr, svd_of, times
from ._operands import join


def build(
    make: Callable[..., tuple[jax.Array, jax.Array]], nodes: Sequence[LowRank], *operands: Any
) -> LowRank:
    """Builds the node of the matrices that `make` returns, with scale 1, in the dtypes of `nodes`.

    Along explicit axes of a mesh, its A and B are sharded like those of the first node.
    """
    like = nodes[0]

    def factors(nodes: Sequence[LowRank], *operands: Any) -> tuple[jax.Array, jax.Array]:
        a, b = make(nodes, *operands)
        node = from_matrices(a, b, like.layout, weight_shape(like))
        a = node.a.astype(jnp.result_type(*(x.a for x in nodes)))
        return a, node.b.astype(jnp.result_type(*(x.b for x in nodes)))

    places = explicit(like.a), explicit(like.b)
    in_place: Any = factors
    if None not in places:
        in_place = jax.sharding.auto_axes(factors, out_sharding=places)
    a, b = in_place(nodes, *operands)
    return join(nodes, a, b, 1.0)._replace(frozen=())


def merge_in_core_space(
    nodes: Sequence[LowRank],
    weights: Sequence[Any],
    merge: Callable[..., jax.Array],
    *operands: Any,
) -> LowRank:
    """Builds the node of `merge(coordinates of each weighted ΔW, *operands)`.

    The coordinates are along the singular vectors of the concatenated ΔW, among inputs and among
    outputs: bases that depend on the ΔW alone, however they are factored.
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

    return build(make, nodes, weights, *operands)
