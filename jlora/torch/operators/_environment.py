"""The operators of torchax, with the gradients and the memory that PyTorch's have."""

import contextlib
import dataclasses
import math
import traceback
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import torch  # pyright: ignore[reportMissingImports]
from jax.lax import stop_gradient
from jax.typing import ArrayLike
from torch._ops import OpOverload  # pyright: ignore[reportMissingImports]
from torch.utils import _mode_utils, _pytree  # pyright: ignore[reportMissingImports]
from torchax import tensor as torchax  # pyright: ignore[reportMissingImports]

from ..._compat import is_concrete
from .._skeleton import to_jax
from ._functions import find_conversion
from ._operators import OPERATORS, REFUSED
from ._refuse import check_call, find_place, refuse, walk
from ._tensor import Convert, Memory, PartMemory, Tensor, TracedError, keep

aten = torch.ops.aten
Options = Mapping[str, Any]
# What torchax handles beside its operators.
SPECIAL = torchax.TENSOR_CONSTRUCTORS | {torch.Tensor.to}
UNTRACEABLE = jax.errors.ConcretizationTypeError, jax.errors.NonConcreteBooleanIndexError
GRADIENTS = {
    torch.autograd.grad,
    torch.Tensor.backward,
    torch.Tensor.register_hook,
}
QUESTIONS = {getattr(torch.Tensor, x).__get__ for x in ("requires_grad", "grad_fn", "is_leaf")}


class Guard(torch._C._acc.DeviceGuard):
    """What torchax does not tell PyTorch of its device, and `torch.compile` asks for."""

    def type_(self) -> Any:
        """Returns the kind of the device."""
        return torch._C._autograd.DeviceType.PrivateUse1


torch._C._acc.register_python_privateuseone_device_guard(Guard())


class Call(NamedTuple):
    """The call of an operator, and what PyTorch does with the gradients of its results."""

    func: Any
    args: Sequence[Any]
    kwargs: dict[str, Any]
    convert: Convert


