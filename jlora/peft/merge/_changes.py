"""The changes of tensors, and which weights are transposed as against B·A."""

from collections.abc import Collection, Iterable

import numpy as np

from .._file import shown
from .._problems import Problems
from ..adapter._contents import Part
from ..adapter._parameters import Shapes, matrix, orientations
from ._blocks import Change, Full, Rows, Sum
from ._renaming import Views, shapes_of, tensor_of
from ._wanted import Wanted


def find_changes(model: Views, wanted: Wanted, problems: Problems) -> dict[str, Change]:
    """Says what is to be done to each tensor of the checkpoint that changes."""
    found: dict[str, Change] = {
        tensor_of(model, n): Full(x) for n, x in wanted.full.items() if n in model
    }
    find = _Orientation(wanted.parts, shapes_of(model), wanted.flag)
    for part in wanted.parts:
        if (view := model.get(part.name)) is None:
            continue  # it is the same as one that is there
        if (transposed := find.of(part, orientations(part, view.shape))) is None:
            problems.found.append(
                f"{shown(part.name)}: is square, and nothing tells whether it is (inputs, outputs) "
                "or (outputs, inputs)"
            )
            continue
        change = _as_sum(part, view.shape, transposed)
        for tensor, expert, start, rows in view.pieces:
            if tensor in found:
                problems.found.append(
                    f"{shown(tensor)}: changed twice by the adapter, under two names"
                )
            found[tensor] = change if expert is None else change.of_rows(expert, start, rows)
    one = np.ones((1, 1, 1), np.float32)
    biases = {n: Sum(x.reshape(1, -1, 1), one, scale) for n, (x, scale) in wanted.biases.items()}
    rows = {name: Rows(x) for name, x in wanted.rows.items()}
    return found | {tensor_of(model, name): x for name, x in (biases | rows).items()}


def _as_sum(part: Part, shape: tuple[int, ...], transposed: bool) -> Sum:
    """What `part` adds to the weight of a shape."""
    count = shape[0] if part.kind == "experts" else 1
    rows, columns = matrix(part)
    b = part.b.reshape(rows, -1, count).transpose(2, 0, 1)  # rank outside of experts
    a = part.a.reshape(count, -1, columns)  # experts outside of rank
    found = Sum(b, a, part.scale, None if part.m is None else part.m.reshape(-1))
    return found.transpose if transposed else found


class _Orientation:
    """Finds out whether square weights are transposed, from others that are not square."""

    def __init__(self, parts: Iterable[Part], shapes: Shapes, flag: bool):
        """Learns from parts, the shapes of all tensors, and `fan_in_fan_out`."""
        self.flag = flag
        self.seen: dict[bool, set[tuple[str, str]]] = {False: set(), True: set()}
        for part in parts:
            if len(found := orientations(part, shapes.get(part.name, ()))) == 1:
                self.seen[found[0]].add(_group(part.kind, part.name))
        # A bias has the length of the outputs. It tells nothing of experts: whether PEFT's A
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
    """The modules that have one orientation: those of one last name."""
    return kind, name.rpartition(".")[0].rpartition(".")[2]
