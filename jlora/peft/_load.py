"""PEFT's files to an adapter tree: all is checked, then all of it is read."""

import functools
import os
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence, Set
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .._tree import name_of, nest
from .._types import PyTree
from ._arrays import decomposed, low_rank, of_part, replaced, weight, weights
from ._config import LIMIT
from ._file import CONFIG, DTYPES, PREFIX, Source, listing, read_json, shown
from ._names import Leaf, Name, by_row, resolve, tied_to
from ._others import other_of
from ._parameters import parts_of, without_biases
from ._read import Adapter, Part, Stored, parse, read_adapter
from ._to_lora import as_lora
from ._tokens import Tokens, lone_heads, misfits, unlike
from ._values import stored_in, tensors_of, unfit


def load(dir: str | os.PathLike[str], base: PyTree, names: Sequence[Name]) -> PyTree:
    r"""Reads an adapter that PEFT or `save` wrote.

    Args:
        dir: its folder, with `adapter_config.json` and `adapter_model.safetensors`; nothing else
            in it is read. What `to_lora` takes is loaded as LoRA too.
        base: the frozen tree that it adapts, arrays or `jax.ShapeDtypeStruct`s.
        names: a table of `Name` rows, such as `jlora.peft.LLAMA`.

    Returns:
        An adapter for `apply` and `merge`: $\Delta W = s \cdot A B$ with A, B of the file's dtype,
        the layers of a scan stacked, `modules_to_save` and biases as leaves in full. Of `use_dora`
        its nodes are those of `DoRA`; of `trainable_token_indices` an embedding has that of `Rows`.
        The A of MiSS is frozen.

    Raises:
        FileNotFoundError: if the folder or a file is missing.
        ValueError: if anything is missing, unexpected, misshapen, of a wrong dtype, not finite,
            there twice or not supported; all of it is listed, and nothing is loaded.

    Warns:
        UserWarning: of what its configuration names and nothing has, as PEFT takes it.

    Source: PEFT 0.21, `peft.utils.save_and_load`.

    Examples:
        >>> import tempfile, jax, jax.numpy as jnp, jlora
        >>> from jlora import peft
        >>> params = {"model": {"q_proj": {"kernel": jnp.ones((4, 3))}}}
        >>> f = lambda p, x: x @ p["model"]["q_proj"]["kernel"]
        >>> lora = jlora.transform(f, jlora.LoRA("q_proj", rank=2))
        >>> base, adapter = lora.init(jax.random.key(0), params, jnp.ones((1, 4)))
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     peft.save(f"{folder}/adapter", base, adapter, peft.LLAMA)
        ...     again = peft.load(f"{folder}/adapter", base, peft.LLAMA)
        >>> jax.tree.all(jax.tree.map(lambda x, y: bool((x == y).all()), again, adapter))
        True
    """
    leaves = by_row(resolve(base, names), names)

    def refuse(found: Sequence[str]) -> None:
        if found:
            raise ValueError(
                f"`dir`: the adapter in {dir} cannot be loaded onto `base` with `names`; "
                f"nothing was loaded. {listing(found)}"
            )

    source, where = Source(Path(dir)), "`base` under `names`"
    places = _places(leaves)
    shapes = {name: place.leaf.weight_shape for name, place in places.items()}
    adapter, read, frozen = _opened(source, shapes, refuse)
    without_biases(adapter)
    parts = parts_of(adapter, shapes, where, ordered=True)
    placed = _placed(adapter, parts, places, leaves)
    refuse(adapter.wrong)
    tokens = [x.v for x in adapter.tokens.values()]
    stored = (*stored_in(parts), *adapter.full.values(), *adapter.frozen.values(), *tokens)
    found = read(stored)
    refuse(unfit(found) + _unlike(adapter, placed, found))
    dropout, nodes = float(adapter.fields.get("lora_dropout", 0.0)), {}
    if adapter.fields.get("use_dora") and dropout:
        adapter.idle.append(f"lora_dropout: {dropout} is of training alone, and DoRA here has none")
    warn_of_idle(adapter)
    for leaf, own in placed.low:
        arrays = of_part(leaf, [(found[x.a.key], found[x.b.key]) for x in own])
        rank = arrays[0][0].shape[0] // leaf.experts
        scale = own[0].scale * leaf.factor
        node = low_rank(leaf, arrays, rank, scale=scale, dropout=dropout, frozen=frozen)
        ms = [found[x.m.key] for x in own if x.m is not None]
        nodes[leaf.path] = decomposed(leaf, node, ms) if ms else node
    for leaf, own in placed.full:
        nodes[leaf.path] = jnp.asarray(weight(leaf, [found[x.key] for x in own]))
    for leaf, own in placed.rows:
        nodes[leaf.path] = replaced(leaf, own.rows, found[own.v.key])
    return nest(nodes)


def _opened(
    source: Source, shapes: Mapping[str, tuple[int, ...]], refuse: Callable[[Sequence[str]], None]
) -> tuple[Adapter, Callable[[Iterable[Stored]], dict[str, np.ndarray]], tuple[str, ...]]:
    """The adapter, what reads its tensors, and which of A and B are not trained."""
    fields = read_json(source, CONFIG, LIMIT)
    if other_of(fields) is None:
        adapter, header = read_adapter(source, refuse)
        return adapter, functools.partial(tensors_of, source, header), ()
    made = as_lora(source, fields, shapes)
    adapter = parse(made.fields, made.tensors, f"`{source.argument}`")

    def read(wanted: Iterable[Stored]) -> dict[str, np.ndarray]:
        found = made.make()
        return {x.key: found[x.key] for x in wanted}

    return adapter, read, made.frozen


