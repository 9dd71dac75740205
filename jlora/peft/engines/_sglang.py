"""SGLang, by `sglang.srt.lora`: tensors go by the number of their layer and the end of a name."""

import collections
import re
from collections.abc import Iterator

from .._file import read_json, shown
from ..adapter._config import LIMIT, STARTS
from ..adapter._select import Names
from . import _rules as rules
from ._engine import Engine, Finding, Served, Side, register
from ._rules import is_fused, some

SILENT = ("alora_invocation_tokens", "layer_replication", "use_bdlora", "use_qalora")
# The modules that it has buffers for, by the ends of their names.
TARGETS = {
    *("q_proj", "k_proj", "v_proj", "qkv_proj", "o_proj", "out_proj"),
    *("gate_proj", "up_proj", "gate_up_proj", "down_proj", "fc1_latent_proj", "fc2_latent_proj"),
    *("q_a_proj", "kv_a_proj_with_mqa", "q_b_proj", "kv_b_proj", "wq_b", "wk", "weights_proj"),
    *("in_proj", "in_proj_qkvz", "qkvr", "wo_ud", "embed_tokens", "lm_head"),
}
EMBEDDINGS = ("embed_tokens", "lm_head")
_FROZEN = tuple(f"{name}.base_layer.weight" for name in EMBEDDINGS)
# What it packs into one, and what of that a layer must have beside a module.
_PACKED = (
    {"q_proj", "k_proj", "v_proj", "qkv_proj"},
    {"gate_proj", "up_proj", "gate_up_proj"},
    {"q_a_proj", "kv_a_proj_with_mqa"},
)
_WITH = {"q_proj": "v_proj", "k_proj": "q_proj", "v_proj": "q_proj", "up_proj": "gate_proj"}
_ADDED = "added_tokens.json"
_LAYER = re.compile(r"layers\.(\d{1,9})\.")
_EXPERT = re.compile(r"experts\.\d+\.")
_SCALE = "is not read: the scale is lora_alpha / r everywhere"
_RANK = "is not read: the rank is `r` everywhere"
_UNKNOWN = "it has no buffers for a module of that name"


def _layer(name: str) -> int | None:
    found = _LAYER.search(name)
    return int(found[1]) if found else None


def _limit(x: Served) -> Iterator[Finding]:
    if x.max_lora_rank is not None and x.rank > x.max_lora_rank:
        yield rules.above(x.rank, x.max_lora_rank, x.rank)


def _targets(x: Served) -> Iterator[Finding]:
    listed = x.fields.get("target_modules")
    if listed in ("all", "all-linear"):
        return
    if not isinstance(listed, list):
        remedy = "List the modules by the ends of their names, as jlora.peft.save does"
        yield Finding("target_modules", "must be a list of names", remedy, False)
    elif odd := [name for name in listed if name.rpartition(".")[2] not in TARGETS]:
        yield Finding(f"target_modules {some(odd)}", _UNKNOWN, rules.LEAVE_OUT, False)


def _tokens(x: Served) -> Iterator[Finding]:
    size = x.base.number("vocab_size") if x.base else None
    if size is None or not (x.source.folder / _ADDED).exists():
        return
    added = read_json(x.source, _ADDED, LIMIT)
    if new := [token for token, i in added.items() if type(i) is int and i >= size]:
        why = f"adds tokens to the {size} of the base"
        remedy = f"Remove {_ADDED}, if the adapter does without them, or {rules.MERGED}"
        yield Finding(f"{_ADDED} {some(new)}", why, remedy, False)


def _keys(x: Served) -> Iterator[Finding]:
    if taken := [key for key in x.others if _layer(key) is not None]:
        yield Finding(some(taken), "neither A nor B, is taken for a B", rules.LEAVE_OUT, False)
    if lost := [k for k in x.others if _layer(k) is None and not k.endswith(_FROZEN)]:
        yield Finding(some(lost), "neither A nor B, is left out", rules.LEAVE_OUT, True)


