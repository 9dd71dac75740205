r"""A and B of a site as matrices, and what follows from them without ΔW.

With $A = Q_1 R_1$ and $B^\top = Q_2 R_2$, ΔW has the singular values of the r × r matrix
$s \cdot R_1 R_2^\top$, and the singular vectors of that, times $Q_1$ and $Q_2$.
"""

import math

import jax
import jax.numpy as jnp

from ._adapters import LowRank, weight_shape, without_slots
from ._linalg import times


def factors(site: LowRank) -> tuple[jax.Array, jax.Array]:
    """s·A as (stack…, inputs, r) and B as (stack…, r, outputs), slots side by side."""
    if not isinstance(site, LowRank):
        raise TypeError(f"`site` must be a jlora.types.LowRank, whose ΔW is s·A·B; got {site!r}.")
    whole = without_slots(site, weight_shape(site))
    wide = jnp.promote_types(jnp.result_type(site.a, site.b), jnp.float32)
    a, b = (jnp.asarray(x, wide) for x in (whole.a, whole.b))
    n, rank = len(site.layout.stack), a.shape[-1]
    stack = a.shape[:n]
    a = a.reshape(*stack, math.prod(a.shape[n:-1]), rank)
    return site.scale * a, b.reshape(*stack, rank, math.prod(b.shape[n + 1 :]))


def core(a: jax.Array, b: jax.Array) -> jax.Array:
    """A small matrix with the singular values of A·B."""
    return times(jnp.linalg.qr(a, mode="r"), jnp.linalg.qr(b.mT, mode="r").mT)
