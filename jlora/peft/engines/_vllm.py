"""vLLM, whose rules `tests/test_served.py` compares with the engine itself; vLLM on TPUs."""

import re
from collections.abc import Iterator

from .._file import show
from ..adapter._config import STARTS
from ..adapter._one_rank import RANKS
from ..adapter._roles import HEADS
from . import _findings as rules
from ._engine import Base, Engine, Finding, Served
from ._findings import is_fused, report

# Features that it refuses by name.
FEATURES = (
    *("use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication"),
    *("use_bdlora", "use_qalora"),
)
EMBEDDINGS = ("embed_tokens", "lm_head", "wte")
# Models that vLLM was asked about, without the ends of their names: whether it adapts embeddings.
WITH_EMBEDDINGS = ["Exaone", "Granite", "Llama", "Mixtral", "Phi3", "Qwen3", "Qwen3Moe", "Qwen3_5"]
LAYERS_ONLY = ["Gemma", "Gemma2", "Gemma3", "Gemma4", "GptOss", "Mistral", "Qwen2", "Qwen2Moe"]
NOTHING = ["Bloom", "Falcon", "GPT2LMHeadModel", "GPTJ", "Gemma3n", "Mamba", "Mamba2", "StableLm"]
# Models that read the adapters of all experts together; the others read them one by one.
FUSED = (
    *("GptOssForCausalLM", "Qwen3OmniMoeForConditionalGeneration"),
    *("Qwen3VLMoeForConditionalGeneration", "Qwen3_5MoeForConditionalGeneration"),
)
# Frozen values, which it skips, and the heads of classifiers.
_SKIPPED = (".embed_tokens.base_layer.weight", ".lm_head.base_layer.weight")
_HEAD = re.compile(rf"(.*\.)?({'|'.join(HEADS)})\.(weight|bias)")
# Models of images and sounds, next to a language model.
_TOWER = re.compile(r"(^|\.)(visual|vision_\w+|audio_\w+|multi_modal_projector)\.")
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
    if others := [name for name in saved if name not in HEADS]:
        why = f"only {' and '.join(HEADS)} may be saved in full"
        yield from report(others, why, rules.LEAVE_OUT, of="modules_to_save")
    elif not _classifies(x):
        why = "only classifiers may have a head in full"
        yield from report(saved, why, rules.LEAVE_OUT, of="modules_to_save")


def _classifies(x: Served) -> bool:
    if x.base is None:
        return x.fields.get("task_type") in ("SEQ_CLS", "TOKEN_CLS")
    return "Classification" in x.base.architecture


def _models(x: Served) -> Iterator[Finding]:
    name, _, kind = x.base.architecture.partition("For") if x.base else ("", "", "")
    if name in NOTHING:
        yield Finding(name, "vLLM adapts no weights of this model", rules.MERGE, False)
    if name in LAYERS_ONLY or kind == "ConditionalGeneration":
        found = (s.module for s in x.factors if s.last in EMBEDDINGS)
        why = f"neither the embedding nor the head of {name} is adapted"
        yield from report(found, why, rules.LEAVE_OUT)


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


def _experts(x: Served) -> Iterator[Finding]:
    """Checks experts that are adapted together. down_proj wraps gate_up_proj, whose depth is 1."""
    found = dict.fromkeys(s.module for s in x.factors if is_fused(s))
    gate_up, down = ({m: x.pairs.get((m, i), {}) for m in found} for i in (1, 0))
    lone = (m for m in found if not (gate_up[m] and down[m]))
    why = "only one of gate_up_proj and down_proj is adapted; expected both"
    yield from report(lone, why, rules.LEAVE_OUT)
    columns = {m: pair["A"].shape[-1] for m, pair in gate_up.items() if "A" in pair}
    rows = {m: pair["B"].shape[0] for m, pair in down.items() if "B" in pair}
    other = (m for m in columns.keys() & rows.keys() if columns[m] != rows[m])
    yield from report(sorted(other), "has the outputs in A, not the inputs", rules.PROFILE)
    if x.base and x.base.architecture not in FUSED:
        why = "adapts all experts together, but vLLM reads those of this model one by one"
        yield from report(filter(x.base.called, found), why, rules.MIXED)


def _is_found(module: str, base: Base) -> bool:
    """Whether a base has a module, or all experts in one place, where vLLM finds each of them."""
    place = module.partition(".experts.")[0] + ".experts"
    is_apart = f"{base.called(place)}.0" in base.modules
    one_by_one = base.architecture not in FUSED and not is_apart and ".experts." in module
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
    quiet = [m for m in lost if m.rpartition(".")[2] in base.lasts and ".experts." not in m]
    loud = [m for m in lost if m not in quiet]
    yield from report(loud, "the base has no module of this name", rules.OTHER_BASE)
    if quiet:
        why = f"matches no module of the base; the nearest is {show(base.nearest(quiet[0]))}"
        yield from report(quiet, why, rules.RENAME, silent=True)


def notes(x: Served) -> list[str]:
    """Says what versions before the one of these rules drop, and what no run has shown."""
    patterns = [key for key in ("rank_pattern", "alpha_pattern") if x.fields.get(key)]
    found = [f"{key} {_OLD}. {rules.PROFILE}, if yours is older." for key in patterns]
    name = x.base.architecture.partition("For")[0] if x.base else "this model"
    if any(s.last in EMBEDDINGS for s in x.factors) and name not in WITH_EMBEDDINGS + LAYERS_ONLY:
        found.append(f"not run: whether it adapts the embedding and the head of {name}.")
    return found


def _experts_on_tpus(x: Served) -> list[Finding]:
    found = (s.module for s in x.factors if ".experts." in f".{s.module}.")
    return report(found, "experts have no adapters on TPUs", rules.LEAVE_OUT)


RULES = (
    *(_configuration, _models, _tensors, _experts, _names),
    lambda x: rules.check_shapes(x, silent=True),
)
START = "vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules NAME={dir}"
VLLM = Engine("vllm", "vLLM", "0.32.0", RULES, START, RANKS, 16, notes)
TPU_INFERENCE = VLLM._replace(
    name="tpu-inference",
    title="tpu-inference",
    version="0.32.0 (read, not run)",
    rules=(*RULES, _experts_on_tpus),
    start=f"MODEL_IMPL_TYPE=vllm {START}",
)
