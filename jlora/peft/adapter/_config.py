"""`adapter_config.json`: what it selects, what of it is refused, and how it is written."""

import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from ..._rules import is_finite
from .._file import CONFIG, Source, brief, read_json, shown
from ._patterns import PLAIN, of_key, of_layer, problems_of

LIMIT = 4 * 2**20  # bytes
PARAMETERS = 100  # names of which each is looked for in every module
# All keys that PEFT 0.21 writes.
DEFAULTS: dict[str, Any] = {
    "alora_invocation_tokens": None,
    "alpha_pattern": {},
    "arrow_config": None,
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "corda_config": None,
    "ensure_weight_tying": False,
    "eva_config": None,
    "exclude_modules": None,
    "fan_in_fan_out": False,
    "inference_mode": True,
    "init_lora_weights": True,
    "kasa_config": None,
    "layer_replication": None,
    "layers_pattern": None,
    "layers_to_transform": None,
    "loftq_config": {},
    "lora_alpha": 8,
    "lora_bias": False,
    "lora_dropout": 0.0,
    "lora_ga_config": None,
    "megatron_config": None,
    "megatron_core": "megatron.core",
    "modules_to_save": None,
    "monteclora_config": None,
    "peft_type": "LORA",
    "peft_version": "0.21.2",
    "qalora_group_size": 16,
    "r": 8,
    "rank_pattern": {},
    "revision": None,
    "target_modules": [],
    "target_parameters": None,
    "task_type": None,
    "trainable_token_indices": None,
    "use_bdlora": None,
    "use_dora": False,
    "use_qalora": False,
    "use_rslora": False,
    "velora_config": None,
}
ROWS_ALONE = "TRAINABLE_TOKENS"
ROWS_DEFAULTS: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "inference_mode": True,
    "init_weights": True,
    "peft_type": ROWS_ALONE,
    "peft_version": DEFAULTS["peft_version"],
    "revision": None,
    "target_modules": [],
    "task_type": None,
    "token_indices": [],
}
MISS = "MISS"
MISS_DEFAULTS: dict[str, Any] = {
    "auto_mapping": None,
    "base_model_name_or_path": None,
    "bias": "none",
    "exclude_modules": None,
    "inference_mode": True,
    "init_weights": True,
    "layers_pattern": None,
    "layers_to_transform": None,
    "mini_r": 1,
    "miss_dropout": 0.0,
    "modules_to_save": None,
    "peft_type": MISS,
    "peft_version": DEFAULTS["peft_version"],
    "r": 64,
    "revision": None,
    "target_modules": [],
    "task_type": None,
}
# Initial values of A and B that leave the base as it is.
STARTS = ("gaussian", "eva", "orthogonal", "mica")
# What is read beside plain LoRA.
METHODS = ("trainable_token_indices", "use_dora")
# Keys whose every value is read or does not matter; any other must be off.
_READ = {
    "alpha_pattern",
    "auto_mapping",
    "base_model_name_or_path",
    "bias",
    "ensure_weight_tying",
    "eva_config",
    "exclude_modules",
    "fan_in_fan_out",
    "inference_mode",
    "init_lora_weights",
    "layers_pattern",
    "layers_to_transform",
    "lora_alpha",
    "lora_bias",
    "lora_dropout",
    "megatron_core",
    "modules_to_save",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "r",
    "rank_pattern",
    "revision",
    "target_modules",
    "target_parameters",
    "task_type",
    "use_rslora",
}


