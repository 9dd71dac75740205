"""Int8: 8 bits."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from ._scheme import Coded, Scheme

STEP = np.float32(7.874015718698502e-3)  # 1 / 127 as bitsandbytes has it


@dataclasses.dataclass(frozen=True)
class Int8(Scheme):
    r"""8-bit integers: $w = q\,s$ with $s = \max |w| / 127$, of each output or of each block.

    Without blocks the scale of an output is kept as $\max |w|$, and $w = (q \max |w|) / 127$, to a
    bit as bitsandbytes stores weights in 8 bits. With blocks it is $s$, as in GGUF's Q8_0.

    Attributes:
        pattern: a regular expression for whole components of a leaf's path; None for every
            dense site that is neither an embedding nor the head.
        block: entries along the last input axis that share a scale, 16 to 1,024, a power of 2; None
            for all inputs of an output.

    Raises:
        TypeError: if a field is of a wrong type.
        ValueError: if `pattern` is no regular expression, or `block` none of these.

    Source: Dettmers et al., LLM.int8(), arXiv 2208.07339, without its products in 8 bits.

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
        nonzero = jnp.where(largest > 0, largest, 1)
        if self.block is None:
            return Coded(jnp.round(w * (127 / nonzero)).astype(jnp.int8), largest)
        scale = largest / 127
        inverse = jnp.where(largest > 0, 1 / jnp.where(largest > 0, scale, 1), 0)
        return Coded(jnp.round(w * inverse).astype(jnp.int8), scale)

    def decode(self, codes: jax.Array, scale: jax.Array, zero: jax.Array | None) -> jax.Array:
        """Multiplies the code by the scale, which is 127 times too large for all inputs."""
        w = super().decode(codes, scale, zero)
        return w * STEP if self.block is None else w
