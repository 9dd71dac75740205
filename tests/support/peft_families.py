"""Adapters of many model families as PEFT writes and merges them, and as `export_merged` does.

Each family of `transformers`, tiny and random, is adapted by each configuration that PEFT can write
for it. Needs `interop`.
"""

import copy
import pathlib
import re
from typing import Any, NamedTuple

import peft as hf_peft
import tiny_models
import torch
import transformers
from safetensors.torch import load_file

from jlora import peft

# By whatever names a family has for them.
_NAMES = {
    71: "vocab_size",
    48: "intermediate_size hidden_dim d_ff ffn_dim encoder_ffn_dim decoder_ffn_dim",
    40: "max_position_embeddings max_target_positions",
    32: "hidden_size d_model dim",
    24: "shared_expert_intermediate_size",
    20: "moe_intermediate_size",
    16: "d_kv image_size",
    8: "patch_size",
    3: "num_local_experts num_experts num_labels eos_token_id decoder_start_token_id",
    2: "num_hidden_layers num_layers n_layers num_attention_heads num_heads n_heads "
    "encoder_attention_heads decoder_attention_heads num_experts_per_tok bos_token_id",
    1: "encoder_layers decoder_layers num_key_value_heads pad_token_id",
}
SIZES = {name: size for size, names in _NAMES.items() for name in names.split()}
HEADS = {"head_dim": 16}
TIED = {"tie_word_embeddings": True}
# The models of `transformers`, tiny; version 5 calls many modules otherwise than it saves them.
_FAMILIES = {
    "llama": "LlamaForCausalLM",
    "llama-tied": "LlamaForCausalLM",
    "mistral": "MistralForCausalLM",
    "qwen2": "Qwen2ForCausalLM",
    "qwen3": "Qwen3ForCausalLM",
    "gemma": "GemmaForCausalLM",
    "gemma2": "Gemma2ForCausalLM",
    "phi": "PhiForCausalLM",
    "phi3": "Phi3ForCausalLM",
    "starcoder2": "Starcoder2ForCausalLM",
    "stablelm": "StableLmForCausalLM",
    "cohere": "CohereForCausalLM",
    "olmo": "OlmoForCausalLM",
    "granite": "GraniteForCausalLM",
    "mixtral": "MixtralForCausalLM",
    "qwen2-moe": "Qwen2MoeForCausalLM",
    "qwen3-moe": "Qwen3MoeForCausalLM",
    "gpt-oss": "GptOssForCausalLM",
    "deepseek-v3": "DeepseekV3ForCausalLM",
    "llama4": "Llama4ForCausalLM",
    "gpt2": "GPT2LMHeadModel",
    "gptj": "GPTJForCausalLM",
    "gpt-neo": "GPTNeoForCausalLM",
    "gpt-neox": "GPTNeoXForCausalLM",
    "opt": "OPTForCausalLM",
    "bloom": "BloomForCausalLM",
    "falcon": "FalconForCausalLM",
    "bert": "BertForSequenceClassification",
    "bert-mlm": "BertForMaskedLM",
    "roberta": "RobertaForSequenceClassification",
    "deberta-v2": "DebertaV2ForSequenceClassification",
    "electra": "ElectraForSequenceClassification",
    "distilbert": "DistilBertForSequenceClassification",
    "albert": "AlbertForSequenceClassification",
    "codegen": "CodeGenForCausalLM",
    "t5": "T5ForConditionalGeneration",
    "bart": "BartForConditionalGeneration",
    "whisper": "WhisperForConditionalGeneration",
    "vit": "ViTForImageClassification",
    "dinov2": "Dinov2ForImageClassification",
    "resnet": "ResNetForImageClassification",
    "clip": "CLIPModel",
    "gemma4": "Gemma4ForCausalLM",
    "gemma4-moe": "Gemma4ForCausalLM",
    "qwen3.5": "Qwen3_5ForCausalLM",
    "qwen3.5-moe": "Qwen3_5MoeForCausalLM",
    "qwen2-vl": "Qwen2VLForConditionalGeneration",
    "llava": "LlavaForConditionalGeneration",
    "gemma3-vl": "Gemma3ForConditionalGeneration",
    "gemma4-vl": "Gemma4ForConditionalGeneration",
    "qwen3.5-vl": "Qwen3_5ForConditionalGeneration",
    "qwen3.5-vl-moe": "Qwen3_5MoeForConditionalGeneration",
    "llama4-vl": "Llama4ForConditionalGeneration",
    "swin": "SwinForImageClassification",
    "segformer": "SegformerForSemanticSegmentation",
    "nemotron-h": "NemotronHForCausalLM",
    "altclip": "AltCLIPModel",
    "phimoe": "PhimoeForCausalLM",
    "granitemoe": "GraniteMoeForCausalLM",
    "qwen3-vl-moe": "Qwen3VLMoeForConditionalGeneration",
    "nomic": "NomicBertForMaskedLM",
    "jina-v3": "JinaEmbeddingsV3ForSequenceClassification",
    "gte": "GteForMaskedLM",
    "hrm": "HrmTextForCausalLM",
    "dinov2-giant": "Dinov2ForImageClassification",
    "kimi-k2.5": "Kimi_K25ForConditionalGeneration",
    "minimax-m3": "MiniMaxM3SparseForConditionalGeneration",
    "trocr": "VisionEncoderDecoderModel",
}
# What the configurations of some have beside small sizes.
_BOTH = {"layer_types": ["linear_attention", "full_attention"]}
_FIELDS: dict[str, dict[str, Any]] = {
    "llama-tied": TIED,
    "gemma4-moe": {"enable_moe_block": True, "num_experts": 3, "moe_intermediate_size": 20},
    "qwen3.5": _BOTH,
    "qwen3.5-moe": _BOTH,
    "dinov2-giant": {"use_swiglu_ffn": True},
    "trocr": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
}
if transformers.__version__ < "5":  # which has other defaults for their parts
    del _FAMILIES["qwen3-vl-moe"], _FAMILIES["trocr"]
