"""Name tables for the package `gemma` of Google DeepMind.

`GEMMA3` is that of Gemma 3's text models (`Gemma3ForCausalLM` of `transformers`), and of Gemma 2 in
9B and 27B (`Gemma2ForCausalLM`); `GEMMA2_2B` is that of Gemma 2 in 2B, whose `gating_einsum` lies
otherwise. Tested with gemma 4.0.1, transformers 5.24 and PEFT 0.21.

Keys and values are one leaf here, as are gate and up; and q, k and v where there are as many heads
of each. PEFT adapts each by an A and a B of its own, as do the rules

    LoRA(r"kv_einsum/w|gating_einsum", slots=Slots(2, (0, 1)))
    LoRA(r"qkv_einsum/w", slots=Slots(3, (0, 1, 2)))

of which a model has a leaf for one or the other. An A that they share, as without `slots`, is
written for each. Norms need no change: both libraries multiply by 1 + scale.
"""

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
        "attn/_query_norm": "self_attn.q_norm",
        "attn/_key_norm": "self_attn.k_norm",
    }
    return (
        Name("embedder/input_embedding", "model.embed_tokens", "vo", tied="lm_head"),
        Name(f"{layer}/attn/q_einsum/w", r"model.layers.\1.self_attn.q_proj", "oio"),
        Name(f"{layer}/attn/kv_einsum/w", kv, "soio"),
        Name(f"{layer}/attn/qkv_einsum/w", qkv, "soio"),
        Name(f"{layer}/attn/attn_vec_einsum/w", r"model.layers.\1.self_attn.o_proj", "iio"),
        *(
            Name(f"{layer}/{ours}/scale", rf"model.layers.\1.{it}", "o")
            for ours, it in norms.items()
        ),
        Name("final_norm/scale", "model.norm", "o"),
    )


def _mlp(axes: str) -> tuple[Name, Name]:
    gate_up = tuple(rf"model.layers.\1.mlp.{part}_proj" for part in ("gate", "up"))
    return (
        Name(r"layer_(\d+)/mlp/gating_einsum", gate_up, axes),
        Name(r"layer_(\d+)/mlp/linear", r"model.layers.\1.mlp.down_proj", "io"),
    )


GEMMA3 = (*decoder(r"layer_(\d+)"), *_mlp("soi"))

GEMMA2_2B = (*decoder(r"layer_(\d+)"), *_mlp("sio"))
