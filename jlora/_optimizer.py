"""Labels for the leaves of an adapter, and an optimizer that trains only the adapter."""

from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any, NamedTuple, TypeGuard

import jax
import jax.numpy as jnp
from jax.tree_util import DictKey, GetAttrKey

from ._adapters import arrays, is_node
from ._node import BoundLeaf, is_table
from ._tree import leaves_by_path, name_of
from ._types import Params, PyTree

if TYPE_CHECKING:
    import optax  # functions import it where they run: it takes as long as all of jlora


def labels(tree: PyTree) -> PyTree:
    """Labels each leaf of a tree with what it is.

    Args:
        tree: an adapter, or `Params(base, adapter)`.

    Returns:
        A tree of labels with the structure of `tree`. The labels are `"a"` and `"b"` for the
        factors, `"m"` for the magnitudes of DoRA, `"rows"` for the values of `Rows`, `"full"` for
        leaves trained in full, and `"base"` for everything frozen: the base, dropout keys, and the
        factors that a rule freezes.

    Raises:
        TypeError: if `tree` is neither form, such as a tuple or dict of base and adapter or a tree
            of `bind`, or holds only arrays, like parameters. An adapter of `Full` leaves only
            looks like parameters too: give it as `Params({}, adapter)`.

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
            "`tree` must be an adapter or jlora.Params(base, adapter), but it has only arrays, "
            "like a model's parameters: all of them would be trained. Give the adapter that `init` "
            "returned. If it is an adapter of jlora.Full leaves only, use `tx` without "
            "jlora.optimizer, or give jlora.Params({}, adapter)."
        )
    if name := _base_beside_adapter(tree):
        raise TypeError(
            "`tree` must be an adapter or jlora.Params(base, adapter), but it is a dict of both: "
            f"the base at {name!r} would be trained too. Give jlora.Params(base, adapter)."
        )
    return found


def _base_beside_adapter(tree: PyTree) -> str | None:
    """Finds the key of a base next to its adapter in one dict, if there is one."""
    for name in ("base", "params") if isinstance(tree, Mapping) else ():
        own = dict(leaves_by_path(tree.get(name, {}), _is_labeled))
        others = [x for key, x in tree.items() if key != name]
        found = [leaf for x in others for leaf in leaves_by_path(x, _is_labeled)]
        nodes = {path for path, x in found if _is_labeled(x)}
        if nodes and nodes <= own.keys() and not any(map(_is_labeled, own.values())):
            return name
    return None


def is_masked(x: object) -> bool:
    """Whether `x` is a placeholder of optax for a masked leaf."""
    import optax

    return isinstance(x, optax.MaskedNode)


def _is_labeled(x: object) -> bool:
    """Whether `x` brings its labels: a node or `Params`; or is a bound leaf, which has none."""
    return is_node(x) or isinstance(x, Params | BoundLeaf)


def _labels(tree: PyTree) -> PyTree:
    def label(path: tuple[Any, ...], leaf: object) -> Any:
        match leaf:
            case Params():
                return Params(jax.tree.map(lambda _: "base", leaf.base), _labels(leaf.adapter))
            case BoundLeaf():
                raise TypeError(
                    "`tree` must be an adapter or jlora.Params(base, adapter); got a tree from "
                    "`bind`, in which the rest of the base looks trained in full. Give the adapter "
                    "in it, or Params."
                )
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
            "nnx.Optimizer(model, tx, wrt=nnx.LoRAParam) trains only the adapter anyway: give it "
            "`tx` without jlora.optimizer."
        )
    return "Put base and adapter into Params, so that the base stays frozen."


def mask(tree: PyTree) -> PyTree:
    """Returns for each leaf whether it is trained, as a mask for optax.

    Use it as the mask of a transformation such as `optax.add_decayed_weights`. Do not use it to
    freeze the base: `optax.masked(tx, jlora.mask)` passes the gradients of the base through as
    updates, and `optax.apply_updates` adds them to the base. To freeze the base, use
    `jlora.optimizer(tx)`, which is in essence

        words = {True: "trained", False: "frozen"}
        group = lambda params: jax.tree.map(words.get, jlora.mask(params))
        optax.partition({"trained": tx, "frozen": optax.set_to_zero()}, group)

    Args:
        tree: an adapter, or `Params(base, adapter)`.

    Returns:
        Booleans in the structure of `tree`: True for the adapter, except what a rule freezes.

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

    The result accepts two kinds of trees. On an adapter it acts like `tx`. On
    `Params(base, adapter)`, as in Flax's `TrainState`, it freezes the base: base leaves have no
    moments and get zero updates, and `tx` computes norms, clips and decays weights for the adapter
    only. Factors that a rule freezes, as `LoRA(..., frozen=("a",))` does, are frozen in the same
    way. An adapter of `Full` leaves only looks like parameters: give it as `Params({}, adapter)`.

    Do not decay the magnitudes of `DoRA`: mask them by their label, as `Decomposed` shows. LoRA+
    and preconditioning are transformations to chain in `tx`, in this order:
    `optax.chain(jlora.precondition(1e-6), optax.adamw(2e-4), jlora.lora_plus(16))`.

    Put wrappers inside: `jlora.optimizer(optax.MultiSteps(tx, 4))` accumulates the gradients of
    the adapter. `optax.MultiSteps(jlora.optimizer(tx), 4)` would also accumulate the gradients of
    the base, in arrays of the base's size, and drop them.

    Args:
        tx: any optax transformation. It gets neither what is frozen nor its gradients. Extra
            arguments of `update` that are functions of the parameters, such as the `value_fn` of
            `optax.lbfgs`, are called with all of them.

    Returns:
        An optax transformation.

    Raises:
        TypeError: if `tx` is not an optax transformation. In `init` and `update`: if the tree is
            neither an adapter nor `Params`. In `init`: if its base has PRNG keys, which cannot be
            updated, or the adapter is a table, whose adapters `tx` would clip together.

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

    transformations: dict[Any, Any] = {"trained": tx, "frozen": _set_to_zero()}
    parts = optax.partition(transformations, group, mask_compatible_extra_args=True)

    def init(params: PyTree) -> PyTree:
        _check_no_keys(params)
        _refuse_table(params)
        return parts.init(params)

    def update(
        updates: PyTree, state: PyTree, params: PyTree | None = None, **extra: Any
    ) -> tuple[PyTree, PyTree]:
        extra = {k: _of_all(f, params) if callable(f) else f for k, f in extra.items()}
        updates, state = parts.update(updates, _give(state, params), params, **extra)
        return updates, _give(state, None)

    return optax.GradientTransformationExtraArgs(init, update)


