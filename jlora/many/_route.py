"""Rows of one batch, each with an adapter of its own."""

import functools
import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from .._adapters import LowRank, Routed, is_node, stop_gradients, weight_shape
from .._alike import FROM_THE_START, RESIDUAL, is_residual, refuse
from .._compat import is_concrete
from .._tree import adapter_leaves, check_fits, leaves_by_path, nest
from .._types import Path, PyTree, short
from ._table import Leaves, as_array, refuse_others, table_leaves, within

FORMS = ("side by side", "gathered")
SHARE = 4  # A and B of all slots lie side by side where they are no more than this part of W


def route(
    apply: Callable[..., Any],
    in_axes: Any = 0,
    out_axes: Any = 0,
    *,
    form: str | None = None,
    spmd_axis_name: Any = None,
) -> Callable[..., Any]:
    r"""Makes `apply(base, adapter, *args)` take a table and one slot of it for each row of a batch.

    $$y_i = \mathrm{apply}(W, \Delta W_{\mathrm{ids}_i}, x_i)$$

    for a batch of the one row i. It is a `jax.vmap` over rows, so that it works for whatever
    `apply` does with each of them; rows of which one has a part in the result of another, as in
    batch normalization, are not that model's. There are two forms, chosen at each site by its size:

    - side by side: the A of all slots are one matrix, and of $x_i A$ the columns of other slots
      count as 0. One product of all rows, at the cost of the rank slots·r. A NaN or infinity of one
      slot in A leaves the outputs of the other rows alone, but not gradients through the site; one
      in B reaches all rows. Where W is used transposed, as an embedding in a tied head, the
      activation meets B first, and A and B change places.
    - gathered: each row takes its A and B out of the table. Costs the rank r alone, but their bytes
      for each row, and products of one row each. Nothing of a slot reaches rows of another.

    `stack` and `insert` refuse what is not finite, where values are known, so that both are safe.
    Leaves trained in full are gathered.

    Args:
        apply: a function of a base, an adapter and more, such as `lora.apply` or a loss of it.
        in_axes: as in `jax.vmap`, for the arguments after `ids`: the axis of rows of each, or None
            for what all rows share. Keyword arguments have it first; what is no array is shared.
        out_axes: the axis of rows of each result. Results without axes, such as a loss, become one
            for each row.
        form: `"side by side"` or `"gathered"` at all sites, rather than by their sizes.
        spmd_axis_name: as in `jax.vmap`: the mesh axis that rows lie along, for models that
            constrain the sharding of activations.

    Returns:
        `routed(base, table, ids, *args, **kwargs)`, where `ids`, integers of shape (rows,) and of
        any dtype, names the slot of each row; -1 is the base alone. A traced id that names no slot
        gives NaN. Where `ids` is a NumPy array of equally long runs, each run is one batch for its
        adapter. Differentiable with respect to the table, so that many adapters train in one step.

    Raises:
        TypeError: if `table` or `ids` is none.
        ValueError: if an argument or a result has no axis of rows, `ids` names no slot, or the
            table does not fit the base, is of a method other than LoRA, is for a base that a start
            changed, which -1 would take for the model, or was prepared in another form.

    Examples:
        >>> import jax, jax.numpy as jnp, jlora
        >>> lora = jlora.transform(lambda p, x: x @ p["w"], jlora.LoRA("w", rank=1, alpha=1))
        >>> x = jnp.ones((3, 4))
        >>> base, one = lora.init(jax.random.key(0), {"w": jnp.zeros((4, 2))}, x)
        >>> two = {"w": one["w"]._replace(a=jnp.ones((4, 1)), b=jnp.ones((1, 2)))}
        >>> table = jlora.many.stack([one, two])
        >>> jlora.many.route(lora.apply)(base, table, jnp.array([1, 0, -1]), x)
        Array([[4., 4.],
               [0., 0.],
               [0., 0.]], dtype=float32)
    """
    if form not in (None, *FORMS):
        raise ValueError(f"`form` must be one of {', '.join(map(repr, FORMS))}; got {form!r}.")

    @functools.wraps(apply)
    def routed(base: PyTree, table: PyTree, ids: Any, /, *args: Any, **kwargs: Any) -> Any:
        leaves, slots = _prepared(table, form)
        beside = {path: x for path, x in leaves.items() if isinstance(x, Routed)}
        own = {path: x for path, x in leaves.items() if path not in beside}
        check_fits(base, beside | {p: jax.tree.map(_type_of_slot, x) for p, x in own.items()})
        ids = _checked(ids, slots)
        rows = _Rows((args, kwargs), (in_axes, 0), len(ids))

        def runs(each: int) -> Any:
            """What `apply` gives for runs of so many rows."""

            def run(i: jax.Array, own: Leaves, mapped: list[jax.Array]) -> Any:
                chosen = {path: _with_gate(x, i) for path, x in beside.items()}
                args, kwargs = rows.joined(mapped)
                out = apply(base, nest(own | chosen), *args, **kwargs)
                return _leading(out, out_axes, each)

            first = ids[::each]
            over = jax.vmap(run, (0, 0, rows.axes), spmd_axis_name=spmd_axis_name)
            return _in_place(
                over(first, _gathered(own, first, slots, base), rows.cut(each)), out_axes
            )

        try:
            return runs(_length_of_runs(ids))
        except _NoRows:  # such as a loss, of which each row has one
            return runs(1)

    return routed


