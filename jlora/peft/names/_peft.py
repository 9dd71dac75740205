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


@functools.cache
def load_module_rules() -> Mapping[str, ModuleRules]:
    """Loads the answers by `model_type`, which `tests/tools/ask_peft.py` collected."""
    found = load_answers()["models"]
    return {
        kind: ModuleRules(**{k: tuple(x) for k, x in own.items()}) for kind, own in found.items()
    }


@functools.cache
def load_answers() -> Mapping[str, Any]:
    """Loads all of them, by what they are about.

    Besides `models`, these are `fields` of `adapter_config.json`, with their defaults; the `heads`
    that PEFT lists for every classifier, whatever its head is called; and `tables`, the modules
    whose weights it saves too if their names are targeted.
    """
    return json.loads(Path(__file__).with_name("peft.json").read_text())
