"""A scheme of the tests' own, for weights that are too small for the blocks of others."""

import dataclasses

import jlora


@dataclasses.dataclass(frozen=True)
class Pairs(jlora.NF4):
    """NF4 in blocks of two, with scales of scales: along an axis of even length, else flat."""

    block: int = 2

    def __post_init__(self) -> None:
        """Any block is legal."""
