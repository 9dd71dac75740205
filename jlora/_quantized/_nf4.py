"""NF4: 4 bits, numbers at the quantiles of the normal distribution."""

import dataclasses
import itertools
from collections.abc import Sequence
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np

from .._rules import check_field
from ._scheme import Coded, Form, Scheme, along, divisor, lookup

NORMAL = np.array(
    [
        *(-1.0, -0.6961928009986877, -0.5250730514526367, -0.39491748809814453),
        *(-0.28444138169288635, -0.18477343022823334, -0.09105003625154495, 0.0),
        *(0.07958029955625534, 0.16093020141124725, 0.24611230194568634, 0.33791524171829224),
        *(0.44070982933044434, 0.5626170039176941, 0.7229568362236023, 1.0),
    ],
    np.float32,
)


@dataclasses.dataclass(frozen=True)
class Table(Scheme):
    """A scheme whose codes index a table of 16 numbers in [-1, 1], relative to the maximum."""

    block: int = 64
    double: bool = False

    bits: ClassVar[int] = 4
    scales: ClassVar[tuple[str, ...]] = ("float32", "uint8")
    legal: ClassVar[tuple[int, ...]] = (32, 64, 128, 256, 512, 1024, 2048, 4096)
    table: ClassVar[np.ndarray]

    def __post_init__(self) -> None:
        super().__post_init__()
        is_flag = isinstance(self.double, bool)
        check_field(self, "double", is_flag, "be True or False", TypeError)

    def form(
        self, shape: tuple[int, ...], stack: tuple[int, ...], order: tuple[int, ...], inputs: int
    ) -> Form:
        """Makes blocks along the last axis; if they do not divide it, through the whole matrix."""
        form = along(shape, stack, order, self.block)
        return form._replace(flat=shape[order[-1]] % self.block != 0)

    def encode(self, w: jax.Array, within: Sequence[int], short: jax.Array | None) -> Coded:
        """Picks the number nearest to w ÷ the block's maximum; a tie goes to the lower number."""
        largest = jnp.abs(w).max(within, keepdims=True)
        nonzero = divisor(largest)
        relative = w * (1 / nonzero)
        if short is not None:  # in a block that is not full, bitsandbytes divides
            relative = jnp.where(short, w / nonzero, relative)
        relative = jnp.clip(relative, -1, 1)
        order = np.argsort(self.table, kind="stable").astype(np.uint8)
        numbers = self.table[order]
        above = [relative > (a + b) / 2 for a, b in itertools.pairwise(numbers)]
        places = sum(x.astype(jnp.uint8) for x in above)
        return Coded(jnp.asarray(order)[places], largest)

    def decode(self, codes: jax.Array, scale: jax.Array, zero: jax.Array | None) -> jax.Array:
        """Multiplies the number of each code by the maximum of its block."""
        return lookup(self.table, codes) * scale


@dataclasses.dataclass(frozen=True)
class NF4(Table):
    r"""4-bit NormalFloat: $w = c_q \cdot \max_{block} |w|$, equal to bitsandbytes to the bit.

    The 16 numbers $c$ are quantiles of the normal distribution. Blocks run along the last input
    axis. If they do not divide it, they run through the whole matrix in the order of files,
    (outputs, inputs).

    Attributes:
        pattern: a regular expression that matches whole components of a leaf's path. None matches
            every dense site except embeddings, the head, and leaves trained in full.
        block: entries that share a scale: 32, 64, 128, 256, 512, 1,024, 2,048 or 4,096.
        double: whether to store the scales in 8 bits (double quantization) rather than in float32:
            with blocks of 64, this takes 4.127 bits per parameter rather than 4.5. For a scale
            halfway between two codes, bitsandbytes may choose the other.

    Raises:
        TypeError: if `pattern` is not a string, or `double` not a flag.
        ValueError: if `pattern` is not a regular expression, or `block` is not one of these.

    Source: Dettmers et al., QLoRA, arXiv 2305.14314, section 3.

    Examples:
        >>> import jax, jax.numpy as jnp, jlora
        >>> params = {"w": jax.random.normal(jax.random.key(0), (128, 64), jnp.bfloat16)}
        >>> base = jlora.quantize(params, jlora.NF4("w"))
        >>> base["w"], base["w"].data.shape, base["w"].scale.shape
        (Quantized(bfloat16[128,64], NF4(block=64, double=True)), (64, 64), (2, 64))
    """

    double: bool = True
    table: ClassVar[np.ndarray] = NORMAL
