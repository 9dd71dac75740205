"""The arguments that sums and merges share, and the loop over paths."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._adapters import LowRank, is_node
from .._compat import is_concrete
from .._tree import check_fits, leaves_by_path, nest
from .._types import Path, PyTree
from ._several import (
    FROM_THE_START,
    RESIDUAL,
    flatten_each,
    is_residual,
    mismatch,
    refuse,
    refuse_other_methods,
    with_equal_slots,
)

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
