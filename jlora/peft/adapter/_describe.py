"""Makes the configuration that describes an adapter tree; keeps given fields that fit."""

import collections
import math
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..._errors import InputError, Problem
from ..._tree import name_of
from ..._types import Path
from .._file import shorten
from .._problems import Problems
from ..names._kinds import LINEAR
from ..names._leaves import NamedLeaf
from ._arranged import Tree
from ._config import DEFAULTS, PATTERNS, ROWS_ALONE, ROWS_DEFAULTS, problems_of
from ._parts import INDICES, Part, find_rows, list_lone_heads
from ._patterns import Clock
from ._roles import (
    Role,
    find_divisor,
    is_nested,
    list_parents,
    list_tails,
    make_saves,
    resolve,
    saves_bias,
)
from ._sorted import SAVED_BY_NAME, is_of_vocabulary, may_tie

Fields = dict[str, Any]

NO_MODULE = "dummy-target-modules"  # PEFT's word for "no module"


def describe(
    given: Fields, tree: Tree, parts: Sequence[Part[np.ndarray]], argument: str, problems: Problems
) -> Fields:
    """Makes the configuration of an adapter; keeps the `given` fields that describe it.

    Args:
        given: fields.
        tree: the adapter.
        parts: its A and B.
        argument: the user's argument with the adapter.
        problems: collects what is wrong with `given`.
    """
    is_alone = given.get("peft_type") == ROWS_ALONE
    fields = (ROWS_DEFAULTS if is_alone else DEFAULTS) | given
    if is_alone:
        fields["token_indices"] = _find_rows_of_all(tree, argument)
    elif parts:
        fields["use_dora"] = any(part.m is not None for part in parts)
    problems.stop(*problems_of(fields, is_file=False))
    if is_alone:
        return _select_rows_alone(fields, tree)
    is_of_peft = "peft_version" in given and any(leaf.by_parameter for leaf in tree.leaves)
    fields = _set_targets(fields, tree, is_of_peft)
    fields = _set_scales(fields, _key(parts, fields), tree.tied)
    return _set_tokens(_set_full(fields, tree), tree)


def _key(parts: Sequence[Part[np.ndarray]], fields: Fields) -> Iterable[Part[np.ndarray]]:
    """Gives parts whose parameters are selected by name these names as keys."""
    if not fields["target_parameters"]:
        return parts
    homes = [part.name.rpartition(".")[::2] for part in parts]
    roles = resolve(fields, (module for module, _ in homes), Clock())
    return [
        part._replace(key=part.name) if parameter in roles[module].parameters else part
        for part, (module, parameter) in zip(parts, homes, strict=True)
    ]


# ------------------------------------------------------------------------- which are adapted


def _set_targets(fields: Fields, tree: Tree, is_of_peft: bool) -> Fields:
    """Selects the leaves with A and B, and the heads tied to them, and nothing else."""
    adapted, tied = _list_adapted(tree)
    # PEFT, which knew the model, took none of the names that it wrote for those of experts.
    if _selects(fields, tree) or (is_of_peft and _selects(fields, tree.by_module())):
        return fields if adapted else fields | {"target_modules": NO_MODULE}
    # By whether a key is of a bare parameter: whether it is adapted.
    keys: dict[bool, dict[str, bool]] = {False: dict.fromkeys(_find_others(tree), False), True: {}}
    for leaf in tree.leaves:
        for module, name in zip(leaf.modules, leaf.parameters, strict=True):
            keys[True][name] = leaf.is_bare and name in adapted
            if leaf.name.kind and not leaf.is_bare:
                keys[False][module] = name in adapted
    # Heads that PEFT does not tie by itself are selected by name.
    apart = [h for m, h in tied.items() if not _ties({"ensure_weight_tying": True}, m, h)]
    keys[False] |= dict.fromkeys(apart, True)
    targets = _select(keys[False], tree.is_whole)
    # A whole name also selects the modules whose names end with it.
    chosen = frozenset(targets)
    unwanted = (name for name, is_chosen in keys[False].items() if not is_chosen)
    excluded = [name for name in unwanted if not chosen.isdisjoint(list_tails(name))]
    return fields | {
        "target_modules": targets if adapted else NO_MODULE,
        "target_parameters": _select(keys[True], tree.is_whole) or None,
        "exclude_modules": excluded or None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "ensure_weight_tying": len(apart) < len(tied),
    }


