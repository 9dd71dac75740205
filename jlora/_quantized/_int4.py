"""Int4: integers in 4 bits with a zero point."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp

from ._dynamic import round_product
from ._scheme import Coded, Scheme, divisor


@dataclasses.dataclass(frozen=True)
class Int4(Scheme):
    r"""4-bit integers in groups: $w = (q - z)\,s$ with an integer zero point $z$ in [0, 15].

    GPTQ, AWQ, compressed-tensors and GGUF store this form with 16-bit scales. If the `zero` of a
    leaf is floating-point, as in GGUF's Q4_1, then $w = q\,s + z$; a leaf without `zero` has z = 8.
    `jlora.quantize` makes bfloat16 scales: 4.19 bits per parameter in groups of 128.

    Attributes:
        pattern: a regular expression that matches whole components of a leaf's path. None matches
            every dense site except embeddings, the head, and leaves trained in full.
        group: entries along the last input axis that share s and z, a power of 2 from 16 to 1,024.

    Raises:
        TypeError: if `pattern` is not a string.
        ValueError: if `pattern` is not a regular expression, or `group` is not one of these.

    Source: Frantar et al., GPTQ, arXiv 2210.17323; Lin et al., AWQ, arXiv 2306.00978.

    Examples:
        >>> import jax, jax.numpy as jnp, jlora
        >>> w = jnp.arange(128.0).reshape(128, 1) * jnp.ones((1, 64))
        >>> base = jlora.quantize({"w": w}, jlora.Int4("w", group=64))
        >>> base["w"].data.shape, base["w"].scale.shape, base["w"].zero.dtype.name
        ((64, 64), (2, 64), 'uint8')
    """

    group: int = 128

    bits: ClassVar[int] = 4
    scales: ClassVar[tuple[str, ...]] = ("bfloat16", "float16", "float32")
    legal: ClassVar[tuple[int, ...]] = (16, 32, 64, 128, 256, 512, 1024)

    def encode(self, w: jax.Array, within: Sequence[int], short: jax.Array | None) -> Coded:
        """Rounds to 16 numbers between the group's minimum and maximum; 0 is one of them."""
        least = jnp.minimum(w.min(within, keepdims=True), 0)
        largest = jnp.maximum(w.max(within, keepdims=True), 0)
        scale = ((largest - least) / 15).astype(jnp.bfloat16)
        wide = divisor(scale.astype(jnp.float32))
        zero = jnp.clip(jnp.round(-least / wide), 0, 15)
        codes = jnp.clip(jnp.round(w / wide) + zero, 0, 15)
        return Coded(codes.astype(jnp.uint8), scale, zero.astype(jnp.uint8))

    def decode(self, codes: jax.Array, scale: jax.Array, zero: jax.Array | None) -> jax.Array:
        """Computes (q - z)·s, or q·s + z."""
        codes, scale = codes.astype(jnp.float32), scale.astype(jnp.float32)
        if zero is not None and jnp.issubdtype(zero.dtype, jnp.floating):
            return round_product(codes * scale) + zero.astype(jnp.float32)
        return (codes - (8 if zero is None else zero.astype(jnp.float32))) * scale
