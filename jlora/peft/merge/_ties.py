"""A weight that the input embedding and the output head of a checkpoint share: it is there once."""

import collections
import hashlib
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from .._checkpoint import Checkpoint
from .._file import shown
from ..adapter._contents import SHARED, Adapter, Part
from ..adapter._parameters import twins
from ..adapter._tokens import Tokens, lone_heads, tied_rows
from ._renaming import Views


def absent(
    checkpoint: Checkpoint, parts: Sequence[Part], full: Mapping[str, np.ndarray]
) -> list[str]:
    """Problems with what the checkpoint has no tensor for: a tied weight is there once."""
    where, shared = checkpoint.where, twins(parts)
    names = {part.name for part in parts if part.name in where}
    lost = [
        part.name
        for part in parts
        if part.name not in where
        and (part.name not in shared or shared[part.name].name not in names)
    ]
    kept = {_digest(x) for name, x in full.items() if name in where}
    lost += [n for n, x in full.items() if n not in where and _digest(x) not in kept]
    return not_there(checkpoint, lost)


def _digest(x: np.ndarray) -> tuple[Any, ...]:
    return x.shape, x.dtype, hashlib.sha256(x.tobytes()).digest()


def not_there(checkpoint: Checkpoint, names: Iterable[str]) -> list[str]:
    return [f"{shown(name)}: not in the checkpoint{_reason(name, checkpoint)}" for name in names]


def _reason(name: str, checkpoint: Checkpoint) -> str:
    if checkpoint.vocabulary and name.endswith((".weight", ".bias")):
        return (
            "; if it shares the input embedding's weight, the adapter must change both alike, or "
            "the checkpoint must be saved untied"
        )
    return (
        "; save the base model as it was adapted, with its head, and in `transformers` 5 by "
        "save_pretrained(..., save_original_format=False)"
    )


def untied(
    checkpoint: Checkpoint, parts: Sequence[Part], full: Mapping[str, np.ndarray]
) -> list[str]:
    """Changes of a shared weight that PEFT would apply in only one of its places."""
    shared = twins(parts)
    alone = [p.name for p in parts if is_shared(checkpoint, p.name) and p.name not in shared]
    found = {name: _digest(x) for name, x in full.items()}
    counts = collections.Counter(found.values())
    alone += [n for n, x in found.items() if is_shared(checkpoint, n) and counts[x] == 1]
    return [
        f"{shown(name)}: the input embedding and the output head share this weight (config.json: "
        "tie_word_embeddings), but the adapter does not change both alike; save the base model "
        "untied first"
        for name in alone
    ]


def copies(
    checkpoint: Checkpoint, changed: Collection[str], digest: Callable[[str], bytes]
) -> Iterator[tuple[str, list[str], str | None]]:
    """A shared weight that is not changed, those of its form that are, and which it is a copy of.

    `digest` is of the values of a tensor. It is asked once for each tensor that may be a copy.
    """
    forms = collections.defaultdict[Any, tuple[list[str], list[str]]](lambda: ([], []))
    for name in checkpoint.where:
        if is_shared(checkpoint, name):
            forms[checkpoint.entry(name)[1:3]][name in changed].append(name)
    for others, own in forms.values():
        if own and others:
            values = {digest(name): name for name in own}
            yield from ((other, own, values.get(digest(other))) for other in others)


def is_shared(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor is the weight that the input embedding and the output head share."""
    module, _, parameter = name.rpartition(".")
    if name not in checkpoint.where or parameter != "weight" or not SHARED.search(module):
        return False
    shape = checkpoint.entry(name).shape
    return len(shape) == 2 and shape[0] in checkpoint.vocabulary


def with_heads(
    checkpoint: Checkpoint, own: Views, tokens: Mapping[str, Tokens]
) -> tuple[dict[str, Tokens], list[tuple[Tokens, Tokens]]]:
    """The rows that the checkpoint has tables for, and the heads that are tied to one of them."""
    heads, there = [], dict(tokens)
    for name, x in tokens.items():
        table = tied_rows(name, tokens, own) if SHARED.search(x.module) else None
        is_lost = name not in own
        if table is None:
            continue
        if is_lost or is_shared(checkpoint, own[name].pieces[0].tensor):
            heads.append((x, table))
        if is_lost:
            del there[name]
    return there, heads


def untied_heads(checkpoint: Checkpoint, adapter: Adapter) -> list[str]:
    """What lists the rows of an embedding once more, and is no head that is tied to it."""
    apart = (name for name in checkpoint.where if not is_shared(checkpoint, name))
    return lone_heads(adapter.heads, [n.removesuffix(".weight") for n in apart])
