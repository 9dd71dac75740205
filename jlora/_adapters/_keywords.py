"""Keywords of PEFT that people write in a rule, and their names here."""

import dataclasses
import functools
from typing import Any, TypeVar

T = TypeVar("T")

PEFT = {
    "r": "`rank`",
    "lora_alpha": "`alpha`",
    "lora_dropout": "`dropout`",
    "use_rslora": "`rslora`",
    "init_lora_weights": "`init`, one of jlora.initializers",
    "target_modules": "`pattern`, a regular expression for paths, such as '(query|value)/kernel'",
    "target_parameters": "`pattern`, a regular expression for paths",
    "exclude_modules": "`pattern`, of what is not excluded",
    "layers_to_transform": "`pattern`, with the layers' numbers",
    "rank_pattern": "a rule of its own, before this one",
    "alpha_pattern": "a rule of its own, before this one",
    "modules_to_save": "a rule of its own, jlora.Full(pattern)",
    "trainable_token_indices": "a rule of its own, jlora.Rows(pattern, rows)",
    "bias": "a rule of its own, jlora.Full('bias')",
    "use_dora": "jlora.DoRA in the place of LoRA",
}


def refuse_keywords_of_peft(cls: type[T]) -> type[T]:
    """Lets the `TypeError` of a dataclass for a keyword of PEFT say what to give instead."""
    init = cls.__init__
    fields = {field.name for field in dataclasses.fields(cls)}  # pyright: ignore

    @functools.wraps(init)
    def init_checked(self: Any, *args: Any, **kwargs: Any) -> None:
        if found := [name for name in kwargs if name in PEFT and name not in fields]:
            listed = "; ".join(f"`{name}` is {PEFT[name]}" for name in found)
            raise TypeError(f"{cls.__name__} does not have the keywords of PEFT: {listed}.")
        init(self, *args, **kwargs)

    cls.__init__ = init_checked
    return cls