def prepare(table: PyTree, *, form: str | None = None) -> PyTree:
    """A table with the sites that `route` computes side by side laid out so.

    `route` does it at each call, which is free where A and B need not be moved for it: they are
    where layers are stacked, as under `jax.lax.scan`. For many calls do it once, and again after
    an `insert` into the table that was prepared: shapes stay, so that nothing is compiled again.

    Args:
        table: from `stack` or `init`.
        form: as in `route`.

    Returns:
        A table for `route` alone, of the same size in all.

    Raises:
        TypeError: if `table` is none.
        ValueError: if it is of a method other than LoRA, or for a base that a start changed.

    Examples:
        >>> import jax.numpy as jnp, jlora
        >>> layout = jlora.types.Layout((), (0,), (1,))
        >>> one = {"w": jlora.types.LowRank(jnp.ones((64, 1)), jnp.ones((1, 64)), 1.0, layout)}
        >>> jlora.many.prepare(jlora.many.stack([one] * 3))
        {'w': Routed(a=float32[64,3], b=float32[3,64], slots=3, scale=1.0)}
    """
    return nest(_prepared(table, form)[0])


def _prepared(table: PyTree, form: str | None) -> tuple[Leaves, int]:
    """The leaves of a table, those side by side as `Routed`, and the number of its slots."""
    found = adapter_leaves(table)
    routed = {path: x for path, x in found.items() if isinstance(x, Routed)}
    counts = {x.slots for x in routed.values()}
    others = {path: x for path, x in found.items() if path not in routed}
    residual = [path for path, x in others.items() if is_residual(x)]
    refuse_others(others.items())
    refuse(
        "a table that is routed cannot hold what is",
        dict.fromkeys(residual, f"{RESIDUAL}, so that -1 would not be the model"),
        FROM_THE_START,
    )
    if others:
        _, count = table_leaves(nest(others))
        counts.add(count)
    slots = max(counts)
    if routed and form == FORMS[1]:
        raise ValueError(
            f"`form` is {form!r}, but `table` was prepared side by side: give the table from stack."
        )
    if len(counts) > 1:
        raise TypeError(f"`table` must have as many slots everywhere; got {sorted(counts)}.")
    beside = {p: _side_by_side(x, slots) for p, x in others.items() if _is_beside(x, form)}
    return {path: beside.get(path, x) for path, x in found.items()}, slots


def _type_of_slot(x: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)


# --------------------------------------------------------------------------------- who has which


def _checked(ids: Any, slots: int) -> Any:
    """`ids` in int32, of which `slots` is none; NumPy's where they were not JAX's."""
    ids = as_array(ids)
    if ids.ndim != 1 or not len(ids) or not jnp.issubdtype(ids.dtype, jnp.integer):
        raise TypeError(
            "`ids` must be integers of shape (rows,), one slot of the table for each row; got "
            f"{short(ids)}."
        )
    if is_concrete(ids):
        wrong = [i for i in map(int, np.asarray(ids)) if not -1 <= i < slots]
        if wrong:
            raise ValueError(
                f"`ids` must lie in [-1, {slots}), the slots of the table or -1 for the base alone;"
                f" got {wrong[0]}."
            )
    return within(ids, slots, -1)


def _length_of_runs(ids: Any) -> int:
    """The largest length of which all runs of one id are multiples; 1 where ids are traced."""
    if not isinstance(ids, np.ndarray):
        return 1
    return math.gcd(len(ids), *(int(i) + 1 for i in np.flatnonzero(np.diff(ids))))


def _is_beside(leaf: Any, form: str | None) -> bool:
    """Whether a site is computed side by side."""
    if not is_node(leaf) or form is not None:
        return is_node(leaf) and form == FORMS[0]
    weight = math.prod(weight_shape(jax.tree.map(_type_of_slot, leaf)))
    return SHARE * (leaf.a.size + leaf.b.size) <= weight


