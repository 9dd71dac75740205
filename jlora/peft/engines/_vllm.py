"""vLLM, and vLLM on TPUs: `tests/test_served*.py` compare the rules with the engines."""

import re
from collections.abc import Iterator

from .._file import show
from ..adapter._config import PATTERNS, STARTS
from ..adapter._one_rank import RANKS
from ..adapter._roles import HEADS
from . import _findings as rules
from ._engine import Base, Engine, Finding, Served
from ._findings import is_fused, report

# Features that it refuses by name.
FEATURES = ["use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication"]
FEATURES += ["use_bdlora", "use_qalora"]
EMBEDDINGS = ("embed_tokens", "lm_head", "wte")
# The heads of classifiers.
_HEAD = re.compile(rf"(.*\.)?({'|'.join(HEADS)})\.(weight|bias)")
# Models of images and sounds, next to a language model.
_TOWER = re.compile(r"(^|\.)(visual|vision_\w+|audio_\w+|multi_modal_projector)\.")
_APART = "with experts it starts only with LORA_MODULE_PATH=q_proj,k_proj,v_proj,o_proj."
_UNLISTED = "is no model of vLLM 0.32: it is run by transformers, if at all"
_OLD = "is not read before vLLM 0.32, where all modules have `r` and `lora_alpha`"


def _configuration(x: Served) -> Iterator[Finding]:
    yield from rules.require_lora(x)
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
    elif rank > x.max_lora_rank:
        yield rules.report_rank(rank, x.max_lora_rank, next(r for r in RANKS if r >= rank))
    kind = x.base.architecture if x.base else str(x.fields.get("task_type"))
    heads = HEADS if "Classification" in kind or kind in ("SEQ_CLS", "TOKEN_CLS") else ()
    others = (name for name in x.fields.get("modules_to_save") or [] if name not in heads)
    why = f"only the head of a classifier, {' or '.join(HEADS)}, may be saved in full"
    yield from report(others, why, rules.LEAVE_OUT, of="modules_to_save")


def _models(x: Served) -> Iterator[Finding]:
    if (base := x.base) is None:
        return
    if not base.model.adapts:
        why = "vLLM adapts no weights of this model"
        yield Finding(base.architecture, why, rules.MERGE, False)
        return
    others = {*EMBEDDINGS} - {*base.model.embeddings}
    found = (s.module for s in x.factors if base.last(s.module) in others)
    yield from report(found, "vLLM does not adapt it in this model", rules.LEAVE_OUT)
    found = (s.module for s in x.factors if base.last(s.module) in base.model.parts_only)
    why = "vLLM takes adapters of its parts only, which this model has fused"
    yield from report(found, why, rules.LEAVE_OUT)


def _tensors(x: Served) -> Iterator[Finding]:
    saves = bool(x.fields.get("modules_to_save"))
    odd = (
        k for k in x.others if not k.endswith(rules.FROZEN) and not (saves and _HEAD.fullmatch(k))
    )
    yield from report(odd, "is neither A nor B, nor a classifier's head", rules.LEAVE_OUT)
    yield from rules.check_pairs(x)
    yield from rules.check_ranks(x)
    odd = (s.module for s in x.factors if s.table and s.last not in EMBEDDINGS)
    why = f"only the embeddings {', '.join(EMBEDDINGS)} may be adapted"
    yield from report(odd, why, rules.LEAVE_OUT)


def _experts(x: Served) -> Iterator[Finding]:
    """Checks experts that are adapted together. down_proj wraps gate_up_proj, whose depth is 1."""
    found = dict.fromkeys(s.module for s in x.factors if is_fused(s))
    gate_up, down = ({m: x.pairs.get((m, i), {}) for m in found} for i in (1, 0))
    lone = (m for m in found if not (gate_up[m] and down[m]))
    yield from report(lone, "only one of gate_up_proj and down_proj is adapted", rules.LEAVE_OUT)
    columns = {m: pair["A"].shape[-1] for m, pair in gate_up.items() if "A" in pair}
    rows = {m: pair["B"].shape[0] for m, pair in down.items() if "B" in pair}
    other = (m for m in columns.keys() & rows.keys() if columns[m] != rows[m])
    yield from report(sorted(other), "has the outputs in A, not the inputs", rules.PROFILE)
    if x.base and not x.base.model.joint_experts:
        why = "adapts all experts together, but vLLM reads those of this model one by one"
        yield from report(filter(x.base.called, found), why, rules.MIXED)


def _is_found(module: str, base: Base) -> bool:
    """Whether a base has a module, or all experts in one place, where vLLM finds each of them."""
    place = module.partition(".experts.")[0] + ".experts"
    is_apart = base.called(f"{place}.0") is not None
    one_by_one = not base.model.joint_experts and not is_apart and ".experts." in module
    return base.called(place if one_by_one else module) is not None


def _names(x: Served) -> Iterator[Finding]:
    if (base := x.base) is None:
        return
    if {"vision_config", "audio_config"} & base.config.keys():
        found = (s.module for s in x.factors if _TOWER.search(s.module))
        why = "only the language model is adapted (read, not run)"
        yield from report(found, why, rules.TOWERS, silent=True)
    lost = [m for m in dict.fromkeys(s.module for s in x.factors) if not _is_found(m, base)]
    # vLLM checks the last component of a name, and then looks up its own names as a whole.
    quiet = [m for m in lost if base.last(m) in base.lasts and ".experts." not in m]
    loud = [m for m in lost if m not in quiet]
    yield from report(loud, "the base has no module of this name", rules.OTHER_BASE)
    if quiet:
        why = f"matches no module of the base; the nearest is {show(base.nearest(quiet[0]))}"
        yield from report(quiet, why, rules.RENAME, silent=True)


def _notes(x: Served) -> list[str]:
    """Says what versions before the one of these rules drop, and which model is not known."""
    patterns = [key for key in PATTERNS if x.fields.get(key)]
    notes = [f"{key} {_OLD}. {rules.PROFILE}, if yours is older." for key in patterns]
    if x.base and x.base.architecture and not x.base.listed:
        notes.append(f"{x.base.architecture} {_UNLISTED}")
    return notes


def _on_tpus(x: Served) -> Iterator[Finding]:
    experts = (s.module for s in x.factors if ".experts." in f".{s.module}.")
    yield from report(experts, "experts have no adapters on TPUs", rules.LEAVE_OUT)
    tables = (s.module for s in x.factors if s.last in EMBEDDINGS)
    why = "on TPUs the embedding and the head are computed without their A and B"
    yield from report(tables, why, rules.LEAVE_OUT, silent=True)


def _notes_on_tpus(x: Served) -> list[str]:
    return [*_notes(x), *([_APART] if x.base and "experts" in x.base.lasts else [])]


RULES = (_configuration, _models, _tensors, _experts, _names, rules.check_shapes)
START = "vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules NAME={dir}"
VLLM = Engine("vLLM", "0.32.0", RULES, START, RANKS, 16, _notes)
TPU_INFERENCE = VLLM._replace(
    title="tpu-inference",
    rules=(*RULES, _on_tpus),
    start=f"MODEL_IMPL_TYPE=vllm {START}",
    notes=_notes_on_tpus,
)
