r"""The product at the heart: what ΔW adds to a contraction with W, in the cheaper of two orders.

Apart, for $y = x W + s \, (x A) B$, the model's own product $x W$ is left as it is and `lowrank`
gives the second summand and its gradients:

$$h = s\,x A,\quad y = h B;\qquad \bar B = h^T \bar y,\quad \bar h = \bar y B^T,\quad
\bar A = s\,x^T \bar h,\quad \bar x = s\,\bar h A^T.$$

Summed, `adapted` forms W + s·A·B and gives $y = x\,(W + s A B)$ and
$\bar x = \bar y\,(W + s A B)^T$, with $\bar A$ and $\bar B$ as above. That is cheaper where there
are many tokens: see `plan`. Neither forms $x^T \bar y$, the gradient of W.

Source: the orders are those of Cherniuk et al., arXiv 2312.03415, without the two that form
$x^T \bar y$: they cost as much as full fine-tuning unless r is near the size of W.
"""

import functools
import string
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding

from ._explicit import explicit, joint, renamed

# --------------------------------------------------------------------------------- the planner

MOVE = 32  # operations in the time in which one element is read or written
KEPT = 16  # h is kept for the backward pass where it is this many times smaller than x


def plan(tokens: int, inputs: int, outputs: int, rank: int, dtype: Any) -> str:
    """`"apart"` or `"summed"`: the order in which forward and backward are computed.

    What both orders need, the three products for the gradients of A and B, does not count. Apart,
    h·B and its twin in the backward pass are computed and added to an activation: a read, and a
    read and a write of the sum. Summed, A·B is computed twice, written, read, added to W and read
    again. In less than float32 the sum would round ΔW away, so it is never formed.

    Args:
        tokens: rows of x.
        inputs: columns of x.
        outputs: columns of y.
        rank: r.
        dtype: of x, W, A and B, in which the sum would be.

    Example:
        >>> plan(512, 512, 512, 8, jnp.float32), plan(2048, 384, 384, 8, jnp.float32)
        ('apart', 'summed')
        >>> plan(2048, 384, 384, 8, jnp.bfloat16)
        'apart'
    """
    if jnp.finfo(dtype).bits < 32:
        return "apart"
    if not all(isinstance(n, int) for n in (tokens, inputs, outputs)):
        return "apart"  # sizes of `jax.export` that are not known yet
    activation, weight = tokens * (inputs + outputs), inputs * outputs
    apart = activation * (2 * rank + 3 * MOVE)
    summed = 2 * weight * (2 * rank + 4 * MOVE)
    return "summed" if summed < apart else "apart"


# --------------------------------------------------------------------------------- the products


