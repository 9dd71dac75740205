"""FP4: 4 bits, a floating-point number."""

import dataclasses
from typing import ClassVar

import numpy as np

from ._nf4 import Table

_MAGNITUDES = np.array([0, 0.0625, 8, 12, 4, 6, 2, 3], np.float32)


@dataclasses.dataclass(frozen=True)
class FP4(Table):
    r"""4-bit floating point of bitsandbytes: $w = c_q \cdot \max_{block} |w|$, to a bit.

    The numbers $c$ are 0, 0.0625, 2, 3, 4, 6, 8, 12, over 12, of either sign. NF4 is the better
    choice where there is one: its error on weights that are normally distributed is smaller.

    Attributes:
        pattern: a regular expression for whole components of a leaf's path; None for every
            dense site that is neither an embedding nor the head.
        block: entries that share a scale: 32, 64, 128, 256, 512, 1,024, 2,048 or 4,096.
        double: whether the scales are codes of 8 bits themselves.

    Raises:
        TypeError: if a field is of a wrong type.
        ValueError: if `pattern` is no regular expression, or `block` none of these.

    Source: bitsandbytes; Dettmers et al., QLoRA, arXiv 2305.14314, section 4, compares them.

    Examples:
        >>> import jlora
        >>> jlora.FP4(r"kernel")
        FP4(pattern='kernel', block=64, double=False)
    """

    # -0.0 is 0.0 there too.
    table: ClassVar[np.ndarray] = np.concatenate([_MAGNITUDES, 0 - _MAGNITUDES]) / np.float32(12)
