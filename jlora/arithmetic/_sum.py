"""Exact sums: factors are concatenated."""

from collections.abc import Collection, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._adapters import LowRank, leading_axes
from .._compat import evaluate_now
from .._types import Path, PyTree
from ._operands import (
    FROM_THE_START,
    RESIDUAL,
    Operands,
    Weights,
    check_finite,
    check_operands,
    combine_leaves,
    is_one,
    is_residual,
    join,
    refuse,
)

ROUNDING = 1e-5  # of weights that add up to 1


def add(adapters: Sequence[PyTree], weights: Weights = None, *, base: PyTree = None) -> PyTree:
    r"""Computes the exact sum $\Delta W = \sum_i w_i \, \Delta W_i$.

    At each site A is $[A_1, A_2, \ldots]$ and B is $[w_1 B_1; w_2 B_2; \ldots]$. The rank is the
    sum of the ranks; see `truncate` for a smaller one. Adapters may differ in ranks, scales, slots
    and sites: where one has no site, its ΔW is 0.

    Args:
        adapters: adapters of one base, which may be `{}`.
        weights: $w_i$, numbers or an array of shape (adapters,); 1 by default.
        base: the parameters that the adapters are for. Needed for leaves trained in full, which
            become $W + \sum_i w_i (W_i - W)$; not for one that a single adapter has, with weight 1,
            which stays as it is.

    Returns:
        An adapter. Its dropout is that of the adapters if all agree, else 0; a factor is frozen if
        it is frozen in all.

    Raises:
        TypeError: if `adapters` are none.
        ValueError: if sites do not fit one another, cannot be added, or are for a base that an
            initializer changed while the weights add up to neither 1 nor 0; the error names all
            paths.

    Examples:
        >>> import jax.numpy as jnp, jlora
        >>> from jlora import arithmetic
        >>> layout = jlora.types.Layout((), (0,), (1,))
        >>> one = {"w": jlora.types.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)), 1.0, layout)}
        >>> arithmetic.add([one, one], [1.0, -0.5])
        {'w': LowRank(a=float32[4,4], b=float32[4,3], scale=1.0)}
    """
    return _sum(check_operands(adapters, weights, base, "`adapters` cannot be combined"))


def scale(adapter: PyTree, factor: float | jax.Array, *, base: PyTree = None) -> PyTree:
    r"""Scales an adapter to $c \cdot \Delta W$: multiplies B by c, and keeps A; -1 negates it.

    Args:
        adapter: an adapter.
        factor: c.
        base: the parameters that the adapter is for, needed for leaves trained in full.

    Returns:
        An adapter of the same structure.

    Raises:
        TypeError: if `adapter` is none.
        ValueError: if it cannot be scaled, as when an initializer changed its base; the error names
            all paths.

    Examples:
        >>> import jax.numpy as jnp, jlora
        >>> from jlora import arithmetic
        >>> layout = jlora.types.Layout((), (0,), (1,))
        >>> one = {"w": jlora.types.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)), 1.0, layout)}
        >>> float(arithmetic.scale(one, -0.5)["w"].b[0, 0])
        -0.5
    """
    check_finite("factor", [factor])
    return _sum(check_operands([adapter], [factor], base, "`adapter` cannot be scaled"))


def difference(adapter: PyTree, other: PyTree, *, base: PyTree = None) -> PyTree:
    r"""Computes the exact difference $\Delta W = \Delta W_1 - \Delta W_2$; the ranks add up.

    If an initializer changed the base to $W - \Delta W_2$, this is the adapter of W itself. Give it
    in place of `adapter` to everything for which ΔW = 0 is the model.

    Args:
        adapter: the first.
        other: the adapter that is subtracted.
        base: the parameters that both are for, needed for leaves trained in full.

    Returns:
        An adapter.

    Raises:
        TypeError: if one is no adapter.
        ValueError: if sites do not fit one another; the error names all paths.

    Examples:
        >>> import jax.numpy as jnp, jlora
        >>> from jlora import analysis, arithmetic
        >>> layout = jlora.types.Layout((), (0,), (1,))
        >>> one = {"w": jlora.types.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)), 1.0, layout)}
        >>> round(float(analysis.norm(arithmetic.difference(one, one)["w"])), 5)
        0.0
    """
    what = "`other` cannot be subtracted from `adapter`"
    return _sum(check_operands([adapter, other], [1.0, -1.0], base, what))


def _sum(given: Operands) -> PyTree:
    """Computes the exact sum: factors are concatenated."""
    residual = _residual(given)

    def low_rank(nodes: list[LowRank], w: list[Any], path: Path) -> LowRank:
        scale = nodes[0].scale or 1.0
        b = [_scale_b(x.b, v, x.scale / scale) for x, v in zip(nodes, w, strict=True)]
        a = jnp.concatenate([x.a for x in nodes], -1)
        node = join(nodes, a, jnp.concatenate(b, leading_axes(nodes[0])), scale)
        return node._replace(residual=path in residual)

    return combine_leaves(given, low_rank, lambda deltas, _: sum(deltas), keeps_one=True)


def _residual(given: Operands) -> Collection[Path]:
    """Finds the paths at which the sum is for a base that a start changed.

    There the weights of all adapters must add up to 1, or to 0: then the base cancels.
    """
    sites = {p: pairs for p, pairs in given.sites.items() if is_residual(pairs[0][0])}
    if not sites:
        return ()
    total = evaluate_now(lambda *w: sum(w), *given.weights)
    near = [n for n in (0, 1) if total is not None and abs(float(total) - n) < ROUNDING]
    got = "traced ones" if total is None else f"{float(total):g}"
    wrong = {
        path: f"{RESIDUAL}, and one adapter has no such site"
        if len(pairs) < len(given.weights)
        else f"{RESIDUAL}, so that weights must add up to 1 or to 0; got {got}"
        for path, pairs in sites.items()
        if len(pairs) < len(given.weights) or not near
    }
    refuse(given.refusal, wrong, FROM_THE_START)
    return sites if near == [1] else ()


def _scale_b(b: jax.Array, *factors: Any) -> jax.Array:
    """Multiplies B by numbers, in its dtype; returns B itself if all are 1."""
    for x in factors:
        b = b if is_one(x) else (b * x).astype(b.dtype)
    return b
