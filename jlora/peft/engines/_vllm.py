"""vLLM, and vLLM on TPUs: `tests/peft/engines` compares the rules with the engines."""

import re
from collections.abc import Iterable, Iterator

from ..._errors import shorten, show
from ..adapter._config import METHODS, STARTS, find_features
from ..adapter._one_rank import RANKS
from ..adapter._patterns import PATTERNS
from ..adapter._roles import HEADS
from ._engine import Base, Engine, Finding, Served

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
# Features that it refuses by name.
FEATURES = ["use_dora", "lora_bias", "alora_invocation_tokens", "layer_replication"]
FEATURES += ["use_bdlora", "use_qalora"]
EMBEDDINGS = ("embed_tokens", "lm_head", "wte")
# Frozen values beside the A and B of an embedding or a head, which are skipped.
FROZEN = ("embed_tokens.base_layer.weight", "lm_head.base_layer.weight")
# Fields that matter only in training.
_TRAINING = ("velora_config", "corda_config", "loftq_config", "lora_ga_config")
# The heads of classifiers.
_HEAD = re.compile(rf"(.*\.)?({'|'.join(HEADS)})\.(weight|bias)")
# Models of images and sounds, next to a language model.
_TOWER = re.compile(r"(^|\.)(visual|vision_\w+|audio_\w+|multi_modal_projector)\.")
_APART = "with experts it starts only with LORA_MODULE_PATH=q_proj,k_proj,v_proj,o_proj."
_UNLISTED = "is no model of vLLM 0.32: it is run by transformers, if at all"
_OLD = "is not read before vLLM 0.32, where all modules have `r` and `lora_alpha`"


def _report(
    names: Iterable[str], why: str, remedy: str, *, of: str = "", silent: bool = False
) -> list[Finding]:
    """Reports all `names` as one finding, if there are any; `of` is a field or a file."""
    if not (first := list(dict.fromkeys(names))):
        return []
    more = f" and {len(first) - 1} more" if len(first) > 1 else ""
    return [Finding(f"{of} {show(first[0])}{more}".lstrip(), why, remedy, silent)]


def _configuration(x: Served) -> Iterator[Finding]:
    fields = x.fields
    if (method := fields.get("peft_type")) not in (None, "LORA"):
        yield Finding("peft_type", f"{shorten(method)} is not LORA", WITHOUT, True)
    for key in ("r", "lora_alpha", "target_modules"):
        if key not in fields:
            yield Finding(key, "is missing in adapter_config.json", AGAIN, False)
    refused = {key: fields[key] for key in FEATURES if fields.get(key)}
    for key, value in (refused | find_features(fields)).items():
        if key not in _TRAINING:
            remedy = f"Train without it, or {MERGED}" if key in METHODS else WITHOUT
            why = "is not supported" if key in FEATURES else "is not read"
            yield Finding(show(key), f"{shorten(value)} {why}", remedy, key not in FEATURES)
    if (bias := fields.get("bias")) not in (None, "none"):
        yield Finding("bias", f"{shorten(bias)} is not supported", LEAVE_OUT, False)
    start = fields.get("init_lora_weights")
    if isinstance(start, str) and start.lower() not in (*STARTS, "lora_ga"):
        why = f"{shorten(start)} changes the base model, but the original is served"
        yield Finding("init_lora_weights", why, CONVERT, False)
    rank = max([x.rank, *(fields.get("rank_pattern") or {}).values()])
    if rank > RANKS[-1]:
        remedy = f"Lower it: jlora.arithmetic.truncate(adapter, {RANKS[-1]})"
        yield Finding("r", f"{rank} is above {RANKS[-1]}, the largest rank", remedy, False)
    elif rank > x.max_lora_rank:
        least = next(r for r in RANKS if r >= rank)
        option = f"--max-lora-rank {least}, and check again with the same option"
        why = f"{rank} is above --max-lora-rank {x.max_lora_rank}"
        yield Finding("r", why, f"Start the server with {option}", False)
    kind = x.base.architecture if x.base else str(x.fields.get("task_type") or "no task_type")
    heads = HEADS if "Classification" in kind or kind in ("SEQ_CLS", "TOKEN_CLS") else ()
    others = (name for name in fields.get("modules_to_save") or [] if name not in heads)
    why = f"only the head of a classifier, {' or '.join(HEADS)}, may be saved in full; got {kind!r}"
    yield from _report(others, why, LEAVE_OUT, of="modules_to_save")


def _models(x: Served) -> Iterator[Finding]:
    if (base := x.base) is None:
        return
    if not base.model.adapts:
        why = "vLLM adapts no weights of this model"
        yield Finding(base.architecture, why, MERGE, False)
        return
    others = {*EMBEDDINGS} - {*base.model.embeddings}
    found = (s.module for s in x.factors if base.last(s.module) in others)
    yield from _report(found, "vLLM does not adapt it in this model", LEAVE_OUT)
    found = (s.module for s in x.factors if base.last(s.module) in base.model.parts_only)
    why = "vLLM takes adapters of its parts only, which this model has fused"
    yield from _report(found, why, LEAVE_OUT)


