"""Which modules a configuration selects with which rank and scale, and how to say so shortly.

A file may list ten thousand patterns for a hundred thousand modules: names are looked up by their
ends in sorted lists, and what must be tried one by one is counted.
"""

import bisect
import collections
import functools
import math
import re
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

from .._file import brief
from ._config import DEFAULTS
from ._first import First
from ._patterns import PLAIN, Patterns, of_layer

_LAYERS = 10  # patterns of layers that are plain and need no process


class Ends:
    """The ends of many names, of which one may have to be the end of another."""

    def __init__(self, tails: Iterable[str]):
        """Of `tails`, of which those that end in another one are idle."""
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
    """Many names, of which one may have to end in another one."""

    def __init__(self, names: Iterable[str]):
        """Of `names`."""
        self.backwards = sorted({name[::-1] for name in names})

    def end_in(self, tail: str) -> bool:
        """Whether one of them ends in `tail`."""
        at = bisect.bisect_left(self.backwards, back := tail[::-1])
        return at < len(self.backwards) and self.backwards[at].startswith(back)


class Selection:
    """What a checked configuration says of modules and parameters, by PyTorch's names."""

    def __init__(self, fields: Mapping[str, Any], what: str = "`config`"):
        """By its `fields`; `what` is the user's argument that has them."""
        self.fields, self.patterns = fields, Patterns(what)
        self._target = _Modules(fields["target_modules"], self.patterns)
        self._exclude = _Modules(fields.get("exclude_modules"), self.patterns)
        self._saved = Ends(fields.get("modules_to_save") or [])
        # By their modules, or None; and all of them in the order in which they are listed.
        self._parameters: dict[str | None, set[str]] = collections.defaultdict(set)
        self._order: dict[str, None] = {}
        for target in fields.get("target_parameters") or []:
            module, dot, parameter = target.rpartition(".")
            self._parameters[module if dot else None].add(parameter)
            self._order[parameter] = None
        layers = fields.get("layers_to_transform")
        self._layers = None if layers in (None, []) else set(_listed(layers))
        patterns = _listed(fields.get("layers_pattern") or None) or [None]
        self._numbers = [] if self._layers is None else _layer_matchers(patterns, self.patterns)
        self._ranks = First(fields.get("rank_pattern"), self.patterns)
        self._alphas = First(fields.get("alpha_pattern"), self.patterns)

    def prepare(self, names: Iterable[str]) -> None:
        """Matches many modules or parameters at once."""
        self.patterns.prepare(names)

    def adapts(self, module: str) -> bool:
        """Whether PEFT would adapt `module`: `check_target_module_exists` of `peft.tuners`."""
        if module in self._exclude or module not in self._target:
            return False
        if self._target.matcher or self._layers is None or module in self._target.whole:
            return True
        numbers = (number(module) for number in self._numbers)
        return next((n for n in numbers if n is not None), None) in self._layers

    def saves(self, module: str) -> bool:
        """Whether `modules_to_save` names `module` or one that holds it, as PEFT matches it."""
        return bool(self._saved.backwards) and any(p in self._saved for p in parents(module))

    def parameters(self, module: str) -> list[str]:
        """The parameters of `module` that `target_parameters` names, if it is not adapted whole."""
        if not self._parameters or self.adapts(module):
            return []
        found = {p for end in _tails(module) for p in self._parameters.get(end, ())}
        return [p for p in self._order if p in found]

    def rank(self, key: str) -> int:
        """The rank of a module or parameter."""
        return self._ranks(key, self.fields.get("r", DEFAULTS["r"]))

    def scale(self, key: str) -> float:
        """The scale of a module or parameter: alpha / r, or alpha / √r."""
        alpha = self._alphas(key, self.fields.get("lora_alpha", DEFAULTS["lora_alpha"]))
        return alpha / divisor(self.fields, self.rank(key))

    def idle(self, keys: Iterable[str], where: str) -> list[str]:
        """The targets that name none of the `keys` of a model, which is called `where`.

        PEFT lists targets that it excludes, or that lie in other layers, all the same.
        """
        names = Names("." + key for key in keys)
        return [
            f"{field}: {brief(target)} names no module of {where}"
            for field in ("target_modules", "target_parameters")
            if isinstance(listed := self.fields.get(field), list)
            for target in listed
            if not names.end_in("." + target)
        ]

    def unused(self, adapted: Collection[str]) -> list[str]:
        """The entries of `rank_pattern` and `alpha_pattern` that match no adapted key."""
        return [
            f"{field}: {brief(pattern)} matches no adapted module"
            for field, patterns in (("rank_pattern", self._ranks), ("alpha_pattern", self._alphas))
            for pattern in patterns.unused(adapted)
        ]


