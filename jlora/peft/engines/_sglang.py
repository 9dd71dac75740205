"""SGLang, by `sglang.srt.lora`: it reads tensors by the layer's number and the end of the name."""

import collections
import re
from collections.abc import Iterator

from .._file import show
from ..adapter._config import STARTS
from ..adapter._roles import Names
from . import _findings as rules
from ._engine import Engine, Finding, Served
from ._findings import is_fused, report

SILENT = ("alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")
# The modules that it has buffers for, by their last components.
TARGETS = {
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "out_proj"),
    *("gate_proj", "up_proj", "gate_up_proj", "down_proj", "fc1_latent_proj", "fc2_latent_proj"),
    *("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj", "wq_b", "wk", "weights_proj"),
    *("in_proj", "in_proj_qkvz", "qkvr", "wo_ud", "embed_tokens", "lm_head"),
}
EMBEDDINGS = ("embed_tokens", "lm_head")
# The modules that it packs into one.
_PACKED = (
    {"q_proj", "k_proj", "v_proj", "qkv_proj"},
    {"gate_proj", "up_proj", "gate_up_proj"},
    {"q_a_proj", "kv_a_proj_with_mqa"},
)
_LAYER = re.compile(r"layers\.(\d{1,9})\.")
_EXPERT = re.compile(r"experts\.\d+\.")
_SCALE = "is not read: the scale is lora_alpha / r everywhere"
_RANK = "is not read: the rank is `r` everywhere"
_UNKNOWN = "SGLang has no buffers for a module of this name"


def _layer(name: str) -> int | None:
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def _configuration(x: Served) -> Iterator[Finding]:
    yield from rules.require_lora(x)
    yield from rules.require_fields(x, "peft_type", "r", "lora_alpha", "target_modules")
    yield from rules.forbid(x, "use_dora")
    yield from rules.forbid(x, *SILENT, why="is not read", silent=True)
    yield from rules.check_start(x, *STARTS, silent=True)
    unread = {"remedy": rules.PROFILE, "silent": True}
    yield from rules.forbid(x, "use_rslora", "alpha_pattern", why=_SCALE, **unread)
    yield from rules.forbid(x, "rank_pattern", why=_RANK, **unread)
    yield from rules.forbid_unread(x, "use_dora", *SILENT)
    if x.max_lora_rank is not None and x.rank > x.max_lora_rank:
        yield rules.report_rank(x.rank, x.max_lora_rank, x.rank)


def _tensors(x: Served) -> Iterator[Finding]:
    taken = (key for key in x.others if _layer(key) is not None)
    yield from report(taken, "is neither A nor B, but read as a B", rules.LEAVE_OUT)
    lost = (key for key in x.others if _layer(key) is None and not key.endswith(rules.FROZEN))
    yield from report(lost, "is neither A nor B, and is ignored", rules.LEAVE_OUT, silent=True)
    yield from rules.check_pairs(x, silent=True)
    yield from rules.check_ranks(x, lambda _: x.rank, rules.PROFILE)


def _modules(x: Served) -> Iterator[Finding]:
    inside = [s for s in x.factors if _layer(s.module) is not None]
    outside = [s for s in x.factors if _layer(s.module) is None]
    odd = (s.module for s in inside if s.last not in TARGETS or is_fused(s))
    yield from report(odd, _UNKNOWN, rules.LEAVE_OUT)
    lost = (s.module for s in outside if s.last not in EMBEDDINGS)
    why = "is in no `layers.N`, and neither embed_tokens nor lm_head"
    yield from report(lost, why, rules.MERGE, silent=True)
    if not isinstance(listed := x.fields.get("target_modules"), list):
        return
    named = {name.rpartition(".")[2] for name in listed}
    named |= {name for pack in _PACKED if pack & named for name in pack}
    why, remedy = "is not listed in `target_modules`", "Add its last component to the list"
    unlisted = (s.module for s in inside if s.last in TARGETS - named)
    yield from report(unlisted, why, remedy)
    unlisted = (s.module for s in outside if s.last in set(EMBEDDINGS) - named)
    yield from report(unlisted, why, remedy, silent=True)


def _mistaken(x: Served) -> Iterator[Finding]:
    """Finds modules of one layer, expert and last component, which are the same module to it."""
    groups = collections.defaultdict[tuple[int | None, str, str], list[str]](list)
    for s in x.factors:
        if _layer(s.module) is not None and s.side == "A" and not is_fused(s):
            groups[_layer(s.module), "".join(_EXPERT.findall(s.module)), s.last].append(s.module)
    if twice := [own for own in groups.values() if len(own) > 1]:
        why = f"is mistaken for {show(twice[0][1])}, which has the same layer and last component"
        yield from report((own[0] for own in twice), why, rules.MERGE, silent=True)


def _base(x: Served) -> Iterator[Finding]:
    if x.base is None:
        return
    names = Names("." + name for name in x.base.modules)
    layers = ((s.module, at.start()) for s in x.factors if (at := _LAYER.search(s.module)))
    lost = (m for m, at in layers if not names.end_in("." + m[at:]))
    yield from report(lost, "the base has no such module", rules.OTHER_BASE, silent=True)


RULES = (_configuration, _tensors, _modules, _mistaken, _base, rules.check_shapes)
_SERVER = "python -m sglang.launch_server --model-path {base} --enable-lora"
START = f"{_SERVER} --max-lora-rank {{rank}} --lora-paths NAME={{dir}}"
SGLANG = Engine("SGLang", "0.5.23 (read, not run)", RULES, START)
