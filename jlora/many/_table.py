"""Makes and changes a table: an adapter whose arrays have a leading axis of slots."""

from collections.abc import Container, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._adapters import AdapterLeaf, Node, Routed, arrays, is_node
from .._compat import is_concrete
from .._errors import InputError
from .._rules import check_int, is_int, number_of
from .._tree import adapter_leaves, name_of, nest
from .._types import PyTree, short
from ..arithmetic._operands import refuse
from ._fill import (
    REFUSAL,
    Leaves,
    check_adapters,
    check_methods,
    fill,
    mismatch_in_table,
    zeros_for,
)


def stack(
    adapters: Sequence[PyTree],
    size: int | None = None,
    *,
    rank: int | None = None,
    base: PyTree = None,
) -> PyTree:
    r"""Stacks the adapters of one base along a new first axis. The result is a table.

    Slot k has the ΔW of adapter k. If an adapter has a smaller rank than the table, its A and B are
    padded with zeros. If it lacks a site, ΔW = 0 there. If its scale differs, its B is multiplied.
    Dropout is that of the adapters if all have the same, and otherwise 0.

    If an initializer changed the base (`LowRank.residual`), adapters must fill all slots, because
    ΔW = 0 is not the original model. Use such a table with `jax.vmap`; `route` refuses it.

    Args:
        adapters: at least one adapter; `{}` is the base model. None may have NaN or infinity.
        size: the number of slots, by default that of the adapters. Other slots have the base model.
        rank: the rank of the table at each site, by default the largest of the adapters.
        base: the parameters of the model. Needed if a leaf is trained in full, and an adapter lacks
            it or there are more slots than adapters.

    Returns:
        A table: a nested dict of `LowRank` nodes and arrays. All arrays have a first axis of `size`
        slots, and the dtypes of the adapters, promoted. `jax.vmap` over it runs over adapters.

    Raises:
        TypeError: if `adapters` is not a list of adapters.
        ValueError: if `size` is less than the number of adapters; if sites do not fit one another,
            have a method other than LoRA, or have other frozen factors (`LowRank.frozen`); if a
            rank exceeds `rank`, a slot lacks a site of a changed base, an adapter has dropout keys,
            or a value is not finite. It names all paths.

    Examples:
        >>> import jax.numpy as jnp, jlora
        >>> layout = jlora.types.Layout((), (0,), (1,))
        >>> one = {"w": jlora.types.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)), 1.0, layout)}
        >>> two = {"w": jlora.types.LowRank(jnp.ones((4, 1)), jnp.ones((1, 3)), 1.0, layout)}
        >>> jlora.many.stack([one, two], size=8)
        {'w': LowRank(a=float32[8,4,2], b=float32[8,2,3], scale=1.0)}
    """
    trees = check_adapters(adapters)
    count = len(trees) if size is None else number_of(size)
    if not is_int(count) or count < len(trees):
        most = f"an integer, at least the {len(trees)} adapters"
        raise InputError("size", f"must be {most}; got {size!r}.")
    rank = number_of(rank)
    if rank is not None:
        check_int("rank", rank, 1)
    sites = {
        path: [tree[path] for tree in trees if path in tree]
        for path in dict.fromkeys(path for tree in trees for path in tree)
    }
    refuse(
        REFUSAL,
        {path: why for path, leaves in sites.items() if (why := mismatch_in_table(leaves))},
        "The adapters of a table must be for one base.",
    )
    empty = {path: zeros_for(leaves, rank) for path, leaves in sites.items()}
    rows = [fill(tree, empty, base) for tree in [*trees, *[{}] * (count - len(trees))]]
    return nest({p: jax.tree.map(lambda *xs: jnp.stack(xs), *(r[p] for r in rows)) for p in sites})


def insert(table: PyTree, slot: int | jax.Array, adapter: PyTree, *, base: PyTree = None) -> PyTree:
    """Puts an adapter into a slot of a table.

    Shapes and dtypes stay, so functions that were compiled for the table are not compiled again.

    Args:
        table: from `stack` or `init`.
        slot: an integer from 0 on. A traced integer is not checked.
        adapter: an adapter with at most the table's ranks, at some of its sites. Its values must be
            finite; traced values are not checked. It gets the table's dropout.
        base: the parameters of the model. Needed if the table has leaves in full that `adapter`
            lacks.

    Returns:
        A new table.

    Raises:
        TypeError: if `table` is not a table, `adapter` not an adapter, or `slot` not an integer.
        ValueError: if `slot` is out of range, or if the adapter does not fit the table, as in
            `stack`, or is not finite. All paths are named.

    Examples:
        >>> import jax.numpy as jnp, jlora
        >>> layout = jlora.types.Layout((), (0,), (1,))
        >>> one = {"w": jlora.types.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)), 1.0, layout)}
        >>> table = jlora.many.insert(jlora.many.stack([one, one]), 1, {})
        >>> table["w"].b[:, 0, 0]
        Array([1., 0.], dtype=float32)
    """
    found, count = table_leaves(table)
    slot = check_slot(slot, count)
    [tree] = check_adapters([adapter])
    check_methods(found.items())
    empty = {path: jax.tree.map(lambda x: jnp.zeros_like(x[0]), x) for path, x in found.items()}
    row = fill(tree, empty, base)
    put = lambda x, new: x.at[slot].set(new)  # noqa: E731
    return nest({path: jax.tree.map(put, x, row[path]) for path, x in found.items()})


