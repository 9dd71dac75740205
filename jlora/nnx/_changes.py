"""A call works with copies: finds what it changes there, and changes the originals."""

import operator
from typing import Any

import jax
from flax import nnx

from .._types import PyTree


def find_changes(before: nnx.State, after: nnx.State) -> nnx.State:
    """Returns the variables of `after` that `before` lacks, or has with other arrays.

    Only they are written back, because where a module is closed over NNX refuses any write.
    """
    old = {path: jax.tree.leaves(x) for path, x in nnx.to_flat_state(before)}

    def is_same(path: tuple[Any, ...], x: PyTree) -> bool:
        new = jax.tree.leaves(x)
        same = path in old and len(old[path]) == len(new)
        return same and all(map(operator.is_, old[path], new))

    flat = nnx.to_flat_state(after)
    return nnx.from_flat_state([(path, x) for path, x in flat if not is_same(path, x)])


Attributes = list[tuple[Any, str, Any]]


def find_attributes(held: list[Any], copies: list[Any]) -> Attributes:
    """Lists the modules in `held` with each attribute that a call has set in the copy of one.

    Variables and parts are not among them.
    """
    after = dict(nnx.iter_graph(copies))
    found = []
    for path, module in nnx.iter_graph(held):
        own = vars(after[path]) if isinstance(module, nnx.Module) and path in after else {}
        for name, x in own.items():
            is_changed = vars(module).get(name) is not x and not nnx.is_data(x)
            if is_changed and not name.startswith("_pytree__"):  # which are NNX's own
                found.append((module, name, x))
    return found


def make_changes(held: list[Any], changes: nnx.State, attributes: Attributes) -> None:
    """Changes the modules and variables in `held` as a call has changed its copies."""
    modules = dict(nnx.iter_graph(held))
    for (*path, key), x in nnx.to_flat_state(changes):
        module = modules.get(tuple(path))
        name = str(key)
        if isinstance(module, nnx.Module) and not isinstance(vars(module).get(name), nnx.Variable):
            setattr(module, name, x)  # nnx.update refuses a variable in the place of a None
    nnx.update(held, changes)
    for module, name, x in attributes:
        setattr(module, name, x)
