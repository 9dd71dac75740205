"""Converts an adapter to the contents of a slot, with the table's shapes and dtypes."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp

from .._adapters import AdapterLeaf, LowRank, factor_shapes, is_node, state, weight_shape
from .._arrays import count_not_finite, promote
from .._tree import check_fits, leaves_by_path
from .._types import Layout, Path, PyTree
from ..arithmetic._operands import (
    dtype_of_all,
    flatten_each,
    join,
    mismatch,
    refuse,
    refuse_other_methods,
    refuse_residual,
    scale_b,
    with_equal_slots,
)

Leaves = dict[Path, Any]
REFUSAL = "adapters", "must not have leaves that a table cannot contain"


def check_adapters(adapters: Sequence[PyTree]) -> list[Leaves]:
    """Returns the leaves of each adapter by path; raises where a value is not finite."""
    trees = flatten_each(adapters)
    leaves = [leaf for tree in trees for leaf in tree.items()]
    check_methods(leaves)
    refuse(
        REFUSAL,
        {p: "is not finite" for p, x in leaves if not _is_finite(x)},
        "In a table such values would reach rows of other slots.",
    )
    return trees


def check_methods(leaves: Iterable[tuple[Path, Any]]) -> None:
    """Raises for nodes of methods other than LoRA, whose zeros are not ΔW = 0."""
    remedy = (
        "Only LoRA and leaves in full can be stacked, inserted, removed and routed. For other "
        "methods use jax.vmap with a table from jlora.many.init."
    )
    refuse_other_methods(REFUSAL, leaves, remedy)


def _is_finite(leaf: AdapterLeaf) -> bool:
    """Whether all known values are finite."""
    values = jax.tree.leaves(state(leaf) if is_node(leaf) else leaf)
    return not any(map(count_not_finite, values))


def mismatch_in_table(leaves: Sequence[Any]) -> str | None:
    """Explains why leaves at one path cannot share a table; None if they can."""
    frozen = list(dict.fromkeys(x.frozen if is_node(x) else () for x in leaves))
    if (why := mismatch(leaves)) or not frozen[1:]:
        return why
    return (
        f"has different trainable factors: `frozen` is {frozen[0]} and {frozen[1]}; "
        "node.replace(frozen=()) makes both trainable"
    )


def zeros_for(leaves: Sequence[Any], rank: int | None) -> Any:
    """Returns zeros with room for each of `leaves`, of the largest rank unless `rank` is given."""
    if not is_node(leaves[0]):
        return jnp.zeros_like(leaves[0], promote(*(x.dtype for x in leaves)))
    nodes = with_equal_slots(leaves)
    largest = max(x.a.shape[-1] for x in nodes) if rank is None else rank
    shapes = factor_shapes(nodes[0].layout, weight_shape(nodes[0]), largest)
    zeros = (zeros_for([getattr(x, name) for x in nodes], None) for name in "ab")
    scales = {x.scale for x in nodes} - {0.0}  # which is any other one with B = 0
    scale = scales.pop() if len(scales) == 1 else 1.0
    a, b = map(resize, zeros, shapes)
    return join(nodes, a, b, scale)


def resize(x: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Pads an array with zeros to `shape`, or cuts off its end."""
    pads = [(0, m - n, 0) for n, m in zip(x.shape, shape, strict=True)]
    return jax.lax.pad(x, jnp.zeros((), x.dtype), pads)


def fill(tree: Leaves, empty: Leaves, base: PyTree) -> Leaves:
    """Returns an adapter with all sites of a table; `empty` has zeros of the slot's shapes."""
    refuse(
        REFUSAL,
        {path: why for path, x in tree.items() if (why := _why_no_room(x, empty.get(path)))},
        "Make the table with jlora.many.stack(adapters, rank=...) of adapters that together "
        "have all sites, and all slots of their rules.",
    )
    lacking = {path: x for path, x in empty.items() if path not in tree}
    refuse_residual(REFUSAL, lacking.items(), "a slot without it would not be the model")
    missing = [path for path, x in lacking.items() if not is_node(x)]
    if missing and base is None:
        needed = "is trained in full, so a slot without it needs the base's values"
        remedy = "Give `base`, the parameters of the model."
        refuse(REFUSAL, dict.fromkeys(missing, needed), remedy)
    if missing:
        check_fits(base, {path: empty[path] for path in missing})
    params = dict(leaves_by_path(base)) if missing else {}
    row = {path: _convert(tree.get(path, x), x) for path, x in empty.items()}
    return row | {path: jnp.asarray(params[path], empty[path].dtype) for path in missing}


def _why_no_room(leaf: LowRank | jax.Array, empty: LowRank | jax.Array | None) -> str | None:
    """Explains why a leaf does not fit the `empty` leaf of a table; None if it fits."""
    if empty is None:
        return "is not a site of the table"
    if why := mismatch_in_table([empty, leaf]):
        return why
    for x, room in zip(jax.tree.leaves(leaf), jax.tree.leaves(empty), strict=True):
        if dtype_of_all((x, room)) != room.dtype:
            return f"has dtype {x.dtype}, which the table's {room.dtype} cannot represent"
    if not isinstance(leaf, LowRank) or not isinstance(empty, LowRank):
        return None
    room, node = with_equal_slots([empty, leaf])
    if room.layout != empty.layout:
        return f"adapts {_spell(leaf.layout)}, but the table {_spell(empty.layout)}"
    rank, largest = node.a.shape[-1], empty.a.shape[-1]
    return f"has rank {rank}, above the table's {largest}" if rank > largest else None


def _spell(layout: Layout) -> str:
    """Says which parts of a fused axis are adapted."""
    if layout.slots is None:
        return "all outputs at once"
    count, chosen, _ = layout.slots
    return f"the parts {', '.join(map(str, chosen))} of {count}, Slots({count}, {chosen})"


def _convert(leaf: LowRank | jax.Array, empty: LowRank | jax.Array) -> LowRank | jax.Array:
    """Converts a leaf to the rank, scale, slots and dtypes of `empty`."""
    if not isinstance(leaf, LowRank) or not isinstance(empty, LowRank):
        return jnp.asarray(leaf, jnp.result_type(empty))
    node = with_equal_slots([empty, leaf])[1]
    pairs = (node.a, empty.a), (node.b, empty.b)
    a, b = (resize(x, room.shape).astype(room.dtype) for x, room in pairs)
    return empty._replace(a=a, b=scale_b(b, node.scale / empty.scale))
