"""Adapters of many model families as PEFT writes and merges them, and as `export_merged` does.

    python tests/peft_families.py [--only REGEX] [--list]

Each family of `transformers`, tiny and random, is adapted by each configuration that PEFT can write
for it. Printed: how many agree with PEFT's `merge_and_unload` in every bit, or but for the rounding
of the product, how many are refused with which words, and which differ. Needs `interop`.
"""

import argparse
import collections
import copy
import pathlib
import re
import tempfile
import warnings
from typing import Any, NamedTuple

import peft as hf_peft
import torch
import transformers
from safetensors.torch import load_file
from tqdm import tqdm

from jlora import peft

SIZES = {
    "vocab_size": 71,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
}
GPT = {"vocab_size": 71, "n_embd": 32, "n_layer": 2, "n_head": 2, "n_positions": 40}
GPT |= {"bos_token_id": 2, "eos_token_id": 3, "pad_token_id": 1}
VISION = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 48,
    "image_size": 16,
    "patch_size": 8,
    "num_labels": 3,
}
SEQ2SEQ = {
    "vocab_size": 71,
    "d_model": 32,
    "encoder_layers": 1,
    "decoder_layers": 1,
    "encoder_attention_heads": 2,
    "decoder_attention_heads": 2,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "decoder_start_token_id": 3,
}
T5 = {"vocab_size": 71, "d_model": 32, "d_kv": 16, "d_ff": 48, "num_layers": 1, "num_heads": 2}
MOE = {"num_experts": 3, "num_experts_per_tok": 2, "moe_intermediate_size": 20}
LLAMA = {"model_type": "llama"}
MROPE = {"rope_type": "default", "mrope_section": [2, 3, 3], "rope_theta": 1e4}
DECODER = SIZES | {"model_type": "bert", "is_decoder": True, "add_cross_attention": True}
# Family: its class, and the configuration.
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaForCausalLM", SIZES),
    "llama-tied": ("LlamaForCausalLM", SIZES | {"tie_word_embeddings": True}),
    "mistral": ("MistralForCausalLM", SIZES),
    "qwen2": ("Qwen2ForCausalLM", SIZES),
    "qwen3": ("Qwen3ForCausalLM", SIZES | {"head_dim": 16}),
    "gemma": ("GemmaForCausalLM", SIZES | {"head_dim": 16}),
    "gemma2": ("Gemma2ForCausalLM", SIZES | {"head_dim": 16}),
    "phi": ("PhiForCausalLM", SIZES),
    "phi3": ("Phi3ForCausalLM", SIZES),
    "starcoder2": ("Starcoder2ForCausalLM", SIZES),
    "stablelm": ("StableLmForCausalLM", SIZES),
    "cohere": ("CohereForCausalLM", SIZES),
    "olmo": ("OlmoForCausalLM", SIZES),
    "granite": ("GraniteForCausalLM", SIZES),
    "mixtral": ("MixtralForCausalLM", SIZES | {"num_local_experts": 3}),
    "qwen2-moe": ("Qwen2MoeForCausalLM", SIZES | MOE | {"shared_expert_intermediate_size": 24}),
    "qwen3-moe": ("Qwen3MoeForCausalLM", SIZES | MOE | {"head_dim": 16}),
    "gpt2": ("GPT2LMHeadModel", GPT),
    "gptj": ("GPTJForCausalLM", GPT | {"rotary_dim": 4}),
    "gpt-neo": (
        "GPTNeoForCausalLM",
        SIZES | {"num_layers": 2, "num_heads": 2, "attention_types": [[["global", "local"], 1]]},
    ),
    "gpt-neox": ("GPTNeoXForCausalLM", SIZES),
    "opt": ("OPTForCausalLM", SIZES | {"ffn_dim": 48, "word_embed_proj_dim": 32}),
    "bloom": ("BloomForCausalLM", {"vocab_size": 71, "hidden_size": 32, "n_layer": 2, "n_head": 2}),
    "falcon": ("FalconForCausalLM", SIZES),
    "bert": ("BertForSequenceClassification", SIZES | {"num_labels": 3}),
    "bert-mlm": ("BertForMaskedLM", SIZES),
    "roberta": ("RobertaForSequenceClassification", SIZES | {"num_labels": 3}),
    "deberta-v2": ("DebertaV2ForSequenceClassification", SIZES | {"num_labels": 3}),
    "electra": ("ElectraForSequenceClassification", SIZES | {"embedding_size": 24}),
    "distilbert": (
        "DistilBertForSequenceClassification",
        {"vocab_size": 71, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 2},
    ),
    "albert": ("AlbertForSequenceClassification", SIZES | {"embedding_size": 24}),
    "codegen": ("CodeGenForCausalLM", GPT | {"rotary_dim": 4}),
    "t5": ("T5ForConditionalGeneration", T5),
    "bart": ("BartForConditionalGeneration", SEQ2SEQ),
    "whisper": ("WhisperForConditionalGeneration", SEQ2SEQ | {"max_target_positions": 40}),
    "vit": ("ViTForImageClassification", VISION),
    "dinov2": ("Dinov2ForImageClassification", VISION),
    "resnet": (
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1], "num_labels": 3},
    ),
    "clip": (
        "CLIPModel",
        {"text_config": SIZES | {"projection_dim": 32}, "vision_config": VISION},
    ),
}
# Those whose modules `transformers` 5 calls otherwise than it saves them.
RENAMED: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen2-vl": (
        "Qwen2VLForConditionalGeneration",
        {
            "text_config": SIZES | {"rope_parameters": MROPE, "rope_scaling": MROPE},
            "vision_config": {"depth": 2, "embed_dim": 32, "hidden_size": 32, "num_heads": 2},
        },
    ),
    "llava": (
        "LlavaForConditionalGeneration",
        {
            "text_config": SIZES | LLAMA,
            "vision_config": VISION | {"model_type": "clip_vision_model"},
        },
    ),
    "llava-tied": (
        "LlavaForConditionalGeneration",
        {
            "text_config": SIZES | LLAMA | {"tie_word_embeddings": True},
            "vision_config": VISION | {"model_type": "clip_vision_model"},
            "tie_word_embeddings": True,
        },
    ),
    "gemma3-vl": (
        "Gemma3ForConditionalGeneration",
        {
            "text_config": SIZES | {"head_dim": 16},
            "vision_config": VISION,
            "mm_tokens_per_image": 1,
        },
    ),
    "swin": (
        "SwinForImageClassification",
        {"image_size": 16, "patch_size": 2, "embed_dim": 8, "depths": [2, 1], "num_heads": [1, 2]}
        | {"window_size": 2, "num_labels": 3},
    ),
    "segformer": (
        "SegformerForSemanticSegmentation",
        {"hidden_sizes": [8, 8, 16, 16], "depths": [2, 1, 1, 1], "decoder_hidden_size": 16}
        | {"num_attention_heads": [1, 1, 2, 2], "num_labels": 3},
    ),
    "phimoe": ("PhimoeForCausalLM", SIZES | {"num_local_experts": 3, "attention_bias": True}),
    "granitemoe": ("GraniteMoeForCausalLM", SIZES | {"num_local_experts": 3}),
    "qwen3-vl-moe": (
        "Qwen3VLMoeForConditionalGeneration",
        {
            "text_config": SIZES
            | MOE
            | {"head_dim": 16, "rope_scaling": MROPE, "rope_parameters": MROPE},
            "vision_config": {
                "depth": 2,
                "hidden_size": 32,
                "num_heads": 2,
                "intermediate_size": 48,
            }
            | {"out_hidden_size": 32, "deepstack_visual_indexes": [0]},
        },
    ),
    "trocr": (
        "VisionEncoderDecoderModel",
        {"encoder": VISION | {"model_type": "vit"}, "decoder": DECODER},
    ),
}
FAMILIES |= RENAMED
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
        kind: `bits`, `rounding`, `once` (where PEFT adds twice), `refused`, `DIFFERENT`, or `not by
            PEFT`, which could not write or merge it.
        reason: why.
    """

    kind: str
    reason: str = ""


def outcome(
    family: str, configuration: str, folder: pathlib.Path, vocabulary: int | None = None
) -> Outcome:
    """Adapts, saves, merges twice and compares; if asked for, with a resized vocabulary.

    The new rows of the base are then others than those that the adapter was trained with.
    """
    architecture, sizes = FAMILIES[family]
    cls = getattr(transformers, architecture)
    torch.manual_seed(0)
    model = cls(cls.config_class(**copy.deepcopy(sizes))).eval()
    options = {"r": 2, "lora_alpha": 4} | copy.deepcopy(CONFIGURATIONS[configuration])
    model.save_pretrained(folder / "base")
    if vocabulary is not None:
        model = cls.from_pretrained(folder / "base")
        model.resize_token_embeddings(vocabulary, mean_resizing=False)
    try:
        adapted = hf_peft.get_peft_model(model, hf_peft.LoraConfig(**options))
        for name, x in adapted.named_parameters():
            if x.requires_grad:
                generator = torch.Generator().manual_seed(len(name))
                x.data += 0.1 * torch.randn(x.shape, generator=generator)
        adapted.save_pretrained(folder / "a")
        if vocabulary is not None:
            other = cls.from_pretrained(folder / "base")
            other.resize_token_embeddings(vocabulary, mean_resizing=False)
            other.save_pretrained(folder / "base")
        adapted.merge_and_unload().save_pretrained(folder / "theirs")
    except Exception as e:
        return Outcome("not by PEFT", brief(e))
    try:
        peft.export_merged(folder / "base", folder / "a", folder / "ours")
    except ValueError as e:
        return Outcome("refused", brief(e))
    names = ("base", "ours", "theirs")
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


def main() -> None:
    """Runs all, or some."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--only", default="", help="a regular expression for family/configuration")
    parser.add_argument("--list", action="store_true", help="print each outcome")
    args = parser.parse_args()
    warnings.simplefilter("ignore")
    transformers.logging.set_verbosity_error()
    pairs = [(f, c) for f in FAMILIES for c in CONFIGURATIONS if re.search(args.only, f"{f}/{c}")]
    found: dict[tuple[str, str], Outcome] = {}
    for family, configuration in tqdm(pairs, disable=None):
        with tempfile.TemporaryDirectory() as folder:
            found[family, configuration] = outcome(family, configuration, pathlib.Path(folder))
    counts = collections.Counter(x.kind for x in found.values())
    print(f"transformers {transformers.__version__}, PEFT {hf_peft.__version__}: {len(found)}")
    for kind, count in counts.most_common():
        print(f"{count:5} {kind}")
    reasons = collections.Counter(x for x in found.values() if x.kind in ("refused", "DIFFERENT"))
    for (kind, reason), count in reasons.most_common():
        print(f"{count:5} {kind}: {reason}")
    if args.list:
        for (family, configuration), x in found.items():
            print(f"{family}/{configuration}: {x.kind} {x.reason}")


if __name__ == "__main__":
    main()
