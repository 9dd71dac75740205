"""Calls of autograd.Function: their `backward` is the rule of a `jax.custom_vjp`.

PyTorch has no hook for such a call. Its frame has the arguments, and PyTorch notes the outputs.
"""

import types
from collections.abc import Callable
from contextlib import AbstractContextManager
from typing import Any

import jax
import torch.utils.checkpoint  # pyright: ignore[reportMissingImports]

from .. import _private
from ._refuse import find_place, walk
from ._state import PLAIN
from ._tensor import Memory, Tensor, to_array, to_tensor

Running = Callable[[], AbstractContextManager[None]]
STATIC = PLAIN | torch.dtype | torch.device | torch.Size


class FunctionCalls(dict[types.FrameType, "Function"]):
    """The calls that run, the outermost of each by its frame."""

    def __init__(self, running: Running) -> None:
        """Takes what runs `backward`."""
        super().__init__()
        self._running = running

    def find(self) -> "Function | None":
        """Finds the call in which an operator is called; PyTorch computes no gradients there."""
        if torch.is_grad_enabled():
            return None
        frames = [x for x in walk() if x.f_code is _private.APPLY]
        for over in self.keys() - set(frames):
            del self[over]
        if not frames:
            return None
        if frames[-1] not in self:
            self[frames[-1]] = Function(frames[-1], self._running)
        return self[frames[-1]]


class Function:
    """The call of an autograd.Function, its arguments as they were, and what it has made."""

    def __init__(self, frame: types.FrameType, running: Running) -> None:
        """Reads the frame of the call."""
        self._frame = frame
        self._place = find_place(frame)
        self._kind = frame.f_locals["cls"]
        self._args = frame.f_locals["args"]
        args = enumerate(self._args)
        self._given = {i: to_array(x) for i, x in args if isinstance(x, Tensor)}
        self._made: list[Tensor] = []
        self._running = running

    def add(self, x: Tensor) -> None:
        """Takes a tensor that may be an output."""
        x.function = self
        self._made.append(x)

    def settle(self) -> None:
        """Gives the outputs their gradients, as soon as the call is over.

        Before, PyTorch detaches those outputs that `backward` reads, and has not saved them yet.
        """
        with _private.no_modes():
            made = {x.output_nr: x for x in self._made if x.grad_fn is not None}
            node = next((x.grad_fn for x in made.values()), None)
        if node is None or self._frame in walk():
            return
        for x in self._made:
            x.function = None
        self._made = []
        with self._running():
            arrays = self._attach(node, {i: x.memory.array for i, x in made.items()})
        for i, x in made.items():
            x.memory = Memory(arrays[i])

    def _attach(self, node: Any, outs: dict[int, jax.Array]) -> dict[int, jax.Array]:
        """Returns the outputs, whose derivative by the arguments is that of `backward`."""
        if self._kind is torch.utils.checkpoint.CheckpointFunction:
            return self._call_again()
        saved = dict(enumerate(node.saved_tensors))
        kept = {i: self._read(x) for i, x in saved.items() if isinstance(x, Tensor)}
        known = vars(node) | {"needs_input_grad": node.needs_input_grad}
        likes = _private.list_outputs(node)

        @jax.custom_vjp
        def attach(given: Any, kept: Any, outs: Any) -> Any:
            del given, kept
            return outs

        def backward(kept: dict[int, jax.Array], grads: dict[int, jax.Array]) -> Any:
            self._check(known)
            context = types.SimpleNamespace(**known)
            with self._running():
                tensors = saved | {i: to_tensor(x) for i, x in kept.items()}
                context.saved_tensors = tuple(tensors.values())
                none = [torch.zeros(shape, dtype=dtype) for shape, dtype in likes]
                out = [to_tensor(grads[i]) if i in grads else x for i, x in enumerate(none)]
                found = self._kind.backward(context, *out)
                found = found if isinstance(found, tuple) else (found,)
                pairs = {i: (found[i], x) for i, x in self._given.items()}
                return {i: _fit(g, x) for i, (g, x) in pairs.items()}, None, None

        attach.defvjp(lambda given, kept, outs: (outs, kept), backward)
        return attach(self._given, kept, outs)

    def _read(self, x: Tensor) -> jax.Array:
        """Returns what is saved; of an argument, what it was when the call began."""
        known = (array for i, array in self._given.items() if self._args[i] is x)
        return next(known, to_array(x))

    def _check(self, known: dict[str, Any]) -> None:
        """Raises if `backward` reads tensors that `save_for_backward` was not given."""
        for name, x in known.items():
            if odd := [y for y in _private.pytree.tree_leaves(x) if not isinstance(y, STATIC)]:
                raise NotImplementedError(
                    f"{self._place} calls {self._kind.__name__}, an autograd.Function that keeps a "
                    f"{type(odd[0]).__name__} in ctx.{name} for its `backward`. Give tensors to "
                    "ctx.save_for_backward, and keep nothing but numbers and names beside them."
                )

    def _call_again(self) -> dict[int, jax.Array]:
        """Calls what `torch.utils.checkpoint` runs; its `backward` asks PyTorch for gradients."""

        def again(given: dict[int, jax.Array]) -> dict[int, jax.Array]:
            args = [to_tensor(given[i]) if i in given else x for i, x in enumerate(self._args)]
            out = args[0](*args[2:])
            every = enumerate(out if isinstance(out, tuple) else (out,))
            return {i: to_array(x) for i, x in every if isinstance(x, Tensor)}

        return jax.checkpoint(again)(self._given)


def _fit(gradient: torch.Tensor | None, x: jax.Array) -> jax.Array | None:
    """Gives a gradient the shape and the dtype of its argument, as PyTorch does."""
    if gradient is None or not jax.numpy.issubdtype(x.dtype, jax.numpy.inexact):
        return None
    return to_array(gradient.sum_to_size(x.shape)).astype(x.dtype)
