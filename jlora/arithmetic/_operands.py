"""The leaves of several adapters, the checks that they fit each other, and the loop over paths.

At a path, scales and slots may differ, because the same ΔW can be written with others. `residual`
must be equal. Dropout becomes 0 if it differs.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._adapters import AdapterLeaf, LowRank, is_node, is_table, weight_shape, without_slots
from .._arrays import promote
from .._compat import is_concrete
from .._errors import InputError, stop
from .._rules import is_finite, number_of
from .._tree import adapter_leaves, check_fits, is_empty, leaves_by_path, nest, problems_at
from .._types import Path, PyTree, short

RESIDUAL = "belongs to a base that its initializer changed"
FROM_THE_START = (
    "Give jlora.arithmetic.difference(adapter, initial) instead, where `initial` is the adapter "
    "that init returned: the difference belongs to the original parameters."
)

Refusal = tuple[str, str]  # an argument, and what is wrong with it


def flatten_each(adapters: Sequence[PyTree]) -> list[dict[Path, Any]]:
    """Returns the leaves of each adapter by path; raises for other trees, tables, dropout keys."""
    if not isinstance(adapters, list | tuple) or not adapters or is_node(adapters):
        raise TypeError(
            "`adapters` must be a list of adapters, as `init` returns them; got "
            f"{'an empty one' if isinstance(adapters, list | tuple) else type(adapters).__name__}."
        )
    trees = [{} if is_empty(x) else adapter_leaves(x) for x in adapters]
    nodes = [(p, x) for tree in trees for p, x in tree.items() if is_node(x)]
    refuse(
        ("adapters", "must be single adapters, but some are tables of jlora.many"),
        {p: f"has a leading axis, {x!r}" for p, x in nodes if is_table(x)},
        "Call the function under jax.vmap, or take adapters out by jlora.many.take.",
    )
    keyed = [p for p, x in nodes if x.key is not None]
    refuse(
        ("adapters", "must not have dropout keys, but they have some"),
        dict.fromkeys(keyed, "has a key"),
        "Give adapters without keys, and give the result to jlora.dropout.",
    )
    return trees


def is_residual(leaf: AdapterLeaf) -> bool:
    """Whether a leaf is a node that belongs to a base that its initializer changed."""
    return is_node(leaf) and leaf.residual


def refuse(refusal: Refusal, wrong: Mapping[Path, str], remedy: str) -> None:
    """Raises `ValueError` with all paths in `wrong`, if there are any."""
    argument, why = refusal
    stop(problems_at(wrong), argument, f"{why}.", remedy)


def refuse_other_methods(refusal: Refusal, leaves: Iterable[tuple[Path, Any]], remedy: str) -> None:
    """Raises for nodes of other methods, whose sums are not nodes of the method."""
    wrong = {
        p: f"is a {type(x).__name__}" for p, x in leaves if is_node(x) and type(x) is not LowRank
    }
    refuse(refusal, wrong, remedy)


def refuse_residual(refusal: Refusal, leaves: Iterable[tuple[Path, Any]], so: str) -> None:
    """Raises for nodes that belong to a base that their initializer changed."""
    wrong = {path: f"{RESIDUAL}, so {so}" for path, x in leaves if is_residual(x)}
    refuse(refusal, wrong, FROM_THE_START)


def mismatch(leaves: Sequence[Any]) -> str | None:
    """Says why leaves at one path do not belong to one weight; None if they do."""
    if len({is_node(x) for x in leaves}) > 1:
        return "has low rank in one and is trained in full in another"
    if not is_node(leaves[0]):
        shapes = list(dict.fromkeys(tuple(x.shape) for x in leaves))
        return f"has the shapes {shapes}" if len(shapes) > 1 else None
    if len(set(map(is_residual, leaves))) > 1:
        return f"belongs to the original parameters in one, but in another {RESIDUAL}"
    weights = list(dict.fromkeys((weight_shape(x), *x.layout[:3]) for x in leaves))
    return f"adapts weights of (shape, stack, inputs, outputs) {weights}" if weights[1:] else None


def with_equal_slots(nodes: Sequence[LowRank]) -> list[LowRank]:
    """Rewrites nodes to the same slots, or to none, with the same ΔW."""
    if len({x.layout.slots for x in nodes}) == 1:
        return list(nodes)
    return [without_slots(x, weight_shape(x)) for x in nodes]


def join(nodes: Sequence[LowRank], a: jax.Array, b: jax.Array, scale: float) -> LowRank:
    """Makes the node of A and B that replaces `nodes`.

    A factor is frozen if it is frozen in all nodes. The dropout is that of the nodes if it is
    equal in all, else 0.
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


def scale_b(b: jax.Array, *factors: float | jax.Array) -> jax.Array:
    """Multiplies B by numbers and rounds once, to its dtype; returns B itself if all are 1."""
    if all(map(is_one, factors)):
        return b
    scaled = jnp.asarray(b, promote(b.dtype, jnp.float32))
    for x in factors:
        # A number that this dtype cannot hold makes infinities, which are refused by name.
        scaled *= x.astype(scaled.dtype) if isinstance(x, jax.Array) else float(x)
    return scaled.astype(b.dtype)


