"""Selects modules by a configuration, and finds their ranks and scales.

A file may have ten thousand patterns and a hundred thousand modules. Names are therefore searched
by their ends in sorted lists. Other comparisons are counted.
"""

import bisect
import collections
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping
from typing import Any

from .._file import shorten
from ._config import DEFAULTS
from ._patterns import PLAIN, Patterns, unescape, wrap_key, wrap_layer

_LAYERS = 10  # patterns of layers that are plain and need no process


class Ends:
    """A set of endings: `name in ends` tells whether a name ends with one of them."""

    def __init__(self, tails: Iterable[str]):
        """Leaves out endings that end with another one."""
        self.backwards: list[str] = []
        for tail in sorted(t[::-1] for t in tails):
            if not self.backwards or not tail.startswith(self.backwards[-1]):
                self.backwards.append(tail)

    def __contains__(self, name: str) -> bool:
        """Whether `name` ends with one of them."""
        # Backwards, no ending begins with another: only the last one up to `name` can begin it.
        at = bisect.bisect_right(self.backwards, back := name[::-1])
        return at > 0 and back.startswith(self.backwards[at - 1])


class Names:
    """A set of names, to search by their ends."""

    def __init__(self, names: Iterable[str]):
        """Sorts the names backwards."""
        self.backwards = sorted({name[::-1] for name in names})

    def end_in(self, tail: str) -> bool:
        """Whether a name ends with `tail`."""
        at = bisect.bisect_left(self.backwards, back := tail[::-1])
        return at < len(self.backwards) and self.backwards[at].startswith(back)


class Selection:
    """The modules and parameters that a checked configuration selects, by PyTorch's names."""

    def __init__(self, fields: Mapping[str, Any], argument: str = "config"):
        """Takes the configuration, and the user's argument that has it, for errors."""
        self.fields = fields
        self.patterns = Patterns(argument)
        target = fields["target_modules"]
        layers = fields.get("layers_to_transform")
        self._is_target = self._matcher(target)
        self._is_excluded = self._matcher(fields.get("exclude_modules"))
        self._saved = Ends(fields.get("modules_to_save") or [])
        # Parameters by module, None for any module; and all of them in the order of the list.
        self._parameters = collections.defaultdict[str | None, set[str]](set)
        self._order: dict[str, None] = {}
        for name in fields.get("target_parameters") or []:
            module, dot, parameter = name.rpartition(".")
            self._parameters[module if dot else None].add(parameter)
            self._order[parameter] = None
        # PEFT does not check the layer of modules that are given by a pattern or by whole names.
        is_any = isinstance(target, str) or layers in (None, [])
        self._layers = None if is_any else set(_as_list(layers))
        self._whole = set(_as_list(target))
        patterns = _as_list(fields.get("layers_pattern") or None) or [None]
        is_plain = len(patterns) <= _LAYERS and all(
            p is None or PLAIN.fullmatch(p) for p in patterns
        )
        self._numbers = [
            self.patterns.add(wrap_layer(p), "layer", is_plain)
            for p in (() if self._layers is None else patterns)
        ]
        self._ranks = First(fields.get("rank_pattern"), self.patterns)
        self._alphas = First(fields.get("alpha_pattern"), self.patterns)

    def _matcher(self, target: str | list[str] | None) -> Callable[[str], bool]:
        """Makes a predicate: whether a module matches a pattern, or ends with one of the names."""
        if isinstance(target, str):
            find = self.patterns.add(target, "fullmatch", bool(PLAIN.fullmatch(target)))
            return lambda module: find(module) is not None
        ends = Ends("." + name for name in target or ())
        return lambda module: "." + module in ends

    def prepare(self, names: Iterable[str]) -> None:
        """Matches many modules or parameters at once."""
        self.patterns.prepare(names)

    def adapts(self, module: str) -> bool:
        """Whether PEFT would adapt `module`: `check_target_module_exists` of `peft.tuners`."""
        if self._is_excluded(module) or not self._is_target(module):
            return False
        if self._layers is None or module in self._whole:
            return True
        numbers = (number(module) for number in self._numbers)
        return next((n for n in numbers if n is not None), None) in self._layers

    def saves(self, module: str) -> bool:
        """Whether `modules_to_save` names `module` or a module around it, as PEFT matches names."""
        return bool(self._saved.backwards) and any(p in self._saved for p in list_parents(module))

    def saves_whole(self, module: str, parameter: str, is_adapted: bool) -> bool:
        """Whether PEFT saves a parameter as a whole, by `modules_to_save` or `bias`."""
        bias = self.fields.get("bias", "none")
        by_bias = bias == "all" or (bias == "lora_only" and is_adapted)
        return (parameter == "bias" and by_bias) or self.saves(module)

    def parameters(self, module: str) -> list[str]:
        """Lists the `target_parameters` of `module`, unless the module itself is adapted."""
        if not self._parameters or self.adapts(module):
            return []
        found = {p for end in (*list_tails(module), None) for p in self._parameters.get(end, ())}
        return [p for p in self._order if p in found]

    def rank(self, key: str) -> int:
        """Returns the rank of a module or parameter."""
        return self._ranks.get(key, self.fields.get("r", DEFAULTS["r"]))

    def scale(self, key: str) -> float:
        """Returns the scale of a module or parameter: alpha / r, or alpha / √r."""
        alpha = self._alphas.get(key, self.fields.get("lora_alpha", DEFAULTS["lora_alpha"]))
        return alpha / find_divisor(self.fields, self.rank(key))

    def idle(self, keys: Iterable[str], where: str) -> list[str]:
        """Lists the targets that match none of the `keys` of a model, which is called `where`.

        Targets that are excluded, or in other layers, are not listed, as PEFT writes them too.
        """
        names = Names("." + key for key in keys)
        return [
            f"{field}: {shorten(target)} matches no module of {where}"
            for field in ("target_modules", "target_parameters")
            if isinstance(listed := self.fields.get(field), list)
            for target in listed
            if not names.end_in("." + target)
        ]

    def unused(self, adapted: Collection[str]) -> list[str]:
        """Lists the entries of `rank_pattern` and `alpha_pattern` that match no adapted key."""
        self.prepare(adapted)
        return [
            f"{field}: {shorten(pattern)} matches no adapted module"
            for field, patterns in (("rank_pattern", self._ranks), ("alpha_pattern", self._alphas))
            for pattern in patterns.unused(adapted)
        ]


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


