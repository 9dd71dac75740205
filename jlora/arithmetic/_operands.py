"""The leaves of several adapters, what must agree at a path, and the loop over paths.

Scales and slots may differ, as the same ΔW can be written with others. Dropout becomes 0 if it
differs, and `residual` must agree.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._adapters import LowRank, is_node, weight_shape, without_slots
from .._compat import is_concrete
from .._tree import adapter_leaves, check_fits, is_empty, leaves_by_path, name_of, nest
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


# ----------------------------------------------------------------- the arguments of sums and merges

Weights = Sequence[Any] | jax.Array | None
MERGE = "Merge these with the base."  # the remedy for nodes of other methods


class Operands(NamedTuple):
    """The checked arguments of a function.

    Attributes:
        sites: the leaves at each path, of the adapters that have one there, with their weights.
        weights: a weight for each adapter.
        base: the parameters, or None.
        refusal: how errors begin.
    """

    sites: dict[Path, list[tuple[Any, Any]]]
    weights: list[Any]
    base: PyTree
    refusal: str


def check_operands(
    adapters: Sequence[PyTree], weights: Weights, base: PyTree, refusal: str
) -> Operands:
    """Checks the arguments of a function; the leaves at a path must be for one weight."""
    trees = flatten_each(adapters)
    w = [1.0] * len(trees) if weights is None else _entries(weights)
    if len(w) != len(trees):
        raise ValueError(
            f"`weights` must be one for each of the {len(trees)} adapters; got {len(w)}."
        )
    check_finite("weights", w)
    refuse_other_methods(refusal, (leaf for tree in trees for leaf in tree.items()), MERGE)
    for tree in trees if base is not None else ():
        check_fits(base, tree)
    sites: dict[Path, list[tuple[Any, Any]]] = {}
    for tree, v in zip(trees, w, strict=True):
        for path, x in tree.items():
            sites.setdefault(path, []).append((x, v))
    wrong = {p: why for p, pairs in sites.items() if (why := mismatch([x for x, _ in pairs]))}
    refuse(refusal, wrong, "Adapters that are combined must be of one base.")
    return Operands(sites, w, base, refusal)


def check_merge(
    adapters: Sequence[PyTree], weights: Weights, base: PyTree, density: float
) -> Operands:
    """Checks the arguments of a merge by entries, for which ΔW = 0 must be the model."""
    if not 0 < density <= 1:
        raise ValueError(f"`density` must lie in (0, 1]; got {density!r}.")
    given = check_operands(adapters, weights, base, "`adapters` cannot be combined")
    residual = [path for path, [(x, _), *_] in given.sites.items() if is_residual(x)]
    wrong = dict.fromkeys(residual, f"{RESIDUAL}, so that a ΔW of 0 is not the model")
    refuse(given.refusal, wrong, FROM_THE_START)
    return given


def _entries(weights: Sequence[Any] | jax.Array) -> list[Any]:
    """Lists the weights; those of an array that a traced function closes over have values."""
    has_values = isinstance(weights, jax.Array) and is_concrete(weights)
    return list(np.asarray(weights) if has_values else weights)


def check_finite(argument: str, values: Sequence[Any]) -> None:
    """Raises if a number whose value is known is not finite."""
    if wrong := [x for x in values if is_concrete(x) and not np.isfinite(x)]:
        raise ValueError(f"`{argument}` must be finite; got {wrong[0]}.")


def combine_leaves(
    given: Operands,
    low_rank: Callable[[list[LowRank], list[Any], Path], LowRank],
    full: Callable[[list[Any], Path], Any],
    keeps_one: bool = False,
) -> PyTree:
    """Combines the nodes at each path by `low_rank`, and the changes of leaves in full by `full`.

    If it `keeps_one`, a leaf in full that one adapter alone has, with weight 1, stays as it is.
    """

    def is_kept(pairs: list[tuple[Any, Any]]) -> bool:
        return keeps_one and len(pairs) == 1 and is_one(pairs[0][1])

    in_full = {path: pairs for path, pairs in given.sites.items() if not is_node(pairs[0][0])}
    changed = [path for path, pairs in in_full.items() if not is_kept(pairs)]
    if given.base is None:
        needed = "is trained in full, so that its change is known from the base alone"
        remedy = "Give `base`, the parameters that they are for."
        refuse(given.refusal, dict.fromkeys(changed, needed), remedy)
    params = dict(leaves_by_path(given.base)) if changed else {}

    def combine(path: Path, pairs: list[tuple[Any, Any]]) -> Any:
        leaves, w = (list(x) for x in zip(*pairs, strict=True))
        if path not in in_full:
            return low_rank(with_equal_slots(leaves), w, path)
        if is_kept(pairs):
            return leaves[0]
        start = jnp.asarray(params[path])
        wide = jnp.promote_types(start.dtype, jnp.float32)
        start, dtype = start.astype(wide), leaves[0].dtype
        changes = [v * (x.astype(wide) - start) for x, v in zip(leaves, w, strict=True)]
        return (start + full(changes, path)).astype(dtype)

    return nest({path: combine(path, pairs) for path, pairs in given.sites.items()})


def is_one(w: Any) -> bool:
    """Whether a weight is the number 1, not an array."""
    return isinstance(w, int | float) and w == 1
