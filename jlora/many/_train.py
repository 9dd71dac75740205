"""The optimizer of a table, with a state for each run.

A run is a slot of the table with its optimizer state. Runs share only the base.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jax.typing import ArrayLike

from .._arrays import is_floating, promote
from .._errors import InputError
from .._optimizer import check_transformation, is_transformation
from .._types import PyTree
from ._table import check_mask, mask_of, table_leaves

Make = Callable[..., optax.GradientTransformation]


class OptimizerState(NamedTuple):
    """The state of `many.optimizer`. All arrays have a leading axis of n runs.

    Therefore `jax.tree.map(lambda x: x[chosen], (table, state))` is a smaller table with its state.

    Attributes:
        inner: the state of the transformation for each run, with its own count.
        hyperparams: values of shape (n,) by name. You may replace them between steps by values of
            the same shape and dtype.
        running: (n,) bool: False for runs that were stopped or diverged.
        steps: (n,) int32: the number of updates of each run.
    """

    inner: PyTree
    hyperparams: dict[str, jax.Array]
    running: jax.Array
    steps: jax.Array


class Optimizer(optax.GradientTransformationExtraArgs):
    """The optax transformation from `many.optimizer`.

    Attributes:
        init: `(table, **hyperparams) -> OptimizerState`. Hyperparameters default to the values
            that were given to `many.optimizer`.
        update: `(grads, state, table, active=None, **extra) -> (updates, state)`.
    """

    init: Callable[..., OptimizerState]  # pyright: ignore[reportIncompatibleVariableOverride]
    update: Callable[..., tuple[PyTree, OptimizerState]]  # pyright: ignore


def optimizer(tx: optax.GradientTransformation | Make, **hyperparams: Any) -> Optimizer:
    r"""Makes an optimizer for a table, which applies `tx` to each run separately.

    Each run has its own moments, step count, schedule and clipping by norm. The state is as large
    as n single states. If a step would put NaN or infinity into the parameters or the state of a
    run, that run keeps its values and stops. All other runs are bit for bit the same as without the
    divergence. Stopped runs are still computed, but their updates are dropped.

    `update(grads, state, table, active=mask, **extra)` accepts a mask, (n,) bool, of the runs that
    take part in a step. All other runs stay unchanged: no update, no decay of weights or moments,
    no count. Other extra arguments, such as `value`, have one entry for each run.

    Args:
        tx: an optax transformation, such as `jlora.optimizer`; or a function of hyperparameters
            that returns one.
        **hyperparams: the arguments of that function: each a number, or an array of shape (n,) with
            one value for each run. They are traced and kept in the state, so that new values need
            no compilation. The function must not depend on concrete values: write a schedule as
            `lambda step: learning_rate * shape(step)`.

    Returns:
        An optax transformation.

    Raises:
        TypeError: if `tx` is neither, or hyperparameters are given without a function; in `init`
            and `update`, if the tree is not a table, or `active` not a mask.
        ValueError: in `init`, if a hyperparameter does not have one value for each run; in
            `update`, without the table.

    Examples:
        >>> import jax, jax.numpy as jnp, jlora, optax
        >>> lora = jlora.transform(lambda p, x: x @ p["w"], jlora.LoRA("w", rank=2))
        >>> keys, x = jax.random.split(jax.random.key(0), 2), jnp.ones((1, 4))
        >>> base, table = jlora.many.init(lora, keys, {"w": jnp.ones((4, 3))}, x)
        >>> def make(learning_rate):
        ...     return optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(learning_rate))
        >>> tx = jlora.many.optimizer(make, learning_rate=jnp.array([1e-3, 1e-2]))
        >>> loss = lambda adapter, base, x: lora.apply(base, adapter, x).sum()
        >>> slopes = jax.vmap(jax.value_and_grad(loss), (0, None, None))
        >>> @jax.jit
        ... def step(table, state, base, x):
        ...     losses, grads = slopes(table, base, x)
        ...     updates, state = tx.update(grads, state, table)
        ...     return optax.apply_updates(table, updates), state, losses
        >>> table, state, losses = step(table, jax.jit(tx.init)(table), base, x)
        >>> state.running, state.steps
        (Array([ True,  True], dtype=bool), Array([1, 1], dtype=int32))
    """
    make = _make_with(tx, hyperparams)

    def init(params: PyTree, **others: Any) -> OptimizerState:
        n = table_leaves(params)[1]
        values = {name: _per_run(name, x, n) for name, x in {**hyperparams, **others}.items()}
        inner = jax.vmap(lambda p, h: make(p, h).init(p))(params, values)
        return OptimizerState(inner, values, jnp.ones(n, bool), jnp.zeros(n, jnp.int32))

    def step(
        joins: jax.Array, state: OptimizerState, grads: PyTree, p: PyTree, extra: dict[str, Any]
    ) -> Any:
        updates, inner = make(p, state.hyperparams).update(grads, state.inner, p, **extra)
        finite = _stays_finite((p, state.inner), (optax.apply_updates(p, updates), inner))
        steps = joins & finite
        # Adding -0.0 changes no float.
        zeros = jax.tree.map(lambda x: jnp.full_like(x, -0.0), updates)
        return optax.tree.where(steps, updates, zeros), state._replace(
            inner=optax.tree.where(steps, inner, state.inner),
            running=state.running & (finite | ~joins),
            steps=state.steps + steps,
        )

    def update(
        updates: PyTree,
        state: OptimizerState,
        params: PyTree | None = None,
        *,
        active: jax.Array | None = None,
        **extra: Any,
    ) -> tuple[PyTree, OptimizerState]:
        if params is None:
            raise ValueError("many.optimizer needs the table: call update(grads, state, table).")
        joins = state.running
        if active is not None:
            joins &= check_mask("active", active, len(joins))
        return jax.vmap(step)(joins, state, updates, params, extra)

    return Optimizer(init, update)  # pyright: ignore[reportArgumentType]


def stop(state: OptimizerState, slots: ArrayLike | Sequence[int]) -> OptimizerState:
    """Stops runs: their adapters and states no longer change.

    Their steps are still computed. When many have stopped, make a smaller table of the running ones
    as in `OptimizerState`; it is compiled once more.

    Args:
        state: the state of `many.optimizer`.
        slots: an index, a list or array of indices, or a mask of shape (n,). Traced indices are not
            checked.

    Returns:
        The new state, with the same shapes and dtypes.

    Raises:
        TypeError: if `slots` is neither indices nor a mask.
        ValueError: if an index is out of range.

    Examples:
        >>> import jax.numpy as jnp, jlora, optax
        >>> table = {"bias": jnp.ones((3, 5))}
        >>> state = jlora.many.optimizer(optax.sgd(1.0)).init(table)
        >>> jlora.many.stop(state, jnp.array([0.1, 0.9, 0.2]) > 0.5).running
        Array([ True, False,  True], dtype=bool)
    """
    return state._replace(running=state.running & ~mask_of(slots, len(state.running)))


def restart(
    tx: Optimizer,
    state: OptimizerState,
    table: PyTree,
    slots: ArrayLike | Sequence[int],
    **hyperparams: Any,
) -> OptimizerState:
    """Starts new runs in slots whose adapters were replaced. Nothing is compiled again.

    Call it after `table = many.insert(table, slot, adapter)`. The new adapter gets an initial
    state, a step count of 0, and its hyperparameters.

    Args:
        tx: from `many.optimizer`.
        state: its state.
        table: the table with the new adapters.
        slots: an index, a list or array of indices, or a mask of shape (n,). Traced indices are not
            checked.
        **hyperparams: new values for these runs: each a number, or an array of shape (n,) of which
            only the entries at `slots` are used. All other runs keep their values.

    Returns:
        The new state, with the same shapes and dtypes.

    Raises:
        TypeError: if `slots` is neither indices nor a mask, or if the optimizer has no such
            hyperparameter.
        ValueError: if an index is out of range, or a value has a wrong shape; if it is a float, and
            the state has integers.

    Examples:
        >>> import jax.numpy as jnp, jlora, optax
        >>> table = {"bias": jnp.ones((2, 5))}
        >>> tx = jlora.many.optimizer(optax.sgd, learning_rate=jnp.array([0.1, 0.2]))
        >>> state = jlora.many.stop(tx.init(table), 1)
        >>> state = jlora.many.restart(tx, state, table, 1, learning_rate=0.5)
        >>> state.running, state.hyperparams["learning_rate"]
        (Array([ True,  True], dtype=bool), Array([0.1, 0.5], dtype=float32))
    """
    if unknown := hyperparams.keys() - state.hyperparams.keys():
        raise TypeError(
            f"`{min(unknown)}` is not a hyperparameter of this optimizer; it has "
            f"{', '.join(map(repr, state.hyperparams)) or 'none'}."
        )
    n = len(state.running)
    mask = mask_of(slots, n)
    values = dict(state.hyperparams)
    for name, x in hyperparams.items():
        new = _like(values[name], name, _per_run(name, x, n))
        values[name] = jnp.where(mask, new, values[name])
    return jax.vmap(optax.tree.where)(mask, tx.init(table, **values), state)


# ----------------------------------------------------------------------------------------- helpers


def _make_with(tx: Any, names: Collection[str]) -> Callable[[PyTree, dict[str, Any]], Any]:
    """Returns a function that makes a transformation from one adapter and its hyperparameters."""
    if is_transformation(tx) and (given := sorted(names)):
        raise TypeError(
            f"`{given[0]}` is given, but `tx` is a transformation. Give a function of "
            f"`{given[0]}`, such as many.optimizer(optax.adamw, learning_rate=...)."
        )
    if is_transformation(tx) or not callable(tx):
        found = optax.with_extra_args_support(check_transformation(tx))
        return lambda adapter, values: found

    def make(adapter: PyTree, values: dict[str, Any]) -> optax.GradientTransformationExtraArgs:
        dtypes = [x.dtype for x in jax.tree.leaves(adapter)]
        dtype = promote(*(d for d in dtypes if is_floating(d)))
        cast = {k: x.astype(dtype) if is_floating(x.dtype) else x for k, x in values.items()}
        return optax.with_extra_args_support(check_transformation(tx(**cast)))

    return make


def _per_run(name: str, value: object, n: int) -> jax.Array:
    """Returns one value for each of n runs, not weakly typed, so that all steps are one program."""
    x = jnp.asarray(value)
    if x.shape not in ((), (n,)):
        raise InputError(
            name,
            f"must be a number, or have one value for each of the {n} runs; got shape {x.shape}.",
        )
    return jnp.broadcast_to(x, (n,)).astype(x.dtype)


def _like(old: jax.Array, name: str, new: jax.Array) -> jax.Array:
    """Casts `new` to the dtype of the state; raises if that would cut off fractions."""
    if is_floating(new.dtype) and not is_floating(old.dtype):
        raise InputError(
            name,
            f"must be an integer, as in the state; got {new.dtype}. Give many.optimizer a "
            "float, such as 1.0, for a number that may have a fraction.",
        )
    return new.astype(old.dtype)


def _stays_finite(old: PyTree, new: PyTree) -> jax.Array:
    """Whether all finite numbers stay finite. Some states start at infinity."""

    def stays(x: jax.Array, y: jax.Array) -> Any:
        if not jnp.issubdtype(y.dtype, jnp.inexact):
            return True
        return jnp.all(jnp.isfinite(y) | ~jnp.isfinite(x))

    return jnp.all(jnp.stack([*map(stays, jax.tree.leaves(old), jax.tree.leaves(new))]))