def _modules(x: Served) -> Iterator[Finding]:
    inside = [s for s in x.factors if _layer(s.module) is not None]
    outside = [s for s in x.factors if _layer(s.module) is None]
    if odd := [s.module for s in inside if s.last not in TARGETS or is_fused(s)]:
        yield Finding(some(odd), _UNKNOWN, rules.LEAVE_OUT, False)
    if lost := [s.module for s in outside if s.last not in EMBEDDINGS]:
        why = "is in no `layers.N`, and neither embed_tokens nor lm_head"
        yield Finding(some(lost), why, rules.MERGE, True)
    if not isinstance(listed := x.fields.get("target_modules"), list):
        return
    named = {name.rpartition(".")[2] for name in listed}
    named |= {name for pack in _PACKED if pack & named for name in pack}
    why, remedy = "is not listed in `target_modules`", "Add the last part of its name to the list"
    if unlisted := [s.module for s in inside if s.last in TARGETS - named]:
        yield Finding(some(unlisted), why, remedy, False)
    if unlisted := [s.module for s in outside if s.last in set(EMBEDDINGS) - named]:
        yield Finding(some(unlisted), why, remedy, True)


def _together(x: Served) -> Iterator[Finding]:
    groups = _groups(x)
    for name, other in _WITH.items():
        alone = (own for (i, n), own in groups.items() if n == name and (i, other) not in groups)
        if lone := [side.module for own in alone for side in own]:
            why = f"is packed with {other}, which its layer has no A and B for"
            yield Finding(some(lone), why, f"Adapt both and train again, or {rules.MERGED}", False)
    if twice := [own for own in groups.values() if len(own) > 1]:
        other = shown(twice[0][1].module)
        why = f"is taken for {other}, of the same layer and name"
        yield Finding(some(own[0].module for own in twice), why, rules.MERGE, True)


def _groups(x: Served) -> dict[tuple[int, str], list[Side]]:
    """The A's that it takes for one module's: by layer, expert, and the end of a name."""
    found = collections.defaultdict[tuple[int, str], list[Side]](list)
    for s in x.factors:
        layer, expert = _layer(s.module), _EXPERT.search(s.module)
        if layer is not None and s.side == "A" and not is_fused(s):
            found[layer, (expert[0] if expert else "") + s.last].append(s)
    return found


def _base(x: Served) -> Iterator[Finding]:
    if x.base is None:
        return
    layers = {s.module: at for s in x.factors if (at := _LAYER.search(s.module))}
    count = x.base.number("num_hidden_layers")
    if odd := [m for m, at in layers.items() if count is not None and int(at[1]) >= count]:
        yield Finding(some(odd), f"the base has {count} layers", rules.OTHER_BASE, False)
    names = Names("." + name for name in x.base.modules)
    if lost := [m for m, at in layers.items() if not names.end_in("." + m[at.start() :])]:
        yield Finding(some(lost), "the base has no such module", rules.OTHER_BASE, True)


register(
    Engine(
        "sglang",
        "SGLang",
        "0.5.23",
        (
            rules.is_lora(),
            rules.needs("peft_type", "r", "lora_alpha", "target_modules"),
            rules.off("use_dora"),
            rules.off(*SILENT, silent=True),
            rules.starts(*STARTS, silent=True),
            *rules.empty(_SCALE, "use_rslora", "alpha_pattern"),
            *rules.empty(_RANK, "rank_pattern"),
            rules.unread("use_dora", *SILENT),
            _limit,
            _targets,
            _tokens,
            _keys,
            rules.present(silent=True),
            rules.paired,
            rules.matrices,
            rules.ranks(lambda x, module: x.rank, rules.PROFILE),
            _modules,
            _together,
            _base,
            rules.fits(),
        ),
        "python -m sglang.launch_server --model-path {base} --enable-lora --max-lora-rank {rank} "
        "--lora-paths NAME={dir}",
    )
)
