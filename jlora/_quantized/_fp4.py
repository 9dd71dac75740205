"""FP4: floating point in 4 bits."""

import dataclasses
from typing import ClassVar

import numpy as np

from ._nf4 import Table

_MAGNITUDES = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32)


@dataclasses.dataclass(frozen=True)
class FP4(Table):
    r"""4-bit floating point: $w = c_q \cdot \max_{block} |w|$, equal to bitsandbytes to the bit.

    Prefer `NF4` if you can choose: its error on normally distributed weights is smaller. The
    numbers $c$ are 0, 0.0625, 2, 3, 4, 6, 8 and 12 of either sign, divided by 12.

    Attributes:
        pattern: a regular expression that matches whole components of a leaf's path. None matches
            every dense site except embeddings, the head, and leaves trained in full.
        block: entries that share a scale: 32, 64, 128, 256, 512, 1,024, 2,048 or 4,096.
        double: whether to store the scales in 8 bits (double quantization) rather than in float32.

    Raises:
        TypeError: if `pattern` is not a string, or `double` not a flag.
        ValueError: if `pattern` is not a regular expression, or `block` is not one of these.

    Source: bitsandbytes. Dettmers et al., QLoRA, arXiv 2305.14314, section 4, compare FP4 with NF4.

    Examples:
        >>> import jlora
        >>> jlora.FP4(r"kernel")
        FP4(pattern='kernel', block=64, double=False)
    """

    # bitsandbytes has 0.0 for -0.0 too.
    table: ClassVar[np.ndarray] = np.concatenate([_MAGNITUDES, 0 - _MAGNITUDES]) / np.float32(12)
