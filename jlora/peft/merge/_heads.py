"""Adds the head of an adapter to a base that has none."""

import re
from collections.abc import Mapping
from typing import Any

from .._vocabulary import copy_config, is_table
from ..adapter._parts import Headers
from ..adapter._roles import make_saves
from ..adapter._sorted import Adapter
from ._target import Target

# PEFT's tasks, and how `transformers` calls the classes of models for them.
_TASKS = {
    "SEQ_CLS": "ForSequenceClassification",
    "TOKEN_CLS": "ForTokenClassification",
    "QUESTION_ANS": "ForQuestionAnswering",
}
_CLASS = re.compile(r"(?P<stem>[A-Z]\w{0,99}?)(?:For[A-Z]\w{0,99}|(?:With)?LMHeadModel|Model)")
_HAS_LABELS = re.compile(r"Classification|Segmentation")
_LABELS, _MOST = 2, 100_000  # labels where a configuration does not say how many, and at most


def add_head(target: Target, found: Headers, adapter: Adapter) -> Target:
    """Adds what `modules_to_save` has and the checkpoint lacks.

    The configuration gets the class of the model with that head, and its labels. Nothing is added
    if the adapter does not tell the class, or the checkpoint's names are not known.
    """
    checkpoint, model = target
    saves = make_saves(adapter.fields)
    # What is missing inside of the model may only have another name there.
    inside = {name.partition(".")[0] for name in model}
    lost = {n: x for n, x in found.full.items() if n.partition(".")[0] not in inside}
    modules = {name: name.rpartition(".")[0] for name in lost}
    new = {n: x for n, x in lost.items() if saves(modules[n]) and not is_table(modules[n])}
    if not new or model.prefix is None:
        return target
    labels = _count_labels({name: x.shape for name, x in new.items()})
    config = _with_head(checkpoint.config, adapter.fields, labels)
    if config is None:
        return target
    new = {name: x._replace(key=name) for name, x in new.items()}
    return target.add(new, config, model.prefix)


def _with_head(
    config: Mapping[str, Any], fields: Mapping[str, Any], labels: int | None
) -> dict[str, Any] | None:
    """Returns the configuration of the model with the head; None if its class is not known."""
    if (name := _find_class(config, fields)) is None or not config:
        return None
    found = copy_config(config) | {"architectures": [name]}
    known = config.get("id2label")
    count = len(known) if isinstance(known, dict) else config.get("num_labels", _LABELS)
    if not _HAS_LABELS.search(name):
        return found
    if labels is None or labels > _MOST:
        return None
    if labels != count:
        found["id2label"] = {str(i): f"LABEL_{i}" for i in range(labels)}
        found["label2id"] = {f"LABEL_{i}": i for i in range(labels)}
        found |= {"num_labels": labels} if "num_labels" in config else {}
    return found


def _find_class(config: Mapping[str, Any], fields: Mapping[str, Any]) -> str | None:
    """Finds the class of the adapted model: PEFT writes it, or the task instead."""
    mapping, task = fields.get("auto_mapping"), fields.get("task_type")
    name = mapping.get("base_model_class") if isinstance(mapping, dict) else None
    if isinstance(name, str) and _CLASS.fullmatch(name):
        return name
    names = config.get("architectures")
    own = _CLASS.fullmatch(str(names[0])) if isinstance(names, list) and names else None
    suffix = _TASKS.get(task) if isinstance(task, str) else None
    if not (own and suffix):
        return None
    # Of a model that is also the text part of another, the names of the two are told apart.
    is_text = str(config.get("model_type")).endswith("_text") and not own["stem"].endswith("Text")
    return own["stem"] + "Text" * is_text + suffix


def _count_labels(shapes: Mapping[str, tuple[int, ...]]) -> int | None:
    """Counts the outputs of a head: those of a matrix that are the inputs of no other."""
    matrices = [shape for shape in shapes.values() if len(shape) > 1]
    inputs = {shape[1] for shape in matrices}
    outputs = {shape[0] for shape in matrices}
    last = outputs - inputs or outputs
    return last.pop() if len(last) == 1 else None
