"""Handles a weight that a model may read twice: as its input embedding and as its output head."""

import collections
import functools
import hashlib
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import numpy as np

from ..._errors import Problem, show
from .._checkpoint import Checkpoint
from .._file import TensorInfo
from .._submodels import TIE, copy_config, is_untied, walk_objects
from .._write import Edit
from ..adapter._parameters import find_twins, identify
from ..adapter._parts import (
    Parameters,
    T,
    Whole,
    fill,
    find_table,
    list_lone_heads,
    list_tensors,
)
from ..adapter._sorted import Adapter
from ..names._kinds import EMBEDDING
from ..places._declared import Ties, find_class, find_ties, get_part, is_table
from ..places._find import explain_absent
from ..places._views import Places, module_of
from ._target import Target, find_class_of

# Tensors that the model may read twice, each with its copies in the checkpoint.
Shared = Mapping[str, list[str]]
Read = Callable[[Iterable[TensorInfo]], Mapping[str, np.ndarray]]
_UNTIE = (
    f"Use the adapter unmerged, or save the base model untied: with {TIE}=False in each part of "
    "its configuration, and a weight of its own for the head."
)


def find_shared(
    target: Target, found: Parameters[T], fields: Mapping[str, Any]
) -> tuple[Ties | None, dict[str, list[str]], list[Problem]]:
    """Finds the weights that an adapter changes and the model may read twice.

    It is a problem if the configuration ties weights whose values differ.

    Args:
        target: the checkpoint.
        found: the contents of the adapter.
        fields: its configuration, which may name another class than the checkpoint's.

    Returns:
        What the model ties, None if its class is not known; the weights; and problems. Without a
        class, the weights are the embeddings and heads that another tensor equals, or that may be a
        head that the checkpoint lacks.
    """
    checkpoint, model = target
    digest = functools.cache(functools.partial(_digest, checkpoint))
    config = checkpoint.config
    if (name := find_class_of(config, fields)) is not None:
        config = {**config, "architectures": [name]}
    ties = find_ties(checkpoint.shapes, config)
    own = find_class(config)
    if model.prefix and (own is None or model.prefix != f"{own.prefix}."):
        ties = None  # the adapted model is of another class
    shared, problems = dict[str, list[str]](), list[Problem]()
    if ties is None:
        shapes = checkpoint.shapes
        alike = collections.defaultdict[object, list[str]](list)
        for x, shape in shapes.items():
            alike[shape].append(x)
        for tensor in [] if is_untied(config) else _list_tables(model, found, bool(config)):
            others = (x for x in alike[shapes[tensor]] if x != tensor)
            shared[tensor] = [x for x in others if digest(x) == digest(tensor)]
        return None, shared, []
    rows = {model.tensor(name) for name in found.tokens}
    is_said = any(part.get(TIE) is True for part in walk_objects(config))
    for changed in dict.fromkeys(ties.tensor(name, model) for name in found.changed):
        own = [x for x in ties.group(changed) if x in checkpoint.where]
        if other := next((x for x in own[1:] if digest(x) != digest(own[0])), None):
            if is_said or changed in rows:
                why = f"config.json ties it to {show(other)}, but their values differ"
                problems.append(Problem(own[0], why, f"Correct {TIE} there."))
        elif own:
            shared[own[0]] = own[1:]
    return ties, shared, problems


def _list_tables(model: Places, found: Parameters[T], has_model: bool) -> list[str]:
    """Lists the tensors of the embeddings and heads that an adapter changes.

    Without a configuration, which says what model it is, these are known by their names alone.
    """
    tables = {x.name for x in found.parts if x.kind is EMBEDDING} | found.tokens.keys()
    tables = tables if has_model else set[str]()
    names = (x for x in found.changed if x in tables or is_table(module_of(x)))
    return [model.tensor(x) for x in names if x in model and len(model[x].shape) == 2]


def list_absent(checkpoint: Checkpoint, model: Places, found: Parameters[T]) -> list[Problem]:
    """Lists the parameters of an adapter that the checkpoint does not have.

    A tied parameter is not listed if the one in the checkpoint gets the same values. Values that
    are not read yet are compared by shape.
    """
    lost = [x.name for x in found.parts if x.name not in model]
    whole = {name: x.x for name, x in found.whole.items()}
    if lost:
        shared = find_twins(found.parts)
        lost = [name for name in lost if name not in shared or shared[name].name not in model]
    lone = {name: x for name, x in whole.items() if name not in model}
    kept = {identify(x) for name, x in whole.items() if name in model} if lone else set()
    lost += [name for name, x in lone.items() if identify(x) not in kept]
    lost = dict.fromkeys(lost)  # PEFT's copy of a frozen weight is lost with its A and B
    return [Problem(x, explain_absent(x, checkpoint.config), _advise(x)) for x in lost]


def _advise(name: str) -> str:
    if is_table(module_of(name)):
        return f"It may share the weight of the input embedding. {_UNTIE}"
    return (
        "Save the base model as it was adapted, with its head, and in `transformers` 5 with "
        "save_pretrained(..., save_original_format=False); or give `renamed`."
    )


