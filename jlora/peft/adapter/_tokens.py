"""Rows of embeddings that PEFT trains: what its configuration says of them, and their values."""

from collections.abc import Container, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np

from ..._adapters import Replaced
from ..._tree import name_of
from ..._types import Path
from .._file import PREFIX, TENSORS, shown
from ..names._arrays import rows_of
from ..names._names import Leaf
from ._config import PARAMETERS, ROWS_ALONE, misformed
from ._select import Selection, suffixes

DELTA = ".token_adapter.trainable_tokens_delta"
DELTA_ALONE = ".trainable_tokens_delta"
WRAPPED = ".token_adapter"
INDICES = "trainable_token_indices"

Rows = tuple[int, ...]


class Tokens(NamedTuple):
    """Rows of an embedding.

    Attributes:
        module: PyTorch's module.
        rows: their numbers.
        v: what stands in their places, (k, dim), an array or `Stored`.
    """

    module: str
    rows: Rows
    v: Any


def told(
    fields: Mapping[str, Any], modules: Iterable[str], wrong: list[str]
) -> tuple[dict[str, Rows], list[str]]:
    """The rows of each of the `modules` that have values, and what is listed without values.

    That may be a head that is tied to an embedding with the same rows; any other is added to
    `wrong`.
    """
    said, modules = fields.get(INDICES), list(modules)
    is_one = not isinstance(said, dict)  # of the model's input embedding
    said = {"": said} if is_one and said else said or {}
    said = {key: tuple(rows) for key, rows in said.items()}
    if len(modules) > (1 if is_one else PARAMETERS):
        few = "one embedding" if is_one else f"at most {PARAMETERS}"
        wrong.append(f"{INDICES}: expected rows of {few}; there are values for {len(modules)}")
        return {}, []
    found = dict[str, Rows]()
    for module in modules:
        # As PEFT finds it: also within a part of a name.
        each = {rows for key, rows in said.items() if module.endswith(key)}
        if len(each) == 1:
            found[module] = each.pop()
        else:
            why = f"{INDICES} lists {'other rows too' if each else 'none of its rows'}"
            wrong.append(f"{shown(PREFIX + module)}{DELTA}: unexpected; {why}")
    alone = [key for key in said if not any(module.endswith(key) for module in modules)]
    lost = [key for key in alone if said[key] not in found.values()]
    wrong += [f"{INDICES}: selects {shown(key) or 'rows'}, missing in {TENSORS}" for key in lost]
    return found, [key for key in alone if key not in lost]


def with_tokens(
    fields: dict[str, Any], own: Sequence[Leaf], leaves: Sequence[Leaf], found: Mapping[Path, Any]
) -> dict[str, Any]:
    """`fields` that list the rows of the leaves `own`, and no others."""
    wanted = {leaf.modules[0]: found[leaf.path].rows for leaf in own}
    others = {module for leaf in leaves for module in leaf.modules} - wanted.keys()
    said, alone = told(fields, wanted, wrong := list[str]())
    if said == wanted and not (wrong or lone_heads(alone, others)):
        return fields
    named = {_ending(module, others): list(rows) for module, rows in wanted.items()}
    return fields | {INDICES: named or None}


def with_rows_alone(
    fields: dict[str, Any], own: Sequence[Leaf], leaves: Sequence[Leaf], found: Mapping[Path, Any]
) -> dict[str, Any]:
    """`fields` of an adapter of nothing but the rows of `own`, of which PEFT has one list."""
    lists = {found[leaf.path].rows: name_of(leaf.path) for leaf in own}
    if len(lists) > 1:
        raise ValueError(
            "`adapter` has nothing but rows, of which PEFT has one list for all embeddings; got "
            f"different ones at {', '.join(lists.values())}. Save them one by one."
        )
    wanted = [leaf.modules[0] for leaf in own]
    others = {m for leaf in leaves for m in leaf.modules} - set(wanted)
    new = {"peft_type": ROWS_ALONE, "token_indices": list(*lists)}
    if not misformed(fields | new):
        selection = Selection(fields)
        selection.prepare([*wanted, *others])
        if all(map(selection.adapts, wanted)) and not any(map(selection.adapts, others)):
            return fields | new
    return fields | new | {"target_modules": suffixes(wanted, others)}


def _ending(module: str, others: Iterable[str]) -> str:
    """The last parts of `module`, as few as end none of the others."""
    parts = module.split(".")
    tails = (".".join(parts[-n:]) for n in range(1, len(parts)))
    return next((t for t in tails if not any(other.endswith(t) for other in others)), module)


def tokens_of(leaves: Iterable[Leaf], found: Mapping[Path, Any]) -> list[Tokens]:
    """The rows of those of `leaves` that have some."""
    each = ((leaf, found.get(leaf.path)) for leaf in leaves)
    return [
        Tokens(leaf.modules[0], x.rows, rows_of(leaf, x))
        for leaf, x in each
        if isinstance(x, Replaced)
    ]


def misfits(tokens: Tokens, shape: tuple[int, ...]) -> list[str]:
    """Why they are no rows of an embedding of `shape` in PyTorch."""
    key, rows = shown(getattr(tokens.v, "key", tokens.module)), tokens.rows
    wanted = (len(rows), *shape[1:])
    found = [f"{key}: expected shape {wanted}, got {tokens.v.shape}"] * (tokens.v.shape != wanted)
    if max(rows) >= shape[0]:
        why = f"{INDICES} lists row {max(rows)}, of {shape[0]}"
        found.append(f"{shown(tokens.module)}: {why}; grow the vocabulary first, as it was trained")
    return found


def lone_heads(heads: Iterable[str], modules: Iterable[str]) -> list[str]:
    """Those `heads` of an adapter that name modules of their own."""
    modules = list(modules)
    return [
        f"{INDICES}: selects {shown(key)}, missing in {TENSORS}"
        for key in heads
        if any(module.endswith(key) for module in modules)
    ]


def tied_rows(name: str, tokens: Mapping[str, Tokens], tables: Container[str]) -> Tokens | None:
    """The rows of that of the `tables` which the head or embedding `name` may be tied to."""
    others = (x for other, x in tokens.items() if other != name and other in tables)
    return next((x for x in others if x.rows == tokens[name].rows), None)


def unlike(pairs: Iterable[tuple[Any, Any]], found: Mapping[str, np.ndarray]) -> list[str]:
    """Tensors of heads and embeddings that are one weight, of which the values differ."""
    return [
        f"{shown(head.key)}: expected the values of {shown(table.key)}, got others"
        for head, table in pairs
        if not np.array_equal(found[head.key], found[table.key])
    ]


@np.errstate(over="ignore")  # it is counted by `_blocks`
def placed(tokens: Tokens, x: np.ndarray, start: int) -> None:
    """Writes those rows that lie in the block `x` of the table's rows from `start` on."""
    rows = np.asarray(tokens.rows)
    here = np.flatnonzero((rows >= start) & (rows < start + len(x)))
    x[rows[here] - start] = tokens.v[here].astype(x.dtype)
