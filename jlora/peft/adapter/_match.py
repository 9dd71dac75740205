"""Matches an adapter to the leaves of a tree."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import numpy as np

from ..._tree import name_of
from .._file import COUNT, DTYPES, PREFIX, TensorInfo
from .._problems import Problems
from ..names._convert import weights
from ..names._leaves import NamedLeaf, tied_heads
from ._contents import SHARED, Adapter, Part, explain_resized
from ._files import fill
from ._tokens import Tokens, list_unequal, lone_heads, misfits, tied_rows

LOST = "unexpected; names no leaf of `base` under `names`"


class Place(NamedTuple):
    """A parameter of PyTorch: one of the modules of a leaf, or the head that shares its weight."""

    leaf: NamedLeaf
    at: int
    is_head: bool = False


class Match(NamedTuple):
    """What an adapter has for each leaf, and which values must agree.

    Attributes:
        leaves: leaves, each with the `Part`s or the `TensorInfo`s of its modules, or with `Tokens`.
        same: a tensor of a head, and that of the embedding that is the same weight.
        transposed: a factor of a head, and that of the embedding, which is its transpose.
        frozen: a tensor, and the place in the base whose values it must have.
    """

    leaves: list[tuple[NamedLeaf, Any]]
    same: list[tuple[TensorInfo, TensorInfo]]
    transposed: list[tuple[TensorInfo, TensorInfo]]
    frozen: list[tuple[TensorInfo, Place]]

    def read(self, values: Mapping[str, np.ndarray], problems: Problems) -> list[Any]:
        """The leaves with values; adds the tensors whose values differ from what they must be."""
        problems.found += list_unequal(self.transposed, values, is_transposed=True)
        problems.found += list_unequal(self.same, values)
        for x, place in self.frozen:
            if not _is_of_base(values[x.key], place):
                problems.add(
                    x.key,
                    f"expected the values of `base` at {name_of(place.leaf.path)}, got others; a "
                    "trained or resized embedding under an adapter is not supported",
                )
        return [(leaf, fill(own, values)) for leaf, own in self.leaves]


def _is_of_base(x: np.ndarray, place: Place) -> bool:
    if isinstance(place.leaf.value, jax.ShapeDtypeStruct):
        return True
    own = weights(place.leaf, place.leaf.value)[place.at]
    return np.array_equal(own, x.astype(own.dtype))


def match_to_tree(
    adapter: Adapter, parts: Iterable[Part], leaves: Sequence[NamedLeaf], problems: Problems
) -> Match:
    """Finds the leaf of everything in an adapter; what has none, or does not fit, is a problem."""
    tied = {f"{head}.weight": leaf for head, leaf in tied_heads(leaves).items()}
    places = {name: Place(leaf, 0, True) for name, leaf in tied.items()}
    places |= {name: Place(leaf, i) for leaf in leaves for i, name in enumerate(leaf.parameters)}
    low = {x.name: x for x in parts if _fits(x, places.get(x.name), problems)}
    # Flax counts no batches.
    whole = {name: x for name, x in adapter.full.items() if not name.endswith(COUNT)}
    full = {n: x for n, x in whole.items() if _fits_in_full(n, x, places.get(n), problems)}
    frozen = [(x, places[name]) for name, x in adapter.frozen.items() if name in places]
    for x, place in frozen:
        _has_shape(x, place.leaf.weight_shape, problems)
    found = Match([], [], [], frozen)
    rows = _match_rows(adapter, places, found, problems)
    for name, leaf in tied.items():
        table, here = leaf.parameters[0], (leaf.modules[0], leaf.name.tied or "")
        _match_head(low.pop(name, None), low.get(table), here, found, problems)
        _match_head(full.pop(name, None), full.get(table), here, found, problems)
    found.leaves.extend((*_gather(low, leaves, problems), *_gather(full, leaves, problems), *rows))
    return found


# -------------------------------------------------------------------------------- does it fit?


def _fits(part: Part, place: Place | None, problems: Problems) -> bool:
    """Whether A and B fit a place; if not, adds the reason."""
    key = PREFIX + part.name.rpartition(".")[0]
    if place is None:
        return problems.add(key, LOST)
    leaf = place.leaf
    kind = "linear" if place.is_head else leaf.name.kind
    if kind != part.kind or (part.transposed is False and leaf.name.transposed):
        why = f"expected A and B of {kind or 'nothing'}, got those of {part.kind}"
        return problems.add(key, why)
    a, b = leaf.shapes(part.a.shape[0] // leaf.experts)
    a, b = (b[::-1], a[::-1]) if place.is_head else (a, b)
    return all([_has_shape(part.a, a, problems), _has_shape(part.b, b, problems)])


def _fits_in_full(name: str, x: TensorInfo, place: Place | None, problems: Problems) -> bool:
    if place is None:
        return problems.add(x.key, LOST)
    if place.leaf.name.part:
        return problems.add(x.key, "saved in full, but its parts are leaves of `base`")
    if why := explain_resized(name, x.shape, place.leaf.weight_shape):
        problems.found.append(why)
        return False
    return _has_shape(x, place.leaf.weight_shape, problems)


def _has_shape(x: TensorInfo, shape: tuple[int, ...], problems: Problems) -> bool:
    return x.shape == shape or problems.add(x.key, f"expected shape {shape}, got {x.shape}")


def refuse_wide(tensors: Iterable[TensorInfo], problems: Problems) -> None:
    """Adds the tensors of 64 bits where JAX, as it is set, has no arrays of those."""
    for x in tensors:
        if x.dtype in DTYPES and jax.dtypes.canonicalize_dtype(DTYPES[x.dtype]) != DTYPES[x.dtype]:
            problems.add(x.key, f"dtype {x.dtype} needs jax_enable_x64")


# ------------------------------------------------------------- a head that shares an embedding


def _match_head(
    head: Part | TensorInfo | None,
    table: Part | TensorInfo | None,
    here: tuple[str, str],
    found: Match,
    problems: Problems,
) -> None:
    """Requires the same A and B, or the same values, of a tied head and its embedding."""
    pair = dict(zip(here, (head, table), strict=True))  # each by the name of the other
    lone = [(other, x) for other, x in pair.items() if x]
    if dora := [(other, x) for other, x in lone if isinstance(x, Part) and x.m is not None]:
        [(other, part), *_] = dora
        problems.add(part.key, f"of DoRA, which is not supported beside {other}, a tied weight")
    elif isinstance(head, Part) and isinstance(table, Part):
        if (head.scale, head.rank) == (table.scale, table.rank):
            found.transposed.extend([(head.a, table.b), (head.b, table.a)])
        else:
            problems.add(head.key, f"shares its weight with {table.key}, but not rank and scale")
    elif isinstance(head, TensorInfo) and isinstance(table, TensorInfo):
        found.same.append((head, table))
    elif lone:
        [(other, x)] = lone
        how = "adapted" if isinstance(x, Part) else "saved in full"
        problems.add(x.key, f"{how} without {other}, which shares its weight")


def _match_rows(
    adapter: Adapter, places: Mapping[str, Place], found: Match, problems: Problems
) -> list[tuple[NamedLeaf, Tokens]]:
    """Finds the embeddings that have rows, and requires the same rows of tied heads."""
    rows = []
    for name, x in adapter.tokens.items():
        place, table = places.get(name), None
        if place is None:
            # Of T5, of which `base` has the shared table alone.
            table = tied_rows(name, adapter.tokens, places) if SHARED.search(x.module) else None
            why = LOST
        elif place.is_head:
            own = adapter.tokens.get(f"{place.leaf.modules[0]}.weight")
            table = own if own and own.rows == x.rows else None
            why = f"rows of a head whose weight is that of {place.leaf.modules[0]}"
        elif place.leaf.name.kind != "embedding":
            why = "rows of what is no embedding by `names`"
        else:
            problems.found += misfits(x, place.leaf.weight_shape)
            rows.append((place.leaf, x))
            continue
        if table is None:
            problems.add(x.v.key, why)
        else:
            found.same.append((x.v, table.v))
    apart = [name.removesuffix(".weight") for name, place in places.items() if not place.is_head]
    problems.found += lone_heads(adapter.heads, apart)
    return rows


# ---------------------------------------------------------------------- modules that are one leaf


def _gather(
    found: Mapping[str, Any], leaves: Sequence[NamedLeaf], problems: Problems
) -> Iterator[tuple[NamedLeaf, list[Any]]]:
    """Collects what the modules of a leaf have, which must be all of them, or some of its slots."""
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
            what, advice = "modules", "adapt them alike"
        path, start = name_of(leaf.path), f"its {what} are one leaf"
        left = [name.rpartition(".")[0] for name in leaf.parameters if name not in own]
        forms = dict.fromkeys((x.rank, x.scale) for x in parts)
        if left:
            count = f"{len(own)} of {len(leaf.modules)}"
            problems.add(path, f"{start}, of which {count} are adapted, {left[0]} not; {advice}")
        elif len(forms) > 1:
            listed = ", ".join(f"rank {r} and scale {s:g}" for r, s in forms)
            problems.add(path, f"{start} but differ: {listed}; {advice}")
        else:
            yield leaf, [own[name] for name in leaf.parameters]
