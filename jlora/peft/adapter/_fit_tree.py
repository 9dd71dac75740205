"""Matches an adapter to the leaves of a tree."""

import itertools
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

import jax
import numpy as np

from ..._errors import Problem
from ..._tree import name_of
from .._file import COUNT, PREFIX, TensorInfo
from ..names._kinds import EMBEDDING, LINEAR
from ..names._leaves import NamedLeaf, find_tied_heads
from ..names._torch_layout import split_weight
from ..places._declared import is_table
from ._fits import list_misfits, list_misfits_in_full
from ._methods import LORA
from ._parts import (
    Header,
    Headers,
    Part,
    Whole,
    find_table,
    list_lone_heads,
    list_unequal,
)

# The tensor of a head, the tensor of its embedding, and whether one is the other's transpose.
Pair = tuple[TensorInfo, TensorInfo, bool]
LOST = "unexpected; it matches no leaf of `base` under `names`"


class Match(NamedTuple):
    """The tensors of an adapter that belong to leaves.

    Attributes:
        own: the tensors.
        leaves: the adapted leaves, with their adapted modules.
        same: pairs of a head and the embedding that shares its weight.
        homes: the leaf of each frozen parameter, whose values it must have.
    """

    own: Headers
    leaves: list[NamedLeaf]
    same: list[Pair]
    homes: Mapping[str, NamedLeaf]

    def check(self, values: Mapping[str, np.ndarray]) -> list[Problem]:
        """Lists the tensors with wrong values."""
        found = list_unequal(self.same, values)
        for name, x in self.own.frozen.items():
            if not _is_of_base(values[x.key], leaf := self.homes[name], name):
                why = (
                    f"expected the values of `base` at {name_of(leaf.path)}, got others; an "
                    "adapter on a trained or resized embedding is not supported"
                )
                found.append(Problem(x.key, why))
        return found


def _is_of_base(x: np.ndarray, leaf: NamedLeaf, name: str) -> bool:
    if isinstance(leaf.value, jax.ShapeDtypeStruct):
        return True
    each = split_weight(leaf, leaf.value)
    own = each.get(name, next(iter(each.values())))  # a head has the values of its embedding
    return np.array_equal(own, x.astype(own.dtype))


def match_to_tree(
    adapter: Headers, heads: Iterable[str], leaves: Sequence[NamedLeaf], advise: Callable[[], str]
) -> tuple[Match, list[Problem]]:
    """Finds the leaf for each tensor of an adapter, and lists the tensors that do not fit.

    For each of the `heads`, the configuration repeats the rows of an embedding. `advise` makes a
    remedy for tensors without a leaf.
    """
    tied = {f"{head}.weight": leaf for head, leaf in find_tied_heads(leaves).items()}
    homes = tied | {name: leaf for leaf in leaves for name in leaf.parameters}
    # Flax counts no batches.
    full = {name: x for name, x in adapter.full.items() if not name.endswith(COUNT)}
    frozen = {name: x for name, x in adapter.frozen.items() if name in homes}
    own = adapter._replace(full=full, frozen=frozen)
    lone = {n: x for n, x in own.tokens.items() if n in tied or n not in homes}
    changed = [*own.parts, *(x for name, x in full.items() if name not in lone)]
    each = [(x, _list_misfits(x, homes.get(x.name), x.name in tied, advise)) for x in changed]
    problems = [y for _, wrong in each for y in wrong]
    for name, x in frozen.items():
        problems += list_misfits_in_full(x, homes[name].weight_shape)
    same = list[Pair]()
    for x in lone.values():
        pairs, unlike = _match_rows(x, homes, own.tokens, advise)
        same += pairs
        problems += unlike
    apart = [name.removesuffix(".weight") for name in homes if name not in tied]
    problems += list_lone_heads(heads, apart)
    fitting = [x for x, wrong in each if not wrong]
    low = {x.name: x for x in fitting if isinstance(x, Part)}
    full = {x.name: x for x in fitting if isinstance(x, Whole) and not x.rows}
    for (name, leaf), group in itertools.product(tied.items(), (low, full)):
        pairs, unlike = _match_head(group.pop(name, None), group.get(leaf.parameters[0]), leaf)
        same += pairs
        problems += unlike
    with_factors, partial = _gather(low, leaves)
    in_full, others = _gather(full, leaves)
    rows = [homes[x.name] for x in fitting if isinstance(x, Whole) and x.rows]
    match = Match(own, [*with_factors, *in_full, *rows], same, homes)
    return match, [*problems, *partial, *others]


# --------------------------------------------------------------------------------- shape and kind


