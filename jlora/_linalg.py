"""Factorizations of matrices, also of sharded ones."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

TALL = 4  # rows of a block, as a multiple of its columns


def svd(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns U (…, inputs, n), S (…, n) and V (…, outputs, n) of A·B; n is at most r."""
    (q_a, r_a), (q_b, r_b) = qr(a), qr(b.mT)
    u, values, vt = svd_of(times(r_a, r_b.mT))
    return times(q_a, u), values, times(q_b, vt.mT)


def svd_of(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Returns U, S and Vᵀ of small matrices (…, m, n)."""
    return _factor(lambda x: tuple(jnp.linalg.svd(x, full_matrices=False)), x)


def norm(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """Returns ‖x‖ over some axes, also if the squares of its entries would under- or overflow."""
    largest = jnp.abs(x).max(axes, keepdims=True, initial=0)
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    return jnp.squeeze(unit, axes) * jnp.sqrt(jnp.square(x / unit).sum(axes))


def qr(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Returns Q and R of matrices (…, n, r); tall matrices are factored in blocks of rows.

    Each block has its own Householder QR. The R's of the blocks are stacked and factored in turn,
    and so on. This is as stable as the QR of the whole matrix. Sharded rows stay on their devices;
    only the R's are gathered.

    Source: Demmel et al., arXiv 0808.2664 (TSQR).
    """
    *stack, n, r = x.shape
    blocks = _blocks(n, r)
    if blocks == 1:
        return _factor(lambda x: tuple(jnp.linalg.qr(x)), x)
    q, below = qr(x.reshape(*stack, blocks, n // blocks, r))
    top, whole = qr(below.reshape(*stack, blocks * r, r))
    return times(q, top.reshape(*stack, blocks, r, r)).reshape(x.shape), whole


def _factor(f: Callable[[jax.Array], Any], x: jax.Array) -> Any:
    """Applies `f` to all matrices at once if a mesh is in scope, else by `map_matrices`.

    The choice only matters on CPUs, where a map over a sharded stack gathers the stack. Without a
    mesh in scope, tracing cannot tell whether `x` is sharded.
    """
    mesh = jax.sharding.get_abstract_mesh()
    return map_matrices(f, x) if mesh.empty else f(x)


def _blocks(n: int, r: int) -> int:
    """Counts the blocks of equal size: a power of two, as in meshes, of at least 4·r rows each."""
    blocks = 1
    while n % (2 * blocks) == 0 and n >= 2 * blocks * TALL * max(r, 1):
        blocks *= 2
    return blocks


def map_matrices(
    f: Callable[[jax.Array], Any], x: jax.Array, on_cpu: Callable[[jax.Array], Any] | None = None
) -> Any:
    """Applies `f` to matrices (…, m, n); on CPUs it applies `on_cpu`, or `f`, to one at a time.

    On CPUs JAX factors the matrices of a stack on a pool of threads, and blocks one of the threads
    meanwhile. So a program that factors as many stacks as there are threads would wait forever.
    """
    one = f if on_cpu is None else on_cpu

    def mapped(x: jax.Array) -> Any:
        if x.ndim == 2:
            return one(x)
        found = lax.map(one, x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:]))
        return jax.tree.map(lambda y: y.reshape(*x.shape[:-2], *y.shape[1:]), found)

    return lax.platform_dependent(x, cpu=mapped, default=f)


def times(a: jax.Array, b: jax.Array) -> jax.Array:
    """Multiplies matrices in full precision."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def inverse(x: jax.Array) -> jax.Array:
    """Inverts symmetric positive definite matrices (…, r, r) by Gauss-Jordan elimination in place.

    It does not use LAPACK, so on CPUs it can invert many at once: see `map_matrices`.
    """
    places = jnp.arange(x.shape[-1])

    def step(k: jax.Array, x: jax.Array) -> jax.Array:
        row, column = (lax.dynamic_index_in_dim(x, k, axis, keepdims=True) for axis in (-2, -1))
        pivot = lax.dynamic_index_in_dim(row, k, -1, keepdims=True)
        row = row / pivot
        is_row, is_column = (places == k)[:, None], (places == k)[None, :]
        rest = jnp.where(is_column, -column / pivot, x - column * row)
        return jnp.where(is_row, jnp.where(is_column, 1 / pivot, row), rest)

    return lax.fori_loop(0, x.shape[-1], step, x)
