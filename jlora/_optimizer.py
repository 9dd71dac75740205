"""Optimizers that train the adapter alone, whatever tree they are given."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.tree_util import DictKey, GetAttrKey

from ._adapters import arrays, is_node, labels_of
from ._compat import is_concrete
from ._precondition import preconditioned
from ._rules import is_finite
from ._tree import leaves_by_path, name_of
from ._types import Adapted, Params, PyTree


def labels(tree: PyTree) -> PyTree:
    """A tree like `tree` that says what each leaf is.

    Args:
        tree: an adapter, or `Params(base, adapter)`.

    Returns:
        `"a"` and `"b"` for the factors, `"m"` for the magnitudes of DoRA, `"rows"` for the values
        of `Rows`, `"full"` for leaves trained in full, `"base"` for frozen ones, among which are
        dropout keys and what an initializer freezes.

    Raises:
        TypeError: if an array stands where an adapter has none, as in a tuple of base and adapter;
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
    leaves = jax.tree.leaves(tree, is_leaf=lambda x: _is_marked(x) or _is_left_out(x))
    if leaves and not any(_is_marked(x) or _is_left_out(x) for x in leaves):
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
    """The key of a base that stands beside its adapter in one dict, if there is one."""
    for name in ("base", "params") if isinstance(tree, Mapping) else ():
        own = _paths(tree[name]) if name in tree else {}
        others = [_paths(x) for key, x in tree.items() if key != name]
        nodes = {path for found in others for path, is_marked in found.items() if is_marked}
        if nodes and nodes <= own.keys() and not any(own.values()):
            return name
    return None


def _paths(tree: PyTree) -> dict[str, bool]:
    """Which leaves say of themselves what of them is trained."""
    flat, _ = jax.tree_util.tree_flatten_with_path(tree, is_leaf=_is_marked)
    return {jax.tree_util.keystr(path): _is_marked(x) for path, x in flat}


def _is_left_out(x: Any) -> bool:
    """Whether it stands for a leaf that is none of this optimizer's."""
    return isinstance(x, optax.MaskedNode)


def _is_marked(x: Any) -> bool:
    """Whether it says of itself what of it is trained."""
    return is_node(x) or isinstance(x, Params | Adapted)


def _labels(tree: PyTree) -> PyTree:
    def label(path: tuple[Any, ...], leaf: Any) -> Any:
        match leaf:
            case Params():
                return Params(jax.tree.map(lambda _: "base", leaf.base), _labels(leaf.adapter))
            case Adapted():
                return dataclasses.replace(leaf, base="base", delta=label(path, leaf.delta))
            case _ if is_node(leaf):
                label_of = labels_of(leaf)
                return leaf._replace(**{name: label_of[name] or "base" for name in arrays(leaf)})
        if not all(isinstance(key, DictKey) for key in path):
            raise TypeError(
                "`tree` must be an adapter, a nested dict, or jlora.Params(base, adapter), "
                f"but has an array at {jax.tree_util.keystr(path)!r}. {_remedy(path)}"
            )
        return "full"

    return jax.tree_util.tree_map_with_path(label, tree, is_leaf=_is_marked)


def _remedy(path: tuple[Any, ...]) -> str:
    if path and path[-1] == GetAttrKey("value"):  # a variable of NNX
        return (
            "For nnx.Optimizer(model, tx, wrt=nnx.LoRAParam), whose tree is the adapter alone, "
            "give `tx` itself."
        )
    return "Put base and adapter into Params, so that the base stays frozen."


