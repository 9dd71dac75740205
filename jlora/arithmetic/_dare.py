"""DARE: entries are dropped at random."""

from collections.abc import Sequence

import jax
import jax.numpy as jnp

from .._keys import fold
from .._types import Path, PyTree
from ._matrices import merge_in_core_space
from ._operands import Weights, check_merge, combine_leaves


def dare(
    adapters: Sequence[PyTree],
    weights: Weights = None,
    *,
    key: jax.Array,
    density: float = 0.5,
    base: PyTree = None,
) -> PyTree:
    r"""DARE merging: drops entries of each change at random, rescales the others, and sums.

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
