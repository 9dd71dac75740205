"""Name tables for the package `gemma` of Google DeepMind.

`GEMMA3` is that of Gemma 3's text models (`Gemma3ForCausalLM` of `transformers`), and of Gemma 2 in
9B and 27B (`Gemma2ForCausalLM`); `GEMMA2_2B` is that of Gemma 2 in 2B, whose `gating_einsum` lies
otherwise. `GEMMA4` and `GEMMA4_EXPERTS` are those of Gemma 4's text models (`Gemma4ForCausalLM`).
Tested with gemma 4.0.1, transformers 5.24 and PEFT 0.21.

gemma 4.0.1 chooses experts after `pre_ffw_norm`, `transformers` before that norm. So the outputs of
a model with experts differ, with an adapter or without, unless the scale of this norm is constant.

Keys and values are one leaf here, as are gate and up; and q, k and v where there are as many heads
of each. PEFT adapts each by an A and a B of its own, as do the rules

    LoRA(r"kv_einsum/w|gating_einsum", slots=Slots(2, (0, 1)))
    LoRA(r"qkv_einsum/w", slots=Slots(3, (0, 1, 2)))

of which a model has a leaf for one or the other. An A that they share, as without `slots`, is
written for each. Norms need no change: both libraries multiply by 1 + scale.
"""

from collections.abc import Mapping

from .._names import Name


def decoder(layer: str) -> tuple[Name, ...]:
    """Makes all rows but those of the MLP, for layers by the pattern `layer`."""
    kv, qkv = (
        tuple(rf"model.layers.\1.self_attn.{part}_proj" for part in parts)
        for parts in ("kv", "qkv")
    )
    norms = {
        "pre_attention_norm": "input_layernorm",
        "post_(?:attention|attn)_norm": "post_attention_layernorm",
        "pre_ffw_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
        "attn/_?query_norm": "self_attn.q_norm",
        "attn/_?key_norm": "self_attn.k_norm",
    }
    return (
        Name("embedder/input_embedding", "model.embed_tokens", "vo", tied="lm_head"),
        Name(f"{layer}/attn/q_einsum/w", r"model.layers.\1.self_attn.q_proj", "oio"),
        Name(f"{layer}/attn/kv_einsum/w", kv, "soio"),
        Name(f"{layer}/attn/qkv_einsum/w", qkv, "soio"),
        Name(f"{layer}/attn/k_einsum/w", r"model.layers.\1.self_attn.k_proj", "oio"),
        Name(f"{layer}/attn/attn_vec_einsum/w", r"model.layers.\1.self_attn.o_proj", "iio"),
        *scales(layer, norms),
        Name("final_norm/scale", "model.norm", "o"),
    )


def scales(layer: str, names: Mapping[str, str]) -> tuple[Name, ...]:
    """Makes the rows of norms in layers."""
    each = names.items()
    return tuple(Name(f"{layer}/{ours}/scale", rf"model.layers.\1.{it}", "o") for ours, it in each)


def experts(layer: str, moe: str, end: str = "") -> tuple[Name, ...]:
    """Makes the rows of what Gemma 4 has more than Gemma 3: experts, and inputs of each layer."""
    module, per_layer = r"model.layers.\1.", "embedder/per_layer_"
    return (
        *scales(layer, {"post_per_layer_input_norm": "post_per_layer_input_norm"}),
        Name(f"{layer}/skip_scale", module[:-1], "o", "layer_scalar"),
        Name(f"{layer}/{moe}/router_logits{end}", module + "router.proj", "io"),
        Name(f"{layer}/{moe}/router_scale", module + "router", "o", "scale"),
        Name(f"{layer}/{moe}/per_expert_scale", module + "router", "o", "per_expert_scale"),
        Name(f"{layer}/{moe}/gating_einsum{end}", module + "experts", "eooi", "gate_up_proj"),
        Name(f"{layer}/{moe}/linear{end}", module + "experts", "eio", "down_proj"),
        Name(f"{layer}/(per_layer_(?:input_gate|projection))/w", module + r"\2", "io"),
        Name(per_layer + "(?:input_)?embeddings?", "model.embed_tokens_per_layer", "voo"),
        Name(per_layer + "model_projection/w", "model.per_layer_model_projection", "ioo"),
        Name(per_layer + "projection_norm/scale", "model.per_layer_projection_norm", "o"),
    )


def _mlp(axes: str) -> tuple[Name, Name]:
    gate_up = tuple(rf"model.layers.\1.mlp.{part}_proj" for part in ("gate", "up"))
    return (
        Name(r"layer_(\d+)/mlp2?/gating_einsum", gate_up, axes),
        Name(r"layer_(\d+)/mlp2?/linear", r"model.layers.\1.mlp.down_proj", "io"),
    )


GEMMA3 = (*decoder(r"layer_(\d+)"), *_mlp("soi"))

GEMMA4 = (*GEMMA3, *experts(r"layer_(\d+)", "mlp", "/w"))

# `mlp` has the experts, and `mlp2` what is `mlp` in models without them.
_NORMS = {
    "pre_ffw_norm": "pre_feedforward_layernorm_2",
    "pre_ffw2_norm": "pre_feedforward_layernorm",
    "post_ffw1_norm": "post_feedforward_layernorm_2",
    "post_ffw2_norm": "post_feedforward_layernorm_1",
}
GEMMA4_EXPERTS = (*scales(r"layer_(\d+)", _NORMS), *GEMMA4)

GEMMA2_2B = (*decoder(r"layer_(\d+)"), *_mlp("sio"))
