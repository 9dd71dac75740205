"""Name tables for the models of tunix.

| table | classes of tunix | of `transformers` |
|---|---|---|
| `LLAMA3` | `llama3.Llama3` | `LlamaForCausalLM` |
| `QWEN2` | `qwen2.Qwen2` | `Qwen2ForCausalLM` |
| `QWEN3` | `qwen3.Qwen3`, also with experts | `Qwen3ForCausalLM`, `Qwen3MoeForCausalLM` |
| `GEMMA` | `gemma.Gemma` of Gemma 2, `gemma3.Gemma3` for text | `Gemma2ForCausalLM`, `Gemma3ForCausalLM` |

Tested with google-tunix 0.1.7, transformers 5.24 and PEFT 0.21, and the experts of `QWEN3` also with
transformers 4.57, where each is a module that PEFT adapts by itself. Of rotary embeddings tunix has
only the plain ones: on Llama 3.1 and later, whose frequencies are scaled, its outputs differ.

Gemma's keys and values are one leaf, as are q, k and v where there are as many heads of each. PEFT
adapts each by an A and a B of its own, as do the rules

    LoRA(r"/kv_einsum/w", slots=Slots(2, (0, 1)))
    LoRA(r"/qkv_einsum/w", slots=Slots(3, (0, 1, 2)))
"""

from .._names import Name
from .gemma import decoder

_DECODER = (
    Name("embedder/input_embedding", "model.embed_tokens", "vo", tied="lm_head"),
    Name(r"(layers/\d+)/attn/([qkv])_proj/w", r"model/\1/self_attn/\2_proj", "ioo"),
    Name(r"(layers/\d+)/attn/([qkv])_bias", r"model/\1/self_attn/\2_proj", "o", "bias"),
    Name(r"(layers/\d+)/attn/([qk]_norm)/w", r"model/\1/self_attn/\2", "o"),
    Name(r"(layers/\d+)/attn/o_proj/w", r"model/\1/self_attn/o_proj", "iio"),
    Name(r"(layers/\d+/mlp/\w+_proj)/kernel", r"model/\1", "io"),
    Name(r"(layers/\d+/\w+_layernorm)/w", r"model/\1", "o"),
    Name("final_norm/w", "model/norm", "o"),
    Name("lm_head/w", "lm_head", "io"),
)

LLAMA3 = QWEN2 = _DECODER

QWEN3 = (
    Name(r"(layers/\d+/mlp)/router/kernel", r"model/\1/gate", "io"),
    Name(r"(layers/\d+/mlp)/(\w+_proj)", r"model/\1/experts/{}/\2", "lio"),
    *_DECODER,
)

GEMMA = (
    *decoder(r"layers/(\d+)"),
    Name(r"(layers/\d+/mlp/\w+_proj)/kernel", r"model/\1", "io"),
)