def mask(tree: PyTree) -> PyTree:
    """A tree like `tree` with True where it is trained, as optax's masks are.

    For masks that say what a transformation acts on, such as that of `optax.add_decayed_weights`.
    It freezes nothing: `optax.masked(tx, jlora.mask)` passes the gradients of the base on as its
    updates, so that `optax.apply_updates` adds them to the base. What freezes the base is
    `jlora.optimizer(tx)`, or, spelled out,

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


def optimizer(
    tx: optax.GradientTransformation,
    *,
    lora_plus: float | jax.Array | None = None,
    freeze_a: bool = False,
    precondition: float | jax.Array | None = None,
) -> optax.GradientTransformationExtraArgs:
    r"""Lets `tx` train the adapter and nothing else.

    For a tree of the adapter alone it is `tx`. Give one of `Full` leaves alone, which looks like
    parameters, as `Params({}, adapter)`. For `Params(base, adapter)`, as in Flax's `TrainState`,
    base leaves get no moments and zero updates, whatever their gradients; norms, clipping and
    weight decay inside `tx` see the adapter only. Weight decay should leave the magnitudes of
    `DoRA` out, by a mask of their label: see `Decomposed`.

    Wrappers belong inside: `jlora.optimizer(optax.MultiSteps(tx, 4))` accumulates the gradients of
    the adapter, while `optax.MultiSteps(jlora.optimizer(tx), 4)` also accumulates those of the
    base, at the base's size, and drops them.

    Args:
        tx: any optax transformation.
        lora_plus: the ratio λ of B's learning rate to A's: updates of B are multiplied by it.
            Hayou et al. find about 16 to be good. None means 1. It may be traced.
        freeze_a: train B (and full leaves) only; A gets no moments and zero updates.
        precondition: the damping δ of Riemannian preconditioning, 1e-6 in the paper: before `tx`
            sees them, the gradient of A is multiplied by $(B B^\top + \delta I)^{-1}$ and that of B
            by $(A^\top A + \delta I)^{-1}$, so that a step changes ΔW alike however it is split
            between A and B. The learning rate then has to be found anew. None leaves the gradients
            as they are. It may be traced.

    Returns:
        An optax transformation.

    Raises:
        TypeError: if `tx` is no optax transformation, or it is given a tree that is neither form,
            as the parameters are, or a base with PRNG keys, to which `optax.apply_updates` can add
            nothing.
        ValueError: if `lora_plus` or `precondition` is not a positive finite number; in `update`,
            if `precondition` is set and there are no parameters.

    Source: Hayou et al., LoRA+, arXiv 2402.12354; Zhang et al., LoRA-FA, arXiv 2308.03303, for
    `freeze_a`; Zhang and Pilanci, arXiv 2402.02347, algorithm 1, for `precondition`.

    Examples:
        >>> import jax, jax.numpy as jnp, jlora, optax
        >>> lora = jlora.transform(lambda p, x: x @ p["w"], jlora.LoRA("w", rank=2))
        >>> x, key = jnp.ones((1, 4)), jax.random.key(0)
        >>> params = jlora.Params(*lora.init(key, {"w": jnp.ones((4, 3))}, x))
        >>> tx = jlora.optimizer(optax.adamw(1e-3), lora_plus=16)
        >>> state = tx.init(params)
        >>> updates, state = tx.update(jax.tree.map(jnp.ones_like, params), state, params)
        >>> bool((optax.apply_updates(params, updates).base["w"] == 1).all())
        True
    """
    check_transformation(tx)
    for name, x in (("lora_plus", lora_plus), ("precondition", precondition)):
        if x is not None and is_concrete(x) and not _is_positive(x):
            raise ValueError(f"`{name}` must be a positive finite number; got {x!r}.")
    frozen = {"base", "a"} if freeze_a else {"base"}

    def group(tree: PyTree) -> PyTree:
        return jax.tree.map(lambda label: "frozen" if label in frozen else "trained", labels(tree))

    parts = optax.partition({"trained": tx, "frozen": _freeze()}, group)
    before = [] if precondition is None else [preconditioned(precondition)]
    after = [] if lora_plus is None else [_scale_b(lora_plus)]
    whole = optax.chain(*before, parts, *after) if before or after else parts

    def init(params: PyTree) -> PyTree:
        _check_no_keys(params)
        return whole.init(params)

    return whole._replace(init=init)


def _is_positive(x: Any) -> bool:
    return is_finite(x) and x > 0


def is_transformation(tx: Any) -> bool:
    """Whether `tx` acts as an optax transformation; `optax.MultiSteps` does without being one."""
    return all(callable(getattr(tx, name, None)) for name in ("init", "update"))


def check_transformation(tx: Any) -> None:
    """`TypeError` if `tx` is no optax transformation."""
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


def _freeze() -> optax.GradientTransformation:
    def zero(update: jax.Array, param: jax.Array) -> jax.Array:
        # -0.0 is the zero that leaves every float as it was: -0.0 + 0.0 would be 0.0. An integer
        # leaf has a gradient of no dtype to speak of, so the leaf's own counts.
        del update
        floating = jnp.issubdtype(param.dtype, jnp.inexact)
        return jnp.full_like(param, -0.0 if floating else 0)

    def update(updates: PyTree, params: PyTree | None) -> PyTree:
        return jax.tree.map(zero, updates, updates if params is None else params)

    return optax.stateless(update)


def _scale_b(ratio: float | jax.Array) -> optax.GradientTransformation:
    def scale(updates: PyTree, params: PyTree | None) -> PyTree:
        del params
        return jax.tree.map(
            lambda u, label: ratio * u if label == "b" else u, updates, labels(updates)
        )

    return optax.stateless(scale)
