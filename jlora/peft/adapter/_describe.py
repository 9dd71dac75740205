"""Makes the configuration that describes an adapter tree."""

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import numpy as np

from ..._errors import InputError
from .._problems import About
from ..names._kinds import LINEAR
from ..names._leaves import NamedLeaf
from ._arranged import Tree
from ._config import DEFAULTS, problems_of
from ._fits import is_of_vocabulary
from ._methods import FURTHER
from ._parts import INDICES, Part
from ._patterns import PATTERNS, last_of, list_parents, list_tails, make_scales
from ._roles import Roles, find_divisor, make_saves, saves_bias
from ._sorted import SAVED_BY_NAME, may_tie

Configuration = dict[str, Any]

NO_MODULE = "dummy-target-modules"  # PEFT's word for "no module"


def describe(
    given: Configuration, tree: Tree, parts: Sequence[Part[np.ndarray]], about: About
) -> Configuration:
    """Makes the configuration of an adapter.

    If `given` has `target_modules`, it is what chooses modules, rows and what is saved whole.

    Args:
        given: fields.
        tree: the adapter.
        parts: its A and B.
        about: what an error about `given` says.
    """
    fields = DEFAULTS | given
    if parts:
        methods = {part.method for part in parts}
        fields |= {flag: method in methods for flag, method in FURTHER.items()}
    about.stop(problems_of(fields, is_file=False))
    # Where PEFT may take a module for experts, only targets that PEFT itself has written are kept.
    is_known = "peft_version" in given or not any(leaf.by_parameter for leaf in tree.leaves)
    if not (is_known and "target_modules" in given):
        fields |= _choose(tree)
    return _set_scales(fields, _key(parts, fields), tree.tied)


def _choose(tree: Tree) -> Configuration:
    """Makes the fields that choose what is adapted and saved, and nothing else."""
    targets = _choose_targets(tree)
    full = _choose_full(tree)
    is_tied = targets["ensure_weight_tying"] or full["ensure_weight_tying"]
    return targets | full | _choose_tokens(tree) | {"ensure_weight_tying": is_tied}


def _key(parts: Sequence[Part[np.ndarray]], fields: Configuration) -> Iterable[Part[np.ndarray]]:
    """Gives parts the names that patterns match: of parameters if they are selected by name."""
    homes = [part.name.rpartition(".")[::2] for part in parts]
    roles = Roles(fields)
    return [
        part._replace(key=part.name if parameter in roles[module].parameters else module)
        for part, (module, parameter) in zip(parts, homes, strict=True)
    ]


# ------------------------------------------------------------------------- which are adapted


def _choose_targets(tree: Tree) -> Configuration:
    """Selects the leaves with A and B, and the heads tied to them, and nothing else."""
    adapted = {name for leaf in tree.low for name in leaf.parameters}
    tied = {m: head for m, head in tree.tied.items() if f"{m}.weight" in adapted}
    # By whether a key is of a bare parameter: whether it is adapted.
    keys: dict[bool, dict[str, bool]] = {False: dict.fromkeys(_find_others(tree), False), True: {}}
    for leaf in tree.leaves:
        for module, name in zip(leaf.modules, leaf.parameters, strict=True):
            keys[True][name] = leaf.is_bare and name in adapted
            if leaf.name.kind and not leaf.is_bare:
                keys[False][module] = name in adapted
    # PEFT ties a head by itself if both names are those that it knows; others are selected.
    tying = {"ensure_weight_tying": True}
    apart = [h for m, h in tied.items() if not (may_tie(tying, h) and last_of(m) in SAVED_BY_NAME)]
    keys[False] |= dict.fromkeys(apart, True)
    targets = _select(keys[False], tree.is_whole)
    # A whole name also selects the modules whose names end with it.
    chosen = frozenset(targets)
    unwanted = (name for name, is_chosen in keys[False].items() if not is_chosen)
    excluded = [name for name in unwanted if not chosen.isdisjoint(list_tails(name))]
    return {
        "target_modules": targets if adapted else NO_MODULE,
        "target_parameters": _select(keys[True], tree.is_whole) or None,
        "exclude_modules": excluded or None,
        "layers_to_transform": None,
        "layers_pattern": None,
        "ensure_weight_tying": len(apart) < len(tied),
    }


def _find_others(tree: Tree) -> set[str]:
    """Finds the modules that PEFT cannot adapt as a whole: containers, experts, norms."""
    linear = (x for x in tree.leaves if x.name.kind and not x.is_bare)
    return _with_parents(tree.modules) - {module for leaf in linear for module in leaf.modules}


def _with_parents(modules: Iterable[str]) -> set[str]:
    """Returns the modules, and all modules around them, in which PEFT searches too."""
    return {parent for module in modules for parent in list_parents(module)}


# ------------------------------------------------------------------------- what is saved whole


