"""Name tables for the decoders of MaxText, with `scan_layers` and without.

| table | `decoder_block` | of `transformers` |
|---|---|---|
| `LLAMA` | `llama2`, for Llama 2 and 3 | `LlamaForCausalLM` |
| `QWEN3` | `qwen3` | `Qwen3ForCausalLM` |
| `DEEPSEEK_V3`; `deepseek(dense)` | `deepseek` | `DeepseekV3ForCausalLM` |
| `GEMMA4` | `gemma4`, with experts or without | `Gemma4ForCausalLM` |
| `GPT_OSS` | `gpt_oss` | `GptOssForCausalLM` |
| `LLAMA4` | `llama4` | `Llama4ForCausalLM` |

Tested with MaxText 0.2.5 on JAX 0.12 and its NNX `Transformer`, on files of transformers 5.24 and
PEFT 0.21. Scanned layers lie on axis 1, the default `param_scan_axis`, and so do scanned blocks: of
2 layers in gpt-oss, 4 in Llama 4, 6 in Gemma 4, which must have a multiple of 6 layers there. The
first three layers of DeepSeek V3 have no experts; `deepseek` makes the table for other numbers.

Llama's queries are divided by √head_dim there, and its queries and keys are interleaved, as they
are by MaxText's own conversion; Gemma 4's embedding is multiplied by √d. A and B are those of PEFT
all the same; the scale of ΔW is divided as W is. An embedding that is the head too is rounded to
bfloat16 in the head, whatever its `dtype`.

There is no table for Qwen 3.5, of which MaxText has the outputs of two of PyTorch's modules in one
leaf, in turn.
"""

import dataclasses
import math
from collections.abc import Mapping
from typing import Any

from .._names import Name
from .transformers import ALTERNATING, experts


def over_root_of_head(shape: tuple[int, ...]) -> float:
    """Computes 1 / √head_dim of a kernel (d, …, heads, head_dim)."""
    return 1 / math.sqrt(shape[-1])


# Where layers are: the path, their number in PyTorch, and along how many axes they are stacked.
_Where = tuple[tuple[str, str, int], ...]
_UNSCANNED = (r"layers_(\d+)", r"\1", 0)
_LAYERS = (_UNSCANNED, ("layers", "{}", 1))


def _rows(where: _Where, path: str, module: str, axes: str, **more: Any) -> tuple[Name, ...]:
    """Makes the rows of one kind of leaf; scanned layers are next to the first axis."""
    return tuple(
        Name(
            f"decoder/{layers}/{path}",
            f"model.layers.{number}{module and f'.{module}'}",
            axes[0] + "l" * stacked + axes[1:],
            **more,
        )
        for layers, number, stacked in where
    )


def _experts(where: _Where, path: str, module: str, **how: Any) -> tuple[Name, ...]:
    leaves = "wi_0", "wi_1", "wo"
    return tuple(
        row
        for layers, number, stacked in where
        for row in experts(
            f"decoder/{layers}/{path}/",
            f"model.layers.{number}.{module}experts",
            "e" + "l" * stacked + "io",
            leaves,
            **how,
        )
    )


def _mlp(where: _Where, path: str = "mlp", module: str = "mlp") -> tuple[Name, ...]:
    each = ("wi_0", "gate"), ("wi_1", "up"), ("wo", "down")
    return tuple(
        row
        for ours, part in each
        for row in _rows(where, f"{path}/{ours}/kernel", f"{module}.{part}_proj", "io")
    )


def _attention(
    where: _Where,
    path: str = "self_attention",
    *,
    query: Mapping[str, Any] = {},
    key: Mapping[str, Any] = {},
) -> tuple[Name, ...]:
    """Makes the rows of queries, keys, values and outputs, with their biases and norms."""
    each = ("query", "q", "ioo", query), ("key", "k", "ioo", key), ("value", "v", "ioo", {})
    return tuple(
        row
        for ours, letter, axes, more in (*each, ("out", "o", "iio", {}))
        for row in (
            *_rows(where, f"{path}/{ours}/kernel", f"self_attn.{letter}_proj", axes, **more),
            *_rows(
                where,
                f"{path}/{ours}/bias",
                f"self_attn.{letter}_proj",
                axes.strip("i"),
                parameter="bias",
            ),
            *_rows(where, f"{path}/{ours}_norm/scale", f"self_attn.{letter}_norm", "o"),
        )
    )


def _norms(where: _Where, **names: str) -> tuple[Name, ...]:
    each = names or {
        "pre_self_attention_layer_norm": "input_layernorm",
        "post_self_attention_layer_norm": "post_attention_layernorm",
    }
    return tuple(row for ours, it in each.items() for row in _rows(where, f"{ours}/scale", it, "o"))


_ENDS = (
    Name("token_embedder/embedding", "model.embed_tokens", "vo", tied="lm_head"),
    Name("decoder/decoder_norm/scale", "model.norm", "o"),
    Name("decoder/logits_dense/kernel", "lm_head", "io"),
)

# Llama 2 and 3.
_ROTATED: Any = {"interleaved": True}
LLAMA = (
    *_ENDS,
    *_attention(_LAYERS, query=_ROTATED | {"times": over_root_of_head}, key=_ROTATED),
    *_mlp(_LAYERS),
    *_norms(_LAYERS),
)

