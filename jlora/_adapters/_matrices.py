"""A and B as matrices, and back."""

import math

import jax
import jax.numpy as jnp

from .._core import promote
from .._types import Layout
from ._low_rank import LowRank, factor_shapes, stack_and_slots


def leading_axes(node: LowRank) -> int:
    """Counts the axes of A and B before those of a matrix: the stack's, and one of slots."""
    return len(stack_and_slots(node.layout))


def matrices(node: LowRank) -> tuple[jax.Array, jax.Array]:
    """Returns s·A as (stack and slots…, inputs, r) and B as (stack and slots…, r, outputs).

    Both are in float32 or better.
    """
    wide = promote(node.a.dtype, node.b.dtype, jnp.float32)
    a, b = (jnp.asarray(x, wide) for x in (node.a, node.b))
    n, rank = leading_axes(node), a.shape[-1]
    a = a.reshape(*a.shape[:n], math.prod(a.shape[n:-1]), rank)
    return node.scale * a, b.reshape(*b.shape[:n], rank, math.prod(b.shape[n + 1 :]))


def from_matrices(a: jax.Array, b: jax.Array, layout: Layout, shape: tuple[int, ...]) -> LowRank:
    """Makes the node, of scale 1, for a weight of `shape`, whose `matrices` are A and B."""
    of_a, of_b = factor_shapes(layout, shape, a.shape[-1])
    return LowRank(a.reshape(of_a), b.reshape(of_b), 1.0, layout)


def matrix_lengths(layout: Layout, shape: tuple[int, ...]) -> tuple[int, int]:
    """Counts the inputs and the outputs of each matrix of a weight, or of a slot if it has any."""
    inputs, outputs = (math.prod(shape[d] for d in axes) for axes in layout[1:3])
    return inputs, outputs // (layout.slots[0] if layout.slots else 1)