class AllParams(NamedTuple):
    """The state of a transformation that needs frozen parameters too, in its `update`.

    Attributes:
        params: all parameters while `jlora.optimizer` updates, else None.
    """

    params: PyTree = None


def _give(state: PyTree, params: PyTree) -> PyTree:
    """Puts `params` into each `AllParams` of a state."""
    is_asking = lambda x: isinstance(x, AllParams)  # noqa: E731
    give = lambda x: AllParams(params) if is_asking(x) else x  # noqa: E731
    return jax.tree.map(give, state, is_leaf=is_asking)


def _of_all(f: Callable[..., Any], params: PyTree) -> Callable[..., Any]:
    """Makes a function of all parameters one of the trained ones, as are the gradients it returns.

    The others have the values in `params`.
    """

    def of_trained(trained: PyTree, *args: Any, **kwargs: Any) -> Any:
        pick = lambda x, full: full if is_masked(x) else x  # noqa: E731
        found = f(jax.tree.map(pick, trained, params, is_leaf=is_masked), *args, **kwargs)
        if jax.tree.structure(found) != jax.tree.structure(params):
            return found
        hide = lambda x, full: x if is_masked(x) else full  # noqa: E731
        return jax.tree.map(hide, trained, found, is_leaf=is_masked)

    return of_trained


def is_transformation(tx: object) -> "TypeGuard[optax.GradientTransformation]":
    """Whether `tx` has the methods of an optax transformation, as `optax.MultiSteps` has too."""
    return all(callable(getattr(tx, name, None)) for name in ("init", "update"))


def check_transformation(tx: object) -> "optax.GradientTransformation":
    """Returns `tx`; raises `TypeError` if it is not an optax transformation."""
    if is_transformation(tx):
        return tx
    raise TypeError(f"`tx` must be an optax transformation, such as optax.adamw(2e-4); got {tx!r}.")


def _check_no_keys(params: PyTree) -> None:
    keys = [
        name_of(path)
        for path, x in leaves_by_path(params, is_node)
        if hasattr(x, "dtype") and jnp.issubdtype(x.dtype, jax.dtypes.prng_key)
    ]
    if keys:
        raise TypeError(
            f"`params` of jlora.optimizer has PRNG keys, which cannot be updated, at "
            f"{', '.join(keys)}. Pass them to the model beside the parameters (in NNX: graph, "
            "params, rest = nnx.split(model, nnx.Param, ...)), or train the adapter alone."
        )


def _refuse_table(params: PyTree) -> None:
    """Raises for a table, of which `tx` would take norms over all adapters."""
    nodes = [(path, x) for path, x in leaves_by_path(params, is_node) if is_node(x)]
    if tables := [f"{name_of(path)}: {x!r}" for path, x in nodes if is_table(x)]:
        raise TypeError(
            "`params` of jlora.optimizer must be one adapter, but its arrays have a leading axis, "
            f"like a table of jlora.many: {tables[0]}. Use jlora.many.optimizer(tx), in which "
            "norms, clipping and step counts are those of each adapter."
        )


def _set_to_zero() -> "optax.GradientTransformation":
    import optax

    def zero(update: jax.Array, param: jax.Array) -> jax.Array:
        # Adding -0.0 changes no float, while adding 0.0 would change -0.0. The dtype is that of
        # the leaf, as the gradient of an integer leaf has the dtype float0.
        del update
        floating = jnp.issubdtype(param.dtype, jnp.inexact)
        return jnp.full_like(param, -0.0 if floating else 0)

    def update(updates: PyTree, params: PyTree | None) -> PyTree:
        return jax.tree.map(zero, updates, updates if params is None else params)

    return optax.stateless(update)
