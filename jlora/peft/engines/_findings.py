"""Rules that several engines need; each returns findings. And remedies."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .._file import shorten, show
from ..adapter._config import METHODS, find_features
from ._engine import Finding, Served, Side

PROFILE = "Write it for vLLM: jlora convert DIR OUT --profile vllm, or profile='vllm' of peft.save"
MERGED = "serve the merged model (jlora merge BASE DIR OUT)"
MERGE = f"S{MERGED[1:]}"
LEAVE_OUT = f"Leave it out of the rules and train again, or {MERGED}"
RENAME = f"Name the modules as in the base (in jlora by the rows of `names`), or {MERGED}"
MIXED = f"Start the server with --enable-mixed-moe-lora-format, give is_3d_lora_weight, or {MERGED}"
TOWERS = f"Start the server with --enable-tower-connector-lora, which some models have, or {MERGED}"
WITHOUT = "Train without it, or merge it in PEFT (merge_and_unload) and serve the merged model"
CONVERT = "Convert it in PEFT (save_pretrained with path_initial_model_for_weight_conversion)"
OTHER_BASE = "Give the base that the adapter was trained on"
AGAIN = "Save the adapter again"
# Frozen values beside the A and B of an embedding or a head, which engines skip.
FROZEN = ("embed_tokens.base_layer.weight", "lm_head.base_layer.weight")
# Fields that matter only in training.
_TRAINING = ("velora_config", "corda_config", "loftq_config", "lora_ga_config")


def report(
    names: Iterable[str], why: str, remedy: str, *, of: str = "", silent: bool = False
) -> list[Finding]:
    """Reports all `names` as one finding, if there are any; `of` is a field or a file."""
    if not (first := list(dict.fromkeys(names))):
        return []
    more = f" and {len(first) - 1} more" if len(first) > 1 else ""
    return [Finding(f"{of} {show(first[0])}{more}".lstrip(), why, remedy, silent)]


def is_fused(side: Side) -> bool:
    """Whether a factor is for all experts of a module together, by `target_parameters`."""
    return side.depth > 0 or side.last == "experts"


# ---------------------------------------------------------------------------- the configuration


def require_fields(x: Served, *keys: str) -> list[Finding]:
    """Requires fields to be present."""
    why = "is missing in adapter_config.json"
    return [Finding(key, why, AGAIN, False) for key in keys if key not in x.fields]


def check_field(
    x: Served, key: str, values: Callable[[Any], bool], why: str, remedy: str, silent: bool = False
) -> list[Finding]:
    """Requires `values` to be true for a field, if it is present and not null."""
    value = x.fields.get(key)
    is_fine = value is None or values(value)
    return [] if is_fine else [Finding(key, f"{shorten(value)} {why}", remedy, silent)]


def require_lora(x: Served) -> list[Finding]:
    """Requires the method to be LoRA."""
    return check_field(x, "peft_type", lambda kind: kind == "LORA", "is not LORA", WITHOUT, True)


def check_start(x: Served, *known: str) -> list[Finding]:
    """Requires an initialization of A and B that does not change the base."""
    why = "changes the base model, but the original is served"
    leaves = lambda start: not isinstance(start, str) or start.lower() in known  # noqa: E731
    return check_field(x, "init_lora_weights", leaves, why, CONVERT)


def forbid(x: Served, *keys: str) -> list[Finding]:
    """Forbids features of PEFT."""
    used = [key for key in keys if x.fields.get(key)]
    return [_feature(x, key, "is not supported", silent=False) for key in used]


def forbid_unread(x: Served, *known: str) -> list[Finding]:
    """Forbids all other features, including those of later versions of PEFT."""
    used = [key for key in find_features(x.fields) if key not in (*known, *_TRAINING)]
    return [_feature(x, key, "is not read", silent=True) for key in used]


def _feature(x: Served, key: str, why: str, *, silent: bool) -> Finding:
    remedy = f"Train without it, or {MERGED}" if key in METHODS else WITHOUT
    return Finding(show(key), f"{shorten(x.fields[key])} {why}", remedy, silent)


def report_rank(rank: int, limit: int, least: int) -> Finding:
    """Reports a rank above the server's option, which must be at least `least`."""
    remedy = f"Start the server with --max-lora-rank {least}, and check again with the same option"
    return Finding("r", f"{rank} is above --max-lora-rank {limit}", remedy, False)


# ---------------------------------------------------------------------------------- the tensors


def check_pairs(x: Served) -> Iterator[Finding]:
    """Requires matrices A and B in pairs."""
    if not x.factors:
        yield Finding("adapter_model.safetensors", "has no A and B", AGAIN, False)
    lone = (s.key for pair in x.pairs.values() if len(pair) == 1 for s in pair.values())
    yield from report(lone, "is without its A or B", AGAIN)
    odd = (s.key for s in x.factors if len(s.shape) != 2)
    yield from report(odd, "A and B must be matrices", LEAVE_OUT)


def check_ranks(x: Served) -> list[Finding]:
    """Requires A and B to have the rank of the configuration, with which an engine reads them."""
    plain = (s for s in x.factors if len(s.shape) == 2 and not is_fused(s))
    odd = [s for s in plain if s.shape[s.side == "B"] != x.ranks[s.module]]
    why = f"has shape {odd[0].shape}, but is read with rank {x.ranks[odd[0].module]}" if odd else ""
    return report((s.key for s in odd), why, AGAIN, silent=True)


def check_shapes(x: Served) -> list[Finding]:
    """Requires B·A to have the shape of the base's weight. A smaller one is loaded silently."""
    wrong = list[tuple[str, tuple[int, ...], tuple[int, ...], bool]]()
    for (module, _), pair in x.pairs.items():
        theirs = x.base.shape(module) if x.base else ()
        if len(pair) == len(theirs) == 2 and all(len(s.shape) == 2 for s in pair.values()):
            ours = (pair["B"].shape[0], pair["A"].shape[1])
            if ours not in (theirs, theirs[::-1]):
                wrong.append((module, ours, theirs, pair["A"].table))
    _, ours, theirs, table = next(iter(wrong), ("", (0, 0), (0, 0), False))
    why = f"A and B are for a weight of shape {ours}, but the base's has shape {theirs}"
    is_smaller = not table and ours[0] <= theirs[0] and ours[1] <= theirs[1]
    return report((m for m, *_ in wrong), why, OTHER_BASE, silent=is_smaller)
