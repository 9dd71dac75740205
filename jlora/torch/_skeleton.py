"""A module without the memory of its parameters, and its tensors as arrays."""

import copy
import warnings
from collections.abc import Mapping

import jax
import jax.numpy as jnp
import numpy as np
import torch  # pyright: ignore[reportMissingImports]

from .._errors import InputError, Problem
from ._names import Structure
from ._peft_rules import find_bare, find_linear, find_refused
from ._private import BACKWARD_HOOKS, count_writes, find_jax_dtype, initialize

Array = jax.Array | jax.ShapeDtypeStruct


def check_module(model: object) -> None:
    """Raises unless `model` is a module whose calls are functions of their arguments."""
    if not isinstance(model, torch.nn.Module):
        raise TypeError(f"`model` must be a torch.nn.Module; got {type(model).__name__}.")
    if lazy := [name for name, x in model.named_parameters() if torch.nn.parameter.is_lazy(x)]:
        why = f"has parameters without a shape, such as {lazy[0]}."
        raise InputError("model", why, remedy="Call it once in PyTorch, which makes them.")
    is_exported = "eval" in vars(model)  # `torch.export` has replaced it by an error
    if not is_exported and (
        training := [name or "the root" for name, m in model.named_modules() if m.training]
    ):
        raise InputError(
            "model",
            "must be in evaluation mode: in training mode its dropout would draw random "
            "numbers, and its batch normalization would change its statistics. Call model.eval(). "
            f"For dropout, give LoRA(..., dropout=0.1). In training mode: {training[0]}"
            f"{f' and {len(training) - 1} more modules' if training[1:] else ''}.",
        )
    kinds = ((n, getattr(m, "gradient_checkpointing", False)) for n, m in model.named_modules())
    if checked := [name or "the root" for name, is_checked in kinds if is_checked]:
        raise InputError(
            "model",
            f"has gradient checkpointing enabled, in {checked[0]}.",
            remedy="Call model.gradient_checkpointing_disable(), and give extract(..., remat=...).",
        )
    check_hooks(model)
    computed = [
        Problem(f"{name}.{key}".removeprefix("."), "is computed from parameters")
        for name, m in model.named_modules()
        for key, x in (*vars(m).items(), *m.named_buffers(recurse=False))
        if isinstance(x, torch.Tensor) and not x.is_leaf
    ]
    if computed:
        raise InputError(
            "model",
            "has tensors that would not follow the parameters of `apply`.",
            problems=computed,
            remedy="Compute them in `forward`. For torch.nn.utils.weight_norm, use that of "
            "torch.nn.utils.parametrizations, or call torch.nn.utils.remove_weight_norm.",
        )


def check_hooks(model: torch.nn.Module) -> None:
    """Raises if a module or a parameter has a hook on its gradient."""
    hooked = [
        Problem(name, "has a hook on its gradient")
        for name, x in (*model.named_modules(), *model.named_parameters())
        if any(getattr(x, key, None) for key in BACKWARD_HOOKS)
    ]
    if hooked:
        raise InputError(
            "model",
            "has hooks that JAX would not call.",
            problems=hooked,
            remedy="Remove them, and change the gradients that jax.grad returns.",
        )


