r"""A and B of a whole weight as matrices, and what follows from them without ΔW.

With $A = Q_1 R_1$ and $B^\top = Q_2 R_2$, ΔW has the singular values of the r × r matrix
$s \cdot R_1 R_2^\top$, and the singular vectors of that, times $Q_1$ and $Q_2$.
"""

import jax
import jax.numpy as jnp

from .._adapters import LowRank, matrices, weight_shape, without_slots
from .._linalg import times


def factors(node: LowRank) -> tuple[jax.Array, jax.Array]:
    """s·A of shape (stack…, inputs, r) and B of shape (stack…, r, outputs), slots concatenated."""
    if not isinstance(node, LowRank):
        raise TypeError(f"`node` must be a jlora.types.LowRank, whose ΔW is s·A·B; got {node!r}.")
    return matrices(without_slots(node, weight_shape(node)))


def core(a: jax.Array, b: jax.Array) -> jax.Array:
    """A small matrix with the singular values of A·B."""
    return times(jnp.linalg.qr(a, mode="r"), jnp.linalg.qr(b.mT, mode="r").mT)
