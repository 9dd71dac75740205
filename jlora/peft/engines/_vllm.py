"""vLLM, by `vllm.lora`: its `peft_helper`, `lora_model`, `model_manager` and `utils`."""

import re
from collections.abc import Iterator

from .._file import shown
from ..adapter._config import STARTS
from ..adapter._contents import HEADS
from ..adapter._vllm import RANKS
from . import _rules as rules
from ._engine import Engine, Finding, Served, register
from ._rules import is_fused, some

# Those that it knows by name.
FEATURES = (
    "use_dora",
    "lora_bias",
    "alora_invocation_tokens",
    "layer_replication",
    "use_bdlora",
    "use_qalora",
)
EMBEDDINGS = ("embed_tokens", "lm_head", "wte")
# Frozen values, which it skips; and the heads of classifiers.
_SKIPPED = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
_HEAD = re.compile(rf"(.*\.)?({'|'.join(HEADS)})\.(weight|bias)")
# What a model of models has beside its language model.
_TOWER = re.compile(r"(^|\.)(visual|vision_\w+|audio_\w+|multi_modal_projector)\.")
_OLD = "is not read before vLLM 0.32, where all modules have `r` and `lora_alpha`"


def _limit(x: Served) -> Iterator[Finding]:
    rank = max([x.rank, *(x.fields.get("rank_pattern") or {}).values()])
    if rank > RANKS[-1]:
        remedy = f"Lower it: jlora.arithmetic.truncate(adapter, {RANKS[-1]})"
        yield Finding("r", f"{rank} is above {RANKS[-1]}, the largest rank it has", remedy, False)
    elif x.max_lora_rank is not None and rank > x.max_lora_rank:
        least = next(r for r in RANKS if r >= rank)
        yield rules.above(rank, x.max_lora_rank, least)


def _heads(x: Served) -> Iterator[Finding]:
    saved = x.fields.get("modules_to_save") or []
    if others := [name for name in saved if name not in HEADS]:
        why = f"only {' and '.join(HEADS)} are taken in full"
        yield Finding(f"modules_to_save {some(others)}", why, rules.LEAVE_OUT, False)
    elif saved and not _classifies(x):
        why = "a head in full is taken of classifiers alone"
        yield Finding(f"modules_to_save {some(saved)}", why, rules.LEAVE_OUT, False)


def _classifies(x: Served) -> bool:
    if x.base is None:
        return x.fields.get("task_type") in ("SEQ_CLS", "TOKEN_CLS")
    return "Classification" in str(x.base.config.get("architectures"))


def _keys(x: Served) -> Iterator[Finding]:
    saves = bool(x.fields.get("modules_to_save"))
    odd = [k for k in x.others if not k.endswith(_SKIPPED) and not (saves and _HEAD.fullmatch(k))]
    if odd:
        why = "neither A nor B, nor a classifier's head"
        yield Finding(some(odd), why, rules.LEAVE_OUT, False)


def _embeddings(x: Served) -> Iterator[Finding]:
    tables = [s for s in x.factors if s.table]
    if odd := [s.module for s in tables if s.last not in EMBEDDINGS]:
        why = f"of embeddings, only {', '.join(EMBEDDINGS)} are adapted"
        yield Finding(some(odd), why, rules.LEAVE_OUT, False)
    size = x.base.number("vocab_size") if x.base else None
    for s in tables:
        if size is not None and s.side == "A" and s.last in EMBEDDINGS and s.shape[-1] != size:
            why = f"is of {s.shape[-1]} tokens, the base's `vocab_size` is {size}"
            yield Finding(shown(s.key), why, rules.LEAVE_OUT, False)


def _names(x: Served) -> Iterator[Finding]:
    if (base := x.base) is None:
        return
    lost = [m for m in dict.fromkeys(s.module for s in x.factors) if not base.called(m)]
    # It looks at the last part of a name, and then looks up each of its own names as a whole.
    quiet = [m for m in lost if m.rpartition(".")[2] in base.lasts and ".experts." not in m]
    if loud := [m for m in lost if m not in quiet]:
        why = "the base has no module of that name"
        yield Finding(some(loud), why, rules.OTHER_BASE, False)
    if quiet:
        why = f"matches no module of the base, which has {shown(base.nearest(quiet[0]))}"
        yield Finding(some(quiet), why, rules.RENAME, True)


def _towers(x: Served) -> Iterator[Finding]:
    if x.base is None or not {"vision_config", "audio_config"} & x.base.config.keys():
        return
    if found := [s.module for s in x.factors if _TOWER.search(s.module)]:
        yield Finding(some(found), "only the language model is adapted", rules.TOWERS, True)


Shapes = dict[int, dict[str, tuple[int, ...]]]


def _experts(x: Served) -> Iterator[Finding]:
    """Checks all experts together: down_proj wraps gate_up_proj, whose depth is 1 so."""
    found: dict[str, Shapes] = {}
    for s in filter(is_fused, x.factors):
        found.setdefault(s.module, {}).setdefault(s.depth, {})[s.side] = s.shape
    if lone := [m for m, own in found.items() if own.keys() != {0, 1}]:
        why = "one of gate_up_proj and down_proj is adapted; both are expected"
        yield Finding(some(lone), why, rules.LEAVE_OUT, False)
    if x.base is None:
        return
    hidden = x.base.number("hidden_size")
    if other := [m for m, own in found.items() if hidden and _is_transposed(own, hidden)]:
        why = f"A of gate_up_proj is read with {hidden} columns, B of down_proj with so many rows"
        yield Finding(some(other), why, rules.MERGE, True)
    if apart := [m for m in found if f"{x.base.called(m)}.0" in x.base.modules]:
        why = "is of all experts together, which are one by one in the base"
        yield Finding(some(apart), why, rules.MIXED, False)


def _is_transposed(own: Shapes, hidden: int) -> bool:
    """Whether A of gate_up_proj belongs to its outputs, or B of down_proj to its inputs."""
    a, b = own.get(1, {}).get("A"), own.get(0, {}).get("B")
    return 1 in own and ((a is not None and a[-1] != hidden) or (b is not None and b[0] != hidden))


RULES = (
    rules.is_lora(silent=True),
    rules.needs("r", "lora_alpha", "target_modules"),
    rules.off(*FEATURES),
    rules.field("bias", lambda x: x == "none", "is not supported", rules.LEAVE_OUT),
    rules.starts(*STARTS, "lora_ga"),
    *rules.empty(_OLD, "rank_pattern", "alpha_pattern"),
    rules.unread(*FEATURES),
    _limit,
    _heads,
    _keys,
    rules.present(),
    rules.paired,
    rules.matrices,
    rules.ranks(lambda x, module: x.ranks[module], rules.AGAIN, silent=True),
    _embeddings,
    _towers,
    _experts,
    _names,
    rules.fits(silent=True),
)
START = "vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules NAME={dir}"
register(Engine("vllm", "vLLM", "0.33.0", RULES, START, RANKS, 16))
