"""Resolves a configuration: what PEFT does with each module.

A file may have ten thousand patterns and a hundred thousand modules. Patterns that are names are
therefore searched here, the others in a process, and all of it for a limited time.
"""

import collections
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..._errors import InputError, Problem
from .._file import shorten
from ._config import CHOICES, DEFAULTS, PATTERNS
from ._patterns import PLAIN, Clock, Found, Job, match

# PEFT lists both names for every sequence classifier, whatever its head is called.
HEADS = ("classifier", "score")
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
    found = match(_list_jobs(fields), names, clock)
    is_target, is_excluded = (
        _make_choice(fields, key, found) for key in ("target_modules", "exclude_modules")
    )
    is_in_layer = _make_layers(fields, found)
    find_rank, find_alpha = (_make_first(fields, key, found) for key in PATTERNS)
    saves = make_saves(fields)
    list_parameters = make_parameters(fields)
    roles = dict[str, Role]()
    for name in clock.watch(names):
        adapts = is_target(name) and not is_excluded(name) and is_in_layer(name)
        rank = find_rank(name, fields.get("r", DEFAULTS["r"]))
        alpha = find_alpha(name, fields.get("lora_alpha", DEFAULTS["lora_alpha"]))
        parameters = () if adapts else list_parameters(name)
        scale = alpha / find_divisor(fields, rank)
        roles[name] = Role(adapts, saves(name), rank, scale, parameters)
    return roles


def list_bad_patterns(fields: Fields) -> tuple[Problem, ...]:
    """Lists the patterns that are no regular expressions; raises if that takes too long."""
    try:
        match(_list_jobs(fields), [""], Clock("path"))
    except InputError as e:
        if not e.problems:
            raise
        return e.problems
    return ()


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
    found = match((job for job in _list_jobs(fields) if job.field in PATTERNS), keys, clock)
    for field in PATTERNS:
        list_matching = _make_matching(fields, field, found)
        used = {pattern for key in clock.watch(keys) for pattern in list_matching(key)}
        left = (pattern for pattern in fields.get(field) or () if pattern not in used)
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


def _list_jobs(fields: Fields) -> list[Job]:
    """Lists the patterns that are no names."""
    patterns = {key: [x] for key in CHOICES if isinstance(x := fields.get(key), str)}
    patterns |= {key: list(fields.get(key) or ()) for key in PATTERNS}
    found = [Job(key, x) for key, own in patterns.items() for x in own if not PLAIN.fullmatch(x)]
    return found + _list_layers(fields)


def _list_layers(fields: Fields) -> list[Job]:
    """Lists the patterns of layers; none if all layers are meant."""
    default = None if fields.get("layers_to_transform") in (None, []) else [None]
    return [Job("layers_pattern", x) for x in _as_list(fields.get("layers_pattern") or default)]


def _make_choice(fields: Fields, key: str, found: Found) -> Callable[[str], bool]:
    """Makes a predicate: whether a field, a pattern or a list of names, chooses a module."""
    target = fields.get(key)
    if not isinstance(target, str):
        names = frozenset(target or ())
        return lambda name: not names.isdisjoint(list_tails(name))
    if PLAIN.fullmatch(target):
        return lambda name: bool(re.fullmatch(target, name))
    return found[Job(key, target)].__contains__


def _make_layers(fields: Fields, found: Found) -> Callable[[str], bool]:
    """Makes a predicate: whether a module that is targeted is in `layers_to_transform`.

    PEFT does not check the layer of modules that are given by a pattern or whole names.
    """
    target, layers = fields.get("target_modules"), fields.get("layers_to_transform")
    if isinstance(target, str) or layers in (None, []):
        return lambda _: True
    whole, numbers = set(_as_list(target)), set(_as_list(layers))
    jobs = _list_layers(fields)

    def is_in_layer(name: str) -> bool:
        each = (found[job][name] for job in jobs if name in found[job])
        return name in whole or next(each, None) in numbers

    return is_in_layer


def _make_matching(fields: Fields, key: str, found: Found) -> Callable[[str], Iterator[str]]:
    r"""Makes a function that lists the patterns of a field for which `(.*\.)?(pattern)$` matches.

    Most patterns are names, of which there may be one for each module. They are looked up: in a
    table for each length and each set of positions where a dot takes any character.
    """
    tables: dict[int, dict[tuple[int, ...], dict[str, list[str]]]] = {}
    others = list[str]()
    for pattern in fields.get(key) or ():
        if PLAIN.fullmatch(pattern):
            characters = re.findall(r"\\?.", pattern)
            places = tuple(at for at, c in enumerate(characters) if c == ".")
            table = tables.setdefault(len(characters), {}).setdefault(places, {})
            table.setdefault("".join(c[-1] for c in characters), []).append(pattern)
        else:
            others.append(pattern)

    def list_matching(name: str) -> Iterator[str]:
        for tail in list_tails(name) if tables else ():
            for places, table in tables.get(len(tail), {}).items():
                yield from table.get(_put_dots(tail, places), ())
        yield from (pattern for pattern in others if name in found[Job(key, pattern)])

    return list_matching


def _put_dots(name: str, places: Sequence[int]) -> str:
    """Puts dots into a name at some positions."""
    ends = zip((0, *(at + 1 for at in places)), (*places, len(name)), strict=True)
    return ".".join(name[start:stop] for start, stop in ends)


def _make_first(fields: Fields, key: str, found: Found) -> Callable[[str, Any], Any]:
    """Makes a function that finds the value of the first pattern that matches, or the default."""
    list_matching = _make_matching(fields, key, found)
    values = fields.get(key) or {}
    order = {pattern: i for i, pattern in enumerate(values)}

    def find(name: str, default: Any) -> Any:
        pattern = min(list_matching(name), key=order.__getitem__, default=None)
        return default if pattern is None else values[pattern]

    return find


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
