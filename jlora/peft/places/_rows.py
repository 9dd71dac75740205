"""Rows that say which parameters a stored tensor has.

A row is `stored[cut]: name[cut]`, both the beginning of names up to a whole component; what follows
is the same in both. `{}` is a number. In a cut, `j/n` is the j-th of n parts of the rows, in a
tensor of n equal ones, and `{}` before it the index of a tensor in a stack of them. The row with
the most components wins.
"""

import collections
import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from ._views import ALL, Piece, Places, Shape, Shapes, View

_TEXT = re.compile(r"(?P<name>[^\[]*)(\[(?P<index>\{\})?,?((?P<part>\d+)/(?P<parts>\d+))?\])?")


class Cut(NamedTuple):
    """Rows of an array whose size is not known yet.

    Attributes:
        is_indexed: whether the array is in a stack.
        part: the number of the part.
        parts: the number of parts.
    """

    is_indexed: bool = False
    part: int = 0
    parts: int = 1


class Template(NamedTuple):
    """One side of a row: the first components of names, and a cut."""

    names: tuple[str, ...]
    cut: Cut


class Matched(NamedTuple):
    """The rows of a stored name, its numbers where they have `{}`, and its other components."""

    rows: Sequence[tuple[Template, Template]]
    numbers: tuple[str, ...]
    rest: tuple[str, ...]


class Renaming:
    """The rows of a class of models, by the components of stored names."""

    def __init__(self, texts: Mapping[str, str]):
        """Reads the rows."""
        self._tree: dict[str, Any] = {}
        self._whole = list[tuple[tuple[str, ...], tuple[str, ...]]]()
        for stored, name in texts.items():
            row = _read(stored), _read(name)
            if row[0].cut == row[1].cut == Cut() and not {"{}", "*"}.intersection(row[0].names):
                self._whole.append((row[0].names, row[1].names))
            node = self._tree
            for part in row[0].names:
                node = node.setdefault(part, {})
            node.setdefault("", []).append(row)

    def list_stored(self, name: str) -> list[str]:
        """Lists stored names that may have a whole parameter, without numbers in them."""
        found = list[str]()
        for stored, own in self._whole:
            names = tuple(name.split("."))
            if names[: len(own)] == own:
                found.append(".".join((*stored, *names[len(own) :])))
        return found

    def name(self, shapes: Shapes) -> Places:
        """Names the parameters in stored tensors."""
        found = Places()
        pieces = collections.defaultdict[str, dict[tuple[int, int], tuple[Cut, Shape, Piece]]](dict)
        for tensor, shape in shapes.items():
            matched = _find(self._tree, tuple(tensor.split("."))) or Matched((), (), ())
            for stored, own in matched.rows:
                names = [*own.names, "{}"] if own.cut.is_indexed else own.names
                index, name = _fill(names, matched, own.cut.is_indexed)
                if cut := _cut(stored.cut, shape):
                    at, size = cut
                    pieces[name][index, own.cut.part] = own.cut, size, Piece(tensor, at)
            if not matched.rows:
                found[tensor] = View(shape, (Piece(tensor),))
        for name, own in pieces.items():
            if view := _join(own):
                found[name] = view
        return found


def is_number(part: str) -> bool:
    """Whether a component of a name is a number."""
    return len(part) < 9 and part.isdecimal()


def _find(node: Mapping[str, Any], parts: tuple[str, ...]) -> Matched | None:
    """Finds the rows with the most components, below a node of the tree."""
    for key in (parts[0], "{}") if parts and is_number(parts[0]) else parts[:1]:
        if key in node and (found := _find(node[key], parts[1:])):
            return found._replace(numbers=parts[:1] * (key == "{}") + found.numbers)
    return Matched(node[""], (), parts) if "" in node else None


def _fill(names: Sequence[str], matched: Matched, is_indexed: bool) -> tuple[int, str]:
    """Fills in numbers; the last is the index in a stack, if there is one."""
    left = iter(matched.numbers)
    parts = [next(left) if part == "{}" else part for part in names]
    index = int(parts.pop()) if is_indexed else 0
    return index, ".".join((*parts, *matched.rest))


def _read(text: str) -> Template:
    matched = _TEXT.fullmatch(text)
    assert matched, text
    names = tuple(part for part in matched["name"].split(".") if part)
    part, parts = int(matched["part"] or 0), int(matched["parts"] or 1)
    return Template(names, Cut(bool(matched["index"]), part, parts))


def _cut(cut: Cut, shape: Shape) -> tuple[slice, Shape] | None:
    """Returns the rows of one of equal parts of a tensor, and its shape; None if it has none."""
    if cut.parts == 1:
        return ALL, shape
    if not shape or shape[0] % cut.parts:
        return None
    size = shape[0] // cut.parts
    return slice(cut.part * size, (cut.part + 1) * size), (size, *shape[1:])


def _join(pieces: Mapping[tuple[int, int], tuple[Cut, Shape, Piece]]) -> View | None:
    """Joins pieces by index and part; None if one is missing, or their shapes do not fit."""
    [(cut, size, piece), *_] = pieces.values()
    count = len({index for index, _ in pieces})
    order = [(i, j) for i in range(count) for j in range(cut.parts)]
    if set(order) != pieces.keys():
        return None
    if not cut.is_indexed and cut.parts == 1:
        return View(size, (piece,))
    sizes = [pieces[0, j][1] for j in range(cut.parts)]
    is_even = all(pieces[i, j][1] == sizes[j] for i, j in order)
    if not is_even or not all(sizes) or len({size[1:] for size in sizes}) > 1:
        return None
    stops = [*itertools.accumulate(size[0] for size in sizes)]
    found = list[Piece]()
    for i, j in order:
        rows = ALL if cut.parts == 1 else slice(stops[j] - sizes[j][0], stops[j])
        expert = i if cut.is_indexed else None
        found.append(pieces[i, j][2]._replace(expert=expert, rows=rows))
    whole = (stops[-1], *size[1:])
    return View((count, *whole) if cut.is_indexed else whole, tuple(found))


def make_table(entry: Mapping[str, Any], has_read: bool) -> Renaming:
    """Makes the rows of a model, with and without the prefix of its base model.

    Args:
        entry: as in the file.
        has_read: whether names count that `transformers` reads, and does not write.
    """
    rows = {**entry.get("rows", {}), **(entry.get("read", {}) if has_read else {})}
    if prefix := entry.get("prefix"):
        rows |= {_prepend(prefix, stored): _prepend(prefix, own) for stored, own in rows.items()}
    return Renaming(rows)


def _prepend(prefix: str, text: str) -> str:
    return f"{prefix}.{text}".removesuffix(".")
