r"""What ΔW adds to a product with W.

$$h = s\,x A,\quad y = h B;\qquad \bar B = h^T \bar y,\quad \bar h = s\,\bar y B^T,\quad
\bar A = x^T \bar h,\quad \bar x = \bar h A^T.$$

The gradient of W, $x^T \bar y$, is never formed. JAX derives this from the two products: no rule of
differentiation is needed, and forward mode works.
"""

import functools
import math
import string
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding

from ._cpu import turned
from ._explicit import explicit, joint

MANY = 64  # tokens, inputs; of fewer XLA's CPU compiler aborts on some batches that are turned
KEPT = 16  # h is kept for the backward pass where it is this many times smaller than x


class Spec(NamedTuple):
    """Which axes meet: a letter for each axis of x, of W, of its two factors p and q, and of y.

    Example: x (b, t, i) · w (i, o) is x = "abc", w = "cd", p = "cZ", q = "Zd", y = "abd".

    Attributes:
        x: axes of the activation.
        w: axes of W.
        p: axes of the factor that is contracted with x first.
        q: axes of the other factor.
        y: axes of the result.
        scale: s.
        dtype: dtype of the result.
        precision: as for `jax.lax.dot_general`.
        sharding: of the result along explicit mesh axes, if there are any.
    """

    x: str
    w: str
    p: str
    q: str
    y: str
    scale: float
    dtype: Any
    precision: Any
    sharding: NamedSharding | None = None

    @property
    def h(self) -> str:
        """Axes of s·x·p: those of x and p that y or q still needs."""
        return "".join(c for c in dict.fromkeys(self.x + self.p) if c in self.y + self.q)


# One program for all products of one form: traced once, however many layers there are.
@functools.partial(jax.jit, static_argnums=0)
def lowrank(spec: Spec, x: jax.Array, p: jax.Array, q: jax.Array) -> jax.Array:
    """s·(x·p)·q over the axes that `spec` names.

    Args:
        spec: the axes, scale, dtype and precision.
        x: activation, of any floating dtype; sums are in float32 or better.
        p: factor in the dtype of `x`.
        q: factor in the dtype of `x`.

    Returns:
        An array with the axes `spec.y` and the dtype `spec.dtype`.
    """
    if is_kept(spec, x, p):
        return _product(spec, x, p, q)
    return jax.checkpoint(_product, static_argnums=0, prevent_cse=False)(spec, x, p, q)


def is_kept(spec: Spec, x: jax.Array, p: jax.Array) -> bool:
    """Whether h is so small beside x that it is kept for the backward pass."""
    sizes = dict(zip(spec.x + spec.p, x.shape + p.shape, strict=True))
    return KEPT * math.prod(sizes[c] for c in spec.h) <= x.size


def _product(spec: Spec, x: jax.Array, p: jax.Array, q: jax.Array) -> jax.Array:
    h = _reduced(spec, x, p)
    return _expanded(spec, h * jnp.asarray(spec.scale, h.dtype), q)


def _reduced(spec: Spec, x: jax.Array, p: jax.Array) -> jax.Array:
    """x·p."""
    # Where a mesh leaves h in parts, XLA adds these up along with the model's own activations, in
    # one collective, if they have one dtype.
    p = turned(p) if _is_thin(spec, x, p) else p
    return einsum(spec.x, spec.p, spec.h, x, p, dtype=x.dtype, precision=spec.precision)


def _expanded(spec: Spec, h: jax.Array, q: jax.Array) -> jax.Array:
    """h·q; on a CPU as a product of two matrices, whose hᵀ·ȳ alone is fast there."""
    how = {"precision": spec.precision, "dtype": spec.dtype}

    def straight(h: jax.Array, q: jax.Array) -> jax.Array:
        return einsum(spec.h, spec.q, spec.y, h, q, sharding=spec.sharding, **how)

    def flat(h: jax.Array, q: jax.Array) -> jax.Array:
        tokens, outputs = h.shape[:-1], q.shape[1:]
        h, q = h.reshape(math.prod(tokens), len(q)), q.reshape(len(q), math.prod(outputs))
        return einsum("ab", "bc", "ac", h, q, **how).reshape(*tokens, *outputs)

    tokens, outputs = spec.h[:-1], spec.q[1:]
    in_order = spec.h == tokens + spec.q[0] and spec.y == tokens + outputs
    if not in_order or len(spec.y) == 2 or spec.sharding is not None:
        return straight(h, q)

    def either(h: jax.Array, q: jax.Array) -> jax.Array:
        return lax.platform_dependent(h, q, cpu=flat, default=straight)

    # What the backward pass needs is h and q, not what each platform would make of them.
    return jax.checkpoint(either, prevent_cse=False)(h, q)


# The two halves on their own, for products whose first factors lie side by side.
reduced = jax.jit(_reduced, static_argnums=0)
expanded = jax.jit(_expanded, static_argnums=0)


def _is_thin(spec: Spec, x: jax.Array, p: jax.Array) -> bool:
    """Whether the gradient of p is one product of many tokens, rather than a batch of them."""
    batch = set(spec.x) & set(spec.p) & set(spec.h)
    contracted = math.prod(n for c, n in zip(spec.x, x.shape, strict=True) if c in spec.p)
    return not batch and contracted >= MANY and x.size >= MANY * contracted


def einsum(
    x: str,
    y: str,
    out: str,
    x_value: jax.Array,
    y_value: jax.Array,
    *,
    precision: Any,
    dtype: Any = None,
    sharding: NamedSharding | None = None,
) -> jax.Array:
    """`jnp.einsum("x,y->out")` in `dtype`; without, in float32 or better.

    Along explicit mesh axes the result has `sharding`; without it, each of its axes lies as in x,
    or else as in y, and what is contracted is summed over the mesh.
    """
    return jnp.einsum(
        f"{x},{y}->{out}",
        x_value,
        y_value,
        precision=precision,
        preferred_element_type=dtype or promote(x_value.dtype, jnp.float32),
        out_sharding=sharding or joint(x, y, out, explicit(x_value), explicit(y_value)),
    )


def promote(*dtypes: Any) -> Any:
    """The dtype that holds all `dtypes`, also where the user made implicit promotion an error."""
    # Nothing is promoted to or from float8, which JAX leaves to the user.
    wide = [jnp.bfloat16 if _is_float8(dtype) else dtype for dtype in dtypes]
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*wide)


def _is_float8(dtype: Any) -> bool:
    return jnp.issubdtype(dtype, jnp.floating) and jnp.finfo(dtype).bits < 16


def letters(n: int) -> str:
    """The first `n` names of axes."""
    return string.ascii_letters[:n]
