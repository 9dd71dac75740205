"""Name tables for the package `gemma` of Google DeepMind.

| table | text models | of `transformers` |
|---|---|---|
| `GEMMA2_2B` | Gemma 2 2B, whose `gating_einsum` has other axes | `Gemma2ForCausalLM` |
| `GEMMA3` | Gemma 2 9B and 27B | `Gemma2ForCausalLM` |
| `GEMMA3` | Gemma 3 | `Gemma3ForCausalLM` |
| `GEMMA4`, `GEMMA4_EXPERTS` | Gemma 4 | `Gemma4ForCausalLM` |

Tested with gemma 4.0.1, transformers 5.24 and PEFT 0.21.

Keys and values are one leaf, as are gate and up. If q, k and v have the same number of heads, they
are one leaf instead. PEFT adapts each of them with its own A and B. So do these rules. Give the
second only to a model with `qkv_einsum`, as a rule raises if it matches nothing:

    LoRA(r"kv_einsum/w|gating_einsum", slots=Slots(2, (0, 1)))
    LoRA(r"qkv_einsum/w", slots=Slots(3, (0, 1, 2)))

Without `slots` they share an A, which is written for each. Norms need no change: both libraries
multiply by 1 + scale.

gemma 4.0.1 routes to experts after `pre_ffw_norm`, `transformers` before it. The outputs of a model
with experts therefore differ, with or without an adapter, unless the norm's scale is constant.
"""

from collections.abc import Mapping

from .._names import Name


def decoder(layer: str) -> tuple[Name, ...]:
    """Makes all rows except those of the MLP; `layer` is the pattern of layers."""
    kv, qkv = (
        tuple(rf"model.layers.\1.self_attn.{part}_proj" for part in parts)
        for parts in ("kv", "qkv")
    )
    norms = {
        "pre_attention_norm": "input_layernorm",
        "post_(?:attention|attn)_norm": "post_attention_layernorm",
        "pre_ffw_norm": "pre_feedforward_layernorm",
        "post_ffw_norm": "post_feedforward_layernorm",
        "attn/_?([qk])(?:uery|ey)_norm": r"self_attn.\2_norm",
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
    """Makes the rows of the norms in layers."""
    each = names.items()
    return tuple(Name(f"{layer}/{ours}/scale", rf"model.layers.\1.{it}", "o") for ours, it in each)


def experts(layer: str, moe: str, end: str = "") -> tuple[Name, ...]:
    """Makes the rows that Gemma 4 adds to Gemma 3: experts, and inputs for each layer."""
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

# `mlp` has the experts, and `mlp2` is the `mlp` of models without experts.
_NORMS = {
    "pre_ffw_norm": "pre_feedforward_layernorm_2",
    "pre_ffw2_norm": "pre_feedforward_layernorm",
    "post_ffw1_norm": "post_feedforward_layernorm_2",
    "post_ffw2_norm": "post_feedforward_layernorm_1",
}
GEMMA4_EXPERTS = (*scales(r"layer_(\d+)", _NORMS), *GEMMA4)

GEMMA2_2B = (*decoder(r"layer_(\d+)"), *_mlp("sio"))
