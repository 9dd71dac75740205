"""Routes the rows of a batch, each with its own adapter."""

import functools
import math
from collections.abc import Callable, Sequence
from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jax.typing import ArrayLike

from .._adapters import LowRank, Routed, leading_axes, stop_gradients, weight_shape
from .._arrays import count_pieces, explicit, join_shardings, lie_along, replicate
from .._errors import InputError
from .._grouped import ROWS
from .._tree import check_fits, leaves_by_path, nest
from .._types import Path, PyTree, short
from ..arithmetic._operands import refuse_residual
from ._fill import Leaves, check_methods
from ._table import check_ids, table_leaves

T = TypeVar("T")
FORMS = ("side by side", "gathered")
SHARE = 4  # side by side if A and B of all slots have at most 1 / SHARE of W's entries


def route(
    apply: Callable[..., Any],
    in_axes: PyTree = 0,
    out_axes: PyTree = 0,
    *,
    form: str | None = None,
    spmd_axis_name: str | tuple[str, ...] | None = None,
) -> Callable[..., Any]:
    r"""Makes a function that applies a table of adapters to a batch, one adapter for each row.

    $$y_i = \mathrm{apply}(W, \Delta W_{\mathrm{ids}_i}, x_i)$$

    Each row is computed as a batch of one, by `jax.vmap`. Do not use it for models in which rows
    depend on one another, such as those with batch normalization. There are two forms. The size of
    a site decides which one it gets:

    - side by side: the A's of all slots are concatenated into one matrix, and each row masks out
      the columns of $x_i A$ for other slots. All rows are one product, of rank slots·r. A NaN or
      infinity in one slot's A does not reach the outputs of other rows, but it reaches gradients
      through the site. One in B reaches all rows. Where W is used transposed, as in a tied head, A
      and B change roles.
    - gathered: each row takes its A and B out of the table where they are used. The rank is r only,
      but A and B are read for each row, and rows are multiplied one at a time. A slot never reaches
      other rows.

    Products of groups of tokens with experts, `jax.lax.ragged_dot`, are computed for all rows at
    once, adapted or not. JAX cannot take a derivative of one inside of `apply`; differentiate the
    routed function instead. Nor can it map one inside of a function with a derivative of its own,
    such as `jax.custom_vjp` makes. Both raise.

    With dropout, give `jlora.dropout(table, key)`, or `jax.vmap(jlora.dropout)(table, keys)` with a
    key for each slot. Each row has its own mask, by the keys of its slot: the first row of a slot
    has the mask that `apply` alone would draw for it.

    `stack` and `insert` refuse known values that are not finite, so both forms are safe. Leaves
    trained in full are gathered.

    Args:
        apply: a function of a base, an adapter and other arguments, such as `lora.apply` or a loss.
        in_axes: as in `jax.vmap`, for the arguments after `ids`: the axis of rows of each, or None
            for an argument that all rows share. Keyword arguments have rows along axis 0. Values
            that are not arrays are shared.
        out_axes: the axis of rows of each result. A result without axes, such as a loss, becomes
            one value for each row.
        form: `"side by side"` or `"gathered"` for all sites; by default their sizes decide.
        spmd_axis_name: as in `jax.vmap`: the mesh axis over which rows are sharded, for models that
            constrain the sharding of activations.

    Returns:
        `routed(base, table, ids, *args, **kwargs)`. `ids` has the slot of each row, as integers of
        shape (rows,) and any dtype; -1 is the base model. A traced id that is out of range gives
        NaN. If `ids` is a NumPy array of equally long runs, each run is computed as one batch. The
        function is differentiable with respect to the table, so that one step can train many
        adapters.

    Raises:
        TypeError: if `table` is not a table, or `ids` are not integers.
        ValueError: if there is no such `form`; if an argument or a result has no axis of rows, or
            an id is out of range; if the table does not fit the base or has a method other than
            LoRA; if an initializer changed the base, as -1 would not be the original model; for a
            derivative of a `ragged_dot` inside of `apply`.
        NotImplementedError: for a `ragged_dot` inside of a function with its own derivative.

    Examples:
        >>> import jax, jax.numpy as jnp, jlora
        >>> lora = jlora.transform(lambda p, x: x @ p["w"], jlora.LoRA("w", rank=1, alpha=1))
        >>> x = jnp.ones((3, 4))
        >>> base, one = lora.init(jax.random.key(0), {"w": jnp.zeros((4, 2))}, x)
        >>> two = {"w": one["w"].replace(a=jnp.ones((4, 1)), b=jnp.ones((1, 2)))}
        >>> table = jlora.many.stack([one, two])
        >>> jlora.many.route(lora.apply)(base, table, jnp.array([1, 0, -1]), x)
        Array([[4., 4.],
               [0., 0.],
               [0., 0.]], dtype=float32)
    """
    if form not in (None, *FORMS):
        raise InputError("form", f"must be one of {', '.join(map(repr, FORMS))}; got {form!r}.")

    @functools.wraps(apply)
    def routed(
        base: PyTree, table: PyTree, ids: ArrayLike | Sequence[int], /, *args: Any, **kwargs: Any
    ) -> Any:
        leaves, slots = _prepare(table)
        nodes = {path: x for path, x in leaves.items() if isinstance(x, Routed)}
        full = {path: x for path, x in leaves.items() if path not in nodes}
        keys_of_slots = {path: x.key for path, x in nodes.items() if x.key is not None}
        types = {path: jax.ShapeDtypeStruct(x.shape[1:], x.dtype) for path, x in full.items()}
        check_fits(base, nodes | types)
        rows = check_ids(ids, slots)
        batch = Batch((args, kwargs), (in_axes, 0), rows.shape[0])

        def apply_in_runs(length: int) -> Any:
            """Calls `apply` for each run of `length` rows of one slot."""

            def apply_run(i: jax.Array, own: Leaves, run: list[jax.Array]) -> Any:
                chosen = {path: _choose(x, i, own.get(path), form) for path, x in nodes.items()}
                args, kwargs = batch.arguments(run)
                out = apply(base, nest(own | chosen), *args, **kwargs)
                return _mark(move_rows_first(out, out_axes, length), i >= slots)

            ids = rows[::length]
            axes = (0, 0, batch.axes)
            keys = {path: _keys_of_runs(key, ids) for path, key in keys_of_slots.items()}
            ids, keys, cut = _shard_alike((ids, keys, batch.cut(length)), axes)
            own = _gather(full, ids, slots, base) | keys
            names = {"axis_name": ROWS, "spmd_axis_name": spmd_axis_name}
            out = jax.vmap(apply_run, axes, **names)(ids, own, cut)
            return join_runs(out, out_axes)

        try:
            return apply_in_runs(_length_of_runs(rows, batch.shards))
        except NoRowsError:  # such as a loss, which becomes one for each row
            return apply_in_runs(1)

    return routed


