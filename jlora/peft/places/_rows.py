"""Rows that say which parameters a stored tensor has.

A row is `stored[box]: name[box]`, both the beginning of names up to a whole component; what follows
is the same in both. `{}` is a number. A box has an entry for each of the first axes: `j/n` is the
j-th of n parts, in a tensor of n equal ones; `{}` the index of a tensor in a stack of them; `:` the
whole axis. The row with the most components wins.
"""

import collections
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ._views import Box, Piece, Places, Shape, Shapes, View

_TEXT = re.compile(r"(?P<name>[^\[]*)(\[(?P<box>.*)\])?")


class Cut(NamedTuple):
    """A box of an array whose size is not known yet.

    Attributes:
        is_indexed: whether the first axis is that of a stack.
        axis: the axis of the parts, after that of the stack.
        part: the number of the part.
        parts: the number of parts.
    """

    is_indexed: bool = False
    axis: int = 0
    part: int = 0
    parts: int = 1


class Side(NamedTuple):
    """One side of a row: the first components of names, and a box."""

    names: tuple[str, ...]
    cut: Cut


class Found(NamedTuple):
    """The rows of a stored name, its numbers where they have `{}`, and its other components."""

    rows: Sequence[tuple[Side, Side]]
    numbers: tuple[str, ...]
    rest: tuple[str, ...]


class Rows:
    """The rows of a class of models, by the components of stored names."""

    def __init__(self, texts: Mapping[str, str]):
        """Reads the rows."""
        self._tree: dict[str, Any] = {}
        for stored, name in texts.items():
            row = _read(stored), _read(name)
            node = self._tree
            for part in row[0].names:
                node = node.setdefault(part, {})
            node.setdefault("", []).append(row)

    def find(self, name: str) -> Found:
        """Finds the rows of a stored name; none if it is the parameter's too."""
        return _find(self._tree, tuple(name.split("."))) or Found((), (), ())

    def name(self, shapes: Shapes) -> Places:
        """Names the parameters in stored tensors."""
        found = Places()
        pieces = collections.defaultdict[str, dict[tuple[int, int], tuple[Cut, Shape, Piece]]](dict)
        for tensor, shape in shapes.items():
            matched = self.find(tensor)
            for stored, own in matched.rows:
                names = [*own.names, "{}"] if own.cut.is_indexed else own.names
                index, name = _fill(names, matched, own.cut.is_indexed)
                if cut := _cut(stored.cut, shape):
                    at, size = cut
                    pieces[name][index, own.cut.part] = own.cut, size, Piece(tensor, at)
            if not matched.rows:
                found[tensor] = View(shape, (Piece(tensor),))
        for name, own in pieces.items():
            if view := join(own):
                found[name] = view
        return found


def is_number(part: str) -> bool:
    """Whether a component of a name is a number."""
    return len(part) < 9 and part.isdecimal()


def _find(node: Mapping[str, Any], parts: tuple[str, ...]) -> Found | None:
    """Finds the rows with the most components, below a node of the tree."""
    for key in (parts[0], "{}") if parts and is_number(parts[0]) else parts[:1]:
        if key in node and (found := _find(node[key], parts[1:])):
            return found._replace(numbers=parts[:1] * (key == "{}") + found.numbers)
    return Found(node[""], (), parts) if "" in node else None


def _fill(names: Sequence[str], matched: Found, is_indexed: bool) -> tuple[int, str]:
    """Fills in numbers; the last is the index in a stack, if there is one."""
    left = iter(matched.numbers)
    parts = [next(left) if part == "{}" else part for part in names]
    index = int(parts.pop()) if is_indexed else 0
    return index, ".".join((*parts, *matched.rest))


def _read(text: str) -> Side:
    matched = _TEXT.fullmatch(text)
    assert matched, text
    names = tuple(part for part in matched["name"].split(".") if part)
    entries = (matched["box"] or "").split(",")
    is_indexed = entries[0] == "{}"
    for axis, entry in enumerate(entries[is_indexed:]):
        if "/" in entry:
            part, _, parts = entry.partition("/")
            return Side(names, Cut(is_indexed, axis, int(part), int(parts)))
    return Side(names, Cut(is_indexed))


def _cut(cut: Cut, shape: Shape) -> tuple[Box, Shape] | None:
    """Returns the box of one of equal parts of a tensor, and its shape; None if it has none."""
    if cut.parts == 1:
        return (), shape
    if cut.axis >= len(shape) or shape[cut.axis] % cut.parts:
        return None
    size = shape[cut.axis] // cut.parts
    before, after = shape[: cut.axis], shape[cut.axis + 1 :]
    box = (*(slice(n) for n in before), slice(cut.part * size, (cut.part + 1) * size))
    return box, (*before, size, *after)


def join(pieces: Mapping[tuple[int, int], tuple[Cut, Shape, Piece]]) -> View | None:
    """Joins pieces by index and part; None if one is missing, or their shapes do not fit."""
    [(cut, size, piece), *_] = pieces.values()
    count = len({index for index, _ in pieces})
    order = [(i, j) for i in range(count) for j in range(cut.parts)]
    if set(order) != pieces.keys():
        return None
    if not cut.is_indexed and cut.parts == 1:
        return View(size, (piece,))
    sizes = [pieces[0, j][1] for j in range(cut.parts)]
    axis = cut.axis
    alike = {(*size[:axis], *size[axis + 1 :]) for size in sizes}
    if len(alike) > 1 or any(pieces[i, j][1] != sizes[j] for i, j in order):
        return None
    lengths = [size[axis] for size in sizes] if cut.parts > 1 else []
    found = list[Piece]()
    for i, j in order:
        start = sum(lengths[:j])
        own = (
            (*[slice(n) for n in size[:axis]], slice(start, start + lengths[j])) if lengths else ()
        )
        found.append(pieces[i, j][2]._replace(own=(i, *own) if cut.is_indexed else own))
    whole = (*size[:axis], sum(lengths), *size[axis + 1 :]) if lengths else size
    return View((count, *whole) if cut.is_indexed else whole, tuple(found))


def make_table(entry: Mapping[str, Any], has_read: bool) -> Rows:
    """Makes the rows of a model, with and without the prefix of its base model.

    Args:
        entry: as in the file.
        has_read: whether names count that `transformers` reads, and does not write.
    """
    rows = {**entry.get("rows", {}), **(entry.get("read", {}) if has_read else {})}
    if prefix := entry.get("prefix"):
        rows |= {_prepend(prefix, stored): _prepend(prefix, own) for stored, own in rows.items()}
    return Rows(rows)


def _prepend(prefix: str, text: str) -> str:
    return f"{prefix}.{text}".removesuffix(".")
