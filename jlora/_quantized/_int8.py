"""Int8: integers in 8 bits."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ._scheme import Coded, Scheme, divisor

STEP = np.float32(7.874015718698502e-3)  # 1 / 127 as in bitsandbytes


@dataclasses.dataclass(frozen=True)
class Int8(Scheme):
    r"""8-bit integers: $w = q\,s$ with $s = \max |w| / 127$ of each output or of each block.

    With blocks it stores $s$, as GGUF's Q8_0 does. Without blocks it stores $\max |w|$ of each
    output and computes $w = (q \max |w|) / 127$, equal to bitsandbytes to the bit.
    `jlora.quantize` makes float32 scales.

    Attributes:
        pattern: a regular expression that matches whole components of a leaf's path. None matches
            every dense site except embeddings, the head, and leaves trained in full.
        block: entries along the last input axis that share a scale, a power of 2 from 16 to 1,024.
            With None, each output has one scale.

    Raises:
        TypeError: if `pattern` is not a string.
        ValueError: if `pattern` is not a regular expression, or `block` is not one of these.

    Source: Dettmers et al., LLM.int8(), arXiv 2208.07339; its 8-bit products are not implemented.

    Examples:
        >>> import jax, jax.numpy as jnp, jlora
        >>> base = jlora.quantize({"w": jnp.ones((128, 64))}, jlora.Int8("w"))
        >>> base["w"].data.dtype.name, base["w"].scale.shape
        ('int8', (64,))
    """

    block: int | None = None

    bits: ClassVar[int] = 8
    scales: ClassVar[tuple[str, ...]] = ("float32", "float16")
    legal: ClassVar[tuple[int, ...]] = (16, 32, 64, 128, 256, 512, 1024)
    is_optional: ClassVar[bool] = True

    def encode(self, w: jax.Array, within: Sequence[int], short: jax.Array | None) -> Coded:
        """Rounds to the nearest multiple of the scale."""
        largest = jnp.abs(w).max(within, keepdims=True)
        if self.block is None:
            return Coded(jnp.round(w * (127 / divisor(largest))).astype(jnp.int8), largest)
        scale = largest / 127
        return Coded(jnp.round(w * (1 / divisor(scale))).astype(jnp.int8), scale)

    def decode(self, codes: jax.Array, scale: jax.Array, zero: jax.Array | None) -> jax.Array:
        """Multiplies the code by the scale; without blocks, the stored scale is 127 times s."""
        w = super().decode(codes, scale, zero)
        return w * STEP if self.block is None else w
