"""Finds the edit of each tensor."""

from collections.abc import Iterator

import numpy as np

from .._problems import Problems
from .._write import Edit
from ..adapter._parameters import list_orientations
from ..adapter._parts import Part, Values
from ..places._views import Places
from ._blocks import NewRows, NewValues, Parts, Sum


def find_edits(model: Places, contents: Values, problems: Problems) -> dict[str, Edit]:
    """Finds the edit of each tensor that changes."""
    found, parts = dict[str, Edit](), dict[str, dict[int, tuple[int, Edit]]]()
    for name, change in _list_changes(model, contents, problems):
        for piece in (view := model[name]).pieces:
            edit = change if view.is_tensor else change.of_rows(piece.expert, piece.rows)
            own = parts.get(piece.tensor, {})
            if piece.tensor in found or (own and piece.start in (None, *own)):
                problems.add(piece.tensor, "changed twice by the adapter, under two names")
            if piece.start is None:
                found[piece.tensor] = edit
            else:
                parts[piece.tensor] = own | {piece.start: (view.shape[0], edit)}
    found |= {name: Parts(x) for name, x in parts.items()}
    rows = {model.tensor(name): NewRows(x) for name, x in contents.tokens.items()}
    for name in rows.keys() & found:
        problems.add(name, "has new rows in the adapter, which also changes it as a whole")
    return found | rows


def _list_changes(
    model: Places, contents: Values, problems: Problems
) -> Iterator[tuple[str, NewValues | Sum]]:
    """Yields the change of each parameter."""
    for name, x in contents.full.items():
        if name in model:
            yield name, NewValues(x)
    for part in contents.parts:
        if (view := model.get(part.name)) is None:
            continue  # a tied weight, which another part changes
        flips = list_orientations(part, view.shape)
        if len(flips) > 1:
            why = "is square, and may be stored as (inputs, outputs) or"
            problems.add(part.name, f"{why} (outputs, inputs)")
        elif part.m is not None and flips[0] and len(view.pieces) > 1:
            problems.add(part.name, "DoRA of inputs, but the checkpoint has it in parts")
        else:
            yield part.name, _make_sum(part, *flips)
    one = np.ones((1, 1, 1), np.float32)
    for name, (x, scale) in contents.biases.items():
        yield name, Sum(x.reshape(1, -1, 1), one, scale)


def _make_sum(part: Part[np.ndarray], transposed: bool) -> Sum:
    """Makes the sum that adds `part` to a weight, which may be transposed."""
    rows, columns = part.matrix
    b = part.b.reshape(rows, -1, part.experts).transpose(2, 0, 1)  # rank outside of experts
    a = part.a.reshape(part.experts, -1, columns)  # experts outside of rank
    found = Sum(b, a, part.scale, None if part.m is None else part.m.reshape(-1))
    return found.transpose if transposed else found
