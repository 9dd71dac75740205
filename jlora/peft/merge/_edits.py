"""Finds the edit of each tensor."""

import numpy as np

from .._problems import Problems
from .._write import Edit
from ..adapter._contents import Contents, Part
from ..adapter._parameters import list_orientations
from ._blocks import NewRows, NewValues, Sum
from ._renaming import Model


def find_edits(model: Model, contents: Contents, problems: Problems) -> dict[str, Edit]:
    """Finds the edit of each tensor that changes."""
    found: dict[str, Edit] = {
        model.tensor(n): NewValues(x) for n, x in contents.full.items() if n in model
    }
    for part in contents.parts:
        if (view := model.get(part.name)) is None:
            continue  # a tied weight, which another part changes
        if len(flips := list_orientations(part, view.shape)) > 1:
            why = "is square, and may be stored as (inputs, outputs) or"
            problems.add(part.name, f"{why} (outputs, inputs)")
            continue
        change = _make_sum(part, view.shape, *flips)
        for tensor, expert, start, rows in view.pieces:
            if tensor in found:
                problems.add(tensor, "changed twice by the adapter, under two names")
            found[tensor] = change if expert is None else change.of_rows(expert, start, rows)
    one = np.ones((1, 1, 1), np.float32)
    biases = {n: Sum(x.reshape(1, -1, 1), one, scale) for n, (x, scale) in contents.biases.items()}
    rows = {name: NewRows(x) for name, x in contents.tokens.items()}
    return found | {model.tensor(name): x for name, x in (biases | rows).items()}


def _make_sum(part: Part, shape: tuple[int, ...], transposed: bool) -> Sum:
    """Makes the sum that adds `part` to a weight of `shape`."""
    count = shape[0] if part.kind == "experts" else 1
    rows, columns = part.matrix
    b = part.b.reshape(rows, -1, count).transpose(2, 0, 1)  # rank outside of experts
    a = part.a.reshape(count, -1, columns)  # experts outside of rank
    found = Sum(b, a, part.scale, None if part.m is None else part.m.reshape(-1))
    return found.transpose if transposed else found
