"""Asks each class of `transformers` what it ties, and which of its weights are transposed.

Models are made without memory. What is tied is read from the model: parameters that are one. A
class is asked for each `model_type` that is mapped to it, with each `tie_word_embeddings` of its
configuration set alone. Needs `transformers` 5 and PyTorch.
"""

import collections
import contextlib
import json
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import torch
import transformers
from tiny_models import Pair, list_pairs, make_config
from transformers.models.auto import configuration_auto, modeling_auto

TIE = "tie_word_embeddings"
Ties = dict[str, str]  # each parameter that is another one's


class UnclearError(Exception):
    """Ties do not follow from single fields of the configuration."""


def list_parts(fields: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, str]]:
    """Yields the paths of configurations in one, and their `model_type`."""
    yield path, str(fields.get("model_type"))
    for key, x in fields.items():
        if isinstance(x, dict) and "model_type" in x:
            yield from list_parts(x, f"{path}.{key}".lstrip("."))


def with_ties(fields: Mapping[str, Any], said: Mapping[str, bool], path: str = "") -> Any:
    """Returns fields that say at each path whether embeddings are tied; at others, nothing."""
    found = {key: x for key, x in fields.items() if key != TIE}
    for key, x in fields.items():
        if isinstance(x, dict) and "model_type" in x:
            found[key] = with_ties(x, said, f"{path}.{key}".lstrip("."))
    return found | ({TIE: said[path]} if path in said else {})


def find_ties(model: Any) -> Ties:
    """Finds the parameters that are others under another name; the declared one is the first."""
    declared = model.get_expanded_tied_weights_keys(all_submodels=True)
    names = collections.defaultdict[int, list[str]](list)
    for name, x in model.named_parameters(remove_duplicate=False):
        names[id(x)].append(name)
    found = Ties()
    for own in names.values():
        [first, *_] = [name for name in own if name not in declared] or own
        found |= {name: first for name in own if name != first}
    return found


def find_tables(model: Any) -> dict[str, str]:
    """Finds the embedding of tokens and the head."""
    names = {id(x): name for name, x in reversed([*model.named_modules()])}
    found = {"table": "get_input_embeddings", "head": "get_output_embeddings"}
    for key, method in list(found.items()):
        try:
            module = getattr(model, method)()
        except Exception:  # it has none
            module = None
        is_matrix = getattr(getattr(module, "weight", None), "ndim", 0) == 2
        found[key] = names.get(id(module), "") if is_matrix else ""
    is_embedding = found["table"] and hasattr(model.get_input_embeddings(), "num_embeddings")
    return found if is_embedding else {"table": "", "head": ""}


def find_transposed(model: Any) -> dict[str, list[str]]:
    """Finds the last names of modules whose weights are (inputs, outputs)."""
    modules = [*model.named_modules()]
    conv = {name for name, x in modules if type(x).__name__ == "Conv1D"}
    experts = {name for name, x in modules if getattr(x, "is_transposed", False) is True}
    last = lambda found: sorted({name.rpartition(".")[2] for name in found})  # noqa: E731
    return {"conv1d": last(conv), "experts": last(experts)}


def ask(pair: Pair) -> dict[str, Any]:
    """Asks a pair; raises if no tiny model of it is made, or what it ties is unclear."""
    problems = list[Exception]()
    for way in range(4):
        try:
            config = make_config(pair.config_class, way, None, {}, False)
            with torch.device("meta"):
                pair.cls(config)
        except Exception as e:
            problems.append(e)
            continue
        return _ask(pair.cls, config)
    raise problems[0]


def _ask(cls: Any, config: Any) -> dict[str, Any]:
    fields = config.to_dict()
    parts = dict(list_parts(fields))

    def make(said: Mapping[str, bool]) -> Any:
        own = type(config).from_dict(with_ties(fields, said))
        with torch.device("meta"):
            return cls(own)

    silent = make({})
    usual = {path: bool(getattr(_get(silent.config, path), TIE, False)) for path in parts}
    none = dict.fromkeys(parts, False)
    always = find_ties(make(none))
    asked = {}
    for path in parts:
        try:
            found = find_ties(make(none | {path: True}))
        except Exception:  # it refuses to tie
            found = always
        if own := {name: x for name, x in found.items() if always.get(name) != x}:
            asked[path] = own

    def _declare(path: str) -> set[str]:
        """Returns what the class itself ties, and no submodel."""
        own = make(none | {path: True})
        return {*own.get_expanded_tied_weights_keys(all_submodels=False)}

    def expect(said: Mapping[str, bool]) -> Ties:
        return always | {n: x for p, own in asked.items() if said[p] for n, x in own.items()}

    each = [x for pair in (always, *asked.values()) for item in pair.items() for x in item]
    if any(re.search(r"\.\d", x) for x in each):
        raise UnclearError("ties by numbers, of which the configuration has more")
    for said in ({}, *({path: True} for path in asked), *({path: False} for path in asked)):
        if find_ties(make(said)) != expect(usual | said):
            raise UnclearError(said)
    inside = {p: parts[p] for p, own in asked.items() if p and not own.keys() <= _declare(p)}
    default = {path: usual[path] for path in asked}
    ties = {"always": always, "asked": asked, "default": default, "inside": inside}
    tables = find_tables(silent)
    prefix = silent.base_model_prefix
    prefix = prefix if prefix and hasattr(silent, prefix) else ""
    return ties | tables | find_transposed(silent) | {"prefix": prefix}