def _selects(fields: Fields, tree: Tree) -> bool:
    """Whether fields select the leaves with A and B, and the heads tied to them, alone."""
    adapted, tied = _list_adapted(tree)
    others = _find_others(tree)
    roles = resolve(fields, [*tree.modules, *others, *tied.values()], Clock())
    heads = all(_ties(fields, m, head) or roles[head].adapts for m, head in tied.items())
    each = ((x, *own) for x in tree.leaves for own in zip(x.modules, x.parameters, strict=True))
    own = all(_adapts(roles[module], x) == (name in adapted) for x, module, name in each)
    return heads and own and not any(roles[m].adapts and not roles[m].saves for m in others)


def _list_adapted(tree: Tree) -> tuple[set[str], dict[str, str]]:
    """Lists the parameters with A and B, and the heads tied to them by their embeddings."""
    adapted = {name for leaf in tree.low for name in leaf.parameters}
    return adapted, {m: head for m, head in tree.tied.items() if f"{m}.weight" in adapted}


def _find_others(tree: Tree) -> set[str]:
    """Finds the modules that PEFT cannot adapt as a whole: containers, experts, norms."""
    linear = (x for x in tree.leaves if x.name.kind and not x.is_bare)
    return _with_parents(tree.modules) - {module for leaf in linear for module in leaf.modules}


def _with_parents(modules: Iterable[str]) -> set[str]:
    """Returns the modules, and all modules around them, in which PEFT searches too."""
    return {parent for module in modules for parent in list_parents(module)}


def _adapts(role: Role, leaf: NamedLeaf) -> bool:
    if leaf.name.kind is None or role.saves:
        return False
    if leaf.name.parameter in role.parameters:
        return True
    return role.adapts and not leaf.is_bare


def _ties(fields: Mapping[str, Any], module: str, head: str) -> bool:
    """Whether PEFT gives a tied head the same A and B as its embedding `module`."""
    # PEFT recognizes embeddings by these names alone.
    return may_tie(fields, head) and _last_of(module) in SAVED_BY_NAME


# ------------------------------------------------------------------------- what is saved whole


def _set_full(fields: Fields, tree: Tree) -> Fields:
    """Saves leaves in full, and heads tied to them, by `bias` or `modules_to_save`."""
    unasked = set() if tree.is_whole else {x.path for x in tree.full if _may_be_unasked(fields, x)}
    wanted = {leaf.path for leaf in tree.full} - unasked
    heads = [h for leaf in tree.full if (h := tree.tied.get(leaf.modules[0]))]

    def saved(fields: Fields) -> set[Path]:
        return {leaf.path for leaf in find_full(fields, tree)} - unasked

    saves = make_saves(fields)
    is_described = saved(fields) == wanted and not is_nested(fields, tree.modules)
    if is_described and all(may_tie(fields, head) or saves(head) for head in heads):
        return fields
    of_lora, every = (
        saved(fields | {"modules_to_save": None, "bias": bias}) for bias in ("lora_only", "all")
    )
    # With "all", PEFT would store the biases of `modules_to_save` three times.
    is_every = wanted == every and (tree.is_whole or every != of_lora)
    bias = "all" if is_every else "lora_only" if wanted & of_lora else "none"
    rest = {"all": set(), "lora_only": wanted - of_lora, "none": wanted}[bias]
    modules = dict.fromkeys(m for leaf in tree.leaves if leaf.path in rest for m in leaf.modules)
    modules |= dict.fromkeys(heads)
    # PEFT cannot load a module that is saved in another one.
    outer = [m for m in modules if [p for p in list_parents(m) if p in modules] == [m]]
    return fields | {
        "bias": bias,
        "modules_to_save": outer or None,
        # Without this, PEFT would separate a head from its embedding.
        "ensure_weight_tying": bool(heads) or fields["ensure_weight_tying"],
    }


