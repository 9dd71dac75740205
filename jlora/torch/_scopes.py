"""Scopes of JAX in which the calls of modules run: they tell whose call reads a weight."""

import copy
from typing import Any

import jax
from torch import nn  # pyright: ignore[reportMissingImports]

from ._names import name_scope
from ._private import copy_hooks, read_children


def enter_scopes(model: nn.Module) -> None:
    """Has each module of a copy run in a name scope of JAX, which tells whose call reads what.

    Modules without others are copied where their names reach them, as PEFT replaces them there. One
    that a plain list holds too, and that the model calls through it, then runs in no scope.
    """
    copies = dict[nn.Module, nn.Module]()
    for module in list(model.modules()):
        for key, child in read_children(module).items():
            if not read_children(child):
                copies.setdefault(child, _copy_module(child))
                setattr(module, key, copies[child])
    scopes = list[Any]()

    def enter(name: str) -> None:
        scopes.append(jax.named_scope(name_scope(name)))
        scopes[-1].__enter__()

    def leave(*_: Any) -> None:
        scopes.pop().__exit__(None, None, None)

    for name, module in model.named_modules():
        module.register_forward_pre_hook(lambda *_, name=name: enter(name))
        module.register_forward_hook(leave, always_call=True)


def _copy_module(module: nn.Module) -> nn.Module:
    """Copies a module that keeps its tensors, but has hooks of its own."""
    found = copy.copy(module)
    vars(found).update(copy_hooks(module))
    return found