def _list_misfits(
    x: Header | Whole[TensorInfo],
    leaf: NamedLeaf | None,
    is_head: bool,
    advise: Callable[[], str],
) -> list[Problem]:
    """Lists why a record does not fit a leaf, or a head that shares its weight."""
    key = x.key if isinstance(x, Whole) else PREFIX + x.name.rpartition(".")[0]
    if leaf is None:
        return [Problem(key, LOST, advise())]
    path = name_of(leaf.path)
    kind = LINEAR if is_head else leaf.kind
    if isinstance(x, Whole):
        if x.rows and kind is not EMBEDDING:
            why = "has rows, but is not an embedding under `names`"
        elif leaf.name.part:
            why = "saved in full, but `base` has a leaf for each part of it"
        else:
            return list_misfits_in_full(x, leaf.weight_shape)
    elif leaf.name.refused:
        why = f"has A and B, but PEFT has no form for those of {path}: {leaf.name.refused}"
    elif kind is None:
        why = f"has A and B, but {path} is a parameter that LoRA cannot adapt"
    elif kind is not x.kind:
        why = f"A and B are of kind {x.kind.name}, but {path} is of kind {kind.name} under `names`"
    elif x.transposed is False and leaf.name.transposed:
        why = f"is targeted by target_parameters, but {path} is stored as (inputs, outputs)"
    else:
        return list_misfits(x, leaf.weight_shape, not is_head and leaf.name.is_reversed)
    return [Problem(key, why)]


# ------------------------------------------------------------- a head that shares an embedding


def _match_head(
    head: Header | Whole[TensorInfo] | None,
    table: Header | Whole[TensorInfo] | None,
    leaf: NamedLeaf,
) -> tuple[list[Pair], list[Problem]]:
    """Requires a tied head and its embedding to have the same A and B, or the same values."""
    others = leaf.modules[0], leaf.name.tied
    lone = [(x, other) for x, other in zip((head, table), others, strict=True) if x]
    apart = [(x, other) for x, other in lone if isinstance(x, Part) and x.method is not LORA]
    if apart:
        part, other = apart[0]
        why = f"{part.method.name} is not supported for a weight that {other} shares"
        return [], [Problem(part.key, why)]
    if len(lone) == 1:
        [(x, other)] = lone
        how = "adapted" if isinstance(x, Part) else "saved in full"
        return [], [Problem(x.key, f"{how} without {other}, which shares its weight")]
    if isinstance(head, Whole) and isinstance(table, Whole):
        return [(head.x, table.x, False)], []
    if isinstance(head, Part) and isinstance(table, Part):
        if (head.scale, head.rank) == (table.scale, table.rank):
            return [(head.a, table.b, True), (head.b, table.a, True)], []
        why = f"shares its weight with {table.key}, which has other rank or scale"
        return [], [Problem(head.key, why)]
    return [], []


def _match_rows(
    head: Whole[TensorInfo],
    homes: Mapping[str, NamedLeaf],
    tokens: Mapping[str, Whole[TensorInfo]],
    advise: Callable[[], str],
) -> tuple[list[Pair], list[Problem]]:
    """Requires a tied head with rows and its embedding to have the same."""
    leaf = homes.get(head.name)
    # T5: `base` has only the shared embedding.
    tables = leaf.parameters if leaf else homes if is_table(head.module) else ()
    if table := find_table(head.name, tokens, tables):
        return [(head.x, table.x, False)], []
    if leaf is None:
        return [], [Problem(head.key, LOST, advise())]
    why = f"has rows, but shares the weight of {leaf.modules[0]}, which has no such rows"
    return [], [Problem(head.key, why)]


# ---------------------------------------------------------------------- modules that are one leaf


def _gather(
    found: Mapping[str, Header | Whole[TensorInfo]],
    leaves: Sequence[NamedLeaf],
) -> tuple[list[NamedLeaf], list[Problem]]:
    """Finds the leaves of which all modules, or those of some slots, are adapted."""
    whole, problems = list[NamedLeaf](), list[Problem]()
    for leaf in leaves:
        own = {name: found[name] for name in leaf.parameters if name in found}
        if not own:
            continue
        parts = [x for x in own.values() if isinstance(x, Part)]
        if leaf.layout.slots and parts:
            every = range(len(leaf.name.modules))
            there = (
                i for i in every if not own.keys().isdisjoint(leaf.with_slots((i,)).parameters)
            )
            leaf = leaf.with_slots(tuple(there))
        what, advice = "layers", "load into a tree without a scan"
        if leaf.layout.slots:
            what, advice = "modules", "adapt all of them equally"
        path = name_of(leaf.path)
        start = f"its {what} are one leaf"
        left = [name.rpartition(".")[0] for name in leaf.parameters if name not in own]
        forms = dict.fromkeys((x.rank, x.scale) for x in parts)
        if left:
            count = f"{len(own)} of {len(leaf.modules)}"
            why = f"{start}, but only {count} are adapted, not {left[0]}; {advice}"
            problems.append(Problem(path, why))
        elif len(forms) > 1:
            listed = ", ".join(f"rank {r} and scale {s:g}" for r, s in forms)
            problems.append(Problem(path, f"{start} but differ: {listed}; {advice}"))
        else:
            whole.append(leaf)
    return whole, problems