class Spec(NamedTuple):
    """Which axes meet: a letter for each axis of x, of W, of its two factors p and q, and of y.

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

    def transposed(self, x: jax.Array) -> "Spec":
        """The same from y to `x`."""
        return self._replace(x=self.y, p=self.q, q=self.p, y=self.x, sharding=explicit(x))


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
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
    return _forward(spec, x, p, q)[0]


def _forward(spec: Spec, x: Any, p: Any, q: Any) -> tuple[jax.Array, tuple[Any, ...]]:
    h = _hidden(spec, x, p)
    y = einsum(spec.h, spec.q, spec.y, h, q, precision=spec.precision, sharding=spec.sharding)
    y = y.astype(spec.dtype)
    return y, (x, h if KEPT * h.size <= x.size else None, p, q)


def _backward(spec: Spec, saved: tuple[Any, ...], g: jax.Array) -> tuple[jax.Array, ...]:
    x, h, p, q = saved
    g = g.astype(x.dtype)
    dh, dp, dq = _factor_gradients(spec, x, h, p, q, g)
    place = explicit(x)
    dx = einsum(spec.h, spec.p, spec.x, dh, p, precision=spec.precision, sharding=place)
    return dx.astype(x.dtype), dp, dq


lowrank.defvjp(_forward, _backward)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def adapted(
    spec: Spec, dot: Callable[..., Any], x: jax.Array, w: jax.Array, p: jax.Array, q: jax.Array
) -> jax.Array:
    """`dot(x, W + s·p·q)` for the product `dot`, linear in each argument, of the axes in `spec`.

    Under a `vmap` over several p and q with one W, the factors stay apart, or W would be copied.
    """

    def summed(x: jax.Array, w: jax.Array, p: jax.Array, q: jax.Array) -> jax.Array:
        place = explicit(w)
        delta = einsum(spec.p, spec.q, spec.w, p, q, precision=spec.precision, sharding=place)
        return dot(x, (w + spec.scale * delta).astype(w.dtype))

    def apart(x: jax.Array, w: jax.Array, p: jax.Array, q: jax.Array) -> jax.Array:
        return dot(x, w) + lowrank(spec, x, p, q)

    return _unless_batched(summed, apart, lambda maps: any(maps[2:]) and not maps[1])(x, w, p, q)


def _unless_batched(
    first: Callable[..., Any], second: Callable[..., Any], when: Callable[[list[bool]], bool]
) -> Callable[..., Any]:
    """`first`; under a `vmap`, `second` if `when` holds for which arguments it maps."""
    choice = jax.custom_batching.custom_vmap(first)

    @choice.def_vmap
    def rule(size: int, batched: list[bool], *args: jax.Array) -> tuple[jax.Array, bool]:
        def over(f: Callable[..., Any]) -> Callable[..., Any]:
            return jax.vmap(f, [0 if b else None for b in batched], axis_size=size)

        if when(batched):
            return over(second)(*args), True
        return _unless_batched(over(first), over(second), when)(*args), True

    return choice


def _adapted_forward(spec: Spec, dot: Any, *args: Any) -> tuple[jax.Array, tuple[Any, ...]]:
    return adapted(spec, dot, *args), args


def _adapted_backward(
    spec: Spec, dot: Callable[..., Any], saved: tuple[Any, ...], g: jax.Array
) -> tuple[jax.Array, ...]:
    x, w, p, q = saved
    _, dp, dq = _factor_gradients(spec, x, None, p, q, g)

    def transposed(g: jax.Array, w: jax.Array) -> jax.Array:
        [dx] = jax.linear_transpose(lambda x: dot(x, w), x)(g)
        return dx

    # Only where the user differentiates with respect to W; XLA drops it elsewhere.
    [dw] = jax.linear_transpose(lambda w: dot(x, w), w)(g)
    return adapted(spec.transposed(x), transposed, g, w, q, p), dw, dp, dq


adapted.defvjp(_adapted_forward, _adapted_backward)


def _hidden(spec: Spec, x: jax.Array, p: jax.Array) -> jax.Array:
    return spec.scale * _narrow(spec.x, spec.p, spec.h, x, p, spec.precision)


def _narrow(x: str, p: str, h: str, x_value: jax.Array, p_value: jax.Array, precision: Any) -> Any:
    """`einsum` that ends in x's dtype.

    Where a mesh leaves h in parts, XLA adds these up along with the model's own activations, in one
    collective, if they have one dtype.
    """
    return einsum(x, p, h, x_value, p_value, precision=precision, dtype=x_value.dtype)


def _factor_gradients(
    spec: Spec, x: jax.Array, h: jax.Array | None, p: jax.Array, q: jax.Array, g: jax.Array
) -> tuple[jax.Array, jax.Array, jax.Array]:
    """Gradients of h (times s), p and q; h is computed again where it was not kept."""
    h = _hidden(spec, x, p) if h is None else h
    dh = spec.scale * _narrow(spec.y, spec.q, spec.h, g, q, spec.precision)
    dp = _thin((spec.h, spec.x, spec.p), spec.precision, explicit(p), dh, x)
    dq = _thin((spec.h, spec.y, spec.q), spec.precision, explicit(q), h, g)
    return dh, dp.astype(p.dtype), dq.astype(q.dtype)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _thin(
    axes: tuple[str, str, str],
    precision: Any,
    sharding: NamedSharding | None,
    h: jax.Array,
    x: jax.Array,
) -> jax.Array:
    """`einsum` of a thin h and a wide x, computed as hᵀ·x: on CPUs xᵀ·h takes ten times as long."""
    h_axes, x_axes, out = axes
    order = "".join(sorted(out, key=lambda c: c not in h_axes))

    def straight(h: jax.Array, x: jax.Array) -> jax.Array:
        return einsum(h_axes, x_axes, out, h, x, precision=precision, sharding=sharding)

    def turned(h: jax.Array, x: jax.Array) -> jax.Array:
        place = sharding and renamed(sharding, out, order)
        value = einsum(h_axes, x_axes, order, h, x, precision=precision, sharding=place)
        # Without the barrier XLA would turn the product round again.
        return jax.lax.optimization_barrier(value).transpose([order.index(c) for c in out])

    # XLA's CPU compiler aborts on some batched products that are turned.
    if order == out or any(c in h_axes and c in x_axes for c in out):
        return straight(h, x)
    return _unless_batched(turned, straight, any)(h, x)


def _thin_forward(
    axes: Any, precision: Any, sharding: Any, h: Any, x: Any
) -> tuple[jax.Array, tuple[Any, Any]]:
    return _thin(axes, precision, sharding, h, x), (h, x)


def _thin_backward(
    axes: tuple[str, str, str], precision: Any, sharding: Any, saved: tuple[Any, Any], g: jax.Array
) -> tuple[jax.Array, jax.Array]:
    del sharding
    h, x = saved
    h_axes, x_axes, out = axes
    like_h, like_x = explicit(h), explicit(x)
    dh = einsum(out, x_axes, h_axes, g.astype(x.dtype), x, precision=precision, sharding=like_h)
    dx = einsum(out, h_axes, x_axes, g.astype(h.dtype), h, precision=precision, sharding=like_x)
    return dh.astype(h.dtype), dx.astype(x.dtype)


_thin.defvjp(_thin_forward, _thin_backward)


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
