"""Finds the edit of each tensor, and which weights are stored as (inputs, outputs)."""

from collections.abc import Sequence

import numpy as np

from ..._errors import Problem
from .._write import Edit
from ..adapter._parameters import Shapes, list_orientations
from ..adapter._parts import Part, T, Values
from ..names._kinds import EXPERTS, LINEAR, Kind
from ..places._views import Places
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
            {row: (1, NewValues(v[None])) for row, v in zip(x.rows, x.v, strict=True)}
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
    found += [(name, NewValues(x)) for name, x in contents.full.items() if name in model]
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
#
# PEFT knows it from the classes of modules; here the checkpoint has to tell. A linear weight is
# transposed only in a `Conv1D`, which always has a bias in `transformers`. A bias has as many
# numbers as there are outputs. Without one, a weight is transposed if the adapter says so, and its
# shape too.


def orient(parts: Sequence[Part[T]], shapes: Shapes, flag: bool) -> list[Part[T]]:
    """Sets `transposed` of the linear parts and experts that leave it open.

    Modules with the same last name are stored alike. If the shapes of none of them tell how,
    `flag` (`fan_in_fan_out`) decides. PEFT also writes it for modules that ignore it, so it counts
    only if the checkpoint has a `Conv1D`. `transposed` stays None where it is not known.

    Args:
        parts: A and B of each parameter.
        shapes: the shapes of the parameters of the checkpoint.
        flag: whether square weights are transposed if nothing else tells.
    """
    biased = {name: x for name in shapes if (x := _tell_by_bias(name, shapes)) is not None}
    seen = {t: {_group(LINEAR, n) for n, x in biased.items() if x is t} for t in (False, True)}
    fits = {part.name: list_orientations(part, shapes.get(part.name, ())) for part in parts}
    for part in parts:
        # A linear part that fits only the transpose may be a mistake.
        if len(own := fits[part.name]) == 1 and (part.kind is EXPERTS or own == [False]):
            seen[own[0]].add(_group(part.kind, part.name))
    has_linear, has_conv1d = (any(kind is LINEAR for kind, _ in seen[t]) for t in (False, True))

    def find(part: Part[T]) -> bool | None:
        if part.kind is LINEAR and _bias_of(part.name) not in shapes:
            return flag and fits[part.name] == [True]
        votes = [t for t in (False, True) if _group(part.kind, part.name) in seen[t]]
        votes = [biased[part.name]] if part.name in biased else votes
        if part.kind is EXPERTS and len(fits[part.name]) == 1:
            votes = fits[part.name]
        if votes or part.kind is EXPERTS:
            return votes[0] if len(votes) == 1 else None
        if has_conv1d:
            return True if flag and not has_linear else None
        return False

    return [
        part._replace(transposed=find(part))
        if part.transposed is None and part.kind.transposed is None
        else part
        for part in parts
    ]


def _tell_by_bias(name: str, shapes: Shapes) -> bool | None:
    """Whether the matrix `name` is transposed, by the length of its bias; None if that is open.

    Biases of experts are not used: whether PEFT's A has their inputs depends on the version of
    `transformers`.
    """
    shape = shapes[name]
    bias = shapes.get(_bias_of(name), ())
    if len(shape) != 2 or shape[0] == shape[1] or bias[:1] not in (shape[:1], shape[1:]):
        return None
    return bias[:1] == shape[1:]


def _bias_of(name: str) -> str:
    return name.removesuffix("weight") + "bias"


def _group(kind: Kind, name: str) -> tuple[Kind, str]:
    """Returns a key for modules with the same orientation: kind and last name."""
    return kind, name.rpartition(".")[0].rpartition(".")[2]