def _may_be_unasked(fields: Fields, leaf: NamedLeaf) -> bool:
    """Whether PEFT stores a parameter although no field names its module."""
    [module] = leaf.modules
    return may_tie(fields, module) or is_of_vocabulary(module, leaf.name.parameter)


def find_full(fields: Fields, tree: Tree) -> list[NamedLeaf]:
    """Finds the leaves of which all modules are saved in full."""
    saves = make_saves(fields)
    adapted = {module for leaf in tree.low for module in leaf.modules}

    def is_saved(leaf: NamedLeaf, module: str) -> bool:
        return saves(module) or saves_bias(fields, leaf.name.parameter, module in adapted)

    return [leaf for leaf in tree.leaves if all(is_saved(leaf, module) for module in leaf.modules)]


def find_frozen(fields: Fields, tree: Tree) -> dict[str, NamedLeaf]:
    """Finds the frozen embeddings and heads that PEFT stores with A and B, by parameter."""
    if fields.get(INDICES) is not None:  # then PEFT stores none
        return {}
    target = fields["target_modules"]
    lasts = [_last_of(module) for leaf in tree.low for module in leaf.modules]
    if not any(name in (target if isinstance(target, list) else lasts) for name in SAVED_BY_NAME):
        return {}
    return {
        f"{module}.weight": leaf
        for leaf in tree.low
        if leaf.name.tied or _last_of(leaf.modules[0]) in SAVED_BY_NAME
        for module in (*leaf.modules, tree.tied.get(leaf.modules[0]))
        if module
    }


# ------------------------------------------------------------------------- how it is trained


def set_training(fields: Fields, given: Mapping[str, Any], tree: Tree) -> Fields:
    """Sets dropout and `fan_in_fan_out`."""
    dropouts = {tree.found[leaf.path].dropout for leaf in tree.low}
    if "lora_dropout" not in given and len(dropouts) > 1:
        raise InputError(
            "adapter",
            f"has the dropout rates {sorted(dropouts)}, but PEFT has one for all sites. "
            "Choose it with config={'lora_dropout': 0.1}.",
        )
    new: Fields = {}
    if "lora_dropout" not in given:
        new["lora_dropout"] = next(iter(dropouts), 0.0)
    if "fan_in_fan_out" not in given:
        linear = (leaf.name for leaf in tree.low if leaf.kind is LINEAR)
        new["fan_in_fan_out"] = any(name.transposed for name in linear)
    fields = fields | new
    is_bare = bool(fields["target_parameters"]) and any(leaf.is_bare for leaf in tree.low)
    if (rate := fields["lora_dropout"]) and is_bare:
        raise InputError(
            "adapter",
            f"has the dropout rate {rate}, but PEFT refuses dropout beside experts and "
            "other bare parameters. Write it without: config={'lora_dropout': 0.0}.",
        )
    return fields


def _set_tokens(fields: Fields, tree: Tree) -> Fields:
    """Sets the rows of embeddings, and no others."""
    wanted = {leaf.modules[0]: tree.found[leaf.path].rows for leaf in tree.rows}
    others = _with_parents(tree.modules) - wanted.keys()
    listed, alone = find_rows(fields, wanted, problems := Problems("", ""))
    if listed == wanted and not (problems.found or list_lone_heads(alone, others)):
        return fields

    # PEFT compares the ends of names, also within a component.
    def shorten_name(module: str) -> str:
        last = _last_of(module)
        is_clear = last.isidentifier() and not any(x.endswith(last) for x in others)
        return last if tree.is_whole and is_clear else module

    return fields | {INDICES: {shorten_name(m): list(rows) for m, rows in wanted.items()} or None}


def _find_rows_of_all(tree: Tree, argument: str) -> list[int]:
    """Finds the rows of an adapter of rows alone: PEFT has one list of them for all embeddings."""
    lists = {tree.found[leaf.path].rows: name_of(leaf.path) for leaf in tree.rows}
    if len(lists) > 1:
        raise InputError(
            argument,
            "has only rows of embeddings, and PEFT has one list of rows for all of "
            "them; got different lists.",
            problems=[Problem(name, f"rows {shorten(rows)}") for rows, name in lists.items()],
            remedy="Save each embedding by itself.",
        )
    return list(*lists)


