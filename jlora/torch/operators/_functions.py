"""What PyTorch does with gradients under `no_grad` and in an autograd.Function.

PyTorch has no hook for the call of such a function. The frame of the call has its class.
"""

import functools
from collections.abc import Sequence
from typing import Any, NoReturn

import jax
import torch  # pyright: ignore[reportMissingImports]
from jax.lax import stop_gradient

from ._refuse import find_place, walk
from ._tensor import Convert, Tensor, keep

APPLY = torch.autograd.Function.apply.__code__


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def forbid_gradient(why: str, given: Sequence[jax.Array], x: jax.Array) -> jax.Array:
    """Returns `x`; raises when that or what is `given` is differentiated."""
    del why, given
    return x


@forbid_gradient.defjvp
def _raise(why: str, primals: Any, tangents: Any) -> NoReturn:
    raise NotImplementedError(why)


def find_conversion() -> Convert:
    """Finds what PyTorch does here with the gradients of results."""
    if torch.is_grad_enabled():
        return keep
    calls = [frame for frame in walk() if frame.f_code is APPLY]
    if not calls:
        return stop_gradient
    outer = calls[-1].f_locals
    why = (
        f"{find_place(calls[-1])} calls {outer['cls'].__name__}, an autograd.Function whose "
        "`backward` JAX does not know. Write it by operators: x + (f(x) - x).detach() has the "
        "values of f and the gradient of x."
    )
    given = [x._elem for x in outer["args"] if isinstance(x, Tensor)]
    return functools.partial(forbid_gradient, why, given)