def find_saved(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Finds the parameters, and the buffers that are saved, each once and by its first name."""
    saved = model.state_dict(keep_vars=True).keys()
    buffers = {name: x for name, x in model.named_buffers() if name in saved}
    return dict(model.named_parameters()) | buffers


def warn_of_rounding(tensors: Mapping[str, torch.Tensor]) -> None:
    """Warns of floats of 64 bits that JAX would hold in 32."""
    wide = [name for name, x in tensors.items() if x.dtype in (torch.float64, torch.complex128)]
    if wide and not jax.config.jax_enable_x64:
        warnings.warn(
            f"`model` has tensors of 64 bits, such as {wide[0]}, which become float32. Set "
            "jax_enable_x64 to keep them, or call model.float().",
            stacklevel=3,
        )


def read_structure(model: torch.nn.Module) -> Structure:
    """Reads what `jlora.torch.names` needs to know."""
    aliases: dict[int, list[str]] = {}
    for name, x in model.named_parameters(remove_duplicate=False):
        aliases.setdefault(id(x), []).append(name)
    modules = dict(model.named_modules())
    return Structure(
        tuple(find_saved(model)),
        {first: tuple(rest) for first, *rest in aliases.values() if rest},
        find_refused(model),
        find_bare(model),
        frozenset(name for name, m in modules.items() if getattr(m, "is_transposed", False)),
        find_linear(model),
    )


def copy_structure(model: torch.nn.Module) -> torch.nn.Module:
    """Copies a module; what is saved is on the meta device, other tensors are buffers."""
    memo = {id(x): _without_memory(x) for x in find_saved(model).values()}
    skeleton = copy.deepcopy(model, memo)
    for module in skeleton.modules():
        for name, x in list(vars(module).items()):
            if isinstance(x, torch.Tensor):
                delattr(module, name)
                module.register_buffer(name, x, persistent=False)
    return skeleton


def _without_memory(x: torch.Tensor) -> torch.Tensor:
    shell = torch.empty_like(x, device="meta")
    is_trained = isinstance(x, torch.nn.Parameter)
    return torch.nn.Parameter(shell, x.requires_grad) if is_trained else shell


def find_constants(skeleton: torch.nn.Module) -> dict[str, jax.Array]:
    """Returns the buffers that are not saved; those on the meta device are computed before."""
    _compute_buffers(skeleton)
    saved = find_saved(skeleton)
    every = {name: x for name, x in skeleton.named_buffers() if name not in saved}
    return {name: jnp.asarray(to_jax(x, name)) for name, x in every.items()}


def _compute_buffers(skeleton: torch.nn.Module) -> None:
    """Computes the buffers on the meta device that are not saved, as `transformers` does."""
    modules = dict(skeleton.named_modules())
    saved = find_saved(skeleton)
    lost = dict[str, torch.Tensor]()
    for name, x in skeleton.named_buffers():
        if x.is_meta and name not in saved:
            module, _, last = name.rpartition(".")
            lost[name] = torch.empty_like(x, device="cpu")
            setattr(modules[module], last, lost[name])
    with torch.device("cpu"), torch.no_grad(), torch.random.fork_rng(devices=[]):
        for name in dict.fromkeys(name.rpartition(".")[0] for name in lost):
            around = [m for n, m in modules.items() if not n or f"{name}.".startswith(f"{n}.")]
            initialize(modules[name], around)
    kept = [name for name, x in lost.items() if skeleton.get_buffer(name) is x]
    if wrong := [name for name in kept if not count_writes(lost[name])]:
        raise InputError(
            "model",
            "has buffers on the meta device that are not saved, and that it does not "
            "compute in `_init_weights`. Make the module so that only its parameters are on the "
            "meta device, as accelerate.init_empty_weights() does.",
            problems=[Problem(name, "has no value") for name in wrong],
        )


def to_jax(x: torch.Tensor, name: str = "a constant") -> Array:
    """Copies a tensor to an array bit for bit; one on the meta device becomes its shape.

    Without jax_enable_x64 floats of 64 bits are rounded, and integers must fit into 32.
    """
    dtype = find_jax_dtype(x.dtype)
    shape = tuple(x.shape)
    if x.is_meta:
        return jax.ShapeDtypeStruct(shape, jax.dtypes.canonicalize_dtype(dtype))
    flat = x.detach().cpu().contiguous().reshape(-1)
    # NumPy does not know PyTorch's bfloat16, but has the same bytes.
    values = flat.view(torch.uint8).numpy().view(dtype).reshape(shape)
    held = jax.dtypes.canonicalize_dtype(dtype)
    if values.dtype.kind == "i" and not np.array_equal(values.astype(held), values):
        why = f"has integers in {name} that {held} cannot hold. Set jax_enable_x64."
        raise InputError("model", why)
    return jnp.array(values)
