"""Name tables for the decoders of MaxText, with and without `scan_layers`.

| table | `decoder_block` | of `transformers` |
|---|---|---|
| `LLAMA` | `llama2`, for Llama 2 and 3 | `LlamaForCausalLM` |
| `QWEN3` | `qwen3` | `Qwen3ForCausalLM` |
| `DEEPSEEK_V3`; `deepseek(dense)` | `deepseek` | `DeepseekV3ForCausalLM` |
| `GEMMA4` | `gemma4`, with experts or without | `Gemma4ForCausalLM` |
| `GPT_OSS` | `gpt_oss` | `GptOssForCausalLM` |
| `LLAMA4` | `llama4` | `Llama4ForCausalLM` |

Tested with MaxText 0.2.5 on JAX 0.12 and its NNX `Transformer`, with files of transformers 5.24 and
PEFT 0.21.

Scanned layers are on axis 1, the default `param_scan_axis`. So are scanned blocks of layers: 2 in
gpt-oss, 4 in Llama 4, 6 in Gemma 4. A scanned Gemma 4 must have a multiple of 6 layers. The first
three layers of DeepSeek V3 have no experts; `deepseek` makes the table for other numbers.

MaxText divides Llama's queries by √head_dim and interleaves its queries and keys, as does its own
conversion. MaxText multiplies Gemma 4's embedding by √d. A and B are still PEFT's; the scale of ΔW
changes as W does. A tied head is computed with the embedding in bfloat16, whatever its `dtype`.

There is no table for Qwen 3.5: a leaf of MaxText alternates between the outputs of two PyTorch
modules.
"""

import dataclasses
import itertools
import math
from collections.abc import Mapping
from typing import Any

from .._names import Name
from .transformers import ALTERNATING, experts


def over_root_of_head(shape: tuple[int, ...]) -> float:
    """Computes 1 / √head_dim of a kernel (d, …, heads, head_dim)."""
    return 1 / math.sqrt(shape[-1])


def root_of_width(shape: tuple[int, ...]) -> float:
    """Computes √d of an embedding (vocabulary, d)."""
    return math.sqrt(shape[-1])


# Where layers are: their path, their number in PyTorch, and the number of axes of the stack.
_Layers = tuple[tuple[str, str, int], ...]
_UNSCANNED = (r"layers_(\d+)", r"\1", 0)
_LAYERS = (_UNSCANNED, ("layers", "{}", 1))
_PAIRS, _FOURS = ((_UNSCANNED, (r"layers/layers_(\d+)", rf"{{{n}*+\1}}", 1)) for n in (2, 4))
_SIXES = (
    _UNSCANNED,
    ("scanned_blocks/local_layers", "{6*+1*}", 2),
    ("scanned_blocks/global_layer", "{6*+5}", 1),
)


def _rows(
    where: _Layers, lines: str, more: Mapping[str, Mapping[str, Any]] = {}
) -> tuple[Name, ...]:
    """Makes rows from lines: a path, PyTorch's parameter without `.weight`, and axes.

    Scanned layers are after the first axis. `more` has other fields of rows, by module.
    """
    found = []
    for line, (layers, number, stacked) in itertools.product(lines.split("\n"), where):
        if not line:
            continue
        path, module, axes = line.split()
        module, _, parameter = module.partition(":")
        found.append(
            Name(
                f"decoder/{layers}/{path}",
                f"model.layers.{number}.{module}".rstrip("."),
                axes[0] + "l" * stacked + axes[1:],
                parameter or "weight",
                **more.get(module, {}),
            )
        )
    return tuple(found)


def _experts(where: _Layers, path: str, module: str, **how: Any) -> tuple[Name, ...]:
    each = (
        experts(
            f"decoder/{layers}/{path}/",
            f"model.layers.{number}.{module}",
            f"e{'l' * stacked}io",
            ("wi_0", "wi_1", "wo"),
            **how,
        )
        for layers, number, stacked in where
    )
    return tuple(itertools.chain(*each))


_ENDS = (
    Name("token_embedder/embedding", "model.embed_tokens", "vo", tied="lm_head"),
    Name("decoder/decoder_norm/scale", "model.norm", "o"),
    Name("decoder/logits_dense/kernel", "lm_head", "io"),
)
_ATTENTION = """
self_attention/query/kernel self_attn.q_proj ioo
self_attention/key/kernel self_attn.k_proj ioo
self_attention/value/kernel self_attn.v_proj ioo
self_attention/out/kernel self_attn.o_proj iio
"""
_QUERY_KEY_NORMS = """
self_attention/query_norm/scale self_attn.q_norm o
self_attention/key_norm/scale self_attn.k_norm o
"""
_MLP = """
mlp/wi_0/kernel mlp.gate_proj io
mlp/wi_1/kernel mlp.up_proj io
mlp/wo/kernel mlp.down_proj io
"""
_NORMS = """
pre_self_attention_layer_norm/scale input_layernorm o
post_self_attention_layer_norm/scale post_attention_layernorm o
"""

