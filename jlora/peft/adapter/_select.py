"""Selects modules by a configuration, and finds their ranks and scales.

A file may list ten thousand patterns for a hundred thousand modules: names are looked up by their
ends in sorted lists, and what must be tried one by one is counted.
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
    """Many endings, in which a name finds whether it ends in one of them."""

    def __init__(self, tails: Iterable[str]):
        """Leaves out tails that end in another one."""
        self.backwards: list[str] = []
        for tail in sorted(t[::-1] for t in tails):
            if not self.backwards or not tail.startswith(self.backwards[-1]):
                self.backwards.append(tail)

    def __contains__(self, name: str) -> bool:
        """Whether `name` ends in one of them."""
        # As none begins with another, only the last one in order may begin `name`, backwards.
        at = bisect.bisect_right(self.backwards, back := name[::-1])
        return at > 0 and back.startswith(self.backwards[at - 1])


class Names:
    """Many names, in which an ending finds whether one of them ends in it."""

    def __init__(self, names: Iterable[str]):
        """Sorts the names backwards."""
        self.backwards = sorted({name[::-1] for name in names})

    def end_in(self, tail: str) -> bool:
        """Whether one of them ends in `tail`."""
        at = bisect.bisect_left(self.backwards, back := tail[::-1])
        return at < len(self.backwards) and self.backwards[at].startswith(back)


class Selection:
    """What a checked configuration says about modules and parameters, by PyTorch's names."""

    def __init__(self, fields: Mapping[str, Any], what: str = "`config`"):
        """`what` is the user's argument that has the `fields`."""
        self.fields, self.patterns = fields, Patterns(what)
        target, layers = fields["target_modules"], fields.get("layers_to_transform")
        self._is_target = self._matcher(target)
        self._is_excluded = self._matcher(fields.get("exclude_modules"))
        self._saved = Ends(fields.get("modules_to_save") or [])
        # By their modules, or None for any; and all of them in the order in which they are listed.
        self._parameters = collections.defaultdict[str | None, set[str]](set)
        self._order: dict[str, None] = {}
        for name in fields.get("target_parameters") or []:
            module, dot, parameter = name.rpartition(".")
            self._parameters[module if dot else None].add(parameter)
            self._order[parameter] = None
        # PEFT asks for no layer where modules are given by a pattern or by their whole names.
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
        """Makes a predicate: whether a module matches a pattern, or ends in one of the names."""
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
        """Whether `modules_to_save` names `module` or one that holds it, as PEFT matches it."""
        return bool(self._saved.backwards) and any(p in self._saved for p in list_parents(module))

    def saves_whole(self, module: str, parameter: str, is_adapted: bool) -> bool:
        """Whether PEFT saves a parameter as a whole, by `modules_to_save` or `bias`."""
        bias = self.fields.get("bias", "none")
        by_bias = bias == "all" or (bias == "lora_only" and is_adapted)
        return (parameter == "bias" and by_bias) or self.saves(module)

    def parameters(self, module: str) -> list[str]:
        """Lists the parameters of `module` in `target_parameters`, if it is not adapted whole."""
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
        """Lists the targets that name none of the `keys` of a model; errors call it `where`.

        PEFT also lists targets that it excludes, or that are in other layers.
        """
        names = Names("." + key for key in keys)
        return [
            f"{field}: {shorten(target)} names no module of {where}"
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
    """Yields `module` and the modules that hold it."""
    yield module
    while module := module.rpartition(".")[0]:
        yield module


def list_tails(module: str) -> Iterator[str]:
    """Yields `module` and its last parts, the longest first."""
    while module:
        yield module
        module = module.partition(".")[2]


def _as_list(values: Any) -> list[Any]:
    return values if isinstance(values, list) else [] if values is None else [values]


def find_divisor(fields: Mapping[str, Any], rank: int) -> float:
    """Returns what alpha is divided by: r, or √r."""
    return math.sqrt(rank) if fields.get("use_rslora") else rank


class First:
    r"""The value of the first pattern that matches, as PEFT looks up `rank_pattern`.

    PEFT matches `(.*\.)?(pattern)$`. Most patterns are names, which are looked up in a table for
    each length and each set of places at which any character may stand.
    """

    def __init__(self, values: Mapping[str, Any] | None, patterns: Patterns):
        """`patterns` matches those that are no names."""
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

    def get(self, key: str, default: Any) -> Any:
        """Returns the value for a module or parameter."""
        first = min((own[0] for own in self._matching(key)), default=None)
        return default if first is None else self.values[first]

    def _matching(self, key: str) -> list[list[int]]:
        """Lists the numbers of the patterns that match; equal patterns are one entry."""
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
    """Puts dots into a name at the places at which a pattern takes any character."""
    parts: list[str] = []
    start = 0
    for at in places:
        parts.append(name[start:at])
        start = at + 1
    return ".".join([*parts, name[start:]])
