r"""A and B of a site as matrices, and what follows from them without ΔW.

With $A = Q_1 R_1$ and $B^\top = Q_2 R_2$, ΔW has the singular values of the r × r matrix
$s \cdot R_1 R_2^\top$, and the singular vectors of that, times $Q_1$ and $Q_2$.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from .adapters import LowRank, weight_shape, without_slots

TALL = 4  # rows of a block, as a multiple of its columns


def factors(site: LowRank) -> tuple[jax.Array, jax.Array]:
    """s·A as (stack…, inputs, r) and B as (stack…, r, outputs), slots side by side."""
    if not isinstance(site, LowRank):
        raise TypeError(f"`site` must be a jlora.LowRank, whose ΔW is s·A·B; got {site!r}.")
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


def svd(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """U (…, inputs, n), S (…, n) and V (…, outputs, n) of A·B; n is at most r."""
    (q_a, r_a), (q_b, r_b) = qr(a), qr(b.mT)
    u, values, vt = jnp.linalg.svd(times(r_a, r_b.mT), full_matrices=False)
    return times(q_a, u), values, times(q_b, vt.mT)


def qr(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Q and R of matrices (…, n, r), the tall ones by blocks of rows.

    Householder's QR of each block, then of the blocks' R one above the other, and so on: as stable
    as that of the whole. Rows that lie on several devices stay there; what is gathered are R's.

    Source: Demmel et al., arXiv 0808.2664 (TSQR).
    """
    *stack, n, r = x.shape
    blocks = _blocks(n, r)
    if blocks == 1:
        return jnp.linalg.qr(x)
    q, each = jnp.linalg.qr(x.reshape(*stack, blocks, n // blocks, r))
    top, whole = qr(each.reshape(*stack, blocks * r, r))
    return times(q, top.reshape(*stack, blocks, r, r)).reshape(x.shape), whole


def _blocks(n: int, r: int) -> int:
    """The most equal blocks of n rows, a power of two as meshes are, of at least 4·r rows."""
    blocks = 1
    while n % (2 * blocks) == 0 and n >= 2 * blocks * TALL * r:
        blocks *= 2
    return blocks


def times(a: jax.Array, b: jax.Array) -> jax.Array:
    """A matrix product in full precision."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)
