"""Advises which name table to use for leaves that a table does not name."""

from collections.abc import Mapping, Sequence

from ..._types import Path
from ._leaves import row_of
from ._names import Name
from .tables import TABLES, WITH_PATHS


def advise(names: Sequence[Name], lost: Mapping[Path, tuple[int, ...]]) -> str:
    """Explains which model `names` is for, and which table has rows for the `lost` leaves."""
    fit = [
        repr(other)
        for other, rows in TABLES.items()
        if all(row_of(path, shape, rows) is not None for path, shape in lost.items())
    ]
    if lost and fit:
        which = " or ".join(f"jlora.peft.TABLES[{name}]" for name in fit)
        return f"{_purpose(names)} For these leaves use {which}."
    if any(row.path.startswith("params/") for row in names):
        return (
            f"{_purpose(names)} Patterns are for paths without the first `params/`: leave it out."
        )
    are_biases = bool(lost) and all(p[-1:] == ("bias",) or len(x) == 1 for p, x in lost.items())
    row = "(.*)/bias', r'\\1', 'o', 'bias" if are_biases else "(.*)/kernel', r'\\1', 'io"
    return (
        f"{_purpose(names)} Give the table of this model, have jlora.peft.find_names find its rows "
        f"in a checkpoint, or add rows of your own, such as jlora.peft.Name(r'{row}')."
    )


def _purpose(names: Sequence[Name]) -> str:
    rows = tuple(names)
    for name, (table, path) in WITH_PATHS.items():
        if rows == table:
            return f"`names` is jlora.peft.TABLES[{name!r}], for paths such as {path}."
    listed = ", ".join(repr(row.path) for row in rows[:3])
    return f"`names` has rows for paths like {listed}{', …' * (len(rows) > 3)}."