def is_one(w: object) -> bool:
    """Whether a weight is the number 1, not an array."""
    return isinstance(w, int | float) and w == 1


def dtype_of_all(arrays: Iterable[Any]) -> jnp.dtype:
    """Returns the dtype of arrays, or what holds all of their dtypes."""
    first, *others = {x.dtype for x in arrays}
    return promote(first, *others) if others else first


# ----------------------------------------------------------------- the arguments of sums and merges

Weights = Sequence[Any] | jax.Array | None
MERGE = "Merge these sites into the base."  # the remedy for nodes of other methods


class Operands(NamedTuple):
    """The checked arguments of a function.

    Attributes:
        sites: for each path the pairs of leaf and weight of the adapters that have it.
        weights: a weight for each adapter.
        base: the parameters, or None.
        refusal: the argument and the sentence of errors.
    """

    sites: dict[Path, list[tuple[Any, Any]]]
    weights: list[Any]
    base: PyTree
    refusal: Refusal


def check_operands(
    adapters: Sequence[PyTree], weights: Weights, base: PyTree, refusal: Refusal
) -> Operands:
    """Checks the arguments of a function; the leaves at a path must belong to one weight."""
    trees = flatten_each(adapters)
    w = [1.0] * len(trees) if weights is None else _entries(weights)
    if len(w) != len(trees):
        raise InputError(
            "weights", f"must have one number for each of the {len(trees)} adapters; got {len(w)}."
        )
    check_numbers("weights", w, "for each adapter ")
    refuse_other_methods(refusal, (leaf for tree in trees for leaf in tree.items()), MERGE)
    for tree in trees if base is not None else ():
        check_fits(base, tree)
    sites: dict[Path, list[tuple[Any, Any]]] = {}
    for tree, v in zip(trees, w, strict=True):
        for path, x in tree.items():
            sites.setdefault(path, []).append((x, v))
    wrong = {p: why for p, pairs in sites.items() if (why := mismatch([x for x, _ in pairs]))}
    refuse(refusal, wrong, "All adapters must belong to one base.")
    return Operands(sites, w, base, refusal)


def check_merge(
    adapters: Sequence[PyTree], weights: Weights, base: PyTree, density: float
) -> Operands:
    """Checks the arguments of a merge by entries, for which ΔW = 0 must be the original model."""
    check_share("density", density)
    given = check_operands(adapters, weights, base, ("adapters", "cannot be combined"))
    first = [(path, pairs[0][0]) for path, pairs in given.sites.items()]
    refuse_residual(given.refusal, first, "ΔW = 0 is not the original model")
    return given


def _entries(weights: Sequence[Any] | jax.Array) -> list[Any]:
    """Lists the weights; those of a concrete array stay concrete under a trace."""
    has_values = isinstance(weights, jax.Array) and is_concrete(weights)
    return list(np.asarray(weights) if has_values else weights)


def check_share(name: str, x: object) -> None:
    """Raises unless the argument `name` is a number in (0, 1]."""
    share = number_of(x)
    if not is_finite(share) or not 0 < share <= 1:
        raise InputError(name, f"must be in (0, 1]; got {x!r}.")


def check_numbers(argument: str, values: Sequence[Any], what: str = "") -> None:
    """Raises for an array with axes, or a number whose value is not finite."""
    wrong = [x for x in values if np.shape(x) or (is_concrete(x) and not is_finite(number_of(x)))]
    if wrong:
        got = short(wrong[0]) if np.shape(wrong[0]) else repr(number_of(wrong[0]))
        raise InputError(argument, f"must be {what}a finite number; got {got}.")


def combine_leaves(
    given: Operands,
    low_rank: Callable[[list[LowRank], list[Any], Path], LowRank],
    full: Callable[[list[Any], Path], Any],
    keeps_one: bool = False,
) -> PyTree:
    """Combines nodes at each path by `low_rank`, and changes of leaves trained in full by `full`.

    If it `keeps_one`, a leaf in full that only one adapter has, with weight 1, does not change.
    """

    def is_kept(pairs: list[tuple[Any, Any]]) -> bool:
        return keeps_one and len(pairs) == 1 and is_one(pairs[0][1])

    in_full = {path: pairs for path, pairs in given.sites.items() if not is_node(pairs[0][0])}
    changed = [path for path, pairs in in_full.items() if not is_kept(pairs)]
    if given.base is None:
        needed = "is trained in full, so its change depends on the base"
        remedy = "Give `base`, the parameters from which they were trained."
        refuse(given.refusal, dict.fromkeys(changed, needed), remedy)
    params = dict(leaves_by_path(given.base)) if changed else {}

    def combine(path: Path, pairs: list[tuple[Any, Any]]) -> Any:
        leaves, w = (list(x) for x in zip(*pairs, strict=True))
        if path not in in_full:
            return low_rank(with_equal_slots(leaves), w, path)
        if is_kept(pairs):
            return leaves[0]
        wide = promote(jnp.result_type(params[path]), jnp.float32)
        start = jnp.asarray(params[path], wide)
        changes = [v * (x.astype(wide) - start) for x, v in zip(leaves, w, strict=True)]
        return (start + full(changes, path)).astype(dtype_of_all(leaves))

    return nest({path: combine(path, pairs) for path, pairs in given.sites.items()})
