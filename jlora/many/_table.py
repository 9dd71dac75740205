"""A table of adapters: one adapter tree, whose arrays have a leading axis of slots."""

from collections.abc import Iterable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._adapters import LowRank, arrays, is_node, state
from .._alike import (
    FROM_THE_START,
    RESIDUAL,
    alike,
    is_residual,
    joined,
    leaves_of,
    misfit_in_table,
    of_other_methods,
    refuse,
)
from .._compat import is_concrete, known
from .._core import promote
from .._tree import adapter_leaves, check_fits, leaves_by_path, name_of, nest
from .._types import Path, PyTree, short

Leaves = dict[Path, Any]
REFUSAL = "a table cannot hold what is"


def stack(
    adapters: Sequence[PyTree],
    size: int | None = None,
    *,
    rank: int | None = None,
    base: PyTree = None,
) -> PyTree:
    r"""A table of adapters of one base: the arrays of all, stacked along a new first axis.

    An adapter of a smaller rank than the others' at a site has columns of A and rows of B that are
    0; one without a site, ΔW = 0 there; one whose scale is another, that scale in B. So slot k of
    the table has the ΔW of adapter k. Dropout is the table's: that of the adapters where they
    agree, else 0.

    Adapters of a base that their start changed (`LowRank.residual`) must fill all slots, as ΔW = 0
    is not the model there. Their table is for `jax.vmap`; `route` refuses it.

    Args:
        adapters: at least one adapter, `{}` among them if need be. None may hold NaN or infinity.
        size: the number of slots, at least that of adapters, which it is unless told. The slots
            left over are those of the base.
        rank: the rank of the table at each site, for adapters to come; the largest unless told.
        base: the parameters that the adapters are for, needed where a leaf is trained in full by
            some of them, or where slots are left over.

    Returns:
        A table: a nested dict of `LowRank` nodes whose `a` and `b`, and of arrays, have a first
        axis of `size` slots. `jax.vmap` over it is over the adapters.

    Raises:
        TypeError: if `adapters` are none.
        ValueError: if sites do not fit one another, are of a method other than LoRA, or train other
            factors (`LowRank.frozen`); if ranks do not fit in `rank`, a slot would be without a
            site of a changed base, an adapter has dropout keys, or a value is not finite; all paths
            are named.

    Examples:
        >>> import jax.numpy as jnp, jlora
        >>> layout = jlora.types.Layout((), (0,), (1,))
        >>> one = {"w": jlora.types.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)), 1.0, layout)}
        >>> two = {"w": jlora.types.LowRank(jnp.ones((4, 1)), jnp.ones((1, 3)), 1.0, layout)}
        >>> jlora.many.stack([one, two], size=8)
        {'w': LowRank(a=float32[8,4,2], b=float32[8,2,3], scale=1.0)}
    """
    trees = _checked(adapters)
    count = len(trees) if size is None else size
    if count < len(trees):
        raise ValueError(f"`size` must be at least the {len(trees)} adapters; got {size}.")
    sites = {
        path: [tree[path] for tree in trees if path in tree]
        for path in dict.fromkeys(path for tree in trees for path in tree)
    }
    refuse(
        REFUSAL,
        {path: why for path, leaves in sites.items() if (why := misfit_in_table(leaves))},
        "The adapters of a table must be of one base.",
    )
    empty = {path: _empty(leaves, rank) for path, leaves in sites.items()}
    rows = [_row(tree, empty, base) for tree in [*trees, *[{}] * (count - len(trees))]]
    return nest({p: jax.tree.map(lambda *xs: jnp.stack(xs), *(r[p] for r in rows)) for p in sites})


def insert(table: PyTree, slot: int | jax.Array, adapter: PyTree, *, base: PyTree = None) -> PyTree:
    """A table with `adapter` in one of its slots, all shapes and types as they were.

    So a function that was compiled for the table is not compiled again.

    Args:
        table: from `stack` or `init`.
        slot: from 0 on, an integer or a traced one, which is not checked.
        adapter: an adapter of at most the table's ranks, at some of its sites. Its values are
            checked unless they are traced: under `jit` see to it that they are finite. It gets
            the table's dropout.
        base: the parameters, needed where the table has leaves in full that `adapter` has not.

    Returns:
        A table.

    Raises:
        TypeError: if `table` or `adapter` is none, or `slot` no integer.
        ValueError: if `slot` is out of range, or the adapter does not fit the table, as in `stack`,
            or is not finite; all paths are named.

    Examples:
        >>> import jax.numpy as jnp, jlora
        >>> layout = jlora.types.Layout((), (0,), (1,))
        >>> one = {"w": jlora.types.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)), 1.0, layout)}
        >>> table = jlora.many.insert(jlora.many.stack([one, one]), 1, {})
        >>> table["w"].b[:, 0, 0]
        Array([1., 0.], dtype=float32)
    """
    found, count = table_leaves(table)
    slot = _checked_slot(slot, count)
    [tree] = _checked([adapter])
    refuse_others(found.items())
    empty = {path: jax.tree.map(lambda x: jnp.zeros_like(x[0]), x) for path, x in found.items()}
    row = _row(tree, empty, base)
    put = lambda x, new: x.at[slot].set(new)  # noqa: E731
    return nest({path: jax.tree.map(put, x, row[path]) for path, x in found.items()})


