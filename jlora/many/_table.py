"""Makes and changes a table: one adapter tree, whose arrays have a leading axis of slots."""

from collections.abc import Container, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._adapters import Routed, arrays, is_node
from .._compat import is_concrete
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
    r"""Stacks the arrays of adapters of one base along a new first axis, which makes a table.

    Slot k of the table has the ΔW of adapter k. Where its rank is smaller than the table's, A and B
    are padded with zeros; where it lacks a site, ΔW = 0; where its scale differs, B is multiplied.
    Dropout is that of the adapters if they agree, else 0.

    Adapters for a base that their initializer changed (`LowRank.residual`) must fill all slots, as
    ΔW = 0 is not the original model there. Their table is for `jax.vmap`; `route` refuses it.

    Args:
        adapters: at least one adapter; `{}` is the base model. None may hold NaN or infinity.
        size: the number of slots, by default that of the adapters. Further slots hold the base
            model.
        rank: the rank of the table at each site, by default the largest of the adapters.
        base: the parameters that the adapters are for. Needed if a leaf is trained in full by only
            some of them, or if there are further slots.

    Returns:
        A table: a nested dict of `LowRank` nodes and arrays, all of whose arrays have a first axis
        of `size` slots. `jax.vmap` over it is over the adapters.

    Raises:
        TypeError: if `adapters` is no list of adapters.
        ValueError: if sites do not fit one another, are of a method other than LoRA, or train other
            factors (`LowRank.frozen`); if a rank exceeds `rank`, a slot lacks a site of a changed
            base, an adapter has dropout keys, or a value is not finite. It names all paths.

    Examples:
        >>> import jax.numpy as jnp, jlora
        >>> layout = jlora.types.Layout((), (0,), (1,))
        >>> one = {"w": jlora.types.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)), 1.0, layout)}
        >>> two = {"w": jlora.types.LowRank(jnp.ones((4, 1)), jnp.ones((1, 3)), 1.0, layout)}
        >>> jlora.many.stack([one, two], size=8)
        {'w': LowRank(a=float32[8,4,2], b=float32[8,2,3], scale=1.0)}
    """
    trees = check_adapters(adapters)
    count = len(trees) if size is None else size
    if count < len(trees):
        raise ValueError(f"`size` must be at least the {len(trees)} adapters; got {size}.")
    sites = {
        path: [tree[path] for tree in trees if path in tree]
        for path in dict.fromkeys(path for tree in trees for path in tree)
    }
    refuse(
        REFUSAL,
        {path: why for path, leaves in sites.items() if (why := mismatch_in_table(leaves))},
        "The adapters of a table must be of one base.",
    )
    empty = {path: zeros_for(leaves, rank) for path, leaves in sites.items()}
    rows = [fill(tree, empty, base) for tree in [*trees, *[{}] * (count - len(trees))]]
    return nest({p: jax.tree.map(lambda *xs: jnp.stack(xs), *(r[p] for r in rows)) for p in sites})


def insert(table: PyTree, slot: int | jax.Array, adapter: PyTree, *, base: PyTree = None) -> PyTree:
    """Puts an adapter into a slot of a table, and keeps all shapes and types.

    A function that was compiled for the table is therefore not compiled again.

    Args:
        table: from `stack` or `init`.
        slot: an integer from 0 on; a traced one is not checked.
        adapter: an adapter of at most the table's ranks, at some of its sites. Its values must be
            finite, which is checked unless they are traced. It gets the table's dropout.
        base: the parameters. Needed if the table has leaves in full that `adapter` lacks.

    Returns:
        A new table.

    Raises:
        TypeError: if `table` is no table, `adapter` no adapter, or `slot` no integer.
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
        slot: an integer from 0 on; a traced one is not checked.
        base: the parameters. Needed if the table has leaves in full.

    Returns:
        A new table of the same shapes and types.

    Raises:
        TypeError: if `table` is no table, or `slot` no integer.
        ValueError: if `slot` is out of range, or the table is for a base that an initializer
            changed.

    Examples:
        >>> import jax.numpy as jnp, jlora
        >>> layout = jlora.types.Layout((), (0,), (1,))
        >>> one = {"w": jlora.types.LowRank(jnp.ones((4, 2)), jnp.ones((2, 3)), 1.0, layout)}
        >>> jlora.many.remove(jlora.many.stack([one, one]), 0)["w"].b[:, 0, 0]
        Array([0., 1.], dtype=float32)
    """
    return insert(table, slot, {}, base=base)


