"""Finds the parameters of a model in the tensors of its checkpoint.

A parameter is stored as it is, as `transformers` stores it, or as the user says. What has most of
the wanted names is taken; of what has equally many, the first in this order. The names in an
adapter may have a first component more than the checkpoint's, or one less: those of a model with a
head have one that those of a model without one lack.
"""

import collections
import functools
import itertools
import json
import re
from collections.abc import Collection, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from ..._errors import InputError, shorten
from .._submodels import class_of
from ._rows import Renaming, is_number, make_table
from ._views import Piece, Places, Shapes, View

Pairs = Sequence[tuple[str, str]]  # patterns of stored names, and what replaces them
Way = tuple[str, str]  # the first components that names in the model lack, and have more

_EXPERT = re.compile(r"(?P<module>.+)\.(?P<expert>\d{1,6})\.(?P<part>\w+)\.weight")
_PAIR = ("gate_proj", "up_proj")


def find(
    wanted: Collection[str],
    shapes: Shapes,
    config: Mapping[str, Any],
    renamed: Pairs = (),
    argument: str = "adapter",
) -> Iterator[Places]:
    """Finds where the parameters of a model are stored.

    Args:
        wanted: the names of parameters in the model, such as those that an adapter changes.
        shapes: the shapes of the checkpoint's tensors.
        config: its configuration.
        renamed: the user's pairs of patterns.
        argument: the user's argument that has the names, for errors.

    Yields:
        The places that have most of the `wanted` names, in the order of these ways.

    Raises:
        ValueError: if several first components fit equally well.
    """
    if renamed:
        tried = [rename(shapes, renamed)]
    else:
        tried = [*stored_as_is(shapes), *as_transformers_stores(shapes, config)]
    each = [(places, way, n) for places in tried for way, n in _list_ways(wanted, places)]
    most = max(n for *_, n in each)
    best = [(places, way) for places, way, n in each if n == most]
    ways = list(dict.fromkeys(way for places, way in best if places is best[0][0]))
    if len(ways) > 1 and ("", "") not in ways:
        listed = ", ".join(repr(add or strip) for add, strip in ways)
        raise InputError(
            argument,
            f"fits the checkpoint with several prefixes, {listed}. Rename its modules "
            "as in the checkpoint.",
        )
    way = ("", "") if ("", "") in ways else ways[0]
    for places, own in best:
        if own == way:
            yield _add_prefix(wanted, places, *way)


def stored_as_is(shapes: Shapes) -> Iterator[Places]:
    """Yields the tensors as parameters, and the same with the experts of a layer joined."""
    places = Places({name: View(shape, (Piece(name),)) for name, shape in shapes.items()})
    yield places
    joined = _join_experts(shapes)
    single = {piece.tensor for view in joined.values() for piece in view.pieces}
    old = {x: new for x in shapes if (new := _modernize(x)) != x}
    if joined or old:
        yield Places({old.get(n, n): x for n, x in places.items() if n not in single} | joined)


def _modernize(name: str) -> str:
    """Returns the name of today for a parameter in an old checkpoint, such as `LayerNorm.gamma`."""
    ends = load_table()["endings"]
    old = next((end for end in ends if name.endswith(end)), "")
    return name.removesuffix(old) + ends.get(old, "")


def _join_experts(shapes: Shapes) -> Places:
    """Makes the parameters of all experts of each module, which are stored one by one."""
    single = {
        name: found
        for name, shape in shapes.items()
        if len(shape) == 2 and (found := _EXPERT.fullmatch(name))
    }
    there = {(found["module"], found["part"]) for found in single.values()}
    rows = dict[str, str]()
    for module, part in there:
        own = f"{part}[{{}}]"
        if part in _PAIR and all((module, x) in there for x in _PAIR):
            own = f"gate_up_proj[{{}},{_PAIR.index(part)}/{len(_PAIR)}]"
        rows[f"{module}.{{}}.{part}.weight"] = f"{module}.{own}"
    return Renaming(rows).name({name: shapes[name] for name in single})


def rename(shapes: Shapes, pairs: Pairs) -> Places:
    """Names each tensor as the user's patterns say, one after the other."""
    found = Places()
    for name, shape in shapes.items():
        new = name
        for pattern, replacement in pairs:
            new = re.sub(pattern, replacement, new)
        if new in found:
            why = f"gives two tensors the same name, {new}: {found[new].tensor} and {name}."
            raise InputError("renamed", f"{why}")
        found[new] = View(shape, (Piece(name),))
    return found


# ----------------------------------------------------------------------------------- transformers


