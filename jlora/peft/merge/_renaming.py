"""Finds the parameters of a model in its checkpoint, which may have other names.

The names of a model with a head have a first component that those of a model without one lack.
`transformers` 5 renames modules of checkpoints, and joins single experts to one parameter. The
names in the adapter decide which of this applies.
"""

import collections
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..names._leaves import FUSED
from ._dialects import find_dialects
from ._replace import Fits, Place, Shapes, find_places


class Piece(NamedTuple):
    """A tensor of the checkpoint that is a parameter, or some rows of one expert in it.

    Attributes:
        tensor: its name.
        expert: the expert; None if the tensor is the whole parameter.
        start: the first row of the expert that it has.
        rows: the number of its rows.
    """

    tensor: str
    expert: int | None = None
    start: int = 0
    rows: int = 0


class View(NamedTuple):
    """A parameter of the model: its shape, and the tensors that it consists of."""

    shape: tuple[int, ...]
    pieces: tuple[Piece, ...]


class Model(dict[str, View]):
    """The parameters in a checkpoint, under the names that the adapter uses.

    Attributes:
        prefix: the first component that the checkpoint's names lack; None if only some lack it, or
            if they have one more.
    """

    prefix: str | None = ""

    @property
    def shapes(self) -> dict[str, tuple[int, ...]]:
        """The shapes of all parameters."""
        return {name: view.shape for name, view in self.items()}

    def tensor(self, name: str) -> str:
        """Returns the first tensor of a parameter, or `name` if the checkpoint has none."""
        return self[name].pieces[0].tensor if name in self else name


Named = Mapping[str, str]  # the tensors by their names in the model
Experts = Mapping[str, re.Match[str]]

_EXPERT = re.compile(r"(?P<module>.+)\.(?P<expert>\d{1,6})\.(?P<part>\w+)\.weight")
_FIRSTS = 100  # first components of names that are tried


def find_models(wanted: Collection[str], shapes: Shapes, fits: Fits) -> Iterator[Model]:
    """Finds the parameters of the model, under the names that match most of `wanted`.

    If none match all, one replacement in all names is searched that makes them match.

    Args:
        wanted: the names of the adapter's parameters.
        shapes: the shapes of the checkpoint's tensors.
        fits: whether a tensor of a shape can be the parameter of a name.

    Yields:
        The possible models: those of several versions of `transformers` that match equally many,
        and each with the checkpoint's names in the parts where the adapter has no others.

    Raises:
        ValueError: if several prefixes match equally many, or several replacements all names.
    """
    best, most = list[tuple[Named, list[tuple[str, str]]]](), -1
    experts = _find_experts(shapes)
    tried = list(_list_named(shapes, experts))
    for named, fused in tried:
        there = named.keys() | fused.keys() if fused else named.keys()
        # A model may partly have the names of the checkpoint.
        known = {name for name in wanted if name in there or name in shapes}
        ways = [("", ""), *((p, "") for p in _firsts(named)), *(("", p) for p in _firsts(wanted))]
        counts = _count(ways, wanted, there, known)
        if max(counts) > most:
            best = []
            most = max(counts)
        if max(counts) == most:
            best.append((named, [w for w, n in zip(ways, counts, strict=True) if n == most]))
    if most < len(wanted) and (replaced := _replace(wanted, tried, shapes, fits)):
        model = _make_model(wanted, replaced, "", "", shapes, experts)
        if sum(name in model for name in wanted) > most:
            model.prefix = None  # where a new head would be is not known
            yield model
            return
    unique = [(named, w[0]) for named, w in best if len(w) == 1 or w[0] == ("", "")]
    if not unique:
        parts = ", ".join(repr(add or strip) for add, strip in best[0][1])
        raise ValueError(
            f"`adapter` fits the checkpoint of `src_dir` with several prefixes, {parts}. Rename "
            "the modules of the adapter as in the checkpoint."
        )
    for named, way in unique:
        for reading in _list_readings(wanted, named, *way):
            yield _make_model(wanted, reading, *way, shapes, experts)


def _list_named(shapes: Shapes, experts: Experts) -> Iterator[tuple[Named, dict[str, View]]]:
    """Yields the names of all tensors, and the parameters of experts, in each dialect."""
    tried = list[Named]()
    possible = list(find_dialects(shapes))
    old = list(filter(_make_finder(rule for dialect in possible for rule in dialect), shapes))
    for dialect in possible:
        named = _rename(dialect, shapes, old)
        if named not in tried:
            tried.append(named)
            yield named, _fuse(named, shapes, experts)


def _replace(
    wanted: Collection[str],
    possible: Iterable[tuple[Named, Mapping[str, View]]],
    shapes: Shapes,
    fits: Fits,
) -> Named | None:
    """Names the tensors by the one replacement, in one of the `possible` dialects, that fits."""
    found = dict[tuple[str, ...], tuple[Named, Place]]()
    for named, fused in possible:
        there = {name: shapes[x] for name, x in named.items()}
        there |= {name: view.shape for name, view in fused.items()}
        for place in find_places(wanted, there, fits):
            images = (place.images.get(name, name) for name in wanted)
            key = tuple(named.get(image, image) for image in images)
            if key not in found or found[key][1].renamed is None:
                found[key] = named, place
    plausible = [(named, x.renamed) for named, x in found.values() if x.renamed is not None]
    if plausible and len(found) > 1:
        ways = ", or ".join(str(place.way) for _, place in [*found.values()][:4])
        raise ValueError(
            "`adapter` fits the checkpoint of `src_dir` with several replacements in its names: "
            f"{ways}. Rename the modules of the adapter as in the checkpoint."
        )
    for named, renamed in plausible:
        kept = {name: name for name in named.keys() - set(renamed.values())}
        return {name: named[x] for name, x in (kept | renamed).items() if x in named}
    return None


