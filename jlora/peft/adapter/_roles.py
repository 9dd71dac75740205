"""Resolves a configuration: what PEFT does with each module.

A file may have ten thousand patterns and a hundred thousand modules. Patterns that are names are
therefore searched in tables, the others in a process, and all of it for a limited time.
"""

import collections
import itertools
import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from .._file import shorten
from ._config import DEFAULTS, PATTERNS
from ._patterns import PLAIN, Clock, Job, match, unescape, wrap_key, wrap_layer

# PEFT lists both names for every sequence classifier, whatever its head is called.
HEADS = ("classifier", "score")
_LAYERS = 10  # patterns of layers that are plain and need no process
Fields = Mapping[str, Any]


class Role(NamedTuple):
    """What a configuration does with a module, or with a parameter that it targets by name.

    Attributes:
        adapts: whether PEFT adapts the module.
        saves: whether `modules_to_save` names it, or a module around it.
        rank: the rank that it has if it is adapted.
        scale: its scale, alpha / r or alpha / √r.
        parameters: its parameters that `target_parameters` names; none if it is adapted itself.
    """

    adapts: bool
    saves: bool
    rank: int
    scale: float
    parameters: tuple[str, ...] = ()

    def saves_whole(self, fields: Fields, parameter: str, is_adapted: bool) -> bool:
        """Whether PEFT saves a parameter as a whole, by `modules_to_save` or `bias`."""
        return self.saves or saves_bias(fields, parameter, is_adapted)


def saves_bias(fields: Fields, parameter: str, is_adapted: bool) -> bool:
    """Whether PEFT saves a parameter because it is a bias."""
    bias = fields.get("bias", "none")
    return parameter == "bias" and (bias == "all" or (bias == "lora_only" and is_adapted))


def resolve(fields: Fields, names: Iterable[str], clock: Clock) -> dict[str, Role]:
    """Finds the role of each module or targeted parameter, by PyTorch's names.

    Source: `check_target_module_exists` of `peft.tuners`.

    Raises:
        ValueError: if a pattern is none, or matching takes too long.
    """
    names = list(dict.fromkeys(names))
    targets, excluded = (_Choice(fields.get(k)) for k in ("target_modules", "exclude_modules"))
    layers = _Layers(fields)
    ranks, alphas = (_Values(fields.get(k)) for k in PATTERNS)
    jobs = [*targets.jobs, *excluded.jobs, *layers.jobs]
    found = match([*jobs, *ranks.jobs.values(), *alphas.jobs.values()], names, clock)
    saves = make_saves(fields)
    list_parameters = make_parameters(fields)
    r, alpha = (fields.get(key, DEFAULTS[key]) for key in ("r", "lora_alpha"))
    roles = dict[str, Role]()
    for i, name in clock.watch(enumerate(names)):
        adapts = targets.has(i, name, found) and not excluded.has(i, name, found)
        adapts = adapts and layers.have(i, name, found)
        rank = ranks.first(i, name, found, r)
        scale = alphas.first(i, name, found, alpha) / find_divisor(fields, rank)
        roles[name] = Role(
            adapts, saves(name), rank, scale, () if adapts else list_parameters(name)
        )
    return roles


def list_unused(
    fields: Fields,
    keys: Sequence[str],
    saved: Iterable[str],
    modules: Iterable[str] | None,
    where: str,
    clock: Clock,
) -> list[str]:
    """Lists the names in a configuration that match nothing, which PEFT accepts.

    Targets that are excluded, or in other layers, are not listed, as PEFT writes them too.

    Args:
        fields: the configuration.
        keys: what is adapted.
        saved: the modules that the adapter has in full.
        modules: those of the model, which is called `where`; None if unknown.
        where: what the texts call the model.
        clock: the time that is left.
    """
    unused = list[str]()
    if modules is not None:
        both = ("target_modules", "target_parameters")
        listed = {key: x for key in both if isinstance(x := fields.get(key), list)}
        wanted = set[str]().union(*listed.values())
        names = clock.watch(itertools.chain(keys, modules))
        used = {tail for name in names for tail in list_tails(name) if tail in wanted}
        left = ((key, x) for key, own in listed.items() for x in own if x not in used)
        unused += [f"{key}: {shorten(x)} matches no module of {where}" for key, x in left]
    list_saved = _make_endings(fields)
    holders = {parent for module in saved for parent in list_parents(module)}
    used = {end for name in clock.watch(holders) for end in list_saved(name)}.union(HEADS)
    left = (x for x in fields.get("modules_to_save") or [] if x not in used)
    unused += [f"modules_to_save: {shorten(x)} matches none of the adapter's tensors" for x in left]
    each = {field: _Values(fields.get(field)) for field in PATTERNS}
    found = match([job for values in each.values() for job in values.jobs.values()], keys, clock)
    for field, values in each.items():
        each_key = clock.watch(enumerate(keys))
        used = {n for i, key in each_key for own in values.matching(i, key, found) for n in own}
        left = (pattern for n, pattern in enumerate(values.names) if n not in used)
        unused += [f"{field}: {shorten(x)} matches no adapted module" for x in left]
    return unused


def make_saves(fields: Fields) -> Callable[[str], bool]:
    """Makes a predicate: whether `modules_to_save` names a module, or one around it, as in PEFT."""
    list_saved = _make_endings(fields)
    return lambda module: any(any(list_saved(p)) for p in list_parents(module))


