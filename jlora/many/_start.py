"""Initializes a table: one adapter for each key, of any ranks, on one base."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .._adapters import LoRA
from .._compat import is_concrete
from .._errors import InputError
from .._keys import refuse_rngs
from .._rules import is_int, rule_name
from .._transform import Transformed, transform
from .._tree import flatten, leaves_by_path, name_of
from .._types import PyTree, short
from ._fill import resize


def init(
    lora: Transformed,
    keys: jax.Array,
    params: PyTree,
    *args: Any,
    ranks: Sequence[int] | None = None,
    **kwargs: Any,
) -> tuple[PyTree, PyTree]:
    r"""Initializes an adapter for each key, on one base. Slot i equals `lora.init(keys[i], ...)`.

    Works under `jax.eval_shape`, and under `jax.jit` with `out_shardings`, such as those that
    `jlora.sharding.specs` returns for the table.

    Args:
        lora: from `jlora.transform`.
        keys: n PRNG keys, such as `jax.random.split(key, n)`. They must be threefry keys, whose
            draws under `vmap` equal those of each key.
        params: as in `lora.init`.
        *args: as in `lora.init`.
        ranks: n ranks, not traced. Slot i is initialized by rules with `rank=ranks[i]` and the same
            scale s, so that `alpha` is $s \cdot r_i$, or $s \sqrt{r_i}$ with `rslora`. The table
            has the rules' own ranks, which must be the largest. All other columns of A and rows of
            B are 0, and so are their gradients. They stay 0 under optimizers that depend on entries
            and norms, such as Adam, SGD and LAMB: slot i then trains as on its own. They do not
            under noise, or under means over the entries of a factor (adafactor).
        **kwargs: as in `lora.init`.

    Returns:
        `(base, table)`. The base is that of `lora.init`: the arrays of `params`, unless an
        initializer changes them. `route` refuses a table with a changed base. The table is an
        adapter whose arrays have a leading axis of n slots, with the dtypes of `lora.init`.

    Raises:
        TypeError: if `keys` are not such keys, or `ranks` are not known integers.
        ValueError: if `ranks` are out of range or not n, or no rule has a rank; if an initializer
            changes the base differently for each key or rank, so that adapters cannot share it.

    Examples:
        >>> import jax, jax.numpy as jnp, jlora
        >>> lora = jlora.transform(lambda p, x: x @ p["w"], jlora.LoRA("w", rank=2, alpha=2))
        >>> keys = jax.random.split(jax.random.key(0), 3)
        >>> params, x = {"w": jnp.ones((4, 5))}, jnp.ones((1, 4))
        >>> base, table = jlora.many.init(lora, keys, params, x, ranks=[1, 2, 2])
        >>> table
        {'w': LowRank(a=float32[3,4,2], b=float32[3,2,5], scale=1.0)}
        >>> jax.jit(jax.vmap(lora.apply, in_axes=(None, 0, None)))(base, table, x).shape
        (3, 1, 5)
    """
    _check_keys(keys)

    def starts(lora: Transformed, keys: jax.Array) -> tuple[dict[str, Any], PyTree]:
        """Returns the leaves of the base that differ from `params`, by name, and the table."""

        def start(key: jax.Array) -> tuple[dict[str, Any], PyTree]:
            base, adapter = lora.init(key, params, *args, **kwargs)
            pairs = zip(leaves_by_path(base), flatten(params)[0], strict=True)
            changed = {name_of(path): w for (path, w), old in pairs if w is not old}
            return _shared(changed) if changed else {}, adapter

        return jax.vmap(start, out_axes=(None, 0))(keys)

    if ranks is None:
        changed, table = starts(lora, keys)
    else:
        like = jax.eval_shape(lambda key: lora.init(key, params, *args, **kwargs)[1], keys[0])
        changed, table = _start_ranks(starts, lora, keys, ranks, like)
    leaves = [changed.get(name_of(path), w) for path, w in leaves_by_path(params)]
    return jax.tree.unflatten(flatten(params)[1], leaves), table


@jax.custom_batching.custom_vmap
def _shared(changed: dict[str, Any]) -> dict[str, Any]:
    """Returns the leaves unchanged; raises under `vmap` if they depend on a key."""
    return changed


@_shared.def_vmap
def _refuse_batched(_: int, batched: list[Any], changed: dict[str, Any]) -> Any:
    _refuse_changes({name for name in changed if any(jax.tree.leaves(batched[0][name]))}, "key")
    return changed, batched[0]


def _refuse_changes(names: set[str], reason: str) -> None:
    if names:
        raise ValueError(
            f"an initializer changes the base differently for each {reason}, so that adapters "
            f"cannot share it, at {', '.join(sorted(names))}. Use an initializer that does not "
            "change weights, such as jlora.initializers.kaiming_uniform, or train one by one."
        )


def _check_keys(keys: jax.Array) -> None:
    """Raises `TypeError` unless `keys` are n threefry keys, new or old style."""
    refuse_rngs("`keys` must be an array of PRNG keys, such as jax.random.split(key, 8)", keys)
    dtype = getattr(keys, "dtype", None)
    shape = tuple(getattr(keys, "shape", ()))
    typed = dtype is not None and jnp.issubdtype(dtype, jax.dtypes.prng_key)
    per_key = shape[1:] == (() if typed else (2,)) and (typed or dtype == jnp.uint32)
    if not shape or not shape[0] or not per_key:
        raise TypeError(
            "`keys` must be one PRNG key for each adapter, such as "
            f"jax.random.split(jax.random.key(0), 8); got {short(keys)}."
        )
    if typed and str(jax.random.key_impl(keys)) != "threefry2x32":
        raise TypeError(
            '`keys` must have the implementation "threefry2x32", whose draws under vmap equal '
            f"those of each key alone; got {jax.random.key_impl(keys)!s}. Make them with "
            'jax.random.key(seed, impl="threefry2x32").'
        )


# ------------------------------------------------------------------------------ runs of other ranks


def _start_ranks(
    starts: Callable[[Transformed, jax.Array], tuple[dict[str, Any], PyTree]],
    lora: Transformed,
    keys: jax.Array,
    ranks: Sequence[int],
    like: PyTree,
) -> tuple[dict[str, Any], PyTree]:
    """Initializes the slots of each rank, and joins them to one table with the form of `like`."""
    each = _check_ranks(lora, ranks, len(keys))
    groups = [np.flatnonzero(each == r) for r in np.unique(each)]
    found = [starts(_with_rank(lora, int(each[at[0]])), keys[at]) for at in groups]
    if len(groups) > 1:
        _refuse_changes(set().union(*(changed for changed, _ in found)), "rank")
    order = np.argsort(np.concatenate(groups))

    def join(of_one: jax.ShapeDtypeStruct, *parts: jax.Array) -> jax.Array:
        return jnp.concatenate([resize(x, (len(x), *of_one.shape)) for x in parts])[order]

    tables = (jax.tree.leaves(table) for _, table in found)
    leaves = list(map(join, jax.tree.leaves(like), *tables))
    return found[0][0], jax.tree.unflatten(jax.tree.structure(like), leaves)


def _with_rank(lora: Transformed, rank: int) -> Transformed:
    """Returns the transform with another rank and the same scales in its rules."""
    rules = [x.of_rank(rank) if isinstance(x, LoRA) else x for x in lora.rules]
    return transform(lora.apply_fn, *rules)


def _check_ranks(lora: Transformed, ranks: Sequence[int], n: int) -> np.ndarray:
    if not is_concrete(ranks):
        raise TypeError(
            "`ranks` must be known when many.init is traced, as shapes depend on them. Give a list "
            "or a NumPy array, closed over instead of passed to the jitted function."
        )
    found = list(np.asarray(ranks).ravel())
    if not all(map(is_int, found)):
        raise TypeError(f"`ranks` must be integers; got {ranks!r}.")
    if len(found) != n:
        raise InputError("ranks", f"must be one for each of the {n} keys; got {len(found)}.")
    limits = {rule_name(x): x.rank for x in lora.rules if isinstance(x, LoRA)}
    if not limits:
        raise InputError("ranks", "is given, but no rule of `lora` has a rank. Leave it out.")
    for name, limit in limits.items():
        if wrong := [r for r in found if not 1 <= r <= limit]:
            raise InputError(
                "ranks",
                f"must be in [1, {limit}], the rank of {name}; got {wrong[0]}. The rule's "
                "rank is that of the table. Raise it to the largest.",
            )
    return np.array(found)
