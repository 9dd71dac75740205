"""Gives the output head of a tied checkpoint a weight of its own."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from .._checkpoint import Checkpoint
from .._problems import Problems
from .._vocabulary import copy_config, walk_objects
from ..adapter._contents import SHARED, Contents
from ._target import Target
from ._ties import digest, is_shared

_DECODER = re.compile(r"CausalLM|LMHeadModel|ForConditionalGeneration")
# The backbones beside which the head is `lm_head`; `outer` is the model that has both, in a larger
# one. Those of BERT and its kin have embeddings of several kinds, and other heads.
_BACKBONE = re.compile(r"((?P<outer>.+\.)?model|transformer|gpt_neox)\.(?!(.+\.)?embeddings\.)")
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
    head = _find_head(target, [n for n in names if n not in model], table)
    if head is None:
        problems.found.append(f"`untie`: the name of the head is not known; {_REMEDY}")
        return target, found
    name, tensor = head
    tokens = dict(found.tokens)
    for other, x in found.tokens.items():
        if other in model and model.tensor(other) == table:
            tokens.setdefault(name, x._replace(module=name.removesuffix(".weight")))
    new = {name: checkpoint.entry(table)._replace(key=tensor)}
    return target.add(new, config, table), found._replace(tokens=tokens)


def _explain_tied(checkpoint: Checkpoint, shared: list[str]) -> str | None:
    """Explains why a head cannot be untied, if it cannot."""
    config = checkpoint.config
    if any(part.get("is_encoder_decoder") is True for part in walk_objects(config)):
        return "an encoder-decoder model ties further embeddings, and may scale what it ties"
    if not shared:
        return "no weight has the name of an embedding or a head"
    # Where no file says so, weights that differ are not tied.
    is_said = any(part.get(TIE) is True for part in walk_objects(config))
    if is_said and len({digest(checkpoint, name) for name in shared}) > 1:
        return "config.json ties weights whose values differ"
    return None


def _find_head(target: Target, lost: Iterable[str], table: str) -> tuple[str, str] | None:
    """Finds the name of the head's weight in the adapter, and in the checkpoint.

    It is the one in the adapter, beside a stored bias, or that of most decoders. None if nothing
    tells it.
    """
    checkpoint, prefix = target.checkpoint, target.model.prefix
    shapes = checkpoint.shapes
    names = checkpoint.config.get("architectures")
    if prefix is None or not (isinstance(names, list) and names):
        return None
    backbone = _BACKBONE.match(prefix + table)
    outer = (backbone["outer"] or "") if backbone else ""
    modules = {n.removesuffix(".weight") for n in lost if n.endswith(".weight")}
    modules = set(filter(SHARED.search, modules)) or {
        n.removesuffix(".bias").removeprefix(outer)
        for n, shape in shapes.items()
        if n.endswith(".bias") and shape == shapes[table][:1]
    }
    last = "embed_out" if table.endswith(".embed_in.weight") else "lm_head"
    [module, *others] = modules or {last if backbone else ""}
    home = module if module.startswith(outer) else outer + module
    others += [n for n in shapes if n.startswith(f"{home}.") and n != f"{home}.bias"]
    # A head is beside a backbone, which has a name.
    is_beside = (prefix + table).count(".") > 1 and home + ".weight" != table
    is_plain = _DECODER.search(str(names[0])) and is_beside and SHARED.search(module)
    return (f"{module}.weight", f"{home}.weight") if is_plain and not others else None


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """Says in a configuration, and in those of its submodels, that the head is not tied."""
    found = copy_config(config)
    for part in walk_objects(found):
        if part is found or TIE in part or part is found.get("text_config"):
            part[TIE] = False
    return found
