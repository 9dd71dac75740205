"""The gradient of a `torch.autograd.Function`, which is the one that its class defines.

PyTorch has no hook for such a call. The frame of the call has the class and the arguments.
"""

import functools
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import torch  # pyright: ignore[reportMissingImports]
from jax.lax import stop_gradient

from ._refuse import find_place, walk
from ._tensor import Convert, Tensor, keep

APPLY = torch.autograd.Function.apply.__code__
BACKWARD = torch.autograd.function.BackwardCFunction.apply.__code__


class FunctionCall(NamedTuple):
    """A call that runs.

    Attributes:
        kind: the class.
        args: the arguments.
        place: the module that calls, and the line.
    """

    kind: Any
    args: tuple[Any, ...]
    place: str

    def give_gradient(self, x: jax.Array, env: Any) -> jax.Array:
        """Returns `x`, which the call computes, with the gradient that the class defines."""

        @jax.custom_vjp
        def result(x: jax.Array, given: list[jax.Array]) -> jax.Array:
            del given
            return x

        def backward(given: list[jax.Array], g: jax.Array) -> Any:
            return jnp.zeros_like(g), self._differentiate(given, g, env)

        result.defvjp(lambda x, given: (result(x, given), given), backward)
        given = [y._elem for y in self.args if isinstance(y, Tensor)]
        return result(stop_gradient(x), given)

    def _differentiate(self, given: list[jax.Array], g: jax.Array, env: Any) -> list[Any]:
        """Calls again, and asks PyTorch for the gradients of `given`."""
        tensors = [env.wrap(x) for x in given]
        inputs = [x.requires_grad_() for x in tensors if x.is_floating_point()]
        left = iter(tensors)
        args = [next(left) if isinstance(x, Tensor) else x for x in self.args]
        try:
            with env.running():
                out = self.kind.apply(*args)
                with torch._C.DisableTorchFunction():
                    options = {"create_graph": True, "allow_unused": True}
                    found = iter(torch.autograd.grad(out, inputs, env.wrap(g), **options))
        except Exception as e:
            raise NotImplementedError(
                f"{self.place} calls {self.kind.__name__}, an autograd.Function whose gradient JAX "
                "cannot compute: it has several results, changes its arguments, or needs PyTorch's "
                "own gradients. Write it by operators: x + (f(x) - x).detach() has the values of f "
                "and the gradient of x."
            ) from e
        each = [next(found) if x.requires_grad else None for x in tensors]
        return [y if y is None else y._elem for y in each]


def find_conversion(env: Any) -> Convert:
    """Finds what PyTorch does here with the gradients of results."""
    if torch.is_grad_enabled():
        return keep
    calls = [frame for frame in walk() if frame.f_code is APPLY]
    if not calls:
        return stop_gradient
    outer = calls[-1].f_locals
    call = FunctionCall(outer["cls"], outer["args"], find_place(calls[-1]))
    return functools.partial(call.give_gradient, env=env)


def is_saving() -> bool:
    """Whether a call saves tensors for `backward`, or that reads them; PyTorch detaches both."""
    return any(frame.f_code in (APPLY, BACKWARD) for frame in walk())
