"""Transformations to chain with an optimizer: LoRA+, Riemannian preconditioning."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

import jax
import jax.numpy as jnp
from jax.tree_util import GetAttrKey

from ._adapters import Node, is_node
from ._arrays import einsum, promote
from ._compat import is_concrete
from ._linalg import inverse
from ._node import SLOTS
from ._optimizer import AllParams, is_masked
from ._rules import is_finite, number_of
from ._types import Params, PyTree

if TYPE_CHECKING:
    import optax

OTHER = "other rank"  # the second axis of an r × r matrix


def lora_plus(ratio: float | jax.Array) -> "optax.GradientTransformationExtraArgs":
    r"""Multiplies the updates of B by λ, so that B learns λ times as fast as A.

    Chain it after the optimizer: `optax.chain(optax.adamw(2e-4), jlora.lora_plus(16))`. Before Adam
    it would have no effect, because Adam divides by the size of the gradients.

    Args:
        ratio: λ, a positive number, which may be traced. Hayou et al. recommend about 16.

    Returns:
        An optax transformation, for an adapter or `Params(base, adapter)`.

    Raises:
        TypeError: in `init` and `update`, if the tree holds no adapter.
        ValueError: if `ratio` is not a positive finite number.

    Source: Hayou et al., LoRA+, arXiv 2402.12354.

    Examples:
        >>> import jax.numpy as jnp, jlora
        >>> layout = jlora.types.Layout((), (0,), (1,))
        >>> updates = {"w": jlora.types.LowRank(jnp.ones((2, 1)), jnp.ones((1, 2)), 1.0, layout)}
        >>> tx = jlora.lora_plus(16)
        >>> updates, _ = tx.update(updates, tx.init(updates))
        >>> updates["w"].a.tolist(), updates["w"].b.tolist()
        ([[1.0], [1.0]], [[16.0, 16.0]])
    """
    _check_positive("ratio", ratio)

    def scale(x: object) -> Any:
        if not is_node(x):
            return x
        chosen = {name: getattr(x, name) for name, label in x.labels.items() if label == "b"}
        return x._replace(**jax.tree.map(lambda u: jnp.asarray(ratio, u.dtype) * u, chosen))

    def update(updates: PyTree, params: PyTree | None) -> PyTree:
        del params
        return jax.tree.map(scale, updates, is_leaf=is_node)

    return _make_transformation("lora_plus", update)


def precondition(damping: float | jax.Array) -> "optax.GradientTransformationExtraArgs":
    r"""Multiplies the gradients of A and B, each by an r × r matrix made of the other factor.

    $$\bar A \leftarrow \bar A\,(B B^\top + \delta I)^{-1},\qquad
    \bar B \leftarrow (A^\top A + \delta I)^{-1} \bar B$$

    Each matrix of a stack and each slot has its own inverse, in float32 or better. With it the step
    of ΔW does not depend on how ΔW is split into A and B. The gradients change in size, so tune the
    learning rate again.

    Chain it before the optimizer: `optax.chain(jlora.precondition(1e-6), optax.adamw(2e-4))`. The
    formula is for gradients, not for the steps of Adam.

    Args:
        damping: δ, a positive number, which may be traced; the paper has 1e-6.

    Returns:
        An optax transformation, for an adapter or `Params(base, adapter)`. Its `update` needs the
        parameters.

    Raises:
        TypeError: in `init` and `update`, if the tree holds no adapter; in `update`, if a node has
            more than one A or B.
        ValueError: if `damping` is not a positive finite number; in `update`, if it gets no
            parameters.

    Source: Zhang and Pilanci, arXiv 2402.02347, algorithm 1.

    Examples:
        >>> import jax.numpy as jnp, jlora
        >>> layout = jlora.types.Layout((), (0,), (1,))
        >>> params = {"w": jlora.types.LowRank(jnp.ones((2, 1)), jnp.ones((1, 2)), 1.0, layout)}
        >>> tx = jlora.precondition(1e-6)
        >>> updates, _ = tx.update(params, tx.init(params), params)
        >>> updates["w"].a.round(3).tolist()
        [[0.5], [0.5]]
    """
    _check_positive("damping", damping)

    def of_node(update: PyTree, param: PyTree) -> PyTree:
        if not is_node(update) or not {"a", "b"} <= set(update.labels.values()):
            return update
        *factors, _ = names = _find_factors(update)
        if all(is_masked(getattr(update, x)) for x in factors):
            return update
        if any(is_masked(getattr(param, x)) for x in factors):
            raise ValueError(
                "jlora.precondition needs A and B, but the transformation around it hides the "
                "frozen one. Chain jlora.precondition before that transformation: "
                "optax.chain(jlora.precondition(1e-6), optax.MultiSteps(tx, 4))."
            )
        return _times_inverses(names, update, param, damping)

    def update(updates: PyTree, params: PyTree | None) -> PyTree:
        if params is None:
            raise ValueError(
                "The update of jlora.precondition needs the parameters: call "
                "update(grads, state, params)."
            )
        stop = lambda x: is_node(x) or is_masked(x)  # noqa: E731
        return jax.tree.map(of_node, updates, params, is_leaf=stop)

    return _make_transformation("precondition", update)


def _find_factors(node: Node) -> tuple[str, str, str]:
    """Returns the names of A, of B and of the axis of the rank; raises unless there is one each."""
    axes = node.axes(node.layout)
    a, b = ([x for x, label in node.labels.items() if label == which] for which in ("a", "b"))
    shared = set.intersection(*(set(axes[x]) for x in (*a, *b)))
    rank = [d for d in shared if isinstance(d, str) and d != SLOTS]
    if len(a) == len(b) == len(rank) == 1:
        return a[0], b[0], rank[0]
    raise TypeError(
        "jlora.precondition needs nodes with one array labeled 'a' and one labeled 'b', which "
        f"share one axis that W lacks; got {type(node).__name__}, with the labels "
        f"{dict(node.labels)}. Give its leaves another optimizer, by optax.partition and "
        "jlora.labels."
    )


def _times_inverses(
    names: tuple[str, str, str], update: PyTree, param: PyTree, damping: float | jax.Array
) -> PyTree:
    a, b, rank = names
    values = {name: getattr(param, name) for name in (a, b)}
    wide = promote(*(x.dtype for x in values.values()), jnp.float32)
    named = param.axes(param.layout)
    slots = tuple(range(-1, len(named[a]) - values[a].ndim - 1, -1))  # first axes of a table
    axes = {name: (*slots, *named[name]) for name in values}
    square = (*(d for d in axes[a] if d in axes[b] and d != rank), rank, OTHER)
    how = {"precision": "highest", "dtype": wide}

    def multiplied(name: str, other: str) -> Any:
        old = getattr(update, name)
        if is_masked(old):
            return old
        turned = {x: tuple(OTHER if d == rank else d for d in axes[x]) for x in axes}
        x = values[other].astype(wide)
        gram = einsum(axes[other], turned[other], square, x, x, **how)
        by = inverse(gram + jnp.asarray(damping, wide) * jnp.eye(gram.shape[-1], dtype=wide))
        new = einsum(axes[name], square, turned[name], old.astype(wide), by, **how)
        return new.astype(old.dtype)

    return update._replace(**{a: multiplied(a, b), b: multiplied(b, a)})


# ---------------------------------------------------------------------------------- what they share


def _make_transformation(
    name: str, f: Callable[[PyTree, PyTree | None], PyTree]
) -> "optax.GradientTransformationExtraArgs":
    """Makes a transformation from `f(updates, params)`; `params` has frozen factors too."""
    import optax

    def check(tree: PyTree) -> None:
        leaves = jax.tree.leaves(tree, is_leaf=is_node)
        if leaves and not isinstance(tree, Params) and not any(map(is_node, leaves)):
            raise TypeError(
                f"jlora.{name} acts on the A and B of an adapter, but the tree has none. "
                f"{_remedy(name, tree)}"
            )

    def init(params: PyTree) -> AllParams:
        check(params)
        return AllParams()

    def update(updates: PyTree, state: PyTree, params: PyTree | None = None, **_: Any) -> Any:
        check(updates)
        return f(updates, params if state.params is None else state.params), state

    return optax.GradientTransformationExtraArgs(init, update)


def _remedy(name: str, tree: PyTree) -> str:
    """Says what to give instead of a tree without nodes."""
    [(path, _), *_] = jax.tree_util.tree_leaves_with_path(tree)
    if path[-1:] != (GetAttrKey("value"),):  # of a variable of NNX
        return "Give the adapter that `init` returned, or jlora.Params(base, adapter)."
    if name == "lora_plus":
        return (
            "nnx.Optimizer gives it variables instead. There, replace jlora.lora_plus(16) by "
            "optax.masked(optax.scale(16), lambda state: nnx.map_state(lambda path, _: "
            "path[-1] == 'b', state))."
        )
    return (
        "nnx.Optimizer gives it variables instead. Adapt a function of the module, "
        "jlora.transform(lambda model, x: model(x), ...), and train its adapter as a tree."
    )


def _check_positive(name: str, x: object) -> None:
    """Raises `ValueError` unless `x` is traced, or a positive finite number."""
    if is_concrete(x) and not (is_finite(number := number_of(x)) and number > 0):
        raise ValueError(f"`{name}` must be a positive finite number; got {x!r}.")
