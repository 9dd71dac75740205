"""Finds the edit of each tensor, and whether it adds B·A or its transpose."""

from collections.abc import Sequence

import numpy as np

from .._problems import Problems
from .._write import Edit
from ..adapter._contents import Contents, Part
from ..adapter._parameters import Shapes, list_orientations
from ._blocks import NewRows, NewValues, Sum
from ._renaming import Model


def find_edits(
    model: Model, contents: Contents, is_transposed: bool, problems: Problems
) -> dict[str, Edit]:
    """Finds the edit of each tensor that changes; `is_transposed` is `fan_in_fan_out`."""
    found: dict[str, Edit] = {
        model.tensor(n): NewValues(x) for n, x in contents.full.items() if n in model
    }
    transposed = _find_transposed(contents.parts, model.shapes, is_transposed)
    for part in contents.parts:
        if (view := model.get(part.name)) is None:
            continue  # a tied weight, which another part changes
        if (flip := transposed[part.name]) is None:
            why = "is square, and may be stored as (inputs, outputs) or"
            problems.add(part.name, f"{why} (outputs, inputs)")
            continue
        change = _make_sum(part, view.shape, flip)
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


def _find_transposed(parts: Sequence[Part], shapes: Shapes, flag: bool) -> dict[str, bool | None]:
    """Finds out whether the weight of each part is transposed; None if it is not known.

    A square weight is like those with its last name that are not square. If there are none, `flag`
    (`fan_in_fan_out`) decides, unless other weights contradict it.
    """
    fits = {part.name: list_orientations(part, shapes.get(part.name, ())) for part in parts}
    groups = {part.name: _group(part.kind, part.name) for part in parts}
    seen = {t: {groups[n] for n, found in fits.items() if found == [t]} for t in (False, True)}
    # A bias has the length of the outputs. Biases of experts are not used: whether PEFT's A
    # has their inputs depends on the version of `transformers`.
    for name, shape in shapes.items():
        (outputs,) = shapes.get(name.removesuffix("weight") + "bias", (0,))[:1] or (0,)
        if len(shape) == 2 and shape[0] != shape[1] and outputs in shape:
            seen[outputs == shape[1]].add(_group("linear", name))
    is_mixed = any(kind == "linear" for kind, _ in seen[not flag])

    def of(part: Part) -> bool | None:
        votes = [t for t in (False, True) if groups[part.name] in seen[t]]
        votes = fits[part.name] if len(fits[part.name]) == 1 else votes
        if len(votes) == 1:
            return votes[0]
        return None if votes or is_mixed or part.kind == "experts" else flag

    return {part.name: of(part) for part in parts}


def _group(kind: str, name: str) -> tuple[str, str]:
    """Returns a key for modules with the same orientation: kind and last name."""
    return kind, name.rpartition(".")[0].rpartition(".")[2]
