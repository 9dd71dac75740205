"""MiSS: A sums inputs in groups, and is not trained."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from ._initializer import dtype_of


def miss(key: jax.Array, w: Any, site: Any, rule: Any) -> tuple[Any, jax.Array, jax.Array]:
    r"""Repeats the identity along the inputs in A, which is frozen; B starts at zero.

    $\Delta W_{io} = s \, B_{i \bmod r, o}$: rows of ΔW that are r apart are equal. It has half
    of LoRA's parameters at the same rank, and nothing is random. Several input axes count as one.

    MiSS has no scale: give `alpha` = `rank` for s = 1. A has no gradient, and under
    `jlora.optimizer` no moments and no updates; another optimizer that decays weights would shrink
    it. The "bat" and "mini" forms of MiSS are not implemented. PEFT's files hold it as a LoRA, or
    with `peft.save(..., config={"peft_type": "MISS"})` as MiSS.

    Args:
        key: a PRNG key, not used.
        w: W, an array or a `jax.ShapeDtypeStruct`.
        site: the site, with its layout.
        rule: the rule, with its rank and dtype.

    Returns:
        `(w, a, b)`: W as it came, A and B.

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


vars(miss)["frozen"] = ("a",)  # what a rule freezes beside its own `frozen`
