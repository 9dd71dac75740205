"""The rows of a batch: arguments are cut into runs of rows, and results put together again."""

from typing import Any

import jax
import jax.numpy as jnp

from .._types import short


class NoRowsError(Exception):
    """A result of several rows has no axis of rows."""


class Batch:
    """The arguments of a call: some are cut into rows, the others are shared by all rows.

    Attributes:
        axes: for each leaf its axis of rows, or None if it is shared.
    """

    def __init__(self, arguments: Any, in_axes: Any, count: int):
        """Raises `ValueError` if an argument has not `count` rows along its axis."""
        is_none = lambda x: x is None  # noqa: E731
        axes = jax.tree.leaves(jax.tree.broadcast(in_axes, arguments, is_none), is_leaf=is_none)
        flat, self._tree = jax.tree_util.tree_flatten_with_path(arguments, is_none)
        self._leaves, self.axes = [x for _, x in flat], []
        for (path, x), axis in zip(flat, axes, strict=True):
            if axis is None or not hasattr(x, "shape"):
                self.axes.append(None)
                continue
            if not -x.ndim <= axis < x.ndim or x.shape[axis] != count:
                raise ValueError(
                    f"argument {jax.tree_util.keystr(path)} after `ids` must have {count} rows "
                    f"along its axis {axis}, as `ids` has; got {short(x)}. Name the axis in "
                    "`in_axes` of route, or None for what all rows share."
                )
            self.axes.append(axis % x.ndim)

    def cut(self, length: int) -> list[Any]:
        """Cuts the rows of each leaf into runs: a new axis of runs precedes that of rows."""
        return [
            None if d is None else jnp.reshape(x, (*x.shape[:d], -1, length, *x.shape[d + 1 :]))
            for x, d in zip(self._leaves, self.axes, strict=True)
        ]

    def arguments(self, run: list[Any]) -> Any:
        """Returns the arguments of one run, from its part of what `cut` returns."""
        pairs = zip(self._leaves, run, self.axes, strict=True)
        return jax.tree.unflatten(self._tree, (x if d is None else rows for x, rows, d in pairs))


def rows_first(out: Any, out_axes: Any, length: int) -> Any:
    """Moves the `length` rows of each result to its first axis."""

    def move(path: Any, x: Any, axis: int) -> jax.Array:
        if jnp.ndim(x) == 0:
            if length > 1:
                raise NoRowsError
            return jnp.reshape(x, (1,))
        if not -x.ndim <= axis < x.ndim or x.shape[axis] != length:
            raise ValueError(
                f"result {jax.tree_util.keystr(path) or 'of `apply`'} must have the rows along its "
                f"axis {axis}, or no axis; got {short(x)} for a batch of {length}. Name the axis "
                "in `out_axes` of route."
            )
        return jnp.moveaxis(x, axis, 0)

    return jax.tree_util.tree_map_with_path(move, out, jax.tree.broadcast(out_axes, out))


def join_runs(out: Any, out_axes: Any) -> Any:
    """Joins the rows of all runs, along the axis that `out_axes` says."""

    def move(x: jax.Array, axis: int) -> jax.Array:
        x = x.reshape(-1, *x.shape[2:])
        return x if x.ndim == 1 else jnp.moveaxis(x, 0, axis)

    return jax.tree.map(move, out, jax.tree.broadcast(out_axes, out))
