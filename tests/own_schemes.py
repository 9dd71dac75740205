"""A scheme of the tests' own, for weights that are too small for the blocks of others."""

import dataclasses
from typing import ClassVar

import numpy as np

from jlora._quantized._nf4 import NORMAL, Table


@dataclasses.dataclass(frozen=True)
class Pairs(Table):
    """NF4 in blocks of two, with scales of scales: along an axis of even length, else flat."""

    block: int = 2
    double: bool = True
    table: ClassVar[np.ndarray] = NORMAL

    def __post_init__(self) -> None:
        """Any block is legal."""
