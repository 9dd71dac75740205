"""What PyTorch and torchax do not promise. `tests/torch/test_torch_private.py` says what each does.

torchax has the operators as functions of JAX, and dtypes; PyTorch has the decompositions.
"""

import contextlib
import copy
import functools
import importlib.util
import sys
import types
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch  # pyright: ignore[reportMissingImports]
from torch._decomp import decomposition_table  # pyright: ignore[reportMissingImports]
from torch._ops import OpOverload as OpOverload  # pyright: ignore[reportMissingImports]
from torch.utils import _pytree  # pyright: ignore[reportMissingImports]
from torch.utils._mode_utils import no_dispatch  # pyright: ignore[reportMissingImports]
from torch.utils._python_dispatch import (  # pyright: ignore[reportMissingImports]
    TorchDispatchMode as TorchDispatchMode,
)

# ------------------------------------------------------------------------------------ torchax


def _import_torchax(*names: str) -> list[types.ModuleType]:
    """Imports modules of torchax, but not its `__init__`.

    That makes JAX a device of the whole process, so that `torch.nn.DataParallel` and
    `torch.compile` fail in PyTorch's own models.
    """
    spec = importlib.util.find_spec("torchax")
    if spec is None:
        raise ModuleNotFoundError("No module named 'torchax'", name="torchax")
    if "torchax" in sys.modules:
        return [importlib.import_module(f"torchax.{x}") for x in names]
    sys.modules["torchax"] = importlib.util.module_from_spec(spec)
    try:
        return [importlib.import_module(f"torchax.{x}") for x in names]
    finally:
        for name in [x for x in sys.modules if x.partition(".")[0] == "torchax"]:
            del sys.modules[name]


_registry, _mappings, *_ = _import_torchax(
    "ops.ops_registry", "ops.mappings", "ops.jaten", "ops.jtorch", "ops.jtorchvision_nms"
)
# Functions of arrays, by the operator or the function of PyTorch.
OPERATORS: dict[Any, Callable[..., Any]] = {
    key: x.func
    for key, x in (_registry.all_aten_ops | _registry.all_torch_functions).items()
    if x.is_jax_function and not x.needs_env
}
# Functions of tensors, by the operator.
DECOMPOSITIONS: Mapping[Any, Callable[..., Any]] = decomposition_table
find_jax_dtype = _mappings.t2j_dtype
find_torch_dtype = _mappings.j2t_dtype

# ---------------------------------------------------------------------------------- operators

pytree = _pytree  # which knows the outputs of `transformers`
below_autograd = torch._C._AutoDispatchBelowADInplaceOrView
is_batched = torch._C._functorch.is_batchedtensor  # by torch.vmap
NO_FUNCTION = torch._C._disabled_torch_function_impl
# The call of an autograd.Function: a frame whose locals are `cls` and `args`.
APPLY = torch.autograd.Function.apply.__code__


@contextlib.contextmanager
def no_modes() -> Iterator[None]:
    """Computes by PyTorch alone."""
    with no_dispatch(), torch._C.DisableTorchFunction():
        yield


@functools.cache
def is_composite(func: Any) -> bool:
    """Whether PyTorch has an operator as others alone."""
    key = torch._C.DispatchKey.CompositeImplicitAutograd
    return isinstance(func, OpOverload) and (
        key in func.py_kernels or torch._C._dispatch_has_kernel_for_dispatch_key(func.name(), key)
    )


def name_operator(func: OpOverload) -> str:
    """Returns the name of an operator, without its overload."""
    return func._schema.name.removeprefix("aten::")


def list_written(func: OpOverload) -> list[tuple[int, str]]:
    """Lists the arguments that an operator changes: the first, or those that are outputs."""
    args = enumerate(func._schema.arguments)
    written = ((i, x) for i, x in args if x.alias_info is not None and x.alias_info.is_write)
    return [(i, x.name) for i, x in written if i == 0 or x.is_out]


def may_alias(func: OpOverload) -> bool:
    """Whether the results of an operator may share the memory of its first argument."""
    return bool(func._schema.arguments) and func._schema.arguments[0].alias_info is not None


def read_storage(x: torch.Tensor) -> int:
    """Returns the number of a tensor's memory."""
    return x.untyped_storage()._cdata


def make_wrapper(kind: type[Any], shape: Any, strides: Any, dtype: torch.dtype) -> Any:
    """Makes a tensor without memory. PyTorch notes functions with a backward of their own."""
    has_gradient = dtype.is_floating_point or dtype.is_complex
    options = {"dtype": dtype, "device": "meta", "requires_grad": has_gradient}
    return torch.Tensor._make_wrapper_subclass(kind, shape, strides, **options)


def list_outputs(node: Any) -> list[tuple[Any, torch.dtype]]:
    """Lists the shapes and dtypes of the outputs of an autograd.Function."""
    return [(tuple(x.shape), x.dtype) for x in node._input_metadata]


def count_writes(x: torch.Tensor) -> int:
    """Returns how often the values of a tensor of PyTorch have changed."""
    return x._version


# ------------------------------------------------------------------------------------ modules

# What every module has, and what recurrent ones make of their parameters in each call.
OWN = vars(torch.nn.Module()).keys() | {"_flat_weights", "_flat_weight_refs"}
BACKWARD_HOOKS = ("_backward_hooks", "_backward_pre_hooks", "_post_accumulate_grad_hooks")


def list_hooks(module: torch.nn.Module) -> tuple[Any, ...]:
    """Lists the hooks around the calls of a module."""
    return *module._forward_hooks.values(), *module._forward_pre_hooks.values()


def read_children(module: torch.nn.Module) -> dict[str, torch.nn.Module]:
    """Returns the modules in a module by name, also those that have several."""
    return {name: x for name, x in module._modules.items() if x is not None}


def copy_hooks(module: torch.nn.Module) -> dict[str, Any]:
    """Copies the dicts of hooks of a module, by attribute."""
    every = vars(module).items()
    return {key: copy.copy(x) for key, x in every if "_hooks" in key and isinstance(x, dict)}


def read_tensors(module: torch.nn.Module) -> dict[str, torch.Tensor | None]:
    """Returns the parameters and buffers of a module itself, by attribute."""
    return {**module._parameters, **module._buffers}


def initialize(module: torch.nn.Module, around: Sequence[torch.nn.Module]) -> None:
    """Initializes a module as `transformers` does, by the innermost that knows how."""
    owners = [x for x in around if hasattr(x, "_init_weights")]
    for owner in owners[-1:]:
        owner._init_weights(module)
