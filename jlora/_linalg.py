"""Factorizations of matrices of which some lie on several devices."""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

TALL = 4  # rows of a block, as a multiple of its columns


def svd(a: jax.Array, b: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """U (…, inputs, n), S (…, n) and V (…, outputs, n) of A·B; n is at most r."""
    (q_a, r_a), (q_b, r_b) = qr(a), qr(b.mT)
    u, values, vt = svd_of(times(r_a, r_b.mT))
    return times(q_a, u), values, times(q_b, vt.mT)


def svd_of(x: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """U, S and Vᵀ of small matrices (…, m, n)."""
    return _where_alone(lambda x: tuple(jnp.linalg.svd(x, full_matrices=False)), x)


def norm(x: jax.Array, axes: tuple[int, ...]) -> jax.Array:
    """‖x‖ over some axes, also where the squares of its entries are too small or too large."""
    largest = jnp.abs(x).max(axes, keepdims=True, initial=0)
    unit = jnp.where((largest > 0) & jnp.isfinite(largest), largest, 1)
    return jnp.squeeze(unit, axes) * jnp.sqrt(jnp.square(x / unit).sum(axes))


def qr(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    """Q and R of matrices (…, n, r), the tall ones by blocks of rows.

    Householder's QR of each block, then of the blocks' R one above the other, and so on: as stable
    as that of the whole. Rows that lie on several devices stay there; what is gathered are R's.

    Source: Demmel et al., arXiv 0808.2664 (TSQR).
    """
    *stack, n, r = x.shape
    blocks = _blocks(n, r)
    if blocks == 1:
        return _where_alone(_qr, x)
    q, below = _where_alone(_qr, x.reshape(*stack, blocks, n // blocks, r))
    top, whole = qr(below.reshape(*stack, blocks * r, r))
    return times(q, top.reshape(*stack, blocks, r, r)).reshape(x.shape), whole


def _qr(x: jax.Array) -> tuple[jax.Array, jax.Array]:
    q, r = jnp.linalg.qr(x)
    return q, r


def _where_alone(f: Callable[[jax.Array], Any], x: jax.Array) -> Any:
    """`f` of all matrices at once where they may lie on several devices, else as by `each`."""
    return f(x) if jax.device_count() > 1 else each(f, x)


def _blocks(n: int, r: int) -> int:
    """The most equal blocks of n rows, a power of two as meshes are, of at least 4·r rows."""
    blocks = 1
    while n % (2 * blocks) == 0 and n >= 2 * blocks * TALL * r:
        blocks *= 2
    return blocks


def each(f: Callable[[jax.Array], Any], x: jax.Array, on_cpu: Any = None) -> Any:
    """`f` of matrices (…, m, n); on CPUs `on_cpu`, if that is given, of one matrix at a time.

    There JAX factors the matrices of a stack on threads, for which the caller waits on a thread:
    where a program factors as many stacks at once as there are threads, it waits for ever.
    """
    one = f if on_cpu is None else on_cpu

    def mapped(x: jax.Array) -> Any:
        if x.ndim == 2:
            return one(x)
        found = lax.map(one, x.reshape(math.prod(x.shape[:-2]), *x.shape[-2:]))
        return jax.tree.map(lambda y: y.reshape(*x.shape[:-2], *y.shape[1:]), found)

    return lax.platform_dependent(x, cpu=mapped, default=f)


def times(a: jax.Array, b: jax.Array) -> jax.Array:
    """A matrix product in full precision."""
    return jnp.matmul(a, b, precision=lax.Precision.HIGHEST)


def inverse(x: jax.Array) -> jax.Array:
    """The inverses of symmetric positive definite matrices (…, r, r), by Gauss and Jordan in place.

    Without LAPACK, so that on CPUs any number of them may be taken at once, and mapped: see `each`.
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
