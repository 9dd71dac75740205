"""Resolves a configuration: what PEFT does with each module."""

import collections
import itertools
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from ..._errors import shorten
from ..names._peft import load_answers
from ._config import DEFAULTS
from ._patterns import (
    CHOICES,
    PATTERNS,
    as_in_peft,
    as_list,
    list_parents,
    list_tails,
    make_matching,
)

HEADS = load_answers()["heads"]
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


class Roles(dict[str, Role]):
    """The role of each module or targeted parameter, by PyTorch's names; found when asked for.

    Source: `check_target_module_exists` of `peft.tuners`.

    Attributes:
        fields: the configuration. Where PEFT chose all linear modules, it lists those with A and B.
        saves: whether `modules_to_save` names a module, or one around it.
        matching: for each field of patterns a function that lists those that match a name.
    """

    def __init__(self, fields: Fields, adapted: Iterable[str] = ()) -> None:
        """Takes fields without problems, and the modules with A and B."""
        super().__init__()
        self._list_parameters = _make_parameters(fields)
        if fields.get("target_modules") == "all-linear":
            linear = [x for x in dict.fromkeys(adapted) if not self._list_parameters(x)]
            fields = {**fields, "target_modules": linear}
        self.fields = dict(fields)
        self.saves = make_saves(fields)
        self._is_target, self._is_excluded = (_make_choice(fields.get(key)) for key in CHOICES)
        self._is_in_layer = _make_layers(fields)
        self.matching = {key: make_matching(key, fields.get(key) or ()) for key in PATTERNS}
        each = {key: enumerate((fields.get(key) or {}).items()) for key in PATTERNS}
        self._ordered = {key: {x: (i, value) for i, (x, value) in own} for key, own in each.items()}

    def __missing__(self, name: str) -> Role:
        """Finds a role."""
        adapts = self._is_target(name) and not self._is_excluded(name) and self._is_in_layer(name)
        rank = self._find_first("rank_pattern", name, "r")
        alpha = self._find_first("alpha_pattern", name, "lora_alpha")
        parameters = () if adapts else self._list_parameters(name)
        scale = alpha / find_divisor(self.fields, rank)
        self[name] = Role(adapts, self.saves(name), rank, scale, parameters)
        return self[name]

    def _find_first(self, field: str, name: str, default: str) -> Any:
        """Finds the value of the first pattern that matches, or the default."""
        usual = 0, self.fields.get(default, DEFAULTS[default])
        matching = map(self._ordered[field].__getitem__, self.matching[field](name))
        _, value = min(matching, default=usual)
        return value

    def saves_whole(self, module: str, parameter: str, is_adapted: bool) -> bool:
        """Whether PEFT saves a parameter as a whole, by `modules_to_save` or `bias`."""
        return self[module].saves or saves_bias(self.fields, parameter, is_adapted)


def saves_bias(fields: Fields, parameter: str, is_adapted: bool) -> bool:
    """Whether PEFT saves a parameter because it is a bias."""
    bias = fields.get("bias", "none")
    return parameter == "bias" and (bias == "all" or (bias == "lora_only" and is_adapted))


def list_unused(
    roles: Roles, keys: Sequence[str], saved: Iterable[str], modules: Iterable[str], where: str
) -> list[str]:
    """Lists the names in a configuration that match nothing, which PEFT accepts.

    Targets that are excluded, or in other layers, are not listed, as PEFT writes them too.

    Args:
        roles: those of the configuration.
        keys: what is adapted.
        saved: the modules that the adapter has in full.
        modules: those of the model, which is called `where`.
        where: what the texts call the model.
    """
    fields = roles.fields
    both = ("target_modules", "target_parameters")
    listed = {key: x for key in both if isinstance(x := fields.get(key), list)}
    wanted = set[str]().union(*listed.values())
    names = itertools.chain(keys, modules)
    used = {tail for name in names for tail in list_tails(name) if tail in wanted}
    left = ((key, x) for key, own in listed.items() for x in own if x not in used)
    unused = [f"{key}: {shorten(x)} matches no module of {where}" for key, x in left]
    list_saved = _make_endings(fields)
    holders = {parent for module in saved for parent in list_parents(module)}
    used = {end for name in holders for end in list_saved(name)}.union(HEADS)
    left = (x for x in fields.get("modules_to_save") or [] if x not in used)
    unused += [f"modules_to_save: {shorten(x)} matches none of the adapter's tensors" for x in left]
    for field, list_matching in roles.matching.items():
        used = {pattern for key in keys for pattern in list_matching(key)}
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


def _make_choice(target: str | list[str] | None) -> Callable[[str], bool]:
    """Makes a predicate: whether a field, a pattern or a list of names, chooses a module."""
    if isinstance(target, str):
        expression = re.compile(target)
        return lambda name: bool(expression.fullmatch(name))
    names = frozenset(target or ())
    return lambda name: not names.isdisjoint(list_tails(name))


def _make_layers(fields: Fields) -> Callable[[str], bool]:
    """Makes a predicate: whether a module that is targeted is in `layers_to_transform`.

    PEFT does not check the layer of modules that are given by a pattern or whole names.
    """
    target, layers = fields.get("target_modules"), fields.get("layers_to_transform")
    if isinstance(target, str) or layers in (None, []):
        return lambda _: True
    whole, numbers = set(as_list(target)), set(as_list(layers))
    patterns = as_list(fields.get("layers_pattern") or [None])
    expressions = [as_in_peft("layers_pattern", x) for x in patterns]

    def is_in_layer(name: str) -> bool:
        each = (found["idx"] for x in expressions if (found := x.match(name)))
        first = next(each, None)
        return name in whole or (first is not None and int(first) in numbers)

    return is_in_layer


def _make_parameters(fields: Fields) -> Callable[[str], tuple[str, ...]]:
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
