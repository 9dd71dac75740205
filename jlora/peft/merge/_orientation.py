"""What is added to a weight, and whether the weight is transposed as against it."""

from collections.abc import Collection, Iterable
from typing import NamedTuple

import numpy as np

from ..adapter._contents import Part
from ..adapter._parameters import matrix, orientations


class Sum(NamedTuple):
    """What is added to a weight whose axes are flattened to (stack, rows, columns).

    Attributes:
        left: (stack, rows, r).
        right: (stack, r, columns).
        scale: s.
        m: the norms that DoRA gives the rows of the sum, (rows,), or its columns; or None.
        by_rows: whether those of the rows.
    """

    left: np.ndarray
    right: np.ndarray
    scale: float
    m: np.ndarray | None = None
    by_rows: bool = True

    @property
    def transpose(self) -> "Sum":
        """The same for the transposed weight."""
        left, right = self.right.swapaxes(1, 2), self.left.swapaxes(1, 2)
        return Sum(left, right, self.scale, self.m, not self.by_rows)


def as_sum(part: Part, shape: tuple[int, ...], transposed: bool) -> Sum:
    """What `part` adds to the weight of `shape`."""
    count = shape[0] if part.kind == "experts" else 1
    rows, columns = matrix(part)
    b = part.b.reshape(rows, -1, count).transpose(2, 0, 1)  # rank outside of experts
    a = part.a.reshape(count, -1, columns)  # experts outside of rank
    found = Sum(b, a, part.scale, None if part.m is None else part.m.reshape(-1))
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
        """Whether `part` is transposed, of the orientations that fit; None if nothing tells."""
        if len(fits) == 1:
            return next(iter(fits))
        assert fits, part.name
        group = _group(part.kind, part.name)
        votes = [t for t in (False, True) if group in self.seen[t]]
        if len(votes) == 1:
            return votes[0]
        mixed = any(kind == "linear" for kind, _ in self.seen[not self.flag])
        return None if votes or mixed or part.kind == "experts" else self.flag


def _group(kind: str, name: str) -> tuple[str, str]:
    """What has one orientation: the modules of one last name."""
    return kind, name.rpartition(".")[0].rpartition(".")[2]
