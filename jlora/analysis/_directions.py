"""Where an adapter changes a weight: the singular vectors of A, of ΔW and of W."""

import jax
import jax.numpy as jnp
from jax import lax

from .._adapters import LowRank, Node, weight_shape
from .._arrays import promote, replicate
from .._linalg import norm, svd, times
from ._size import factors


@replicate
def subspace_similarity(a1: jax.Array | LowRank, a2: jax.Array | LowRank) -> jax.Array:
    r"""Measures how much the i and j leading directions of two adapters overlap, for all i and j.

    $\phi(i, j) = {\lVert U_1^{i\top} U_2^{j} \rVert}_F^2 / \min(i, j)$, where $U^i$ are the first i
    left singular vectors. φ is 1 if one space contains the other, 0 if they are orthogonal, and
    about max(i, j) / inputs for random spaces.

    Singular values of zero have no direction and overlap with nothing. (Zero means below
    max(inputs, r)·ε of the largest.) So for a matrix of rank 2 and itself, φ(3, 3) is 2/3, and for
    a matrix of zeros φ is 0.

    Args:
        a1: a matrix whose columns span the directions, shape (…, inputs, r₁): A, as in the paper,
            with its inputs on one axis, or the transpose of B. A `LowRank` node means the
            directions of its ΔW among the inputs, in the order of the singular values of ΔW.
        a2: the same for the other adapter, shape (…, inputs, r₂).

    Returns:
        φ(i, j) at [i - 1, j - 1]; shape (…, r₁, r₂), or smaller if a matrix has fewer inputs than
        columns.

    Raises:
        TypeError: if a node is not the `LowRank` of one adapter.
        ValueError: if the two differ in inputs or leading axes.

    Source: Hu et al., arXiv 2106.09685, section 7.2 (its A is the transpose of ours).

    Examples:
        >>> import jax.numpy as jnp
        >>> from jlora import analysis
        >>> a1, a2 = jnp.eye(4)[:, :2], jnp.eye(4)[:, 1:3]
        >>> float(analysis.subspace_similarity(a1, a2)[1, 1])
        0.5
    """
    x, y = _columns(a1, "a1"), _columns(a2, "a2")
    if x.ndim < 2 or x.shape[:-1] != y.shape[:-1]:
        raise ValueError(
            "`a1` and `a2` must have shapes (…, inputs, r) that differ only in r; got "
            f"{x.shape} and {y.shape}. Reshape several input axes of A to one, and transpose B."
        )
    squares = times(_directions(x).mT, _directions(y)) ** 2
    sums = squares.cumsum(-2).cumsum(-1)
    n = sums.ndim
    i, j = (1 + lax.broadcasted_iota(sums.dtype, sums.shape, d) for d in (n - 2, n - 1))
    return sums / jnp.minimum(i, j)


@replicate
def amplification(w: jax.Array, delta: jax.Array | LowRank, rank: int) -> jax.Array:
    r"""Measures how much ΔW amplifies W in the directions of ΔW.

    It is ${\lVert \Delta W \rVert}_F / {\lVert U^\top W V \rVert}_F$, where U and V are the first
    `rank` singular vectors of ΔW among inputs and outputs. The ΔW of a node is not formed.

    Args:
        w: the weight that the node adapts, or matrices (…, inputs, outputs).
        delta: a `LowRank` node, or ΔW itself as a dense array of W's shape.
        rank: the number of directions of ΔW. Singular values of zero have none, as in
            `subspace_similarity`.

    Returns:
        Shape (stack…), in float32 or better: 0 where ΔW is 0, infinite where W is 0 in all these
        directions.

    Raises:
        TypeError: if a node is not the `LowRank` of one adapter.
        ValueError: if the shapes do not fit, or `rank` is below 1 or above what A and B allow.

    Source: Hu et al., arXiv 2106.09685, section 7.3.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jlora import analysis
        >>> w, delta = jnp.diag(jnp.array([8.0, 0.5, 1.0])), jnp.diag(jnp.array([0.0, 3.0, 4.0]))
        >>> float(analysis.amplification(w, delta, rank=1))
        5.0
    """
    w = _matrices(w, delta)
    u, values, v = _svd(delta)
    _check("rank", rank, values.shape[-1], "ΔW")
    kept = _is_nonzero(values, w.shape)[..., None, :rank]
    u, v = (jnp.where(kept, x[..., :rank], 0) for x in (u, v))
    within = times(times(u.mT, w), v)
    size = norm(values, (-1,))
    return size / jnp.where(size == 0, 1, norm(within, (-2, -1)))