# Llama 2 and 3.
_ROTATED = {
    "self_attn.q_proj": {"interleaved": True, "times": over_root_of_head},
    "self_attn.k_proj": {"interleaved": True},
}
LLAMA = (*_ENDS, *_rows(_LAYERS, _ATTENTION + _MLP + _NORMS, _ROTATED))

QWEN3 = (*_ENDS, *_rows(_LAYERS, _ATTENTION + _QUERY_KEY_NORMS + _MLP + _NORMS))

_GPT_OSS = """
self_attention/query/bias self_attn.q_proj:bias oo
self_attention/key/bias self_attn.k_proj:bias oo
self_attention/value/bias self_attn.v_proj:bias oo
self_attention/out/bias self_attn.o_proj:bias o
self_attention/sinks self_attn:sinks o
GptOssMlp/gate/kernel mlp.router io
GptOssMlp/gate/bias mlp.router:bias o
"""
GPT_OSS = (
    *_ENDS,
    *_rows(_PAIRS, (_ATTENTION + _GPT_OSS).replace("self_attention", "GptOssAttention") + _NORMS),
    *_experts(_PAIRS, "GptOssMlp", "mlp.experts", **ALTERNATING),
)


def _shared(path: str, module: str) -> str:
    """Makes the lines for shared experts."""
    return _MLP.replace("mlp/", f"{path}/").replace(" mlp.", f" {module}.")


_LLAMA4 = "Llama4MoEBlock_0"
LLAMA4 = (
    *_ENDS,
    *_rows(
        _FOURS,
        _ATTENTION
        + _NORMS
        + _shared("mlp", "feed_forward")
        + _shared(f"{_LLAMA4}/shared_experts", "feed_forward.shared_expert")
        + f"{_LLAMA4}/MoeBlock_0/gate/kernel feed_forward.router io",
    ),
    *_experts(_FOURS, f"{_LLAMA4}/MoeBlock_0", "feed_forward.experts", transposed=True),
)

_LATENT = """
self_attention/query/kernel self_attn.q_proj ioo
self_attention/wq_a/kernel self_attn.q_a_proj io
self_attention/wq_b/kernel self_attn.q_b_proj ioo
self_attention/wkv_a/kernel self_attn.kv_a_proj_with_mqa io
self_attention/wkv_b/kernel self_attn.kv_b_proj ioo
self_attention/out/kernel self_attn.o_proj iio
self_attention/q_norm/scale self_attn.q_a_layernorm o
self_attention/kv_norm/scale self_attn.kv_a_layernorm o
"""
_DEEPSEEK = "DeepSeekMoeBlock_0"
_ROUTER = f"""
{_DEEPSEEK}/MoeBlock_0/gate/kernel mlp.gate io
{_DEEPSEEK}/MoeBlock_0/gate/bias mlp.gate:e_score_correction_bias o
"""


def deepseek(dense: int) -> tuple[Name, ...]:
    """Makes the table of a DeepSeek whose first `dense` layers have no experts."""
    first = (r"dense_layers_(\d+)", r"\1", 0), ("dense_layers", "{}", 1)
    rest = (r"moe_layers_(\d+)", rf"{{\1+{dense}}}", 0), ("moe_layers", f"{{1*+{dense}}}", 1)
    return (
        *_ENDS,
        *_rows((*first, *rest), _LATENT + _NORMS),
        *_rows(first, _MLP),
        *_rows(rest, _shared(f"{_DEEPSEEK}/shared_experts", "mlp.shared_experts") + _ROUTER),
        *_experts(rest, f"{_DEEPSEEK}/MoeBlock_0", "mlp.experts"),
    )


DEEPSEEK_V3 = deepseek(3)

_GEMMA4 = """
mlp/moe_block/MoeBlock_0/gate/kernel router.proj io
mlp/moe_block/MoeBlock_0/per_expert_scale router:per_expert_scale o
mlp/pre_forward_scale_2 router:scale o
layer_scalar :layer_scalar o
pre_self_attention_norm/scale input_layernorm o
post_self_attention_norm/scale post_attention_layernorm o
pre_ffw_norm/scale pre_feedforward_layernorm o
post_ffw_norm/scale post_feedforward_layernorm o
mlp/pre_feedforward_layernorm_2/scale pre_feedforward_layernorm_2 o
mlp/post_feedforward_layernorm_1/scale post_feedforward_layernorm_1 o
mlp/post_feedforward_layernorm_2/scale post_feedforward_layernorm_2 o
"""
GEMMA4 = (
    dataclasses.replace(_ENDS[0], times=root_of_width),
    *_ENDS[1:],
    *_rows(_SIXES, _ATTENTION + _QUERY_KEY_NORMS + _MLP + _GEMMA4),
    *_rows(_SIXES, _shared("mlp/moe_block/shared_experts", "mlp")),
    *_experts(_SIXES, "mlp/moe_block/MoeBlock_0", "experts"),
)
