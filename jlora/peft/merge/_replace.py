"""Finds the one replacement in names that makes the modules of an adapter those of a checkpoint.

`transformers` reads some checkpoints under other names, such as `model.layers.0.mixer.in_proj` for
`backbone.layers.0.mixer.in_proj`. Its table of names is not needed where the checkpoint has only
one place for all modules. The following must hold, as a wrong place would be merged silently:

- A name is left as it is up to the first component that the checkpoint does not have there. From
  there on, the same components are replaced by the same others, or removed, or added, in every
  name. Numbers and the last two components stay.
- Every name gets a tensor of its own, of a fitting shape. A head that may share the embedding's
  weight needs none.
- The checkpoint has the replaced components nowhere, and the adapter has those that replace them
  nowhere: either may be another tower of the model. None leads into a tower of images or sounds.
- The adapter has all layers of the tensors, or these are numbered without gaps: otherwise two
  layers of the checkpoint may be one layer of the model.

Two replacements that give all names tensors are refused, also if only one of them is plausible.
"""

import bisect
import collections
import re
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import NamedTuple

from .._file import shorten
from ..adapter._sorted import SHARED

Components = tuple[str, ...]
Shapes = Mapping[str, tuple[int, ...]]
Fits = Callable[[str, tuple[int, ...]], bool]

_DEEPEST = 32  # components of a name
_LONGEST = 9  # digits of a number
_PLACES = 100  # tensors that are compared with one name
_STEPS = 300_000  # comparisons of a name with a replacement
_TOWER = re.compile("vis|imag|vid|audio|speech")
_KEPT = 2  # components at the end of a name, such as `q_proj.weight`


class Replacement(NamedTuple):
    """Components of the adapter's names, and those of the checkpoint in their place.

    Attributes:
        old: the components in the adapter.
        new: the components in the checkpoint.
        place: the components before, with `*` for numbers, if `old` is empty; else None.
    """

    old: Components
    new: Components
    place: Components | None

    def __str__(self) -> str:
        """Both names, with quotes."""
        return f"{shorten('.'.join(self.old))} by {shorten('.'.join(self.new))}"


class Place(NamedTuple):
    """A place for all modules of an adapter.

    Attributes:
        way: the replacement.
        images: the tensors by the adapter's names.
        renamed: all tensors that the model calls otherwise, by its names; None if the place is not
            plausible.
    """

    way: Replacement
    images: dict[str, str]
    renamed: dict[str, str] | None


class Names:
    """The names of a checkpoint, split into components."""

    def __init__(self, shapes: Shapes):
        """Takes the shape of each tensor; leaves out names of very many components."""
        self.shapes = {n: shape for n, shape in shapes.items() if n.count(".") < _DEEPEST}
        self.split = {name: tuple(name.split(".")) for name in self.shapes}
        self.components = {x for parts in self.split.values() for x in parts}
        self.sorted = sorted(self.shapes)
        self.by_end = collections.defaultdict[Components, list[str]](list)
        for name, parts in self.split.items():
            self.by_end[_end(parts)].append(name)

    def leave(self, parts: Components) -> int:
        """Counts the first components up to which the checkpoint has modules of these names."""
        beginning = ""
        for i, part in enumerate(parts):
            beginning += f"{part}."
            at = bisect.bisect_left(self.sorted, beginning)
            if at == len(self.sorted) or not self.sorted[at].startswith(beginning):
                return i
        return len(parts)

    def find_images(
        self, name: str, ways: Iterable[Replacement], fits: Fits
    ) -> dict[Replacement, str]:
        """Finds the tensor of a fitting shape that `name` becomes by each of the `ways`."""
        found = {}
        parts = tuple(name.split("."))
        start = self.leave(parts)
        place = _mark(parts[:start])
        for way in ways:
            stop = start + len(way.old)
            if parts[start:stop] == way.old and way.place in (None, place):
                image = ".".join((*parts[:start], *way.new, *parts[stop:]))
                if image in self.shapes and fits(name, self.shapes[image]):
                    found[way] = image
        return found

    def count_alike(self, name: str) -> int:
        """Counts the tensors that `name` may become by their numbers and last components."""
        return len(self.by_end.get(_end(tuple(name.split("."))), ()))

    def list_ways(self, name: str, fits: Fits) -> list[Replacement]:
        """Lists the replacements that give `name` a tensor."""
        parts = tuple(name.split("."))
        start = self.leave(parts)
        others = self.by_end.get(_end(parts), [])
        if len(others) > _PLACES:
            return []
        fitting = (self.split[x] for x in others if fits(name, self.shapes[x]))
        ways = (_compare(parts, x, start) for x in fitting if x[:start] == parts[:start])
        return [way for way in ways if way]


