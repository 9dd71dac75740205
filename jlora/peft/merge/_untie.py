"""Gives the output head of a tied checkpoint a weight of its own."""

import re
from collections.abc import Iterable, Mapping
from typing import Any

from ..._errors import Problem
from .._checkpoint import Checkpoint
from .._problems import Problems
from .._vocabulary import copy_config, walk_objects
from ..adapter._sorted import SHARED, Parameters
from ._target import Target
from ._ties import digest, is_shared

_DECODER = re.compile(r"CausalLM|LMHeadModel|ForConditionalGeneration")
# The backbones beside which the head is `lm_head`; `outer` is the model that has both, in a larger
# one. Those of BERT and its kin have embeddings of several kinds, and other heads.
_BACKBONE = re.compile(
    r"((?P<outer>.+\.)?model|transformer|gpt_neox)\.(?!(.+\.)?embeddings\.)|backbone\.embeddings\."
)
# An embedding that an encoder and a decoder share, each of which has one of its own.
_SHARED = re.compile(r"(?P<model>.+)\.(?P<table>shared|word_embeddings)\.weight")
_NEITHER = "Train the adapter without embedding and head, or use it unmerged."
_REMEDY = "Save the base untied in `transformers`."
TIE = "tie_word_embeddings"


def untie(target: Target, found: Parameters, problems: Problems) -> tuple[Target, Parameters]:
    """Stores the shared weight of embedding and head twice, if the checkpoint is tied.

    What is no longer tied with them then is stored too: the bias of the head of BERT and its kin,
    and the embeddings of an encoder and a decoder. Rows that are replaced in the embedding are
    replaced in the head too, as PEFT does it.
    """
    checkpoint, model = target
    if not checkpoint.vocabulary:
        return target, found
    shared = [name for name in checkpoint.where if is_shared(checkpoint, name)]
    prefix = model.prefix or ""
    stacks = _find_stacks(target, shared)
    if problem := _find_refusal(target, found, shared, stacks):
        problems.stop(problem)
    table, *stored = (name for name in shared if prefix + name not in stacks)
    # The new tensors by the adapter's names: each with its own, and that of the one it is tied to.
    new = {n: (n, x) for n, x in stacks.items() if n.removeprefix(prefix) not in checkpoint.where}
    heads = {(prefix + n).removesuffix(".weight"): prefix + n for n in (table, *stored)}
    tokens = found.tokens
    if not stored:
        if (head := _find_head(target, found, table, bool(stacks))) is None:
            problems.stop(_explain_unknown(checkpoint.config))
            return target, found
        module, weight = head
        heads = {module: weight}
        new[f"{module}.weight"] = (weight, table)
        rows = (x for n, x in tokens.items() if n in model and model.tensor(n) == table)
        tokens = {f"{module}.weight": x._replace(module=module) for x in rows} | tokens
    biases = _find_biases(target, found, heads)
    outer = {name: name.removesuffix(".decoder.bias") + ".bias" for name in biases}
    full = {n: found.full[x] for n, x in outer.items() if x in found.full} | found.full
    new |= biases
    infos = {n: checkpoint.entry(x)._replace(key=key) for n, (key, x) in new.items()}
    origins = {n: x for n, (_, x) in new.items()}
    config = _untied(checkpoint.config)
    target = target.add(infos, config, origins) if new else target.resize({}, config)
    return target, found._replace(full=full, tokens=tokens)


def _find_stacks(target: Target, shared: list[str]) -> dict[str, str]:
    """Finds the embeddings of encoder and decoder that are tied to another, which is given."""
    names = [(target.model.prefix or "") + name for name in target.checkpoint.where]
    found = dict[str, str]()
    for name in shared:
        if tie := _SHARED.fullmatch((target.model.prefix or "") + name):
            table = tie["table"].replace("shared", "embed_tokens")
            for home in (f"{tie['model']}.encoder.", f"{tie['model']}.decoder."):
                if any(n.startswith(home) for n in names):
                    found[f"{home}{table}.weight"] = name
    return found


def _find_refusal(
    target: Target, found: Parameters, shared: list[str], stacks: Mapping[str, str]
) -> Problem | None:
    """Explains why a head cannot be untied, and what to do instead, if it cannot."""
    checkpoint, model = target
    parts = list(walk_objects(checkpoint.config))
    if any(part.get("is_encoder_decoder") is True for part in parts):
        if any(name.endswith("relative_attention_bias.weight") for name in checkpoint.where):
            why = (
                "T5 and its kin scale the outputs of a tied head, and most versions of "
                "`transformers` those of no other"
            )
            return Problem("`untie`", why, _NEITHER)
        if not stacks and not any(_is_of_sounds(checkpoint, name) for name in shared):
            why = "the names of all weights that this encoder-decoder model ties are not known"
            return Problem("`untie`", why, _NEITHER)
    if not shared:
        return Problem("`untie`", "no weight has the name of an embedding or a head", _REMEDY)
    # Where no file says so, weights that differ are not tied.
    is_said = stacks or any(part.get(TIE) is True for part in parts)
    if is_said and len({digest(checkpoint, name) for name in shared}) > 1:
        why = "config.json ties weights whose values differ"
        return Problem("`untie`", why, f"Correct {TIE} there.")
    changed = _list_changed(found)
    if changed & stacks.keys() or {model.tensor(n) for n in changed} & {*stacks.values()}:
        why = "the adapter changes the embedding of an encoder and a decoder, which may use copies"
        return Problem("`untie`", why, "Train it on the head alone, or use it unmerged.")
    return None


