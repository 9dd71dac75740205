r"""The product at the heart: what the factors of ΔW add to a contraction with W.

For $y = x W + s \, (x A) B$ the model's own product $x W$ is left as it is, so that its values are
the base model's, and `lowrank` gives the second summand and its gradients:

$$h = s\,x A,\quad y = h B;\qquad \bar B = h^T \bar y,\quad \bar h = \bar y B^T,\quad
\bar A = s\,x^T \bar h,\quad \bar x = s\,\bar h A^T.$$

W does not occur, so nothing of W's size is formed, and h is computed again in the backward pass
rather than kept.
"""

import functools
import string
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp


class Spec(NamedTuple):
    """Which axes meet: a letter for each axis of x, of the two factors p and q, and of y.

    Attributes:
        x: axes of the activation.
        p: axes of the factor that is contracted with x first.
        q: axes of the other factor.
        y: axes of the result.
        scale: s.
        dtype: dtype of the result.
        precision: as for `jax.lax.dot_general`.
    """

    x: str
    p: str
    q: str
    y: str
    scale: float
    dtype: Any
    precision: Any

    @property
    def h(self) -> str:
        """Axes of s·x·p: those of x and p that y or q still needs."""
        return "".join(c for c in dict.fromkeys(self.x + self.p) if c in self.y + self.q)


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
    y = einsum(spec.h, spec.q, spec.y, _hidden(spec, x, p), q, precision=spec.precision)
    return y.astype(spec.dtype)


def _hidden(spec: Spec, x: jax.Array, p: jax.Array) -> jax.Array:
    h = einsum(spec.x, spec.p, spec.h, x, p, precision=spec.precision)
    return (spec.scale * h).astype(x.dtype)


def _forward(spec: Spec, x: Any, p: Any, q: Any) -> tuple[jax.Array, tuple[Any, ...]]:
    return lowrank(spec, x, p, q), (x, p, q)


def _backward(spec: Spec, saved: tuple[Any, ...], g: jax.Array) -> tuple[jax.Array, ...]:
    x, p, q = saved
    product = functools.partial(einsum, precision=spec.precision)
    g = g.astype(x.dtype)
    dq = product(spec.h, spec.y, spec.q, _hidden(spec, x, p), g)
    dh = (spec.scale * product(spec.y, spec.q, spec.h, g, q)).astype(x.dtype)
    order = "".join(sorted(spec.p, key=lambda c: (c not in spec.h, spec.p.index(c))))
    dp = jax.lax.optimization_barrier(product(spec.h, spec.x, order, dh, x))
    dp = jnp.einsum(f"{order}->{spec.p}", dp)
    dx = product(spec.h, spec.p, spec.x, dh, p)
    return dx.astype(x.dtype), dp.astype(p.dtype), dq.astype(q.dtype)


lowrank.defvjp(_forward, _backward)


def einsum(
    x: str, y: str, out: str, x_value: jax.Array, y_value: jax.Array, *, precision: Any
) -> jax.Array:
    """`jnp.einsum("x,y->out")`, summed in float32 or better."""
    wide = promote(x_value.dtype, jnp.float32)
    return jnp.einsum(
        f"{x},{y}->{out}", x_value, y_value, precision=precision, preferred_element_type=wide
    )


def promote(*dtypes: Any) -> Any:
    """The dtype that holds all `dtypes`, also where the user made implicit promotion an error."""
    with jax.numpy_dtype_promotion("standard"):
        return jnp.result_type(*dtypes)


def letters(n: int) -> str:
    """The first `n` names of axes."""
    return string.ascii_letters[:n]