def _choose_full(tree: Tree) -> Configuration:
    """Saves leaves in full, and heads tied to them, by `bias` or `modules_to_save`."""
    # PEFT stores the parameters of a vocabulary although no field names their modules.
    each = () if tree.is_whole else tree.full
    unasked = {x.path for x in each if is_of_vocabulary(x.modules[0], x.name.parameter)}
    wanted = {leaf.path for leaf in tree.full} - unasked
    heads = [h for leaf in tree.full if (h := tree.tied.get(leaf.modules[0]))]
    of_lora, every = (
        {leaf.path for leaf in find_full({"bias": bias}, tree)} - unasked
        for bias in ("lora_only", "all")
    )
    # With "all", PEFT would store the biases of `modules_to_save` three times.
    is_every = bool(wanted) and wanted == every and (tree.is_whole or every != of_lora)
    bias = "all" if is_every else "lora_only" if wanted & of_lora else "none"
    rest = {"all": set(), "lora_only": wanted - of_lora, "none": wanted}[bias]
    modules = dict.fromkeys(m for leaf in tree.leaves if leaf.path in rest for m in leaf.modules)
    modules |= dict.fromkeys(heads)
    # PEFT cannot load a module that is saved in another one.
    outer = [m for m in modules if [p for p in list_parents(m) if p in modules] == [m]]
    # Without `ensure_weight_tying`, PEFT would separate a head from its embedding.
    return {
        "bias": bias,
        "modules_to_save": outer or None,
        "ensure_weight_tying": bool(heads),
    }


def find_full(fields: Configuration, tree: Tree) -> list[NamedLeaf]:
    """Finds the leaves of which all modules are saved in full."""
    saves = make_saves(fields)
    adapted = {module for leaf in tree.low for module in leaf.modules}

    def is_saved(leaf: NamedLeaf, module: str) -> bool:
        return saves(module) or saves_bias(fields, leaf.name.parameter, module in adapted)

    return [leaf for leaf in tree.leaves if all(is_saved(leaf, module) for module in leaf.modules)]


def find_frozen(fields: Configuration, tree: Tree) -> dict[str, NamedLeaf]:
    """Finds the frozen embeddings and heads that PEFT stores with A and B, by parameter."""
    if fields.get(INDICES) is not None:  # then PEFT stores none
        return {}
    target = fields["target_modules"]
    lasts = [last_of(module) for leaf in tree.low for module in leaf.modules]
    if not any(name in (target if isinstance(target, list) else lasts) for name in SAVED_BY_NAME):
        return {}
    return {
        f"{module}.weight": leaf
        for leaf in tree.low
        if leaf.name.tied or last_of(leaf.modules[0]) in SAVED_BY_NAME
        for module in (*leaf.modules, tree.tied.get(leaf.modules[0]))
        if module
    }


# ------------------------------------------------------------------------- how it is trained


def set_training(fields: Configuration, given: Mapping[str, Any], tree: Tree) -> Configuration:
    """Sets dropout and `fan_in_fan_out`."""
    dropouts = {tree.found[leaf.path].dropout for leaf in tree.low}
    if "lora_dropout" not in given and len(dropouts) > 1:
        raise InputError(
            "adapter",
            f"has the dropout rates {sorted(dropouts)}, but PEFT has one for all sites. "
            "Choose it with config={'lora_dropout': 0.1}.",
        )
    new: Configuration = {}
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


def _choose_tokens(tree: Tree) -> Configuration:
    """Chooses the rows of embeddings."""
    wanted = {leaf.modules[0]: tree.found[leaf.path].rows for leaf in tree.rows}
    others = _with_parents(tree.modules) - wanted.keys()

    # PEFT compares the ends of names, also within a component.
    def shorten_name(module: str) -> str:
        last = last_of(module)
        is_clear = last.isidentifier() and not any(x.endswith(last) for x in others)
        return last if tree.is_whole and is_clear else module

    return {INDICES: {shorten_name(m): list(rows) for m, rows in wanted.items()} or None}


# ------------------------------------------------------------------------- names


def _select(chosen: Mapping[str, bool], is_whole: bool = True) -> list[str]:
    """Lists names by which PEFT finds the chosen modules: their last words, or their whole names.

    They have their last words if no other module has one of these. Otherwise they have their whole
    names, as PEFT also searches modules without parameters, which are not known here: those of
    `torch.nn.Sequential` have the same numbers. All names are whole unless `chosen` has the whole
    model, and if PEFT would store the frozen weight of an embedding that its last word selects.
    """
    names = [name for name, is_chosen in chosen.items() if is_chosen]
    lasts = dict.fromkeys(map(last_of, names))
    others = {last_of(name) for name, is_chosen in chosen.items() if not is_chosen}
    is_short = is_whole and all(map(str.isidentifier, lasts)) and others.isdisjoint(lasts)
    return [*lasts] if is_short and lasts.keys().isdisjoint(SAVED_BY_NAME) else names


# ------------------------------------------------------------------------- ranks and scales


def _set_scales(
    fields: Configuration, parts: Iterable[Part[np.ndarray]], tied: Mapping[str, str]
) -> Configuration:
    """Sets rank, alpha and patterns for the keys of parts, and for the heads tied to them."""
    scales = {part.key: (part.rank, part.scale) for part in parts}
    scales |= {head: scales[key] for key, head in tied.items() if key in scales}
    # The first pattern that matches counts, and files have them in order.
    fields = fields | {key: dict(sorted(fields[key].items())) for key in PATTERNS if fields[key]}
    roles = Roles(fields)
    # The factor of a row of `names` may have changed the last bit of a scale.
    same = (
        roles[k].rank == rank and math.isclose(roles[k].scale, scale, rel_tol=1e-15)
        for k, (rank, scale) in scales.items()
    )
    if all(same):
        return fields
    ranks = {key: rank for key, (rank, _) in scales.items()}
    alphas = {k: find_alpha(scale, find_divisor(fields, r)) for k, (r, scale) in scales.items()}
    return fields | make_scales(ranks, alphas)


def find_alpha(scale: float, divisor: float) -> float:
    """Finds the alpha of a scale, an integer if it can be."""
    alpha = scale * divisor
    return round(alpha) if round(alpha) / divisor == scale else alpha