def _list_changed(found: Parameters) -> set[str]:
    """Lists the parameters that an adapter changes, but for the biases to which it adds."""
    return {*(x.name for x in found.parts), *found.full, *found.tokens}


def _is_of_sounds(checkpoint: Checkpoint, name: str) -> bool:
    """Whether an embedding is of a decoder, and its encoder has a convolution, and no tokens."""
    model, of_decoder, _ = name.rpartition("decoder.")
    return bool(of_decoder) and any(
        n.startswith(model + "encoder.") and len(shape) > 2
        for n, shape in checkpoint.shapes.items()
    )


def _find_head(
    target: Target, found: Parameters, table: str, is_stacked: bool
) -> tuple[str, str] | None:
    """Finds the module of the head in the adapter, and its weight in the checkpoint.

    It is the one in the adapter, the one of a stored bias, or that of most decoders. None if
    nothing tells it.
    """
    checkpoint, prefix = target.checkpoint, target.model.prefix
    shapes = checkpoint.shapes
    names = checkpoint.config.get("architectures")
    if prefix is None or not (isinstance(names, list) and names):
        return None
    backbone = _BACKBONE.match(prefix + table)
    outer = (backbone["outer"] or "") if backbone else ""
    lost = _list_changed(found) - target.model.keys()
    modules = {n.removesuffix(".weight") for n in lost if n.endswith(".weight")}
    modules = set(filter(SHARED.search, modules)) or {
        _find_output(n.removesuffix(".bias"), shapes).removeprefix(outer)
        for n, shape in shapes.items()
        if n.endswith(".bias") and shape == shapes[table][:1]
    }
    # Decoders that look at an encoder have heads of many names.
    is_plain = backbone and _DECODER.search(str(names[0]))
    is_plain = is_plain and (is_stacked or not any(".encoder_attn." in n for n in shapes))
    last = "embed_out" if table.endswith(".embed_in.weight") else "lm_head"
    [module, *others] = modules or {last if is_plain else ""}
    home = module if module.startswith(outer) else outer + module
    others += [n for n in shapes if n.startswith(f"{home}.") and n != f"{home}.bias"]
    # LUKE has a second one, of entities, with an embedding of its own.
    own = home.removesuffix(".decoder") + ".bias"
    others += [n for n in shapes if n.endswith("predictions.bias") and n != own]
    # A head is beside a backbone, which has a name.
    is_beside = (prefix + table).count(".") > 1 and home + ".weight" != table
    is_known = is_beside and SHARED.search(module) and not others
    return (module, f"{home}.weight") if is_known else None


def _find_output(module: str, names: Iterable[str]) -> str:
    """Finds the layer that a bias is for: of a head of several layers, the last is `decoder`."""
    inside = [n for n in names if n.startswith(module + ".") and n != module + ".bias"]
    return f"{module}.decoder" if inside else module


def _find_biases(
    target: Target, found: Parameters, heads: Mapping[str, str]
) -> dict[str, tuple[str, str]]:
    """Finds the biases of heads that BERT and its kin store in the module around the head."""
    prefix = target.model.prefix or ""
    names = target.checkpoint.where
    new = {}
    for module, weight in heads.items():
        bias = weight.removesuffix("weight") + "bias"
        outer = bias.removesuffix(".decoder.bias").removeprefix(prefix) + ".bias"
        is_there = bias.removeprefix(prefix) in names or f"{module}.bias" in found.biases
        if bias.endswith(".decoder.bias") and outer in names and not is_there:
            new[f"{module}.bias"] = bias, outer
    return new


def _explain_unknown(config: Mapping[str, Any]) -> Problem:
    """Explains that a head is not found, and what to do."""
    if len({part.get(TIE) for part in walk_objects(config)} - {None}) > 1:
        why = f"parts of config.json differ in {TIE}"
        return Problem("`untie`", why, "Give all of them that of training.")
    return Problem("`untie`", "the name of the head is not known", _REMEDY)


def _untied(config: Mapping[str, Any]) -> dict[str, Any]:
    """Says in a configuration, and in those of its submodels, that the head is not tied."""
    found = copy_config(config)
    for part in walk_objects(found):
        if part is found or TIE in part or part is found.get("text_config"):
            part[TIE] = False
    return found