def _make_endings(fields: Fields) -> Callable[[str], Iterator[str]]:
    """Makes a function that yields what a name ends with of `modules_to_save`.

    There are few lengths, but there may be very many names.
    """
    saved = frozenset(fields.get("modules_to_save") or ())
    lengths = {len(x) for x in saved}
    return lambda name: (end for n in lengths if (end := name[-n:]) in saved)


def find_divisor(fields: Fields, rank: int) -> float:
    """Returns the divisor of alpha: r, or √r for rsLoRA."""
    return math.sqrt(rank) if fields.get("use_rslora") else rank


# ------------------------------------------------------------------------------ what a field says

Found = Mapping[Job, Sequence[Any]]


class _Choice:
    """A pattern, or a list of names, that chooses modules."""

    def __init__(self, target: str | list[str] | None):
        """Takes the value of the field."""
        pattern = [target] if isinstance(target, str) else []
        self.jobs = [Job("fullmatch", p, bool(PLAIN.fullmatch(p))) for p in pattern]
        self.names = frozenset(() if pattern else target or ())

    def has(self, i: int, name: str, found: Found) -> bool:
        """Whether it chooses a module, the i-th that was matched."""
        if self.jobs:
            return found[self.jobs[0]][i] is not None
        return not self.names.isdisjoint(list_tails(name))


class _Layers:
    """The layers of `layers_to_transform`."""

    def __init__(self, fields: Fields):
        """PEFT does not check the layer of modules that are given by a pattern or whole names."""
        target, layers = fields.get("target_modules"), fields.get("layers_to_transform")
        is_any = isinstance(target, str) or layers in (None, [])
        self.numbers = None if is_any else set(_as_list(layers))
        self.whole = set(_as_list(target))
        patterns = _as_list(fields.get("layers_pattern") or None) or [None]
        few = len(patterns) <= _LAYERS
        is_plain = few and all(p is None or PLAIN.fullmatch(p) for p in patterns)
        each = () if is_any else patterns
        self.jobs = [Job("layer", wrap_layer(p), is_plain) for p in each]

    def have(self, i: int, name: str, found: Found) -> bool:
        """Whether a module that is targeted is in one of the layers."""
        if self.numbers is None or name in self.whole:
            return True
        each = (found[job][i] for job in self.jobs)
        return next((n for n in each if n is not None), None) in self.numbers


def make_parameters(fields: Fields) -> Callable[[str], tuple[str, ...]]:
    """Makes a function that lists the `target_parameters` of a module."""
    # By module, None for any module; and all of them in the order of the list.
    named = collections.defaultdict[str | None, set[str]](set)
    order = dict[str, None]()
    for name in fields.get("target_parameters") or []:
        module, dot, parameter = name.rpartition(".")
        named[module if dot else None].add(parameter)
        order[parameter] = None

    def list_parameters(module: str) -> tuple[str, ...]:
        if not named:
            return ()
        found = {p for end in (*list_tails(module), None) for p in named.get(end, ())}
        return tuple(p for p in order if p in found)

    return list_parameters


class _Values:
    r"""Values by pattern; PEFT takes the first pattern for which `(.*\.)?(pattern)$` matches.

    Most patterns are names. Names are looked up in tables: one for each length and each set of
    positions where any character may be.
    """

    def __init__(self, values: Mapping[str, Any] | None):
        """Takes values by pattern."""
        self.names, self.values = list(values or ()), list((values or {}).values())
        self.tables: dict[int, dict[tuple[int, ...], dict[str, list[int]]]] = {}
        self.jobs: dict[int, Job] = {}  # for patterns that are not names
        for n, pattern in enumerate(self.names):
            if PLAIN.fullmatch(pattern):
                name, places = unescape(pattern)
                table = self.tables.setdefault(len(name), {}).setdefault(places, {})
                table.setdefault(name, []).append(n)
            else:
                self.jobs[n] = Job("match", wrap_key(pattern))

    def first(self, i: int, name: str, found: Found, default: Any) -> Any:
        """Returns the value for a name, the i-th that was matched."""
        n = min((own[0] for own in self.matching(i, name, found)), default=None)
        return default if n is None else self.values[n]

    def matching(self, i: int, name: str, found: Found) -> Iterator[list[int]]:
        """Yields the numbers of the patterns that match a name; equal ones form one list."""
        for tail in list_tails(name) if self.tables else ():
            for places, table in self.tables.get(len(tail), {}).items():
                if own := table.get(_with_dots(tail, places)):
                    yield own
        yield from ([n] for n, job in self.jobs.items() if found[job][i] is not None)


def _with_dots(name: str, places: tuple[int, ...]) -> str:
    """Puts dots into a name at the positions where a pattern matches any character."""
    parts: list[str] = []
    start = 0
    for at in places:
        parts.append(name[start:at])
        start = at + 1
    return ".".join([*parts, name[start:]])


def _as_list(values: Any) -> list[Any]:
    return values if isinstance(values, list) else [] if values is None else [values]


def list_parents(module: str) -> Iterator[str]:
    """Yields `module` and the modules around it."""
    yield module
    while module := module.rpartition(".")[0]:
        yield module


def list_tails(module: str) -> Iterator[str]:
    """Yields `module` and its endings after a dot, the longest first."""
    while module:
        yield module
        module = module.partition(".")[2]