_CLASSES = frozenset(dir(transformers))  # of the installed version; `hasattr` would import each
FAMILIES = {name: cls for name, cls in _FAMILIES.items() if cls in _CLASSES}


def make_model(family: str, **fields: Any) -> Any:
    """A tiny random model, with other fields in its configuration."""
    torch.manual_seed(0)
    cls = getattr(transformers, FAMILIES[family])
    return tiny_models.make_model(cls, _FIELDS.get(family, {}) | fields, is_untied=False)


EXPERTS = ["experts.gate_up_proj", "experts.down_proj"]
# Configuration: the arguments of LoraConfig.
CONFIGURATIONS: dict[str, dict[str, Any]] = {
    "all-linear": {"target_modules": "all-linear"},
    "attention": {
        "target_modules": r".*\.(q_proj|query|q|c_attn|query_key_value|qkv_proj|q_lin|query_proj)"
    },
    "mlp": {
        "target_modules": r".*(?:fc1|fc2|c_fc|dense|dense_h_to_4h|down_proj|lin1|wi|wo|fc_in|ffn)"
    },
    "not-last": {"target_modules": r"^(?!.*\.1\.).*\.(q_proj|query|c_attn|q|query_key_value)"},
    "ranks": {"target_modules": "all-linear", "rank_pattern": {"q_proj": 5, "query": 1, "idle": 9}},
    "alphas": {"target_modules": "all-linear", "alpha_pattern": {r".*\.0\..*": 1}, "r": 3},
    "rslora": {"target_modules": "all-linear", "use_rslora": True},
    "bias": {"target_modules": "all-linear", "bias": "all"},
    "lora-bias": {"target_modules": "all-linear", "bias": "lora_only"},
    "embeddings": {
        "target_modules": r".*(embed_tokens|wte|word_embeddings|shared|embed_in|q_proj|query)"
    },
    "tied": {
        "target_modules": ["embed_tokens", "wte", "shared", "word_embeddings"],
        "ensure_weight_tying": True,
    },
    "saved-head": {"target_modules": "all-linear", "modules_to_save": ["lm_head", "classifier"]},
    "saved-embeddings": {
        "target_modules": r".*(q_proj|query|q|c_attn|query_key_value)",
        "modules_to_save": ["embed_tokens", "wte", "shared", "word_embeddings"],
        "ensure_weight_tying": True,
    },
    "experts": {"target_modules": ["q_proj"], "target_parameters": EXPERTS},
    "layers": {"target_modules": ["q_proj", "query", "c_attn"], "layers_to_transform": [1]},
    "excluded": {"target_modules": "all-linear", "exclude_modules": r".*\.1\..*"},
    "negative": {"target_modules": "all-linear", "lora_alpha": -2},
    "dora": {"target_modules": "all-linear", "use_dora": True},
    "dora-embeddings": {
        "target_modules": r".*(embed_tokens|word_embeddings|position_embeddings|wpe|embed_in)",
        "use_dora": True,
    },
    "tokens": {"target_modules": "all-linear", "trainable_token_indices": [5, 1]},
    "head": {"target_modules": ["lm_head", "q_proj", "qkv_proj", "c_attn", "convolution"]},
    "saved-norms": {"target_modules": "all-linear", "modules_to_save": ["normalization", "norm"]},
    "bias-of-b": {"target_modules": "all-linear", "lora_bias": True},
    "replicated": {"target_modules": "all-linear", "layer_replication": [[0, 2], [1, 2]]},
}


