"""The methods that PEFT's files hold, a record each: what a file has of them besides A and B."""

import dataclasses
from collections.abc import Mapping
from typing import Any

from ..._adapters import Decomposed, LowRank

Factored = LowRank | Decomposed
FACTORED = (LowRank, Decomposed)


@dataclasses.dataclass(frozen=True)
class Method:
    """A method.

    Attributes:
        name: its name.
        flag: the field of the configuration that chooses it; empty for the usual method.
        keys: the end of the key of its further tensor, if it has one.
        ignored: fields of the configuration that jlora does not apply.
    """

    name: str
    flag: str = ""
    keys: tuple[str, ...] = ()
    ignored: tuple[str, ...] = ()


LORA = Method("LoRA")
DORA = Method("DoRA", "use_dora", (".lora_magnitude_vector",), ("lora_dropout",))
FURTHER = {DORA.flag: DORA}  # by their flags
BY_TENSORS = {False: LORA, True: DORA}  # by whether A and B have a further tensor
ENDS = {end: method for method in FURTHER.values() for end in method.keys}


def method_of(fields: Mapping[str, Any]) -> Method:
    """Returns the method that a configuration chooses."""
    return next((method for flag, method in FURTHER.items() if fields.get(flag)), LORA)
