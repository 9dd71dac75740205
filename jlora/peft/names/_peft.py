"""What PEFT does with the modules of `transformers`: its own answers, as it was asked."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple


class ModuleRules(NamedTuple):
    """What PEFT does with the modules of a model, by their last names.

    Attributes:
        refused: those of linear modules that it refuses.
        modules: those that it takes for the router and the experts of `transformers` 4. If
            `target_modules` names others, such as shared experts or dense layers, PEFT drops them.
        parameters: what it adapts in place of these modules.
    """

    refused: tuple[str, ...] = ()
    modules: tuple[str, ...] = ()
    parameters: tuple[str, ...] = ()


class Constants(NamedTuple):
    """What PEFT has by name.

    Attributes:
        fields: those of `adapter_config.json`, with their defaults.
        heads: the heads that it lists for every classifier, whatever its head is called.
        tables: the modules whose weights it saves too if their names are targeted.
    """

    fields: dict[str, Any]
    heads: tuple[str, ...]
    tables: tuple[str, ...]


def load_constants() -> Constants:
    """Loads PEFT's constants."""
    found = _load()
    return Constants(found["fields"], tuple(found["heads"]), tuple(found["tables"]))


@functools.cache
def load_module_rules() -> Mapping[str, ModuleRules]:
    """Loads the answers by `model_type`, which `tests/tools/ask_peft.py` collected."""
    found = _load()["models"]
    return {
        kind: ModuleRules(**{k: tuple(x) for k, x in own.items()}) for kind, own in found.items()
    }


@functools.cache
def _load() -> Mapping[str, Any]:
    return json.loads(Path(__file__).with_name("peft.json").read_text())
