"""A and B as matrices."""

import math

import jax
import jax.numpy as jnp

from ._low_rank import LowRank, stack_and_slots


def leading_axes(node: LowRank) -> int:
    """Counts the axes of A and B before those of a matrix: the stack's, and one of slots."""
    return len(stack_and_slots(node.layout))


def matrices(node: LowRank) -> tuple[jax.Array, jax.Array]:
    """Returns s·A as (stack and slots…, inputs, r) and B as (stack and slots…, r, outputs).

    Both are in float32 or better.
    """
    wide = jnp.promote_types(jnp.result_type(node.a, node.b), jnp.float32)
    a, b = (jnp.asarray(x, wide) for x in (node.a, node.b))
    n, rank = leading_axes(node), a.shape[-1]
    a = a.reshape(*a.shape[:n], math.prod(a.shape[n:-1]), rank)
    return node.scale * a, b.reshape(*b.shape[:n], rank, math.prod(b.shape[n + 1 :]))
