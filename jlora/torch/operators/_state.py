"""What a call changes in its module. A copy runs each call, so the next one would not know."""

import pickle
import random
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

import numpy as np
import torch  # pyright: ignore[reportMissingImports]

from .._private import OWN, pytree, read_tensors
from ._tensor import Tensor

PLAIN = bool | int | float | complex | str | bytes | None


class StateLeaf(NamedTuple):
    """An object in an attribute of a module; of a tensor, how often its values have changed."""

    value: Any
    writes: int = 0

    def is_kept(self, new: "StateLeaf") -> bool:
        """Whether `new` is the same, or in its place a tensor that depends on arguments."""
        if new.value is self.value:
            return self.writes == new.writes
        if isinstance(self.value, PLAIN):
            return type(self.value) is type(new.value) and self.value == new.value
        return bool(getattr(new.value, "call", 0))


State = Mapping[str, list[StateLeaf]]
NOTHING = [StateLeaf(None)]


def read_attributes(model: torch.nn.Module) -> State:
    """Returns what is in the attributes, buffers and parameters of all modules, by name."""
    known = dict[int, Any]()
    return {
        f"{name}.{key}".removeprefix("."): list(_walk(value, known))
        for name, m in model.named_modules()
        for key, value in {**vars(m), **read_tensors(m)}.items()
        if key not in OWN
    }


def _walk(value: Any, known: dict[int, Any]) -> Iterator[StateLeaf]:
    """Yields what is in a value, and in its objects what Python would copy of them, once."""
    for x in pytree.tree_leaves(value):
        yield StateLeaf(x, x.memory.writes if isinstance(x, Tensor) else 0)
        if not isinstance(x, PLAIN | torch.Tensor | torch.nn.Module | type) and id(x) not in known:
            known[id(x)] = x  # kept, as the number of what is gone is given again
            yield from _walk(_read_state(x), known)


def _read_state(x: Any) -> list[Any]:
    if isinstance(x, torch.Generator):  # which makes a tensor each time
        return [bytes(x.get_state().numpy())]
    try:
        reduced = x.__reduce_ex__(4)
    except (TypeError, RuntimeError, pickle.PicklingError):  # without a state to copy
        return []
    return [] if isinstance(reduced, str) else list(map(_list_items, reduced[1:]))


def _list_items(x: Any) -> Any:
    return list(x) if isinstance(x, Iterator) else x


def read_draws() -> tuple[Any, ...]:
    """Returns where the generators of Python and NumPy are that all share."""
    _, numbers, *at = np.random.get_state()
    return random.getstate(), bytes(numbers), at


def find_left(before: State, after: State) -> list[str]:
    """Finds attributes in which a call has left objects; raises where it has changed a value.

    An attribute that was None or not there may get a value: each call makes it again.
    """
    left = []
    for name, leaves in after.items():
        old = before.get(name, NOTHING)
        is_new = len(old) == 1 and old[0].value is None
        added = leaves if is_new else leaves[len(old) :]
        is_kept = len(old) <= len(leaves) and all(map(StateLeaf.is_kept, old, leaves))
        if not is_new and not (is_kept and not any(isinstance(x.value, PLAIN) for x in added)):
            raise NotImplementedError(
                f"`model` changes its {name} in a call, and the next call would not know. Return "
                "the value as an output, and pass it to the next call as an argument."
            )
        known = {id(x.value) for x in old}
        if any(not isinstance(x.value, PLAIN) and id(x.value) not in known for x in leaves):
            left.append(name)
    return left
