"""FP8: floating point in 8 bits."""

import dataclasses
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp

from ._scheme import Coded, Form, Scheme, along, divisor, one_block

LARGEST = 448.0


@dataclasses.dataclass(frozen=True)
class FP8(Scheme):
    r"""8-bit floating point (e4m3): $w = q\,s$ with $s = \max_{block} |w| / 448$ in float32.

    Attributes:
        pattern: a regular expression that matches whole components of a leaf's path. None matches
            every dense site except embeddings, the head, and leaves trained in full.
        block: side of the squares that share a scale, a power of 2 from 32 to 512. DeepSeek and
            Qwen publish 128 × 128. The last blocks may be smaller. With None, each output has one
            scale.

    Raises:
        TypeError: if `pattern` is not a string.
        ValueError: if `pattern` is not a regular expression, or `block` is not one of these.

    Source: Micikevicius et al., arXiv 2209.05433, for the type; DeepSeek-V3, arXiv 2412.19437,
    section 3.3, for the blocks.

    Examples:
        >>> import jax, jax.numpy as jnp, jlora
        >>> base = jlora.quantize({"w": jnp.ones((256, 192))}, jlora.FP8("w"))
        >>> base["w"].data.dtype.name, base["w"].scale.shape
        ('float8_e4m3fn', (2, 2))
    """

    block: int | None = 128

    bits: ClassVar[int] = 8
    legal: ClassVar[tuple[int, ...]] = (32, 64, 128, 256, 512)
    is_optional: ClassVar[bool] = True

    def form(
        self, shape: tuple[int, ...], stack: tuple[int, ...], order: tuple[int, ...], inputs: int
    ) -> Form:
        """Makes squares of the last input axis and the last output axis, or one block an output."""
        if self.block is None or len(order) == inputs:
            return one_block(shape, stack, order, inputs)
        blocks = list(along(shape, stack, order, self.block).blocks)
        blocks[order[-inputs - 1]] = self.block
        return Form(shape, stack, order, tuple(blocks))

    def encode(self, w: jax.Array, within: Sequence[int], short: jax.Array | None) -> Coded:
        """Rounds w ÷ s to the nearest number of the type."""
        largest = jnp.abs(w).max(within, keepdims=True)
        scale = largest / LARGEST
        relative = w / divisor(scale)
        codes = jnp.clip(relative, -LARGEST, LARGEST).astype(jnp.float8_e4m3fn)
        return Coded(codes, scale)
