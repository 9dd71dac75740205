"""Matches an adapter to the leaves of a tree."""

import itertools
from collections.abc import Callable, Collection, Iterable, Mapping, Sequence
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
    parts = [(x, _list_misfits(x, homes.get(x.name), x.name in tied, advise)) for x in own.parts]
    low = {x.name: x for x, wrong in parts if not wrong}
    whole = [x for x in full.values() if not x.rows]
    lost = [(x, _list_misfits_in_full(x, homes.get(x.name), advise)) for x in whole]
    full = {x.name: x for x, wrong in lost if not wrong}
    problems = [y for _, wrong in (*parts, *lost) for y in wrong]
    for name, x in frozen.items():
        problems += list_misfits_in_full(x, homes[name].weight_shape)
    rows, same, unlike = _match_rows(own.tokens, homes, tied, advise)
    apart = [name.removesuffix(".weight") for name in homes if name not in tied]
    problems += [*unlike, *list_lone_heads(heads, apart)]
    for (name, leaf), group in itertools.product(tied.items(), (low, full)):
        head = group.pop(name, None)
        pairs, unlike = _match_head(head, group.get(leaf.parameters[0]), leaf)
        same += pairs
        problems += unlike
    with_factors, partial = _gather(low, leaves)
    in_full, others = _gather(full, leaves)
    match = Match(own, [*with_factors, *in_full, *rows], same, homes)
    return match, [*problems, *partial, *others]


# --------------------------------------------------------------------------------- shape and kind


def _list_misfits(
    part: Header, leaf: NamedLeaf | None, is_head: bool, advise: Callable[[], str]
) -> list[Problem]:
    """Lists why A and B do not fit a leaf, or a head that shares its weight."""
    key = PREFIX + part.name.rpartition(".")[0]
    if leaf is None:
        return [Problem(key, LOST, advise())]
    kind = LINEAR if is_head else leaf.kind
    path = name_of(leaf.path)
    if leaf.name.refused:
        why = f"has A and B, but PEFT has no form for those of {path}: {leaf.name.refused}"
        return [Problem(key, why)]
    if kind is None:
        return [Problem(key, f"has A and B, but {path} is a parameter that LoRA cannot adapt")]
    if kind is not part.kind:
        why = f"A and B are of kind {part.kind.name}, but {path} is of kind {kind.name}"
        return [Problem(key, f"{why} under `names`")]
    if part.transposed is False and leaf.name.transposed:
        why = f"is targeted by target_parameters, but {path} is stored as (inputs, outputs)"
        return [Problem(key, why)]
    return list_misfits(part, leaf.weight_shape, not is_head and leaf.name.is_reversed)


def _list_misfits_in_full(
    x: Whole[TensorInfo], leaf: NamedLeaf | None, advise: Callable[[], str]
) -> list[Problem]:
    if leaf is None:
        return [Problem(x.key, LOST, advise())]
    if leaf.name.part:
        return [Problem(x.key, "saved in full, but `base` has a leaf for each part of it")]
    return list_misfits_in_full(x, leaf.weight_shape)


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
    tokens: Mapping[str, Whole[TensorInfo]],
    homes: Mapping[str, NamedLeaf],
    tied: Collection[str],
    advise: Callable[[], str],
) -> tuple[list[NamedLeaf], list[Pair], list[Problem]]:
    """Finds the embeddings with rows, and the pairs of tied heads and embeddings with rows."""
    rows, same, problems = list[NamedLeaf](), list[Pair](), list[Problem]()
    for name, x in tokens.items():
        leaf = homes.get(name)
        # T5: `base` has only the shared embedding.
        tables = leaf.parameters if leaf else homes if is_table(x.module) else ()
        if leaf and name not in tied:
            rows.append(leaf)
            if leaf.kind is EMBEDDING:
                problems += list_misfits_in_full(x, leaf.weight_shape)
            else:
                why = "has rows, but is not an embedding under `names`"
                problems.append(Problem(x.key, why))
        elif table := find_table(name, tokens, tables):
            same.append((x.x, table.x, False))
        elif leaf:
            why = f"has rows, but shares the weight of {leaf.modules[0]}, which has no such rows"
            problems.append(Problem(x.key, why))
        else:
            problems.append(Problem(x.key, LOST, advise()))
    return rows, same, problems


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
