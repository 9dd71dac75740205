"""Gradients of A and B in a metric that does not depend on how ΔW is split between the two."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.scipy.linalg import cho_factor, cho_solve

from ._types import PyTree
from .adapters import is_node, method_of
from .core import einsum, letters, promote

RANK, OTHER = "RS"  # the rank twice


def preconditioned(damping: float | jax.Array) -> optax.GradientTransformation:
    r"""Multiplies the gradients of A and of B by the inverse r × r matrix of the other factor.

    $$\bar A \leftarrow \bar A\,(B B^\top + \delta I)^{-1},\qquad
    \bar B \leftarrow (A^\top A + \delta I)^{-1} \bar B$$

    for each matrix of a stack and each slot by itself, in float32 or better.

    Source: Zhang and Pilanci, arXiv 2402.02347, algorithm 1.
    """

    def update(updates: PyTree, params: PyTree | None) -> PyTree:
        if params is None:
            raise ValueError(
                "The update of jlora.optimizer(precondition=...) needs the parameters: call "
                "update(grads, state, params)."
            )
        of_node = functools.partial(_of_node, damping)
        return jax.tree.map(of_node, updates, params, is_leaf=is_node)

    return optax.stateless(update)


def _of_node(damping: Any, update: Any, param: Any) -> Any:
    if not is_node(param) or not {"a", "b"} <= set(method_of(param).labels.values()):
        return update
    (of_a, of_b), wide = _axes(param), promote(param.a.dtype, param.b.dtype, jnp.float32)
    a, b = param.a.astype(wide), param.b.astype(wide)
    return update._replace(
        a=_times(update.a, of_a, _inverse(b, of_b, of_a, damping)),
        b=_times(update.b, of_b, _inverse(a, of_a, of_b, damping)),
    )


def _axes(node: Any) -> tuple[str, str]:
    """A letter for each axis of A and of B; a table's adapters are one more axis in front."""
    axes = method_of(node).axes(node.layout)
    names = dict.fromkeys((*axes["a"], *axes["b"]))
    named = dict(zip(names, letters(len(names)), strict=True)) | {"rank": RANK}
    front = letters(len(names) + node.a.ndim - len(axes["a"]))[len(names) :]
    of_a, of_b = (front + "".join(named[d] for d in axes[name]) for name in ("a", "b"))
    return of_a, of_b


def _inverse(x: jax.Array, axes: str, others: str, damping: Any) -> tuple[jax.Array, str]:
    """The inverse of xᵀx + δI over the rank, for all along axes that the other factor has too."""
    out = "".join(c for c in axes if c in others and c != RANK) + RANK + OTHER
    turned = axes.replace(RANK, OTHER)
    gram = einsum(axes, turned, out, x, x, precision="highest", dtype=x.dtype)
    eye = jnp.eye(gram.shape[-1], dtype=x.dtype)
    factored = cho_factor(gram + jnp.asarray(damping, x.dtype) * eye)
    return cho_solve(factored, jnp.broadcast_to(eye, gram.shape)), out


def _times(update: jax.Array, axes: str, inverse: tuple[jax.Array, str]) -> jax.Array:
    value, of_value = inverse
    turned = axes.replace(RANK, OTHER)
    found = einsum(
        axes, of_value, turned, update.astype(value.dtype), value,
        precision="highest", dtype=value.dtype,
    )  # fmt: skip
    return found.astype(update.dtype)
