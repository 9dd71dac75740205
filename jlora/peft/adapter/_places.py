"""Where each part of an adapter belongs in a tree, and what has no place."""

from collections.abc import Iterable, Mapping, Sequence, Set
from typing import Any, NamedTuple

import jax
import numpy as np

from ..._tree import name_of
from .._file import COUNT, DTYPES, PREFIX, shown
from ..names._arrays import weights
from ..names._names import Leaf, tied_to
from ._read import SHARED, Adapter, Part, Stored, resized
from ._tokens import Tokens, lone_heads, misfits, tied_rows, unlike


class Place(NamedTuple):
    """A parameter of PyTorch: one of the modules of a leaf, or the head that shares its weight."""

    leaf: Leaf
    at: int
    is_head: bool = False


class Placed(NamedTuple):
    """Leaves with what they are made of, module by module; and what must agree.

    Attributes:
        low: those with A and B.
        full: those in full.
        rows: those with rows.
        heads: A and B of a head, and of the embedding that shares its weight.
        alike: a tensor of a head, and that of the embedding, which must have the same values.
        frozen: what must be the values of the base.
    """

    low: list[tuple[Leaf, list[Part]]]
    full: list[tuple[Leaf, list[Stored]]]
    rows: list[tuple[Leaf, Tokens]]
    heads: list[tuple[Part, Part]]
    alike: list[tuple[Stored, Stored]]
    frozen: list[tuple[Place, Stored]]


def places_of(leaves: Sequence[Leaf]) -> dict[str, Place]:
    return {
        parameter: Place(leaf, i) for leaf in leaves for i, parameter in enumerate(leaf.parameters)
    }


def put_in_place(
    adapter: Adapter,
    parts: Sequence[Part],
    places: Mapping[str, Place],
    leaves: Sequence[Leaf],
) -> Placed:
    """Where all of an adapter belongs; what has no place is added to `adapter.wrong`."""
    wrong = adapter.wrong
    tied = {f"{head}.weight": leaf for leaf in leaves if (head := tied_to(leaf, leaves))}
    everywhere = {**{head: Place(leaf, 0, True) for head, leaf in tied.items()}, **places}
    low, full = dict[str, Part](), dict[str, Stored]()
    for part in parts:
        if (place := everywhere.get(part.name)) is None:
            wrong.append(f"{_shown(part)}: unexpected; names no leaf of `base` under `names`")
        elif bad := _misfits(part, place):
            wrong += bad
        else:
            low[part.name] = part
    for name, x in adapter.full.items():
        if name.endswith(COUNT):
            continue  # Flax counts no batches
        if (place := everywhere.get(name)) is None:
            wrong.append(f"{shown(x.key)}: unexpected; names no leaf of `base` under `names`")
        elif place.leaf.name.part:
            wrong.append(f"{shown(x.key)}: saved in full, but its parts are leaves of `base`")
        elif why := resized(name, x.shape, place.leaf.weight_shape):
            wrong.append(why)
        elif bad := _misshapen(x, place.leaf.weight_shape):
            wrong += bad
        else:
            full[name] = x
    frozen = [(place, x) for n, x in adapter.frozen.items() if (place := everywhere.get(n))]
    wrong += [p for place, x in frozen for p in _misshapen(x, place.leaf.weight_shape)]
    heads = [
        pair
        for name, leaf in tied.items()
        if (pair := _both(low.pop(name, None), low.get(f"{leaf.modules[0]}.weight"), leaf, wrong))
    ]
    rows, alike = _rows(adapter, everywhere, wrong)
    for name, leaf in tied.items():
        alike += _both_in_full(full.pop(name, None), full.get(leaf.parameters[0]), leaf, wrong)
    low, full = _whole(low, leaves, wrong), _whole(full, leaves, wrong)
    return Placed(low, full, rows, heads, alike, frozen)


def _both_in_full(
    head: Stored | None, table: Stored | None, leaf: Leaf, wrong: list[str]
) -> list[tuple[Stored, Stored]]:
    """What is saved in full of a tied head and of its embedding, which must be the same."""
    if head and table:
        return [(head, table)]
    if lone := head or table:
        other = leaf.modules[0] if head else leaf.name.tied
        wrong.append(f"{shown(lone.key)}: saved in full without {other}, which shares its weight")
    return []


def _rows(
    adapter: Adapter, places: Mapping[str, Place], wrong: list[str]
) -> tuple[list[tuple[Leaf, Tokens]], list[tuple[Stored, Stored]]]:
    """The embeddings with rows, and the rows of tied heads; `wrong` gets all else."""
    rows, heads = [], []
    for name, x in adapter.tokens.items():
        place = places.get(name)
        if place is None:
            # Of T5, of which `base` has the shared table alone.
            shared = tied_rows(name, adapter.tokens, places) if SHARED.search(x.module) else None
            if shared is not None:
                heads.append((x.v, shared.v))
                continue
            why = "unexpected; names no leaf of `base` under `names`"
        elif place.is_head:
            table = adapter.tokens.get(f"{place.leaf.modules[0]}.weight")
            if table and table.rows == x.rows:
                heads.append((x.v, table.v))
                continue
            why = f"rows of a head whose weight is that of {place.leaf.modules[0]}"
        elif place.leaf.name.kind != "embedding":
            why = "rows of what is no embedding by `names`"
        else:
            bad = misfits(x, place.leaf.weight_shape)
            wrong += bad
            rows += [] if bad else [(place.leaf, x)]
            continue
        wrong.append(f"{shown(x.v.key)}: {why}")
    apart = [name.removesuffix(".weight") for name, place in places.items() if not place.is_head]
    wrong += lone_heads(adapter.heads, apart)
    return rows, heads


