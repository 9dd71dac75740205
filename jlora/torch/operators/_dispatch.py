"""The call of an operator of PyTorch on arrays of JAX, with PyTorch's gradients and memory."""

import contextlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import torch  # pyright: ignore[reportMissingImports]
from jax.lax import stop_gradient
from torch.overrides import TorchFunctionMode  # pyright: ignore[reportMissingImports]

from ..._compat import is_concrete
from .. import _private
from .._private import TorchDispatchMode, pytree
from ._functions import FunctionCalls
from ._operators import OPERATORS, UNUSED
from ._refuse import check_call, refuse, walk
from ._tensor import PartMemory, StateError, Tensor, TracedError, keep, to_array, to_tensor

aten = torch.ops.aten
Options = Mapping[str, Any]
TABLE = {**_private.OPERATORS, **OPERATORS}
UNTRACEABLE = jax.errors.ConcretizationTypeError, jax.errors.NonConcreteBooleanIndexError
META = torch.device("meta")
GRADIENTS = {
    torch.autograd.grad,
    torch.Tensor.backward,
    torch.Tensor.register_hook,
}
QUESTIONS = {getattr(torch.Tensor, x).__get__ for x in ("requires_grad", "grad_fn", "is_leaf")}


class Call(NamedTuple):
    """The call of an operator or a function."""

    func: Any
    args: Sequence[Any]
    kwargs: Options

    @property
    def leaves(self) -> list[Any]:
        """The arguments, and what is in lists of them."""
        return pytree.tree_leaves((self.args, self.kwargs))

    @property
    def written(self) -> list[torch.Tensor]:
        """The arguments that an operator changes."""
        names = _private.list_written(self.func)
        return [self.kwargs[name] if name in self.kwargs else self.args[i] for i, name in names]

    def map(self, kind: type[Any], f: Callable[[Any], Any]) -> "Call":
        """Changes the arguments of a class."""
        return Call(self.func, *pytree.tree_map_only(kind, f, (self.args, self.kwargs)))

    def run(self, func: Any = None) -> Any:
        """Calls the function, or another one with its arguments."""
        return (func or self.func)(*self.args, **self.kwargs)


class FunctionMode(TorchFunctionMode):
    """Sees the functions that a model calls. PyTorch makes operators of most of them."""

    def __init__(self, operators: "Operators") -> None:
        """Holds what computes them."""
        super().__init__()
        self.operators = operators

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Computes a function."""
        return self.operators.call_function(Call(func, args, kwargs or {}))


class OperatorMode(TorchDispatchMode):
    """Sees the operators, also of constants."""

    def __init__(self, operators: "Operators") -> None:
        """Holds what computes them."""
        super().__init__()
        self.operators = operators

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Computes an operator."""
        return self.operators.call_operator(Call(func, args, kwargs or {}))


@contextlib.contextmanager
def running() -> Iterator[None]:
    """Runs a module, whatever grad mode the caller is in."""
    operators = Operators()
    modes = OperatorMode(operators), FunctionMode(operators)
    with torch.inference_mode(False), _private.below_autograd(), modes[0], modes[1]:
        yield
    operators.functions.clear()


