"""Rules that several engines have, and remedies."""

from collections.abc import Callable, Iterable, Iterator
from typing import Any

from .._file import brief, shown
from ..adapter._config import METHODS, features
from ._engine import Finding, Rule, Served, Side

PROFILE = (
    "Write it with one rank and the scales in B (jlora convert DIR OUT --profile vllm, or "
    "jlora.peft.save(..., profile='vllm'))"
)
MERGED = "serve the merged model (jlora merge BASE DIR OUT)"
MERGE = MERGED.capitalize()
LEAVE_OUT = f"Leave it out of the rules and train again, or {MERGED}"
RENAME = f"Name the modules as the base does, in jlora by the rows of `names`, or {MERGED}"
MIXED = (
    "Start the server with --enable-mixed-moe-lora-format and request the adapter with "
    f"is_3d_lora_weight=True, or {MERGED}"
)
TOWERS = f"Start the server with --enable-tower-connector-lora, which some models have, or {MERGED}"
WITHOUT = "Train without it, or serve what PEFT merges (merge_and_unload)"
CONVERT = "Convert it in PEFT (save_pretrained with path_initial_model_for_weight_conversion)"
OTHER_BASE = "Give the base that the adapter was trained on"
AGAIN = "Save the adapter again"
# What matters in training alone, and settings of what `starts` is about.
_TRAINING = ("velora_config", "corda_config", "loftq_config", "lora_ga_config")


def some(names: Iterable[str]) -> str:
    """The first of many names, and how many more there are."""
    first, *rest = dict.fromkeys(names)
    return shown(first) + (f" and {len(rest)} more" if rest else "")


def is_fused(side: Side) -> bool:
    """Whether it is of all experts of a module together, by `target_parameters`."""
    return side.depth > 0 or side.last == "experts"


# ---------------------------------------------------------------------------- the configuration


def needs(*keys: str) -> Rule:
    """Demands that these fields are there."""

    def rule(x: Served) -> Iterator[Finding]:
        for key in keys:
            if key not in x.fields:
                yield Finding(key, "is missing in adapter_config.json", AGAIN, False)

    return rule


def field(
    key: str, allows: Callable[[Any], bool], why: str, remedy: str, *, silent: bool = False
) -> Rule:
    """Demands that a field is as `allows` says, where it is there and not null."""

    def rule(x: Served) -> Iterator[Finding]:
        value = x.fields.get(key)
        if value is not None and not allows(value):
            yield Finding(key, f"{brief(value)} {why}", remedy, silent)

    return rule


def is_lora(*, silent: bool = False) -> Rule:
    """Demands LoRA, and not another method of PEFT's."""
    return field("peft_type", lambda x: x == "LORA", "is not LORA", WITHOUT, silent=silent)


def empty(why: str, *keys: str) -> list[Rule]:
    """Demands that fields are empty, which the engine does not read."""
    return [field(key, lambda x: not x, why, PROFILE, silent=True) for key in keys]


def _without(key: str) -> str:
    """What to do about a feature, which jlora can merge or not."""
    return f"Train without it, or {MERGED}" if key in METHODS else WITHOUT


def off(*keys: str, silent: bool = False) -> Rule:
    """Demands that these features of PEFT are not used."""
    why = "is not read" if silent else "is not supported"

    def rule(x: Served) -> Iterator[Finding]:
        for key in keys:
            if value := x.fields.get(key):
                yield Finding(key, f"{brief(value)} {why}", _without(key), silent)

    return rule


def unread(*known: str) -> Rule:
    """Demands that no other features are used, nor those of later versions of PEFT."""

    def rule(x: Served) -> Iterator[Finding]:
        for key, value in features(x.fields).items():
            if key not in (*known, *_TRAINING):
                yield Finding(shown(key), f"{brief(value)} is not read", _without(key), True)

    return rule


def starts(*known: str, silent: bool = False) -> Rule:
    """Demands that A and B started in a way that left the base as it was."""
    return field(
        "init_lora_weights",
        lambda x: not isinstance(x, str) or x.lower() in known,
        "changes the base model, which is served as it was",
        CONVERT,
        silent=silent,
    )


def above(rank: int, limit: int, least: int) -> Finding:
    """A rank above the server's option, which should be `least`."""
    remedy = f"Start the server with --max-lora-rank {least}, and say so here"
    return Finding("r", f"{rank} is above --max-lora-rank {limit}", remedy, False)


# ---------------------------------------------------------------------------------- the tensors


def present(*, silent: bool = False) -> Rule:
    """Demands that there are A and B."""

    def rule(x: Served) -> Iterator[Finding]:
        if not x.factors:
            yield Finding("adapter_model.safetensors", "holds no A and B", AGAIN, silent)

    return rule


def paired(x: Served) -> Iterator[Finding]:
    """Demands a B for each A."""
    if lone := [s.key for pair in x.pairs.values() if len(pair) == 1 for s in pair.values()]:
        yield Finding(some(lone), "is there without its A or B", AGAIN, False)


def matrices(x: Served) -> Iterator[Finding]:
    """Demands that A and B are matrices."""
    if odd := [s.key for s in x.factors if len(s.shape) != 2]:
        why = "only A and B that are matrices are supported"
        yield Finding(some(odd), why, LEAVE_OUT, False)


def ranks(rank: Callable[[Served, str], int], remedy: str, *, silent: bool = False) -> Rule:
    """Demands that A and B have the `rank` that the engine takes a module to have."""

    def rule(x: Served) -> Iterator[Finding]:
        plain = (s for s in x.factors if len(s.shape) == 2 and not is_fused(s))
        if odd := [s for s in plain if s.shape[s.side == "B"] != rank(x, s.module)]:
            why = f"of shape {odd[0].shape}, is taken to have rank {rank(x, odd[0].module)}"
            yield Finding(some(s.key for s in odd), why, remedy, silent)

    return rule


def fits(*, silent: bool = False) -> Rule:
    """Demands that B·A has the shape of the base's weight; a smaller one may be `silent`."""

    def rule(x: Served) -> Iterator[Finding]:
        wrong: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {}
        for (module, _), pair in x.pairs.items():
            if x.base is None or len(pair) < 2 or any(len(s.shape) != 2 for s in pair.values()):
                continue
            ours, theirs = (pair["B"].shape[0], pair["A"].shape[1]), x.base.shape(module)
            if len(theirs) == 2 and ours not in (theirs, theirs[::-1]):
                wrong[module] = ours, theirs
        if wrong:
            ours, theirs = next(iter(wrong.values()))
            why = f"A and B are of a weight of shape {ours}, the base's is {theirs}"
            is_smaller = ours[0] <= theirs[0] and ours[1] <= theirs[1]
            yield Finding(some(wrong), why, OTHER_BASE, silent and is_smaller)

    return rule
