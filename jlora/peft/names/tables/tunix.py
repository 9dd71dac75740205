"""Name tables for the models of tunix.

`LLAMA3` is that of `Llama3`, `QWEN2` of `Qwen2`, `QWEN3` of `Qwen3`, with experts or without,
`GEMMA` of Gemma 2 (`gemma.Gemma`) and of Gemma 3's text models (`Gemma3`), `GEMMA4` of `Gemma4`,
with experts or without. In `transformers` these are `LlamaForCausalLM`, `Qwen2ForCausalLM`,
`Qwen3ForCausalLM`, `Qwen3MoeForCausalLM`, `Gemma2ForCausalLM`, `Gemma3ForCausalLM` and
`Gemma4ForCausalLM`. Tested with google-tunix 0.1.7, transformers 5.24 and PEFT 0.21.

Of experts, checkpoints and adapters of `transformers` 4 (tested with 4.57) have each as a module:
`QWEN3`. Adapters of `transformers` 5 have them together, and gate and up as one parameter:
`QWEN3_EXPERTS`. In PEFT these two share an A; here each has its own, which the file has beside one
another once they are trained.

In tunix 0.1.7 the rotary embeddings of `Llama3` and `Qwen3` have the base 1,000,000, whatever its
configuration says, and none is scaled. Outputs on a checkpoint with others differ from those of
`transformers`, with an adapter or without.

tunix 0.1.7 chooses Gemma 4's experts after `moe_pre_ffw_norm`, `transformers` before that norm: the
outputs of a model with experts differ unless the scale of this norm is constant.

Gemma's keys and values are one leaf, as are q, k and v where there are as many heads of each. PEFT
adapts each by an A and a B of its own, as do the rules

    LoRA(r"kv_einsum/w", slots=Slots(2, (0, 1)))
    LoRA(r"qkv_einsum/w", slots=Slots(3, (0, 1, 2)))

of which a model has a leaf for one or the other.
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

# As PEFT adapts the experts of `transformers` 5.
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
