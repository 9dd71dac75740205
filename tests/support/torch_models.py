"""Tiny random models of `transformers`, each with the arguments of a call. Needs PyTorch."""

from typing import Any, NamedTuple

import numpy as np
import torch
import transformers

SIZES = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2}
HEADS = {"num_attention_heads": 4}
TEXT = SIZES | HEADS | {"vocab_size": 71, "max_position_embeddings": 40, "pad_token_id": 1}
GROUPED = TEXT | {"num_key_value_heads": 2, "head_dim": 8}
VISION = SIZES | HEADS | {"image_size": 16, "patch_size": 8, "num_channels": 3}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 24}
MLA = {
    "n_routed_experts": 4,
    "n_group": 2,
    "topk_group": 1,
    "first_k_dense_replace": 1,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "num_key_value_heads": 4,
}
LINEAR_ATTENTION = {
    "layer_types": ["linear_attention", "full_attention"],
    "linear_num_key_heads": 2,
    "linear_num_value_heads": 4,
    "linear_key_head_dim": 8,
    "linear_value_head_dim": 8,
}
LAYERS = {"layer_types": ["sliding_attention", "full_attention"]}
LARGER = {"initializer_range": 0.1}  # norms would enlarge the rounding of smaller activations
GEMMA4 = LAYERS | {
    **LARGER,
    "global_head_dim": 16,
    "hidden_size_per_layer_input": 4,
    "vocab_size_per_layer_input": 71,
}
AUDIO = {
    "conv_dim": (16, 16),
    "conv_stride": (5, 2),
    "conv_kernel": (10, 3),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}
WHISPER = {
    "d_model": 32,
    "encoder_layers": 2,
    "decoder_layers": 2,
    "encoder_attention_heads": 4,
    "decoder_attention_heads": 4,
    "encoder_ffn_dim": 48,
    "decoder_ffn_dim": 48,
    "num_mel_bins": 8,
    "max_source_positions": 16,
    "max_target_positions": 16,
    "vocab_size": 71,
    "pad_token_id": 1,
    "bos_token_id": 2,
    "eos_token_id": 3,
    "decoder_start_token_id": 3,
}
T5 = {"vocab_size": 71, "d_model": 32, "d_kv": 8, "d_ff": 48, "num_layers": 2, "num_heads": 4}
MAMBA2 = {
    "vocab_size": 71,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "num_heads": 8,
    "head_dim": 8,
    "state_size": 8,
    "n_groups": 1,
    "chunk_size": 4,
}
STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1], "num_stages": 2, "image_size": 32}

IDS = np.arange(2, 18).reshape(2, 8)  # without the padding token
PIXELS = np.linspace(-1, 1, 2 * 3 * 16 * 16, dtype=np.float32).reshape(2, 3, 16, 16)
LARGE = np.linspace(-1, 1, 2 * 3 * 32 * 32, dtype=np.float32).reshape(2, 3, 32, 32)
SOUND = np.sin(np.arange(2 * 400, dtype=np.float32)).reshape(2, 400)
SPECTRUM = np.sin(np.arange(2 * 8 * 32, dtype=np.float32)).reshape(2, 8, 32)
WITH_IMAGE = np.array([[5, 70, 70, 70, 70, 7, 8], [9, 70, 70, 70, 70, 4, 3]])  # 70 is a patch

PATCHES = np.linspace(-1, 1, 32 * 96, dtype=np.float32).reshape(32, 96)  # two images of 4 × 4
IMAGES = {  # which the model reads, so they are static
    "image_grid_thw": torch.tensor([[1, 4, 4], [1, 4, 4]]),
    "mm_token_type_ids": torch.as_tensor(WITH_IMAGE == 70).int(),
}
QWEN_VISION = {
    "depth": 2,
    "fullatt_block_indexes": [1],
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_heads": 4,
    "out_hidden_size": 32,
    "patch_size": 4,
    "window_size": 8,
}