# -------------------------------------------------------------------------------- rows of tables


def separate_heads(
    model: Places, shared: Shared, found: Parameters[T]
) -> tuple[dict[str, Whole[T]], list[tuple[Whole[T], Whole[T]]]]:
    """Returns what is in full without tied heads, and pairs of these and embeddings with rows."""
    heads = []
    there = dict(found.full)
    for name, x in found.tokens.items():
        if (table := find_table(name, found.tokens, model)) is None:
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
    target: Target,
    found: Parameters[T],
    ties: Ties | None,
    shared: Shared,
    read: Read,
    saves: Callable[[str], bool],
) -> tuple[Target, Parameters[T], Shared, list[Problem]]:
    """Gives a head its own weight if the adapter changes it and its embedding differently.

    That is a problem if the class of the model is not known, or has more than this one tie. New
    rows in the embedding are new in the head too, as in PEFT. A table that `modules_to_save` does
    not name is in the adapter because the base's own was resized.

    Args:
        target: the checkpoint.
        found: the contents of the adapter.
        ties: what the model ties, None if that is not known.
        shared: the weights that the model may read twice.
        read: reads tensors of the adapter, whose values are compared.
        saves: whether `modules_to_save` names a module.
    """
    model = target.model
    if not shared:
        return target, found, shared, []
    known = ties or Ties(sources={x: own for own, copies in shared.items() for x in copies})
    tensors = {name: known.tensor(name, model) for name in found.changed}
    groups = {name: known.group(x) or [x] for name, x in tensors.items()}
    sides = {name for name, own in groups.items() if own[0] in shared}
    rows = sides & found.tokens.keys()
    even = _find_even(found, sides - rows, read)
    uneven = {n for n in sides - rows if n not in even or len(groups[n]) > 2}
    head = ties and ties.head
    if ties and head and uneven:
        names = [name for name in found.changed if tensors[name] == head]
        return *_store_head(target, found, ties, head, names), []
    uneven = {n for n in uneven if n not in found.full or saves(module_of(n))}
    uneven |= set() if ties and head and _takes_rows(ties, head, target.checkpoint) else rows
    why = (
        "the model may read this weight twice, as its input embedding and as its output head, and "
        "the adapter does not say that it changes both equally"
    )
    left = [name for name in tensors if name in uneven and name in model]
    others = {n: ", ".join(show(x) for x in groups[n] if x != tensors[n]) for n in left}
    also = {n: f"; by its class, it is {others[n]} too" * bool(ties) for n in left}
    problems = [Problem(tensors[name], why + also[name], _UNTIE) for name in left]
    return target, found, shared, problems


def _takes_rows(ties: Ties, head: str, checkpoint: Checkpoint) -> bool:
    """Whether PEFT gives rows of an embedding to a head, and computes them: not with a bias."""
    bias = f"{module_of(head)}.bias"
    is_of_class = head == ties.output and "" in ties.paths
    return is_of_class and bias not in ties.sources and bias not in checkpoint.where


def _find_even(found: Parameters[T], names: Collection[str], read: Read) -> set[str]:
    """Finds those of some parameters that are changed as another one of them is."""
    parts = [x for x in found.parts if x.name in names]
    own = Parameters(parts, {name: x for name, x in found.full.items() if name in names})
    own = fill(own, read(list_tensors(own)))
    counts = collections.Counter(identify(x.x) for x in own.full.values())
    same = (name for name, x in own.full.items() if counts[identify(x.x)] > 1)
    return {*find_twins(own.parts), *same}


def _store_head(
    target: Target, found: Parameters[T], ties: Ties, head: str, names: Collection[str]
) -> tuple[Target, Parameters[T], Shared]:
    """Gives a head its own weight, with the values of the embedding if it has none.

    Args:
        target: the checkpoint.
        found: the contents of the adapter.
        ties: what the model ties.
        head: the tensor of the head, stored or not.
        names: the adapter's names of the head, if it changes it.
    """
    checkpoint, model = target
    full = dict(found.full)
    rows = [x for n, x in found.tokens.items() if model.tensor(n) == ties.sources[head]]
    name = next((x for x in names if x not in found.tokens), head)
    if rows:
        full[name] = rows[0]._replace(name=name)
    new = {
        name if x == head else x: (checkpoint.entry(own)._replace(key=x), own)
        for x, own in ties.sources.items()
        if x not in checkpoint.where
    }
    config = _untied(checkpoint.config, ties.paths)
    target = target.change(config, added=new, prefix=ties.prefix if new else "")
    return target, found._replace(full=full), {}


def _untied(config: Mapping[str, Any], paths: Collection[str]) -> dict[str, Any]:
    """Says in a configuration, and in those of its submodels, that the head is not tied."""
    found = copy_config(config)
    asked = [get_part(found, path) for path in (*paths, "text_config")]
    for part in walk_objects(found):
        if part is found or TIE in part or any(part is x for x in asked):
            part[TIE] = False
    return found
