r"""What ΔW adds to a product with W.

$$h = s\,x A,\quad y = h B;\qquad \bar B = h^T \bar y,\quad \bar h = s\,\bar y B^T,\quad
\bar A = x^T \bar h,\quad \bar x = \bar h A^T.$$

The gradient of W, $x^T \bar y$, is never formed. JAX derives all of this from the two products, so
derivatives exist to any order, in both modes.
"""

import functools
import math
import string
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding

from ._explicit import explicit, joint

MANY = 64  # tokens, inputs; of fewer XLA's CPU compiler aborts on some batches of thin gradients
KEPT = 16  # h is kept for the backward pass where it is this many times smaller than x


def gated(h: jax.Array, gate: jax.Array) -> jax.Array:
    """`h` times `gate`, of as many axes: 0 where that is 0, whatever `h` is there."""
    return jnp.where(gate == 0, jnp.zeros((), h.dtype), h * gate.astype(h.dtype))


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
        gating: what s·x·p becomes, of it and its gate.
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
    gating: Callable[[jax.Array, jax.Array], jax.Array] = gated

    @property
    def h(self) -> str:
        """Axes of s·x·p: those of x and p that y or q still needs."""
        return "".join(c for c in dict.fromkeys(self.x + self.p) if c in self.y + self.q)


# One program for all products of one form: traced once, however many layers there are.
@functools.partial(jax.jit, static_argnums=0)
def lowrank(
    specs: tuple[Spec, ...],
    x: jax.Array,
    ps: Sequence[jax.Array],
    qs: Sequence[jax.Array],
    gates: Sequence[jax.Array | None],
) -> list[jax.Array]:
    """s·(x·p)·q for each p and q, over the axes that `specs` name.

    The activation is read once for all p, which lie side by side, forward and backward, and what
    they add to its gradient is written once.

    Args:
        specs: for each product the axes, scale, dtype and precision. Where there are several, p has
            the contracted axes in the order of x, then the rank.
        x: activation, of any floating dtype; sums are in float32 or better.
        ps: factors in the dtype of `x`.
        qs: factors in the dtype of `x`.
        gates: for each product None, or what x·p is multiplied by, with the axes `spec.h`.

    Returns:
        Arrays with the axes `spec.y` and the dtype `spec.dtype`.
    """
    products = functools.partial(_products, specs)
    products = products if is_kept(specs[0], x, ps[0]) else _computed_again(products)
    return products(x, ps, qs, gates)


def _products(
    specs: tuple[Spec, ...], x: jax.Array, ps: Sequence[jax.Array], *rest: Sequence[Any]
) -> list[jax.Array]:
    # The backward pass keeps x, p, h and q, and not what becomes of them in either half.
    h = _computed_again(functools.partial(_reduced, specs))(x, ps)
    return _computed_again(functools.partial(_expanded, specs))(h, *rest)


def _computed_again(f: Callable[..., Any]) -> Callable[..., Any]:
    """`f`, of which the backward pass keeps the arguments alone."""
    return jax.checkpoint(f, prevent_cse=False)


def is_kept(spec: Spec, x: jax.Array, p: jax.Array) -> bool:
    """Whether h is so small beside x that it is kept for the backward pass."""
    sizes = dict(zip(spec.x + spec.p, x.shape + p.shape, strict=True))
    return KEPT * math.prod(sizes[c] for c in spec.h) <= x.size


def _reduced(specs: tuple[Spec, ...], x: jax.Array, ps: Sequence[jax.Array]) -> jax.Array:
    """s·x·p for all p side by side."""
    spec = specs[0]
    ps = [p * jnp.asarray(s.scale, p.dtype) for s, p in zip(specs, ps, strict=True)]
    p = jnp.concatenate(ps, spec.p.index("Z")) if len(ps) > 1 else ps[0]
    # Where a mesh leaves h in parts, XLA adds these up along with the model's own activations, in
    # one collective, if they have one dtype.
    p = _with_thin_gradient(p) if _is_thin(spec, x, p) else p
    return einsum(spec.x, spec.p, spec.h, x, p, dtype=x.dtype, precision=spec.precision)


def _expanded(
    specs: tuple[Spec, ...],
    h: jax.Array,
    qs: Sequence[jax.Array],
    gates: Sequence[jax.Array | None],
) -> list[jax.Array]:
    """For each q its part of h, times its gate and it."""
    parts = [h]
    if len(qs) > 1:
        ends = np.cumsum([q.shape[s.q.index("Z")] for s, q in zip(specs, qs, strict=True)])
        parts = jnp.split(h, ends[:-1], specs[0].h.index("Z"))
    parts = [
        part if gate is None else spec.gating(part, gate)
        for spec, part, gate in zip(specs, parts, gates, strict=True)
    ]
    return list(map(_expanded_part, specs, parts, qs))


def _expanded_part(spec: Spec, h: jax.Array, q: jax.Array) -> jax.Array:
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
    return lax.platform_dependent(h, q, cpu=flat, default=straight)


@jax.custom_jvp
def _with_thin_gradient(p: jax.Array) -> jax.Array:
    """`p`, whose gradient is computed as hᵀ·x: xᵀ·h takes a CPU ten times as long."""
    return p


@_with_thin_gradient.defjvp
def _with_thin_gradient_jvp(primals: Any, tangents: Any) -> tuple[jax.Array, jax.Array]:
    # Without the barrier XLA would transpose the product again.
    tangent = lax.optimization_barrier(jnp.moveaxis(tangents[0], -1, 0))
    return _with_thin_gradient(*primals), jnp.moveaxis(tangent, 0, -1)


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
