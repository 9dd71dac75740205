"""Operators that torchax lacks, or that it computes otherwise than PyTorch."""

import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import torch  # pyright: ignore[reportMissingImports]
from jax import lax
from jax.scipy.linalg import cho_solve
from jax.typing import ArrayLike

from ..._compat import is_concrete
from .._private import find_jax_dtype
from ._attention import attend
from ._refuse import refuse

aten = torch.ops.aten


def look_up(
    weight: jax.Array,
    ids: jax.Array,
    padding_idx: int = -1,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> jax.Array:
    """Looks up rows of an embedding; that of torchax is a `custom_jvp`, without sites."""
    del sparse
    found = jnp.take(weight, ids, axis=0)
    if scale_grad_by_freq:
        part = found / jnp.bincount(ids.ravel(), length=len(weight))[ids][..., None]
        found = lax.stop_gradient(found) + part - lax.stop_gradient(part)
    if padding_idx < 0:
        return found
    return jnp.where((ids == padding_idx)[..., None], lax.stop_gradient(found), found)


def sum_bags(
    weight: jax.Array,
    ids: jax.Array,
    offsets: jax.Array,
    scale_grad_by_freq: bool = False,
    mode: int = 0,
    sparse: bool = False,
    per_sample_weights: jax.Array | None = None,
    include_last_offset: bool = False,
    padding_idx: int = -1,
) -> tuple[jax.Array, ...]:
    """Looks up rows; returns the sum, mean or maximum of each bag, and what PyTorch keeps."""
    del sparse
    if scale_grad_by_freq:
        refuse("calls embedding_bag with scale_grad_by_freq", "Leave it out.")
    n = len(offsets) - include_last_offset
    rows = look_up(weight, ids, padding_idx)
    if per_sample_weights is not None:
        rows = rows * per_sample_weights[:, None]
    bag = jnp.searchsorted(offsets[:n], jnp.arange(len(ids)), side="right") - 1
    bag = jnp.where(ids == padding_idx, n, bag)  # which is no bag
    sizes = jnp.bincount(bag, length=n)
    found = (jax.ops.segment_max if mode == 2 else jax.ops.segment_sum)(rows, bag, n)
    if mode == 1:
        found = found / jnp.maximum(sizes, 1)[:, None]
    return jnp.where(sizes[:, None] > 0, found, 0), bag, sizes, sizes


def linear(input: jax.Array, weight: jax.Array, bias: jax.Array | None = None) -> jax.Array:
    """Multiplies; PyTorch would merge the axes of a batch, which a mesh may shard."""
    found = jnp.einsum("...i,oi->...o", input, weight)
    return found if bias is None else found + bias


def matmul(input: jax.Array, other: jax.Array) -> jax.Array:
    """Multiplies, as `linear` does."""
    return jnp.matmul(input, other)


def multiply_groups(x: jax.Array, weights: jax.Array, offs: jax.Array, *options: Any) -> jax.Array:
    """Multiplies rows that are sorted by their experts, each with the matrix of its expert."""
    del options
    return lax.ragged_dot(x, weights, jnp.diff(offs, prepend=jnp.zeros(1, offs.dtype)))


def check(holds: jax.Array) -> torch.Tensor:
    """Whether a check of the model holds; of traced values nobody knows, so it does."""
    return torch.tensor(not is_concrete(holds) or bool(holds.all()))


def make(data: Any, dtype: torch.dtype | None = None, **_: Any) -> jax.Array:
    """Makes a tensor of numbers and of tensors, without gradients."""
    return lax.stop_gradient(jnp.asarray(data, dtype and find_jax_dtype(dtype)))


def make_like(x: jax.Array, data: Any, dtype: torch.dtype | None = None, **_: Any) -> jax.Array:
    """Makes a tensor of the dtype of another one."""
    return make(data).astype(_find_dtype(dtype, x))


def convert(x: jax.Array, *options: Any, dtype: torch.dtype | None = None, **_: Any) -> jax.Array:
    """Converts to a dtype; JAX decides where arrays are, so that a device changes nothing."""
    dtype = next((y for y in options if isinstance(y, torch.dtype)), dtype)
    return x.astype(_find_dtype(dtype, x))


def mean(x: jax.Array, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> jax.Array:
    """Computes the mean, in another dtype if asked for."""
    return jnp.mean(x.astype(_find_dtype(dtype, x)), _find_axes(x, dim), keepdims=keepdim)


def add(x: jax.Array, dim: Any = None, keepdim: bool = False, *, dtype: Any = None) -> jax.Array:
    """Computes the sum, in another dtype if asked for."""
    return jnp.sum(x.astype(_find_dtype(dtype, x)), _find_axes(x, dim), keepdims=keepdim)


def take_along(input: jax.Array, indices: jax.Array, dim: int | None = None) -> jax.Array:
    """Takes entries along an axis; PyTorch itself takes no indices of 32 bits."""
    return jnp.take_along_axis(input, indices, dim)


def power(x: jax.Array, y: jax.Array) -> jax.Array:
    """Has no NaN in the gradient of 0 to the power of 0."""
    return jnp.where((x == 0) & (y == 0), 1, x) ** y


def solve(A: jax.Array, B: jax.Array) -> jax.Array:  # noqa: N803
    """Solves linear equations; torchax takes a square `B` for a batch of vectors."""
    is_vector = B.ndim == 1 or B.shape == A.shape[:-1]
    found = jnp.linalg.solve(A, B[..., None] if is_vector else B)
    return found[..., 0] if is_vector else found


def _find_dtype(dtype: torch.dtype | None, x: jax.Array) -> Any:
    return x.dtype if dtype is None else find_jax_dtype(dtype)


def _find_axes(x: jax.Array, dim: Sequence[int] | int | None) -> Any:
    axes = tuple(dim) or None if isinstance(dim, Sequence) else dim
    return axes if x.ndim else None


# The others have PyTorch's gradients at kinks and at zero. JAX's are others, or NaN.


def absolute(x: jax.Array) -> jax.Array:
    """Has the gradient 0 at 0."""
    is_real = jnp.issubdtype(x.dtype, jnp.floating)
    return x * lax.stop_gradient(jnp.sign(x)) if is_real else jnp.abs(x)


def clamp(x: jax.Array, min: ArrayLike | None = None, max: ArrayLike | None = None) -> jax.Array:
    """Has the gradient 1 at the bounds."""
    x = x if min is None else jnp.where(x < min, min, x)
    return x if max is None else jnp.where(x > max, max, x)


def hardtanh(x: jax.Array, low: float = -1.0, high: float = 1.0) -> jax.Array:
    """Has the gradient 0 at the bounds."""
    return jnp.where(x <= low, low, jnp.where(x >= high, high, x)).astype(x.dtype)


def hardswish(x: jax.Array) -> jax.Array:
    """Has the gradients 0 and 1 at -3 and 3."""
    return jnp.where(x <= -3, 0, jnp.where(x < 3, x * (x + 3) / 6, x)).astype(x.dtype)


def extreme(x: jax.Array, dim: Any = None, keepdim: bool = False, f: Any = jnp.max) -> jax.Array:
    """Each of equal entries gets a part of the gradient.

    JAX finds them by comparison, which gives NaN if XLA computes `x` again and rounds otherwise.
    """
    return f(lax.optimization_barrier(x), axis=_find_axes(x, dim), keepdims=keepdim)


def maximum(x: jax.Array, dim: int | None = None, keepdim: bool = False, sign: int = 1) -> Any:
    """Along an axis, the first of equal entries gets the gradient; of all entries, each a part."""
    if dim is None or x.ndim == 0:
        found = extreme(x, f=jnp.max if sign > 0 else jnp.min)
        return found if dim is None else (found, jnp.zeros((), int))
    at = (jnp.argmax if sign > 0 else jnp.argmin)(x, axis=dim, keepdims=True)
    pair = (jnp.take_along_axis(x, at, dim), at)
    return pair if keepdim else tuple(y.squeeze(dim) for y in pair)


def minimum(x: jax.Array, dim: int | None = None, keepdim: bool = False) -> Any:
    """Has the gradients of `maximum`."""
    return maximum(x, dim, keepdim, -1)


def accumulate(x: jax.Array, dim: int, f: Any) -> tuple[jax.Array, jax.Array]:
    """The largest or smallest entries so far; the last of equal ones gets the gradient."""
    axis = dim % max(x.ndim, 1)
    found = f(x, axis)
    at = lax.cummax(jnp.where(x == found, lax.broadcasted_iota(int, x.shape, axis), 0), axis)
    return jnp.take_along_axis(x, at, axis), at


def median(x: jax.Array) -> jax.Array:
    """The lower of two; each entry equal to it gets a part of the gradient."""
    old = lax.stop_gradient(x)
    found = jnp.sort(old, axis=None)[(x.size - 1) // 2]
    return found + jnp.mean(x - old, where=old == found)


def pdist(x: jax.Array, p: float = 2.0) -> jax.Array:
    """The norms of the differences of pairs of rows; has the gradient 0 at 0."""
    i, j = jnp.triu_indices(len(x), 1)
    return norm(x[i] - x[j], p, -1)


def arctan2(y: jax.Array, x: jax.Array) -> jax.Array:
    """Has the gradient 0 where both are 0."""
    is_zero = (x == 0) & (y == 0)
    angle = jnp.arctan2(y, jnp.where(is_zero, 1, x))
    return jnp.where(is_zero, lax.stop_gradient(jnp.arctan2(y, x)), angle)


def root(x: jax.Array, n: float = 2) -> jax.Array:
    """The n-th root; has the gradient 0 at 0."""
    positive = jnp.where(x > 0, x, 1)
    return jnp.where(x > 0, jnp.sqrt(positive) if n == 2 else positive ** (1 / n), 0)


def std(x: jax.Array, dim: Any = None, correction: float = 1, keepdim: bool = False) -> jax.Array:
    """Has the gradient 0 at 0."""
    return root(jnp.var(x, _find_axes(x, dim), ddof=correction, keepdims=keepdim))


def norm(
    x: jax.Array, p: float = 2, dim: Any = None, keepdim: bool = False, dtype: Any = None
) -> jax.Array:
    """Has the gradient 0 at 0, also in each entry."""
    size = absolute(x.astype(_find_dtype(dtype, x)))
    where = {"axis": _find_axes(x, dim), "keepdims": keepdim}
    if p == 0:
        return jnp.sum((size != 0).astype(size.dtype), **where)
    if math.isinf(p):
        return extreme(size, dim, keepdim, jnp.max if p > 0 else jnp.min)
    total = jnp.sum(size if p == 1 else size * size if p == 2 else root(size, 1 / p), **where)
    return total if p == 1 else root(total, p)


def cdist(x1: jax.Array, x2: jax.Array, p: float = 2.0, compute_mode: Any = None) -> jax.Array:
    """The norms of the differences of all pairs of rows; many are computed by a product."""
    is_large = max(x1.shape[-2], x2.shape[-2]) > 25 and "donot" not in str(compute_mode)
    if p != 2 or not (is_large or compute_mode == "use_mm_for_euclid_dist"):
        return norm(x1[..., :, None, :] - x2[..., None, :, :], p, -1)
    squares = (x1 * x1).sum(-1)[..., :, None] + (x2 * x2).sum(-1)[..., None, :]
    return root(squares - 2 * x1 @ jnp.swapaxes(x2, -1, -2))


# torchax or PyTorch's decomposition computes these otherwise than PyTorch's operators do.
UNUSED = {
    aten.multilabel_margin_loss_forward.default,
    torch.full,
    torch.tensor_split,
}
OPERATORS = {
    torch.nn.functional.linear: linear,
    aten.linear: linear,
    aten.matmul: matmul,
    aten.scaled_dot_product_attention: attend,
    aten.to.device: convert,
    aten.to.dtype: convert,
    aten.to.dtype_layout: convert,
    aten._to_copy: convert,
    torch.tensor: make,
    torch.Tensor.new_tensor: make_like,
    torch.linalg.solve: solve,
    torch.cdist: cdist,
    aten.take_along_dim: take_along,
    aten.embedding: look_up,
    aten._embedding_bag: sum_bags,
    aten._embedding_bag_forward_only: sum_bags,
    aten.cholesky_inverse: lambda x, upper=False: cho_solve((x, not upper), jnp.eye(len(x))),
    aten._is_all_true: check,
    aten._grouped_mm: multiply_groups,
    aten.mean: mean,
    aten.sum: add,
    aten.contiguous: lambda x, **_: x,
    aten.abs: absolute,
    aten.clamp.default: clamp,
    aten.clamp.Tensor: clamp,
    aten.clamp_min: clamp,
    aten.clamp_max: lambda x, max: clamp(x, max=max),
    aten.hardtanh: hardtanh,
    aten.hardsigmoid: lambda x: hardtanh(x / 6 + 0.5, 0.0, 1.0),
    aten.hardswish: hardswish,
    aten.leaky_relu: lambda x, slope=0.01: jnp.where(x > 0, x, x * slope),
    aten.amax: extreme,
    aten.amin: lambda x, dim=None, keepdim=False: extreme(x, dim, keepdim, jnp.min),
    aten.max.default: maximum,
    aten.max.dim: maximum,
    aten.min.default: minimum,
    aten.min.dim: minimum,
    aten.sinc: jnp.sinc,
    aten.atan2: arctan2,
    aten.pow.Tensor_Tensor: power,
    aten.pow.Tensor_Scalar: lambda x, y: x**y if y else jnp.ones_like(x + y),
    aten.fmax: lambda x, y: jnp.where((x >= y) | jnp.isnan(y), x, y),
    aten.fmin: lambda x, y: jnp.where((x <= y) | jnp.isnan(y), x, y),
    aten.cummax: lambda x, dim: accumulate(x, dim, lax.cummax),
    aten.cummin: lambda x, dim: accumulate(x, dim, lax.cummin),
    aten.logcumsumexp: lambda x, dim: lax.cumlogsumexp(x, dim % x.ndim),
    aten.median.default: median,
    aten._pdist_forward: pdist,
    aten.std.correction: std,
    aten.linalg_vector_norm: norm,
    aten.dist: lambda x, y, p=2: norm(x - y, p),
}
