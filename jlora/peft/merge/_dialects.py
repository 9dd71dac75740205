"""The modules that `transformers` 5 renames.

It renames modules when it reads a checkpoint, and back when it saves one. An adapter has the names
of the modules in memory.
"""

import re
from collections.abc import Collection, Iterator

Dialect = tuple[tuple[str, str], ...]

# Names in old checkpoints, which are renamed on loading.
OLD: Dialect = (
    (r"LayerNorm\.gamma$", "LayerNorm.weight"),
    (r"LayerNorm\.beta$", "LayerNorm.bias"),
)
_MLP: Dialect = (
    (r"\.intermediate\.dense\.", ".mlp.fc1."),
    (r"(\.\d+)\.output\.dense\.", r"\1.mlp.fc2."),
)
_OUTPUT = (r"\.attention\.output\.dense\.", ".attention.o_proj.")
_VISION: Dialect = (
    (r"\.attention\.attention\.([qkv])(?:uery|ey|alue)\.", r".attention.\1_proj."),
    _OUTPUT,
    *_MLP,
)
_HIERARCHICAL: Dialect = (
    (r"\.attention\.self\.([qkv])(?:uery|ey|alue)\.", r".attention.\1_proj."),
    _OUTPUT,
)
# LLaVA, Gemma 3, PaliGemma and others that contain a language model.
_LLAVA: Dialect = (
    (r"^(language|text)_model\.model\.", r"model.\1_model."),
    (r"^(language|text)_model\.lm_head\.", "lm_head."),
    (r"^(?!model\.|lm_head\.)", "model."),
)
# Encoders with the names of FlashAttention.
_FLASH: Dialect = (
    (r"\.(attn|mixer)\.Wqkv\.", ".self_attn.{q,k,v}_proj."),
    (r"\bencoder\.layers\.", "layers."),
    (r"\bemb_ln\.", "embeddings.LayerNorm."),
    (r"\.norm1\.", ".post_attention_layernorm."),
    (r"\.norm2\.", ".post_mlp_layernorm."),
)
# Replacements, in order, from a checkpoint's names to the modules of `transformers` 5. Every
# checkpoint of a dialect has a name that matches its first pattern. Braces list the modules that
# each have an equal part of a tensor's rows, in order; `~` as in `split`.
DIALECTS: tuple[Dialect, ...] = (
    ((r"\.block_sparse_moe\.", ".mlp."),),  # Mixtral, MiniMax
    ((r"\.block_sparse_moe\.gate\.", ".mlp.router."), (r"\.block_sparse_moe\.", ".mlp.")),  # PhiMoE
    (  # GraniteMoE
        (r"\.block_sparse_moe\.input_linear\.weight$", ".block_sparse_moe.experts.gate_up_proj"),
        (r"\.block_sparse_moe\.output_linear\.weight$", ".block_sparse_moe.experts.down_proj"),
        (r"\.block_sparse_moe\.router\.layer\.", ".block_sparse_moe.router."),
    ),
    ((r"^embed_out\.", "lm_head."),),  # GPT-NeoX
    (  # DINOv2
        *_VISION,
        (r"\.mlp\.weights_in\.", ".mlp.{gate,up}_proj."),
        (r"\.mlp\.weights_out\.", ".mlp.down_proj."),
    ),
    ((r"\bencoder\.layer\.", "layers."), *_VISION),  # ViT, DeiT, BEiT
    (  # Swin
        *_HIERARCHICAL,
        (
            r"\.self\.relative_position_bias_table$",
            ".relative_position_bias.relative_position_bias_table",
        ),
        *_MLP,
    ),
    (  # Segformer
        (r"\bencoder\.block\.(\d+)\.", r"stages.\1.blocks."),
        (r"\bencoder\.(patch_embeddings|layer_norm)\.(\d+)\.", r"stages.\2.\1."),
        *_HIERARCHICAL,
        (r"\.attention\.self\.sr\.", ".attention.sequence_reduction.sequence_reduction."),
        (r"\.attention\.self\.layer_norm\.", ".attention.sequence_reduction.layer_norm."),
        (r"\.mlp\.dense([12])\.", r".mlp.fc\1."),
        (r"\.layer_norm_1\.", ".layernorm_before."),
        (r"\.layer_norm_2\.", ".layernorm_after."),
        (r"^decode_head\.linear_c\.", "decode_head.linear_projections."),
    ),
    _LLAVA,
    (*_LLAVA, (r"^model\.(\w+_tower)\.vision_model\.", r"model.\1.")),  # read from the hub
    (  # Qwen2-VL, Qwen2.5-VL and Omni
        (r"^(thinker\.)?visual\.", "model.visual."),
        (r"^(thinker\.)?audio_tower\.", "model.audio_tower."),
        (r"^(thinker\.)?model\.(?!(language_model|visual|audio_tower)\.)", "model.language_model."),
        (r"^thinker\.", ""),
    ),
    (  # DeepSeek V4
        (r"\.attn\.wq_a\.", ".attn.q_a_proj."),
        (r"\.indexer\.compressor\.", ".compressor.indexer."),
        (r"\.indexer\.weights_proj\.", ".compressor.indexer.scorer.weights_proj."),
        (r"\.indexer\.wq_b\.", ".compressor.indexer.q_b_proj."),
        (r"\.wq_b\.", ".q_b_proj."),
        (r"\.wkv\.", ".kv_proj."),
        (r"\.wgate\.", ".gate_proj."),
        (r"\.wo_([ab])\.", r".o_\1_proj."),
        (r"\.attn\.", ".self_attn."),
        (r"\.ffn\.gate\.bias$", ".mlp.gate.e_score_correction_bias"),
        (r"\.ffn\.", ".mlp."),
        (r"\.shared_experts\.w1\.", ".shared_experts.gate_proj."),
        (r"\.shared_experts\.w2\.", ".shared_experts.down_proj."),
        (r"\.shared_experts\.w3\.", ".shared_experts.up_proj."),
        (r"^(model\.)?embed\.", r"\1embed_tokens."),
        (r"^head\.", "lm_head."),
    ),
    (  # Nomic
        (r"\.mlp\.fc11\.", ".mlp.up_proj."),
        (r"\.mlp\.fc12\.", ".mlp.gate_proj."),
        (r"\.mlp\.fc2\.", ".mlp.down_proj."),
        (r"\.attn\.out_proj\.", ".self_attn.o_proj."),
        *_FLASH,
    ),
    ((r"\.mixer\.out_proj\.", ".self_attn.o_proj."), *_FLASH),  # Jina v3
    (  # GTE
        (r"\.attention\.qkv_proj\.", ".self_attn.{q,k,v}_proj."),
        (r"\.attention\.o_proj\.", ".self_attn.o_proj."),
        (r"\.mlp\.up_gate_proj\.", ".mlp.{up,gate}_proj."),
        (r"\bencoder\.layer\.", "layers."),
        (r"\.attn_ln\.", ".post_attention_layernorm."),
        (r"\.mlp_ln\.", ".post_mlp_layernorm."),
        (r"^lm_head\.norm\.", "lm_head.layer_norm."),
    ),
    (  # HRM
        (r"\.attn\.gqkv_proj\.", ".self_attn.{gate,q,k,v}_proj."),
        (r"\.attn\.o_proj\.", ".self_attn.o_proj."),
        (r"\.mlp\.gate_up_proj\.", ".mlp.{gate,up}_proj."),
    ),
    (  # Kimi K2.5
        (r"(\.blocks\.\d+)\.wqkv\.", r"\1.attn.{q~,k~,v}_proj."),
        (r"\.encoder\.blocks\.(\d+)\.wo\.", r".layers.\1.attn.proj."),
        (r"\.encoder\.blocks\.(\d+)\.(mlp\.fc|norm)1\.", r".layers.\1.\g<2>2."),
        (r"\.encoder\.blocks\.(\d+)\.(mlp\.fc|norm)0\.", r".layers.\1.\g<2>1."),
        (r"^vision_tower\.encoder\.", "vision_tower."),
        (r"\.blocks\.", ".layers."),
        (r"^mm_projector\.proj\.0\.", "mm_projector.in_proj."),
        (r"^mm_projector\.proj\.2\.", "mm_projector.out_proj."),
        *_LLAVA,
    ),
    (  # MiniMax M3
        (r"\.block_sparse_moe\.", ".mlp."),
        (r"^patch_merge_mlp\.", "multi_modal_projector.merge_"),
        (r"\.vision_model\.(encoder\.)?", "."),
        (r"\.index_([qk])_", r".indexer.\1_"),
        *_LLAVA,
    ),
    (  # DETR, RT-DETR
        (r"\bout_proj\.", "o_proj."),
        (r"\blayers\.(\d+)\.fc([12])\.", r"layers.\1.mlp.fc\2."),
        (r"\bencoder\.encoder\.(\d+)\.layers\.", r"encoder.aifi.\1.layers."),
        (r"\bbackbone\.conv_encoder\.", "backbone."),
    ),
)


def find_dialects(names: Collection[str]) -> Iterator[Dialect]:
    """Yields the dialects that a checkpoint with `names` may use, the old names first."""
    yield OLD
    lines = "\n".join(names)
    for dialect in DIALECTS:
        if re.search(dialect[0][0], lines, re.MULTILINE):
            yield (*OLD, *dialect)