def find_places(wanted: Collection[str], shapes: Shapes, fits: Fits) -> list[Place]:
    """Finds the places for all `wanted` names: for each replacement that gives them tensors.

    Args:
        wanted: the names of the adapter's parameters.
        shapes: the shapes of the checkpoint's tensors.
        fits: whether a tensor of a shape can be the parameter of a name.
    """
    wanted = [name for name in wanted if name.count(".") < _DEEPEST]
    lost = [name for name in wanted if name not in shapes]
    kept = set(wanted) - set(lost)
    needed = _group(lost, {module_of(name) for name in kept})
    if not needed:
        return []
    names = Names(shapes)
    found = list[Place]()
    fewest = min(needed.values(), key=lambda own: sum(map(names.count_alike, own)))
    ways = dict.fromkeys(way for name in fewest for way in names.list_ways(name, fits))
    if len(ways) * len(lost) > _STEPS:
        return []
    each = {name: names.find_images(name, ways, fits) for name in lost}
    for way in ways:
        images = {name: own[way] for name, own in each.items() if way in own}
        is_whole = set(map(module_of, images)) >= needed.keys()
        if is_whole and len({*images.values(), *kept}) == len(images) + len(kept):
            is_plausible = _is_plausible(names, way, wanted, images.values())
            found.append(Place(way, images, _rename(names, way, images) if is_plausible else None))
    return found


def _group(lost: Iterable[str], modules: Collection[str]) -> dict[str, list[str]]:
    """Groups names by modules that have none of the other names, and may not be tied."""
    found = collections.defaultdict[str, list[str]](list)
    for name in lost:
        if (module := module_of(name)) not in modules and not SHARED.search(module):
            found[module].append(name)
    return found


def module_of(name: str) -> str:
    """Returns the module of a parameter."""
    return name.rpartition(".")[0]


# ------------------------------------------------------------------------------------- components


def _end(parts: Components) -> Components:
    """Returns what no replacement changes: numbers and the last components."""
    return (*filter(_is_number, parts[:-_KEPT]), *parts[-_KEPT:])


def _is_number(x: str) -> bool:
    return len(x) < _LONGEST and x.isdecimal()


def _mark(parts: Iterable[str]) -> Components:
    """Replaces numbers with `*`."""
    return tuple("*" if _is_number(x) else x for x in parts)


def _compare(name: Components, tensor: Components, start: int) -> Replacement | None:
    """Finds what is replaced from `start` on; None if numbers or the last components are."""
    most = min(len(name), len(tensor)) - start
    same = next((i for i in range(most) if name[~i] != tensor[~i]), most)
    old, new = name[start : len(name) - same], tensor[start : len(tensor) - same]
    if same < _KEPT or any(map(_is_number, old + new)):
        return None
    return Replacement(old, new, None if old else _mark(name[:start]))


# --------------------------------------------------------------------------------------- evidence


def _is_plausible(
    names: Names, way: Replacement, wanted: Iterable[str], images: Collection[str]
) -> bool:
    removed, added = set(way.old) - set(way.new), set(way.new) - set(way.old)
    used = {x for name in wanted for x in name.split(".")} if removed else set[str]()
    if removed & names.components or added & used:
        return False
    if any(map(_TOWER.search, added)) and not any(map(_TOWER.search, way.old)):
        return False
    return _are_many(images) and _has_layers(names, images)


def _are_many(images: Collection[str]) -> bool:
    """Whether there are several kinds of tensors, or one in numbered layers."""
    kinds = {_mark(x.split(".")) for x in images}
    return len(kinds) > 1 or any("*" in kind for kind in kinds)


def _has_layers(names: Names, images: Collection[str]) -> bool:
    """Whether `images` have all numbers of their kind, or these have no gaps."""
    own = {_mark(names.split[x]) for x in images}
    every = collections.defaultdict[Components, set[Components]](set)
    for parts in names.split.values():
        if (kind := _mark(parts)) in own:
            every[kind].add(tuple(filter(_is_number, parts)))
    counts = collections.Counter(_mark(names.split[x]) for x in images)
    return all(counts[kind] == len(found) or _is_gapless(found) for kind, found in every.items())


def _is_gapless(numbers: Collection[Components]) -> bool:
    """Whether the numbers at each position are 0, 1, … without gaps."""
    each = (set(map(int, x)) for x in zip(*numbers, strict=True))
    return all(max(x) == len(x) - 1 for x in each)


# ---------------------------------------------------------------------------------------- renaming


def _rename(names: Names, way: Replacement, images: Mapping[str, str]) -> dict[str, str] | None:
    """Maps the model's names to all tensors beside `images`; None if names would be equal."""
    contexts, lengths = set[tuple[Components, Components]](), set[int]()
    for image in images:
        parts = tuple(image.split("."))
        start = names.leave(parts)
        stop = start + len(way.old)
        contexts.add((_mark(parts[:start]), _mark(parts[stop : stop + 1])))
        lengths.add(start)
    found: dict[str, str] = {}
    for name, parts in names.split.items():
        for start in lengths:
            stop = start + len(way.new)
            context = _mark(parts[:start]), _mark(parts[stop : stop + 1])
            if parts[start:stop] == way.new and context in contexts:
                renamed = ".".join((*parts[:start], *way.old, *parts[stop:]))
                if renamed in names.shapes or found.setdefault(renamed, name) != name:
                    return None
                break
    return found
