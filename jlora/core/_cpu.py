"""What only CPUs want of a product: an order of its own for many tokens, and thin gradients.

The order is chosen for the platform that a program is lowered for, wherever it is traced. Thin
gradients are turned on all platforms, which costs the others nothing.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

MOVE = 32  # operations in the time in which one element is read or written


def plan(tokens: int, inputs: int, outputs: int, rank: int, dtype: Any) -> str:
    """`"apart"` or `"summed"`: the order in which a CPU computes forward and backward.

    What both orders need, the three products for the gradients of A and B, does not count. Apart,
    h·B and its twin in the backward pass are computed and added to an activation: a read, and a
    read and a write of the sum. Summed, A·B is computed twice, written, read, added to W and read
    again. In less than float32 the sum would round ΔW away, so it is never formed.

    Args:
        tokens: rows of x.
        inputs: columns of x.
        outputs: columns of y.
        rank: r.
        dtype: of x, W, A and B, in which the sum would be.

    Source: the orders are those of Cherniuk et al., arXiv 2312.03415, without the two that form
    the gradient of W: they cost as much as full fine-tuning unless r is near the size of W.

    Examples:
        >>> plan(512, 512, 512, 8, jnp.float32), plan(2048, 384, 384, 8, jnp.float32)
        ('apart', 'summed')
        >>> plan(2048, 384, 384, 8, jnp.bfloat16)
        'apart'
    """
    if jnp.finfo(dtype).bits < 32:
        return "apart"
    if not all(isinstance(n, int) for n in (tokens, inputs, outputs)):
        return "apart"  # sizes of `jax.export` that are not known yet
    activation, weight = tokens * (inputs + outputs), inputs * outputs
    apart = activation * (2 * rank + 3 * MOVE)
    summed = 2 * weight * (2 * rank + 4 * MOVE)
    return "summed" if summed < apart else "apart"


def rounds(precision: Any) -> bool:
    """Whether a CPU rounds the operands of a float32 product in this precision."""
    if isinstance(precision, tuple):
        return any(map(rounds, precision))
    # What a `lax.Precision` says is said of accelerators: on a CPU all of them are float32.
    return precision not in (
        None,
        *lax.Precision,
        lax.DotAlgorithmPreset.F32_F32_F32,
        lax.DotAlgorithmPreset.F64_F64_F64,
    )


@jax.custom_jvp
def turned(p: jax.Array) -> jax.Array:
    """`p`, whose gradient a CPU computes as hᵀ·x: xᵀ·h takes it ten times as long."""
    return p


@turned.defjvp
def _turned_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    # Without the barrier XLA would turn the product round again.
    tangent = lax.optimization_barrier(jnp.moveaxis(tangents[0], -1, 0))
    return primals[0], jnp.moveaxis(tangent, 0, -1)