def _side_by_side(node: LowRank, slots: int) -> Routed:
    """The slots of a site as one A and one B."""
    n, node = len(node.layout.stack) + (node.layout.slots is not None), stop_gradients(node)
    a, b = jnp.moveaxis(node.a, 0, -2), jnp.moveaxis(node.b, 0, n)
    a = a.reshape(*a.shape[:-2], -1)
    b = b.reshape(*b.shape[:n], a.shape[-1], *b.shape[n + 2 :])
    fields = (node.scale, node.layout, node.dropout, node.materialize, node.key)
    return Routed(a, b, None, slots, *fields)


def _with_gate(node: Routed, i: jax.Array) -> Routed:
    """The gate of slot `i`: NaN if there is no such slot."""
    gate = (jnp.arange(node.slots) == i).astype(jnp.float32)
    gate = jnp.where(i < node.slots, gate, jnp.nan)
    return node._replace(gate=jnp.repeat(gate, node.a.shape[-1] // node.slots))


def _gathered(leaves: Leaves, ids: Any, slots: int, base: PyTree) -> Leaves:
    """The leaves of each of `ids`: of -1 those of the base, of what is no slot NaN."""
    ids = jnp.asarray(ids)
    params = dict(leaves_by_path(base)) if leaves else {}

    def take(x: jax.Array, none: Any) -> jax.Array:
        row = lambda i: lax.expand_dims(i, range(1, x.ndim))  # noqa: E731
        found = jnp.take(x, ids, axis=0, mode="fill", fill_value=jnp.nan)
        return jnp.where(row(ids >= 0), found, jnp.asarray(none, x.dtype))

    def of(path: Path, leaf: Any) -> Any:
        return (
            jax.tree.map(lambda x: take(x, 0), leaf) if is_node(leaf) else take(leaf, params[path])
        )

    return {path: of(path, leaf) for path, leaf in leaves.items()}


# ------------------------------------------------------------------------------------- the rows


class _NoRows(Exception):  # noqa: N818 - a signal, never the user's error
    """A result of several rows has no axis of rows."""


class _Rows:
    """The arguments of a call: what is cut into rows, and what all rows share."""

    def __init__(self, arguments: Any, in_axes: Any, count: int):
        """`ValueError` where an argument has no `count` rows along its axis."""
        is_none = lambda x: x is None  # noqa: E731
        axes = jax.tree.leaves(jax.tree.broadcast(in_axes, arguments, is_none), is_leaf=is_none)
        flat, self._tree = jax.tree_util.tree_flatten_with_path(arguments, is_none)
        self._leaves = [x for _, x in flat]
        self._at, self.axes = [], []
        for i, ((path, x), axis) in enumerate(zip(flat, axes, strict=True)):
            if axis is None or not hasattr(x, "shape"):
                continue
            if not -x.ndim <= axis < x.ndim or x.shape[axis] != count:
                raise ValueError(
                    f"argument {jax.tree_util.keystr(path)} after `ids` must have {count} rows "
                    f"along its axis {axis}, as `ids` has; got {short(x)}. Name the axis in "
                    "`in_axes` of route, or None for what all rows share."
                )
            self._at.append(i)
            self.axes.append(axis % x.ndim)

    def cut(self, each: int) -> list[jax.Array]:
        """The rows in runs of `each`, along an axis of its own before that of rows."""
        return [
            jnp.reshape(x, (*x.shape[:axis], -1, each, *x.shape[axis + 1 :]))
            for x, axis in zip((self._leaves[i] for i in self._at), self.axes, strict=True)
        ]

    def joined(self, mapped: list[jax.Array]) -> Any:
        """The arguments of a run."""
        leaves = dict(enumerate(self._leaves)) | dict(zip(self._at, mapped, strict=True))
        return jax.tree.unflatten(self._tree, leaves.values())


def _leading(out: Any, out_axes: Any, each: int) -> Any:
    """Results with their `each` rows first."""

    def move(path: Any, x: Any, axis: int) -> jax.Array:
        if jnp.ndim(x) == 0:
            if each > 1:
                raise _NoRows
            return jnp.reshape(x, (1,))
        if not -x.ndim <= axis < x.ndim or x.shape[axis] != each:
            raise ValueError(
                f"result {jax.tree_util.keystr(path) or 'of `apply`'} must have the rows along its "
                f"axis {axis}, or no axis; got {short(x)} for a batch of {each}. Name the axis in "
                "`out_axes` of route."
            )
        return jnp.moveaxis(x, axis, 0)

    return jax.tree_util.tree_map_with_path(move, out, jax.tree.broadcast(out_axes, out))


def _in_place(out: Any, out_axes: Any) -> Any:
    """Results of runs, with all rows where `out_axes` says."""

    def move(x: jax.Array, axis: int) -> jax.Array:
        x = x.reshape(-1, *x.shape[2:])
        return x if x.ndim == 1 else jnp.moveaxis(x, 0, axis)

    return jax.tree.map(move, out, jax.tree.broadcast(out_axes, out))
