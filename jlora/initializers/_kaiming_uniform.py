"""He's uniform initializer."""

import math

import jax

from .._quantized import BaseLeaf
from .._site import Site
from ._initializer import RankRule, Start, draw, fan_in


def kaiming_uniform(key: jax.Array, w: BaseLeaf, site: Site, rule: RankRule) -> Start:
    r"""Draws A uniformly from $\pm 1/\sqrt{inputs}$, and sets B to zero; this is the default.

    It is He's uniform initializer with $a = \sqrt 5$, as in PEFT and loralib. For an embedding, A
    is uniform in ±1, because each lookup has one input.

    Args:
        key: a PRNG key.
        w: W, an array, a `jax.ShapeDtypeStruct` or a `jlora.Quantized`.
        site: the site, with its layout.
        rule: the rule, with its rank and dtype.

    Returns:
        `(w, a, b)`: the same W, A and B.

    Source: He et al., arXiv 1502.01852; LoRA's reference implementation.

    Examples:
        >>> import jlora
        >>> jlora.LoRA("kernel", init=jlora.initializers.kaiming_uniform).rank
        8
    """
    bound = 1 / math.sqrt(fan_in(site))
    return draw(w, site, rule, lambda s, d: jax.random.uniform(key, s, d, -bound, bound))
