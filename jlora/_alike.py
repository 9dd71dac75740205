"""Leaves of several adapters at one path: whether they are for one weight, and in one form."""

from collections.abc import Sequence
from typing import Any

from .adapters import LowRank, is_node, weight_shape, without_slots


def misfit(leaves: Sequence[Any]) -> str | None:
    """Why leaves at one path are not for one weight."""
    if len({is_node(x) for x in leaves}) > 1:
        return "is of low rank in one and trained in full in another"
    if not is_node(leaves[0]):
        shapes = list(dict.fromkeys(tuple(x.shape) for x in leaves))
        return f"has the shapes {shapes}" if len(shapes) > 1 else None
    weights = list(dict.fromkeys((weight_shape(x), *x.layout[:3]) for x in leaves))
    return f"is for weights of (shape, stack, inputs, outputs) {weights}" if weights[1:] else None


def alike(nodes: Sequence[LowRank]) -> list[LowRank]:
    """The same ΔW with slots as all have them, or with none."""
    if len({x.layout.slots for x in nodes}) == 1:
        return list(nodes)
    return [without_slots(x, weight_shape(x)) for x in nodes]
