"""What a function was given, site by site."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._adapters import LowRank, is_node
from .._alike import (
    FROM_THE_START,
    RESIDUAL,
    alike,
    is_residual,
    leaves_of,
    misfit,
    of_other_methods,
    refuse,
)
from .._compat import is_concrete
from .._tree import check_fits, leaves_by_path, nest
from .._types import Path, PyTree

Weights = Sequence[Any] | jax.Array | None


class Given(NamedTuple):
    """What a function was given.

    Attributes:
        trees: the leaves of each adapter by path.
        weights: a weight for each.
        base: the parameters, or None.
        refusal: how its errors begin.
    """

    trees: list[dict[Path, Any]]
    weights: list[Any]
    base: PyTree
    refusal: str


def checked(adapters: Sequence[PyTree], weights: Weights, base: PyTree, refusal: str) -> Given:
    trees = leaves_of(adapters)
    w = [1.0] * len(adapters) if weights is None else _entries(weights)
    if len(w) != len(adapters):
        raise ValueError(
            f"`weights` must be one for each of the {len(adapters)} adapters; got {len(w)}."
        )
    check_finite("weights", w)
    refuse_others(trees, refusal)
    if base is not None:
        for tree in trees:
            check_fits(base, tree)
    return Given(trees, w, base, refusal)


def _entries(weights: Sequence[Any] | jax.Array) -> list[Any]:
    """One by one. Those of an array that a traced function closes over have values."""
    known = isinstance(weights, jax.Array) and is_concrete(weights)
    return list(np.asarray(weights) if known else weights)


def refuse_residual(given: Given) -> None:
    """Raises for adapters of a base that a start changed, of which 0 is not the model."""
    residual = [path for tree in given.trees for path, x in tree.items() if is_residual(x)]
    wrong = dict.fromkeys(residual, f"{RESIDUAL}, so that a ΔW of 0 is not the model")
    refuse(given.refusal, wrong, FROM_THE_START)


def check_finite(argument: str, values: Sequence[Any]) -> None:
    if wrong := [x for x in values if is_concrete(x) and not np.isfinite(x)]:
        raise ValueError(f"`{argument}` must be finite; got {wrong[0]}.")


def check_density(density: float) -> None:
    if not 0 < density <= 1:
        raise ValueError(f"`density` must lie in (0, 1]; got {density!r}.")


def refuse_others(trees: Sequence[Mapping[Path, Any]], refusal: str) -> None:
    """Raises for nodes of other methods, whose sum is no node of theirs."""
    wrong = of_other_methods(leaf for tree in trees for leaf in tree.items())
    refuse(refusal, wrong, "Merge these with the base.")


def each(
    given: Given,
    low_rank: Callable[[list[LowRank], list[Any], Path], LowRank],
    full: Callable[[list[Any], Path], Any],
    keeps_one: bool = False,
) -> PyTree:
    """What `low_rank` makes of the nodes at each path, and `full` of the changes of leaves.

    If it `keeps_one`, a leaf in full of one adapter alone, of weight 1, stays as it is.
    """
    trees, weights, base, refusal = given
    paths = list(dict.fromkeys(path for tree in trees for path in tree))
    held = {p: [(t[p], w) for t, w in zip(trees, weights, strict=True) if p in t] for p in paths}
    wrong = {p: why for p, pairs in held.items() if (why := misfit([x for x, _ in pairs]))}
    refuse(refusal, wrong, "Adapters that are combined must be of one base.")
    kept = {
        path: x
        for path, [(x, w), *more] in held.items()
        if keeps_one and not (is_node(x) or more) and is_one(w)
    }
    changed = [p for p, [(x, _), *_] in held.items() if not is_node(x) and p not in kept]
    if base is None:
        needed = "is trained in full, so that its change is known from the base alone"
        remedy = "Give `base`, the parameters that they are for."
        refuse(refusal, dict.fromkeys(changed, needed), remedy)
    params = dict(leaves_by_path(base)) if changed else {}

    def one(path: Path) -> Any:
        leaves, w = (list(x) for x in zip(*held[path], strict=True))
        if path in kept:
            return kept[path]
        if is_node(leaves[0]):
            return low_rank(alike(leaves), w, path)
        start = jnp.asarray(params[path])
        wide = jnp.promote_types(start.dtype, jnp.float32)
        start, dtype = start.astype(wide), leaves[0].dtype
        changes = [v * (x.astype(wide) - start) for x, v in zip(leaves, w, strict=True)]
        return (start + full(changes, path)).astype(dtype)

    return nest({path: one(path) for path in paths}) if paths else {}


def is_one(w: Any) -> bool:
    return isinstance(w, int | float) and w == 1
