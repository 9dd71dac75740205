"""OLoRA: moves the first directions of a QR of W into A and B."""

import jax

from .._linalg import times
from .._quantized import BaseLeaf
from .._site import Site
from ._initializer import RankRule, Start
from ._split import Factors, factor_qr, split, widen


def olora(key: jax.Array, w: BaseLeaf, site: Site, rule: RankRule) -> Start:
    r"""Moves the part of W along the first r vectors of a QR decomposition into A and B.

    With $W^\top = Q R$ and the first r columns $Q_r$, $B = Q_r^\top$ has orthonormal rows,
    $A = W Q_r$, and the base is $W - s \cdot A B$, in float32 and rounded once to W's dtype. Only
    the first r columns of $W^\top$ are factored. If the base is quantized, the new base is
    quantized again in the same scheme. As in PEFT, the base loses $s \cdot A B$ rather than $A B$:
    give `alpha` = `rank` for s = 1.

    The base differs from `params`: see the guide "Initialize A and B" for resuming and for files.
    Tune the learning rate again.

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

    Source: Büyükakyüz, OLoRA, arXiv 2406.01775, section 3.

    Examples:
        >>> import jax, jax.numpy as jnp, jlora
        >>> rule = jlora.LoRA("w", rank=1, alpha=1, init=jlora.initializers.olora)
        >>> lora = jlora.transform(lambda p, x: x @ p["w"], rule)
        >>> params, x = {"w": jnp.array([[2.0, 0.0], [3.0, 5.0]])}, jnp.ones((1, 2))
        >>> lora.init(jax.random.key(0), params, x)[0]["w"].tolist()
        [[0.0, 0.0], [0.0, 5.0]]
    """
    return split(_factor_first, key, w, site, rule)


def _factor_first(key: jax.Array, w: jax.Array, rank: int, scale: float) -> Factors:
    del key, scale
    w = widen(w)
    q, _ = factor_qr(w[..., :rank, :].mT)
    return times(w, q), q.mT
