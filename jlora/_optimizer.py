"""An optimizer that trains the adapter alone, whatever tree it is given."""

from typing import Any

import jax
import jax.numpy as jnp
import optax

from ._adapters import is_node
from ._labels import labels
from ._tree import leaves_by_path, name_of
from ._types import PyTree


def optimizer(tx: optax.GradientTransformation) -> optax.GradientTransformationExtraArgs:
    r"""Lets `tx` train the adapter and nothing else.

    For a tree of the adapter alone it is `tx`. Give one of `Full` leaves alone, which looks like
    parameters, as `Params({}, adapter)`. For `Params(base, adapter)`, as in Flax's `TrainState`,
    base leaves get no moments and zero updates, whatever their gradients; norms, clipping and
    weight decay inside `tx` see the adapter only. The same holds for frozen factors, as those of
    `LoRA(..., frozen=("a",))`. Weight decay should leave the magnitudes of `DoRA` out, by a mask of
    their label: see `Decomposed`.

    LoRA+ and preconditioning are transformations to chain in `tx`, in this order:
    `optax.chain(jlora.precondition(1e-6), optax.adamw(2e-4), jlora.lora_plus(16))`.

    Wrappers belong inside: `jlora.optimizer(optax.MultiSteps(tx, 4))` accumulates the gradients of
    the adapter, while `optax.MultiSteps(jlora.optimizer(tx), 4)` also accumulates those of the
    base, at the base's size, and drops them.

    Args:
        tx: any optax transformation. If factors are frozen, its `update` gets all parameters as the
            extra argument `all_params`.

    Returns:
        An optax transformation.

    Raises:
        TypeError: if `tx` is no optax transformation, or it is given a tree that is neither form,
            as the parameters are, or a base with PRNG keys, to which `optax.apply_updates` can add
            nothing.

    Examples:
        >>> import jax, jax.numpy as jnp, jlora, optax
        >>> lora = jlora.transform(lambda p, x: x @ p["w"], jlora.LoRA("w", rank=2))
        >>> x, key = jnp.ones((1, 4)), jax.random.key(0)
        >>> params = jlora.Params(*lora.init(key, {"w": jnp.ones((4, 3))}, x))
        >>> tx = jlora.optimizer(optax.chain(optax.adamw(1e-3), jlora.lora_plus(16)))
        >>> state = tx.init(params)
        >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        >>> bool((optax.apply_updates(params, updates).base["w"] == 1).all())
        True
    """
    check_transformation(tx)

    def group(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda x: "frozen" if x == "base" else "trained", labels(tree))

    parts = optax.partition({"trained": tx, "frozen": _set_to_zero()}, group)

    def init(params: PyTree) -> PyTree:
        _check_no_keys(params)
        return parts.init(params)

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        nodes = jax.tree.leaves(params, is_leaf=is_node)
        if any(is_node(x) and x.frozen for x in nodes):  # `tx` sees neither them nor their updates
            extra = {"all_params": params} | extra
        return parts.update(updates, state, params, **extra)

    return optax.GradientTransformationExtraArgs(init, update)


def is_transformation(tx: Any) -> bool:
    """Whether `tx` acts as an optax transformation; `optax.MultiSteps` does without being one."""
    return all(callable(getattr(tx, name, None)) for name in ("init", "update"))


def check_transformation(tx: Any) -> None:
    """Raises `TypeError` if `tx` is not an optax transformation."""
    if not is_transformation(tx):
        raise TypeError(
            f"`tx` must be an optax transformation, such as optax.adamw(2e-4); got {tx!r}."
        )


def _check_no_keys(params: PyTree) -> None:
    keys = [
        name_of(path)
        for path, x in leaves_by_path(params, is_node)
        if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    ]
    if keys:
        raise TypeError(
            f"`params` of jlora.optimizer has PRNG keys, to which no update can be added, at "
            f"{', '.join(keys)}. Pass them to the model beside the parameters (in NNX: graph, "
            "params, rest = nnx.split(model, nnx.Param, ...)), or train the adapter alone."
        )


def _set_to_zero() -> optax.GradientTransformation:
    def zero(update: jax.Array, param: jax.Array) -> jax.Array:
        # -0.0 is the zero that leaves every float as it was: -0.0 + 0.0 would be 0.0. An integer
        # leaf has a gradient of no dtype to speak of, so the leaf's own counts.
        del update
        floating = jnp.issubdtype(param.dtype, jnp.inexact)
        return jnp.full_like(param, -0.0 if floating else 0)

    def update(updates: PyTree, params: PyTree | None) -> PyTree:
        return jax.tree.map(zero, updates, updates if params is None else params)

    return optax.stateless(update)