def _tensors(x: Served) -> Iterator[Finding]:
    saves = bool(x.fields.get("modules_to_save"))
    odd = (k for k in x.others if not k.endswith(FROZEN) and not (saves and _HEAD.fullmatch(k)))
    yield from _report(odd, "is neither A nor B, nor a classifier's head", LEAVE_OUT)
    if not x.factors:
        yield Finding("adapter_model.safetensors", "has no A and B", AGAIN, False)
    lone = (s.key for pair in x.pairs.values() if len(pair) == 1 for s in pair.values())
    yield from _report(lone, "is without its A or B", AGAIN)
    odd = (s.key for s in x.factors if len(s.shape) != 2)
    yield from _report(odd, "A and B must be matrices", LEAVE_OUT)
    plain = (s for s in x.factors if len(s.shape) == 2 and not s.is_fused)
    if odd := [s for s in plain if s.shape[s.side == "B"] != x.ranks[s.module]]:
        why = f"has shape {odd[0].shape}, but is read with rank {x.ranks[odd[0].module]}"
        yield from _report((s.key for s in odd), why, AGAIN, silent=True)
    odd = (s.module for s in x.factors if s.table and s.last not in EMBEDDINGS)
    why = f"only the embeddings {', '.join(EMBEDDINGS)} may be adapted"
    yield from _report(odd, why, LEAVE_OUT)


def _experts(x: Served) -> Iterator[Finding]:
    """Checks experts that are adapted together. down_proj wraps gate_up_proj, whose depth is 1."""
    found = dict.fromkeys(s.module for s in x.factors if s.is_fused)
    gate_up, down = ({m: x.pairs.get((m, i), {}) for m in found} for i in (1, 0))
    lone = (m for m in found if not (gate_up[m] and down[m]))
    yield from _report(lone, "only one of gate_up_proj and down_proj is adapted", LEAVE_OUT)
    columns = {m: pair["A"].shape[-1] for m, pair in gate_up.items() if "A" in pair}
    rows = {m: pair["B"].shape[0] for m, pair in down.items() if "B" in pair}
    other = (m for m in columns.keys() & rows.keys() if columns[m] != rows[m])
    yield from _report(sorted(other), "has the outputs in A, not the inputs", PROFILE)
    if x.base and not x.base.model.joint_experts:
        why = "adapts all experts together, but vLLM reads those of this model one by one"
        yield from _report(filter(x.base.called, found), why, MIXED)


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
        yield from _report(found, why, TOWERS, silent=True)
    lost = [m for m in dict.fromkeys(s.module for s in x.factors) if not _is_found(m, base)]
    # vLLM checks the last component of a name, and then looks up its own names as a whole.
    quiet = [m for m in lost if base.last(m) in base.lasts and ".experts." not in m]
    loud = [m for m in lost if m not in quiet]
    yield from _report(loud, "the base has no module of this name", OTHER_BASE)
    if quiet:
        why = f"matches no module of the base; the nearest is {show(base.nearest(quiet[0]))}"
        yield from _report(quiet, why, RENAME, silent=True)


def _shapes(x: Served) -> list[Finding]:
    """Requires B·A to have the shape of the base's weight. A smaller one is loaded silently."""
    wrong = list[tuple[str, tuple[int, ...], tuple[int, ...], bool]]()
    for (module, _), pair in x.pairs.items():
        theirs = x.base.shape(module) if x.base else ()
        if len(pair) == len(theirs) == 2 and all(len(s.shape) == 2 for s in pair.values()):
            ours = (pair["B"].shape[0], pair["A"].shape[1])
            if ours not in (theirs, theirs[::-1]):
                wrong.append((module, ours, theirs, pair["A"].table))
    if not wrong:
        return []
    _, ours, theirs, table = wrong[0]
    why = f"A and B are for a weight of shape {ours}, but the base's has shape {theirs}"
    is_smaller = not table and ours[0] <= theirs[0] and ours[1] <= theirs[1]
    return _report((m for m, *_ in wrong), why, OTHER_BASE, silent=is_smaller)


def _notes(x: Served) -> list[str]:
    """Says what versions before the one of these rules drop, and which model is not known."""
    patterns = [key for key in PATTERNS if x.fields.get(key)]
    notes = [f"{key} {_OLD}. {PROFILE}, if yours is older." for key in patterns]
    if x.base and x.base.architecture and not x.base.is_listed:
        notes.append(f"{x.base.architecture} {_UNLISTED}")
    return notes


def _on_tpus(x: Served) -> Iterator[Finding]:
    experts = (s.module for s in x.factors if ".experts." in f".{s.module}.")
    yield from _report(experts, "experts have no adapters on TPUs", LEAVE_OUT)
    tables = (s.module for s in x.factors if s.last in EMBEDDINGS)
    why = "on TPUs the embedding and the head are computed without their A and B"
    yield from _report(tables, why, LEAVE_OUT, silent=True)


def _notes_on_tpus(x: Served) -> list[str]:
    return [*_notes(x), *([_APART] if x.base and "experts" in x.base.lasts else [])]


RULES = (_configuration, _models, _tensors, _experts, _names, _shapes)
START = "vllm serve {base} --enable-lora --max-lora-rank {rank} --lora-modules NAME={dir}"
VLLM = Engine("vLLM", "0.32.0", RULES, START, RANKS, 16, _notes)
TPU_INFERENCE = VLLM._replace(
    title="tpu-inference",
    rules=(*RULES, _on_tpus),
    start=f"MODEL_IMPL_TYPE=vllm {START}",
    notes=_notes_on_tpus,
)