class Outcome(NamedTuple):
    """What became of an adapter.

    Attributes:
        kind: `bits`, `rounding`, `once` (where PEFT adds twice), `untied` (a head that PEFT's merge
            would change with the embedding: by logits), `refused`, `DIFFERENT`, or `not by PEFT`,
            which could not write or merge it.
        reason: why.
    """

    kind: str
    reason: str = ""


def adapt(model: Any, folder: pathlib.Path, **options: Any) -> Any:
    """PEFT's adapter of a model, with noise on all that is trained, which is saved."""
    config = hf_peft.LoraConfig(**{"r": 2, "lora_alpha": 4} | copy.deepcopy(options))
    adapted = hf_peft.get_peft_model(model, config)
    for name, x in adapted.named_parameters():
        if x.requires_grad:
            generator = torch.Generator().manual_seed(len(name))
            x.data += 0.1 * torch.randn(x.shape, generator=generator)
    adapted.save_pretrained(folder)
    return adapted


def outcome(family: str, configuration: str, folder: pathlib.Path) -> Outcome:
    """Adapts, saves, merges twice and compares."""
    model = make_model(family)
    cls = type(model)
    model.save_pretrained(folder / "base")
    try:
        adapted = adapt(model, folder / "a", **CONFIGURATIONS[configuration])
        adapted.merge_and_unload().save_pretrained(folder / "theirs")
    except Exception as e:
        return Outcome("not by PEFT", brief(e))
    try:
        peft.export_merged(folder / "base", folder / "a", folder / "ours")
    except ValueError as e:
        return Outcome("refused", f"{brief(e)} {str(e).splitlines()[-1]}")
    return compare_logits(cls, folder) if is_untied(folder) else compare(folder)


def is_untied(folder: pathlib.Path) -> bool:
    """Whether a merge wrote tensors that the base lacks."""
    base, ours = (load_file(folder / name / "model.safetensors") for name in ("base", "ours"))
    return ours.keys() > base.keys()


def compare_logits(cls: Any, folder: pathlib.Path) -> Outcome:
    """By the logits of what PEFT has unmerged."""
    ids = torch.arange(12)[None]
    adapted = hf_peft.PeftModel.from_pretrained(cls.from_pretrained(folder / "base"), folder / "a")
    merged = cls.from_pretrained(folder / "ours")
    inputs = {"input_ids": ids}
    if merged.main_input_name == "input_features":
        shape = (1, merged.config.num_mel_bins, 2 * merged.config.max_source_positions)
        inputs = {"input_features": torch.rand(shape), "decoder_input_ids": ids}
    with torch.no_grad():
        ours, theirs = (model.eval()(**inputs).logits for model in (merged, adapted))
    far = (ours - theirs).abs().max() > 1e-5 * theirs.abs().max()
    return Outcome("DIFFERENT", "logits") if far else Outcome("untied")


def compare(folder: pathlib.Path, ours: str = "ours") -> Outcome:
    """By the checkpoints in a folder: `base`, ours, and PEFT's, `theirs`."""
    names = ("base", ours, "theirs")
    return compared(*(load_file(folder / name / "model.safetensors") for name in names))


def compared(base: dict[str, Any], ours: dict[str, Any], theirs: dict[str, Any]) -> Outcome:
    """By all tensors that both have; a tied one may be stored once."""
    changed = {k for k in ours if not torch.equal(ours[k], base[k])}
    if not changed or not changed & theirs.keys():
        return Outcome("DIFFERENT", "nothing is changed, or what has other names in PEFT's")
    names = ours.keys() & theirs.keys()
    unequal = [k for k in names if not torch.equal(ours[k], theirs[k])]
    far = [k for k in unequal if not near(ours[k], theirs[k])]
    if far and all(near(ours[k], (theirs[k] + base[k]) / 2) for k in far):
        return Outcome("once", "PEFT adds ΔW to a shared weight for each module that has it")
    if far:
        return Outcome("DIFFERENT", f"{len(far)} tensors, such as {min(far)}")
    return Outcome("rounding" if unequal else "bits")


def near(x: Any, y: Any) -> bool:
    return x.shape == y.shape and bool((x - y).abs().max() <= 1e-6 * y.abs().max())


def brief(error: Exception) -> str:
    """The first problem, without names."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    line = next((x for x in lines if not x.startswith("`")), lines[0] if lines else repr(error))
    return re.sub(r"\([\d, ]+\)|\d+", "N", re.sub(r"[\w.]+\.(?=\w+:)", "", line))[:150]