class Operators(torchax.Environment):
    """Computes each operator by JAX. It reads PyTorch's grad mode, and draws no random numbers."""

    def __init__(self) -> None:
        """Adds operators to those of torchax, for this object alone."""
        super().__init__()
        for operator in (torch.Tensor.__getitem__, torch.tensor_split, torch.Tensor.resize_):
            del self._ops[operator]  # PyTorch's own tells what is a view
        of_arrays = self._ops[aten.detach]
        for operator, f in OPERATORS.items():
            self._ops[operator] = dataclasses.replace(of_arrays, torch_op=operator, func=f)
        for operator in REFUSED:
            del self._decomps[operator.default]
        self.override_op_definition(torch.detach_, Tensor.detach_)
        self.override_op_definition(torch.nn.functional.scaled_dot_product_attention, self._attend)

    @contextlib.contextmanager
    def running(self) -> Iterator[None]:
        """Runs a module, whatever grad mode the caller is in."""
        try:
            with torch.inference_mode(False), self:
                yield
        except torchax.OperatorNotFound as e:
            *_, (frame, _) = traceback.walk_tb(e.__traceback__)
            why = f"{find_place(frame)} calls what torchax does not have: {e}. Write it by others."
            raise NotImplementedError(why) from None

    def wrap(self, x: ArrayLike) -> Tensor:
        """Makes a tensor of an array."""
        return Tensor(Memory(jnp.asarray(x)), self)

    def j2t_iso(self, jaxarray: Any) -> Any:
        """Makes tensors of arrays."""
        return _pytree.tree_map_only(jax.Array, self.wrap, jaxarray)

    def t2j_iso(self, torchtensors: Any) -> Any:
        """Returns the arrays in tensors; also of PyTorch's own, which models make as constants."""
        tensors = [x for x in _pytree.tree_leaves(torchtensors) if isinstance(x, torch.Tensor)]
        has_axes = any(x.ndim for x in tensors)

        def convert(x: torch.Tensor) -> jax.Array | float:
            # A scalar of PyTorch does not widen the dtype of an array with axes.
            is_constant = x.ndim == 0 and not isinstance(x, torchax.Tensor)
            return x.item() if is_constant and has_axes else to_array(x)

        return _pytree.tree_map_only(torch.Tensor, convert, torchtensors)

    def dispatch(
        self, func: Any, types: Any, args: Sequence[Any] = (), kwargs: Options | None = None
    ) -> Any:
        """Computes an operator; raises OperatorNotFound where PyTorch splits it into others.

        What depends on no traced array has values in a trace too: models read them, and keep them
        from one call to the next.
        """
        given = [x for x in _pytree.tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        has_values = all(is_concrete(x.memory.type) for x in given)
        with jax.ensure_compile_time_eval() if has_values else contextlib.nullcontext():
            return self._dispatch(func, types, args, kwargs or {})

    def _dispatch(self, func: Any, types: Any, args: Sequence[Any], kwargs: Options) -> Any:
        check_call(func)
        tensors = [x for x in _pytree.tree_leaves((args, kwargs)) if isinstance(x, torch.Tensor)]
        given = [x for x in tensors if isinstance(x, Tensor)]
        if given and (func in GRADIENTS or (func in QUESTIONS and not _is_asked_by_torch())):
            refuse("asks PyTorch for gradients", "Differentiate `apply` by jax.grad.")
        calls = {getattr(x, "call", 0) for x in tensors} - {0}
        if len(calls) > 1:
            refuse("reads what the call before left", "Pass it as an argument.")
        is_batched = any(map(torch._C._functorch.is_batchedtensor, tensors))  # by torch.vmap
        is_known = not is_batched and (func in self._ops or func in SPECIAL)
        if not isinstance(func, OpOverload) and not is_known:
            if is_batched or not (given and args and args[0] is given[0]):
                raise torchax.OperatorNotFound(func)
            return self._split(func, args, kwargs)
        convert = find_conversion() if given else keep
        call = Call(func, args, dict(kwargs), convert)
        if given and isinstance(func, OpOverload):
            first = func._schema.arguments[0].alias_info
            if first is not None and first.is_write:
                return self._write(call)
            is_view = first is not None and args[0] is given[0]
            if is_view and (views := self._view(call)) is not None:
                return views
        if given and len(given) < len(tensors):
            args, kwargs = self.j2t_iso(self.t2j_iso(call[1:3]))

        def finish(x: torch.Tensor) -> torch.Tensor:
            if any(x is y for y in given) or isinstance(getattr(x, "memory", None), PartMemory):
                return x
            found: Any = x
            if isinstance(x, torchax.Tensor):
                found = self.wrap(convert(x._elem))
            found.call = max(calls, default=0)
            return found

        try:
            out = super().dispatch(func, types, args, dict(kwargs))
        except UNTRACEABLE:
            raise TracedError(str(func)) from None
        except (NotImplementedError, TracedError, torchax.OperatorNotFound):
            raise
        except Exception as e:
            if not isinstance(func, OpOverload):  # PyTorch splits it into operators
                raise torchax.OperatorNotFound(func) from e
            shapes = ", ".join(str(jax.typeof(x._elem)) for x in given)
            reason = str(e).partition("\n")[0].rstrip(".")
            remedy = "If PyTorch takes them, write it by other operators."
            refuse(f"calls {func} with {shapes}, where torchax fails: {reason}", remedy, e)
        return _pytree.tree_map_only(torch.Tensor, finish, out)

    def _split(self, func: Any, args: Sequence[Any], kwargs: Options) -> Any:
        """Has PyTorch split a function; some take no constants beside tensors of arrays."""
        try:
            return func(*args, **kwargs)
        except NotImplementedError:
            raise
        except RuntimeError:
            return func(*_pytree.tree_map(self._move, args), **_pytree.tree_map(self._move, kwargs))

    def _move(self, x: Any) -> Any:
        if not isinstance(x, torch.Tensor) or isinstance(x, Tensor) or not x.ndim:
            return x
        moved = self.wrap(to_array(x))
        moved.call = getattr(x, "call", 0)
        return moved

    def _to_copy(self, the_tensor: Any, new_dtype: Any, new_device: Any) -> Any:
        """Converts to a dtype; JAX decides where arrays are, so that a device changes nothing."""
        is_tensor = isinstance(the_tensor, torch.Tensor)  # PyTorch also hands over numbers
        return super()._to_copy(the_tensor if is_tensor else self.wrap(the_tensor), new_dtype, None)

    def _view(self, call: Call) -> Any:
        """Makes tensors that share memory with the first argument; None where PyTorch copies."""
        source, *rest = call.args
        layout = {"dtype": source.dtype, "device": "meta"}
        with _no_modes():
            like = torch.empty_strided(source.size(), source.stride(), **layout)
            found, structure = _pytree.tree_flatten(call.func(like, *rest, **call.kwargs))
        memory = like.untyped_storage()._cdata
        if any(x.untyped_storage()._cdata != memory for x in found):
            return None
        views = [Tensor(self._part(call, i), self, x.stride()) for i, x in enumerate(found)]
        for view in views:
            view.call = source.call
        return _pytree.tree_unflatten(views, structure)

    def _part(self, call: Call, i: int = 0) -> PartMemory:
        """Returns the memory of the i-th view that a call makes of its first argument."""
        source, *rest = call.args
        compute = super().dispatch

        def read(x: jax.Array) -> jax.Array:
            out = compute(call.func, (), (self.wrap(x), *rest), dict(call.kwargs))
            return _pytree.tree_leaves(out)[i]._elem

        is_detached = call.func is aten.detach.default
        return PartMemory(source.memory, read, stop_gradient if is_detached else call.convert)

    def _write(self, call: Call) -> Any:
        """Changes the first argument, say by `add_`, to what the operator `add` returns."""
        func, args, kwargs, convert = call
        target, *rest = args
        if not isinstance(target, Tensor):
            refuse(
                f"writes arrays of JAX into a tensor of PyTorch's own, by {func}",
                "Make it by torch.zeros_like(x) or x.new_zeros(shape), of a tensor x of the model.",
            )
        twin = getattr(aten, func._schema.name.removeprefix("aten::").removesuffix("_"), None)
        if torch.Tag.inplace_view in func.tags:
            target.memory = self._part(call._replace(func=twin))
            with _no_modes():
                func(*args, **kwargs)
            return target
        try:
            with self._dispatch_mode:
                out = twin(*args, **kwargs)
        except torchax.OperatorNotFound:
            out = super().dispatch(func, (), (self.wrap(target._elem), *rest), kwargs)
        x = jnp.broadcast_to(to_array(out), target.shape).astype(target._elem.dtype)
        target.memory.write(x, convert)
        target.call = max(target.call, getattr(out, "call", 0))
        return target

    def _attend(
        self,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        attn_mask: torch.Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        enable_gqa: bool = False,
    ) -> torch.Tensor:
        """Attends, with softmax in float32; what JAX does not take, PyTorch splits up."""
        has_axes = query.ndim == 4 and (attn_mask is None or attn_mask.ndim in (2, 4))
        is_plain = has_axes and query.shape[0] == key.shape[0] and key.shape == value.shape
        if query.dtype == torch.float64 or dropout_p or not is_plain:
            if attn_mask is not None and attn_mask.dtype == torch.bool:
                zeros = torch.zeros_like(attn_mask, dtype=query.dtype)
                attn_mask = zeros.masked_fill(~attn_mask, -math.inf)
            wide = torch.float64 if query.dtype == torch.float64 else torch.float32
            given = (x if x is None else x.to(wide) for x in (query, key, value, attn_mask))
            options = {"scale": scale, "enable_gqa": enable_gqa}
            split = aten._scaled_dot_product_attention_math
            return split(*given, dropout_p, is_causal, **options)[0].to(query.dtype)
        *heads, mask = self.t2j_iso((query, key, value, attn_mask))
        if mask is not None and mask.ndim == 2:
            mask = mask[None, None]
        is_bias = mask is not None and mask.dtype != bool
        seen = mask > -jnp.inf if is_bias else mask
        mask = jnp.maximum(mask, jnp.finfo(mask.dtype).min) if is_bias else mask
        found = jax.nn.dot_product_attention(
            *(jnp.swapaxes(x, 1, 2) for x in heads),
            **{"bias" if is_bias else "mask": mask},
            scale=scale,
            is_causal=is_causal,
        )
        found = jnp.swapaxes(found, 1, 2)
        if seen is not None:  # a query without keys gets zeros
            found = jnp.where(seen.any(-1, keepdims=True), found, 0)
        return self.wrap(found)


def to_array(x: torch.Tensor) -> jax.Array:
    """Returns the array in a tensor of torchax, or copies one of PyTorch."""
    if isinstance(x, torchax.Tensor):
        return x._elem
    with jax.ensure_compile_time_eval():
        return jnp.asarray(to_jax(x))


@contextlib.contextmanager
def _no_modes() -> Iterator[None]:
    with _mode_utils.no_dispatch(), torch._C.DisableTorchFunction():
        yield


def _is_asked_by_torch() -> bool:
    """Whether PyTorch's own code, which only warns, has called a function."""
    mode = next(x for x in walk() if x.f_code.co_name == "__torch_function__")
    return mode.f_back is not None and mode.f_back.f_globals["__name__"].startswith("torch.")
