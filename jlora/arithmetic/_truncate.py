"""The best approximation of a lower rank."""

from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._adapters import LowRank, is_node, matrices
from .._compat import is_concrete
from .._linalg import svd
from .._rules import check_int
from .._tree import nest
from .._types import PyTree
from ._matrices import build
from ._operands import MERGE
from ._several import flatten_each, refuse_other_methods


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
    """The smallest rank that keeps this share of the squares in all matrices of a stack."""
    if not is_concrete(values):
        raise ValueError(
            "`energy` of truncate needs values, which jit and explicit axes of a mesh do not have; "
            "give `rank`."
        )
    squares = np.asarray(values, np.float64) ** 2
    needed = (energy or 1) * squares.sum(-1, keepdims=True) * (1 - 1e-12)
    missing = (np.cumsum(squares, -1) < needed).sum(-1)
    return int(min(missing.max(initial=0) + 1, values.shape[-1]))