QWEN3 = (*_ENDS, *_attention(_LAYERS), *_mlp(_LAYERS), *_norms(_LAYERS))

# Scanned in blocks of two layers.
_PAIRS = (_UNSCANNED, (r"layers/layers_(\d+)", r"{2*+\1}", 1))

GPT_OSS = (
    *_ENDS,
    *_attention(_PAIRS, "GptOssAttention"),
    *_rows(_PAIRS, "GptOssAttention/sinks", "self_attn", "o", parameter="sinks"),
    *_rows(_PAIRS, "GptOssMlp/gate/kernel", "mlp.router", "io"),
    *_rows(_PAIRS, "GptOssMlp/gate/bias", "mlp.router", "o", parameter="bias"),
    *_experts(_PAIRS, "GptOssMlp", "mlp.", **ALTERNATING),
    *_norms(_PAIRS),
)

# Scanned in blocks of four layers.
_FOURS = (_UNSCANNED, (r"layers/layers_(\d+)", r"{4*+\1}", 1))
_LLAMA4_EXPERTS = "Llama4MoEBlock_0"

LLAMA4 = (
    *_ENDS,
    *_attention(_FOURS),
    *_mlp(_FOURS, module="feed_forward"),
    *_mlp(_FOURS, f"{_LLAMA4_EXPERTS}/shared_experts", "feed_forward.shared_expert"),
    *_rows(_FOURS, f"{_LLAMA4_EXPERTS}/MoeBlock_0/gate/kernel", "feed_forward.router", "io"),
    *_experts(_FOURS, f"{_LLAMA4_EXPERTS}/MoeBlock_0", "feed_forward.", transposed=True),
    *_norms(_FOURS),
)


def deepseek(dense: int) -> tuple[Name, ...]:
    """Makes the table of a DeepSeek whose first `dense` layers have no experts."""
    first = (r"dense_layers_(\d+)", r"\1", 0), ("dense_layers", "{}", 1)
    rest = (
        (r"moe_layers_(\d+)", rf"{{\1+{dense}}}", 0),
        ("moe_layers", f"{{1*+{dense}}}", 1),
    )
    every, block = (*first, *rest), "DeepSeekMoeBlock_0"
    latent = {
        "query/kernel": ("q_proj", "ioo"),
        "wq_a/kernel": ("q_a_proj", "io"),
        "wq_b/kernel": ("q_b_proj", "ioo"),
        "wkv_a/kernel": ("kv_a_proj_with_mqa", "io"),
        "wkv_b/kernel": ("kv_b_proj", "ioo"),
        "out/kernel": ("o_proj", "iio"),
        "q_norm/scale": ("q_a_layernorm", "o"),
        "kv_norm/scale": ("kv_a_layernorm", "o"),
    }
    bias = "e_score_correction_bias"
    return (
        *_ENDS,
        *(
            row
            for ours, (it, axes) in latent.items()
            for row in _rows(every, f"self_attention/{ours}", f"self_attn.{it}", axes)
        ),
        *_mlp(first),
        *_mlp(rest, f"{block}/shared_experts", "mlp.shared_experts"),
        *_rows(rest, f"{block}/MoeBlock_0/gate/kernel", "mlp.gate", "io"),
        *_rows(rest, f"{block}/MoeBlock_0/gate/bias", "mlp.gate", "o", parameter=bias),
        *_experts(rest, f"{block}/MoeBlock_0", "mlp."),
        *_norms(every),
    )


DEEPSEEK_V3 = deepseek(3)


def root_of_width(shape: tuple[int, ...]) -> float:
    """Computes √d of an embedding (vocabulary, d)."""
    return math.sqrt(shape[-1])


# Five layers with windows and one without in each block.
_SIXES = (
    _UNSCANNED,
    ("scanned_blocks/local_layers", "{6*+1*}", 2),
    ("scanned_blocks/global_layer", "{6*+5}", 1),
)
_MOE = "mlp/moe_block/MoeBlock_0"

GEMMA4 = (
    dataclasses.replace(_ENDS[0], times=root_of_width),
    *_ENDS[1:],
    *_attention(_SIXES),
    *_mlp(_SIXES),
    *_mlp(_SIXES, "mlp/moe_block/shared_experts", "mlp"),
    *_experts(_SIXES, _MOE, ""),
    *_rows(_SIXES, f"{_MOE}/gate/kernel", "router.proj", "io"),
    *_rows(_SIXES, f"{_MOE}/per_expert_scale", "router", "o", parameter="per_expert_scale"),
    *_rows(_SIXES, "mlp/pre_forward_scale_2", "router", "o", parameter="scale"),
    *_rows(_SIXES, "layer_scalar", "", "o", parameter="layer_scalar"),
    *_norms(
        _SIXES,
        pre_self_attention_norm="input_layernorm",
        post_self_attention_norm="post_attention_layernorm",
        pre_ffw_norm="pre_feedforward_layernorm",
        post_ffw_norm="post_feedforward_layernorm",
        **{
            f"mlp/{name}": name
            for name in (
                "pre_feedforward_layernorm_2",
                "post_feedforward_layernorm_1",
                "post_feedforward_layernorm_2",
            )
        },
    ),
)
