"""Stores a decoder's output head beside the embedding that it shares."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import numpy as np

from .._file import TensorInfo
from .._vocabulary import TIE, copy_config, is_head, walk_objects
from ..adapter._parts import Parameters, T, fill, list_tensors
from ..places._views import module_of
from ._target import Target
from ._ties import Shared, find_plain, list_even

Read = Callable[[Iterable[TensorInfo]], Mapping[str, np.ndarray]]


def store_head(
    target: Target, found: Parameters[T], shared: Shared, read: Read
) -> tuple[Target, Parameters[T], Shared]:
    """Gives the head of a plain decoder its own weight if the adapter changes the two differently.

    New rows in the embedding are new in the head too, as in PEFT.

    Args:
        target: the checkpoint.
        found: the contents of the adapter.
        shared: the weights that the model may read twice.
        read: reads tensors of the adapter, whose values are compared.
    """
    checkpoint, model = target
    if (pair := find_plain(target)) is None or shared.keys().isdisjoint(pair):
        return target, found, shared
    own = {name: model.tensor(name) for name in found.changed if name not in found.tokens}
    heads = [
        n for n, x in own.items() if x == pair.head or (n not in model and is_head(module_of(n)))
    ]
    sides = [*heads, *(name for name, x in own.items() if x == pair.table)]
    if not sides or _are_even(found, sides, read):
        return target, found, shared
    name = heads[0] if heads else pair.head
    tokens = dict(found.tokens)
    if rows := [x for n, x in tokens.items() if model.tensor(n) == pair.table]:
        tokens[name] = rows[0]._replace(module=module_of(name))
    config = _untied(checkpoint.config)
    if pair.head in checkpoint.where:
        target = target.resize({}, config)
    else:
        new = checkpoint.entry(pair.table)._replace(key=pair.head)
        target = target.add({name: new}, config, pair.prefix, {name: pair.table})
    return target, found._replace(tokens=tokens), {}


def _are_even(found: Parameters[T], names: Iterable[str], read: Read) -> bool:
    """Whether the changes of embedding and head are the same."""
    names = {*names}
    parts = [x for x in found.parts if x.name in names]
    full = {name: x for name, x in found.full.items() if name in names}
    own = Parameters(parts, full)
    return names == list_even(fill(own, read(list_tensors(own))))


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """Says in a configuration, and in those of its submodels, that the head is not tied."""
    found = copy_config(config)
    for part in walk_objects(found):
        if part is found or TIE in part or part is found.get("text_config"):
            part[TIE] = False
    return found
