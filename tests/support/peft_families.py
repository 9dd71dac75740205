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

TIED = {"tie_word_embeddings": True}
# The models of `transformers`, tiny, some of them twice, with other fields; version 5 calls many
# modules otherwise than it saves them.
_CLASSES = """
    LlamaForCausalLM LlamaForCausalLM-tied MistralForCausalLM Qwen2ForCausalLM Qwen3ForCausalLM
    GemmaForCausalLM Gemma2ForCausalLM PhiForCausalLM Phi3ForCausalLM Starcoder2ForCausalLM
    StableLmForCausalLM CohereForCausalLM OlmoForCausalLM GraniteForCausalLM MixtralForCausalLM
    Qwen2MoeForCausalLM Qwen3MoeForCausalLM GptOssForCausalLM DeepseekV3ForCausalLM
    Llama4ForCausalLM GPT2LMHeadModel GPTJForCausalLM GPTNeoForCausalLM GPTNeoXForCausalLM
    OPTForCausalLM BloomForCausalLM FalconForCausalLM BertForSequenceClassification BertForMaskedLM
    RobertaForSequenceClassification DebertaV2ForSequenceClassification
    ElectraForSequenceClassification DistilBertForSequenceClassification
    AlbertForSequenceClassification CodeGenForCausalLM T5ForConditionalGeneration
    BartForConditionalGeneration WhisperForConditionalGeneration ViTForImageClassification
    Dinov2ForImageClassification ResNetForImageClassification CLIPModel Gemma4ForCausalLM
    Gemma4ForCausalLM-experts Qwen3_5ForCausalLM Qwen3_5MoeForCausalLM
    Qwen2VLForConditionalGeneration LlavaForConditionalGeneration Gemma3ForConditionalGeneration
    Gemma4ForConditionalGeneration Qwen3_5ForConditionalGeneration
    Qwen3_5MoeForConditionalGeneration Llama4ForConditionalGeneration SwinForImageClassification
    SegformerForSemanticSegmentation NemotronHForCausalLM AltCLIPModel PhimoeForCausalLM
    GraniteMoeForCausalLM Qwen3VLMoeForConditionalGeneration NomicBertForMaskedLM
    JinaEmbeddingsV3ForSequenceClassification GteForMaskedLM HrmTextForCausalLM
    Dinov2ForImageClassification-gated Kimi_K25ForConditionalGeneration
    MiniMaxM3SparseForConditionalGeneration VisionEncoderDecoderModel
"""
# What the configurations of some have beside small sizes.
_BOTH = {"layer_types": ["linear_attention", "full_attention"]}
_FIELDS: dict[str, dict[str, Any]] = {
    "LlamaForCausalLM-tied": TIED,
    "Gemma4ForCausalLM-experts": {
        "enable_moe_block": True,
        "num_experts": 3,
        "moe_intermediate_size": 20,
    },
    "Qwen3_5ForCausalLM": _BOTH,
    "Qwen3_5MoeForCausalLM": _BOTH,
    "Dinov2ForImageClassification-gated": {"use_swiglu_ffn": True},
    "VisionEncoderDecoderModel": {"decoder": {"is_decoder": True, "add_cross_attention": True}},
}
_HERE = set(dir(transformers))  # of the installed version; `hasattr` would import each
if transformers.__version__ < "5":  # which has other defaults for their parts
    _HERE -= {"Qwen3VLMoeForConditionalGeneration", "VisionEncoderDecoderModel"}
FAMILIES = [name for name in _CLASSES.split() if name.partition("-")[0] in _HERE]


def make_model(family: str, **fields: Any) -> Any:
    """A tiny random model, with other fields in its configuration."""
    torch.manual_seed(0)
    cls = getattr(transformers, family.partition("-")[0])
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
