"""Configurations of other methods of PEFT's, in terms of LoRA's and back."""

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from .._file import CONFIG, PREFIX, brief, shown
from ._config import features, misformed
from ._parts import AB
from ._read import Part
from .others import OTHERS, Other

Fields = dict[str, Any]

# What these methods have in common with LoRA: which modules are selected, and all that is not of A
# and B.
SELECTION = ("target_modules", "exclude_modules", "layers_pattern", "layers_to_transform")
KEPT = (
    "auto_mapping",
    "base_model_name_or_path",
    "fan_in_fan_out",
    "modules_to_save",
    "revision",
    "task_type",
)


def other_of(fields: Mapping[str, Any]) -> Other | None:
    """The method of a configuration, if it is one of them."""
    name = fields.get("peft_type")
    return OTHERS.get(name) if isinstance(name, str) else None


def named(fields: Mapping[str, Any]) -> Other:
    """The method of a configuration, which must be one of them."""
    if (kind := other_of(fields)) is None:
        raise ValueError(
            f"`path`: peft_type of {CONFIG} must be one of {', '.join(OTHERS)}; got "
            f"{brief(fields.get('peft_type'))}."
        )
    return kind


def problems_of(fields: Fields, kind: Other) -> list[str]:
    """Why the configuration is none of the kind, or changes what is computed."""
    wrong = [
        f"{shown(key)}: {brief(value)} is a feature that jlora does not support"
        for key, value in features(fields).items()
        if key not in kind.fields
    ]
    for key in kind.ranks:
        wrong += [key + why.removeprefix("r") for why in misformed({"r": fields.get(key)})]
    wrong += misformed({key: x for key, x in fields.items() if key == "lora_alpha"})
    return wrong or misformed(kind.scales(fields))


def in_terms_of_lora(fields: Fields, kind: Other) -> Fields:
    """The fields that LoRA has too, by its names."""
    found = {key: fields[key] for key in (*SELECTION, *KEPT) if key in fields}
    found |= {"lora_dropout": fields[kind.dropout]} if kind.dropout in fields else {}
    bias = fields.get("bias", "none")
    return found | {"bias": "lora_only" if bias == kind.bias else bias}


def asked_for(config: Fields) -> Other | None:
    """The method, other than LoRA, that a configuration to write is of, checked."""
    if (kind := other_of(config)) is None:
        return None
    if kind.back is None:
        wrong = [f"peft_type: {config['peft_type']} is read and not written"]
    else:
        wrong = problems_of(kind.back.defaults | config, kind)
    if wrong:
        raise ValueError("`config` cannot be written:\n  " + "\n  ".join(wrong))
    return kind


def written(
    kind: Other,
    config: Fields,
    fields: Fields,
    parts: Sequence[Part],
    tensors: Mapping[str, np.ndarray],
) -> tuple[Fields, dict[str, np.ndarray]]:
    """An adapter of LoRA, its `fields`, `parts` and `tensors`, as one of the kind.

    `config` is what the user gave of the kind's own fields.
    """
    assert kind.back is not None
    wrong = [f"{x.key}: of kind {x.kind}, not linear" for x in parts if x.kind != "linear"]
    wrong += [f"{x.key}: is of DoRA" for x in parts if x.m is not None]
    if fields["trainable_token_indices"] is not None:
        wrong.append("trainable_token_indices: rows of an embedding, which only LoRA has beside it")
    if fields["fan_in_fan_out"]:
        wrong.append("fan_in_fan_out: true, of weights that are stored as (inputs, outputs)")
    if wrong:
        raise _refusal(config, wrong)
    pairs = {
        x.name.removesuffix(".weight"): (x.a, x.b * np.asarray(x.scale, x.b.dtype)) for x in parts
    }
    made = kind.back.make(pairs)
    if isinstance(made, list):
        raise _refusal(config, made)
    own, blocks = made
    kept = {key: fields[key] for key in (*SELECTION, *KEPT) if key in kind.back.defaults}
    kept["bias"] = kind.bias if fields["bias"] == "lora_only" else fields["bias"]
    kept[kind.dropout] = fields["lora_dropout"]
    given = {key: x for key, x in config.items() if key not in kept}
    new = {**kind.back.defaults, **given, **kept, **own}
    for module, (a, _) in pairs.items():  # what is to be written must be read as the same
        shapes = {end: blocks[f"{module}.{end}"].shape for end in kind.tensors}
        if isinstance(why := kind.form(new, shapes, a.shape[1]), str):
            raise _refusal(config, [f"{module}: {why}"])
    ours = {f"{PREFIX}{module}{end}" for module in pairs for end in AB}
    rest = {key: x for key, x in tensors.items() if key not in ours}
    return new, {f"{PREFIX}{key}": x for key, x in blocks.items()} | rest


def _refusal(config: Fields, wrong: Sequence[str]) -> ValueError:
    return ValueError(
        f"`adapter` cannot be written as {config['peft_type']}, which `config` asks for:\n  "
        + "\n  ".join(wrong)
        + "\nWithout that peft_type it is written as LoRA."
    )
