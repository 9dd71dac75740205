"""Where an adapter changes a weight: the singular vectors of A, of ΔW and of W."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from .._adapters import LowRank, weight_shape
from .._linalg import norm, svd, times
from ._size import factors


def subspace_similarity(a1: jax.Array | LowRank, a2: jax.Array | LowRank) -> jax.Array:
    r"""Measures how much the leading directions of two adapters overlap, for all numbers of them.

    $\phi(i, j) = {\lVert U_1^{i\top} U_2^{j} \rVert}_F^2 / \min(i, j)$, with $U^i$ the first i left
    singular vectors: 1 where one space holds the other, 0 where they are orthogonal, and about
    max(i, j) / inputs for random ones.

    A singular value of zero (to rounding: below max(inputs, r)·ε of the largest) has no direction,
    which overlaps with none: of a rank-2 matrix with itself, φ(3, 3) is 2/3, and with zeros all
    of φ is 0.

    Args:
        a1: directions as the columns of a matrix, shape (…, inputs, r₁): A, as the paper has it,
            with its inputs on one axis, or the transpose of B. A `LowRank` node stands for its ΔW:
            the directions among the inputs, in the order of the singular values of ΔW.
        a2: directions of the other adapter, shape (…, inputs, r₂).

    Returns:
        The grid, shape (…, r₁, r₂), or fewer where a matrix has fewer directions than r by its
        shape; φ(i, j) is at [i - 1, j - 1].

    Raises:
        ValueError: if the two have other inputs or other leading axes.

    Source: Hu et al., arXiv 2106.09685, section 7.2 (its A is the transpose of ours).

    Examples:
        >>> import jax.numpy as jnp
        >>> from jlora import analysis
        >>> a1, a2 = jnp.eye(4)[:, :2], jnp.eye(4)[:, 1:3]
        >>> float(analysis.subspace_similarity(a1, a2)[1, 1])
        0.5
    """
    x, y = _columns(a1), _columns(a2)
    if x.ndim < 2 or x.shape[:-1] != y.shape[:-1]:
        raise ValueError(
            "`a1` and `a2` must have shapes (…, inputs, r) that differ in r alone; got "
            f"{x.shape} and {y.shape}. Put several input axes of A on one, and transpose B."
        )
    squares = times(_directions(x).mT, _directions(y)) ** 2
    sums = squares.cumsum(-2).cumsum(-1)
    n = sums.ndim
    i, j = (1 + lax.broadcasted_iota(sums.dtype, sums.shape, d) for d in (n - 2, n - 1))
    return sums / jnp.minimum(i, j)


def amplification(w: jax.Array, delta: jax.Array | LowRank, rank: int) -> jax.Array:
    r"""Measures how much ΔW amplifies W in the directions of ΔW.

    ${\lVert \Delta W \rVert}_F / {\lVert U^\top W V \rVert}_F$, with U and V the first `rank`
    singular vectors of ΔW among inputs and outputs. From a node, no ΔW is formed.

    Args:
        w: the weight, of the shape that the node adapts, or (…, inputs, outputs).
        delta: a `LowRank` node, or ΔW itself as a dense array of W's shape.
        rank: the number of directions of ΔW; those that ΔW lacks (see `subspace_similarity`) add
            nothing.

    Returns:
        Shape (stack…); 0 where ΔW is 0, infinite where W is 0 in all these directions.

    Raises:
        ValueError: if the shapes do not fit, or `rank` is below 1 or above what A and B allow.

    Source: Hu et al., arXiv 2106.09685, section 7.3.

    Examples:
        >>> import jax.numpy as jnp
        >>> from jlora import analysis
        >>> w, delta = jnp.diag(jnp.array([8.0, 0.5, 1.0])), jnp.diag(jnp.array([0.0, 3.0, 4.0]))
        >>> float(analysis.amplification(w, delta, rank=1))
        5.0
    """
    w, (u, values, v) = _matrices(w, delta), _svd(delta)
    _check("rank", rank, values.shape[-1], "ΔW")
    kept = _is_nonzero(values, w.shape)[..., None, :rank]
    u, v = (jnp.where(kept, x[..., :rank], 0) for x in (u, v))
    within = times(times(u.mT, w), v)
    size = norm(values, (-1,))
    return size / jnp.where(size == 0, 1, norm(within, (-2, -1)))


def intruder_dimensions(
    w: jax.Array, delta: jax.Array | LowRank, k: int = 10, threshold: float = 0.5
) -> jax.Array:
    r"""Finds the leading directions of W + ΔW that are unlike every direction of W.

    $\max_i |\cos(v'_j, v_i)| < \epsilon$ for the first k singular vectors $v'_j$ of W + ΔW among
    the outputs (left ones of PyTorch's outputs × inputs) and all min(inputs, outputs) of W. For
    those among the inputs, give dense transposes.

    W + ΔW is formed, in float32 at least, and decomposed, as W is: this needs memory for several
    such matrices, and the time of two dense decompositions. A singular value of zero has no
    direction: one of W + ΔW is no intruder, and one of W is not compared with. Where singular
    values of W are equal, its vectors are arbitrary, and so is the answer.

    Args:
        w: the weight, of the shape that the node adapts, or (…, inputs, outputs).
        delta: a `LowRank` node, or ΔW itself as a dense array of W's shape.
        k: the number of directions of W + ΔW to look at.
        threshold: ε.

    Returns:
        Booleans, shape (stack…, k); their sum is the number of intruders.

    Raises:
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
    change = times(*factors(delta)) if isinstance(delta, LowRank) else _widen(delta)
    _check("k", k, min(w.shape[-2:]), "W + ΔW")
    _, old, before = jnp.linalg.svd(w, full_matrices=False)
    _, new, after = jnp.linalg.svd(w + change, full_matrices=False)
    cosines = jnp.abs(times(after[..., :k, :], before.mT))
    cosines = jnp.where(_is_nonzero(old, w.shape)[..., None, :], cosines, 0)
    return _is_nonzero(new, w.shape)[..., :k] & (cosines.max(-1) < threshold)


def _columns(x: jax.Array | LowRank) -> jax.Array:
    """Returns a matrix with the directions of `x`, in float32 or better."""
    if not isinstance(x, LowRank):
        return _widen(x)
    a, b = factors(x)
    return times(a, jnp.linalg.qr(b.mT, mode="r").mT)


def _directions(x: jax.Array) -> jax.Array:
    """Computes left singular vectors; zeros where the singular value is zero."""
    u, values, _ = jnp.linalg.svd(x, full_matrices=False)
    return jnp.where(_is_nonzero(values, x.shape)[..., None, :], u, 0)


def _is_nonzero(values: jax.Array, shape: tuple[int, ...]) -> jax.Array:
    """Whether each singular value of matrices of `shape` is not zero, to rounding."""
    least = max(shape[-2:]) * jnp.finfo(values.dtype).eps * values[..., :1]
    return values > least


def _matrices(w: jax.Array, delta: jax.Array | LowRank) -> jax.Array:
    """Returns W as (stack…, inputs, outputs), at least in float32; raises for another shape."""
    if not isinstance(delta, LowRank):
        if jnp.ndim(w) < 2 or jnp.shape(w) != jnp.shape(delta):
            raise ValueError(
                "`w` and `delta` must have the same shape (…, inputs, outputs); got "
                f"{jnp.shape(w)} and {jnp.shape(delta)}."
            )
        return _widen(w)
    if (expected := weight_shape(delta)) != jnp.shape(w):
        raise ValueError(
            f"`w` must be the weight that `delta` adapts, of shape {expected}; got shape "
            f"{jnp.shape(w)}. Take it from the base at the path of the node."
        )
    stack, inputs, outputs, _ = delta.layout
    w = _widen(w).transpose(*stack, *inputs, *outputs)
    n, m = len(stack), len(stack) + len(inputs)
    return w.reshape(*w.shape[:n], math.prod(w.shape[n:m]), math.prod(w.shape[m:]))


def _svd(delta: jax.Array | LowRank) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Computes U, S and V of ΔW."""
    if isinstance(delta, LowRank):
        return svd(*factors(delta))
    u, values, vt = jnp.linalg.svd(_widen(delta), full_matrices=False)
    return u, values, vt.mT


def _widen(x: jax.Array) -> jax.Array:
    return jnp.asarray(x, jnp.promote_types(jnp.result_type(x), jnp.float32))


def _check(name: str, value: int, most: int, of: str) -> None:
    if value not in range(1, most + 1):
        raise ValueError(
            f"`{name}` must be from 1 to {most}, the most directions that {of} can have here; got "
            f"{value}."
        )