def remove(table: PyTree, slot: int | jax.Array, *, base: PyTree = None) -> PyTree:
    """A table with the base model in one of its slots.

    Args:
        table: from `stack` or `init`.
        slot: from 0 on, an integer or a traced one, which is not checked.
        base: the parameters, needed where the table has leaves in full.

    Returns:
        A table, of the same shapes and types.

    Raises:
        TypeError: if `table` is none, or `slot` no integer.
        ValueError: if `slot` is out of range, or the table is for a base that a start changed.

    Examples:
        >>> import jax.numpy as jnp, jlora
        >>> layout = jlora.types.Layout((), (0,), (1,))
        >>> one = {"w": jlora.types.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)), 1.0, layout)}
        >>> jlora.many.remove(jlora.many.stack([one, one]), 0)["w"].b[:, 0, 0]
        Array([0., 1.], dtype=float32)
    """
    return insert(table, slot, {}, base=base)


def take(table: PyTree, slot: int | jax.Array) -> PyTree:
    """The adapter in a slot of a table, of the table's ranks.

    Args:
        table: from `stack` or `init`.
        slot: from 0 on, an integer or a traced one, which is not checked.

    Returns:
        An adapter for `apply`, `merge` and files; `arithmetic.truncate(adapter, energy=1.0)` drops
        what of its rank is 0.

    Raises:
        TypeError: if `table` is none, or `slot` no integer.
        ValueError: if `slot` is out of range.

    Examples:
        >>> import jax.numpy as jnp, jlora
        >>> layout = jlora.types.Layout((), (0,), (1,))
        >>> one = {"w": jlora.types.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)), 1.0, layout)}
        >>> jlora.many.take(jlora.many.stack([one, {}]), 0)
        {'w': LowRank(a=float32[4,2], b=float32[2,3], scale=1.0)}
    """
    _, count = table_leaves(table)
    slot = _checked_slot(slot, count)
    return jax.tree.map(lambda x: x[slot], table)


def table_leaves(table: PyTree) -> tuple[Leaves, int]:
    """The leaves of a table by path, and the number of its slots."""
    found = adapter_leaves(table)
    counts = {_slots(leaf) for leaf in found.values()}
    count = counts.pop()
    if counts or count is None:
        listed = ", ".join(
            f"{name_of(p)}: {x if is_node(x) else short(x)}" for p, x in found.items()
        )
        raise TypeError(
            "`table` must be an adapter with a leading axis of slots on each array, as "
            f"jlora.many.stack and jlora.many.init give it; got {listed}."
        )
    return found, count


def _slots(leaf: Any) -> int | None:
    """The length of the first axis of a leaf, if that is one of slots."""
    if not is_node(leaf):
        return leaf.shape[0] if leaf.shape else None
    axes, found = leaf.axes(leaf.layout), arrays(leaf)
    sizes = {x.shape[0] if x.ndim == len(axes[k]) + 1 else None for k, x in found.items()}
    return sizes.pop() if len(sizes) == 1 else None


# -------------------------------------------------------------------------------------- the rows


def _checked(adapters: Sequence[PyTree]) -> list[Leaves]:
    """The leaves of each adapter by path; an error where one has a value that is not finite."""
    trees = leaves_of(adapters)
    each = [leaf for tree in trees for leaf in tree.items()]
    refuse_others(each)
    refuse(
        REFUSAL,
        {p: "is not finite" for p, x in each if not _is_finite(x)},
        "In one slot of a table it would reach the rows of others.",
    )
    return trees


def refuse_others(leaves: Iterable[tuple[Path, Any]]) -> None:
    """`ValueError` for nodes of other methods: zeros in them are not ΔW = 0."""
    remedy = "A table that is routed or changed holds LowRank nodes and leaves in full."
    refuse(REFUSAL, of_other_methods(leaves), remedy)


def _is_finite(leaf: Any) -> bool:
    """Whether all values are finite that are known."""
    values = jax.tree.leaves(state(leaf) if is_node(leaf) else leaf)
    found = [known(lambda x: jnp.isfinite(x).all(), x) for x in values]
    return all(bool(x) for x in found if x is not None)


def _empty(leaves: Sequence[Any], rank: int | None) -> Any:
    """Zeros that have room for each of `leaves`."""
    if not is_node(leaves[0]):
        return jnp.zeros(leaves[0].shape, promote(*(x.dtype for x in leaves)))
    nodes = alike(leaves)
    largest = max(x.a.shape[-1] for x in nodes) if rank is None else rank
    scales = {x.scale for x in nodes}
    a = jnp.zeros_like(nodes[0].a, promote(*(x.a.dtype for x in nodes)))
    b = jnp.zeros_like(nodes[0].b, promote(*(x.b.dtype for x in nodes)))
    return _of_rank(joined(nodes, a, b, scales.pop() if len(scales) == 1 else 1.0), largest)