def read_config(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The fields of an adapter's `adapter_config.json`, for `save(..., config=...)`.

    What an adapter tree has no place for (task type, revision, the name of the base model, how the
    modules are selected) is carried this way, so that load and save give back PEFT's own bytes.

    Args:
        path: the adapter's folder.

    Returns:
        The JSON object as it is in the file.

    Raises:
        FileNotFoundError: if the folder has none.
        ValueError: if the file is too large, a link, or no JSON object.

    Examples:
        >>> from jlora import peft
        >>> config = peft.read_config("adapter")  # doctest: +SKIP
        >>> peft.save("copy", base, adapter, peft.LLAMA, config=config)  # doctest: +SKIP
    """
    return read_json(Source(Path(path)), CONFIG, LIMIT)


def dumps(fields: Mapping[str, Any]) -> str:
    """The text that PEFT writes."""
    return json.dumps(fields, indent=2, sort_keys=True)


# ------------------------------------------------------------------------------------- checking


def problems(fields: Mapping[str, Any]) -> list[str]:
    """Why the fields cannot be read as an adapter; empty if they can."""
    if fields.get("peft_type") == ROWS_ALONE:
        return _problems_of_rows(fields) + misformed(fields)
    found = [f"{key}: missing" for key in ("peft_type", "target_modules") if key not in fields]
    if fields.get("peft_type", "LORA") != "LORA":
        name = fields["peft_type"]
        remedy = _LOAD_MISS if name == MISS else _CONVERT
        found.append(f"peft_type: expected 'LORA', got {brief(name)}; {remedy}")
    found += [
        f"{shown(key)}: {brief(value)} is a feature that jlora does not support"
        for key, value in features(fields).items()
        if key not in METHODS
    ]
    found += [
        f"{key}: {brief(fields[key])} is nothing that PEFT has beside use_dora"
        for key in ("lora_bias", "target_parameters")
        if fields.get("use_dora") and fields.get(key)
    ]
    start = fields.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in STARTS:
        found.append(
            f"init_lora_weights: {brief(start)} changes the base model, so that the adapter alone "
            "means nothing; convert it in PEFT (path_initial_model_for_weight_conversion)"
        )
    if fields.get("target_modules") == "all-linear":
        found.append(
            "target_modules: 'all-linear' is a word of PEFT's constructor; its own files list the "
            "modules"
        )
    return found + misformed(fields)


_LOAD_MISS = "load it onto its base by jlora.peft.load"
_CONVERT = (
    "write it as LoRA in PEFT, by peft.save_as_lora, or where that does not take it, as AdaLoRA, "
    "merge it there, by merge_and_unload"
)


def _problems_of_rows(fields: Mapping[str, Any]) -> list[str]:
    """Why the fields cannot be read as an adapter of rows of embeddings alone."""
    found = [f"{key}: missing" for key in ("target_modules", "token_indices") if key not in fields]
    return found + [
        f"{shown(key)}: {brief(value)} is a feature that jlora does not support"
        for key, value in fields.items()
        if key not in ROWS_DEFAULTS and value
    ]


def features(fields: Mapping[str, Any]) -> dict[str, Any]:
    """What a configuration uses of PEFT beside plain LoRA, by its keys."""
    each = fields.items()
    return {key: x for key, x in each if key not in _READ and x and x != DEFAULTS.get(key)}


def misformed(fields: Mapping[str, Any]) -> list[str]:
    """Why fields are not of the kind that PEFT writes."""
    wrong = [
        f"{key}: expected {what}, got {brief(fields[key])}"
        for key, (what, fits) in _FORMS.items()
        if key in fields and not fits(fields[key])
    ]
    if wrong:
        return wrong
    patterns = list(_patterns(fields))
    refused = problems_of([whole for _, _, whole in patterns])
    return [
        f"{key}: {brief(pattern)} {refused[whole]}"
        for key, pattern, whole in patterns
        if whole in refused
    ]


def _is_rank(x: Any) -> bool:
    return type(x) is int and 1 <= x < 2**31


def _is_names(x: Any) -> bool:
    return _is_short(x, list) and all(isinstance(name, str) and name for name in x)


def _is_short(x: Any, kind: type) -> bool:
    return isinstance(x, kind) and len(x) <= 10_000  # so that matching all of them stays quick


def _is_numbers(x: Any) -> bool:
    return _is_short(x, list) and all(type(n) is int for n in x)


def _is_rows(x: Any) -> bool:
    is_list = isinstance(x, list) and all(type(n) is int and 0 <= n < 2**31 for n in x)
    return is_list and 0 < len(x) == len(set(x))


def _is_rows_by_name(x: Any) -> bool:
    return isinstance(x, dict) and 0 < len(x) <= PARAMETERS and all(map(_is_rows, x.values()))


_FORMS = {
    "r": ("an integer of at least 1", _is_rank),
    "lora_alpha": ("a finite number", is_finite),
    "lora_dropout": ("a number in [0, 1)", lambda x: is_finite(x) and 0 <= x < 1),
    "token_indices": ("distinct rows", _is_rows),
    "trainable_token_indices": (
        f"distinct rows, or rows by the names of at most {PARAMETERS} modules, or null",
        lambda x: x is None or _is_rows(x) or _is_rows_by_name(x),
    ),
    "use_dora": ("true or false", lambda x: isinstance(x, bool)),
    "use_rslora": ("true or false", lambda x: isinstance(x, bool)),
    "lora_bias": ("true or false", lambda x: isinstance(x, bool)),
    "ensure_weight_tying": ("true or false", lambda x: isinstance(x, bool)),
    "bias": ("'none', 'all' or 'lora_only'", lambda x: x in ("none", "all", "lora_only")),
    "rank_pattern": (
        "an object of ranks",
        lambda x: x is None or (_is_short(x, dict) and all(map(_is_rank, x.values()))),
    ),
    "alpha_pattern": (
        "an object of finite numbers",
        lambda x: x is None or (_is_short(x, dict) and all(map(is_finite, x.values()))),
    ),
    "target_modules": (
        "a pattern, names or null",
        lambda x: x is None or isinstance(x, str) or _is_names(x),
    ),
    "exclude_modules": (
        "a pattern, names or null",
        lambda x: x is None or isinstance(x, str) or _is_names(x),
    ),
    "target_parameters": (
        f"names of at most {PARAMETERS} parameters, or null",
        lambda x: (
            x is None or (_is_names(x) and len({n.rpartition(".")[2] for n in x}) <= PARAMETERS)
        ),
    ),
    "modules_to_save": ("names or null", lambda x: x is None or _is_names(x)),
    "layers_to_transform": (
        "numbers or null",
        lambda x: x is None or type(x) is int or _is_numbers(x),
    ),
    "layers_pattern": (
        "a name, names or null",
        lambda x: x is None or isinstance(x, str) or _is_names(x),
    ),
}


def _patterns(fields: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Each pattern as it is written, and as it is matched if it is not plain."""
    for key in ("target_modules", "exclude_modules"):
        if isinstance(pattern := fields.get(key), str):
            yield key, pattern, pattern
    layers = fields.get("layers_pattern") or []
    keys = {key: (fields.get(key) or (), of_key) for key in ("rank_pattern", "alpha_pattern")}
    keys["layers_pattern"] = [layers] if isinstance(layers, str) else layers, of_layer
    for key, (patterns, form) in keys.items():
        yield from ((key, p, p if PLAIN.fullmatch(p) else form(p)) for p in patterns)
