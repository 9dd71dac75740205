"""Handles a weight that the input embedding and the output head of a checkpoint share."""

import collections
import hashlib
from collections.abc import Mapping
from typing import Any

from ..._errors import Problem
from .._checkpoint import Checkpoint
from .._file import show
from .._problems import Problems
from .._write import Edit
from ..adapter._parameters import find_twins, identify
from ..adapter._sorted import SHARED, Adapter, Parameters
from ..adapter._tokens import Tokens, find_table, list_lone_heads
from ..places._find import explain_absent
from ..places._views import Places
from ._blocks import NewRows


def is_shared(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a tensor is the weight shared by the input embedding and the output head."""
    module, _, parameter = name.rpartition(".")
    if name not in checkpoint.where or parameter != "weight" or not SHARED.search(module):
        return False
    shape = checkpoint.entry(name).shape
    return len(shape) == 2 and shape[0] in checkpoint.vocabulary


def may_be_shared(checkpoint: Checkpoint, name: str) -> bool:
    """Whether a parameter that the checkpoint lacks may be its embedding or head, by its name."""
    return bool(checkpoint.vocabulary) and bool(SHARED.search(name.rpartition(".")[0]))


def list_absent(checkpoint: Checkpoint, model: Places, found: Parameters) -> list[Problem]:
    """Lists the parameters of an adapter that the checkpoint does not have.

    A tied parameter is not listed if the one in the checkpoint gets the same values. Values that
    are not read yet are compared by shape.
    """
    lost = [x.name for x in found.parts if x.name not in model]
    whole = found.full | found.frozen
    if lost:
        shared = find_twins(found.parts)
        lost = [name for name in lost if name not in shared or shared[name].name not in model]
    lone = {name: x for name, x in whole.items() if name not in model}
    kept = {identify(x) for name, x in whole.items() if name in model} if lone else set()
    lost += [name for name, x in lone.items() if identify(x) not in kept]
    lost = dict.fromkeys(lost)  # PEFT's copy of a frozen weight is lost with its A and B
    config = checkpoint.config
    return [Problem(x, explain_absent(x, config), _advise(x, checkpoint)) for x in lost]


_UNTIE = "Give `untie=True`, which stores both, or save the base model untied."


def _advise(name: str, checkpoint: Checkpoint) -> str:
    if may_be_shared(checkpoint, name):
        return (
            "If it shares the input embedding's weight, the adapter must change both equally. "
            + _UNTIE
        )
    return (
        "Save the base model as it was adapted, with its head, and in `transformers` 5 with "
        "save_pretrained(..., save_original_format=False); or give `renamed`."
    )


def list_untied(checkpoint: Checkpoint, model: Places, found: Parameters) -> list[Problem]:
    """Lists changes of a shared weight for only one of the embedding and the head."""
    names = (x.name for x in found.parts)
    full = found.full
    alone = [name for name in names if is_shared(checkpoint, model.tensor(name))]
    if alone:
        shared = find_twins(found.parts)
        alone = [name for name in alone if name not in shared]
    if both := [name for name in full if is_shared(checkpoint, model.tensor(name))]:
        counts = collections.Counter(map(identify, full.values()))
        alone += [name for name in both if counts[identify(full[name])] == 1]
    return [
        Problem(
            model.tensor(name),
            "the input embedding and the output head share this weight (config.json: "
            "tie_word_embeddings), but the adapter does not change both equally",
            _UNTIE,
        )
        for name in alone
    ]


# -------------------------------------------------------------------------------- rows of tables


def separate_heads(
    checkpoint: Checkpoint, model: Places, tokens: Mapping[str, Tokens]
) -> tuple[dict[str, Tokens], list[tuple[Tokens, Tokens]]]:
    """Returns the rows of embeddings in the checkpoint, and pairs of tied heads and embeddings."""
    heads = []
    there = dict(tokens)
    for name, x in tokens.items():
        table = find_table(name, tokens, model) if SHARED.search(x.module) else None
        if table is None:
            continue
        if name not in model or is_shared(checkpoint, model.tensor(name)):
            heads.append((x, table))
        if name not in model:
            del there[name]
    return there, heads


def list_untied_heads(checkpoint: Checkpoint, adapter: Adapter) -> list[Problem]:
    """Lists problems with rows that are listed for a head that is not tied."""
    apart = (name for name in checkpoint.where if not is_shared(checkpoint, name))
    return list_lone_heads(adapter.heads, [n.removesuffix(".weight") for n in apart])


# ------------------------------------------------------------------------- weights stored twice


def with_copies(
    checkpoint: Checkpoint, edits: Mapping[str, Edit], problems: Problems
) -> dict[str, Edit]:
    """Adds edits for the second copy of a shared weight that is stored twice."""
    groups = collections.defaultdict[Any, tuple[list[str], list[str]]](lambda: ([], []))
    for name in checkpoint.where:
        if is_shared(checkpoint, name):
            tensor = checkpoint.entry(name)
            groups[tensor.dtype, tensor.shape][name in edits].append(name)
    found = dict(edits)
    for others, own in groups.values():
        values = {digest(checkpoint, name): name for name in own if others}
        for other in others if own else ():
            if (copied := values.get(digest(checkpoint, other))) is not None:
                found[other] = edits[copied]
            elif rows := [name for name in own if isinstance(edits[name], NewRows)]:
                why = (
                    "has rows in the adapter, which PEFT also gives to a tied head; config.json "
                    f"ties it to {show(other)}, but their values differ in the checkpoint"
                )
                remedy = "Correct tie_word_embeddings there."
                problems.stop(Problem(rows[0], why, remedy))
    return found


def digest(checkpoint: Checkpoint, name: str) -> bytes:
    """Returns the hash of a tensor's bytes."""
    found = hashlib.sha256()
    for piece in checkpoint.pieces(name):
        found.update(piece)
    return found.digest()