def prepare(table: PyTree) -> PyTree:
    """Concatenates A and B of all slots for `route` in advance.

    Prepare a table once for many calls. Otherwise each call concatenates, which copies A and B if
    layers are stacked, as under `jax.lax.scan`. Prepare again after an `insert` into the original
    table. Shapes stay, so nothing is compiled again.

    Args:
        table: from `stack` or `init`.

    Returns:
        A table that only `route` accepts, with the same dtypes and number of parameters. The ranks
        of all slots are one axis.

    Raises:
        TypeError: if `table` is not a table.
        ValueError: if it has a method other than LoRA, or an initializer changed its base.

    Examples:
        >>> import jax.numpy as jnp, jlora
        >>> layout = jlora.types.Layout((), (0,), (1,))
        >>> one = {"w": jlora.types.LowRank(jnp.ones((64, 1)), jnp.ones((1, 64)), 1.0, layout)}
        >>> jlora.many.prepare(jlora.many.stack([one] * 3))
        {'w': Routed(a=float32[64,3], b=float32[3,64], slots=3, scale=1.0)}
    """
    return nest(_prepare(table)[0])


def _prepare(table: PyTree) -> tuple[Leaves, int]:
    """Returns the leaves of a table, nodes as `Routed`, and the number of slots."""
    found, slots = table_leaves(table, is_prepared=True)
    others = {path: x for path, x in found.items() if not isinstance(x, Routed)}
    check_methods(others.items())
    refusal = "table", "has leaves that `route` cannot use"
    refuse_residual(refusal, others.items(), "-1 would not be the model")
    nodes = {p: _concatenate(x, slots) for p, x in others.items() if isinstance(x, LowRank)}
    return found | nodes, slots