@replicate
def intruder_dimensions(
    w: jax.Array, delta: jax.Array | LowRank, k: int = 10, threshold: float = 0.5
) -> jax.Array:
    r"""Finds the leading directions of W + ΔW that are unlike every direction of W.

    A direction is an intruder if $\max_i |\cos(v'_j, v_i)| < \epsilon$. Here $v'_j$ are the first k
    singular vectors of W + ΔW among the outputs (the left ones of PyTorch's outputs × inputs), and
    $v_i$ all those of W. For the singular vectors among the inputs, give dense transposes.

    The function forms W + ΔW in float32 or better, and computes the SVD of W and of W + ΔW. This
    needs memory for several such matrices. Singular values of zero have no direction: they are
    neither intruders nor compared with. If singular values of W are equal, their vectors are
    arbitrary, and so is the result.

    Args:
        w: the weight that the node adapts, or matrices (…, inputs, outputs).
        delta: a `LowRank` node, or ΔW itself as a dense array of W's shape.
        k: the number of directions of W + ΔW.
        threshold: ε.

    Returns:
        Booleans, shape (stack…, k); their sum is the number of intruders.

    Raises:
        TypeError: if a node is not the `LowRank` of one adapter.
        ValueError: if the shapes do not fit, or `k` is below 1 or above min(inputs, outputs).

    Source: Shuttleworth et al., LoRA vs full fine-tuning, arXiv 2410.21228.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jlora import analysis
        >>> w = jnp.diag(jnp.array([4.0, 3.0, 2.0]))
        >>> delta = jnp.zeros((3, 3)).at[0].set(jnp.array([-4.0, 6.0, 6.0]))
        >>> analysis.intruder_dimensions(w, delta, k=2, threshold=0.9).tolist()
        [True, True]
    """
    w = _matrices(w, delta)
    change = times(*factors(delta)) if isinstance(delta, Node) else _widen(delta)
    _check("k", k, min(w.shape[-2:]), "W + ΔW")
    _, old, before = jnp.linalg.svd(w, full_matrices=False)
    _, new, after = jnp.linalg.svd(w + change, full_matrices=False)
    cosines = jnp.abs(times(after[..., :k, :], before.mT))
    cosines = jnp.where(_is_nonzero(old, w.shape)[..., None, :], cosines, 0)
    return _is_nonzero(new, w.shape)[..., :k] & (cosines.max(-1) < threshold)


def _columns(x: jax.Array | LowRank, name: str) -> jax.Array:
    """Returns a matrix whose columns span the directions of `x`, in float32 or better."""
    if not isinstance(x, Node):
        return _widen(x)
    a, b = factors(x, name)
    return times(a, jnp.linalg.qr(b.mT, mode="r").mT)


def _directions(x: jax.Array) -> jax.Array:
    """Computes left singular vectors; they are zeros if the singular value is zero."""
    u, values, _ = jnp.linalg.svd(x, full_matrices=False)
    return jnp.where(_is_nonzero(values, x.shape)[..., None, :], u, 0)


def _is_nonzero(values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Whether each singular value of matrices of `shape` is above rounding errors."""
    least = max(shape[-2:]) * jnp.finfo(values.dtype).eps * values[..., :1]
    return values > least


def _matrices(w: jax.Array, delta: jax.Array | LowRank) -> jax.Array:
    """Returns W as (stack…, inputs, outputs) in float32 or better; raises for another shape."""
    if not isinstance(delta, Node):
        if jnp.ndim(w) < 2 or jnp.shape(w) != jnp.shape(delta):
            raise ValueError(
                "`w` and `delta` must have the same shape (…, inputs, outputs); got "
                f"{jnp.shape(w)} and {jnp.shape(delta)}."
            )
        return _widen(w)
    a, b = factors(delta, "delta")
    if (expected := weight_shape(delta)) != jnp.shape(w):
        raise ValueError(
            f"`w` must be the weight that `delta` adapts, of shape {expected}; got shape "
            f"{jnp.shape(w)}. Take it from the base at the path of the node."
        )
    stack, inputs, outputs, _ = delta.layout
    w = _widen(w).transpose(*stack, *inputs, *outputs)
    return w.reshape(*a.shape[:-1], b.shape[-1])


def _svd(delta: jax.Array | LowRank) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes U, S and V of ΔW."""
    if isinstance(delta, Node):
        return svd(*factors(delta))
    u, values, vt = jnp.linalg.svd(_widen(delta), full_matrices=False)
    return u, values, vt.mT


def _widen(x: jax.Array) -> jax.Array:
    return jnp.asarray(x, promote(jnp.result_type(x), jnp.float32))


def _check(name: str, value: int, most: int, of: str) -> None:
    if value not in range(1, most + 1):
        raise ValueError(
            f"`{name}` must be from 1 to {most}, the most directions that {of} can have here; got "
            f"{value}."
        )
