"""Tells which embeddings a model may read twice: as its output head too.

No file says it. A model without a head may have a configuration with `tie_word_embeddings`, and
where that is missing, the class has a default. What the files do not exclude may be.
"""

import json
import re
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

TIE = "tie_word_embeddings"
Shapes = Mapping[str, tuple[int, ...]]

# Names of embeddings, and of heads, that may share one weight.
_EMBEDDINGS = re.compile(
    r"(^|[._])(embed_tokens|embed_in|wte|word_embeddings?|tokens?_embed|tok_embeddings|shared"
    r"|entity_embeddings|input_embedding|input_embeds_layers?(\.\d+)?)$|(^|\.)(embeddings|transformer\.w)$"
)
_HEADS = re.compile(
    r"(^|[._])(lm_head|lm_head\.decoder|embed_out|proj_out|output_projection|generator_lm_head"
    r"|lm_loss|vocab_projector|pred_layer\.proj|output)$|(^|\.)predictions\.decoder$|^decoder$"
)
# The heads of classifiers, which have no other.
_CLASSIFIERS = re.compile(r"(classifier|score|qa_outputs|classification_head)\.")
# The embeddings of decoders whose head is beside the module that has the embedding.
_DECODER = re.compile(
    r"(?P<outer>(.+\.)?)((model|transformer|gpt_neox)\.((language_model|text_model|decoder)\.)?"
    r"(embed_tokens|wte|word_embeddings|tokens_embed|(?P<neox>embed_in))|backbone\.embeddings)"
)


def copy_config(config: Mapping[str, Any]) -> dict[str, Any]:
    """Copies a configuration with all that is in it, however deeply it is nested."""
    return json.loads(json.dumps(config))


def walk_objects(config: Mapping[str, Any]) -> Iterator[Any]:
    """Yields a configuration and all objects in it, such as those of submodels."""
    left: list[Any] = [config]
    while left:
        part = left.pop()
        yield part
        left += [value for value in part.values() if isinstance(value, dict)]


def is_embedding(module: str) -> bool:
    """Whether a module is an input embedding, by its name."""
    return bool(_EMBEDDINGS.search(module))


def is_head(module: str) -> bool:
    """Whether a module is an output head, by its name."""
    return bool(_HEADS.search(module))


def is_table(module: str) -> bool:
    """Whether a module is an input embedding or an output head, by its name."""
    return is_embedding(module) or is_head(module)


def find_sizes(config: Mapping[str, Any], shapes: Shapes) -> set[int]:
    """Finds the possible sizes of a vocabulary."""
    rows = {shape[0] for shape in shapes.values() if len(shape) == 2}
    named = (item for part in walk_objects(config) for item in part.items())
    sizes = {n for key, n in named if key.endswith("vocab_size") and isinstance(n, int)}
    return sizes & rows or {max(rows, default=0)}


def list_tables(config: Mapping[str, Any], shapes: Shapes) -> list[str]:
    """Lists the modules that are heads, with a row for each token, or embeddings, with as many."""
    sizes = find_sizes(config, shapes)
    least = min(sizes)
    rows = {n: x[0] for n, x in shapes.items() if len(x) == 2 and n.endswith(".weight")}
    each = ((name.removesuffix(".weight"), n) for name, n in rows.items() if n >= least)
    return [x for x, n in each if is_embedding(x) or (n in sizes and is_head(x))]


def is_untied(config: Mapping[str, Any]) -> bool:
    """Whether the configurations of a model and of all its submodels say that nothing is tied.

    A model for CTC hears, and has no embedding that its head could be.
    """
    parts = (x for x in walk_objects(config) if x is config or "model_type" in x)
    is_ctc = "ForCTC'" in str(config.get("architectures"))
    return is_ctc or all(part.get(TIE) is False for part in parts)


def is_encoder_decoder(config: Mapping[str, Any]) -> bool:
    """Whether a model, or one of its submodels, has an encoder and a decoder."""
    return any(part.get("is_encoder_decoder") is True for part in walk_objects(config))


def is_of_two(module: str, has_encoder: bool) -> bool:
    """Whether an encoder and a decoder read an embedding: it is in neither, or called so."""
    is_inside = re.search(r"(^|[._])(encoder|decoder)\.", module)
    is_shared = re.search(r"(^|[._])shared$", module)
    return bool(is_shared or (has_encoder and not is_inside))


def make_may_be_head(names: Collection[str], config: Mapping[str, Any]) -> Callable[[str], bool]:
    """Makes a predicate: whether a model may read an embedding as its output head too.

    It does not if its layers are beside the embedding, with no module around both, or if it is a
    classifier.

    Args:
        names: the names of all parameters, without one of such a head.
        config: the configuration.
    """
    split = (name.split(".") for name in names)
    homes = {parts[0] for parts in split if any(map(str.isdecimal, parts))}  # of layers
    is_classifier = any(map(_CLASSIFIERS.match, names))
    has_encoder = is_encoder_decoder(config)

    def may_be_head(module: str) -> bool:
        is_inside = module.partition(".")[0] in homes and not is_classifier
        return is_inside or has_encoder or is_of_two(module, has_encoder)

    return may_be_head


def find_pair(shapes: Shapes, config: Mapping[str, Any]) -> tuple[str, str] | None:
    """Finds the embedding of a plain decoder, and the head that it shares, stored or not.

    None if the model may be another: with a second table or an encoder, with several layers in the
    head, or with a bias of the logits elsewhere.
    """
    tables = list_tables(config, shapes)
    name = next(filter(None, map(_DECODER.fullmatch, tables)), None)
    if name is None or is_encoder_decoder(config):
        return None
    table = name[0]
    head = name["outer"] + ("embed_out" if name["neox"] else "lm_head")
    n = shapes[f"{table}.weight"][0]
    if n not in find_sizes(config, shapes):
        return None
    others = {x for x, shape in shapes.items() if shape in ((n,), (1, n))}
    others |= {x for x in shapes if x.startswith(f"{head}.") or ".encoder_attn." in x}
    is_plain = {*tables} <= {table, head} and others <= {f"{head}.weight", f"{head}.bias"}
    return (table, head) if is_plain else None


def find_tied_head(shapes: Shapes, config: Mapping[str, Any]) -> str | None:
    """Returns the name of the head that an embedding may be too, as no head is stored; or None."""
    tables = list_tables(config, shapes)
    is_apart = is_untied(config) or any(map(is_head, tables))
    may_be_head = make_may_be_head(shapes, config)
    return "lm_head" if not is_apart and any(map(may_be_head, tables)) else None