def remove(table: PyTree, slot: int | jax.Array, *, base: PyTree = None) -> PyTree:
    """Puts the base model into a slot of a table.

    Args:
        table: from `stack` or `init`.
        slot: an integer from 0 on. A traced integer is not checked.
        base: the parameters of the model. Needed if the table has leaves in full.

    Returns:
        A new table with the same shapes and dtypes.

    Raises:
        TypeError: if `table` is not a table, or `slot` not an integer.
        ValueError: if `slot` is out of range, or an initializer changed the table's base.

    Examples:
        >>> import jax.numpy as jnp, jlora
        >>> layout = jlora.types.Layout((), (0,), (1,))
        >>> one = {"w": jlora.types.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)), 1.0, layout)}
        >>> jlora.many.remove(jlora.many.stack([one, one]), 0)["w"].b[:, 0, 0]
        Array([0., 1.], dtype=float32)
    """
    return insert(table, slot, {}, base=base)


def take(table: PyTree, slot: int | jax.Array) -> PyTree:
    """Returns the adapter in a slot of a table.

    Args:
        table: from `stack` or `init`.
        slot: an integer from 0 on. A traced integer is not checked.

    Returns:
        An adapter for `apply`, `merge` and files, with the table's ranks and dtypes. To remove
        columns of A and rows of B that are 0, use `arithmetic.truncate(adapter, energy=1.0)`.

    Raises:
        TypeError: if `table` is not a table, or `slot` not an integer.
        ValueError: if `slot` is out of range.

    Examples:
        >>> import jax.numpy as jnp, jlora
        >>> layout = jlora.types.Layout((), (0,), (1,))
        >>> one = {"w": jlora.types.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)), 1.0, layout)}
        >>> jlora.many.take(jlora.many.stack([one, {}]), 0)
        {'w': LowRank(a=float32[4,2], b=float32[2,3], scale=1.0)}
    """
    _, count = table_leaves(table)
    slot = check_slot(slot, count)
    return jax.tree.map(lambda x: x[slot], table)


def table_leaves(table: PyTree, is_prepared: bool = False) -> tuple[Leaves, int]:
    """Returns the leaves of a table, which may be prepared, by path, and the number of slots."""
    found = adapter_leaves(table)
    is_routed = lambda x: is_prepared and isinstance(x, Routed)  # noqa: E731
    counts = {x.slots if is_routed(x) else _slots(x) for x in found.values()}
    count = counts.pop()
    if counts or count is None:
        listed = ", ".join(
            f"{name_of(p)}: {x if is_node(x) else short(x)}" for p, x in found.items()
        )
        raise TypeError(
            "`table` must be an adapter whose arrays have a leading axis of slots, from "
            f"jlora.many.stack or jlora.many.init; got {listed}."
        )
    return found, count


def _slots(leaf: AdapterLeaf) -> int | None:
    """Returns the length of the axis of slots of a leaf; None if it has no such axis."""
    if not isinstance(leaf, Node):
        return leaf.shape[0] if leaf.shape else None
    axes = leaf.axes(leaf.layout)
    found = arrays(leaf)
    sizes = {x.shape[0] if x.ndim == len(axes[k]) + 1 else None for k, x in found.items()}
    return sizes.pop() if len(sizes) == 1 else None


# ----------------------------------------------------------------------- the user's slots and masks


def check_slot(slot: object, count: int) -> Any:
    """Returns a slot as an index into arrays with `count` slots."""
    x = _check(slot, "slot", "one integer, from 0 on", [0], count)
    return slot if isinstance(slot, int) else x


def check_ids(ids: object, count: int) -> Any:
    """Returns the slot of each row in int32: -1 is the base, `count` is out of range.

    The result is a NumPy array unless `ids` has JAX arrays.
    """
    expected = "integers of shape (rows,), one slot of the table for each row"
    return _check(ids, "ids", expected, [1], count, least=-1)


def mask_of(slots: object, count: int) -> jax.Array:
    """Returns a mask of slots from indices or a mask."""
    if (x := _as_array(slots)).dtype == bool:
        return check_mask("slots", x, count)
    x = _check(slots, "slots", f"indices or a mask of shape ({count},)", [0, 1], count)
    return jnp.zeros(count, bool).at[x].set(True)


def check_mask(name: str, mask: object, count: int) -> jax.Array:
    """Returns a mask of all slots as an array; raises for anything else."""
    x = jnp.asarray(mask)
    if x.dtype != bool or x.shape != (count,):
        raise TypeError(f"`{name}` must be a mask of shape ({count},) and bool; got {short(x)}.")
    return x


def _check(
    ids: object, name: str, expected: str, ndims: Container[int], count: int, least: int = 0
) -> Any:
    """Returns integers of any dtype as int32, with `count` for values outside [least, count).

    Raises `ValueError` for a known value outside.
    """
    x = _as_array(ids)
    if not jnp.issubdtype(x.dtype, jnp.integer) or x.ndim not in ndims:
        raise TypeError(f"`{name}` must be {expected}; got {short(ids)}.")
    found = map(int, np.asarray(x).flat) if is_concrete(x) else ()
    if wrong := [i for i in found if not least <= i < count]:
        slots = "the slots of the table" + (" or -1 for the base alone" if least < 0 else "")
        raise InputError(name, f"must be in [{least}, {count}), {slots}; got {wrong[0]}.")
    limits = jnp.iinfo(x.dtype)  # the dtype may not have the number `count`
    inside = (x >= max(least, int(limits.min))) & (x <= min(count - 1, int(limits.max)))
    numpy: Any = jnp if isinstance(x, jax.Array) else np
    return numpy.where(inside, x.astype(np.int32), np.int32(count))


def _as_array(x: object) -> Any:
    """Returns `x` as an array: NumPy's unless it is or has a JAX array."""
    if hasattr(x, "dtype"):
        return x
    numpy: Any = jnp if any(isinstance(v, jax.Array) for v in jax.tree.leaves(x)) else np
    return numpy.asarray(x)
