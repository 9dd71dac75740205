"""Handles a weight that a model may read twice: as its input embedding and as its output head."""

import collections
import functools
import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, NamedTuple

import numpy as np

from ..._errors import Problem
from .._checkpoint import Checkpoint
from .._file import TensorInfo, show
from .._vocabulary import (
    TIE,
    copy_config,
    find_pair,
    is_embedding,
    is_encoder_decoder,
    is_head,
    is_of_two,
    is_table,
    is_untied,
    list_tables,
    make_may_be_head,
    walk_objects,
)
from .._write import Edit
from ..adapter._parameters import find_twins, identify
from ..adapter._parts import (
    Parameters,
    T,
    Tokens,
    fill,
    find_table,
    list_lone_heads,
    list_tensors,
)
from ..adapter._sorted import Adapter
from ..places._find import explain_absent
from ..places._views import Places, Shape, module_of
from ._target import Target

# Tensors that the model may read twice, each with its copies in the checkpoint.
Shared = Mapping[str, list[str]]
Read = Callable[[Iterable[TensorInfo]], Mapping[str, np.ndarray]]
_UNTIE = (
    f"Use the adapter unmerged, or save the base model untied: with {TIE}=False in each part of "
    "its configuration, and a weight of its own for the head."
)


def find_shared(target: Target, found: Parameters[T]) -> tuple[dict[str, list[str]], list[Problem]]:
    """Finds the embeddings and heads that an adapter changes and the model may read twice.

    If the checkpoint lacks a head that the adapter changes, an embedding may be that head. It is a
    problem if the configuration ties weights whose values differ.
    """
    checkpoint, model = target
    config, shapes = checkpoint.config, model.shapes
    tensors = {x: model.tensor(f"{x}.weight") for x in list_tables(config, shapes)}
    sides = collections.defaultdict[tuple[bool, Shape], list[str]](list)
    for module, tensor in tensors.items():
        sides[is_head(module), shapes[f"{module}.weight"]].append(tensor)
    changed = set(map(module_of, found.changed))
    if any(is_head(module) and f"{module}.weight" not in model for module in changed):
        changed |= set(filter(is_embedding, tensors))
    has_encoder = is_encoder_decoder(config)
    is_apart = is_untied(config) and any(is_head(module_of(name)) for name in model)
    may_be_head = make_may_be_head([*model, *found.full], config)
    digest = functools.cache(functools.partial(_digest, checkpoint))
    shared, problems = dict[str, list[str]](), list[Problem]()
    for module in filter(changed.__contains__, tensors):
        is_two = is_embedding(module) and is_of_two(module, has_encoder)
        if is_apart and not is_two:
            continue
        own = tensors[module]
        others = sides[not is_head(module), shapes[f"{module}.weight"]]
        copies = [x for x in others if digest(x) == digest(own)]
        if others and not copies and not is_two and not has_encoder:
            if _is_tied(config, f"{module}.weight" in found.tokens):
                why = f"config.json ties it to {show(others[0])}, but their values differ"
                problems.append(Problem(own, why, f"Correct {TIE} there."))
        elif copies or is_head(module) or may_be_head(module):
            shared[own] = copies
    return shared, problems


def _is_tied(config: Mapping[str, Any], has_rows: bool) -> bool:
    """Whether a configuration ties embedding and head; PEFT ties rows if it does not deny it."""
    said = {part.get(TIE) for part in walk_objects(config)}
    return True in said or (has_rows and config.get(TIE) is not False)


class Pair(NamedTuple):
    """The embedding of a plain decoder, and its head.

    Attributes:
        table: the tensor of the embedding.
        head: the tensor of the head, stored or not, after the other tensors got `prefix`.
        prefix: what the names of the other tensors need beside a head.
    """

    table: str
    head: str
    prefix: str


def find_plain(target: Target) -> Pair | None:
    """Finds the embedding and the head of a plain decoder; None if it may be another model."""
    checkpoint, model = target
    for prefix in ("", model.prefix or ""):
        shapes = {prefix + name: shape for name, shape in checkpoint.shapes.items()}
        if pair := find_pair(shapes, checkpoint.config):
            table, head = (f"{module}.weight" for module in pair)
            return Pair(table.removeprefix(prefix), head, prefix)
    return None


def list_absent(checkpoint: Checkpoint, model: Places, found: Parameters[T]) -> list[Problem]:
    """Lists the parameters of an adapter that the checkpoint does not have.

    A tied parameter is not listed if the one in the checkpoint gets the same values. Values that
    are not read yet are compared by shape.
    """
    lost = [x.name for x in found.parts if x.name not in model]
    whole = {**found.full, **found.frozen}
    if lost:
        shared = find_twins(found.parts)
        lost = [name for name in lost if name not in shared or shared[name].name not in model]
    lone = {name: x for name, x in whole.items() if name not in model}
    kept = {identify(x) for name, x in whole.items() if name in model} if lone else set()
    lost += [name for name, x in lone.items() if identify(x) not in kept]
    lost = dict.fromkeys(lost)  # PEFT's copy of a frozen weight is lost with its A and B
    return [Problem(x, explain_absent(x, checkpoint.config), _advise(x)) for x in lost]


def _advise(name: str) -> str:
    if is_head(module_of(name)):
        return f"It may share the weight of the input embedding. {_UNTIE}"
    return (
        "Save the base model as it was adapted, with its head, and in `transformers` 5 with "
        "save_pretrained(..., save_original_format=False); or give `renamed`."
    )


