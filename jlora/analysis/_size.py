r"""Norms, ranks and singular values of ΔW, computed from A and B without ΔW.

With $A = Q_1 R_1$ and $B^\top = Q_2 R_2$, ΔW has the singular values of the r × r matrix
$s \cdot R_1 R_2^\top$. Its singular vectors are those of this matrix, times $Q_1$ and $Q_2$.
"""

from typing import Any, TypeVar

import jax
import jax.numpy as jnp
import numpy as np

from .._adapters import LowRank, is_table, matrices, weight_shape, without_slots
from .._arrays import replicate
from .._linalg import norm as norm_of
from .._linalg import times
from .._types import short

A = TypeVar("A", jax.Array, np.ndarray)


def factors(node: object, name: str = "node") -> tuple[jax.Array, jax.Array]:
    """Returns s·A as (stack…, inputs, r) and B as (stack…, r, outputs); slots are concatenated.

    Raises `TypeError` unless the argument `name` is the `LowRank` of one adapter.
    """
    if not isinstance(node, LowRank):
        raise TypeError(
            f"`{name}` must be a jlora.types.LowRank, whose ΔW is s·A·B; got {short(node)}."
        )
    if is_table(node):
        raise TypeError(
            f"`{name}` must be of one adapter, but its arrays have a leading axis, as in a table "
            f"of jlora.many; got {node!r}. Call the function under jax.vmap."
        )
    return matrices(without_slots(node, weight_shape(node)))


def core(a: jax.Array, b: jax.Array) -> jax.Array:
    """Computes a small matrix with the singular values of A·B."""
    return times(jnp.linalg.qr(a, mode="r"), jnp.linalg.qr(b.mT, mode="r").mT)


@replicate
def delta_spectrum(node: LowRank) -> jax.Array:
    r"""Computes the singular values of each ΔW of a node, as a matrix of inputs × outputs.

    Args:
        node: a `LowRank` node of an adapter; its dropout keys are ignored.

    Returns:
        Shape (stack…, r), or (stack…, slots·r) with slots, in float32 or better. Values descend;
        those beyond min(inputs, outputs) are zero.

    Raises:
        TypeError: if `node` is not the `LowRank` of one adapter.

    Examples:
        >>> import jax.numpy as jnp, jlora
        >>> from jlora import analysis
        >>> a, b = jnp.eye(4, 2), jnp.diag(jnp.array([3.0, 1.0]))
        >>> node = jlora.types.LowRank(a, b, scale=2.0, layout=jlora.types.Layout((), (0,), (1,)))
        >>> analysis.delta_spectrum(node).tolist()
        [6.0, 2.0]
    """
    a, b = factors(node)
    values = jnp.linalg.svd(core(a, b), compute_uv=False)
    missing = a.shape[-1] - values.shape[-1]
    return jnp.pad(values, [(0, 0)] * (values.ndim - 1) + [(0, missing)])


@replicate
def norm(node: LowRank) -> jax.Array:
    r"""Computes the Frobenius norm ${\lVert \Delta W \rVert}_F$ of each ΔW of a node.

    Args:
        node: a `LowRank` node of an adapter.

    Returns:
        Shape (stack…), in float32 or better.

    Raises:
        TypeError: if `node` is not the `LowRank` of one adapter.

    Examples:
        >>> import jax.numpy as jnp, jlora
        >>> from jlora import analysis
        >>> a, b = jnp.eye(4, 2), jnp.diag(jnp.array([3.0, 4.0]))
        >>> float(analysis.norm(jlora.types.LowRank(a, b, 2.0, jlora.types.Layout((), (0,), (1,)))))
        10.0
    """
    return norm_of(core(*factors(node)), (-2, -1))


@replicate
def distance(node: LowRank, other: LowRank) -> jax.Array:
    r"""Computes ${\lVert \Delta W_1 - \Delta W_2 \rVert}_F$ of two adapters at one weight.

    The difference has low rank itself: $[s_1 A_1, -s_2 A_2] [B_1; B_2]$.

    Args:
        node: a `LowRank` node of one adapter.
        other: a node of the other adapter, for a weight with the same shape and axes. Rank, scale
            and slots may differ.

    Returns:
        Shape (stack…), in float32 or better.

    Raises:
        TypeError: if one of the two is not the `LowRank` of one adapter.
        ValueError: if the two adapt weights with different shapes or axes, or only one belongs to a
            base that an initializer changed.

    Examples:
        >>> import jax.numpy as jnp, jlora
        >>> from jlora import analysis
        >>> layout = jlora.types.Layout((), (0,), (1,))
        >>> node = jlora.types.LowRank(jnp.eye(4, 2), jnp.eye(2), 1.0, layout)
        >>> round(float(analysis.distance(node, node.replace(scale=4.0))), 4)
        4.2426
    """
    (a, b), (c, d) = factors(node), factors(other, "other")
    mine, its = ((weight_shape(x), *x.layout[:3]) for x in (node, other))
    if mine != its:
        raise ValueError(
            "`node` and `other` must adapt weights with equal (shape, stack, inputs, outputs); got "
            f"{mine} and {its}."
        )
    if node.residual != other.residual:
        raise ValueError(
            "`node` and `other` must belong to one base, but only one is `residual`: its "
            "initializer changed the base. Give its jlora.arithmetic.difference(adapter, initial), "
            "where `initial` is the adapter that init returned."
        )
    change = core(jnp.concatenate([a, -c], -1), jnp.concatenate([b, d], -2))
    return norm_of(change, (-2, -1))


def stable_rank(values: A) -> A:
    r"""Computes the stable rank $\sum_i \sigma_i^2 / \sigma_1^2$, at most the rank.

    Args:
        values: singular values, descending, shape (…, r), as from `delta_spectrum`.

    Returns:
        Shape (…), in [1, r]; 0 where all values are 0.

    Source: Rudelson and Vershynin, Journal of the ACM 54(4), 2007.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jlora import analysis
        >>> float(analysis.stable_rank(jnp.array([2.0, 2.0, 0.0])))
        2.0
    """
    return (_relative(values) ** 2).sum(-1)


def effective_rank(values: A) -> A:
    r"""Computes the effective rank $\exp(-\sum p_i \log p_i)$, $p_i = \sigma_i / \sum_j \sigma_j$.

    Args:
        values: singular values, descending, shape (…, r), as from `delta_spectrum`.

    Returns:
        Shape (…), in [1, r]; 0 where all values are 0.

    Source: Roy and Vetterli, The effective rank, EUSIPCO 2007.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jlora import analysis
        >>> round(float(analysis.effective_rank(jnp.array([3.0, 3.0, 3.0]))), 5)
        3.0
    """
    xp = _namespace(values)
    relative = _relative(values)
    total = relative.sum(-1)
    shares = relative / xp.where(total == 0, 1, total)[..., None]
    logs = xp.log(xp.where(shares == 0, 1, shares))
    return xp.where(total == 0, 0, xp.exp(-(shares * logs).sum(-1)))


def _relative(values: A) -> A:
    """Divides singular values by the largest; zeros stay zeros."""
    largest = values[..., :1]
    return values / _namespace(values).where(largest == 0, 1, largest)


def _namespace(values: jax.Array | np.ndarray) -> Any:
    """Returns the module whose functions are those of the array: NumPy's compile nothing."""
    return np if isinstance(values, np.ndarray) else jnp