NO_CACHE = {"use_cache": False}
WORDS = {"input_ids": IDS} | NO_CACHE
MASKED = {"input_ids": IDS}
IMAGE = {"pixel_values": PIXELS}


class Model(NamedTuple):
    """A model of `transformers`.

    Attributes:
        kind: its class.
        fields: the fields of its configuration.
        call: the arguments of a call.
        refused: a pattern of weights of which PEFT or `transformers` refuses adapters, by an error.
    """

    kind: str
    fields: dict[str, Any]
    call: dict[str, Any]
    refused: str = "none"

    @property
    def arrays(self) -> dict[str, np.ndarray]:
        """The arguments that are traced."""
        return {name: x for name, x in self.call.items() if isinstance(x, np.ndarray)}

    @property
    def static(self) -> dict[str, Any]:
        """The other arguments."""
        return {name: x for name, x in self.call.items() if name not in self.arrays}

    def make(self) -> Any:
        """Makes it, with random values in all parameters, also norms and biases."""
        torch.manual_seed(0)
        kind = getattr(transformers, self.kind)
        config = kind.config_class(**self.fields)
        config._attn_implementation = "eager"
        model = kind(config).eval()
        with torch.no_grad():
            for x in model.parameters():
                x += 0.02 * torch.randn_like(x)
        return model