def _get(config: Any, path: str) -> Any:
    for key in filter(None, path.split(".")):
        config = getattr(config, key, None)
    return config


def declare() -> dict[str, Any]:
    """Makes the part of the file that is about ties and orientation."""
    asked = ask_all()
    transposed = collections.defaultdict[str, set[str]](set)
    for name, own in asked.items():
        for key in ("conv1d", "experts"):
            transposed[name.partition("/")[0]].update((own or {}).pop(key, ()))
    return {
        "declared": gather(asked),
        "transposed": {kind: sorted(x) for kind, x in sorted(transposed.items())},
        "tables": list_tables([x for x in asked.values() if x]),
        "tying": list_tying(),
        "tasks": list_tasks(),
        "labels": list_labels(),
    }


def ask_all() -> dict[str, Any]:
    """Asks all pairs; None where ties are unclear. Those that cannot be made are left out."""
    found = dict[str, Any]()
    for pair in list_pairs():
        name = f"{pair.kind}/{pair.cls.__name__}"
        try:
            found[name] = ask(pair)
        except UnclearError:
            found[name] = None
        except Exception as e:
            sys.stderr.write(f"{name}: {type(e).__name__} {str(e)[:99]!r}\n")
    return found


def list_tables(answers: Iterable[Mapping[str, Any]]) -> list[str]:
    """Lists how names of embeddings end, and of heads that are tied to them.

    One word is enough for an embedding, but for a letter, and for a head that several classes have.
    """
    found, heads = set[str](), collections.Counter[str]()
    for own in answers:
        ties = [own["always"], *own["asked"].values()]
        words = own["table"].split(".")
        if len(words[-1]) > 1 or len(words) > 1:
            found.add(words[-1] if len(words[-1]) > 1 else ".".join(words[-2:]))
        if any(f"{own['head']}.weight" in x for x in ties):
            heads[".".join(own["head"].split(".")[-2:])] += 1
    return sorted(found | {x for x, n in heads.items() if n > 1 or "." in x})


def list_tying() -> list[str]:
    """Lists the kinds of configurations that tie embeddings by default."""
    found = list[str]()
    for kind, name in configuration_auto.CONFIG_MAPPING_NAMES.items():
        with contextlib.suppress(Exception):
            if getattr(getattr(transformers, name)(), TIE, False) is True:
                found.append(kind)
    return sorted(found)


TASKS = {  # of PEFT
    "SEQ_CLS": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "TOKEN_CLS": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "QUESTION_ANS": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}


def list_tasks() -> dict[str, dict[str, str]]:
    """Lists the class of each `model_type` for PEFT's tasks."""
    return {
        task: {kind: x if isinstance(x, str) else x[0] for kind, x in sorted(classes.items())}
        for task, classes in TASKS.items()
    }


def list_labels() -> dict[str, str | None]:
    """Lists the weight with a row for each label, by class; None where that is not known.

    A class that is not listed has no labels.
    """
    answers = collections.defaultdict[str, set[str | None]](set)
    for pair in list_pairs():
        answers[pair.cls.__name__].add(find_labels(pair))
    known = {name: (x - {None}) or {None} for name, x in sorted(answers.items())}
    one = {name: x.pop() if len(x) == 1 else None for name, x in known.items()}
    return {name: x for name, x in one.items() if x != ""}


def find_labels(pair: Pair) -> str | None:
    """Finds the weight of tiny models that has as many rows as there are labels; "" if none has."""
    for way in range(4):
        with contextlib.suppress(Exception):
            list_labeled(pair, way, 2)
            try:
                one, two = (list_labeled(pair, way, count) for count in (17, 19))
            except ValueError:  # it always has two
                return ""
            return None if len(one & two) > 1 else next(iter(one & two), "")
    return None


def list_labeled(pair: Pair, way: int, count: int) -> set[str]:
    """Lists the weights of a tiny model with so many labels that have as many rows."""
    config = make_config(pair.config_class, way, None, {"num_labels": count}, False)
    with torch.device("meta"):
        model = pair.cls(config)
    return {name for name, x in model.named_parameters() if x.ndim > 1 and x.shape[0] == count}


def gather(asked: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Gathers the classes by their answers; a class with several has its `model_type` too."""
    texts = {name: json.dumps(own, sort_keys=True) for name, own in asked.items()}
    each = collections.defaultdict[str, set[str]](set)
    for name, text in texts.items():
        each[name.partition("/")[2]].add(text)
    classes = collections.defaultdict[str, set[str]](set)
    for name, text in texts.items():
        last = name.partition("/")[2]
        classes[text].add(last if len(each[last]) == 1 else name)
    found = [
        {key: x for key, x in (json.loads(text) or {"unclear": True}).items() if x}
        | {"classes": sorted(names)}
        for text, names in classes.items()
    ]
    return sorted(found, key=lambda x: x["classes"])
