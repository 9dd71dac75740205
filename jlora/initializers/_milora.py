"""MiLoRA: moves the smallest singular values of W into A and B."""

import jax

from .._quantized import BaseLeaf
from .._site import Site
from ._initializer import RankRule, Start
from ._pissa import make_factors
from ._split import Factors, split, svd_part


def milora(key: jax.Array, w: BaseLeaf, site: Site, rule: RankRule) -> Start:
    r"""Moves the r smallest singular values of W, with their vectors, into A and B.

    It is `pissa` at the other end of the spectrum: it trains the part of W that matters least. If W
    has less than full rank, A and B are nearly zero, and so are their gradients.

    As with `pissa`, the base differs from `params`. Tune the learning rate again. Do not use it for
    reinforcement learning with verifiable rewards, where it was found to collapse (arXiv
    2512.23165).

    Args:
        key: a PRNG key, not used.
        w: W, an array or a `jlora.Quantized`.
        site: the site, with its layout.
        rule: the rule, with its rank, scale and dtype.

    Returns:
        `(w, a, b)`: $W - s \cdot A B$, A and B.

    Raises:
        ValueError: if W is a `jax.ShapeDtypeStruct`, or has values that are not finite.
        NotImplementedError: within a `shard_map` that may shard W.

    Source: Wang et al., MiLoRA, arXiv 2406.09044, section 3.

    Examples:
        >>> import jax, jax.numpy as jnp, jlora
        >>> rule = jlora.LoRA("w", rank=1, alpha=1, init=jlora.initializers.milora)
        >>> lora = jlora.transform(lambda p, x: x @ p["w"], rule)
        >>> params, x = {"w": jnp.diag(jnp.array([2.0, 9.0]))}, jnp.ones((1, 2))
        >>> jnp.abs(jnp.round(lora.init(jax.random.key(0), params, x)[0]["w"], 5)).tolist()
        [[0.0, 0.0], [0.0, 9.0]]
    """
    return split(_factor_smallest, key, w, site, rule)


def _factor_smallest(key: jax.Array, w: jax.Array, rank: int, scale: float) -> Factors:
    del key
    return make_factors(*svd_part(w, slice(-rank, None)), scale)
