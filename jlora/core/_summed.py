r"""The other order of a product: $y = x\,(W + s A B)$, in which W + ΔW is formed for a while."""

import functools
from collections.abc import Callable
from typing import Any

import jax
from jax import lax

from ._explicit import explicit
from ._product import Spec, einsum, lowrank

NAME = "jlora_summed"  # of the program, by which an adapted function that is adapted again tells it


def summed(spec: Spec, x: jax.Array, w: jax.Array, p: jax.Array, q: jax.Array) -> jax.Array:
    r"""x·(W + s·p·q) over the axes that `spec` names: on a CPU as it is written, else apart.

    Backward $\bar x = \bar y\,(W + s A B)^T$, with the gradients of A and B as they are apart. It
    has no derivative in forward mode, as $\bar x$ would keep W + s·A·B between the passes. Under a
    `vmap` over several p and q with one W, the factors stay apart, or W would be copied.
    """
    try:
        return _named(spec, x, w, p, q)
    except TypeError as e:
        if "forward-mode" not in str(e):
            raise
    raise TypeError(
        "forward-mode derivatives (jvp, linearize, jacfwd, hessian) do not reach through a float32 "
        "product of an adapted weight with many tokens. Use reverse mode (grad, vjp, jacrev; "
        "jacrev of jacrev for a Hessian), or fewer tokens at a time."
    )


@functools.partial(jax.custom_vjp, nondiff_argnums=(0,))
def _summed(spec: Spec, x: jax.Array, w: jax.Array, p: jax.Array, q: jax.Array) -> jax.Array:
    def materialized(x: jax.Array, w: jax.Array, p: jax.Array, q: jax.Array) -> jax.Array:
        how = {"precision": spec.precision}
        delta = einsum(spec.p, spec.q, spec.w, p, q, sharding=explicit(w), **how)
        w = (w + spec.scale * delta).astype(w.dtype)
        return _base(spec, x, w)

    def apart(x: jax.Array, w: jax.Array, p: jax.Array, q: jax.Array) -> jax.Array:
        return _base(spec, x, w) + lowrank((spec,), x, (p,), (q,), (None,))[0]

    on_cpu = _unless_batched(materialized, apart, lambda maps: any(maps[2:]) and not maps[1])
    return lax.platform_dependent(x, w, p, q, cpu=on_cpu, default=apart)


def _base(spec: Spec, x: jax.Array, w: jax.Array) -> jax.Array:
    how = {"precision": spec.precision, "dtype": spec.dtype, "sharding": spec.sharding}
    return einsum(spec.x, spec.w, spec.y, x, w, **how)


def _forward(spec: Spec, *args: jax.Array) -> tuple[jax.Array, tuple[jax.Array, ...]]:
    return _summed(spec, *args), args


def _backward(spec: Spec, args: tuple[jax.Array, ...], g: jax.Array) -> tuple[jax.Array, ...]:
    x, w, p, q = args
    back = spec._replace(x=spec.y, p=spec.q, q=spec.p, y=spec.x, sharding=explicit(x))
    dx = _summed(back, g, w, q, p)
    # Only where the user differentiates with respect to W; XLA drops it elsewhere.
    [dw] = jax.vjp(lambda w: _base(spec, x, w), w)[1](g)
    (dp,), (dq,) = jax.vjp(lambda p, q: lowrank((spec,), x, p, q, (None,)), (p,), (q,))[1]([g])
    return dx, dw, dp, dq


_summed.defvjp(_forward, _backward)


def _program(spec: Spec, *args: jax.Array) -> jax.Array:
    return _summed(spec, *args)


_program.__name__ = NAME
_named = jax.jit(_program, static_argnums=0)


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
