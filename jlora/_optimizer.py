"""What each leaf of an adapter is, and an optimizer that trains the adapter alone."""

import dataclasses
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.tree_util import DictKey, GetAttrKey

from ._adapters import arrays, is_node
from ._tree import leaves_by_path, name_of
from ._types import Adapted, Params, PyTree

if TYPE_CHECKING:
    import optax  # functions import it where they run: it takes as long as all of jlora


def labels(tree: PyTree) -> PyTree:
    """Labels each leaf of a tree with what it is.

    Args:
        tree: an adapter, or `Params(base, adapter)`.

    Returns:
        `"a"` and `"b"` for the factors, `"m"` for the magnitudes of DoRA, `"rows"` for the values
        of `Rows`, `"full"` for leaves trained in full, `"base"` for frozen ones, among which are
        dropout keys and what a rule freezes.

    Raises:
        TypeError: if an array is where an adapter has none, as in a tuple of base and adapter;
            if the tree has arrays alone, as parameters have; or if it is a dict of base and
            adapter. An adapter of `Full` leaves alone looks like parameters: give it as
            `Params({}, adapter)`.

    Examples:
        >>> import jax, jax.numpy as jnp, jlora
        >>> lora = jlora.transform(lambda p, x: x @ p["w"], jlora.LoRA("w", rank=2))
        >>> _, adapter = lora.init(jax.random.key(0), {"w": jnp.ones((4, 3))}, jnp.ones((1, 4)))
        >>> jlora.labels(adapter)["w"].a
        'a'
    """
    found = _labels(tree)
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: _is_labeled(x) or is_masked(x))
    if leaves and not any(_is_labeled(x) or is_masked(x) for x in leaves):
        raise TypeError(
            "`tree` must be an adapter or jlora.Params(base, adapter), but has arrays alone, as a "
            "model's parameters have, all of which would be trained. Give the adapter that `init` "
            "returned. If it is one, of jlora.Full leaves alone, give `tx` itself, or "
            "jlora.Params({}, adapter)."
        )
    if name := _base_beside_adapter(tree):
        raise TypeError(
            "`tree` must be an adapter or jlora.Params(base, adapter), but is a dict of both: at "
            f"{name!r} are arrays alone, which would be trained, at the paths of the adapter "
            "beside them. Give jlora.Params(base, adapter)."
        )
    return found


def _base_beside_adapter(tree: PyTree) -> str | None:
    """Finds the key of a base next to its adapter in one dict, if there is one."""
    for name in ("base", "params") if isinstance(tree, Mapping) else ():
        own = _labeled_by_path(tree[name]) if name in tree else {}
        others = [_labeled_by_path(x) for key, x in tree.items() if key != name]
        nodes = {path for found in others for path, is_labeled in found.items() if is_labeled}
        if nodes and nodes <= own.keys() and not any(own.values()):
            return name
    return None


def _labeled_by_path(tree: PyTree) -> dict[str, bool]:
    """Says for each leaf, by its path, whether it has labels of its own."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_labeled)
    return {jax.tree_util.keystr(path): _is_labeled(x) for path, x in flat}


def is_masked(x: Any) -> bool:
    """Whether `x` stands in for a leaf that a mask hides."""
    import optax

    return isinstance(x, optax.MaskedNode)


def _is_labeled(x: Any) -> bool:
    """Whether `x` has labels of its own: a node, a bound leaf or `Params`."""
    return is_node(x) or isinstance(x, Params | Adapted)


def _labels(tree: PyTree) -> PyTree:
    def label(path: tuple[Any, ...], leaf: Any) -> Any:
        match leaf:
            case Params():
                return Params(jax.tree.map(lambda _: "base", leaf.base), _labels(leaf.adapter))
            case Adapted():
                return dataclasses.replace(leaf, base="base", delta=label(path, leaf.delta))
            case _ if is_node(leaf):
                label_of = {**leaf.labels, **dict.fromkeys(leaf.frozen, "base")}
                return leaf._replace(**{name: label_of[name] or "base" for name in arrays(leaf)})
        if not all(isinstance(key, DictKey) for key in path):
            raise TypeError(
                "`tree` must be an adapter, a nested dict, or jlora.Params(base, adapter), "
                f"but has an array at {jax.tree_util.keystr(path)!r}. {_remedy(path)}"
            )
        return "full"

    return jax.tree_util.tree_map_with_path(label, tree, is_leaf=_is_labeled)


def _remedy(path: tuple[Any, ...]) -> str:
    if path and path[-1] == GetAttrKey("value"):  # a variable of NNX
        return (
            "For nnx.Optimizer(model, tx, wrt=nnx.LoRAParam), whose tree is the adapter alone, "
            "give `tx` itself."
        )
    return "Put base and adapter into Params, so that the base stays frozen."


def mask(tree: PyTree) -> PyTree:
    """Says of each leaf whether it is trained, as the masks of optax do.

    Use it where a mask says what a transformation acts on, as in `optax.add_decayed_weights`.
    It freezes nothing: `optax.masked(tx, jlora.mask)` passes the gradients of the base on as its
    updates, and `optax.apply_updates` adds them to the base. `jlora.optimizer(tx)` freezes the
    base. Spelled out, it does

        words = {True: "trained", False: "frozen"}
        group = lambda params: jax.tree.map(words.get, jlora.mask(params))
        optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, group)

    Args:
        tree: an adapter, or `Params(base, adapter)`.

    Returns:
        Booleans in the structure of `tree`.

    Raises:
        TypeError: as in `labels`.

    Examples:
        >>> import jax, jax.numpy as jnp, jlora
        >>> lora = jlora.transform(lambda p, x: x @ p["w"], jlora.LoRA("w", rank=2))
        >>> x, key = jnp.ones((1, 4)), jax.random.key(0)
        >>> params = jlora.Params(*lora.init(key, {"w": jnp.ones((4, 3))}, x))
        >>> jlora.mask(params).base
        {'w': False}
    """
    return jax.tree.map(lambda label: label != "base", labels(tree))


# ------------------------------------------------------------------------------------ the optimizer


def optimizer(tx: "optax.GradientTransformation") -> "optax.GradientTransformationExtraArgs":
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
    import optax

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


def _set_to_zero() -> "optax.GradientTransformation":
    import optax

    def zero(update: jax.Array, param: jax.Array) -> jax.Array:
        # -0.0 is the zero that leaves every float as it was: -0.0 + 0.0 would be 0.0. An integer
        # leaf has a gradient of no dtype to speak of, so the leaf's own counts.
        del update
        floating = jnp.issubdtype(param.dtype, jnp.inexact)
        return jnp.full_like(param, -0.0 if floating else 0)

    def update(updates: PyTree, params: PyTree | None) -> PyTree:
        return jax.tree.map(zero, updates, updates if params is None else params)

    return optax.stateless(update)
