"""The values of tensors, which are read when all else is known to be right."""

import hashlib
import itertools
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np

from .._file import shown
from ._read import MAGNITUDE, Part, Stored
from ._saved import Saved


def values(saved: Saved, wanted: Iterable[Stored], wrong: list[str]) -> dict[str, np.ndarray]:
    """Tensors by their keys; those that are not finite, or mean nothing, are added to `wrong`."""
    wrong += unfit(found := saved.read(wanted))
    return found


def unfit(found: Mapping[str, np.ndarray]) -> list[str]:
    """Which of the tensors are not finite, or mean nothing."""
    wrong = [
        f"{shown(key)}: {n} of {x.size} values are not finite"
        for key, x in found.items()
        if (n := x.size - np.count_nonzero(np.isfinite(x)))
    ]
    return wrong + [
        f"{shown(key)}: all of its {x.size} values are 0, with which the module gives nothing"
        for key, x in found.items()
        if key.endswith(MAGNITUDE) and not x.any()
    ]


def with_values(parts: Iterable[Part], found: Mapping[str, np.ndarray]) -> list[Part]:
    """The parts with arrays."""

    def filled(part: Part) -> Part:
        there = [name for name in ("a", "b", "m") if getattr(part, name) is not None]
        return part._replace(**{name: found[getattr(part, name).key] for name in there})

    return list(map(filled, parts))


def stored_in(parts: Iterable[Part]) -> Iterator[Stored]:
    """The tensors of parts."""
    for part in parts:
        yield from part.arrays


def twins(parts: Iterable[Part]) -> dict[str, Part]:
    """By name, the part that is the same on the other side of a weight that two modules share."""
    groups: dict[Any, dict[str, Part]] = {}
    for part in parts:
        if part.kind in ("embedding", "linear") and part.m is None:
            a, b = (part.a, part.b) if part.kind == "linear" else (part.b.T, part.a.T)
            values = hashlib.sha256(a.tobytes() + b.tobytes()).digest()
            group = groups.setdefault((part.scale, a.shape, b.shape, a.dtype, values), {})
            group.setdefault(part.kind, part)
    return {
        one.name: other
        for group in groups.values()
        if len(group) == 2
        for one, other in itertools.permutations(group.values())
    }
