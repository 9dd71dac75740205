"""The numbers by which a user names slots of a table: one slot, one for each row, or a mask."""

from collections.abc import Container
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._compat import is_concrete
from .._types import short


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
