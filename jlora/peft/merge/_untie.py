"""Gives the output head of a tied checkpoint a weight of its own."""

import copy
import re
from collections.abc import Iterable, Mapping
from typing import Any

from .._checkpoint import Checkpoint
from .._problems import Problems
from .._vocabulary import walk_objects
from ..adapter._contents import SHARED, Contents
from ._target import Target
from ._ties import digest, is_shared

_DECODER = re.compile(r"CausalLM|LMHeadModel|ForConditionalGeneration")
_REMEDY = "save the base untied in `transformers`"
TIE = "tie_word_embeddings"


def untie(target: Target, found: Contents, problems: Problems) -> tuple[Target, Contents]:
    """Stores the shared weight of embedding and head twice, if the checkpoint is tied.

    Rows that are replaced in the embedding are replaced in the head too, as PEFT does it.
    """
    checkpoint, model = target
    shared = [name for name in checkpoint.where if is_shared(checkpoint, name)]
    if not checkpoint.vocabulary:
        return target, found
    config = _untied(checkpoint.config)
    if why := _explain_tied(checkpoint, shared):
        problems.found.append(f"`untie`: {why}; {_REMEDY}")
        return target, found
    if len(shared) > 1:
        return target.resize({}, config), found
    [table] = shared
    names = [*(x.name for x in found.parts), *found.full, *found.tokens]
    head = _find_head(checkpoint, [n for n in names if n not in model], table)
    # The model with the head has a prefix before the names of the others.
    is_bare = table.count(".") == 1 and not target.prefix
    if head in (None, table) or target.prefix is None or is_bare:
        problems.found.append(f"`untie`: the name of the head is not known; {_REMEDY}")
        return target, found
    info = checkpoint.entry(table)._replace(key=head)
    tokens = dict(found.tokens)
    for name, x in found.tokens.items():
        if name in model and model.tensor(name) == table:
            tokens.setdefault(head, x._replace(module=head.removesuffix(".weight")))
    return target.add({head: info}, config, table), found._replace(tokens=tokens)


def _explain_tied(checkpoint: Checkpoint, shared: list[str]) -> str | None:
    """Explains why a head cannot be untied, if it cannot."""
    config = checkpoint.config
    if any(part.get("is_encoder_decoder") is True for part in walk_objects(config)):
        return "an encoder-decoder model ties further embeddings, and may scale what it ties"
    if not shared:
        return "no weight has the name of an embedding or a head"
    if len({digest(checkpoint, name) for name in shared}) > 1:
        return "config.json ties weights whose values differ"
    return None


def _find_head(checkpoint: Checkpoint, lost: Iterable[str], table: str) -> str | None:
    """Finds the name of the head's weight: the adapter's, or that of most decoders."""
    own = {n for n in lost if n.endswith(".weight") and SHARED.search(n.removesuffix(".weight"))}
    if own:
        return own.pop() if len(own) == 1 else None
    biases = [n for n, x in checkpoint.shapes.items() if x == checkpoint.entry(table).shape[:1]]
    modules = [n.removesuffix(".bias") for n in biases if n.endswith(".bias")]
    if modules:  # those of XLNet and BERT have other names, or more layers
        return (
            f"{modules[0]}.weight" if [*map(bool, map(SHARED.search, modules))] == [True] else None
        )
    names = checkpoint.config.get("architectures")
    if not (isinstance(names, list) and names and _DECODER.search(str(names[0]))):
        return None
    last = "embed_out" if table.endswith(".embed_in.weight") else "lm_head"
    outer = "language_model." * table.startswith("language_model.model.")
    return f"{outer}{last}.weight"


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """Says in a configuration, and in those of its submodels, that the head is not tied."""
    found = copy.deepcopy(dict(config))
    for part in walk_objects(found):
        if part is found or TIE in part or part is found.get("text_config"):
            part[TIE] = False
    return found