def take(table: PyTree, slot: int | jax.Array) -> PyTree:
    """Takes the adapter out of a slot of a table, with the table's ranks.

    Args:
        table: from `stack` or `init`.
        slot: an integer from 0 on; a traced one is not checked.

    Returns:
        An adapter for `apply`, `merge` and files. `arithmetic.truncate(adapter, energy=1.0)`
        removes the columns of A and rows of B that are 0.

    Raises:
        TypeError: if `table` is no table, or `slot` no integer.
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
    """Returns the leaves of a table by path, which may be prepared, and the number of slots."""
    found = adapter_leaves(table)
    is_routed = lambda x: is_prepared and isinstance(x, Routed)  # noqa: E731
    counts = {x.slots if is_routed(x) else _slots(x) for x in found.values()}
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
    """Returns the length of the first axis of a leaf, or None if that is not one of slots."""
    if not is_node(leaf):
        return leaf.shape[0] if leaf.shape else None
    axes, found = leaf.axes(leaf.layout), arrays(leaf)
    sizes = {x.shape[0] if x.ndim == len(axes[k]) + 1 else None for k, x in found.items()}
    return sizes.pop() if len(sizes) == 1 else None


# --------------------------------------------------------------------- slots as the user names them


def check_slot(slot: Any, count: int) -> Any:
    """Returns one slot as an index of arrays of `count` slots."""
    x = _check(slot, "slot", "one integer, from 0 on", [0], count)
    return slot if isinstance(slot, int) else x


def check_ids(ids: Any, count: int) -> Any:
    """Returns the slot of each row in int32: -1 for the base, `count` for no slot.

    The array is NumPy's if `ids` were not JAX's.
    """
    expected = "integers of shape (rows,), one slot of the table for each row"
    return _check(ids, "ids", expected, [1], count, least=-1)


def mask_of(slots: Any, count: int) -> jax.Array:
    """Returns the mask of chosen slots, which are given by indices or as a mask."""
    if (x := _as_array(slots)).dtype == bool:
        return check_mask("slots", x, count)
    x = _check(slots, "slots", f"indices or a mask of shape ({count},)", [0, 1], count)
    return jnp.zeros(count, bool).at[x].set(True)


def check_mask(name: str, mask: Any, count: int) -> jax.Array:
    """Returns a mask of all slots as an array."""
    x = jnp.asarray(mask)
    if x.dtype != bool or x.shape != (count,):
        raise TypeError(f"`{name}` must be a mask of shape ({count},) and bool; got {short(x)}.")
    return x


def _check(
    ids: Any, name: str, expected: str, ndims: Container[int], count: int, least: int = 0
) -> Any:
    """Returns integers of any dtype as int32, those outside [least, count) as `count`.

    Raises `ValueError` for one outside whose value is known.
    """
    x = _as_array(ids)
    if (
        not jnp.issubdtype(x.dtype, jnp.integer)
        or x.ndim not in ndims
        or (least < 0 and not x.size)
    ):
        raise TypeError(f"`{name}` must be {expected}; got {short(ids)}.")
    found = map(int, np.asarray(x).flat) if is_concrete(x) else ()
    if wrong := [i for i in found if not least <= i < count]:
        slots = "the slots of the table" + (" or -1 for the base alone" if least < 0 else "")
        raise ValueError(f"`{name}` must lie in [{least}, {count}), {slots}; got {wrong[0]}.")
    limits = jnp.iinfo(x.dtype)  # `count` itself may be none of the dtype's numbers
    inside = (x >= max(least, int(limits.min))) & (x <= min(count - 1, int(limits.max)))
    numpy: Any = jnp if isinstance(x, jax.Array) else np
    return numpy.where(inside, x.astype(np.int32), np.int32(count))


def _as_array(x: Any) -> Any:
    """Returns `x`, or an array of the numbers in it: NumPy's where none is JAX's."""
    if hasattr(x, "dtype"):
        return x
    numpy: Any = jnp if any(isinstance(v, jax.Array) for v in jax.tree.leaves(x)) else np
    return numpy.asarray(x)
