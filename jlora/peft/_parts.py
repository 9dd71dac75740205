"""A and B by PyTorch's names, and what they add to a weight of a checkpoint."""

from collections.abc import Collection, Iterable, Sequence
from typing import NamedTuple

import jax
import numpy as np

from .._tree import adapter_leaves, check_fits, nest
from .._types import PyTree
from ..adapters import LowRank, is_node, weight_shape
from ._arrays import factors, weights
from ._names import Name, resolve
from ._save import check_writable


class Part(NamedTuple):
    """A and B of one parameter, in PEFT's layout.

    Attributes:
        name: PyTorch's parameter.
        kind: `linear`, `embedding`, `conv` or `experts`.
        a: PEFT's A.
        b: PEFT's B.
        scale: s.
        transposed: whether PyTorch keeps the weight as (inputs, outputs); None if not known.
    """

    name: str
    kind: str
    a: np.ndarray
    b: np.ndarray
    scale: float
    transposed: bool | None = None


class Sum(NamedTuple):
    """What is added to a weight whose axes are flattened to (stack, rows, columns).

    Attributes:
        left: (stack, rows, r).
        right: (stack, r, columns).
        scale: s.
    """

    left: np.ndarray
    right: np.ndarray
    scale: float

    @property
    def transpose(self) -> "Sum":
        """The same for the transposed weight."""
        return Sum(self.right.swapaxes(1, 2), self.left.swapaxes(1, 2), self.scale)


def from_tree(adapter: PyTree, names: Sequence[Name]) -> tuple[list[Part], dict[str, np.ndarray]]:
    """The parts of an adapter tree, and its leaves in full, by PyTorch's names."""
    found = adapter_leaves(adapter)
    shapes = {path: weight_shape(x) if is_node(x) else x.shape for path, x in found.items()}
    base = nest({path: jax.ShapeDtypeStruct(shape, np.float32) for path, shape in shapes.items()})
    check_fits(base, found)
    leaves = resolve(base, names)
    check_writable(found, {leaf.path: leaf for leaf in leaves})
    parts, full = [], {}
    for leaf in leaves:
        x, name = found[leaf.path], leaf.name
        keys = [f"{module}.{name.parameter}" for module in leaf.modules]
        if not isinstance(x, LowRank):
            full |= dict(zip(keys, weights(leaf, x), strict=True))
            continue
        # What is swapped has PEFT's B·A in the order of PyTorch's axes.
        transposed = name.transposed
        if name.kind == "experts":
            transposed = False if name.swapped else None
        for key, (a, b) in zip(keys, factors(leaf, x), strict=True):
            parts.append(Part(key, name.kind or "", a, b, x.scale, transposed))
    return parts, full


def orientations(part: Part, shape: tuple[int, ...]) -> list[bool]:
    """Whether the weight of `shape` may be transposed as against B·A: none if `part` misfits."""
    rank, (rows, columns) = part.b.shape[1], matrix(part)
    if part.kind == "experts":
        fits = [len(shape) == 3 and shape[1:] == s for s in ((rows, columns), (columns, rows))]
        count = shape[0] if shape else 0
        fits = [f and part.a.shape[0] == rank and count and rank % count == 0 for f in fits]
    elif part.kind == "conv":
        fits = [(rows, *part.a.shape[1:]) == shape and part.a.shape[0] == rank, False]
    else:
        fits = [(rows, columns) == shape, (columns, rows) == shape]
        fits = [fit and part.a.shape == (rank, columns) for fit in fits]
    known = True if part.kind == "embedding" else part.transposed
    return [t for t in (False, True) if fits[t] and known in (None, t)]


def matrix(part: Part) -> tuple[int, int]:
    """The shape of B·A, of one of the experts."""
    return part.b.shape[0], int(np.prod(part.a.shape[1:]))


def as_sum(part: Part, shape: tuple[int, ...], transposed: bool) -> Sum:
    """What `part` adds to the weight of `shape`."""
    count = shape[0] if part.kind == "experts" else 1
    rows, columns = matrix(part)
    b = part.b.reshape(rows, -1, count).transpose(2, 0, 1)  # rank outside of experts
    a = part.a.reshape(count, -1, columns)  # experts outside of rank
    found = Sum(b, a, part.scale)
    return found.transpose if transposed else found


class Orientation:
    """Finds out whether square weights are transposed, from others that are not square."""

    def __init__(self, parts: Iterable[Part], shapes: dict[str, tuple[int, ...]], flag: bool):
        """Of the known `shapes` of all tensors, and `fan_in_fan_out`."""
        self.flag = flag
        self.seen: dict[bool, set[tuple[str, str]]] = {False: set(), True: set()}
        for part in parts:
            if len(found := orientations(part, shapes.get(part.name, ()))) == 1:
                self.seen[found[0]].add(_group(part.kind, part.name))
        # A bias has the length of the outputs. Of experts it tells nothing: whether PEFT's A
        # belongs to their inputs depends on the version of `transformers`.
        for name, shape in shapes.items():
            (outputs,) = shapes.get(name.removesuffix("weight") + "bias", (0,))[:1] or (0,)
            if len(shape) == 2 and shape[0] != shape[1] and outputs in shape:
                self.seen[outputs == shape[1]].add(_group("linear", name))

    def of(self, part: Part, fits: Collection[bool]) -> bool | None:
        """Whether `part` is transposed, where several orientations fit; None if nothing tells."""
        if len(fits) == 1:
            return next(iter(fits))
        group = _group(part.kind, part.name)
        votes = [t for t in (False, True) if group in self.seen[t]]
        if len(votes) == 1:
            return votes[0]
        mixed = any(kind == "linear" for kind, _ in self.seen[not self.flag])
        return None if votes or mixed or part.kind == "experts" else self.flag


def _group(kind: str, name: str) -> tuple[str, str]:
    """What has one orientation: the modules of one last name."""
    return kind, name.rpartition(".")[0].rpartition(".")[2]
