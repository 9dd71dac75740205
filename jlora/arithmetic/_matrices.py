"""Nodes from matrices: the core space of several ΔW, and the best approximation of lower rank."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._adapters import AdapterLeaf, LowRank, from_matrices, matrices, weight_shape
from .._arrays import automatically, explicit
from .._compat import is_concrete
from .._errors import InputError
from .._linalg import qr, svd, svd_of, times
from .._rules import check_int
from .._tree import nest
from .._types import PyTree
from ._operands import MERGE, check_share, dtype_of_all, flatten_each, join, refuse_other_methods


def build(
    make: Callable[..., tuple[jax.Array, jax.Array]], nodes: Sequence[LowRank], *operands: Any
) -> LowRank:
    """Builds the node of scale 1 of the matrices that `make` returns, in the dtypes of `nodes`.

    Along explicit mesh axes, its A and B are sharded like those of the first node.
    """
    like = nodes[0]

    def factors(nodes: Sequence[LowRank], *operands: Any) -> tuple[jax.Array, jax.Array]:
        a, b = make(nodes, *operands)
        node = from_matrices(a, b, like.layout, weight_shape(like))
        a = node.a.astype(dtype_of_all(x.a for x in nodes))
        return a, node.b.astype(dtype_of_all(x.b for x in nodes))

    places = explicit(like.a), explicit(like.b)
    a, b = automatically(factors, None if None in places else places)(nodes, *operands)
    return join(nodes, a, b, 1.0)._replace(frozen=())


def merge_in_core_space(
    nodes: Sequence[LowRank],
    weights: Sequence[Any],
    merge: Callable[..., jax.Array],
    *operands: Any,
) -> LowRank:
    """Builds the node of `merge(coordinates of each weighted ΔW, *operands)`.

    The coordinates are along the singular vectors of the ΔW, concatenated along inputs and along
    outputs. These bases depend only on the ΔW, not on how they are factored.
    """

    def make(nodes: Sequence[LowRank], weights: Sequence[Any], *operands: Any) -> Any:
        pairs = [matrices(x) for x in nodes]
        ends = np.cumsum([a.shape[-1] for a, _ in pairs])[:-1]
        scaled = [w * a for (a, _), w in zip(pairs, weights, strict=True)]
        q_a, r_a = qr(jnp.concatenate(scaled, -1))
        q_b, r_b = qr(jnp.concatenate([b.mT for _, b in pairs], -1))
        parts = zip(jnp.split(r_a, ends, -1), jnp.split(r_b, ends, -1), strict=True)
        cores = [times(x, y.mT) for x, y in parts]
        u = svd_of(jnp.concatenate(cores, -1))[0]
        v = svd_of(jnp.concatenate(cores, -2))[2].mT
        core = merge([times(times(u.mT, m), v) for m in cores], *operands)
        a = times(q_a, u)
        b = times(q_b, v).mT
        # The rank is the smaller side of the core.
        return (times(a, core), b) if core.shape[-1] <= core.shape[-2] else (a, times(core, b))

    return build(make, nodes, weights, *operands)


# ------------------------------------------------------------------------------------- a lower rank


def truncate(adapter: PyTree, rank: int | None = None, *, energy: float | None = None) -> PyTree:
    r"""Computes the best approximation of each ΔW with a smaller rank.

    With $A = Q_1 R_1$, $B^\top = Q_2 R_2$ and the SVD of the small matrix
    $R_1 R_2^\top = U \Sigma V^\top$, the result is $A' = Q_1 U \sqrt{\Sigma}$ and
    $B' = \sqrt{\Sigma}\, V^\top Q_2^\top$, truncated to the rank. ΔW is not formed. Each matrix of
    a stack and each slot is approximated on its own, in float32 or better. On a mesh A and B keep
    their shardings; only triangles of blocks of their rows are gathered. If an initializer changed
    the base, the result belongs to the changed base too.

    Args:
        adapter: an adapter. Leaves trained in full do not change.
        rank: the rank, at least 1. Sites of this rank or less do not change.
        energy: instead of `rank`, the share of $\sum_i \sigma_i^2$ to keep, in (0, 1]. Each site
            gets the smallest rank that keeps this share in all its matrices. This needs concrete
            values, so it works neither under `jit` nor along explicit mesh axes.

    Returns:
        An adapter. Where the rank was reduced, the scale is 1.

    Raises:
        TypeError: if `adapter` is not an adapter.
        ValueError: unless exactly one of `rank` and `energy` is given and in range; if a site has
            another method than LoRA.

    Source: Eckart and Young, Psychometrika 1, 1936.

    Examples:
        >>> import jax, jax.numpy as jnp, jlora
        >>> from jlora import analysis, arithmetic
        >>> layout = jlora.types.Layout((), (0,), (1,))
        >>> b = jnp.diag(jnp.array([5.0, 4.0, 1.0]))
        >>> site = jlora.types.LowRank(jnp.eye(4, 3), b, 1.0, layout)
        >>> small = jax.jit(lambda tree: arithmetic.truncate(tree, rank=2))({"w": site})
        >>> [round(float(x), 4) for x in jax.jit(analysis.delta_spectrum)(small["w"])]
        [5.0, 4.0]
        >>> arithmetic.truncate({"w": site}, energy=0.9)["w"].a.shape  # 41 of 42
        (4, 2)
    """
    if (rank is None) == (energy is None):
        raise ValueError(
            f"truncate needs exactly one of `rank` and `energy`; got `rank` {rank!r}, `energy` "
            f"{energy!r}."
        )
    if rank is not None:
        check_int("rank", rank, 1)
    else:
        check_share("energy", energy)
    [found] = flatten_each([adapter])
    refuse_other_methods(("adapter", "cannot be truncated"), found.items(), MERGE)

    def cut(nodes: Sequence[LowRank]) -> tuple[jax.Array, jax.Array]:
        u, values, v = svd(*matrices(nodes[0]))
        kept = rank if rank is not None else _rank_for(values, energy)
        root = jnp.sqrt(values[..., :kept])
        return u[..., :kept] * root[..., None, :], root[..., None] * v[..., :kept].mT

    def is_small(x: AdapterLeaf) -> bool:
        return not isinstance(x, LowRank) or (rank is not None and x.a.shape[-1] <= rank)

    return nest({path: x if is_small(x) else build(cut, [x]) for path, x in found.items()})


def _rank_for(values: jax.Array, energy: float | None) -> int:
    """Finds the smallest rank that keeps the share `energy` of the squares in all matrices."""
    if not is_concrete(values):
        raise InputError(
            "energy",
            "of truncate needs concrete values, which there are neither under jit nor "
            "along explicit mesh axes. Give `rank`.",
        )
    squares = np.asarray(values, np.float64) ** 2
    needed = (energy or 1) * squares.sum(-1, keepdims=True) * (1 - 1e-12)
    missing = (np.cumsum(squares, -1) < needed).sum(-1)
    return int(min(missing.max(initial=0) + 1, values.shape[-1]))
