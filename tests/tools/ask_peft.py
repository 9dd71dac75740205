"""Asks PEFT what it does with the modules of each model of `transformers`, by adapting them.

    python tests/tools/ask_peft.py

Needs `transformers` 5, PEFT and PyTorch.
"""

import copy
import json
import pathlib
import re
import sys
from collections.abc import Collection, Iterable
from typing import Any

import peft
import transformers
from peft.utils import constants
from tiny_models import list_classes, make_model

import jlora
from jlora.peft.places._find import load_table
from jlora.torch._peft_rules import is_adaptable

FILE = pathlib.Path(jlora.__file__).parent / "peft" / "names" / "peft.json"
# The names that modules of one expert have in stored tensors.
EXPERTS = set(re.findall(r'experts\.\{\}\.(\w+)\.weight"', json.dumps(load_table()["models"])))


def ask(model: Any) -> dict[str, list[str]]:
    """Finds the last names of modules that PEFT refuses, or takes for parts of experts."""
    names = {True: set[str](), False: set[str]()}
    for name, module in model.named_modules():
        names[is_adaptable(module)].add(name.rpartition(".")[2])
    known = names[True] - names[False]
    refused = set[str]()
    if known and adapt(model, known) is None:
        refused = {name for name in known if adapt(model, {name}) is None}
    found = {"refused": refused}
    asked = known - refused | EXPERTS
    if (config := adapt(model, asked)) and config.target_parameters:
        found |= {"modules": asked - config.target_modules, "parameters": config.target_parameters}
        for name in names[False] - {""}:  # such as routers
            config = adapt(model, {name, *asked})
            if config and name not in config.target_modules:
                found["modules"] |= {name}
                found["parameters"] |= config.target_parameters
    return {key: sorted(x) for key, x in found.items() if x}


def adapt(model: Any, names: Collection[str]) -> Any:
    """Adapts the modules with these last names; None if PEFT refuses one of them."""
    config = peft.LoraConfig(target_modules=[*names], r=2)
    try:
        peft.get_peft_model(copy.deepcopy(model), config)
    except (ValueError, TypeError):  # the latter for layers that need arguments of their own
        return None
    return config


def ask_all(classes: Iterable[Any]) -> dict[str, dict[str, list[str]]]:
    """Asks about a class of each `model_type`; those that cannot be made are left out."""
    found = dict[str, dict[str, list[str]]]()
    for cls in classes:
        kind = getattr(cls.config_class, "model_type", "")
        if kind in found:
            continue
        try:
            model = make_model(cls, {"first_k_dense_replace": 0})  # all layers with experts
            found[kind] = ask(model)
        except Exception as e:
            sys.stderr.write(f"{cls.__name__}: {type(e).__name__} {str(e)[:99]!r}\n")
    return {kind: x for kind, x in sorted(found.items()) if x}


def ask_constants() -> dict[str, Any]:
    """Returns the fields of PEFT's configuration as it saves them, and the names that it knows."""
    fields = peft.LoraConfig(inference_mode=True, target_modules=[]).to_dict()
    fields = {key: sorted(x) if isinstance(x, set) else x for key, x in sorted(fields.items())}
    names = {"heads": constants.SEQ_CLS_HEAD_NAMES, "tables": constants.EMBEDDING_LAYER_NAMES}
    return {"fields": fields, **{key: sorted(x) for key, x in names.items()}}


if __name__ == "__main__":
    transformers.logging.set_verbosity_error()
    versions = {"peft": peft.__version__, "transformers": transformers.__version__}
    found = versions | ask_constants() | {"models": ask_all(list_classes())}
    FILE.write_text(json.dumps(found, indent=1) + "\n")
