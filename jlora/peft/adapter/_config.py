"""`adapter_config.json`: its fields, the values that are refused, and its format."""

import json
import os
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

from ..._errors import InputError, Problem, shorten
from ..._folders import to_path
from ..._rules import is_finite
from .._file import read_json
from .._recognized import CONFIG
from .._source import Source
from ..names._peft import load_answers
from ._patterns import list_bad_patterns

LIMIT = 4 * 2**20  # bytes
PARAMETERS = 100  # names; each is searched in all modules
DEFAULTS = load_answers()["fields"]
# Features beyond plain LoRA are all other fields, known or not; jlora supports these.
METHODS = ("trainable_token_indices", "use_dora")
# Fields that jlora has no use for, of any value.
_UNUSED = [
    "auto_mapping",
    "base_model_name_or_path",
    "eva_config",
    "inference_mode",
    "init_lora_weights",
    "megatron_core",
    "peft_type",
    "peft_version",
    "qalora_group_size",
    "revision",
    "task_type",
]
# Initializations of A and B that do not change the base.
STARTS = ("gaussian", "eva", "orthogonal", "mica")


def read_config(path: str | os.PathLike[str], *, ignore: Collection[str] = ()) -> dict[str, Any]:
    """Reads the fields of an adapter's `adapter_config.json`, without those in `ignore`."""
    return leave_out(read_json(Source(to_path(path)), CONFIG, LIMIT), ignore)


def leave_out(fields: Mapping[str, Any], ignore: Collection[str]) -> dict[str, Any]:
    """Returns a configuration without the fields in `ignore`, which jlora must not know."""
    if isinstance(ignore, str):
        raise TypeError(f"`ignore` must be a tuple of names, such as ({ignore!r},); got a string.")
    if known := [name for name in ignore if name in DEFAULTS]:
        raise InputError(
            "ignore",
            f"is for fields that jlora does not know, but it knows {', '.join(known)}: "
            "without it, the adapter would mean something else. Leave it out of `ignore`.",
        )
    return {name: x for name, x in fields.items() if name not in ignore}


def dumps(fields: Mapping[str, Any]) -> str:
    """Formats a configuration as PEFT does."""
    return json.dumps(fields, indent=2, sort_keys=True)


# ------------------------------------------------------------------------------------- checking


def problems_of(fields: Mapping[str, Any], *, is_file: bool = True) -> list[Problem]:
    """Lists the problems with a configuration, with remedies for a file or for `config`."""
    method = fields.get("peft_type", "LORA")
    if method == "TRAINABLE_TOKENS":  # with fields of its own
        remedy = _ROWS if is_file else "Leave peft_type out."
        return [Problem("peft_type", f"expected 'LORA', got {method!r}", remedy)]
    required = ("peft_type", "target_modules")
    found = [Problem(key, "missing") for key in required if key not in fields]
    if method != "LORA":
        remedy = _CONVERT if isinstance(method, str) else _NAME
        remedy = remedy if is_file else "Leave peft_type out."
        found.append(Problem("peft_type", f"expected 'LORA', got {shorten(method)}", remedy))
    found += _list_unsupported(fields, is_file)
    found += _list_contradictions(fields)
    found += list_misformed(fields) or list_bad_patterns(fields)
    if found or is_file:
        return found
    odd = ((key, x) for key, x in fields.items() if not _is_json(x))
    return [Problem(key, f"expected a value for JSON, got {shorten(x)}") for key, x in odd]


_ROWS = (
    "Merge it in PEFT with merge_and_unload. jlora reads rows as LORA has them, in "
    "trainable_token_indices."
)
_NAME = "Set it to the method of the adapter."
_CONVERT = (
    "Convert it to LoRA in PEFT with peft.save_as_lora; if PEFT cannot (AdaLoRA), merge it there "
    "with merge_and_unload."
)


def _is_json(x: object) -> bool:
    try:
        json.dumps(x)
    except (TypeError, ValueError):
        return False
    return True


def _list_unsupported(fields: Mapping[str, Any], is_file: bool) -> Iterator[Problem]:
    """Lists the features that are not supported, or not known."""
    known = "is a feature that jlora does not support", ""
    unknown = "is not known to jlora, and may change what the adapter computes"
    remedy = "name the field in `ignore`" if is_file else "leave the field out"
    for key, value in find_features(fields).items():
        why, then = known if key in DEFAULTS else (unknown, f"If it does not, {remedy}.")
        if key not in METHODS:
            yield Problem(key, f"{shorten(value)} {why}", then)


