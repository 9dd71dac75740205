"""vLLM, by `vllm.lora`: its `peft_helper`, `lora_model`, `model_manager` and `utils`."""

import re
from collections.abc import Iterator

from .._file import show
from ..adapter._config import STARTS
from ..adapter._one_rank import RANKS
from ..adapter._roles import HEADS
from . import _findings as rules
from ._engine import Engine, Finding, Served, register
from ._findings import is_fused, report

# Features that it refuses by name.
FEATURES = (
    *("use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication"),
    *("use_bdlora", "use_qalora"),
)
EMBEDDINGS = ("embed_tokens", "lm_head", "wte")
# Frozen values, which it skips, and the heads of classifiers.
_SKIPPED = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
_HEAD = re.compile(rf"(.*\.)?({'|'.join(HEADS)})\.(weight|bias)")
# Models of images and sounds, next to a language model.
_TOWER = re.compile(r"(^|\.)(visual|vision_\w+|audio_\w+|multi_modal_projector)\.")
Shapes = dict[int, dict[str, tuple[int, ...]]]  # of A and B, by depth
_OLD = "is not read before vLLM 0.32, where all modules have `r` and `lora_alpha`"


def _configuration(x: Served) -> Iterator[Finding]:
    yield from rules.require_lora(x, silent=True)
    yield from rules.require_fields(x, "r", "lora_alpha", "target_modules")
    yield from rules.forbid(x, *FEATURES)
    yield from rules.check_field(
        x, "bias", lambda x: x == "none", "is not supported", rules.LEAVE_OUT
    )
    yield from rules.check_start(x, *STARTS, "lora_ga")
    yield from rules.forbid_unread(x, *FEATURES)
    rank = max([x.rank, *(x.fields.get("rank_pattern") or {}).values()])
    if rank > RANKS[-1]:
        remedy = f"Lower it: jlora.arithmetic.truncate(adapter, {RANKS[-1]})"
        yield Finding("r", f"{rank} is above {RANKS[-1]}, the largest rank", remedy, False)
    elif x.max_lora_rank is not None and rank > x.max_lora_rank:
        yield rules.report_rank(rank, x.max_lora_rank, next(r for r in RANKS if r >= rank))
    saved = x.fields.get("modules_to_save") or []
    of = "modules_to_save"
    if others := [name for name in saved if name not in HEADS]:
        why = f"only {' and '.join(HEADS)} may be saved in full"
        yield from report(others, why, rules.LEAVE_OUT, of=of)
    elif not _classifies(x):
        why = "only classifiers may have a head in full"
        yield from report(saved, why, rules.LEAVE_OUT, of=of)


def _classifies(x: Served) -> bool:
    if x.base is None:
        return x.fields.get("task_type") in ("SEQ_CLS", "TOKEN_CLS")
    return "Classification" in str(x.base.config.get("architectures"))


def _tensors(x: Served) -> Iterator[Finding]:
    saves = bool(x.fields.get("modules_to_save"))
    odd = (k for k in x.others if not k.endswith(_SKIPPED) and not (saves and _HEAD.fullmatch(k)))
    yield from report(odd, "is neither A nor B, nor a classifier's head", rules.LEAVE_OUT)
    yield from rules.check_pairs(x)
    yield from rules.check_ranks(x, x.ranks.__getitem__, rules.AGAIN, silent=True)
    tables = [s for s in x.factors if s.table]
    odd = (s.module for s in tables if s.last not in EMBEDDINGS)
    why = f"only the embeddings {', '.join(EMBEDDINGS)} may be adapted"
    yield from report(odd, why, rules.LEAVE_OUT)
    size = x.base.number("vocab_size") if x.base else None
    for s in tables:
        if size is not None and s.side == "A" and s.last in EMBEDDINGS and s.shape[-1] != size:
            why = f"has {s.shape[-1]} tokens, but the base's `vocab_size` is {size}"
            yield from report([s.key], why, rules.LEAVE_OUT)


def _experts(x: Served) -> Iterator[Finding]:
    """Checks experts that are adapted together. down_proj wraps gate_up_proj, whose depth is 1."""
    found: dict[str, Shapes] = {}
    for s in filter(is_fused, x.factors):
        found.setdefault(s.module, {}).setdefault(s.depth, {})[s.side] = s.shape
    lone = (m for m, own in found.items() if own.keys() != {0, 1})
    why = "only one of gate_up_proj and down_proj is adapted; expected both"
    yield from report(lone, why, rules.LEAVE_OUT)
    if (base := x.base) is None:
        return
    hidden = base.number("hidden_size")
    other = (m for m, own in found.items() if hidden and _is_transposed(own, hidden))
    why = f"A of gate_up_proj is read with {hidden} columns, B of down_proj with {hidden} rows"
    yield from report(other, why, rules.MERGE, silent=True)
    apart = (m for m in found if f"{base.called(m)}.0" in base.modules)
    why = "adapts all experts together, but the base has a module for each"
    yield from report(apart, why, rules.MIXED)


def _is_transposed(own: Shapes, hidden: int) -> bool:
    """Whether A of gate_up_proj has its outputs, or B of down_proj its inputs."""
    a, b = own.get(1, {}).get("A"), own.get(0, {}).get("B")
    return 1 in own and ((a is not None and a[-1] != hidden) or (b is not None and b[0] != hidden))


def _names(x: Served) -> Iterator[Finding]:
    if (base := x.base) is None:
        return
    if {"vision_config", "audio_config"} & base.config.keys():
        found = (s.module for s in x.factors if _TOWER.search(s.module))
        why = "only the language model is adapted"
        yield from report(found, why, rules.TOWERS, silent=True)
    lost = [m for m in dict.fromkeys(s.module for s in x.factors) if not base.called(m)]
    # vLLM checks the last component of a name, and then looks up its own names as a whole.
    quiet = [m for m in lost if m.rpartition(".")[2] in base.lasts and ".experts." not in m]
    loud = [m for m in lost if m not in quiet]
    yield from report(loud, "the base has no module of this name", rules.OTHER_BASE)
    if quiet:
        why = f"matches no module of the base; the nearest is {show(base.nearest(quiet[0]))}"
        yield from report(quiet, why, rules.RENAME, silent=True)


def notes(x: Served) -> list[str]:
    """Says what versions before the one of these rules drop."""
    patterns = [key for key in ("rank_pattern", "alpha_pattern") if x.fields.get(key)]
    return [f"{key} {_OLD}. {rules.PROFILE}, if yours is older." for key in patterns]


RULES = (
    *(_configuration, _tensors, _experts, _names),
    lambda x: rules.check_shapes(x, silent=True),
)
START = "vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules NAME={dir}"
register(Engine("vllm", "vLLM", "0.33.0", RULES, START, RANKS, 16, notes))
