"""Name tables for the language models of keras-hub, `CausalLM` or `Backbone`.

| table | classes of keras-hub | of `transformers` |
|---|---|---|
| `LLAMA3` | `Llama3CausalLM` | `LlamaForCausalLM` |
| `QWEN3` | `Qwen3CausalLM` | `Qwen3ForCausalLM` |
| `GEMMA3` | `Gemma3CausalLM` for text | `Gemma3ForCausalLM` |

Tested with keras-hub 0.32, Keras 3.15 on JAX, transformers 5.24 and PEFT 0.21. Make the parameters
a dict by `Variable.path`, and pass them to `stateless_call` as two lists:

    params = {v.path: v.value for v in model.variables}

    def apply(params, inputs):
        trained = [params[v.path] for v in model.trainable_variables]
        others = [params[v.path] for v in model.non_trainable_variables]
        return model.stateless_call(trained, others, inputs)[0]

For Llama 3.1 with files of transformers 5, give `rope_frequency_adjustment_factor` and the like:
keras-hub 0.32 reads scaled rotary embeddings only from files of transformers 4 (`rope_scaling`).
"""

from .._names import Name

# Kernels of attention have an axis of heads: (d, heads, head_dim), (heads, head_dim, d).
_LAYER = r"transformer_layer_(\d+)/"
_ATTENTION = _LAYER + "self_attention/"
_QK, _QKV = "([qk])(?:uery|ey)", "([qkv])(?:uery|ey|alue)"

LLAMA3 = (
    Name("token_embedding/embeddings", "model.embed_tokens", "vo", tied="lm_head"),
    Name(_ATTENTION + _QKV + "/kernel", r"model.layers.\1.self_attn.\2_proj", "ioo"),
    Name(_ATTENTION + "attention_output/kernel", r"model.layers.\1.self_attn.o_proj", "iio"),
    Name(_LAYER + "feedforward_gate_dense/kernel", r"model.layers.\1.mlp.gate_proj", "io"),
    Name(_LAYER + "feedforward_intermediate_dense/kernel", r"model.layers.\1.mlp.up_proj", "io"),
    Name(_LAYER + "feedforward_output_dense/kernel", r"model.layers.\1.mlp.down_proj", "io"),
    Name(_LAYER + "self_attention_layernorm/scale", r"model.layers.\1.input_layernorm", "o"),
    Name(_LAYER + "feedforward_layernorm/scale", r"model.layers.\1.post_attention_layernorm", "o"),
    Name("sequence_output_layernorm/scale", "model.norm", "o"),
    Name("token_embedding/reverse_embeddings", "lm_head", "io"),
)

# Llama 3 with norms of queries and keys.
QWEN3 = (
    *LLAMA3,
    Name(_ATTENTION + _QK + "_dense_layernorm/scale", r"model.layers.\1.self_attn.\2_norm", "o"),
)

# Gemma's axis of heads is the first: (heads, d, head_dim).
_BLOCK = r"decoder_block_(\d+)/"

GEMMA3 = (
    Name("token_embedding/embeddings", "model.embed_tokens", "vo", tied="lm_head"),
    Name(_BLOCK + f"attention/{_QKV}/kernel", r"model.layers.\1.self_attn.\2_proj", "oio"),
    Name(_BLOCK + "attention/attention_output/kernel", r"model.layers.\1.self_attn.o_proj", "iio"),
    Name(_BLOCK + f"attention/{_QK}_norm/scale", r"model.layers.\1.self_attn.\2_norm", "o"),
    Name(_BLOCK + "ffw_gating/kernel", r"model.layers.\1.mlp.gate_proj", "io"),
    Name(_BLOCK + "ffw_gating_2/kernel", r"model.layers.\1.mlp.up_proj", "io"),
    Name(_BLOCK + "ffw_linear/kernel", r"model.layers.\1.mlp.down_proj", "io"),
    Name(_BLOCK + "pre_attention_norm/scale", r"model.layers.\1.input_layernorm", "o"),
    Name(_BLOCK + "post_attention_norm/scale", r"model.layers.\1.post_attention_layernorm", "o"),
    Name(_BLOCK + "pre_ffw_norm/scale", r"model.layers.\1.pre_feedforward_layernorm", "o"),
    Name(_BLOCK + "post_ffw_norm/scale", r"model.layers.\1.post_feedforward_layernorm", "o"),
    Name("final_normalization/scale", "model.norm", "o"),
)
