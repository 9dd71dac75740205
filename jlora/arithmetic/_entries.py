"""Merges by entries: TIES takes the largest by the majority of signs, DARE drops some at random."""

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
    r"""Merges by TIES: keeps the largest entries of each adapter whose sign the majority has.

    Of each weighted change $M_i = w_i \Delta W_i$, a share `density` of the entries is kept, those
    of largest magnitude; the others become 0. The sign of an entry is that of $\sum_i M_i$. The
    result is the mean over the adapters whose entry has that sign.

    The entries are those in the *core space* of the adapters: coordinates along the singular
    vectors of all ΔW, concatenated along inputs and along outputs, in which a ΔW is a matrix of at
    most Σr × Σr. Nothing is lost, and the result has a rank of at most Σr; merging the entries of
    ΔW themselves would give full rank, which is no adapter. Leaves trained in full are merged by
    their own entries.

    Args:
        adapters: adapters of one base.
        weights: $w_i$, numbers or an array of shape (adapters,); 1 by default.
        density: the share of entries to keep, in (0, 1]; of each matrix.
        base: the parameters that the adapters are for, needed for leaves trained in full.

    Returns:
        An adapter; see `truncate` for a smaller rank.

    Raises:
        TypeError: if `adapters` are none.
        ValueError: if `density` is out of range, or sites do not fit one another or are for a base
            that an initializer changed; the error names all paths.

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
        kept = jnp.stack([_keep_largest(x, density, matrix) for x in deltas])
        agrees = (kept * jnp.sign(sum(kept)) > 0).astype(kept.dtype)
        return (kept * agrees).sum(0) / jnp.maximum(agrees.sum(0), 1)

    return combine_leaves(
        given,
        lambda nodes, w, _: merge_in_core_space(nodes, w, merge),
        lambda deltas, _: merge(deltas, deltas[0].ndim),
    )


def _keep_largest(x: jax.Array, density: float, matrix: int) -> jax.Array:
    """Keeps the largest entries of each matrix of the last axes of `x`; others become 0."""
    axes = tuple(range(-matrix, 0))
    count = max(1, round(density * math.prod(x.shape[-matrix:])))
    bits = jax.lax.bitcast_convert_type(jnp.abs(x), jnp.dtype(f"uint{8 * x.dtype.itemsize}"))

    # The smallest entry to keep, bit by bit: sorting would gather all entries on one device.
    def with_bit(i: jax.Array, least: jax.Array) -> jax.Array:
        more = least | (jnp.ones_like(least) << (bits.dtype.itemsize * 8 - 1 - i))
        return jnp.where((bits >= more).sum(axes, keepdims=True) >= count, more, least)

    start = jnp.zeros_like(bits.max(axes, keepdims=True))
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

    $\Delta W = \sum_i w_i \, m_i \odot \Delta W_i / p$ where an entry of the mask $m_i$ is 1 with
    probability p, the `density`, and 0 otherwise. Its expectation is `add`. As in `ties`, the
    entries are those in the core space.

    Args:
        adapters: adapters of one base.
        weights: $w_i$, numbers or an array of shape (adapters,); 1 by default.
        key: a PRNG key; it is folded with each path and adapter.
        density: p, in (0, 1].
        base: the parameters that the adapters are for, needed for leaves trained in full.

    Returns:
        An adapter; see `truncate` for a smaller rank.

    Raises:
        TypeError: if `adapters` are none.
        ValueError: if `density` is out of range, or sites do not fit one another or are for a base
            that an initializer changed; the error names all paths.

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
        return jax.random.bernoulli(key, density, x.shape) * x / density

    def merge(deltas: Sequence[jax.Array], keys: jax.Array) -> jax.Array:
        return sum(map(drop, deltas, keys), start=jnp.zeros(()))

    return combine_leaves(
        given,
        lambda nodes, w, path: merge_in_core_space(nodes, w, merge, keys(path)),
        lambda deltas, path: merge(deltas, keys(path)),
    )