def _select_rows_alone(fields: Fields, tree: Tree) -> Fields:
    """Selects the embeddings of an adapter of rows alone."""
    wanted = [leaf.modules[0] for leaf in tree.rows]
    others = _with_parents(tree.modules) - set(wanted)
    roles = resolve(fields, [*wanted, *others], Clock())
    if {m for m, role in roles.items() if role.adapts} == set(wanted):
        return fields
    chosen = dict.fromkeys(others, False) | dict.fromkeys(wanted, True)
    return fields | {"target_modules": _select(chosen, tree.is_whole)}


# ------------------------------------------------------------------------- names


def _select(chosen: Mapping[str, bool], is_whole: bool = True) -> list[str]:
    """Lists names by which PEFT finds the chosen modules: their last words, or their whole names.

    They have their last words if no other module has one of these. Otherwise they have their whole
    names, as PEFT also searches modules without parameters, which are not known here: those of
    `torch.nn.Sequential` have the same numbers. All names are whole unless `chosen` has the whole
    model, and if PEFT would store the frozen weight of an embedding that its last word selects.
    """
    names = [name for name, is_chosen in chosen.items() if is_chosen]
    lasts = dict.fromkeys(map(_last_of, names))
    others = {_last_of(name) for name, is_chosen in chosen.items() if not is_chosen}
    is_short = is_whole and all(map(str.isidentifier, lasts)) and others.isdisjoint(lasts)
    return [*lasts] if is_short and lasts.keys().isdisjoint(SAVED_BY_NAME) else names


def _last_of(name: str) -> str:
    return name.rpartition(".")[2]


# ------------------------------------------------------------------------- ranks and scales


def _set_scales(
    fields: Fields, parts: Iterable[Part[np.ndarray]], tied: Mapping[str, str]
) -> Fields:
    """Sets rank, alpha and patterns for the keys of parts, and for the heads tied to them."""
    scales = {part.key: (part.rank, part.scale) for part in parts}
    scales |= {head: scales[key] for key, head in tied.items() if key in scales}
    # The first pattern that matches counts, and files have them in order.
    fields = fields | {key: dict(sorted(fields[key].items())) for key in PATTERNS if fields[key]}
    roles = resolve(fields, scales, Clock())
    # The factor of a row of `names` may have changed the last bit of a scale.
    same = (
        roles[k].rank == rank and math.isclose(roles[k].scale, scale, rel_tol=1e-15)
        for k, (rank, scale) in scales.items()
    )
    if all(same):
        return fields
    ranks = {key: rank for key, (rank, _) in scales.items()}
    alphas = {k: find_alpha(scale, find_divisor(fields, r)) for k, (r, scale) in scales.items()}
    r, rank_pattern = find_common(ranks)
    alpha, alpha_pattern = find_common(alphas)
    new = {
        "r": r,
        "lora_alpha": alpha,
        "rank_pattern": rank_pattern,
        "alpha_pattern": alpha_pattern,
    }
    return fields | new


def find_alpha(scale: float, divisor: float) -> float:
    """Finds the alpha of a scale, an integer if it can be."""
    alpha = scale * divisor
    return round(alpha) if round(alpha) / divisor == scale else alpha


def find_common(values: Mapping[str, float]) -> tuple[float, dict[str, float]]:
    """Finds the most common value, and patterns for the others: last words, or else whole names."""
    [(most, _)] = collections.Counter(values.values()).most_common(1)
    each = collections.defaultdict[str, set[float]](set)
    for name, x in values.items():
        each[_last_of(name)].add(x)
    inner = {tail for name in values for tail in list_tails(name) if tail != name}

    def spell(name: str) -> str:
        last = _last_of(name)
        if len(each[last]) == 1:
            return re.escape(last)
        return "^" * (name in inner) + re.escape(name)  # PEFT matches the ends of names

    return most, {spell(name): x for name, x in values.items() if x != most}
