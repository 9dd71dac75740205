"""The fields of PEFT's configuration that select and save a tree, and what is saved beside it."""

from collections.abc import Collection, Mapping, Sequence
from typing import Any

from ..._types import Path
from .._file import PREFIX
from ..names._names import Leaf
from ._read import BASE, SAVED_BY_NAME, may_tie
from ._select import Selection, suffixes

Fields = dict[str, Any]

NO_MODULE = "dummy-target-modules"  # PEFT's word where nothing has A and B


def with_targets(
    fields: Fields, leaves: Sequence[Leaf], own: Sequence[Leaf], tied: Mapping[str, str]
) -> Fields:
    """`fields` that select the leaves `own`, and the heads `tied` to them, and no others."""
    selection = Selection(fields)
    selection.prepare([*(m for leaf in leaves for m in leaf.modules), *tied.values()])
    chosen = {name for leaf in own for name in leaf.parameters}
    as_wanted = all(
        _adapts(selection, leaf, module) == (name in chosen)
        for leaf in leaves
        for module, name in zip(leaf.modules, leaf.parameters, strict=True)
    )
    if as_wanted and all(ties(fields, m) or selection.adapts(h) for m, h in tied.items()):
        selects = own or fields["target_modules"] or fields["target_parameters"]
        return fields if selects else fields | {"target_modules": NO_MODULE}
    others = [_but(leaf, chosen) for leaf in leaves if leaf.name.kind]
    ties_all = {"ensure_weight_tying": True}
    new: Fields = {"exclude_modules": None, "layers_to_transform": None, "layers_pattern": None}
    new["ensure_weight_tying"] = any(ties(ties_all, module) for module in tied)
    # What PEFT does not tie itself is selected by name.
    heads = [] if new["ensure_weight_tying"] else tied.values()
    wanted = [*_keys(own, experts=False), *heads]
    # By a bare name of these, PEFT would store the frozen weights too.
    whole = [m for m in wanted if m.rpartition(".")[2] in SAVED_BY_NAME]
    short = suffixes([m for m in wanted if m not in whole], _keys(others, experts=False))
    new["target_modules"] = whole + short
    new["target_parameters"] = (
        suffixes(_keys(own, experts=True), _keys(others, experts=True)) or None
    )
    return fields | new


def _but(leaf: Leaf, chosen: Collection[str]) -> Leaf:
    """`leaf` without the modules of which `chosen` has the parameter."""
    each = zip(leaf.modules, leaf.parameters, strict=True)
    return leaf._replace(modules=tuple(module for module, name in each if name not in chosen))


def _adapts(selection: Selection, leaf: Leaf, module: str) -> bool:
    if leaf.name.kind is None or selection.saves(module):
        return False
    if leaf.name.parameter in selection.parameters(module):
        return True
    whole = leaf.name.kind != "experts" and leaf.name.parameter == "weight"
    return whole and selection.adapts(module)


def ties(fields: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT gives the head that is tied to the embedding `module` the same A and B."""
    # It knows embeddings by these names alone.
    return bool(fields.get("ensure_weight_tying")) and module.rpartition(".")[2] in SAVED_BY_NAME


def _keys(leaves: Sequence[Leaf], *, experts: bool) -> list[str]:
    found = (leaf for leaf in leaves if (leaf.name.kind == "experts") == experts)
    return [leaf.key(m) for leaf in found for m in leaf.modules]


def with_full(
    fields: Fields,
    leaves: Sequence[Leaf],
    own: Sequence[Leaf],
    wanted: set[Path],
    tied: Mapping[str, str],
) -> Fields:
    """`fields` that save the leaves trained in full: by `bias`, the rest by `modules_to_save`.

    So they do with the heads that are `tied` to some of them.
    """

    def saved(fields: Fields) -> set[Path]:
        return {leaf.path for leaf, _ in saved_in_full(fields, leaves, own)}

    saves = Selection(fields).saves
    if saved(fields) == wanted and all(may_tie(fields, h) or saves(h) for h in tied.values()):
        return fields
    every, of_lora = (
        saved(fields | {"modules_to_save": None, "bias": bias}) for bias in ("all", "lora_only")
    )
    # Beside "all", PEFT would store the biases of `modules_to_save` three times.
    bias = "all" if wanted == every else "lora_only" if wanted & of_lora else "none"
    rest = {"all": set(), "lora_only": wanted - of_lora, "none": wanted}[bias]
    modules = [m for leaf in leaves if leaf.path in rest for m in leaf.modules]
    # PEFT keeps a head and its embedding one weight by `ensure_weight_tying` alone.
    ensured = bool(tied) or fields["ensure_weight_tying"]
    modules = list(dict.fromkeys([*modules, *tied.values()])) or None
    return fields | {"bias": bias, "modules_to_save": modules, "ensure_weight_tying": ensured}


def saved_in_full(
    fields: Fields, leaves: Sequence[Leaf], own: Sequence[Leaf]
) -> list[tuple[Leaf, list[str]]]:
    """The leaves that are saved in full, with a key for each of their modules."""
    selection, bias = Selection(fields), fields.get("bias", "none")
    adapted = {module for leaf in own for module in leaf.modules}

    def key(leaf: Leaf, module: str) -> str | None:
        parameter = leaf.name.parameter
        if selection.saves(module):
            return f"{PREFIX}{module}.{parameter}"
        if parameter == "bias" and module in adapted and bias in ("all", "lora_only"):
            return f"{PREFIX}{module}{BASE}.bias"
        return f"{PREFIX}{module}.bias" if parameter == "bias" and bias == "all" else None

    keys = [(leaf, [key(leaf, module) for module in leaf.modules]) for leaf in leaves]
    found = [(leaf, [k for k in each if k]) for leaf, each in keys]
    return [(leaf, each) for leaf, each in found if len(each) == len(leaf.modules)]


def frozen_beside(fields: Fields, own: Sequence[Leaf], tied: Mapping[str, str]) -> dict[str, Leaf]:
    """The frozen embeddings and heads that PEFT stores beside A and B, by their keys."""
    if fields.get("trainable_token_indices") is not None:  # PEFT then stores none
        return {}
    target = fields["target_modules"]
    lasts = [module.rpartition(".")[2] for leaf in own for module in leaf.modules]
    if not any(name in (target if isinstance(target, list) else lasts) for name in SAVED_BY_NAME):
        return {}
    return {
        f"{PREFIX}{module}{BASE}.weight": leaf
        for leaf in own
        if leaf.name.tied or leaf.modules[0].rpartition(".")[2] in SAVED_BY_NAME
        for module in (*leaf.modules, tied.get(leaf.modules[0]))
        if module
    }


def with_training(
    fields: Fields, own: Sequence[Leaf], found: Mapping[Path, Any], config: Mapping[str, Any]
) -> Fields:
    """`fields` with dropout and orientation."""
    dropouts = {found[leaf.path].dropout for leaf in own}
    if "lora_dropout" not in config and len(dropouts) > 1:
        raise ValueError(
            f"`adapter` has the dropout rates {sorted(dropouts)}, but PEFT has one for all. "
            "Choose it by config={'lora_dropout': 0.1}."
        )
    new: Fields = {}
    if "lora_dropout" not in config:
        new["lora_dropout"] = next(iter(dropouts), 0.0)
    if "fan_in_fan_out" not in config:
        new["fan_in_fan_out"] = any(
            leaf.name.transposed for leaf in own if leaf.name.kind == "linear"
        )
    return fields | new