def parents(module: str) -> Iterator[str]:
    """`module` and those that hold it."""
    yield module
    while module := module.rpartition(".")[0]:
        yield module


def _tails(module: str) -> Iterator[str | None]:
    """`module`, its last parts, and None."""
    while module:
        yield module
        module = module.partition(".")[2]
    yield None


def _listed(values: Any) -> list[Any]:
    return values if isinstance(values, list) else [] if values is None else [values]


def _matcher(pattern: str, patterns: Patterns, kind: str) -> Callable[[str], Any]:
    """In this process if the pattern is plain."""
    if PLAIN.fullmatch(pattern):
        return getattr(re.compile(pattern), kind)
    return patterns.add(pattern, kind)


def _layer_matchers(
    layers: Sequence[str | None], patterns: Patterns
) -> list[Callable[[str], int | None]]:
    """What finds the number of a module's layer, or None."""
    if len(layers) <= _LAYERS and all(p is None or PLAIN.fullmatch(p) for p in layers):
        return [functools.partial(_layer, re.compile(of_layer(p))) for p in layers]
    return [patterns.add(of_layer(p), "layer") for p in layers]


def _layer(pattern: re.Pattern[str], module: str) -> int | None:
    found = pattern.match(module)
    return None if found is None else int(found["idx"])


class _Modules:
    """A pattern of modules, or their names."""

    def __init__(self, target: str | list[str] | None, patterns: Patterns):
        is_pattern = isinstance(target, str)
        self.matcher = _matcher(target, patterns, "fullmatch") if is_pattern else None
        self.whole = set() if is_pattern else set(target or ())
        self.ends = Ends("." + name for name in self.whole)

    def __contains__(self, module: str) -> bool:
        if self.matcher:
            return self.matcher(module) is not None
        return "." + module in self.ends


# ------------------------------------------------------------------------------------- writing


def suffixes(wanted: Iterable[str], others: Iterable[str]) -> list[str]:
    """Short endings that name all of `wanted` and none of `others`."""
    left = Names("." + name for name in others)
    found = (
        next((tail for tail in _endings(name) if not left.end_in("." + tail)), name)
        for name in wanted
    )
    return list(dict.fromkeys(found))


def _endings(name: str) -> Iterator[str]:
    """The last parts of `name`, the fewest first, and the whole."""
    at = len(name)
    while (at := name.rfind(".", 0, at)) >= 0:
        yield name[at + 1 :]
    yield name


def with_scales(fields: dict[str, Any], scales: Mapping[str, tuple[int, float]]) -> dict[str, Any]:
    """`fields` whose rank, alpha and patterns give each key its rank and scale."""
    said = Selection(fields)
    said.prepare(scales)
    # A scale that a row of `names` multiplied, and that was divided again, may be off by a bit.
    same = (
        said.rank(k) == rank and math.isclose(said.scale(k), scale, rel_tol=1e-15)
        for k, (rank, scale) in scales.items()
    )
    if all(same):
        return fields
    ranks = {key: rank for key, (rank, _) in scales.items()}
    alphas = {key: _alpha(scale, divisor(fields, rank)) for key, (rank, scale) in scales.items()}
    r, rank_pattern = _common(ranks)
    alpha, alpha_pattern = _common(alphas)
    new = {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }
    return fields | new


def divisor(fields: Mapping[str, Any], rank: int) -> float:
    """What alpha is divided by: r, or √r."""
    return math.sqrt(rank) if fields.get("use_rslora") else rank


def _alpha(scale: float, divisor: float) -> float:
    alpha = scale * divisor
    return round(alpha) if round(alpha) / divisor == scale else alpha


def _common(values: Mapping[str, Any]) -> tuple[Any, dict[str, Any]]:
    """The most common value, and a pattern for each other one."""
    [(most, _)] = collections.Counter(values.values()).most_common(1)
    # Names that end alike lie side by side: where do those of one value stop?
    order = sorted((("." + name)[::-1], value) for name, value in values.items())
    stop = [len(order)] * len(order)
    for i in range(len(order) - 2, -1, -1):
        stop[i] = stop[i + 1] if order[i][1] == order[i + 1][1] else i + 1

    def is_alike(tail: str) -> bool:
        back = ("." + tail)[::-1]
        end = stop[bisect.bisect_left(order, back, key=lambda entry: entry[0])]
        return end == len(order) or not order[end][0].startswith(back)

    return most, {
        re.escape(next((tail for tail in _endings(name) if is_alike(tail)), name)): value
        for name, value in values.items()
        if value != most
    }
