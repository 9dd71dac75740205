"""The leaves of several adapters, and what must agree at a path so that they become one adapter.

Scales and slots may differ, as the same ΔW can be written with others. Dropout becomes 0 if it
differs, and `residual` must agree.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from .._adapters import LowRank, is_node, weight_shape, without_slots
from .._tree import adapter_leaves, is_empty, name_of
from .._types import Path, PyTree

RESIDUAL = "is for a base that its start changed"
FROM_THE_START = (
    "Give jlora.arithmetic.difference(adapter, initial) in its place, where `initial` is what init "
    "returned: that is for the parameters."
)


def flatten_each(adapters: Sequence[PyTree]) -> list[dict[Path, Any]]:
    """Returns the leaves of each adapter by path; raises if it is none or holds dropout keys."""
    if not isinstance(adapters, list | tuple) or not adapters or is_node(adapters):
        raise TypeError(
            "`adapters` must be a list of adapters, as `init` returns them; got "
            f"{'an empty one' if isinstance(adapters, list | tuple) else type(adapters).__name__}."
        )
    trees = [{} if is_empty(x) else adapter_leaves(x) for x in adapters]
    keyed = [p for tree in trees for p, x in tree.items() if is_node(x) and x.key is not None]
    refuse(
        "adapters must have no dropout keys, and there are some",
        dict.fromkeys(keyed, "has a key"),
        "Give jlora.dropout what comes out.",
    )
    return trees


def is_residual(leaf: Any) -> bool:
    """Whether a leaf is a node for a base that its start changed."""
    return is_node(leaf) and leaf.residual


def refuse(refusal: str, wrong: Mapping[Path, str], remedy: str) -> None:
    """Raises `ValueError` with all paths if anything is wrong."""
    if wrong:
        listed = "\n".join(f"  {name_of(path)}: {why}" for path, why in wrong.items())
        raise ValueError(f"{refusal} at these paths:\n{listed}\n{remedy}")


def refuse_other_methods(refusal: str, leaves: Iterable[tuple[Path, Any]], remedy: str) -> None:
    """Raises for nodes of other methods: their sum is no such node, and 0 is not their ΔW."""
    wrong = {
        p: f"is a {type(x).__name__}" for p, x in leaves if is_node(x) and type(x) is not LowRank
    }
    refuse(refusal, wrong, remedy)


def mismatch(leaves: Sequence[Any]) -> str | None:
    """Says why leaves at one path are not for one weight; returns None if they are."""
    if len({is_node(x) for x in leaves}) > 1:
        return "is of low rank in one and trained in full in another"
    if not is_node(leaves[0]):
        shapes = list(dict.fromkeys(tuple(x.shape) for x in leaves))
        return f"has the shapes {shapes}" if len(shapes) > 1 else None
    if len(set(map(is_residual, leaves))) > 1:
        return "is for the parameters in one, and in another for a base that its start changed"
    weights = list(dict.fromkeys((weight_shape(x), *x.layout[:3]) for x in leaves))
    return f"is for weights of (shape, stack, inputs, outputs) {weights}" if weights[1:] else None


def with_equal_slots(nodes: Sequence[LowRank]) -> list[LowRank]:
    """Rewrites nodes so that all have the same slots, or none, with the same ΔW."""
    if len({x.layout.slots for x in nodes}) == 1:
        return list(nodes)
    return [without_slots(x, weight_shape(x)) for x in nodes]


def join(nodes: Sequence[LowRank], a: Any, b: Any, scale: float) -> LowRank:
    """Makes the node of A and B that replaces `nodes`.

    A factor is frozen if it is frozen in all of them. Its dropout is theirs if they agree, else 0.
    """
    rates = {x.dropout for x in nodes}
    return nodes[0]._replace(
        a=a,
        b=b,
        scale=scale,
        dropout=rates.pop() if len(rates) == 1 else 0.0,
        materialize=any(x.materialize for x in nodes),
        frozen=tuple(sorted(set.intersection(*(set(x.frozen) for x in nodes)))),
    )