def _list_contradictions(fields: Mapping[str, Any]) -> list[Problem]:
    """Lists values that PEFT's files do not have together, or that need a changed base."""
    found = [
        Problem(key, f"{shorten(fields[key])} cannot be combined with use_dora in PEFT")
        for key in ("lora_bias", "target_parameters")
        if fields.get("use_dora") and fields.get(key)
    ]
    start = fields.get("init_lora_weights", True)
    if isinstance(start, str) and start.lower() not in STARTS:
        why = f"{shorten(start)} changes the base model, which the adapter needs"
        remedy = "Convert the adapter in PEFT (path_initial_model_for_weight_conversion)."
        found.append(Problem("init_lora_weights", why, remedy))
    return found


def find_features(fields: Mapping[str, Any]) -> dict[str, Any]:
    """Finds the fields with features beyond plain LoRA."""
    plain = {*_KINDS, *_UNUSED} - {*METHODS}
    each = ((key, x) for key, x in fields.items() if key not in plain)
    return {key: x for key, x in each if x and x != DEFAULTS.get(key)}


def list_misformed(fields: Mapping[str, Any]) -> list[Problem]:
    """Lists the fields with values that PEFT would not write."""
    return [
        Problem(key, f"expected {what}, got {shorten(fields[key])}")
        for key, (what, fits) in _KINDS.items()
        if key in fields and not fits(fields[key])
    ]


_Fits = Callable[[Any], bool]
ENTRIES = 100_000  # of a list, so that all of them are matched quickly


def _is_text(x: object) -> bool:
    return isinstance(x, str)


def _of(kind: type) -> _Fits:
    return lambda x: type(x) is kind


def _is_rank(x: object) -> bool:
    return type(x) is int and 1 <= x < 2**31


def _is_rows(x: object) -> bool:
    if not isinstance(x, list) or not all(type(n) is int and 0 <= n < 2**31 for n in x):
        return False
    return 0 < len(x) == len(set(x))


def _listing(fits: _Fits) -> _Fits:
    return lambda x: isinstance(x, list) and len(x) <= ENTRIES and all(map(fits, x))


def _by_name(fits: _Fits) -> _Fits:
    fit = lambda x: all(map(_is_text, x)) and all(map(fits, x.values()))  # noqa: E731
    return lambda x: isinstance(x, dict) and len(x) <= ENTRIES and fit(x)


def _or_null(*kinds: _Fits) -> _Fits:
    return lambda x: x is None or any(fits(x) for fits in kinds)


_is_names = _listing(lambda x: _is_text(x) and x != "")


def _is_rows_by_name(x: object) -> bool:
    return isinstance(x, dict) and _by_name(_is_rows)(x) and 0 < len(x) <= PARAMETERS


def _is_parameters(x: object) -> bool:
    if not isinstance(x, list) or not _is_names(x):
        return False
    return len({name.rpartition(".")[2] for name in x}) <= PARAMETERS


_FLAG = "true or false", _of(bool)
_MODULES = "a pattern, names or null", _or_null(_is_text, _is_names)
_KINDS: dict[str, tuple[str, _Fits]] = {
    "r": ("an integer of at least 1 and below 2^31", _is_rank),
    "lora_alpha": ("a finite number", is_finite),
    "lora_dropout": ("a number in [0, 1)", lambda x: is_finite(x) and 0 <= x < 1),
    "trainable_token_indices": (
        f"distinct rows, an object with the rows of at most {PARAMETERS} modules, or null",
        _or_null(_is_rows, _is_rows_by_name),
    ),
    "fan_in_fan_out": _FLAG,
    "use_dora": _FLAG,
    "use_rslora": _FLAG,
    "lora_bias": _FLAG,
    "ensure_weight_tying": _FLAG,
    "bias": ("'none', 'all' or 'lora_only'", lambda x: x in ("none", "all", "lora_only")),
    "rank_pattern": ("an object of ranks", _or_null(_by_name(_is_rank))),
    "alpha_pattern": ("an object of finite numbers", _or_null(_by_name(is_finite))),
    "target_modules": _MODULES,
    "exclude_modules": _MODULES,
    "target_parameters": (
        f"names of at most {PARAMETERS} parameters, or null",
        _or_null(_is_parameters),
    ),
    "modules_to_save": ("names or null", _or_null(_is_names)),
    "layers_to_transform": ("numbers or null", _or_null(_of(int), _listing(_of(int)))),
    "layers_pattern": ("a name, names or null", _or_null(_is_text, _is_names)),
}
