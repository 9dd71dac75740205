"""Gradients of A and B in a metric that does not depend on how ΔW is split between the two."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from ._adapters import is_node, method_of
from ._core import einsum, letters, promote
from ._linalg import inverse
from ._types import PyTree

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
    of_rank = "".join(c for c in of_a if c in of_b and c != RANK) + RANK + OTHER
    return update._replace(
        a=_times(update.a, of_a, _inverse(b, of_b, of_rank, damping), of_rank),
        b=_times(update.b, of_b, _inverse(a, of_a, of_rank, damping), of_rank),
    )


def _axes(node: Any) -> tuple[str, str]:
    """A letter for each axis of A and of B; a table's adapters are one more axis in front."""
    axes = method_of(node).axes(node.layout)
    names = dict.fromkeys((*axes["a"], *axes["b"]))
    named = dict(zip(names, letters(len(names)), strict=True)) | {"rank": RANK}
    front = letters(len(names) + node.a.ndim - len(axes["a"]))[len(names) :]
    of_a, of_b = (front + "".join(named[d] for d in axes[name]) for name in ("a", "b"))
    return of_a, of_b


def _inverse(x: jax.Array, axes: str, out: str, damping: Any) -> jax.Array:
    """The inverse of xᵀx + δI over the rank, along the other axes of `out` for each apart."""
    turned = axes.replace(RANK, OTHER)
    gram = einsum(axes, turned, out, x, x, precision="highest", dtype=x.dtype)
    eye = jnp.eye(gram.shape[-1], dtype=x.dtype)
    return inverse(gram + jnp.asarray(damping, x.dtype) * eye)


def _times(update: jax.Array, axes: str, matrix: jax.Array, of_rank: str) -> jax.Array:
    how = {"precision": "highest", "dtype": matrix.dtype}
    turned = axes.replace(RANK, OTHER)
    wide = update.astype(matrix.dtype)
    return einsum(axes, of_rank, turned, wide, matrix, **how).astype(update.dtype)
