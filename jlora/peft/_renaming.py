"""What a model calls the tensors of its checkpoint, where they may have other names, or lie apart.

A model with a head and the same model without one differ in a first part; `transformers` 5 calls
modules otherwise than its checkpoints do, and adapts experts as one parameter that are stored one
by one. Which names are meant follows from those that an adapter has.
"""

import collections
import re
from collections.abc import Collection, Iterable, Mapping, Sequence
from typing import NamedTuple

from ._dialects import dialects

Shapes = Mapping[str, tuple[int, ...]]


class Piece(NamedTuple):
    """A tensor of the checkpoint that is a part of a parameter: rows of one of its experts.

    Attributes:
        tensor: its name.
        expert: which expert; None where the tensor is the parameter.
        start: its first row in the parameter.
        rows: how many it has.
    """

    tensor: str
    expert: int | None = None
    start: int = 0
    rows: int = 0


class View(NamedTuple):
    """A parameter of the model: its shape and what it is made of."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


Views = dict[str, View]

_EXPERT = re.compile(r"(?P<module>.+)\.(?P<expert>\d{1,6})\.(?P<part>\w+)\.weight")
# The parameters of all experts together, and the modules of each that they are made of.
_FUSED = {
    "gate_up_proj": (("gate_proj", "up_proj"), ("w1", "w3")),
    "down_proj": (("down_proj",), ("w2",)),
}
_FIRSTS = 100  # first parts of names that are tried


def views(wanted: Collection[str], shapes: Shapes) -> list[Views]:
    """The parameters of the model, under the names that find the most of `wanted`.

    Several where the names of several versions find as many.

    Raises:
        ValueError: if names with either of two first parts find as many.
    """
    best, most = list[tuple[dict[str, str], list[tuple[str, str]]]](), -1
    tried = list[dict[str, str]]()
    for dialect in dialects(shapes):
        named = _named(dialect, shapes)
        if named in tried:
            continue
        tried.append(named)
        fused = named.keys() | _fused(named, shapes).keys()
        known = fused | shapes.keys()  # as a part of a model may have the names of the checkpoint
        ways = [("", ""), *((p, "") for p in _firsts(named)), *(("", p) for p in _firsts(wanted))]
        counts = _counts(ways, wanted, fused, known)
        if max(counts) > most:
            best, most = [], max(counts)
        if max(counts) == most:
            best.append((named, [w for w, n in zip(ways, counts, strict=True) if n == most]))
    clear = [(named, w[0]) for named, w in best if len(w) == 1 or w[0] == ("", "")]
    if not clear:
        parts = ", ".join(repr(add or strip) for add, strip in best[0][1])
        raise ValueError(
            f"`adapter` fits the checkpoint of `src_dir` with either of {parts} before its names. "
            "Rename its modules as they are in the checkpoint."
        )
    return [_views(wanted, named, add, strip, shapes) for named, (add, strip) in clear]


def _views(
    wanted: Collection[str], named: Mapping[str, str], add: str, strip: str, shapes: Shapes
) -> Views:
    own = {n: named.get(n, n) for n in wanted if n in named or n in shapes}
    taken = own.keys() - named.keys()  # by the checkpoint's names, and so by no others
    rest = {n: x for n, x in named.items() if n.startswith(add) and x not in taken}
    named = {strip + n.removeprefix(add): x for n, x in rest.items()} | own
    plain = {name: View(shapes[x], (Piece(x),)) for name, x in named.items()}
    fused = _fused(named, shapes)
    # Whoever adapts no expert by itself has no modules of them.
    apart = {piece.tensor for view in fused.values() for piece in view.pieces}
    alone = {name for name, x in named.items() if x in apart}
    if not {_module(name) for name in wanted} & {_module(name) for name in alone}:
        plain = {name: view for name, view in plain.items() if name not in alone}
    return (fused if fused.keys() & set(wanted) else {}) | plain


def shapes_of(views: Views) -> dict[str, tuple[int, ...]]:
    """Of all parameters."""
    return {name: view.shape for name, view in views.items()}


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _named(dialect: Sequence[tuple[str, str]], names: Iterable[str]) -> dict[str, str]:
    """The names of a dialect, and what the checkpoint calls them."""
    found, is_old = {}, re.compile("|".join(f"(?:{old})" for old, _ in dialect)).search
    for name in names:
        new = name
        for old, modern in dialect if is_old(name) else ():
            new = re.sub(old, modern, new)
        found.setdefault(new, name)
    return found


def _firsts(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.partition(".")[0] + "." for name in names))[:_FIRSTS]


def _counts(
    ways: Collection[tuple[str, str]],
    wanted: Collection[str],
    named: Collection[str],
    known: Collection[str],
) -> list[int]:
    """How many of `wanted` each way finds: as they are, or with a first part added or taken off."""
    lost, same = {n for n in wanted if n not in known}, sum(n in known for n in wanted)
    longer = (name.partition(".") for name in named)
    added = collections.Counter(first + "." for first, _, rest in longer if rest in lost)
    shorter = (name.partition(".") for name in lost)
    stripped = collections.Counter(first + "." for first, _, rest in shorter if rest in named)
    return [same + (added[add] if add else stripped[strip] if strip else 0) for add, strip in ways]


def _fused(named: Mapping[str, str], shapes: Shapes) -> Views:
    """Parameters of all experts together: (experts, rows, columns)."""
    modules: dict[str, dict[str, dict[int, str]]] = {}
    for name, tensor in named.items():
        if (found := _EXPERT.fullmatch(name)) and len(shapes[tensor]) == 2:
            parts = modules.setdefault(found["module"], {})
            parts.setdefault(found["part"], {})[int(found["expert"])] = tensor
    views = {}
    for module, parts in modules.items():
        for parameter, ways in _FUSED.items():
            for way in ways:
                if (view := _together([parts.get(part, {}) for part in way], shapes)) is not None:
                    views[f"{module}.{parameter}"] = view
    return views


def _together(parts: list[dict[int, str]], shapes: Shapes) -> View | None:
    """The rows of `parts` one below the other, for each expert."""
    count = len(parts[0])
    sizes = [{shapes[tensor] for tensor in part.values()} for part in parts]
    if not count or any(set(part) != set(range(count)) for part in parts):
        return None
    if any(len(each) > 1 for each in sizes):
        return None
    rows, columns = zip(*(next(iter(each)) for each in sizes), strict=True)
    if len(set(columns)) > 1:
        return None
    pieces = [
        Piece(part[e], e, sum(rows[:i]), rows[i])
        for e in range(count)
        for i, part in enumerate(parts)
    ]
    return View((count, sum(rows), columns[0]), tuple(pieces))
