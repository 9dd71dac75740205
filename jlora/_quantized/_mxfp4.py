"""MXFP4: floating point in 4 bits, with a power of 2 for each 32."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from ._scheme import Coded, Scheme, lookup

_MAGNITUDES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)
TABLE = np.concatenate([_MAGNITUDES, -_MAGNITUDES])
BIAS = 127


@dataclasses.dataclass(frozen=True)
class MXFP4(Scheme):
    r"""4-bit floating point (e2m1) in blocks of 32: $w = c_q \cdot 2^{s - 127}$.

    The numbers $c$ are 0, 0.5, 1, 1.5, 2, 3, 4 and 6 of either sign; $s$ is a byte: 4.25 bits per
    parameter. The experts of gpt-oss are published in this form.

    Attributes:
        pattern: a regular expression that matches whole components of a leaf's path. None matches
            every dense site except embeddings, the head, and leaves trained in full.

    Raises:
        TypeError: if `pattern` is not a string.
        ValueError: if `pattern` is not a regular expression.

    Source: Open Compute Project, Microscaling Formats (MX) 1.0, sections 5.3 and 6.3.

    Examples:
        >>> import jax, jax.numpy as jnp, jlora
        >>> base = jlora.quantize({"w": jnp.ones((64, 8))}, jlora.MXFP4("w"))
        >>> base["w"].scale.dtype.name, float(jlora.dequantize(base)["w"][0, 0])
        ('uint8', 1.0)
    """

    bits: ClassVar[int] = 4
    scales: ClassVar[tuple[str, ...]] = ("uint8",)
    block: ClassVar[int] = 32
    legal: ClassVar[tuple[int, ...]] = (32,)

    def encode(self, w: jax.Array, within: Sequence[int], short: jax.Array | None) -> Coded:
        """Rounds w ÷ the power to the nearest number; a tie goes to the one whose last bit is 0."""
        largest = jnp.abs(w).max(within, keepdims=True)
        exponent = jnp.frexp(largest)[1] - 1 - 2  # so that the largest quotient is in [4, 8)
        exponent = jnp.clip(jnp.where(largest > 0, exponent, -BIAS), 1 - BIAS, BIAS)
        relative = jnp.abs(w) / _power(exponent + BIAS)
        above = [
            relative > (a + b) / 2 if i % 2 == 0 else relative >= (a + b) / 2
            for i, (a, b) in enumerate(itertools.pairwise(_MAGNITUDES))
        ]
        codes = sum(x.astype(jnp.uint8) for x in above) | (jnp.signbit(w).astype(jnp.uint8) << 3)
        return Coded(codes, (exponent + BIAS).astype(jnp.uint8))

    def decode(self, codes: jax.Array, scale: jax.Array, zero: jax.Array | None) -> jax.Array:
        """Multiplies the number of each code by the power."""
        return lookup(TABLE, codes) * _power(scale)


def _power(scale: jax.Array) -> jax.Array:
    """Computes 2^(scale - 127) in float32; NaN for 255."""
    bits = scale.astype(jnp.uint32)
    bits = jnp.where(bits == 0, jnp.uint32(1 << 22), bits << 23)
    return jnp.where(scale == 255, jnp.nan, lax.bitcast_convert_type(bits, jnp.float32))
