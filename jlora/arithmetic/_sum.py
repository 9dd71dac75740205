"""Exact sums of adapters, by concatenating factors."""

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
    check_numbers,
    check_operands,
    combine_leaves,
    dtype_of_all,
    is_residual,
    join,
    refuse,
    scale_b,
)

ROUNDING = 1e-5  # how far a sum of weights may be from 1 or 0


def add(adapters: Sequence[PyTree], weights: Weights = None, *, base: PyTree = None) -> PyTree:
    r"""Computes the exact sum $\Delta W = \sum_i w_i \, \Delta W_i$.

    At each site A is $[A_1, A_2, \ldots]$ and B is $[w_1 B_1; w_2 B_2; \ldots]$. The rank is the
    sum of the ranks; `truncate` reduces it. Adapters may differ in ranks, scales, slots and sites;
    an adapter without a site has ΔW = 0 there.

    Args:
        adapters: adapters of one base; each may be `{}`.
        weights: $w_i$, numbers or an array of shape (adapters,); by default 1.
        base: the parameters that `init` got, needed for leaves trained in full. These become
            $W + \sum_i w_i (W_i - W)$. A leaf that only one adapter has, with weight 1, does not
            change and needs no base.

    Returns:
        An adapter. Its dropout is that of the adapters if it is equal in all, else 0. A factor is
        frozen if it is frozen in all.

    Raises:
        TypeError: if `adapters` is not a list of adapters.
        ValueError: if sites do not fit each other or cannot be added; or if an initializer changed
            the base and the weights add up to neither 1 nor 0. The error names all paths.

    Examples:
        >>> import jax.numpy as jnp, jlora
        >>> from jlora import arithmetic
        >>> layout = jlora.types.Layout((), (0,), (1,))
        >>> one = {"w": jlora.types.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)), 1.0, layout)}
        >>> arithmetic.add([one, one], [1.0, -0.5])
        {'w': LowRank(a=float32[4,4], b=float32[4,3], scale=1.0)}
    """
    return _sum(check_operands(adapters, weights, base, ("adapters", "cannot be combined")))


def scale(adapter: PyTree, factor: float | jax.Array, *, base: PyTree = None) -> PyTree:
    r"""Scales an adapter to $c \cdot \Delta W$: multiplies B by c, and keeps A.

    Args:
        adapter: an adapter.
        factor: c; -1 negates the adapter.
        base: the parameters that `init` got, needed for leaves trained in full.

    Returns:
        An adapter with the same structure.

    Raises:
        TypeError: if `adapter` is not an adapter.
        ValueError: if it cannot be scaled, for example because an initializer changed its base. The
            error names all paths.

    Examples:
        >>> import jax.numpy as jnp, jlora
        >>> from jlora import arithmetic
        >>> layout = jlora.types.Layout((), (0,), (1,))
        >>> one = {"w": jlora.types.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)), 1.0, layout)}
        >>> float(arithmetic.scale(one, -0.5)["w"].b[0, 0])
        -0.5
    """
    check_numbers("factor", [factor])
    return _sum(check_operands([adapter], [factor], base, ("adapter", "cannot be scaled")))


def difference(adapter: PyTree, other: PyTree, *, base: PyTree = None) -> PyTree:
    r"""Computes the exact difference $\Delta W = \Delta W_1 - \Delta W_2$; the ranks add up.

    If an initializer changed the base to $W - \Delta W_2$, the difference is the adapter of W
    itself. Give it to every function that needs ΔW = 0 to be the original model.

    Args:
        adapter: the first adapter.
        other: the adapter to subtract.
        base: the parameters that `init` got, needed for leaves trained in full.

    Returns:
        An adapter.

    Raises:
        TypeError: if one of the two is not an adapter.
        ValueError: if sites do not fit each other. The error names all paths.

    Examples:
        >>> import jax.numpy as jnp, jlora
        >>> from jlora import analysis, arithmetic
        >>> layout = jlora.types.Layout((), (0,), (1,))
        >>> one = {"w": jlora.types.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)), 1.0, layout)}
        >>> round(float(analysis.norm(arithmetic.difference(one, one)["w"])), 5)
        0.0
    """
    what = ("other", "cannot be subtracted from `adapter`")
    return _sum(check_operands([adapter, other], [1.0, -1.0], base, what))


def _sum(given: Operands) -> PyTree:
    """Computes the exact sum: factors are concatenated."""
    residual = _residual(given)

    def low_rank(nodes: list[LowRank], w: list[Any], path: Path) -> LowRank:
        scale = nodes[0].scale or 1.0
        of_a, of_b = (dtype_of_all(getattr(x, name) for x in nodes) for name in "ab")
        a = jnp.concatenate([x.a.astype(of_a) for x in nodes], -1)
        pairs = zip(nodes, w, strict=True)
        b = [scale_b(x.b.astype(of_b), v, x.scale / scale) for x, v in pairs]
        node = join(nodes, a, jnp.concatenate(b, leading_axes(nodes[0])), scale)
        return node._replace(residual=path in residual)

    return combine_leaves(given, low_rank, lambda deltas, _: sum(deltas), keeps_one=True)


def _residual(given: Operands) -> Collection[Path]:
    """Finds the paths at which the sum belongs to a base that an initializer changed.

    There the weights of all adapters must add up to 1, or to 0, so that the base cancels.
    """
    sites = {p: pairs for p, pairs in given.sites.items() if is_residual(pairs[0][0])}
    if not sites:
        return ()
    total = evaluate_now(lambda *w: sum(w), *given.weights)
    near = [n for n in (0, 1) if total is not None and abs(float(total) - n) < ROUNDING]
    got = "traced ones" if total is None else f"{float(total):g}"
    wrong = {
        path: f"{RESIDUAL}, but one adapter lacks the site"
        if len(pairs) < len(given.weights)
        else f"{RESIDUAL}, so `weights` must add up to 1 or to 0; got {got}"
        for path, pairs in sites.items()
        if len(pairs) < len(given.weights) or not near
    }
    refuse(given.refusal, wrong, FROM_THE_START)
    return sites if near == [1] else ()