def _both(
    head: Part | None, table: Part | None, leaf: Leaf, wrong: list[str]
) -> tuple[Part, Part] | None:
    """The A's and B's of a tied head and of its embedding, which must be the same."""
    if alone := next((x for x in (head, table) if x and x.m is not None), None):
        other = leaf.name.tied if alone is table else leaf.modules[0]
        wrong.append(f"{alone.key}: of DoRA, which is not supported beside {other}, a tied weight")
    elif head and table:
        if (head.scale, head.a.shape[0]) == (table.scale, table.a.shape[0]):
            return head, table
        wrong.append(f"{head.key}: shares its weight with {table.key}, but not rank and scale")
    elif lone := head or table:
        other = leaf.modules[0] if head else leaf.name.tied
        wrong.append(f"{lone.key}: adapted without {other}, which shares its weight")
    return None


def _whole(
    found: Mapping[str, Any], leaves: Sequence[Leaf], wrong: list[str]
) -> list[tuple[Leaf, list[Any]]]:
    """By leaf, for all of its modules alike; of a leaf with slots for some of them alone."""
    whole = []
    for leaf in leaves:
        own = {name: found[name] for name in leaf.parameters if name in found}
        if not own:
            continue
        parts = [x for x in own.values() if isinstance(x, Part)]
        if leaf.layout.slots and parts:
            leaf = leaf.only(_slots(leaf, own.keys()))
        what, advice = "layers", "load into a tree without a scan"
        if leaf.layout.slots:
            what, advice = "modules", "adapt them alike"
        said = f"{name_of(leaf.path)}: its {what} are one leaf"
        left = [name.rpartition(".")[0] for name in leaf.parameters if name not in own]
        forms = dict.fromkeys((x.a.shape[0], x.scale) for x in parts)
        if left:
            wrong.append(
                f"{said}, of which {len(own)} of {len(leaf.modules)} are adapted, {left[0]} not; "
                f"{advice}"
            )
        elif len(forms) > 1:
            listed = ", ".join(f"rank {r // leaf.experts} and scale {s:g}" for r, s in forms)
            wrong.append(f"{said} but differ: {listed}; {advice}")
        else:
            whole.append((leaf, [own[name] for name in leaf.parameters]))
    return whole


def _slots(leaf: Leaf, own: Set[str]) -> tuple[int, ...]:
    """The slots of which `own` has a parameter."""
    every = range(len(leaf.name.modules))
    return tuple(i for i in every if not own.isdisjoint(leaf.only((i,)).parameters))


def _misfits(part: Part, place: Place) -> list[str]:
    """Why A and B are not those of a leaf."""
    leaf = place.leaf
    kind = "linear" if place.is_head else leaf.name.kind
    if kind != part.kind or (part.transposed is False and leaf.name.transposed):
        return [
            f"{_shown(part)}: expected A and B of {kind or 'nothing'}, got those of {part.kind}"
        ]
    shapes = leaf.shapes(part.a.shape[0] // leaf.experts)
    if place.is_head:
        shapes = shapes[1][::-1], shapes[0][::-1]
    pairs = zip((part.a, part.b), shapes, strict=True)
    return [p for x, shape in pairs for p in _misshapen(x, shape)]


def _misshapen(x: Stored, shape: tuple[int, ...]) -> list[str]:
    if x.shape != shape:
        return [f"{shown(x.key)}: expected shape {shape}, got {x.shape}"]
    return []


def narrowed(stored: Iterable[Stored]) -> list[str]:
    """Which of the tensors JAX, as it is set, has no arrays for."""
    return [
        f"{shown(x.key)}: dtype {x.dtype} needs jax_enable_x64"
        for x in stored
        if x.dtype in DTYPES and jax.dtypes.canonicalize_dtype(DTYPES[x.dtype]) != DTYPES[x.dtype]
    ]


def _shown(part: Part) -> str:
    return shown(PREFIX + part.name.rpartition(".")[0])


def differing(placed: Placed, found: Mapping[str, np.ndarray]) -> list[str]:
    """Where values differ that must be the same."""
    wrong = [
        f"{shown(x.key)}: expected the transpose of {shown(y.key)}, got other values"
        for head, table in placed.heads
        for x, y in ((head.a, table.b), (head.b, table.a))
        if not np.array_equal(found[x.key], found[y.key].T)
    ]
    wrong += unlike(placed.alike, found)
    return wrong + [
        f"{shown(x.key)}: expected the values of `base` at {name_of(place.leaf.path)}, got others; "
        "a trained or resized embedding under an adapter is not supported"
        for place, x in placed.frozen
        if not _is_that_of(place, found[x.key])
    ]


def _is_that_of(place: Place, x: np.ndarray) -> bool:
    if isinstance(place.leaf.value, jax.ShapeDtypeStruct):
        return True
    own = weights(place.leaf, place.leaf.value)[place.at]
    return np.array_equal(own, x.astype(own.dtype))
