"""Which tensors an adapter has: the one list that reading checks and writing fills."""

import collections
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from .._tree import name_of
from ._json import brief
from ._names import Leaf, Name, tied_to
from ._select import ends, rank_of, scale_of, selects

PREFIX = "base_model.model."
# PEFT saves the weights of an embedding that is targeted by one of these names beside its A and B.
SAVED_BY_NAME = ("embed_tokens", "lm_head")
# PEFT lists these for every sequence classifier, whatever its head is called.
HEADS = ("classifier", "score")


class Adapted(NamedTuple):
    """A leaf with A and B: its rank and scale, and the keys of both for each of its modules."""

    leaf: Leaf
    rank: int
    scale: float
    keys: list[tuple[str, str]]


class Saved(NamedTuple):
    """A leaf that is saved in full, with a key for each of its modules."""

    leaf: Leaf
    keys: list[str]


class Plan(NamedTuple):
    """What a configuration says about the leaves of a base.

    Attributes:
        adapted: leaves with A and B.
        saved: leaves in full.
        heads: modules that are tied to adapted embeddings.
        tied: keys of the factors of a tied head; each is the transpose of the tensor named here.
        copies: keys under which PEFT may store frozen weights of an adapted embedding or head.
        problems: what a tree of ours cannot hold.
    """

    adapted: list[Adapted]
    saved: list[Saved]
    heads: list[str]
    tied: dict[str, str]
    copies: dict[str, Leaf]
    problems: list[str]


def make_plan(fields: Mapping[str, Any], leaves: Sequence[Leaf], names: Sequence[Name]) -> Plan:
    """The plan of the checked `fields` for the named `leaves`."""
    chosen = [leaf for leaf in leaves if any(_is_adapted(fields, leaf, m) for m in leaf.modules)]
    prefixes = _prefixes(chosen, names)
    adapted = [_adapted(fields, leaf, prefixes) for leaf in chosen]
    modules = {m for leaf in chosen for m in leaf.modules}
    saved = [s for leaf in leaves if (s := _saved(fields, leaf, modules))]
    wrong = [p for leaf in chosen for p in _uneven(fields, leaf)]
    wrong += [
        f"{s.leaf.modules[0]}: saved in full, which is not supported for " + what
        for s in saved
        if (what := _unsaved(s, leaves))
    ]
    heads, tied, copies = [], {}, {}
    for a in adapted:
        head = tied_to(a.leaf, leaves)
        if a.leaf.name.tied or a.leaf.modules[0].rpartition(".")[2] in SAVED_BY_NAME:
            copies |= {
                f"{PREFIX}{m}.base_layer.weight": a.leaf for m in (*a.leaf.modules, head) if m
            }
        if head:
            heads.append(head)
            wrong += _untied(fields, a, head)
            key_a, key_b = a.keys[0]
            tied[f"{PREFIX}{head}.lora_A.weight"] = key_b
            tied[f"{PREFIX}{head}.lora_B.weight"] = key_a
    return Plan(adapted, saved, heads, tied, copies, wrong)


def is_saved(fields: Mapping[str, Any], module: str) -> bool:
    """Whether `modules_to_save` names `module` or one that holds it, as PEFT matches it."""
    parts = module.split(".")
    parents = [".".join(parts[: n + 1]) for n in range(len(parts))]
    wanted = fields.get("modules_to_save") or []
    return any(parent.endswith(name) for name in wanted for parent in parents)


def keeps_embedding(fields: Mapping[str, Any], plan: Plan) -> bool:
    """Whether PEFT stores the frozen embedding beside its A and B."""
    target = fields["target_modules"]
    if isinstance(target, list):
        return any(name in target for name in SAVED_BY_NAME)
    modules = (m for a in plan.adapted for m in a.leaf.modules)
    return any(m.rpartition(".")[2] in SAVED_BY_NAME for m in modules)


def unsaved_names(fields: Mapping[str, Any], leaves: Sequence[Leaf]) -> list[str]:
    """The entries of `modules_to_save` that name nothing."""
    modules = [m for leaf in leaves for m in leaf.modules]
    return [
        f"modules_to_save: {brief(name)} names no module of `base` under `names`"
        for name in fields.get("modules_to_save") or []
        if name not in HEADS and not any(is_saved({"modules_to_save": [name]}, m) for m in modules)
    ]


def hint(key: str) -> str:
    """Why a key of a file may be unexpected."""
    if not key.startswith(PREFIX):
        return f"; PEFT's keys start with {PREFIX!r}"
    features = {
        "lora_magnitude_vector": "DoRA is not supported",
        "lora_B.bias": "lora_bias is not supported",
        "trainable_tokens": "trainable token rows are not supported",
        "original_module": "bias 'all' beside modules_to_save is not supported",
        "modules_to_save": "bias 'all' beside modules_to_save is not supported",
    }
    return next((f"; {what}" for part, what in features.items() if part in key), "")


