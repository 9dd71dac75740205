"""What an adapter changes in a checkpoint, tensor by tensor: all is checked before one is read."""

import os
from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from .._types import PyTree
from ._checkpoint import Checkpoint, refuse
from ._file import DTYPES
from ._folder import from_folder
from ._json import Source, shown
from ._names import Name
from ._parts import Orientation, Part, Sum, as_sum, from_tree, matrix, orientations
from ._renaming import renaming
from ._ties import absent, untied


class Changes(NamedTuple):
    """What is to be done to the tensors of a checkpoint.

    Attributes:
        sums: what is added to a tensor.
        full: what replaces a tensor.
        frozen: what a tensor must be.
    """

    sums: dict[str, Sum]
    full: dict[str, np.ndarray]
    frozen: dict[str, np.ndarray]


def changes(
    checkpoint: Checkpoint, adapter: str | os.PathLike[str] | PyTree, names: Sequence[Name] | None
) -> Changes:
    """The changes by a PEFT folder, or by a tree with `names`.

    Raises:
        ValueError: if the adapter does not fit the checkpoint, with all that is wrong.
    """
    shapes = {name: checkpoint.entry(name).shape for name in checkpoint.where}
    if isinstance(adapter, str | os.PathLike):
        if names is not None:
            raise ValueError(
                "`names` is for an adapter tree; PEFT's files name the modules themselves. "
                "Leave it out."
            )
        fields, to, parts, full, frozen = from_folder(Source(Path(adapter), "adapter"), shapes)
        flag, by_peft = bool(fields.get("fan_in_fan_out")), True
    else:
        if names is None:
            raise ValueError(
                "`names` must say what the leaves of an adapter tree are called in PyTorch, by a "
                "table such as jlora.peft.LLAMA; got None."
            )
        parts, full = from_tree(adapter, names)
        frozen, flag, by_peft = {}, False, False
        to = renaming([*(part.name for part in parts), *full], shapes)
    wrong: list[str] = []
    parts = [part._replace(name=to.there(part.name)) for part in parts]
    full, frozen = ({to.there(key): x for key, x in d.items()} for d in (full, frozen))
    wrong += absent(checkpoint, parts, full | frozen)
    if by_peft:
        wrong += untied(checkpoint, parts, full)
    find = Orientation(parts, shapes, flag)
    sums = {
        part.name: change
        for part in parts
        if part.name in shapes and (change := _sum(part, checkpoint, find, wrong)) is not None
    }
    full, frozen = (_checked(values, checkpoint, wrong) for values in (full, frozen))
    refuse(wrong)
    return Changes(sums, full, frozen)


def _sum(part: Part, checkpoint: Checkpoint, find: Orientation, wrong: list[str]) -> Sum | None:
    entry = checkpoint.entry(part.name)
    fits = orientations(part, entry.shape)
    if not fits:
        need = f"A {part.a.shape} and B {part.b.shape} make {matrix(part)}"
        wrong.append(
            f"{shown(part.name)}: expected a {part.kind} weight of shape {entry.shape}, but {need}"
        )
    elif entry.dtype not in DTYPES:
        wrong.append(
            f"{shown(part.name)}: of dtype {entry.dtype}; expected one of "
            f"{', '.join(DTYPES)}. Dequantize the checkpoint first"
        )
    elif (transposed := find.of(part, fits)) is None:
        wrong.append(
            f"{shown(part.name)}: is square, and nothing tells whether it is (inputs, outputs) or "
            "(outputs, inputs)"
        )
    else:
        return as_sum(part, entry.shape, transposed)
    return None


def _checked(
    values: dict[str, np.ndarray], checkpoint: Checkpoint, wrong: list[str]
) -> dict[str, np.ndarray]:
    """The values that the checkpoint has, which must fit."""
    found = {name: x for name, x in values.items() if name in checkpoint.where}
    for name, x in found.items():
        entry = checkpoint.entry(name)
        if entry.shape != x.shape or entry.dtype not in DTYPES:
            wrong.append(
                f"{shown(name)}: expected {entry.dtype} of shape {entry.shape}, got {x.shape} "
                "in the adapter"
            )
    return found
