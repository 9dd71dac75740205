"""PaCA: A picks inputs at random, and is not trained."""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from ._initializer import dtype_of


def paca(key: jax.Array, w: Any, site: Any, rule: Any) -> tuple[Any, jax.Array, jax.Array]:
    r"""Picks r inputs of each matrix at random: A has their rows of the identity; B is zero.

    $W'_{c_k, :} = W_{c_k, :} + s \, B_{k, :}$ for the r inputs $c_k$, all of them different; the
    other rows of W stay. So r rows of W are trained, or r columns as PyTorch keeps W. Where W is
    square, these are half of LoRA's parameters at the same rank. Several input axes count as one.
    Matrices of a stack pick on their own.

    A is an ordinary array, which PEFT's files hold as LoRA's. It has no gradient, so the backward
    pass needs x·A, r of the inputs, and not the rest of x. Under `jlora.optimizer` it has no
    moments and no updates.

    Args:
        key: a PRNG key.
        w: W, an array or a `jax.ShapeDtypeStruct`.
        site: the site, with its layout.
        rule: the rule, with its rank and dtype.

    Returns:
        `(w, a, b)`: W as it came, A and B.

    Source: Woo et al., PaCA, arXiv 2503.01905, section 3. There W itself is trained, as $s$ times
    what is stored, so that the steps of its optimizer are those of s·B.

    Examples:
        >>> import jax, jax.numpy as jnp, jlora
        >>> rule = jlora.LoRA("w", rank=2, alpha=2, init=jlora.initializers.paca)
        >>> lora = jlora.transform(lambda p, x: x @ p["w"], rule)
        >>> base, adapter = lora.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, jnp.ones((1, 4)))
        >>> adapter["w"].a.T.tolist(), jlora.count(adapter)
        ([[0.0, 0.0, 0.0, 1.0], [0.0, 1.0, 0.0, 0.0]], 6)
        >>> trained = {"w": adapter["w"]._replace(b=jnp.ones((2, 3)))}
        >>> jlora.merge(base, trained)["w"][:, 0].tolist()
        [1.0, 2.0, 1.0, 2.0]
    """
    dtype = dtype_of(site, rule)
    a_shape, b_shape = rule.factor_shapes(site)
    stack = a_shape[: len(a_shape) - 1 - len(site.layout.inputs)]
    picked = lax.top_k(jax.random.uniform(key, (*stack, site.inputs)), rule.rank)[1]
    a = jax.nn.one_hot(picked, site.inputs, axis=-2, dtype=dtype)
    return w, a.reshape(a_shape), jnp.zeros(b_shape, dtype)


vars(paca)["frozen"] = ("a",)  # what a rule freezes beside its own `frozen`
