"""Finds the edit of each tensor, and which weights are stored as (inputs, outputs)."""

from collections.abc import Collection, Sequence

import numpy as np

from ..._errors import Problem
from .._write import Edit
from ..adapter._fits import list_orientations
from ..adapter._parts import Part, T, Values
from ..names._kinds import EXPERTS, LINEAR, Kind
from ..places._views import Places, Shapes, last_of
from ._blocks import NewValues, Parts, Sum


def find_edits(model: Places, contents: Values) -> tuple[dict[str, Edit], list[Problem]]:
    """Finds the edit of each tensor that changes."""
    found, parts = dict[str, Edit](), dict[str, dict[int, tuple[int, Edit]]]()
    changes, problems = _list_changes(model, contents)
    for name, change in changes:
        for piece in (view := model[name]).pieces:
            edit = change if view.is_tensor else change.of_rows(piece.expert, piece.rows)
            own = parts.get(piece.tensor, {})
            start = piece.at.start
            if piece.tensor in found or (own and start in (None, *own)):
                why = "changed twice by the adapter, under two names"
                problems.append(Problem(piece.tensor, why))
            if start is None:
                found[piece.tensor] = edit
            else:
                parts[piece.tensor] = own | {start: (piece.at.stop - start, edit)}
    found |= {name: Parts(x) for name, x in parts.items()}
    rows = {
        model.tensor(name): Parts(
            {row: (1, NewValues(v[None])) for row, v in zip(x.rows or (), x.x, strict=True)}
        )
        for name, x in contents.tokens.items()
    }
    for name in rows.keys() & found:
        why = "has new rows in the adapter, which also changes it as a whole"
        problems.append(Problem(name, why))
    return found | rows, problems


def _list_changes(
    model: Places, contents: Values
) -> tuple[list[tuple[str, NewValues | Sum]], list[Problem]]:
    """Lists the change of each parameter."""
    found, problems = list[tuple[str, NewValues | Sum]](), list[Problem]()
    full = (x for x in contents.full.values() if x.name in model and not x.rows)
    found += [(x.name, NewValues(x.x)) for x in full]
    for part in contents.parts:
        if (view := model.get(part.name)) is None:
            continue  # a tied weight, which another part changes
        flips = list_orientations(part, view.shape)
        if len(flips) > 1:
            why = "is square, and may be stored as (inputs, outputs) or"
            problems.append(Problem(part.name, f"{why} (outputs, inputs)"))
        elif part.m is not None and flips[0] and len(view.pieces) > 1:
            why = f"{part.method.name} of inputs, but the checkpoint has it in parts"
            problems.append(Problem(part.name, why))
        else:
            found.append((part.name, _make_sum(part, *flips)))
    one = np.ones((1, 1, 1), np.float32)
    for name, (x, scale) in contents.biases.items():
        found.append((name, Sum(x.reshape(1, -1, 1), one, scale)))
    return found, problems


def _make_sum(part: Part[np.ndarray], transposed: bool) -> Sum:
    """Makes the sum that adds `part` to a weight, which may be transposed."""
    rows, columns = part.matrix
    b = part.b.reshape(rows, -1, part.experts).transpose(2, 0, 1)  # rank outside of experts
    a = part.a.reshape(part.experts, -1, columns)  # experts outside of rank
    found = Sum(b, a, part.scale, None if part.m is None else part.m.reshape(-1))
    return found.transpose if transposed else found


# ------------------------------------------------------------------- which weights are transposed


def orient(
    parts: Sequence[Part[T]], shapes: Shapes, modules: Collection[str] | None, flag: bool
) -> list[Part[T]]:
    """Sets `transposed` of the linear parts and experts of PEFT's files.

    The model tells it. In one that `transformers` does not know, a weight is one of a `Conv1D` if
    `flag` says so and the shape fits; it stays None where the matrix is square.

    Args:
        parts: A and B of each parameter.
        shapes: the shapes of the parameters of the checkpoint.
        modules: the last names of its transposed modules, of `find_transposed`; None if unknown.
        flag: `fan_in_fan_out`. PEFT also leaves it in files of modules that ignore it.
    """

    def find(part: Part[T]) -> bool | None:
        if modules is not None or not flag:
            return last_of(part.name) in (modules or ())
        fits = list_orientations(part, shapes.get(part.name, ()))
        return fits[0] if len(fits) == 1 else None if fits else False

    own = [x._replace(transposed=find(x)) if _is_open(x, LINEAR) else x for x in parts]
    return orient_experts(own, shapes, modules)


def orient_experts(
    parts: Sequence[Part[T]], shapes: Shapes, modules: Collection[str] | None
) -> list[Part[T]]:
    """Sets `transposed` of experts. Where matrices are square, the others of the file tell it.

    These are of one version of PEFT and `transformers`, as A and B are. Without others, the model
    tells, by the last names of its `modules` with transposed experts; None if it is not known.
    """
    fits = [list_orientations(x, shapes.get(x.name, ())) for x in parts if _is_open(x, EXPERTS)]
    told = {own[0] for own in fits if len(own) == 1}

    def find(part: Part[T]) -> bool | None:
        own = list_orientations(part, shapes.get(part.name, ()))
        if len(own) == 1:
            return own[0]
        if len(told) == 1:
            return next(iter(told))
        return None if told or modules is None else last_of(part.name) in modules

    return [x._replace(transposed=find(x)) if _is_open(x, EXPERTS) else x for x in parts]


def _is_open(part: Part[T], kind: Kind) -> bool:
    return part.kind is kind and part.transposed is None
