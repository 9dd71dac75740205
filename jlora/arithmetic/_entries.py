"""Merges by entries: TIES keeps large entries of the majority's sign, DARE drops random entries."""

import functools
import math
from collections.abc import Sequence

import jax
import jax.numpy as jnp

from .._keys import fold
from .._types import Path, PyTree
from ._matrices import merge_in_core_space
from ._operands import Weights, check_merge, combine_leaves


def ties(
    adapters: Sequence[PyTree],
    weights: Weights = None,
    *,
    density: float = 0.2,
    base: PyTree = None,
) -> PyTree:
    r"""Merges by TIES: keeps the largest entries of each adapter that have the majority's sign.

    Of each weighted change $M_i = w_i \Delta W_i$, the share `density` of entries with the largest
    magnitude is kept; the others become 0. The sign of an entry is the sign of the sum of these
    $M_i$. The result is the mean over the adapters whose entry has this sign.

    The entries are coordinates in the *core space* of the adapters: along the singular vectors of
    all ΔW, concatenated along inputs and along outputs. There a ΔW is a matrix of at most Σr × Σr,
    and no information is lost. The result has a rank of at most Σr, while a merge of the entries of
    ΔW themselves would have full rank. Leaves trained in full are merged by their own entries.

    Args:
        adapters: adapters of one base.
        weights: $w_i$, numbers or an array of shape (adapters,); by default 1.
        density: the share of entries to keep in each matrix, in (0, 1].
        base: the parameters that `init` got, needed for leaves trained in full.

    Returns:
        An adapter; `truncate` gives it a smaller rank.

    Raises:
        TypeError: if `adapters` is not a list of adapters.
        ValueError: if `density` is out of range, sites do not fit each other, or an initializer
            changed the base. The error names all paths.

    Source: Yadav et al., arXiv 2306.01708; the core space: Panariello et al., arXiv 2509.17786.

    Examples:
        >>> import jax, jax.numpy as jnp, jlora
        >>> from jlora import arithmetic
        >>> layout = jlora.types.Layout((), (0,), (1,))
        >>> one = {"w": jlora.types.LowRank(jnp.ones((4, 1)), jnp.ones((1, 3)), 1.0, layout)}
        >>> merged = jax.jit(lambda one: arithmetic.ties([one, one], density=1.0)["w"])(one)
        >>> round(float((merged.a @ merged.b)[0, 0]), 5)  # a mean, not a sum
        1.0
    """
    given = check_merge(adapters, weights, base, density)

    def merge(deltas: Sequence[jax.Array], matrix: int = 2) -> jax.Array:
        kept = jnp.stack([_keep_largest(x, float(density), matrix) for x in deltas])
        agrees = (kept * jnp.sign(sum(kept)) > 0).astype(kept.dtype)
        return (kept * agrees).sum(0) / jnp.maximum(agrees.sum(0), 1)

    return combine_leaves(
        given,
        lambda nodes, w, _: merge_in_core_space(nodes, w, merge),
        lambda deltas, _: merge(deltas, deltas[0].ndim),
    )


@functools.partial(jax.jit, static_argnums=(1, 2))  # so that the loop is compiled once for a shape
def _keep_largest(x: jax.Array, density: float, matrix: int) -> jax.Array:
    """Keeps the largest entries of each matrix, the last axes of `x`; the others become 0."""
    axes = tuple(range(-matrix, 0))
    count = max(1, round(density * math.prod(x.shape[-matrix:])))
    bits = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.dtype(f"uint{8 * x.dtype.itemsize}"))

    # Finds the smallest entry to keep bit by bit: sorting would gather all entries on one device.
    def with_bit(i: jax.Array, least: jax.Array) -> jax.Array:
        more = least | (jnp.ones_like(least) << (bits.dtype.itemsize * 8 - 1 - i))
        return jnp.where((bits >= more).sum(axes, keepdims=True) >= count, more, least)

    start = jnp.zeros_like(bits.max(axes, keepdims=True, initial=0))
    least = jax.lax.fori_loop(0, 8 * bits.dtype.itemsize, with_bit, start)
    return jnp.where(bits >= least, x, 0)


def dare(
    adapters: Sequence[PyTree],
    weights: Weights = None,
    *,
    key: jax.Array,
    density: float = 0.5,
    base: PyTree = None,
) -> PyTree:
    r"""Merges by DARE: drops entries of each change at random, rescales the others, and sums.

    $\Delta W = \sum_i w_i \, m_i \odot \Delta W_i / p$, where each entry of the mask $m_i$ is 1
    with probability p, the `density`, and 0 otherwise. The expectation is `add`. As in `ties`, the
    entries are coordinates in the core space.

    Args:
        adapters: adapters of one base.
        weights: $w_i$, numbers or an array of shape (adapters,); by default 1.
        key: a PRNG key; it is folded with each path and split over the adapters.
        density: p, in (0, 1].
        base: the parameters that `init` got, needed for leaves trained in full.

    Returns:
        An adapter; `truncate` gives it a smaller rank.

    Raises:
        TypeError: if `adapters` is not a list of adapters.
        ValueError: if `density` is out of range, sites do not fit each other, or an initializer
            changed the base. The error names all paths.

    Source: Yu et al., arXiv 2311.03099.

    Examples:
        >>> import jax, jax.numpy as jnp, jlora
        >>> from jlora import analysis, arithmetic
        >>> layout = jlora.types.Layout((), (0,), (1,))
        >>> one = {"w": jlora.types.LowRank(jnp.ones((4, 1)), jnp.ones((1, 3)), 1.0, layout)}
        >>> same = jax.jit(lambda key: arithmetic.dare([one], key=key, density=1.0)["w"])
        >>> round(float(jax.jit(analysis.distance)(same(jax.random.key(0)), one["w"])), 5)
        0.0
    """
    given = check_merge(adapters, weights, base, density)

    def keys(path: Path) -> jax.Array:
        return jax.random.split(fold(key, path), len(given.weights))

    def drop(x: jax.Array, key: jax.Array) -> jax.Array:
        return jnp.where(jax.random.bernoulli(key, density, x.shape), x / density, 0)

    def merge(deltas: Sequence[jax.Array], keys: jax.Array) -> jax.Array:
        return functools.reduce(jnp.add, map(drop, deltas, keys))

    return combine_leaves(
        given,
        lambda nodes, w, path: merge_in_core_space(nodes, w, merge, keys(path)),
        lambda deltas, path: merge(deltas, keys(path)),
    )
