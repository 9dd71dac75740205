"""Finds the parameters of a model in its checkpoint, which may have other names.

The names of a model with a head have a first component that those of a model without one lack.
`transformers` 5 renames modules of checkpoints, splits fused weights, and joins others, such as
those of single experts. The names in the adapter decide which of this applies.
"""

import collections
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any

from ..._errors import InputError
from ._dialects import find_dialects
from ._replace import Fits, Place, Shapes, find_places, module_of
from ._views import (
    Experts,
    Named,
    View,
    find_experts,
    join_experts,
    join_modules,
    split,
    view_tensors,
)


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
        return self[name].tensor if name in self else name


_FIRSTS = 100  # first components of names that are tried


def find_models(
    wanted: Collection[str], shapes: Shapes, fits: Fits, heads: int = 0
) -> Iterator[Model]:
    """Finds the parameters of the model, under the names that match most of `wanted`.

    If none match all, one replacement in all names is searched that makes them match.

    Args:
        wanted: the names of the adapter's parameters.
        shapes: the shapes of the checkpoint's tensors.
        fits: whether a tensor of a shape can be the parameter of a name.
        heads: the heads of a vision tower, if they are known.

    Yields:
        The possible models: those of several versions of `transformers` that match equally many,
        and each with the checkpoint's names in the parts where the adapter has no others.

    Raises:
        ValueError: if several prefixes match equally many, or several replacements all names.
    """
    best, most = list[tuple[Named, list[tuple[str, str]]]](), -1
    stored = view_tensors(shapes)
    experts = find_experts(shapes)
    tried = list(_list_named(wanted, stored, experts, heads))
    for named, joined in tried:
        there = named.keys() | joined.keys() if joined else named.keys()
        # A model may partly have the names of the checkpoint.
        known = {name for name in wanted if name in there or name in stored}
        ways = [("", ""), *((p, "") for p in _firsts(named)), *(("", p) for p in _firsts(wanted))]
        counts = _count(ways, wanted, there, known)
        if max(counts) > most:
            best = []
            most = max(counts)
        if max(counts) == most:
            best.append((named, [w for w, n in zip(ways, counts, strict=True) if n == most]))
    if most < len(wanted) and (replaced := _replace(wanted, tried, fits)):
        model = _make_model(wanted, replaced, "", "", stored, experts)
        if sum(name in model for name in wanted) > most:
            model.prefix = None  # where a new head would be is not known
            yield model
            return
    unique = [(named, w[0]) for named, w in best if len(w) == 1 or w[0] == ("", "")]
    if not unique:
        parts = ", ".join(repr(add or strip) for add, strip in best[0][1])
        raise InputError(
            f"`adapter` fits the checkpoint of `src_dir` with several prefixes, {parts}. Rename "
            "the modules of the adapter as in the checkpoint.",
        )
    for named, way in unique:
        for reading in _list_readings(wanted, named, stored, *way):
            yield _make_model(wanted, reading, *way, stored, experts)


def _list_named(
    wanted: Collection[str], stored: Named, experts: Experts, heads: int
) -> Iterator[tuple[Named, Named]]:
    """Yields the parameters in each dialect: those in one tensor, and those of several."""
    tried = list[Named]()
    possible = list(find_dialects(stored.keys()))
    old = list(filter(_make_finder(rule for dialect in possible for rule in dialect), stored))
    for dialect in possible:
        named = _rename(dialect, stored, old, heads)
        if named not in tried:
            tried.append(named)
            joined = join_experts(named, stored, experts) | join_modules(named, wanted)
            yield named, joined


def _replace(
    wanted: Collection[str],
    possible: Iterable[tuple[Named, Named]],
    fits: Fits,
) -> Named | None:
    """Names the tensors by the one replacement, in one of the `possible` dialects, that fits."""
    found = dict[tuple[View | None, ...], tuple[Named, Place]]()
    for named, joined in possible:
        there = {**named, **joined}
        shapes = {name: view.shape for name, view in there.items()}
        for place in find_places(wanted, shapes, fits):
            key = tuple(there.get(place.images.get(name, name)) for name in wanted)
            if key not in found or found[key][1].renamed is None:
                found[key] = named, place
    plausible = [(named, x.renamed) for named, x in found.values() if x.renamed is not None]
    if plausible and len(found) > 1:
        ways = ", or ".join(str(place.way) for _, place in [*found.values()][:4])
        raise InputError(
            f"`adapter` fits the checkpoint of `src_dir` with several replacements in its names: "
            f"{ways}. Rename the modules of the adapter as in the checkpoint.",
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
    stored: Named,
    experts: Experts,
) -> Model:
    wanted = set(wanted)
    own = {n: x for n in wanted if (x := named.get(n, stored.get(n)))}
    as_stored = own.keys() - named.keys()  # these have only the checkpoint's names
    if as_stored or add or strip:
        rest = ((strip + n.removeprefix(add), n) for n in named if n.startswith(add))
        # What is wanted under its name has no other, unless that is wanted too.
        names = {new: n for new, n in rest if n not in own or new in wanted}
        named = {
            new: x for new, n in names.items() if (x := named[n]).tensor not in as_stored
        } | own
    stacks = join_experts(named, stored, experts)
    pairs = join_modules(named, wanted)
    model = Model(named)
    for joined in (stacks, pairs) if pairs.keys() & wanted else (stacks,):
        # The model has single experts, or such modules, only if the adapter adapts one of them.
        pieces = {piece.tensor for view in joined.values() for piece in view.pieces}
        single = {name for name, view in named.items() if view.tensor in pieces}
        if not set(map(module_of, wanted)) & set(map(module_of, single)):
            model = Model({name: view for name, view in model.items() if name not in single})
        model = Model(joined | model if joined.keys() & wanted else model)
    model.prefix = None if add or (strip and as_stored) else strip
    return model


def _list_readings(
    wanted: Iterable[str], named: Named, stored: Named, add: str, strip: str
) -> list[Named]:
    """Lists `named` and, if they differ, the tensors' own names where no others are wanted.

    An encoder may have other names than in the checkpoint, and its decoder the same.
    """
    here = {*wanted, *(add + name.removeprefix(strip) for name in wanted)}
    new = {n: x.tensor.partition(".")[0] for n, x in named.items() if n != x.tensor}
    used = {first for name, first in new.items() if name in here}
    unused = {name for name, first in new.items() if first not in used}
    kept = [(x.tensor, stored[x.tensor]) if n in unused else (n, x) for n, x in named.items()]
    return [named, dict(kept[::-1])] if unused else [named]


def _make_finder(rules: Iterable[tuple[str, str]]) -> Callable[[str], Any]:
    """Makes a predicate: whether any of the rules changes a name."""
    return re.compile("|".join(f"(?:{old})" for old, _ in dict.fromkeys(rules))).search


def _rename(
    dialect: Sequence[tuple[str, str]], stored: Named, old: Iterable[str], heads: int
) -> dict[str, View]:
    """Gives the parameters in a checkpoint new names; only `old` names are renamed."""
    renamed = {}
    rules = [(re.compile(pattern), modern) for pattern, modern in dialect]
    for name in filter(_make_finder(dialect), old):
        new = name
        for pattern, modern in rules:
            new = pattern.sub(modern, new)
        renamed[name] = new
    found: dict[str, View] = {}
    for name, view in stored.items():
        new = renamed.get(name, name)
        parts = split(new, view, heads) if "{" in new and "{" not in name else {new: view}
        for part, x in parts.items():
            found.setdefault(part, x)
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