def _of_rank(node: LowRank, rank: int) -> LowRank:
    """The same ΔW by factors of `rank` columns and rows, some 0."""
    stacks = len(node.layout.stack) + (node.layout.slots is not None)

    def resized(x: jax.Array, axis: int) -> jax.Array:
        pads = [(0, 0)] * x.ndim
        pads[axis] = (0, max(0, rank - x.shape[axis]))
        return jax.lax.slice_in_dim(jnp.pad(x, pads), 0, rank, axis=axis)

    return node._replace(a=resized(node.a, node.a.ndim - 1), b=resized(node.b, stacks))


def _row(tree: Leaves, empty: Leaves, base: PyTree) -> Leaves:
    """An adapter at all sites of a table, where `empty` are zeros of the table's types."""
    refuse(
        REFUSAL,
        {path: why for path, x in tree.items() if (why := _no_room(x, empty.get(path)))},
        "Make the table with jlora.many.stack(adapters, rank=...) of adapters that have all sites.",
    )
    residual = [path for path, x in empty.items() if is_residual(x) and path not in tree]
    needed = f"{RESIDUAL}, so that a slot without it would not be the model"
    refuse(REFUSAL, dict.fromkeys(residual, needed), FROM_THE_START)
    missing = [path for path, x in empty.items() if not is_node(x) and path not in tree]
    if missing and base is None:
        needed = "is trained in full, so that a slot without it holds the base's"
        remedy = "Give `base`, the parameters that they are for."
        refuse(REFUSAL, dict.fromkeys(missing, needed), remedy)
    if missing:
        check_fits(base, {path: empty[path] for path in missing})
    params = dict(leaves_by_path(base)) if missing else {}
    row = {path: _placed(tree.get(path, x), x) for path, x in empty.items()}
    return row | {path: jnp.asarray(params[path], empty[path].dtype) for path in missing}


def _no_room(leaf: Any, empty: Any) -> str | None:
    """Why a leaf cannot stand at a site of a table."""
    if empty is None:
        return "is no site of the table"
    if why := misfit_in_table([empty, leaf]):
        return why
    for x, room in zip(jax.tree.leaves(leaf), jax.tree.leaves(empty), strict=True):
        if promote(x.dtype, room.dtype) != room.dtype:
            return f"is of {x.dtype}, where the table has {room.dtype}"
    if not is_node(leaf):
        return None
    room, node = alike([empty, leaf])
    if room.layout != empty.layout:
        return f"has the slots {leaf.layout.slots}, where the table has {empty.layout.slots}"
    rank, largest = node.a.shape[-1], empty.a.shape[-1]
    return f"has the rank {rank}, above the table's {largest}" if rank > largest else None


def _placed(leaf: Any, empty: Any) -> Any:
    """The leaf in the form that the table has."""
    if not is_node(leaf):
        return jnp.asarray(leaf, empty.dtype)
    node = alike([empty, leaf])[1]
    if node.scale != empty.scale:
        node = node._replace(b=node.b * (node.scale / empty.scale))
    node = _of_rank(node, empty.a.shape[-1])
    return empty._replace(a=node.a.astype(empty.a.dtype), b=node.b.astype(empty.b.dtype))


def _checked_slot(slot: Any, count: int) -> Any:
    """A slot as an index of arrays of `count` slots."""
    x = as_array(slot)
    if not jnp.issubdtype(x.dtype, jnp.integer) or x.ndim:
        raise TypeError(f"`slot` must be one integer, from 0 on; got {short(slot)}.")
    if is_concrete(x) and not 0 <= int(x) < count:
        raise ValueError(f"`slot` must lie in [0, {count}), the slots of the table; got {slot!r}.")
    return slot if isinstance(slot, int) else within(x, count)


def as_array(x: Any) -> Any:
    """`x`, or an array of the numbers in it: NumPy's where none is JAX's."""
    if hasattr(x, "dtype"):
        return x
    numpy: Any = jnp if any(isinstance(v, jax.Array) for v in jax.tree.leaves(x)) else np
    return numpy.asarray(x)


def within(ids: Any, count: int, least: int = 0) -> Any:
    """Integers of any dtype as int32, those that do not lie in [least, count) as `count`."""
    limits = jnp.iinfo(ids.dtype)  # `count` itself may be none of the dtype's numbers
    inside = (ids >= max(least, int(limits.min))) & (ids <= min(count - 1, int(limits.max)))
    numpy: Any = jnp if isinstance(ids, jax.Array) else np
    return numpy.where(inside, ids.astype(np.int32), np.int32(count))