MODELS = {
    "llama": Model("LlamaForCausalLM", GROUPED, WORDS),
    "llama-tied": Model("LlamaForCausalLM", GROUPED | {"tie_word_embeddings": True}, WORDS),
    "qwen2": Model("Qwen2ForCausalLM", GROUPED, WORDS),
    "qwen3": Model("Qwen3ForCausalLM", GROUPED, WORDS),
    "qwen3-moe": Model("Qwen3MoeForCausalLM", GROUPED | EXPERTS | {"num_experts": 4}, WORDS),
    "qwen3-moe, dense": Model(
        "Qwen3MoeForCausalLM",
        GROUPED | EXPERTS | {"num_experts": 4, "mlp_only_layers": [0, 1]},
        WORDS,
        "(gate|up|down)_proj",
    ),
    "qwen3.5": Model("Qwen3_5ForCausalLM", GROUPED | LINEAR_ATTENTION, WORDS),
    "gemma3": Model("Gemma3ForCausalLM", GROUPED | LAYERS, WORDS),
    "gemma4": Model("Gemma4ForCausalLM", GROUPED | GEMMA4, WORDS),
    "gpt-oss": Model("GptOssForCausalLM", GROUPED | EXPERTS | {"num_local_experts": 4}, WORDS),
    "mixtral": Model("MixtralForCausalLM", GROUPED | EXPERTS | {"num_local_experts": 4}, WORDS),
    "deepseek-v3": Model("DeepseekV3ForCausalLM", TEXT | EXPERTS | MLA, WORDS),
    "ernie4.5-moe": Model(
        "Ernie4_5_MoeForCausalLM",
        GROUPED
        | {"moe_num_experts": 4, "moe_k": 2, "moe_intermediate_size": 24}
        | {"moe_num_shared_experts": 1, "moe_layer_start_index": 1},
        WORDS,
    ),
    "qwen3-next": Model(
        "Qwen3NextForCausalLM",
        GROUPED
        | EXPERTS
        | LINEAR_ATTENTION
        | {"num_experts": 4, "shared_expert_intermediate_size": 24, "mlp_only_layers": [0]},
        WORDS,
        "shared_expert_gate",  # of one output, below the rank of the tests
    ),
    "gpt2": Model(
        "GPT2LMHeadModel", {"vocab_size": 71, "n_embd": 32, "n_layer": 2, "n_head": 4}, WORDS
    ),
    "t5": Model("T5ForConditionalGeneration", T5, WORDS | {"decoder_input_ids": IDS[:, :5]}),
    "bert": Model("BertForSequenceClassification", TEXT, MASKED),
    "modernbert": Model("ModernBertForMaskedLM", TEXT | {"global_attn_every_n_layers": 2}, MASKED),
    "vit": Model("ViTForImageClassification", VISION, IMAGE),
    "dinov2": Model("Dinov2ForImageClassification", VISION, IMAGE),
    "siglip": Model("SiglipVisionModel", VISION, IMAGE),
    "clip": Model(
        "CLIPModel",
        {"text_config": TEXT | {"eos_token_id": 3}, "vision_config": VISION, "projection_dim": 16},
        MASKED | IMAGE,
    ),
    "whisper": Model(
        "WhisperForConditionalGeneration",
        WHISPER,
        {"input_features": SPECTRUM, "decoder_input_ids": IDS[:, :5]} | NO_CACHE,
        # Those whose attributes the encoder reads, as PEFT's modules have none, and the table that
        # is tied, of which no merge knows all readers.
        "conv[12]|embed_positions|embed_tokens",
    ),
    # PEFT stores an adapted head only beside an input embedding, which this one has not.
    "wav2vec2": Model("Wav2Vec2ForCTC", TEXT | AUDIO, {"input_values": SOUND}, "lm_head"),
    "wavlm": Model("WavLMModel", TEXT | AUDIO, {"input_values": SOUND}),
    "sam": Model(
        "SamModel",
        {
            "vision_config": VISION
            | {"image_size": 32, "output_channels": 16, "mlp_dim": 48, "window_size": 2}
            | {"global_attn_indexes": [1], "num_pos_feats": 8},
            "prompt_encoder_config": {"hidden_size": 16, "image_size": 32, "patch_size": 8}
            | {"mask_input_channels": 4},
            "mask_decoder_config": {"hidden_size": 16, "mlp_dim": 24, "num_hidden_layers": 2}
            | {"num_attention_heads": 2, "iou_head_hidden_dim": 16},
        },
        {"pixel_values": LARGE, "input_points": np.full((2, 1, 1, 2), 9.0, np.float32)},
    ),
    "esm": Model(
        "EsmForMaskedLM",
        TEXT | {"mask_token_id": 2, "position_embedding_type": "rotary"},
        MASKED,
    ),
    "mamba2": Model("Mamba2ForCausalLM", MAMBA2, WORDS, "lm_head"),
    "llava": Model(
        "LlavaForConditionalGeneration",
        {
            "text_config": GROUPED | {"model_type": "llama"},
            "vision_config": VISION | {"model_type": "clip_vision_model"},
            "image_token_index": 70,
        },
        {"input_ids": WITH_IMAGE, "pixel_values": PIXELS} | NO_CACHE,
    ),
    "qwen2.5-vl": Model(
        "Qwen2_5_VLForConditionalGeneration",
        {
            "text_config": GROUPED | LARGER | {"rope_parameters": {"mrope_section": [1, 1, 2]}},
            "vision_config": QWEN_VISION | LARGER,
            "image_token_id": 70,
        },
        {"input_ids": WITH_IMAGE, "pixel_values": PATCHES} | IMAGES | NO_CACHE,
    ),
    "convnext": Model("ConvNextForImageClassification", STAGES, {"pixel_values": LARGE}),
    "resnet": Model(
        "ResNetForImageClassification",
        {"embedding_size": 8, "hidden_sizes": [8, 16], "depths": [1, 1]},
        {"pixel_values": LARGE},
    ),
    "roberta": Model("RobertaForMaskedLM", TEXT, MASKED),
    "distilbert": Model(
        "DistilBertForMaskedLM",
        {"vocab_size": 71, "dim": 32, "hidden_dim": 48, "n_layers": 2, "n_heads": 4},
        MASKED,
    ),
    "flaubert": Model(  # it asserts that the lengths, whose values it may read, are no longer
        "FlaubertWithLMHeadModel",
        {"vocab_size": 71, "emb_dim": 32, "n_layers": 2, "n_heads": 4, "n_langs": 1},
        MASKED | {"lengths": torch.tensor([8, 5])},
    ),
}