def warn_of_idle(adapter: Adapter) -> None:
    """Says what of a configuration names nothing, as PEFT takes such."""
    if adapter.idle:
        warnings.warn(f"{CONFIG} of the adapter: {'; '.join(adapter.idle[:9])}.", stacklevel=3)


class _Place(NamedTuple):
    """A parameter of PyTorch: one of the modules of a leaf, or the head that shares its weight."""

    leaf: Leaf
    at: int
    is_head: bool = False


class _Placed(NamedTuple):
    """Leaves with what they are made of, module by module; and frozen weights."""

    low: list[tuple[Leaf, list[Part]]]
    full: list[tuple[Leaf, list[Stored]]]
    rows: list[tuple[Leaf, Tokens]]
    heads: list[tuple[Part, Part]]
    tied_rows: list[tuple[Tokens, Tokens]]
    frozen: list[tuple[_Place, Stored]]


def _places(leaves: Sequence[Leaf]) -> dict[str, _Place]:
    return {
        parameter: _Place(leaf, i) for leaf in leaves for i, parameter in enumerate(leaf.parameters)
    }


def _placed(
    adapter: Adapter,
    parts: Sequence[Part],
    places: Mapping[str, _Place],
    leaves: Sequence[Leaf],
) -> _Placed:
    """Where all of an adapter belongs; what has no place is added to `adapter.wrong`."""
    wrong = adapter.wrong
    tied = {f"{head}.weight": leaf for leaf in leaves if (head := tied_to(leaf, leaves))}
    everywhere = {**{head: _Place(leaf, 0, True) for head, leaf in tied.items()}, **places}
    low, full = dict[str, Part](), dict[str, Stored]()
    for part in parts:
        if (place := everywhere.get(part.name)) is None:
            wrong.append(f"{_shown(part)}: unexpected; names no leaf of `base` under `names`")
        elif bad := _misfits(part, place):
            wrong += bad
        else:
            low[part.name] = part
    shared = {leaf.path for leaf in tied.values()}
    for name, x in adapter.full.items():
        if (place := places.get(name)) is None:
            wrong.append(f"{shown(x.key)}: unexpected; names no leaf of `base` under `names`")
        elif place.leaf.path in shared:
            wrong.append(
                f"{shown(x.key)}: saved in full, which is not supported for an embedding that is "
                "tied to the head"
            )
        elif place.leaf.name.part:
            wrong.append(f"{shown(x.key)}: saved in full, but its parts are leaves of `base`")
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
    rows, tied_rows = _rows(adapter, everywhere, wrong)
    low, full = _whole(low, leaves, wrong), _whole(full, leaves, wrong)
    return _Placed(low, full, rows, heads, tied_rows, frozen)


def _rows(
    adapter: Adapter, places: Mapping[str, _Place], wrong: list[str]
) -> tuple[list[tuple[Leaf, Tokens]], list[tuple[Tokens, Tokens]]]:
    """The embeddings with rows, and the heads that are tied to some; `wrong` gets all else."""
    rows, heads = [], []
    for name, x in adapter.tokens.items():
        place = places.get(name)
        if place is None:
            why = "unexpected; names no leaf of `base` under `names`"
        elif place.is_head:
            table = adapter.tokens.get(f"{place.leaf.modules[0]}.weight")
            if table and table.rows == x.rows:
                heads.append((x, table))
                continue
            why = f"rows of a head whose weight is that of {place.leaf.modules[0]}"
        elif place.leaf.name.kind != "embedding":
            why = "rows of what is no embedding by `names`"
        else:
            bad = misfits(x, place.leaf.weight_shape) or _misshapen(x.v, x.v.shape)
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


def _misfits(part: Part, place: _Place) -> list[str]:
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
    if jax.dtypes.canonicalize_dtype(DTYPES[x.dtype]) != DTYPES[x.dtype]:
        return [f"{shown(x.key)}: dtype {x.dtype} needs jax_enable_x64"]
    return []


def _shown(part: Part) -> str:
    return shown(PREFIX + part.name.rpartition(".")[0])


def _unlike(adapter: Adapter, placed: _Placed, found: Mapping[str, np.ndarray]) -> list[str]:
    """Where values differ that must be the same."""
    wrong = [
        f"{shown(x.key)}: expected the transpose of {shown(y.key)}, got other values"
        for head, table in placed.heads
        for x, y in ((head.a, table.b), (head.b, table.a))
        if not np.array_equal(found[x.key], found[y.key].T)
    ]
    wrong += unlike(placed.tied_rows, found)
    return wrong + [
        f"{shown(x.key)}: expected the values of `base` at {name_of(place.leaf.path)}, got others; "
        "a trained or resized embedding under an adapter is not supported"
        for place, x in placed.frozen
        if not _is_that_of(place, found[x.key])
    ]


def _is_that_of(place: _Place, x: np.ndarray) -> bool:
    if isinstance(place.leaf.value, jax.ShapeDtypeStruct):
        return True
    own = weights(place.leaf, place.leaf.value)[place.at]
    return np.array_equal(own, x.astype(own.dtype))
