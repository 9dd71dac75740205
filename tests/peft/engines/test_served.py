"""What vLLM does with adapters, and that `check` says the same. The engine itself is the judge.

Each base is started once, on a CPU, and is given all of its adapters. Needs vLLM and PEFT.
"""

import importlib.util
import json
import os
import pathlib
import re
import subprocess
import sys
import typing
import warnings
from collections.abc import Callable, Iterable
from typing import Any

import pytest

if not importlib.util.find_spec("vllm"):
    pytest.skip("needs vLLM", allow_module_level=True)

import jax
import jax.numpy as jnp
import numpy as np
import peft as hf_peft
import served_models
import torch
import transformers
from models import llama
from peft_files import TENSORS, config_of
from peft_models import read

import jlora
from jlora import LoRA, peft
from jlora.peft.adapter._one_rank import RANKS
from jlora.peft.engines._vllm import EMBEDDINGS
from jlora.peft.engines._vllm import VLLM as ENGINE
from tests.peft.engines.served_worker import PROMPT, STEPS, Answer
from tests.peft.engines.test_serving import (
    Change,
    Fields,
    Tensors,
    holding,
    named,
    of,
    without,
    write,
)

WORKER = pathlib.Path(__file__).with_name("served_worker.py")

SIZES = {"vocab_size": 256, "hidden_size": 128, "intermediate_size": 192, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 64}
TEXT = SIZES | HEADS | {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0}
GPT2 = {"vocab_size": 256, "n_embd": 128, "n_layer": 2, "n_head": 4, "n_positions": 64}
EXPERTS = {"num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 48, "head_dim": 32}
LOCAL = {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 32}
FULL = {"layer_types": ["full_attention"] * 2, "shared_expert_intermediate_size": 64}
GEMMA4 = {
    "top_k_experts": 2,
    "enable_moe_block": True,
    "global_head_dim": 32,
    "layer_types": ["sliding_attention", "full_attention"],
    "hidden_size_per_layer_input": 0,
    "vocab_size_per_layer_input": 256,
}
BASES: dict[str, tuple[str, Fields]] = {
    "llama": ("LlamaForCausalLM", TEXT),
    "qwen2": ("Qwen2ForCausalLM", TEXT | {"tie_word_embeddings": True}),
    "qwen3": ("Qwen3ForCausalLM", TEXT | {"head_dim": 32}),
    "gemma3": ("Gemma3ForCausalLM", TEXT | {"head_dim": 32, "query_pre_attn_scalar": 32}),
    "phi3": ("Phi3ForCausalLM", TEXT),
    "glm": ("GlmForCausalLM", TEXT | {"head_dim": 32}),
    "glm4": ("Glm4ForCausalLM", TEXT | {"head_dim": 32}),
    "gpt2": ("GPT2LMHeadModel", GPT2),
    "classifier": ("LlamaForSequenceClassification", TEXT | {"num_labels": 3}),
    "gemma4": ("Gemma4ForCausalLM", TEXT | {"head_dim": 32} | GEMMA4 | {"enable_moe_block": False}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", TEXT | EXPERTS),
    "qwen3.5-moe": ("Qwen3_5MoeForCausalLM", TEXT | EXPERTS | FULL),
    "gemma4-moe": ("Gemma4ForCausalLM", TEXT | EXPERTS | GEMMA4),
    "gpt-oss": ("GptOssForCausalLM", TEXT | LOCAL),
    "mixtral": ("MixtralForCausalLM", TEXT | LOCAL),
}

# Their kernels are for GPUs: what vLLM loads of experts is compared, not what it answers.
LOADED = {"qwen3-moe", "qwen3.5-moe", "gemma4-moe", "gpt-oss", "mixtral"}

# What PEFT is asked for, with other options than `plain`.
QV = ["q_proj", "v_proj"]
OPTIONS: dict[str, Fields] = {
    "plain": {},
    "all linear": {"target_modules": "all-linear"},
    "rsLoRA": {"use_rslora": True},
    "ranks": {"rank_pattern": {"v_proj": 4}},
    "alphas": {"alpha_pattern": {"v_proj": 12}},
    "both": {"rank_pattern": {"v_proj": 3}, "alpha_pattern": {"q_proj": 5}, "use_rslora": True},
    "a rank of 5": {"r": 5},
    "a rank of 17": {"r": 17},
    "a regular expression": {"target_modules": r".*\.1\.self_attn\.[qv]_proj"},
    "one layer": {"layers_to_transform": [1]},
    "k alone": {"target_modules": ["k_proj"]},
    "up alone": {"target_modules": ["up_proj"]},
    "lm_head": {"target_modules": ["q_proj", "lm_head"]},
    "the head alone": {"target_modules": ["lm_head"]},
    "embed_tokens": {"target_modules": ["q_proj", "embed_tokens"]},
    "fused": {"target_modules": ["qkv_proj", "gate_up_proj"]},
    "all fused": {"target_modules": "all-linear"},
    "fused ranks": {"target_modules": ["qkv_proj"], "rank_pattern": {"1.self_attn.qkv_proj": 3}},
    "gpt2": {"target_modules": ["c_attn"], "fan_in_fan_out": True},
    "score": {"target_modules": ["q_proj", "score"]},
    "DoRA": {"use_dora": True},
    "biases": {"bias": "lora_only"},
    "a bias of B": {"lora_bias": True},
    "a norm in full": {"modules_to_save": ["norm"]},
    "a head in full": {"modules_to_save": ["lm_head"]},
    "rows of tokens": {"trainable_token_indices": {"embed_tokens": [5, 9]}},
    "PiSSA": {"init_lora_weights": "pissa"},
    "OLoRA": {"init_lora_weights": "olora"},
    "orthogonal": {"init_lora_weights": "orthogonal"},
    "aLoRA": {"alora_invocation_tokens": [9, 33]},
    "layers twice": {"layer_replication": [[0, 2], [1, 2]]},
    "experts": {"target_parameters": ["experts.gate_up_proj", "experts.down_proj"]},
    "half of experts": {"target_parameters": ["experts.down_proj"]},
    "ranks above": {"rank_pattern": {"v_proj": 17}},
    "KaSA": {"kasa_config": hf_peft.tuners.lora.config.KasaConfig()},
    "MonteCLoRA": {"monteclora_config": hf_peft.tuners.lora.config.MontecloraConfig()},
}


def each(change: Callable[[str, np.ndarray], Tensors]) -> Change:
    """Other tensors in the place of each, whose memory is what is written."""
    return lambda fields, tensors: (
        fields,
        {k: y.copy() for key, x in tensors.items() for k, y in change(key, x).items()},
    )


def cut(pattern: str, change: Callable[[np.ndarray], np.ndarray]) -> Change:
    """Some tensors changed."""
    return each(lambda key, x: {key: change(x) if re.search(pattern, key) else x})


TABLE = {"A": (8, 300), "B": (128, 8)}
# A change of the files of `plain`.
EDITS = {
    "no rank": without("r"),
    "no alpha": without("lora_alpha"),
    "no targets": without("target_modules"),
    "another kind": of(peft_type="LOHA"),
    "QALoRA": of(use_qalora=True),
    "BD-LoRA": of(use_bdlora={"nblocks": 2}),
    "another rank": of(r=4),
    "bfloat16": cut("", lambda x: x.astype(jnp.bfloat16)),
    "another prefix": named(r"model\.layers", "decoder.layers"),
    "a prefix less": named(r"\.model\.layers", ".layers"),
    "a model within another": named(r"\.model\.layers", ".model.language_model.layers"),
    "other names": named("q_proj", "query"),
    "too many layers": named(r"layers\.1\.", "layers.2."),
    "smaller sizes": cut(r"0.*q_proj\.lora_A", lambda x: x[:, :96]),
    "larger sizes": cut(r"0.*q_proj\.lora_A", lambda x: np.concatenate([x, x], 1)),
    "a lone A": holding(drop=r"0.*q_proj\.lora_B"),
    "nothing": holding(drop="."),
    "a convolution": cut(r"0.*q_proj\.lora_[AB]", lambda x: x[..., None]),
    "a class head": holding({"score.weight": (3, 128)}, modules_to_save=["score"]),
    "positions": holding({f"model.positions.lora_embedding_{x}": s for x, s in TABLE.items()}),
    "more tokens": holding({f"model.embed_tokens.lora_embedding_{x}": s for x, s in TABLE.items()}),
}


def swapped(key: str, x: np.ndarray) -> Tensors:
    """A or B of four experts, as the B or the A of the transposed weights."""
    if ".experts." not in key:
        return {key: x}
    if ".lora_A." in key:
        new = x.reshape(4, -1, x.shape[1]).transpose(2, 1, 0).reshape(x.shape[1], -1)
        return {key.replace("lora_A", "lora_B"): new}
    new = x.reshape(len(x), -1, 4).transpose(2, 1, 0).reshape(-1, len(x))
    return {key.replace("lora_B", "lora_A"): new}


def one_by_one(key: str, x: np.ndarray) -> Tensors:
    """A or B of four experts, as modules of each."""
    if ".experts." not in key:
        return {key: x}
    place, _, rest = key.partition(".experts.")
    if "lora_A" in key:
        experts = [[part] * 2 for part in np.split(x, 4)]
    else:
        experts = [np.split(x.reshape(len(x), -1, 4)[..., i], 2) for i in range(4)]
    names = ["gate_proj", "up_proj"]
    if "base_layer" not in rest:
        experts = [[np.concatenate(x) if "lora_B" in key else x[0]] for x in experts]
        names = ["down_proj"]
    side = "lora_A" if "lora_A" in key else "lora_B"
    return {
        f"{place}.experts.{i}.{name}.{side}.weight": part
        for i, parts in enumerate(experts)
        for name, part in zip(names, parts, strict=True)
    }


EDITS |= {"experts swapped": each(swapped), "experts one by one": each(one_by_one)}
# Rules for JAX's models, and how their adapters are written.
MIXED = (
    LoRA("(query|value|down)/kernel", rank=8),
    LoRA("gate/kernel", rank=4, alpha=4),
)
TABLES = LoRA("embed", rank=3)
VLLM = {"profile": "vllm"}
OURS: dict[str, tuple[tuple[LoRA, ...], Fields]] = {
    "ours": (MIXED, {}),
    "ours for vLLM": (MIXED, VLLM),
    "ours with embeddings": ((*MIXED, TABLES), VLLM),
    "ours in bfloat16": (MIXED, VLLM | {"dtype": jnp.bfloat16}),
    "ours shared by layers": ((LoRA("(query|up)/kernel", rank=4, share="inputs"),), {}),
    "ours on NF4": (MIXED, VLLM | {"scheme": jlora.NF4()}),
}

BY_EXPERTS = "ours shared by experts"
ALSO = " for vLLM"  # an adapter, written with the profile
# Adapters that say what another says.
LIKE = {
    "experts swapped": "experts",
    "experts one by one": "experts",
    "a model within another": "plain",
}

SERVED, REFUSED, IGNORED = "serves it", "refuses it", "changes nothing"
OTHERS = "other numbers"  # than PEFT
VERDICTS: dict[str, dict[str, list[str]]] = {
    "llama": {
        SERVED: [
            *(
                "plain",
                "all linear",
                "rsLoRA",
                "ranks",
                "alphas",
                "both",
                "a rank of 5",
                "bfloat16",
            ),
            *("a regular expression", "one layer", "k alone", "up alone", "lm_head"),
            *("the head alone", "embed_tokens", "orthogonal", *OURS),
        ],
        REFUSED: [
            *("a rank of 17", "ranks above", "DoRA", "biases", "a bias of B", "a norm in full"),
            *("a head in full", "a class head", "rows of tokens", "PiSSA", "OLoRA", "aLoRA"),
            *("layers twice", "KaSA", "MonteCLoRA", "QALoRA", "BD-LoRA", "no rank", "no alpha"),
            *("no targets", "other names", "larger sizes", "a lone A", "nothing"),
            *("a convolution", "positions", "more tokens"),
        ],
        IGNORED: ["another prefix", "a prefix less", "a model within another"],
        OTHERS: ["another kind", "another rank", "too many layers", "smaller sizes"],
    },
    "qwen2": {
        SERVED: ["plain", "all linear", "ours for vLLM"],
        REFUSED: ["lm_head", "embed_tokens", "ours with embeddings"],
    },
    "qwen3": {
        SERVED: ["plain", "all linear", "lm_head", "embed_tokens", "ours with embeddings"],
    },
    "gemma3": {
        SERVED: ["plain", "all linear"],
        REFUSED: ["lm_head", "embed_tokens"],
        IGNORED: ["a prefix less"],
    },
    "phi3": {SERVED: ["fused", "all fused", "fused ranks"]},
    "glm": {SERVED: ["plain", "all linear", "embed_tokens"], REFUSED: ["lm_head"]},
    "glm4": {SERVED: ["plain"], REFUSED: ["all linear", "lm_head", "embed_tokens"]},
    "gpt2": {REFUSED: ["gpt2"]},
    "classifier": {SERVED: ["plain", "score"]},
    "gemma4": {SERVED: ["all linear"], REFUSED: ["embed_tokens"]},
    "qwen3-moe": {
        SERVED: ["experts one by one"],
        REFUSED: ["experts", "experts swapped", "half of experts", "experts for vLLM"],
    },
    "qwen3.5-moe": {SERVED: ["experts one by one"], REFUSED: ["experts", "experts for vLLM"]},
    "gemma4-moe": {SERVED: ["experts one by one"], REFUSED: ["experts", "experts for vLLM"]},
    "gpt-oss": {
        SERVED: ["experts", "experts for vLLM", "experts swapped for vLLM", BY_EXPERTS],
        REFUSED: ["experts swapped", "half of experts", "experts one by one"],
    },
    "mixtral": {IGNORED: ["experts", "experts for vLLM"]},
}


# --------------------------------------------------------------------- bases and their adapters


def make_base(model: str, folder: pathlib.Path) -> pathlib.Path:
    """A tiny one, with random values in all parameters, also norms and biases."""
    torch.manual_seed(0)
    kind, fields = BASES[model]
    made = getattr(transformers, kind)
    base = made(made.config_class(**fields))
    with torch.no_grad():
        for x in base.parameters():
            x += 0.05 * torch.randn_like(x)
    base.save_pretrained(folder / "base")
    return folder / "base"


def open_base(folder: pathlib.Path) -> Any:
    """What PEFT adapts."""
    is_classifier = "Classification" in (folder / "config.json").read_text()
    kind = "AutoModelForSequenceClassification" if is_classifier else "AutoModelForCausalLM"
    return getattr(transformers, kind).from_pretrained(folder, dtype=torch.float32).eval()


def make_adapter(base: pathlib.Path, folder: pathlib.Path, options: Fields) -> None:
    """Of PEFT, random."""
    model = open_base(base)
    is_classifier = hasattr(model, "score")
    task = "SEQ_CLS" if is_classifier else "CAUSAL_LM"
    given = {"r": 8, "lora_alpha": 16, "target_modules": QV} | options
    adapted = hf_peft.get_peft_model(model, hf_peft.LoraConfig(task_type=task, **given))
    with torch.no_grad():
        for name, x in adapted.named_parameters():
            if x.requires_grad:
                x += (0.15 if "lora_" in name else 0.3) * torch.randn_like(x)
    adapted.save_pretrained(folder)


def edit(plain: pathlib.Path, folder: pathlib.Path, change: Any) -> None:
    """The files of another, changed."""
    write(folder, *change(config_of(plain), read(plain / TENSORS)))


def save_ours(base: pathlib.Path, folder: pathlib.Path, rules: Any, options: Fields) -> None:
    """Of jlora, for the same base in JAX."""
    config = llama.read(base)
    model, names = llama.Llama(config, dtype=jnp.float32), llama.names(config)
    variables = peft.load_base(base, llama.shapes(config), names)
    scheme, dtype = options.get("scheme"), options.get("dtype", jnp.float32)
    ids = jnp.array([PROMPT])
    lora = jlora.transform(model.apply, *rules)
    if scheme is not None:
        variables = jlora.quantize(variables, scheme, sites=lora.sites(variables, ids))
    frozen, adapter = lora.init(jax.random.key(0), variables, ids)
    leaves, tree = jax.tree.flatten(adapter)
    keys = jax.random.split(jax.random.key(1), len(leaves))
    moved = [x + 0.15 * jax.random.normal(k, x.shape) for k, x in zip(keys, leaves, strict=True)]
    adapter = jax.tree.unflatten(tree, [x.astype(dtype) for x in moved])
    peft.save(folder, frozen, adapter, names, profile=options.get("profile"))


def save_by_experts(folder: pathlib.Path) -> None:
    """Of jlora, of all experts of gpt-oss together: all have the same A, or the same B."""

    def model(params: Any, x: jax.Array) -> jax.Array:  # (d)
        def layer(x: jax.Array, p: Any) -> tuple[jax.Array, None]:
            each = jnp.einsum("i,eio->eo", x, p["gate_up"])[:, ::2]
            return jnp.einsum("eo,eod->d", each, p["down"]), None

        return jax.lax.scan(layer, x, params)[0]

    place, form = "model.layers.{}.mlp.experts", {"transposed": True, "is_transposed": True}
    names = [peft.Name(x, place, "leio", f"{x}_proj", **form) for x in ("gate_up", "down")]
    params = {"gate_up": jnp.ones((2, 4, 128, 384)), "down": jnp.ones((2, 4, 192, 128))}
    rules = LoRA("gate_up", rank=3, share="inputs"), LoRA("down", rank=3, share="outputs")
    frozen, adapter = jlora.transform(model, *rules).init(jax.random.key(0), params, jnp.ones(128))
    leaves, tree = jax.tree.flatten(adapter)
    moved = [x + 0.15 * jax.random.normal(jax.random.key(i), x.shape) for i, x in enumerate(leaves)]
    peft.save(folder, frozen, jax.tree.unflatten(tree, moved), names, profile="vllm")


def make(base: pathlib.Path, folder: pathlib.Path, name: str) -> pathlib.Path:
    """Writes the adapter of this name into its folder, after the one that it is made of."""
    place = folder / name
    if place.exists():
        return place
    if name.endswith(ALSO):
        peft.write(place, peft.read(make(base, folder, name.removesuffix(ALSO))), "vllm")
    elif name in OPTIONS:
        make_adapter(base, place, OPTIONS[name])
    elif name in EDITS:
        edit(make(base, folder, LIKE.get(name, "plain")), place, EDITS[name])
    elif name == BY_EXPERTS:
        save_by_experts(place)
    else:
        save_ours(base, place, *OURS[name])
    return place


# ----------------------------------------------------------------------------------- answers


def experts_of(model: Any) -> torch.Tensor:
    """gate_up_proj and down_proj of the first layer, the outputs first."""
    found = {key.rpartition(".")[2]: x for key, x in model.state_dict().items() if ".0." in key}
    pair = [found["gate_up_proj"], found["down_proj"]]
    if model.config.model_type == "gpt_oss":
        pair = [x.mT for x in pair]
    return torch.cat([x.flatten() for x in pair])


@torch.no_grad()
def answer(model: Any, loads: bool) -> Answer:
    """PEFT's: greedy tokens with their log-probabilities, the logits of classes, or weights."""
    ids = list(PROMPT)
    if loads:
        return {"experts": experts_of(model).tolist()}
    if hasattr(model, "score") or "Classification" in type(model).__name__:
        return {"logits": model(input_ids=torch.tensor([ids])).logits[0].tolist()}
    logs = []
    for _ in range(STEPS):
        each = model(input_ids=torch.tensor([ids]), use_cache=False).logits[0, -1].log_softmax(-1)
        ids.append(int(each.argmax()))
        logs.append(float(each[ids[-1]]))
    return {"tokens": ids[len(PROMPT) :], "logs": logs}


def answer_by_peft(base: pathlib.Path, folder: pathlib.Path, loads: bool) -> Answer | None:
    """None if PEFT itself takes no such files."""
    with warnings.catch_warnings():
        warnings.filterwarnings("error", "Found missing adapter keys")
        try:
            model = hf_peft.PeftModel.from_pretrained(open_base(base), folder).eval()
            return answer(model.merge_and_unload() if loads else model, loads)
        except Exception:
            return None


def is_close(one: Answer, other: Answer) -> bool:
    """The same tokens, and log-probabilities equal to 1e-4."""
    if one.get("tokens") != other.get("tokens"):
        return False
    [key] = one.keys() - {"tokens"}
    return np.allclose(one[key], other[key], atol=1e-4, rtol=0)


def judge(found: Answer | str, base: Answer, wanted: Answer | None) -> str:
    """What the engine does with an adapter."""
    if isinstance(found, str):
        return REFUSED
    if is_close(found, base):
        return IGNORED
    return SERVED if wanted is not None and is_close(found, wanted) else OTHERS


def run(
    worker: pathlib.Path, base: pathlib.Path, adapters: Iterable[pathlib.Path] = (), **options: Any
) -> dict[str, Answer | str]:
    """The answers of an engine."""
    out = base.with_name("out.json")
    command = [sys.executable, worker, base, out, *adapters]
    environment = os.environ | {"SERVED_OPTIONS": json.dumps(options)}
    subprocess.run(list(map(str, command)), check=True, env=environment)
    return json.loads(out.read_text())


def ask(
    folder: pathlib.Path,
    model: str,
    names: Iterable[str],
    *,
    engine: str = "vllm",
    worker: pathlib.Path = WORKER,
    **options: Any,
) -> tuple[dict[str, str], dict[str, str]]:
    """What the engine does with adapters of a base, and what `check` says that it does."""
    base, adapters, loads = make_base(model, folder), folder / "adapters", model in LOADED
    given = [make(base, adapters, name) for name in names]
    answers = run(worker, base, given, loads=loads, **options)
    ours = answer(open_base(base), loads)
    if loads:
        for x in answers.values():
            if isinstance(x, dict):
                x["experts"] = np.add(x["experts"], ours["experts"])
    assert model == "gpt2" or is_close(answers[""], ours)
    found, said = {}, {}
    for name, path in zip(names, given, strict=True):
        like = name.removesuffix(ALSO)
        like = make(base, adapters, LIKE.get(like, like))
        found[name] = judge(answers[name], ours, answer_by_peft(base, like, loads))
        findings = peft.check(path, engine, base=base).findings
        loud = any(not x.silent for x in findings)
        said[name] = REFUSED if loud else IGNORED if findings else SERVED
    return found, said


@pytest.mark.parametrize("model", BASES)
def test_verdicts(model: str, tmp_path: pathlib.Path) -> None:
    """`check` gives that of the engine."""
    wanted = {name: verdict for verdict, names in VERDICTS[model].items() for name in names}
    found, said = ask(tmp_path, model, list(wanted))
    assert found == wanted
    assert said == {name: IGNORED if x == OTHERS else x for name, x in wanted.items()}


# ------------------------------------------- adapters that load and change nothing, or never load


def test_vllm_41754(tmp_path: pathlib.Path) -> None:
    """Adapters of Gemma 4 with the names of the model for images, on its language model."""
    names = ["plain", "a model within another", "another prefix"]
    found, said = ask(tmp_path, "gemma4", names)
    assert found == said == {names[0]: SERVED, names[1]: SERVED, names[2]: IGNORED}


@pytest.mark.parametrize("model", ["qwen3-moe", "qwen3.5-moe", "gemma4-moe"])
def test_vllm_47088(model: str, tmp_path: pathlib.Path) -> None:
    """Experts together, of a model that reads them one by one: what the remedy says is right."""
    names = ["experts", "experts for vLLM"]
    found, said = ask(tmp_path, model, names, enable_mixed_moe_lora_format=True)
    assert set(found.values()) == {SERVED}
    assert set(said.values()) == {REFUSED}  # without that option


def test_vllm_52194(tmp_path: pathlib.Path) -> None:
    """A and B of experts exchanged, as PEFT before 0.21 wrote them: the profile turns them."""
    names = ["experts", "experts swapped", "experts swapped for vLLM"]
    found, said = ask(tmp_path, "gpt-oss", names)
    assert found == said == {names[0]: SERVED, names[1]: REFUSED, names[2]: SERVED}


def test_models() -> None:
    """What the engine's classes declare is what `check` reads; it knows no other embeddings."""
    found = served_models.ask()
    assert found == json.loads(served_models.FILE.read_text())
    assert found["version"] == ENGINE.version
    assert {name for group in found["groups"] for name in group.get("embeddings", ())} == {
        *EMBEDDINGS
    }


def test_ranks() -> None:
    """Those of the server's option."""
    from vllm.config.lora import MaxLoRARanks

    assert typing.get_args(MaxLoRARanks) == RANKS