# -------------------------------------------------------------------------------- rows of tables


def separate_heads(
    model: Places, shared: Shared, tokens: Mapping[str, Tokens[T]]
) -> tuple[dict[str, Tokens[T]], list[tuple[Tokens[T], Tokens[T]]]]:
    """Returns the rows of embeddings in the checkpoint, and pairs of tied heads and embeddings."""
    heads = []
    there = dict(tokens)
    for name, x in tokens.items():
        table = find_table(name, tokens, model) if is_table(x.module) else None
        if table is None:
            continue
        if name not in model or model.tensor(name) in shared:
            heads.append((x, table))
        if name not in model:
            del there[name]
    return there, heads


def list_untied_heads(checkpoint: Checkpoint, shared: Shared, adapter: Adapter) -> list[Problem]:
    """Lists problems with rows that are listed for a head that is not tied."""
    tied = {*shared, *(copy for copies in shared.values() for copy in copies)}
    apart = (name.removesuffix(".weight") for name in checkpoint.where if name not in tied)
    return list_lone_heads(adapter.heads, apart)


# ------------------------------------------------------------------------- weights stored twice


def with_copies(edits: Mapping[str, Edit], shared: Shared) -> dict[str, Edit]:
    """Adds edits for the second copy of a shared weight that is stored twice."""
    each = ((copy, edits[name]) for name in shared if name in edits for copy in shared[name])
    return dict(each) | dict(edits)


def _digest(checkpoint: Checkpoint, name: str) -> bytes:
    """Returns the hash of a tensor's bytes."""
    found = hashlib.sha256()
    for piece in checkpoint.pieces(name):
        found.update(piece)
    return found.digest()


# ------------------------------------------------------------- a head beside its embedding


def settle_ties(
    target: Target, found: Parameters[T], shared: Shared, read: Read, saves: Callable[[str], bool]
) -> tuple[Target, Parameters[T], Shared, list[Problem]]:
    """Gives the head of a plain decoder its own weight if the adapter changes the two differently.

    For other models, that is a problem. New rows in the embedding are new in the head too, as in
    PEFT. A table that `modules_to_save` does not name is in the adapter because the base's own was
    resized.

    Args:
        target: the checkpoint.
        found: the contents of the adapter.
        shared: the weights that the model may read twice.
        read: reads tensors of the adapter, whose values are compared.
        saves: whether `modules_to_save` names a module.
    """
    checkpoint, model = target
    if not shared:
        return target, found, shared, []
    tensors = {name: model.tensor(name) for name in found.changed}
    heads = [name for name in tensors if name not in model and is_head(module_of(name))]
    sides = {name for name, x in tensors.items() if x in shared or name in heads}
    rows = sides & found.tokens.keys()
    has_encoder = is_encoder_decoder(checkpoint.config)
    even = set[str]() if has_encoder else _find_even(found, sides, read)
    uneven = {n for n in sides - rows if n not in even or is_of_two(module_of(n), has_encoder)}
    pair = find_plain(target)
    if pair and uneven:
        return *_store_head(target, found, pair, heads), []
    uneven = {n for n in uneven if n not in found.full or saves(module_of(n))}
    if not pair or not _is_tied(checkpoint.config, True):
        uneven |= rows
    why = (
        "the model may read this weight twice, as its input embedding and as its output head, and "
        "the adapter does not say that it changes both equally"
    )
    names = (name for name in tensors if name in uneven and name in model)
    return target, found, shared, [Problem(model.tensor(name), why, _UNTIE) for name in names]


def _find_even(found: Parameters[T], names: Collection[str], read: Read) -> set[str]:
    """Finds those of some parameters that are changed as another one of them is."""
    parts = [x for x in found.parts if x.name in names]
    own = Parameters(parts, {name: x for name, x in found.full.items() if name in names})
    own = fill(own, read(list_tensors(own)))
    counts = collections.Counter(map(identify, own.full.values()))
    same = (name for name, x in own.full.items() if counts[identify(x)] > 1)
    return {*find_twins(own.parts), *same}


def _store_head(
    target: Target, found: Parameters[T], pair: Pair, heads: Collection[str]
) -> tuple[Target, Parameters[T], Shared]:
    """Gives a head its own weight, with the values of the embedding if it has none.

    Args:
        target: the checkpoint.
        found: the contents of the adapter.
        pair: the embedding and its head.
        heads: the heads that the adapter changes and the checkpoint lacks.
    """
    checkpoint, model = target
    tokens = dict(found.tokens)
    own = [n for n in found.changed if model.tensor(n) == pair.head and n not in tokens]
    [name, *_] = [*own, *heads, pair.head]
    if rows := [x for n, x in tokens.items() if model.tensor(n) == pair.table]:
        tokens[name] = rows[0]._replace(module=module_of(name))
    config = _untied(checkpoint.config)
    if pair.head in checkpoint.where:
        target = target.resize({}, config)
    else:
        new = checkpoint.entry(pair.table)._replace(key=pair.head)
        target = target.add({name: new}, config, pair.prefix, {name: pair.table})
    return target, found._replace(tokens=tokens), {}


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """Says in a configuration, and in those of its submodels, that the head is not tied."""
    found = copy_config(config)
    for part in walk_objects(found):
        if part is found or TIE in part or part is found.get("text_config"):
            part[TIE] = False
    return found