def _as_list(values: object) -> list[Any]:
    return values if isinstance(values, list) else [] if values is None else [values]


def find_divisor(fields: Mapping[str, Any], rank: int) -> float:
    """Returns the divisor of alpha: r, or √r for rsLoRA."""
    return math.sqrt(rank) if fields.get("use_rslora") else rank


class First:
    r"""Finds the value of the first matching pattern, as PEFT does for `rank_pattern`.

    PEFT matches `(.*\.)?(pattern)$`. Most patterns are names. Names are looked up in tables: one
    for each length and each set of positions where any character may be.
    """

    def __init__(self, values: Mapping[str, Any] | None, patterns: Patterns):
        """Takes values by pattern. Patterns that are not names are added to `patterns`."""
        self.names, self.values = list(values or ()), list((values or {}).values())
        self.patterns = patterns
        self.tables: dict[int, dict[tuple[int, ...], dict[str, list[int]]]] = {}
        self.matchers: dict[int, Callable[[str], Any]] = {}
        self.found: dict[str, list[list[int]]] = {}
        for i, pattern in enumerate(self.names):
            if PLAIN.fullmatch(pattern):
                name, places = unescape(pattern)
                table = self.tables.setdefault(len(name), {}).setdefault(places, {})
                table.setdefault(name, []).append(i)
            else:
                self.matchers[i] = patterns.add(wrap_key(pattern), "match")

    def get(self, key: str, default: object) -> Any:
        """Returns the value for a module or parameter."""
        first = min((own[0] for own in self._matching(key)), default=None)
        return default if first is None else self.values[first]

    def _matching(self, key: str) -> list[list[int]]:
        """Lists the indices of the matching patterns; equal patterns form one entry."""
        if key not in self.found:
            self.found[key] = list(self._look_up(key))
        return self.found[key]

    def _look_up(self, key: str) -> Iterator[list[int]]:
        for tail in list_tails(key) if self.tables else ():
            tables = self.tables.get(len(tail), {})
            self.patterns.spend(sum(1 + len(places) for places in tables))
            for places, table in tables.items():
                if own := table.get(_with_dots(tail, places)):
                    yield own
        yield from ([i] for i, matcher in self.matchers.items() if matcher(key) is not None)

    def unused(self, keys: Collection[str]) -> list[str]:
        """Lists the patterns that match none of `keys`."""
        used = {i for key in keys for own in self._matching(key) for i in own}
        return [pattern for i, pattern in enumerate(self.names) if i not in used]


def _with_dots(name: str, places: tuple[int, ...]) -> str:
    """Puts dots into a name at the positions where a pattern matches any character."""
    parts: list[str] = []
    start = 0
    for at in places:
        parts.append(name[start:at])
        start = at + 1
    return ".".join([*parts, name[start:]])