@functools.cache
def load_table() -> Mapping[str, Any]:
    """Loads what was found out about the models of `transformers`."""
    return json.loads(Path(__file__).with_name("transformers.json").read_text(encoding="utf-8"))


def as_transformers_stores(shapes: Shapes, config: Mapping[str, Any]) -> Iterator[Places]:
    """Yields the parameters of the configuration's model: as it is written, and as it is read."""
    for entry, has_read in itertools.product(_find_entries(config), (False, True)):
        rows = make_table(entry, has_read)
        yield _name_parts(rows.name(shapes), entry, config, has_read)


def _find_entries(config: Mapping[str, Any]) -> list[Mapping[str, Any]]:
    """Finds the entry of the model's class; all of its kind if the class is not known."""
    table = load_table()
    kind = str(config.get("model_type"))
    name = class_of(config)
    found = [table["models"][kind]] if kind in table["models"] else []
    own = table["classes"].get(f"{kind}/{name}", table["classes"].get(name))
    if own and (own["model"] == kind or not found):
        return [own]
    others = [] if name else [x for x in table["classes"].values() if x["model"] == kind]
    return [*found, *others]


def name_stored(name: str, config: Mapping[str, Any]) -> str:
    """Returns the name under which `transformers` would store a parameter."""
    for entry in _find_entries(config):
        rows = make_table(entry, False)
        for stored in rows.list_stored(name):
            if name in rows.name({stored: (1,)}):
                return stored
    return name


def explain_absent(name: str, config: Mapping[str, Any]) -> str:
    """Explains why no tensor is a parameter."""
    kind = config.get("model_type")
    if kind is not None and kind not in load_table()["transposed"]:
        lacking = f"model_type {shorten(kind)} jlora's map of `transformers` does not have"
        return f"not in the checkpoint, whose {lacking}"
    form = ".".join("{}" if is_number(part) else part for part in name.split("."))
    reasons = (entry.get("lost", {}).get(form) for entry in _find_entries(config))
    return next(filter(None, reasons), "not in the checkpoint")


def _name_parts(
    places: Places, entry: Mapping[str, Any], config: Mapping[str, Any], has_read: bool
) -> Places:
    """Names the parameters of submodels that are of another kind than by default."""
    start = f"{entry['prefix']}." if "prefix" in entry else ""
    parts = {
        before + path: x for path, x in entry.get("parts", {}).items() for before in ("", start)
    }
    for path, part in parts.items():
        field, _, usual = part.partition(":")
        own = config.get(field)
        kind = str(own.get("model_type")) if isinstance(own, dict) else usual
        if kind != usual and (inner := load_table()["models"].get(kind, {})):
            places = _rename_part(places, f"{path}.", make_table(inner, has_read))
    return places


def _rename_part(places: Places, start: str, rows: Renaming) -> Places:
    inside = {n.removeprefix(start): x for n, x in places.items() if n.startswith(start)}
    whole = {name: x.tensor for name, x in inside.items() if x.is_tensor}
    named = rows.name({name: inside[name].shape for name in whole})
    found = Places({n: x for n, x in places.items() if n.removeprefix(start) not in whole})
    for name, view in named.items():
        pieces = tuple(x._replace(tensor=whole[x.tensor]) for x in view.pieces)
        found[start + name] = view._replace(pieces=pieces)
    return found


# --------------------------------------------------------------------------------------- prefixes


def _list_ways(wanted: Collection[str], named: Collection[str]) -> Iterator[tuple[Way, int]]:
    """Yields first components that names lack or have more, with the number of names found."""
    lost = {name for name in wanted if name not in named}
    same = len(wanted) - len(lost)
    yield ("", ""), same
    longer = (name.partition(".") for name in (named if lost else ()))
    added = collections.Counter(first + "." for first, _, rest in longer if rest in lost)
    shorter = (name.partition(".") for name in lost)
    stripped = collections.Counter(first + "." for first, _, rest in shorter if rest in named)
    for add, count in added.items():
        yield (add, ""), same + count
    for strip, count in stripped.items():
        yield ("", strip), same + count


def _add_prefix(wanted: Collection[str], places: Places, add: str, strip: str) -> Places:
    """Gives parameters the names in the model; those that are `wanted` as they are stay so."""
    wanted = set(wanted)
    found = Places()
    for name, x in places.items():
        new = strip + name.removeprefix(add)
        if name in wanted:
            found[name] = x
        if name.startswith(add) and (name not in wanted or new in wanted):
            found[new] = x
    found.prefix = None if add else strip
    return found
