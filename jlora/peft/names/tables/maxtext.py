"""Name tables for the decoders of MaxText, with `scan_layers` and without.

| table | `decoder_block` | of `transformers` |
|---|---|---|
| `LLAMA` | `llama2`, for Llama 2 and 3 | `LlamaForCausalLM` |
| `QWEN3` | `qwen3` | `Qwen3ForCausalLM` |

Tested with MaxText 0.2.5 on JAX 0.12 and its NNX `Transformer`, on files of transformers 5.24 and
PEFT 0.21. Scanned layers lie on axis 1, the default `param_scan_axis`.

Llama's queries are divided by √head_dim there, and its queries and keys are interleaved, as they
are by MaxText's own conversion. A and B are those of PEFT all the same; the scale of ΔW is divided
as W is. An embedding that is the head too is rounded to bfloat16 in the head, whatever its `dtype`.
"""

import math
from typing import Any

from .._names import Name


def over_root_of_head(shape: tuple[int, ...]) -> float:
    """Computes 1 / √head_dim of a kernel (d, …, heads, head_dim)."""
    return 1 / math.sqrt(shape[-1])


def _row(path: str, module: str, axes: str, **more: Any) -> tuple[Name, Name]:
    """Makes the rows of one kind of leaf, for layers one by one and for a scan over them."""
    scanned = f"{axes[0]}l{axes[1:]}"
    return (
        Name(rf"decoder/layers_(\d+)/{path}", rf"model.layers.\1.{module}", axes, **more),
        Name(f"decoder/layers/{path}", f"model.layers.{{}}.{module}", scanned, **more),
    )


_EMBEDDING = Name("token_embedder/embedding", "model.embed_tokens", "vo", tied="lm_head")
_HEAD = Name("decoder/logits_dense/kernel", "lm_head", "io")
_REST = (
    *_row("self_attention/value/kernel", "self_attn.v_proj", "ioo"),
    *_row("self_attention/out/kernel", "self_attn.o_proj", "iio"),
    *_row("mlp/wi_0/kernel", "mlp.gate_proj", "io"),
    *_row("mlp/wi_1/kernel", "mlp.up_proj", "io"),
    *_row("mlp/wo/kernel", "mlp.down_proj", "io"),
)
_NORMS = (
    Name("decoder/decoder_norm/scale", "model.norm", "o"),
    *_row("pre_self_attention_layer_norm/scale", "input_layernorm", "o"),
    *_row("post_self_attention_layer_norm/scale", "post_attention_layernorm", "o"),
)

# Llama 2 and 3.
LLAMA = (
    _EMBEDDING,
    *_row(
        "self_attention/query/kernel",
        "self_attn.q_proj",
        "ioo",
        interleaved=True,
        times=over_root_of_head,
    ),
    *_row("self_attention/key/kernel", "self_attn.k_proj", "ioo", interleaved=True),
    *_REST,
    *_NORMS,
    _HEAD,
)

_QUERY_AND_KEY = (
    *_row("self_attention/query/kernel", "self_attn.q_proj", "ioo"),
    *_row("self_attention/key/kernel", "self_attn.k_proj", "ioo"),
)

QWEN3 = (
    _EMBEDDING,
    *_QUERY_AND_KEY,
    *_REST,
    *_NORMS,
    *_row("self_attention/query_norm/scale", "self_attn.q_norm", "o"),
    *_row("self_attention/key_norm/scale", "self_attn.k_norm", "o"),
    _HEAD,
)