class Operators:
    """Computes operators by JAX. It reads PyTorch's grad mode, and draws no random numbers."""

    def __init__(self) -> None:
        """Begins with no functions that run."""
        self.functions = FunctionCalls(running)

    def call_function(self, call: Call) -> Any:
        """Computes a function of tensors, most by operators."""
        func, leaves = call.func, call.leaves
        check_call(func)
        given = [x for x in leaves if isinstance(x, Tensor)]
        if given and (func in GRADIENTS or (func in QUESTIONS and not _is_asked_by_torch())):
            refuse("asks PyTorch for gradients", "Differentiate `apply` by jax.grad.")
        tensors = [x for x in leaves if isinstance(x, torch.Tensor)]
        if not given or not _find(TABLE, func) or any(map(_private.is_batched, tensors)):
            return call.run()
        try:
            return self._finish(call, self._compute)
        except FailedError:
            return call.run()

    def call_operator(self, call: Call) -> Any:
        """Computes an operator."""
        check_call(call.func)
        if not any(isinstance(x, Tensor) for x in call.leaves):
            return self._finish(call, _make)
        if call.written:
            return self._finish(call, self._write)
        is_view = _private.may_alias(call.func) and isinstance(call.args[0], Tensor)
        try:
            return self._finish(call, self._view if is_view else self._compute)
        except FailedError as e:
            refuse(str(e), "If PyTorch takes them, write it by other operators.", e.__cause__)

    def _finish(self, call: Call, compute: Callable[[Call], Any]) -> Any:
        """Computes, and notes on which call of the model the results depend.

        What depends on no traced array has values in a trace too: models read them, and keep them
        from one call to the next.
        """
        tensors = [x for x in call.leaves if isinstance(x, torch.Tensor)]
        calls = {getattr(x, "call", 0) for x in tensors} - {0}
        if len(calls) > 1:
            raise StateError
        function = self.functions.find()
        types = [x.memory.type for x in tensors if isinstance(x, Tensor)]
        has_values = all(map(is_concrete, types))
        with jax.ensure_compile_time_eval() if has_values else contextlib.nullcontext():
            out = compute(call)
        for x in pytree.tree_leaves(out):
            if isinstance(x, torch.Tensor) and not any(x is y for y in tensors):
                x.call = max(calls, default=0)
                if function is not None and isinstance(x, Tensor):
                    function.add(x)
        return out

    def _compute(self, call: Call) -> Any:
        """Computes by a function of arrays, or by other operators."""
        func = call.func
        is_composite = _private.is_composite(func)
        f = _find(OPERATORS if is_composite else TABLE, func)
        if f is not None:
            convert = keep if torch.is_grad_enabled() else stop_gradient
            arrays = _try(f, _read_arrays(call))
            return pytree.tree_map_only(jax.Array, lambda x: to_tensor(convert(x)), arrays)
        f = func.decompose if is_composite else _find(_private.DECOMPOSITIONS, func)
        if f is None:
            refuse(f"calls {func}, which torchax does not have", "Write it by other operators.")
        with OperatorMode(self):
            return call.map(torch.Tensor, _move).run(f)

    def _view(self, call: Call) -> Any:
        """Makes tensors that share memory with the first argument, where PyTorch does."""
        source = call.args[0]
        layout = {"dtype": source.dtype, "device": META}
        with _private.no_modes():
            like = torch.empty_strided(source.size(), source.stride(), **layout)
            moved = call._replace(args=(like, *call.args[1:])).map(torch.Tensor, _lose_values)
            out = moved.map(torch.device, lambda _: META).run()
            found, structure = pytree.tree_flatten(out)
        if found[0] is like:
            return source
        memory = _private.read_storage(like)
        if any(_private.read_storage(x) != memory for x in found):
            return self._compute(call)
        is_kept = torch.is_grad_enabled() and call.func is not aten.detach.default
        views = []
        for i, x in enumerate(found):

            def read(x: jax.Array, i: int = i) -> jax.Array:
                with torch.enable_grad():  # `convert` stops what is to be stopped
                    out = self._compute(call._replace(args=(to_tensor(x), *call.args[1:])))
                return to_array(pytree.tree_leaves(out)[i])

            part = PartMemory(source.memory, read, keep if is_kept else stop_gradient)
            views.append(Tensor(part, x.stride()))
        return pytree.tree_unflatten(views, structure)

    def _write(self, call: Call) -> Any:
        """Changes an argument, say by `add_`, to what the operator `add` returns."""
        func, args, kwargs = call
        targets = call.written
        if not all(isinstance(x, Tensor) for x in targets):
            refuse(
                f"writes arrays of JAX into a tensor of PyTorch's own, by {func}",
                "Make it by torch.zeros_like(x) or x.new_zeros(shape), of a tensor x of the model.",
            )
        names = {name for _, name in _private.list_written(func)}
        call = call._replace(kwargs={k: x for k, x in kwargs.items() if k not in names})
        twin = getattr(aten, _private.name_operator(func).removesuffix("_"), None)
        if twin is None:
            return self._compute(call)
        with OperatorMode(self):
            found = pytree.tree_leaves(call.run(twin))
        if torch.Tag.inplace_view in func.tags or func is aten.detach_.default:
            targets[0].memory = found[0].memory
            with _private.no_modes():
                func(*args, **kwargs)
            return targets[0]
        convert = keep if torch.is_grad_enabled() else stop_gradient
        for target, x in zip(targets, found, strict=True):
            old = target.memory.array
            target.memory.write(jnp.broadcast_to(to_array(x), old.shape).astype(old.dtype), convert)
            target.call = max(target.call, getattr(x, "call", 0))
        return targets[0] if len(targets) == 1 else tuple(targets)


def _find(table: Mapping[Any, Callable[..., Any]], func: Any) -> Callable[..., Any] | None:
    """Finds an operator, by its overload or as a whole."""
    keys = func, getattr(func, "overloadpacket", None)
    return None if func in UNUSED else next((table[x] for x in keys if x in table), None)


class FailedError(Exception):
    """A function of torchax fails."""


def _try(f: Callable[..., Any], call: Call) -> Any:
    """Calls a function of arrays."""
    try:
        return call.run(f)
    except UNTRACEABLE:
        raise TracedError(str(call.func)) from None
    except NotImplementedError:
        raise
    except Exception as e:
        types = ", ".join(str(jax.typeof(x)) for x in call.leaves if isinstance(x, jax.Array))
        reason = str(e).partition("\n")[0].rstrip(".")
        raise FailedError(f"calls {call.func} with {types}, where torchax fails: {reason}") from e


def _read_arrays(call: Call) -> Call:
    """Gives arrays for tensors. A scalar of PyTorch does not widen the dtype of other arrays."""
    has_axes = any(x.ndim for x in call.leaves if isinstance(x, torch.Tensor))

    def read(x: torch.Tensor) -> jax.Array | float:
        is_number = has_axes and x.ndim == 0 and not isinstance(x, Tensor)
        return x.item() if is_number else to_array(x)

    return call.map(torch.Tensor, read)


def _move(x: torch.Tensor) -> torch.Tensor:
    """Makes an array of a constant of PyTorch, as it takes none of two devices."""
    if isinstance(x, Tensor):
        return x
    moved = to_tensor(to_array(x))
    moved.call = getattr(x, "call", 0)
    return moved


def _lose_values(x: torch.Tensor) -> torch.Tensor:
    return x if x.is_meta or isinstance(x, Tensor) else torch.empty_like(x, device=META)


def _make(call: Call) -> Any:
    """Computes constants by PyTorch. On another device than the CPU they become arrays."""
    devices = [x for x in call.leaves if isinstance(x, torch.device)]
    out = call.map(torch.device, lambda _: torch.device("cpu")).run()
    torch.autograd.graph.increment_version(call.written)
    if all(x == torch.device("cpu") for x in devices):
        return out
    return pytree.tree_map_only(torch.Tensor, lambda x: to_tensor(to_array(x)), out)


def _is_asked_by_torch() -> bool:
    """Whether PyTorch's own code, which only warns, has called a function."""
    mode = next(x for x in walk() if x.f_code.co_name == "__torch_function__")
    return mode.f_back is not None and mode.f_back.f_globals["__name__"].startswith("torch.")
