"""What PEFT does with the modules of `transformers`: its own answers, as it was asked."""

import functools
import json
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple


class Answer(NamedTuple):
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
def load_answers() -> Mapping[str, Answer]:
    """Loads the answers by `model_type`, which `tests/tools/ask_peft.py` collected."""
    text = Path(__file__).with_name("peft.json").read_text()
    found = json.loads(text)["models"]
    return {kind: Answer(**{k: tuple(x) for k, x in own.items()}) for kind, own in found.items()}
