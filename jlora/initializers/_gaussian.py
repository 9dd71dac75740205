"""The initializer of the LoRA paper."""

import math

import jax

from .._quantized import BaseLeaf
from .._site import Site
from ._initializer import RankRule, Start, draw, fan_in


def gaussian(key: jax.Array, w: BaseLeaf, site: Site, rule: RankRule) -> Start:
    r"""Draws A from a normal distribution of variance 1 / inputs, and sets B to zero.

    For an embedding the variance is 1, because each lookup has one input.

    Args:
        key: a PRNG key.
        w: W, an array, a `jax.ShapeDtypeStruct` or a `jlora.Quantized`.
        site: the site, with its layout.
        rule: the rule, with its rank and dtype.

    Returns:
        `(w, a, b)`: the same W, A and B.

    Source: Hu et al., arXiv 2106.09685, section 4.1.

    Examples:
        >>> import jlora
        >>> jlora.LoRA("kernel", init=jlora.initializers.gaussian).rank
        8
    """
    std = 1 / math.sqrt(fan_in(site))
    return draw(w, site, rule, lambda s, d: std * jax.random.normal(key, s, d))
