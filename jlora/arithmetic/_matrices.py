"""Nodes from matrices: the core space of several ΔW, and the best approximation of a lower rank."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._adapters import LowRank, from_matrices, is_node, matrices, weight_shape
from .._compat import is_concrete
from .._core import explicit
from .._linalg import qr, svd, svd_of, times
from .._rules import check_int
from .._tree import nest
from .._types import PyTree
from ._operands import MERGE, flatten_each, join, refuse_other_methods


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


# ------------------------------------------------------------------------------------- a lower rank


def truncate(adapter: PyTree, rank: int | None = None, *, energy: float | None = None) -> PyTree:
    r"""Approximates each ΔW best by one of a smaller rank (Eckart and Young, 1936).

    With $A = Q_1 R_1$ and $B^\top = Q_2 R_2$, and the singular values of the small
    $R_1 R_2^\top = U \Sigma V^\top$, the result is $A' = Q_1 U \sqrt{\Sigma}$ and
    $B' = \sqrt{\Sigma}\, V^\top Q_2^\top$, cut to the rank. ΔW is never formed. Each matrix of a
    stack and each slot is approximated on its own, in float32 or better. On a mesh A and B stay
    where they are; only triangles of blocks of their rows are gathered. An adapter of a base that
    an initializer changed remains one of that base.

    Args:
        adapter: an adapter. Leaves trained in full stay as they are.
        rank: the rank, at least 1; a site of at most this rank stays as it is.
        energy: instead of `rank`, the share of $\sum_i \sigma_i^2$ to keep, in (0, 1]: each site
            gets the smallest rank that keeps it in all its matrices. Needs values, so not under
            `jit` and not along explicit axes of a mesh.

    Returns:
        An adapter, whose scales are 1 where a rank was cut.

    Raises:
        TypeError: if `adapter` is none.
        ValueError: if `rank` or `energy` is out of range, or a site is of another method.

    Examples:
        >>> import jax.numpy as jnp, jlora
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
        raise ValueError("truncate takes one of `rank` and `energy`.")
    if rank is not None:
        check_int("`rank`", rank, 1)
    elif not 0 < (energy or 0) <= 1:
        raise ValueError(f"`energy` must lie in (0, 1]; got {energy!r}.")
    [found] = flatten_each([adapter])
    refuse_other_methods("`adapter` cannot be truncated", found.items(), MERGE)

    def cut(nodes: Sequence[LowRank]) -> tuple[jax.Array, jax.Array]:
        u, values, v = svd(*matrices(nodes[0]))
        kept = rank if rank is not None else _rank_for(values, energy)
        root = jnp.sqrt(values[..., :kept])
        return u[..., :kept] * root[..., None, :], root[..., None] * v[..., :kept].mT

    def is_small(x: Any) -> bool:
        return not is_node(x) or (rank is not None and x.a.shape[-1] <= rank)

    return nest({path: x if is_small(x) else build(cut, [x]) for path, x in found.items()})


def _rank_for(values: jax.Array, energy: float | None) -> int:
    """Finds the smallest rank that keeps this share of the squares in all matrices."""
    if not is_concrete(values):
        raise ValueError(
            "`energy` of truncate needs values, which jit and explicit axes of a mesh do not have; "
            "give `rank`."
        )
    squares = np.asarray(values, np.float64) ** 2
    needed = (energy or 1) * squares.sum(-1, keepdims=True) * (1 - 1e-12)
    missing = (np.cumsum(squares, -1) < needed).sum(-1)
    return int(min(missing.max(initial=0) + 1, values.shape[-1]))
