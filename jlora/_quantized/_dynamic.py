"""Scales in 8 bits, as in bitsandbytes: double quantization.

The scales of 4-bit codes, minus their mean, are stored as 8-bit floating-point numbers relative to
the largest of each 256. The exponent of this type has a varying number of bits.

Source: Dettmers, arXiv 1511.04561, section 2.1, for the type; Dettmers et al., QLoRA,
arXiv 2305.14314, section 3, for double quantization.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from ._scheme import divisor, lookup

GROUP = 256  # scales that share one


def _positive() -> np.ndarray:
    """Computes the positive codes: midpoints of equal parts of [0.1, 1], times powers of 10.

    They equal those of files to the bit. For that, the ends of the parts are float64 sums of a
    float32 step, counted from the nearer end.
    """
    found = []
    low = np.float32(0.1)
    for i in range(7):
        k = np.arange(2**i + 1)
        step = (1 - low) / np.float32(2**i)
        ends = np.where(2 * k < k.size - 1, np.float64(low) + step * k, 1 - step * k[::-1])
        ends = ends.astype(np.float32)
        found.append((ends[1:] + ends[:-1]) / 2 * np.float32(f"1e{i - 6}"))
    return np.concatenate(found)


DYNAMIC = np.concatenate([-_positive()[::-1], [0], _positive(), [1]]).astype(np.float32)


def quantize_scales(scale: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Quantizes scales; returns codes, a scale for each group, and an offset.

    Args:
        scale: float32, shape (…, n).

    Returns:
        uint8 of the same shape, float32 of shape (…, ⌈n / 256⌉) and (…).
    """
    n = scale.shape[-1]
    offset = scale.mean(-1)
    groups = -(-n // GROUP)
    x = jnp.pad(scale - offset[..., None], [(0, 0)] * (scale.ndim - 1) + [(0, groups * GROUP - n)])
    x = x.reshape(*scale.shape[:-1], groups, GROUP)
    largest = jnp.abs(x).max(-1)
    relative = x / divisor(largest)[..., None]
    middles = (DYNAMIC[1:] + DYNAMIC[:-1]) / 2
    codes = jnp.searchsorted(middles, relative).astype(jnp.uint8)
    return codes.reshape(*codes.shape[:-2], groups * GROUP)[..., :n], largest, offset


def dequantize_scales(codes: jax.Array, scale: jax.Array, offset: jax.Array) -> jax.Array:
    """Recovers scales in float32 by a product and a sum, each rounded."""
    n = codes.shape[-1]
    shape = (*scale.shape, GROUP)
    each = jnp.broadcast_to(scale[..., None], shape).reshape(*shape[:-2], math.prod(shape[-2:]))
    return round_product(lookup(DYNAMIC, codes) * each[..., :n]) + offset[..., None]


def round_product(product: jax.Array) -> jax.Array:
    """Keeps XLA's CPU compiler from fusing the product with a sum, which would round only once."""
    return jnp.where(jnp.isnan(product), jnp.zeros((), product.dtype), product)
