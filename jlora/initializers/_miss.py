"""MiSS: a frozen A that sums inputs in groups."""

import jax
import jax.numpy as jnp
import numpy as np

from .._quantized import BaseLeaf
from .._site import Site
from ._initializer import RankRule, Start, dtype_of


def miss(key: jax.Array, w: BaseLeaf, site: Site, rule: RankRule) -> Start:
    r"""Sets A to identities repeated along the inputs, and freezes it; sets B to zero.

    So $\Delta W_{io} = s \, B_{i \bmod r, o}$: rows of ΔW that are r apart are equal. It trains
    only B, about half of LoRA's parameters at the same rank, and nothing is random. Several input
    axes count as one.

    The paper has no scale: give `alpha` = `rank` for s = 1. Use `jlora.optimizer`, under which A
    has no moments and no updates; weight decay of another optimizer would shrink A. The "bat" and
    "mini" forms of MiSS are not implemented. `peft.save` writes a LoRA. Its file does not say that
    A is frozen: to train on after `peft.load`, give the nodes `frozen=("a",)` by `replace`.

    Args:
        key: a PRNG key, not used.
        w: W, an array, a `jax.ShapeDtypeStruct` or a `jlora.Quantized`.
        site: the site, with its layout.
        rule: the rule, with its rank and dtype.

    Returns:
        `(w, a, b)`: the same W, A and B.

    Source: Kang and Yin, MiSS, arXiv 2409.15371, section 3.

    Examples:
        >>> import jax, jax.numpy as jnp, jlora
        >>> rule = jlora.LoRA("w", rank=2, alpha=2, init=jlora.initializers.miss)
        >>> lora = jlora.transform(lambda p, x: x @ p["w"], rule)
        >>> _, adapter = lora.init(jax.random.key(0), {"w": jnp.ones((5, 3))}, jnp.ones((1, 5)))
        >>> adapter["w"].a.T.tolist(), jlora.count(adapter)
        ([[1.0, 0.0, 1.0, 0.0, 1.0], [0.0, 1.0, 0.0, 1.0, 0.0]], 6)
    """
    del key
    dtype = dtype_of(site, rule)
    a_shape, b_shape = rule.factor_shapes(site)
    lengths = tuple(site.shape[d] for d in site.layout.inputs)
    a = jnp.eye(rule.rank, dtype=dtype)[np.arange(site.inputs) % rule.rank]
    return w, jnp.broadcast_to(a.reshape(*lengths, rule.rank), a_shape), jnp.zeros(b_shape, dtype)


vars(miss)["frozen"] = ("a",)
