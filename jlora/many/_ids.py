"""The numbers by which a user names slots of a table: one slot, one for each row, or a mask."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._compat import is_concrete, known
from .._types import short


def check_slot(slot: Any, count: int) -> Any:
    """One slot as an index of arrays of `count` slots."""
    x = _as_array(slot)
    if not jnp.issubdtype(x.dtype, jnp.integer) or x.ndim:
        raise TypeError(f"`slot` must be one integer, from 0 on; got {short(slot)}.")
    if is_concrete(x) and not 0 <= int(x) < count:
        raise ValueError(f"`slot` must lie in [0, {count}), the slots of the table; got {slot!r}.")
    return slot if isinstance(slot, int) else _within(x, count)


def check_ids(ids: Any, count: int) -> Any:
    """The slot of each row in int32: -1 for the base, `count` for no slot.

    The array is NumPy's if `ids` were not JAX's.
    """
    ids = _as_array(ids)
    if ids.ndim != 1 or not len(ids) or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(
            "`ids` must be integers of shape (rows,), one slot of the table for each row; got "
            f"{short(ids)}."
        )
    if is_concrete(ids):
        wrong = [i for i in map(int, np.asarray(ids)) if not -1 <= i < count]
        if wrong:
            raise ValueError(
                f"`ids` must lie in [-1, {count}), the slots of the table or -1 for the base alone;"
                f" got {wrong[0]}."
            )
    return _within(ids, count, -1)


def mask_of(slots: Any, count: int) -> jax.Array:
    """The mask of chosen slots, given by indices or as a mask."""
    x = _as_array(slots)
    if x.dtype == bool:
        return check_mask("slots", x, count)
    if not jnp.issubdtype(x.dtype, jnp.integer) or x.ndim > 1:
        raise TypeError(
            f"`slots` must be indices or a mask of shape ({count},); got {short(slots)}."
        )
    if known(lambda x: (_within(x, count) == count).any(), x):
        raise ValueError(
            f"`slots` must lie in [0, {count}), the slots of the table; got {slots!r}."
        )
    return jnp.zeros(count, bool).at[_within(x, count)].set(True)


def check_mask(name: str, mask: Any, count: int) -> jax.Array:
    """A mask of all slots."""
    x = jnp.asarray(mask)
    if x.dtype != bool or x.shape != (count,):
        raise TypeError(f"`{name}` must be a mask of shape ({count},) and bool; got {short(x)}.")
    return x


def _as_array(x: Any) -> Any:
    """`x`, or an array of the numbers in it: NumPy's where none is JAX's."""
    if hasattr(x, "dtype"):
        return x
    numpy: Any = jnp if any(isinstance(v, jax.Array) for v in jax.tree.leaves(x)) else np
    return numpy.asarray(x)


def _within(ids: Any, count: int, least: int = 0) -> Any:
    """Integers of any dtype as int32, those outside [least, count) as `count`."""
    limits = jnp.iinfo(ids.dtype)  # `count` itself may be none of the dtype's numbers
    inside = (ids >= max(least, int(limits.min))) & (ids <= min(count - 1, int(limits.max)))
    numpy: Any = jnp if isinstance(ids, jax.Array) else np
    return numpy.where(inside, ids.astype(np.int32), np.int32(count))