def _make_model(
    wanted: Collection[str],
    named: Named,
    add: str,
    strip: str,
    shapes: Shapes,
    experts: Experts,
) -> Model:
    wanted = set(wanted)
    own = {n: named.get(n, n) for n in wanted if n in named or n in shapes}
    as_stored = own.keys() - named.keys()  # these have only the checkpoint's names
    if as_stored or add or strip:
        rest = ((strip + n.removeprefix(add), n) for n in named if n.startswith(add))
        # What is wanted under its name has no other, unless that is wanted too.
        names = {new: n for new, n in rest if n not in own or new in wanted}
        named = {new: x for new, n in names.items() if (x := named[n]) not in as_stored} | own
    plain = {name: View(shapes[x], (Piece(x),)) for name, x in named.items()}
    fused = _fuse(named, shapes, experts)
    # The model has modules of single experts only if the adapter adapts such a module.
    pieces = {piece.tensor for view in fused.values() for piece in view.pieces}
    single = {name for name, x in named.items() if x in pieces}
    if not {_module(name) for name in wanted} & {_module(name) for name in single}:
        plain = {name: view for name, view in plain.items() if name not in single}
    model = Model((fused if fused.keys() & wanted else {}) | plain)
    model.prefix = None if add or (strip and as_stored) else strip
    return model


def _list_readings(wanted: Iterable[str], named: Named, add: str, strip: str) -> list[Named]:
    """Lists `named` and, if they differ, the tensors' own names where no others are wanted.

    An encoder may have other names than in the checkpoint, and its decoder the same.
    """
    here = {*wanted, *(add + name.removeprefix(strip) for name in wanted)}
    new = {name: x.partition(".")[0] for name, x in named.items() if name != x}
    used = {first for name, first in new.items() if name in here}
    unused = {name for name, first in new.items() if first not in used}
    kept = {named[name] if name in unused else name: x for name, x in [*named.items()][::-1]}
    return [named, kept] if unused else [named]


def _module(name: str) -> str:
    return name.rpartition(".")[0]


def _make_finder(rules: Iterable[tuple[str, str]]) -> Callable[[str], Any]:
    """Makes a predicate: whether any of the rules changes a name."""
    return re.compile("|".join(f"(?:{old})" for old, _ in dict.fromkeys(rules))).search


def _rename(
    dialect: Sequence[tuple[str, str]], names: Iterable[str], old: Iterable[str]
) -> dict[str, str]:
    """Maps new names to the checkpoint's `names`; only `old` names are renamed."""
    renamed = {}
    rules = [(re.compile(pattern), modern) for pattern, modern in dialect]
    for name in filter(_make_finder(dialect), old):
        new = name
        for pattern, modern in rules:
            new = pattern.sub(modern, new)
        renamed[name] = new
    found: dict[str, str] = {}
    for name in names:
        found.setdefault(renamed.get(name, name), name)
    return found


def _firsts(names: Iterable[str]) -> list[str]:
    return list(dict.fromkeys(name.partition(".")[0] + "." for name in names))[:_FIRSTS]


def _count(
    ways: Collection[tuple[str, str]],
    wanted: Collection[str],
    named: Collection[str],
    known: Collection[str],
) -> list[int]:
    """Counts the `wanted` names that each way finds; it adds or removes a first component."""
    lost = {n for n in wanted if n not in known}
    same = sum(n in known for n in wanted)
    named = named if lost else ()
    longer = (name.partition(".") for name in named)
    added = collections.Counter(first + "." for first, _, rest in longer if rest in lost)
    shorter = (name.partition(".") for name in lost)
    stripped = collections.Counter(first + "." for first, _, rest in shorter if rest in named)
    return [same + (added[add] if add else stripped[strip] if strip else 0) for add, strip in ways]


def _find_experts(names: Iterable[str]) -> Experts:
    """Finds the weights of single experts, with the components of their names."""
    return {name: found for name in names if (found := _EXPERT.fullmatch(name))}


def _fuse(named: Named, shapes: Shapes, experts: Experts) -> dict[str, View]:
    """Makes the parameters of all experts of each module: (experts, rows, columns)."""
    modules: dict[str, dict[str, dict[int, str]]] = {}
    new = {name: _EXPERT.fullmatch(name) for name in named if name not in shapes}
    both = {**experts, **new} if new else experts
    for name, found in both.items():
        tensor = named.get(name)
        if found and tensor is not None and len(shapes[tensor]) == 2:
            parts = modules.setdefault(found["module"], {})
            parts.setdefault(found["part"], {})[int(found["expert"])] = tensor
    views = {}
    for module, parts in modules.items():
        for parameter, ways in FUSED.items():
            for way in ways:
                if view := _join([parts.get(part, {}) for part in way], shapes):
                    views[f"{module}.{parameter}"] = view
    return views


def _join(parts: list[dict[int, str]], shapes: Shapes) -> View | None:
    """Concatenates the rows of `parts` for each expert; None if their shapes do not fit."""
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
