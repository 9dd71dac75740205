"""Name tables for the models of tunix.

| table | classes of tunix | of `transformers` |
|---|---|---|
| `LLAMA3` | `Llama3` | `LlamaForCausalLM` |
| `QWEN2` | `Qwen2` | `Qwen2ForCausalLM` |
| `QWEN3`, `QWEN3_EXPERTS` | `Qwen3` | `Qwen3ForCausalLM`, `Qwen3MoeForCausalLM` |
| `GEMMA` | `gemma.Gemma` (Gemma 2); `Gemma3` for text | `Gemma2ForCausalLM`, `Gemma3ForCausalLM` |
| `GEMMA4` | `Gemma4`, with experts or without | `Gemma4ForCausalLM` |

Tested with google-tunix 0.1.7, transformers 5.24 and PEFT 0.21.

For Qwen 3 with experts, use `QWEN3` with checkpoints and adapters of `transformers` 4 (tested with
4.57), which have a module for each expert. Use `QWEN3_EXPERTS` with adapters of `transformers` 5,
in which all experts, and gate and up, are one parameter. PEFT has one A for gate and up, jlora one
for each. Once they are trained, the file has both A's, concatenated.

Gemma's keys and values are one leaf. If q, k and v have the same number of heads, they are one leaf
instead. PEFT adapts each of them with its own A and B. So do these rules; a model has a leaf for
one of the two:

    LoRA(r"kv_einsum/w", slots=Slots(2, (0, 1)))
    LoRA(r"qkv_einsum/w", slots=Slots(3, (0, 1, 2)))

In two cases outputs of tunix 0.1.7 differ from those of `transformers`, with or without an adapter:

- Rotary embeddings of `Llama3` and `Qwen3` always have the base 1,000,000 and no scaling, whatever
  the configuration says.
- Gemma 4's experts are chosen after `moe_pre_ffw_norm`, in `transformers` before it. Outputs agree
  only if the scale of this norm is constant.
"""

from .._names import Name
from . import gemma
from .transformers import experts

_MLP = "(?:gate|up|down)_proj"
_DECODER = (
    Name("embedder/input_embedding", "model.embed_tokens", "vo", tied="lm_head"),
    Name(r"(layers/\d+)/attn/([qkv])_proj/w", r"model/\1/self_attn/\2_proj", "ioo"),
    Name(r"(layers/\d+)/attn/([qkv])_bias", r"model/\1/self_attn/\2_proj", "o", "bias"),
    Name(r"(layers/\d+)/attn/([qk]_norm)/w", r"model/\1/self_attn/\2", "o"),
    Name(r"(layers/\d+)/attn/o_proj/w", r"model/\1/self_attn/o_proj", "iio"),
    Name(rf"(layers/\d+/mlp/{_MLP})/kernel", r"model/\1", "io"),
    Name(r"(layers/\d+/(?:input|post_attention)_layernorm)/w", r"model/\1", "o"),
    Name("final_norm/w", "model/norm", "o"),
    Name("lm_head/w", "lm_head", "io"),
)

LLAMA3 = QWEN2 = _DECODER

QWEN3 = (
    Name(r"(layers/\d+/mlp)/router/kernel", r"model/\1/gate", "io"),
    Name(rf"(layers/\d+/mlp)/({_MLP})", r"model/\1/experts/{}/\2", "lio"),
    *_DECODER,
)

# For PEFT's adapters of the experts of `transformers` 5.
QWEN3_EXPERTS = (
    *experts(r"(layers/\d+/mlp)/", r"model/\1/experts"),
    *QWEN3,
)

GEMMA = (
    *gemma.decoder(r"layers/(\d+)"),
    Name(rf"(layers/\d+/mlp/{_MLP})/kernel", r"model/\1", "io"),
)

_NORMS = {
    "dense_post_ffw_norm": "post_feedforward_layernorm_1",
    "moe_post_ffw_norm": "post_feedforward_layernorm_2",
    "moe_pre_ffw_norm": "pre_feedforward_layernorm_2",
}
GEMMA4 = (*GEMMA, *gemma.scales(r"layers/(\d+)", _NORMS), *gemma.experts(r"layers/(\d+)", "moe"))
