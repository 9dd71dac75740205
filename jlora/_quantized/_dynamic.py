"""Scales in 8 bits, as bitsandbytes has them: double quantization.

The scales of 4-bit codes, less their mean, are codes of 8 bits of a floating-point type whose
exponent takes as many bits as it needs, relative to the largest of each 256.

Source: Dettmers, arXiv 1511.04561, section 2.1, for the type; Dettmers et al., QLoRA,
arXiv 2305.14314, section 3, for double quantization.
"""

import math

import jax
import jax.numpy as jnp
import numpy as np

from ._scheme import lookup

GROUP = 256  # scales that share one

# As they are in files: to a bit what no formula in float32 gives on every machine.
_NUMBERS = """
5.5000004e-7 3.2500002e-6 7.75e-6 2.1249998e-5 4.375e-5 6.625e-5 8.875e-5 1.5625001e-4
2.6875004e-4 3.8125002e-4 4.9375003e-4 6.062501e-4 7.1875006e-4 8.3125e-4 9.437501e-4
1.2812499e-3 1.84375e-3 2.40625e-3 2.96875e-3 3.5312497e-3 4.09375e-3 4.6562497e-3
5.2187503e-3 5.78125e-3 6.34375e-3 6.90625e-3 7.46875e-3 8.03125e-3 8.59375e-3 9.156249e-3
9.71875e-3 0.01140625 0.01421875 0.01703125 0.019843752 0.02265625 0.02546875 0.028281251
0.03109375 0.03390625 0.036718752 0.03953125 0.042343747 0.04515625 0.04796875 0.05078125
0.05359375 0.05640625 0.059218753 0.06203125 0.06484375 0.067656256 0.070468746 0.07328125
0.07609375 0.07890625 0.08171876 0.08453125 0.08734375 0.09015625 0.092968754 0.09578126
0.09859375 0.107031256 0.12109375 0.13515624 0.14921875 0.16328125 0.17734376 0.19140625
0.20546874 0.21953125 0.23359375 0.24765624 0.26171875 0.27578127 0.28984374 0.30390626
0.31796873 0.33203125 0.34609374 0.36015624 0.37421876 0.38828123 0.40234375 0.41640624
0.43046874 0.44453126 0.45859373 0.47265625 0.4867187 0.50078124 0.5148437 0.5289062
0.54296875 0.5570313 0.5710938 0.58515626 0.5992187 0.61328125 0.6273438 0.6414063 0.65546876
0.6695312 0.68359375 0.6976563 0.7117188 0.72578126 0.7398437 0.75390625 0.7679688 0.78203124
0.79609376 0.8101562 0.82421875 0.8382813 0.85234374 0.86640626 0.8804687 0.89453125 0.9085938
0.92265624 0.93671876 0.9507812 0.96484375 0.9789063 0.99296874
"""
_POSITIVE = np.array(_NUMBERS.split(), np.float32)
DYNAMIC = np.concatenate([-_POSITIVE[::-1], [0], _POSITIVE, [1]]).astype(np.float32)


def quantize_scales(scale: jax.Array) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Quantizes scales: returns codes, a scale for each group, and an offset.

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
    relative = x / jnp.where(largest > 0, largest, 1)[..., None]
    middles = (DYNAMIC[1:] + DYNAMIC[:-1]) / 2
    codes = jnp.searchsorted(middles, relative).astype(jnp.uint8)
    return codes.reshape(*codes.shape[:-2], groups * GROUP)[..., :n], largest, offset


def dequantize_scales(codes: jax.Array, scale: jax.Array, offset: jax.Array) -> jax.Array:
    """Computes the scales of `quantize_scales` in float32: a product and a sum, each rounded."""
    n = codes.shape[-1]
    shape = (*scale.shape, GROUP)
    each = jnp.broadcast_to(scale[..., None], shape).reshape(*shape[:-2], math.prod(shape[-2:]))
    return rounded(lookup(DYNAMIC, codes) * each[..., :n]) + offset[..., None]


def rounded(product: jax.Array) -> jax.Array:
    """Multiplies so that XLA's CPU compiler does not fuse a sum, which would round only once."""
    return jnp.where(jnp.isnan(product), jnp.zeros((), product.dtype), product)
