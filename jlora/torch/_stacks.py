"""Which layers of a list are equal, and their tensors as one."""

import contextlib
import functools
import itertools
import types
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import torch  # pyright: ignore[reportMissingImports]

from .._errors import InputError
from ._names import Stack, place
from ._private import OWN, list_hooks, read_tensors

NO_SCAN = "Leave its list out of `scan`."
# What makes two of these equal.
PARTS = {
    types.FunctionType: ("__code__", "__defaults__", "__kwdefaults__", "__closure__"),
    types.MethodType: ("__func__",),
    types.CellType: ("cell_contents",),
    functools.partial: ("func", "args", "keywords"),
}


def find_stack(model: torch.nn.Module, path: str) -> Stack:
    """Finds the layers of a list that repeat: as many as can be, in the shortest period."""
    name = path.replace("/", ".")
    lists = {n: m for n, m in model.named_modules() if isinstance(m, torch.nn.ModuleList)}
    if name not in lists:
        known = ", ".join(repr(n.replace(".", "/")) for n in lists) or "none"
        raise InputError("scan", f"has {path!r}; expected a ModuleList of the model: {known}.")
    layers = list(map(describe, lists[name]))
    best = Stack(name, 0, 1, 1)
    for start in range(len(layers) - 1):
        for period in range(1, (len(layers) - start) // 2 + 1):
            end = start + period
            while end < len(layers) and not _differ(layers[end - period], layers[end], period):
                end += 1
            found = Stack(name, start, period, (end - start) // period)
            if found.steps > 1 and found.stop - start > best.stop - best.start:
                best = found
    if best.steps == 1:
        odd = [_differ(*pair, 1) for pair in itertools.pairwise(layers)]
        why = f"has layers that differ: {odd[0]}" if odd else "has one layer"
        raise InputError("scan", f"has {path!r}, which {why}.", remedy=NO_SCAN)
    return best


def describe(layer: torch.nn.Module) -> dict[str, Any]:
    """Returns what a layer is, by name."""
    found: dict[str, Any] = {}
    for name, module in layer.named_modules():
        own = {k: x for k, x in vars(module).items() if k not in OWN}
        own |= {"class": type(module), "hooks": list_hooks(module)} | read_tensors(module)
        found |= {f"{name}.{key}".removeprefix("."): x for key, x in own.items()}
    tensors = {name: x for name, x in found.items() if isinstance(x, torch.Tensor)}
    return found | {name: (x.shape, x.dtype, x.requires_grad) for name, x in tensors.items()}


def find_numbers(one: Mapping[str, Any], other: Mapping[str, Any]) -> list[str]:
    """Finds the attributes that count layers."""
    return [n for n, x in one.items() if type(x) is int and x != other[n]]


def _differ(one: Mapping[str, Any], other: Mapping[str, Any], distance: int) -> str:
    """Names what differs in two layers, but for their numbers; empty if nothing does."""

    def is_equal(x: Any, y: Any) -> bool:
        return is_same(x, y) or (type(x) is type(y) is int and y - x == distance)

    names = one.keys() ^ other.keys() or (n for n in one if not is_equal(one[n], other[n]))
    return next(iter(names), "")


def is_same(x: Any, y: Any) -> bool:
    """Whether two attributes or arguments are equal; functions by what they are made of."""
    if x is y or type(x) is not type(y):
        return x is y
    if isinstance(x, torch.Tensor):
        return torch.equal(x, y)
    if isinstance(x, tuple | list):
        return len(x) == len(y) and all(map(is_same, x, y))
    if isinstance(x, dict):
        return x.keys() == y.keys() and all(is_same(x[key], y[key]) for key in x)
    if isinstance(x, torch.nn.Module) and not [*x.children()]:  # as `kernels` makes of functions
        return is_same(vars(x), vars(y))
    if parts := next((names for kind, names in PARTS.items() if isinstance(x, kind)), None):
        return all(is_same(getattr(x, name), getattr(y, name)) for name in parts)
    with contextlib.suppress(Exception):
        return bool(x == y)
    return False


def stack_arrays(arrays: Mapping[str, Any], stacks: Sequence[Stack]) -> dict[str, Any]:
    """Stacks what layers have, at the name of the first of them."""
    found, groups = dict[str, Any](), dict[str, list[Any]]()
    for name, x in arrays.items():
        leaf = place(name, stacks)
        found[leaf] = x
        groups.setdefault(leaf, []).append(x)
    for stack in stacks:
        for name in filter(stack.place, found):
            each = groups[name]
            if len(each) != stack.steps:
                raise InputError("scan", f"has layers that share {name}.", remedy=NO_SCAN)
            is_abstract = isinstance(each[0], jax.ShapeDtypeStruct)
            shape = stack.steps, *each[0].shape
            found[name] = each[0].update(shape=shape) if is_abstract else jnp.stack(each)
    return found


def strip(model: torch.nn.Module, stack: Stack) -> None:
    """Takes the tensors from the layers that are never called themselves."""
    for layer in model.get_submodule(stack.name)[stack.start + stack.period : stack.stop]:
        for module in layer.modules():
            for name in read_tensors(module):
                delattr(module, name)
