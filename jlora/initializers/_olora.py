"""The first directions of the QR of W to A and B."""

from typing import Any

import jax

from .._linalg import times
from ._split import orthonormal, split, widened


def olora(key: jax.Array, w: Any, site: Any, rule: Any) -> tuple[Any, jax.Array, jax.Array]:
    r"""OLoRA: A and B are the first r columns and rows of the QR of W, and W is the rest.

    With $W^\top = Q R$, $B = Q_r^\top$ has orthonormal rows, $A = R_r^\top = W Q_r$, and the base
    is $W - s \cdot A B$, in float32 and rounded once to W's dtype. Of the QR only the first r
    columns of $W^\top$ are factored. Of a base that is quantized, the rest is quantized again in
    the same scheme. At a scale s other than 1 more or less than $A B$ is taken, as in PEFT: give
    `alpha` = `rank` to take just that.

    The base is another than `params`: see the guide "Which rule" for resuming and for files. Tune
    the learning rate anew.

    Args:
        key: a PRNG key, not used.
        w: W, an array or a `jlora.Quantized`.
        site: the site, with its layout.
        rule: the rule, with its rank, scale and dtype.

    Returns:
        `(w, a, b)`: the rest, A and B.

    Raises:
        ValueError: if W is a `jax.ShapeDtypeStruct`, or has values that are not finite.
        NotImplementedError: within a `shard_map`.

    Source: Büyükakyüz, OLoRA, arXiv 2406.01775, section 3.

    Examples:
        >>> import jax, jax.numpy as jnp, jlora
        >>> rule = jlora.LoRA("w", rank=1, alpha=1, init=jlora.initializers.olora)
        >>> lora = jlora.transform(lambda p, x: x @ p["w"], rule)
        >>> params, x = {"w": jnp.array([[2.0, 0.0], [3.0, 5.0]])}, jnp.ones((1, 2))
        >>> lora.init(jax.random.key(0), params, x)[0]["w"].tolist()
        [[0.0, 0.0], [0.0, 5.0]]
    """
    return split(_first, key, w, site, rule)


def _first(key: jax.Array, w: jax.Array, rank: int, scale: float) -> tuple[jax.Array, jax.Array]:
    del key, scale
    w = widened(w)
    q, _ = orthonormal(w[..., :rank, :].mT)
    return times(w, q), q.mT
