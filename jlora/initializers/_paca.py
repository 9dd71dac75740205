"""PaCA: a frozen A that picks inputs at random."""

import jax
import jax.numpy as jnp
from jax import lax

from .._quantized import BaseLeaf
from .._site import Site
from ._initializer import RankRule, Start, dtype_of


def paca(key: jax.Array, w: BaseLeaf, site: Site, rule: RankRule) -> Start:
    r"""Sets A to r random columns of the identity, and freezes it; sets B to zero.

    So it trains r rows of W (r columns in PyTorch's order): with the r different inputs $c_k$ that
    A picks, $W'_{c_k, :} = W_{c_k, :} + s \, B_{k, :}$, and no other row changes. If W is square,
    these are half of LoRA's parameters at the same rank. Several input axes count as one. Each
    matrix of a stack picks its own inputs.

    A has no gradient, so the backward pass needs only x·A, r of the inputs, instead of x. Use
    `jlora.optimizer`, under which A has no moments and no updates. PEFT's files store A as the A of
    a LoRA.

    Args:
        key: a PRNG key.
        w: W, an array, a `jax.ShapeDtypeStruct` or a `jlora.Quantized`.
        site: the site, with its layout.
        rule: the rule, with its rank and dtype.

    Returns:
        `(w, a, b)`: the same W, A and B.

    Source: Woo et al., PaCA, arXiv 2503.01905, section 3. The paper trains W itself, with steps
    like those of s·B.

    Examples:
        >>> import jax, jax.numpy as jnp, jlora
        >>> rule = jlora.LoRA("w", rank=2, alpha=2, init=jlora.initializers.paca)
        >>> lora = jlora.transform(lambda p, x: x @ p["w"], rule)
        >>> base, adapter = lora.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, jnp.ones((1, 4)))
        >>> adapter["w"].a.T.tolist(), jlora.count(adapter)
        ([[0.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]], 6)
        >>> trained = {"w": adapter["w"].replace(b=jnp.ones((2, 3)))}
        >>> jlora.merge(base, trained)["w"][:, 0].tolist()
        [1.0, 2.0, 1.0, 2.0]
    """
    dtype = dtype_of(site, rule)
    a_shape, b_shape = rule.factor_shapes(site)
    stack = a_shape[: len(a_shape) - 1 - len(site.layout.inputs)]
    picked = lax.top_k(jax.random.uniform(key, (*stack, site.inputs)), rule.rank)[1]
    a = jax.nn.one_hot(picked, site.inputs, axis=-2, dtype=dtype)
    return w, a.reshape(a_shape), jnp.zeros(b_shape, dtype)


vars(paca)["frozen"] = ("a",)
