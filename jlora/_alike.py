"""Several adapters: their leaves, whether those at one path are for one weight, and in one form.

Of the static fields of `LowRank` scales and slots may differ, as ΔW can be written with others;
dropout is 0 where it differs. `residual` must be one, and in a table `frozen` too.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from ._adapters import LowRank, is_node, weight_shape, without_slots
from ._tree import adapter_leaves, is_empty, name_of
from ._types import Path, PyTree

RESIDUAL = "is for a base that its start changed"
FROM_THE_START = (
    "Give jlora.arithmetic.difference(adapter, initial) in its place, where `initial` is what init "
    "returned: that is for the parameters."
)


def leaves_of(adapters: Sequence[PyTree]) -> list[dict[Path, Any]]:
    """The leaves of each adapter by path; an error if they are none, or hold dropout keys."""
    if not isinstance(adapters, list | tuple) or not adapters or is_node(adapters):
        raise TypeError(
            "`adapters` must be a list of adapters, as `init` returns them; got "
            f"{'an empty one' if isinstance(adapters, list | tuple) else type(adapters).__name__}."
        )
    trees = [{} if is_empty(x) else adapter_leaves(x) for x in adapters]
    refuse(
        "adapters must have no dropout keys, and there are some",
        {p: "has a key" for tree in trees for p, x in tree.items() if has_key(x)},
        "Give jlora.dropout what comes out.",
    )
    return trees


def has_key(leaf: Any) -> bool:
    return is_node(leaf) and leaf.key is not None


def is_residual(leaf: Any) -> bool:
    """Whether a leaf is of low rank, and for a base that its start changed."""
    return is_node(leaf) and leaf.residual


def of_other_methods(leaves: Iterable[tuple[Path, Any]]) -> dict[Path, str]:
    """The nodes that are no `LowRank`, and what they are."""
    found = [(path, x) for path, x in leaves if is_node(x) and type(x) is not LowRank]
    return {path: f"is a {type(x).__name__}" for path, x in found}


def refuse(refusal: str, wrong: Mapping[Path, str], remedy: str) -> None:
    """`ValueError`, if anything is wrong, that names all paths."""
    if wrong:
        listed = "\n".join(f"  {name_of(path)}: {why}" for path, why in wrong.items())
        raise ValueError(f"{refusal} at these paths:\n{listed}\n{remedy}")


def misfit(leaves: Sequence[Any]) -> str | None:
    """Why leaves at one path are not for one weight."""
    if len({is_node(x) for x in leaves}) > 1:
        return "is of low rank in one and trained in full in another"
    if not is_node(leaves[0]):
        shapes = list(dict.fromkeys(tuple(x.shape) for x in leaves))
        return f"has the shapes {shapes}" if len(shapes) > 1 else None
    if len(set(map(is_residual, leaves))) > 1:
        return "is for the parameters in one, and in another for a base that its start changed"
    weights = list(dict.fromkeys((weight_shape(x), *x.layout[:3]) for x in leaves))
    return f"is for weights of (shape, stack, inputs, outputs) {weights}" if weights[1:] else None


def misfit_in_table(leaves: Sequence[Any]) -> str | None:
    """Why leaves at one path are not for one weight, or what trains them is another."""
    frozen = list(dict.fromkeys(x.frozen if is_node(x) else () for x in leaves))
    if (why := misfit(leaves)) or not frozen[1:]:
        return why
    return (
        f"trains other factors in one than in another: `frozen` is {frozen[0]} and {frozen[1]}; "
        "node._replace(frozen=()) trains both"
    )


def alike(nodes: Sequence[LowRank]) -> list[LowRank]:
    """The same ΔW with slots as all have them, or with none."""
    if len({x.layout.slots for x in nodes}) == 1:
        return list(nodes)
    return [without_slots(x, weight_shape(x)) for x in nodes]


def joined(nodes: Sequence[LowRank], a: Any, b: Any, scale: float) -> LowRank:
    """The node of A and B in the place of `nodes`, with what is frozen in all.

    Its dropout is theirs if they agree, else 0.
    """
    rates = {x.dropout for x in nodes}
    dropout = rates.pop() if len(rates) == 1 else 0.0
    materialize = any(x.materialize for x in nodes)
    frozen = tuple(sorted(set.intersection(*(set(x.frozen) for x in nodes))))
    static = {"frozen": frozen, "residual": nodes[0].residual}
    return LowRank(a, b, scale, nodes[0].layout, dropout, materialize, **static)