# ---------------------------------------------------------------------- which slot, which form


def _length_of_runs(ids: jax.Array | np.ndarray, shards: int) -> int:
    """Returns the largest length that divides all runs of equal ids in each shard of the rows.

    It is 1 if ids are traced.
    """
    if not isinstance(ids, np.ndarray) or not ids.size:
        return 1
    return math.gcd(len(ids) // shards, *(int(i) + 1 for i in np.flatnonzero(np.diff(ids))))


def _concatenate(node: LowRank, slots: int) -> Routed:
    """Concatenates the A's of all slots, and the B's."""
    n = leading_axes(node)
    node = stop_gradients(node)
    a, b = jnp.moveaxis(node.a, 0, -2), jnp.moveaxis(node.b, 0, n)
    a = a.reshape(*a.shape[:-2], -1)
    b = b.reshape(*b.shape[:n], a.shape[-1], *b.shape[n + 2 :])
    fields = (node.scale, node.layout, node.dropout, node.materialize, node.key)
    return Routed(a, b, None, slots, *fields)


def _choose(node: Routed, i: jax.Array, key: jax.Array | None, form: str | None) -> Routed:
    """Returns a node that uses slot `i`: its gate is a mask or, where A and B are gathered, `i`."""
    node = node._replace(key=key)
    is_small = SHARE * (node.a.size + node.b.size) <= math.prod(weight_shape(node))
    is_beside = is_small if form is None else form == FORMS[0]
    if not is_beside:
        return node._replace(gate=i)
    gate = (jnp.arange(node.slots) == i).astype(jnp.float32)
    return node._replace(gate=jnp.repeat(gate, node.a.shape[-1] // node.slots))


def _gather(full: Leaves, ids: jax.Array | np.ndarray, slots: int, base: PyTree) -> Leaves:
    """Returns the leaves in full of each slot in `ids`, and the base's where an id is no slot."""
    params = dict(leaves_by_path(base)) if full else {}

    def take(path: Path, leaf: jax.Array) -> jax.Array:
        rest = range(1, leaf.ndim)
        place = join_shardings([ROWS], [None, *rest], [ROWS, *rest], ids, leaf)
        found = leaf.at[ids].get(mode="clip", out_sharding=place)
        is_slot = lax.expand_dims((ids >= 0) & (ids < slots), rest)
        of_base = jnp.asarray(params[path], leaf.dtype)[None]
        return jnp.where(is_slot, found, lie_along(of_base, found))

    return {path: take(path, leaf) for path, leaf in full.items()}


@replicate
def _keys_of_runs(keys: jax.Array, ids: jax.Array) -> jax.Array:
    """Returns the dropout keys of each run: its slot's, so that the first is as `apply` alone.

    Later runs of a slot fold in their number.
    """

    def fold(keys: jax.Array, number: jax.Array) -> jax.Array:
        folded = jax.vmap(jax.random.fold_in, (0, None))(keys.ravel(), number)
        return jnp.where(number == 0, keys, folded.reshape(keys.shape))

    number = jnp.tril(ids[:, None] == ids[None], -1).sum(1)
    return jax.vmap(fold)(keys[ids], number)


def _mark(out: PyTree, is_wrong: jax.Array) -> Any:
    """Returns NaN in place of results for an id that is out of range."""

    def mark(x: jax.Array) -> jax.Array:
        floating = jnp.issubdtype(x.dtype, jnp.inexact)
        return jnp.where(is_wrong, jnp.asarray(jnp.nan, x.dtype), x) if floating else x

    return jax.tree.map(mark, out)


# ------------------------------------------------------------------------- the rows of a batch


def _shard_alike(trees: T, axes: PyTree) -> T:
    """Shards all arrays alike along the axes over which `vmap` maps them, as it demands.

    The first that is sharded there along an explicit mesh axis decides.
    """
    dims = jax.tree.leaves(jax.tree.broadcast(axes, trees))
    leaves, structure = jax.tree.flatten(trees)
    places = [explicit(x) for x in leaves]
    entries = [place and place.spec[d] for place, d in zip(places, dims, strict=True)]
    if not any(entries):
        return trees
    [mesh, *_] = [place.mesh for place in places if place is not None]
    [entry, *_] = filter(None, entries)

    def shard(x: jax.Array, place: NamedSharding | None, d: int) -> jax.Array:
        spec = [None] * x.ndim if place is None else [*place.spec]
        spec[d] = entry
        return jax.sharding.reshard(x, NamedSharding(mesh, PartitionSpec(*spec)))

    return jax.tree.unflatten(structure, map(shard, leaves, places, dims))


class NoRowsError(Exception):
    """A result for several rows has no axis of rows."""


REMEDIES = (
    "Give its axis of rows as `in_axes` of route, or None if all rows share it.",
    "Each keyword argument has rows. Give what all rows share by position, with None as its "
    "`in_axes` of route.",
)


class Batch:
    """The arguments of a call: some have an axis of rows, and all rows share the others.

    Attributes:
        axes: the axis of rows of each leaf, or None if the leaf is shared.
    """

    def __init__(self, arguments: PyTree, in_axes: PyTree, count: int):
        """Raises `ValueError` if an argument does not have `count` rows along its axis."""
        is_none = lambda x: x is None  # noqa: E731
        axes = jax.tree.leaves(jax.tree.broadcast(in_axes, arguments, is_none), is_leaf=is_none)
        flat, self._tree = jax.tree_util.tree_flatten_with_path(arguments, is_none)
        self._leaves = [x for _, x in flat]
        self.axes = []
        for (path, x), axis in zip(flat, axes, strict=True):
            if axis is None or not hasattr(x, "shape"):
                self.axes.append(None)
                continue
            if not -x.ndim <= axis < x.ndim or x.shape[axis] != count:
                raise ValueError(
                    f"argument {jax.tree_util.keystr(path)} after `ids` must have {count} rows "
                    f"along axis {axis}, like `ids`; got {short(x)}. {REMEDIES[path[0].idx]}"
                )
            self.axes.append(axis % x.ndim)

    @property
    def shards(self) -> int:
        """The number of shards that rows have along explicit mesh axes."""
        pairs = zip(map(explicit, self._leaves), self.axes, strict=True)
        of_rows = ((x.mesh, x.spec[d]) for x, d in pairs if x is not None and d is not None)
        return max((count_pieces(entry, mesh) for mesh, entry in of_rows), default=1)

    def cut(self, length: int) -> list[Any]:
        """Splits the rows of each leaf into runs: a new axis of runs precedes the axis of rows."""

        def split(x: jax.Array, d: int) -> jax.Array:
            count = x.shape[d] // length  # -1 is no length where another one is 0
            return jnp.reshape(x, (*x.shape[:d], count, length, *x.shape[d + 1 :]))

        pairs = zip(self._leaves, self.axes, strict=True)
        return [None if d is None else split(x, d) for x, d in pairs]

    def arguments(self, run: list[Any]) -> Any:
        """Returns the arguments of one run, from its part of the result of `cut`."""
        pairs = zip(self._leaves, run, self.axes, strict=True)
        return jax.tree.unflatten(self._tree, (x if d is None else rows for x, rows, d in pairs))


def move_rows_first(out: PyTree, out_axes: PyTree, length: int) -> Any:
    """Moves the `length` rows of each result to its first axis."""

    def move(path: tuple[Any, ...], x: jax.Array, axis: int) -> jax.Array:
        if jnp.ndim(x) == 0:
            if length > 1:
                raise NoRowsError
            return jnp.reshape(x, (1,))
        if not -x.ndim <= axis < x.ndim or x.shape[axis] != length:
            raise ValueError(
                f"result {jax.tree_util.keystr(path) or 'of `apply`'} must have rows along axis "
                f"{axis}, or no axes; got {short(x)} for {length} rows. Give its axis of rows as "
                "`out_axes` of route."
            )
        return jnp.moveaxis(x, axis, 0)

    return jax.tree_util.tree_map_with_path(move, out, jax.tree.broadcast(out_axes, out))


def join_runs(out: PyTree, out_axes: PyTree) -> Any:
    """Concatenates the rows of all runs along the axis in `out_axes`."""

    def move(x: jax.Array, axis: int) -> jax.Array:
        x = x.reshape(x.shape[0] * x.shape[1], *x.shape[2:])
        return x if x.ndim == 1 else jnp.moveaxis(x, 0, axis)

    return jax.tree.map(move, out, jax.tree.broadcast(out_axes, out))