def _is_adapted(fields: Mapping[str, Any], leaf: Leaf, module: str) -> bool:
    if leaf.name.kind is None or is_saved(fields, module):
        return False
    if leaf.name.kind == "experts":
        return any(ends(leaf.key(module), t) for t in fields.get("target_parameters") or [])
    return leaf.name.parameter == "weight" and selects(fields, module)


def _prefixes(chosen: Sequence[Leaf], names: Sequence[Name]) -> dict[tuple[str, str], str]:
    """The key of each (module, parameter) up to A and B.

    Each adapted parameter of one module wraps the wrapper of those before it.
    """
    parameters = collections.defaultdict(list)
    order = {name: i for i, name in reversed(list(enumerate(names)))}
    for leaf in sorted(chosen, key=lambda leaf: order[leaf.name]):
        for module in leaf.modules:
            parameters[module].append(leaf.name.parameter)
    return {
        (module, parameter): PREFIX + module + ".base_layer" * (len(own) - 1 - i)
        for module, own in parameters.items()
        for i, parameter in enumerate(own)
    }


def _adapted(
    fields: Mapping[str, Any], leaf: Leaf, prefixes: Mapping[tuple[str, str], str]
) -> Adapted:
    first = leaf.key(leaf.modules[0])
    starts = [prefixes[module, leaf.name.parameter] for module in leaf.modules]
    a, b = leaf.name.suffixes
    keys = [(f"{start}.{a}", f"{start}.{b}") for start in starts]
    return Adapted(leaf, rank_of(fields, first), scale_of(fields, first), keys)


def _saved(fields: Mapping[str, Any], leaf: Leaf, adapted: set[str]) -> Saved | None:
    keys = [_full_key(fields, leaf, module, adapted) for module in leaf.modules]
    return Saved(leaf, [k for k in keys if k]) if any(keys) else None


def _full_key(fields: Mapping[str, Any], leaf: Leaf, module: str, adapted: set[str]) -> str | None:
    parameter, bias = leaf.name.parameter, fields.get("bias", "none")
    if is_saved(fields, module):
        return f"{PREFIX}{module}.{parameter}"
    if parameter == "bias" and module in adapted and bias in ("all", "lora_only"):
        return f"{PREFIX}{module}.base_layer.bias"
    return f"{PREFIX}{module}.bias" if parameter == "bias" and bias == "all" else None


def _untied(fields: Mapping[str, Any], adapted: Adapted, head: str) -> list[str]:
    """The adapter of a tied weight acts on both here, so it must do so in PEFT."""
    [module] = adapted.leaf.modules
    if not ties(fields, module) and not selects(fields, head):
        return [f"{module}: adapted without {head}, which shares its weight"]
    if (rank_of(fields, head), scale_of(fields, head)) != (adapted.rank, adapted.scale):
        return [f"{head}: shares its weight with {module}, but not rank and scale"]
    return []


def ties(fields: Mapping[str, Any], module: str) -> bool:
    """Whether PEFT gives the head that is tied to the embedding `module` the same A and B."""
    # It knows embeddings by these names alone.
    return bool(fields.get("ensure_weight_tying")) and module.rpartition(".")[2] in SAVED_BY_NAME


def _uneven(fields: Mapping[str, Any], leaf: Leaf) -> list[str]:
    path = name_of(leaf.path)
    left = [m for m in leaf.modules if not _is_adapted(fields, leaf, m)]
    if left:
        return [
            f"{path}: its layers are one leaf, of which {len(leaf.modules) - len(left)} of "
            f"{len(leaf.modules)} are adapted, {left[0]} not; load into a tree without a scan"
        ]
    keys = [leaf.key(m) for m in leaf.modules]
    forms = dict.fromkeys((rank_of(fields, key), scale_of(fields, key)) for key in keys)
    if len(forms) > 1:
        listed = ", ".join(f"rank {r} and scale {s:g}" for r, s in forms)
        return [
            f"{path}: its layers are one leaf but differ: {listed}; load into a tree without a scan"
        ]
    rank, wide = next(iter(forms))[0], sum(_inputs_and_outputs(leaf))
    if rank > wide:
        return [f"{path}: rank {rank} is above inputs + outputs = {wide}, so the file is damaged"]
    return []


def _inputs_and_outputs(leaf: Leaf) -> tuple[int, int]:
    (a, b) = leaf.shapes(1)
    return max(a), max(b)


def _unsaved(saved: Saved, leaves: Sequence[Leaf]) -> str | None:
    leaf = saved.leaf
    if len(saved.keys) < len(leaf.modules):
        return "a part of the stacked layers; use a tree without a scan"
    if leaf.name.kind == "experts":
        return "a parameter of experts"
    if leaf.name.kind == "embedding" and tied_to(leaf, leaves):
        return "an embedding that is tied to the head"
    return None
