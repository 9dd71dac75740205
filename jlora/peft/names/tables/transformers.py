"""Name tables for models with the modules of `transformers`, and Flax's names of leaves.

Such are the Flax models of `transformers` 4, and your own with paths like
`model/layers/0/self_attn/q_proj/kernel`.

| table | models |
|---|---|
| `BERT`, `GPT2`, `VIT` | the models with these names, with any head |
| `ROBERTA` | RoBERTa, XLM-RoBERTa |
| `LLAMA` | Llama to 3, Mistral, Gemma to 4, Qwen 2 to 3.5, DeepSeek V3, with experts or without |
| `LLAMA_SCANNED` | the same trees, without experts, with layers stacked on axis 0 by a scan |
| `GPT_OSS`, `LLAMA4` | the models with these names |

A table names only the modules of its models. For a module of your own, such as a new head, add a
row: `(*peft.TABLES["bert"], peft.Name("head/kernel", "head", "io"))`.

Experts are leaves (experts, inputs, outputs). Gate and up are one leaf, `gate_up_proj`, or two,
`gate_proj` and `up_proj`. In a checkpoint, experts may be one parameter; if gate and up are two
leaves, they may also be one module for each expert. Models with experts are tested with
`transformers` 5.24 and PEFT 0.21.2.

With `transformers` 5, PEFT 0.21.2 mistakes the MLPs of DeepSeek V3's dense layers and shared
experts for experts, which were modules of the same names in `transformers` 4. It loads no adapter
for these MLPs.
"""

from typing import Any

from .._names import Name


def same(modules: str) -> tuple[Name, ...]:
    """Makes the rows of modules with the same names in Flax and PyTorch."""
    return (
        Name(f"({modules})/kernel", r"\1", "io"),
        Name(f"({modules})/embedding", r"\1", "vo"),
        Name(f"({modules})/(?:scale|weight|kernel)", r"\1", "o"),
        Name(f"({modules})/bias", r"\1", "o", "bias"),
    )


# The names of a model without a head lack the first component.
_BERT_ENCODER = (
    r"embeddings/(?:(?:word|position|token_type)_embeddings|LayerNorm)"
    r"|encoder/layer/\d+/(?:cross)?attention/(?:self/(?:query|key|value)|output/(?:dense|LayerNorm))"
    r"|encoder/layer/\d+/(?:intermediate/dense|output/(?:dense|LayerNorm))"
    r"|pooler/dense"
)

BERT = (
    Name(
        r"(bert/embeddings/word_embeddings)/embedding",
        r"\1",
        "vo",
        tied="cls.predictions.decoder",
    ),
    *same(
        rf"(?:bert/)?(?:{_BERT_ENCODER})|classifier|qa_outputs|cls/seq_relationship"
        r"|cls/predictions(?:/decoder|/transform/(?:dense|LayerNorm))?"
    ),
)

ROBERTA = (
    Name(r"(roberta/embeddings/word_embeddings)/embedding", r"\1", "vo", tied="lm_head.decoder"),
    *same(
        rf"(?:roberta/)?(?:{_BERT_ENCODER})|classifier(?:/(?:dense|out_proj))?|qa_outputs"
        r"|lm_head(?:/(?:dense|layer_norm|decoder))?"
    ),
)

_GPT2_LAYER = r"(?:transformer/)?h/\d+"
_CONV1D = rf"{_GPT2_LAYER}/(?:(?:attn|crossattention)/(?:[cq]_attn|c_proj)|mlp/c_(?:fc|proj))"

GPT2 = (
    Name(r"(transformer/wte)/embedding", r"\1", "vo", tied="lm_head"),
    # These kernels are (outputs, inputs) in Flax, and (inputs, outputs) in PyTorch's Conv1D.
    Name(rf"({_CONV1D})/kernel", r"\1", "oi", transposed=True),
    *same(
        rf"{_CONV1D}|{_GPT2_LAYER}/ln_(?:1|2|cross_attn)|(?:transformer/)?(?:wte|wpe|ln_f)|lm_head"
    ),
)

_DECODER_LAYER = (
    r"self_attn/(?:[qkvo]_proj|[qk]_norm|q_[ab]_proj|q_a_layernorm"
    r"|kv_(?:a_proj_with_mqa|a_layernorm|b_proj))"
    r"|linear_attn/(?:in_proj_(?:qkv|[zab])|out_proj|norm)"
    r"|(?:mlp|feed_forward)/(?:(?:shared_experts?/)?(?:gate|up|down)_proj"
    r"|gate|router|shared_expert_gate)"
    r"|router/proj|per_layer_(?:input_gate|projection)|post_per_layer_input_norm"
    r"|(?:input|(?:pre|post)_(?:attention|feedforward))_layernorm(?:_[12])?"
)
_MODEL = r"(?:model/)?(?:language_model/)?"
_LAYERS = rf"{_MODEL}layers/\d+"


def experts(
    path: str,
    module: str,
    axes: str = "eio",
    leaves: tuple[str, str, str] = ("gate_proj", "up_proj", "down_proj"),
    *,
    alternating: bool = False,
    **how: Any,
) -> tuple[Name, ...]:
    """Makes the rows of experts and their biases, for the `leaves` gate, up and down at `path`.

    Gate and up are halves of one parameter, or alternate in it.
    """
    gate, up, down = leaves
    each = (gate, "gate_up_proj", (0, 2)), (up, "gate_up_proj", (1, 2)), (down, "down_proj", None)
    bias = axes.replace("i", "")
    return tuple(
        Name(
            path + leaf + end,
            module,
            axes,
            parameter + end,
            part=part,
            alternating=alternating,
            **own,
        )
        for end, axes, own in (("", axes, how), ("_bias", bias, {}))
        for leaf, parameter, part in each
    )


def _decoder(**how: Any) -> tuple[Name, ...]:
    """Makes the table of decoders; `how` has fields for the rows of experts."""
    at = rf"({_LAYERS}/(?:(?:mlp|feed_forward)/)?experts)/"
    last = "embed_tokens(?:_per_layer)?|per_layer_model_projection|per_layer_projection_norm|norm"
    odd = {
        "": ("layer_scalar",),
        "/self_attn": ("sinks",),
        "/linear_attn": ("A_log", "dt_bias"),
        "/router": ("scale", "per_expert_scale"),
        "/mlp/gate": ("e_score_correction_bias",),
    }
    return (
        Name(rf"({_MODEL}embed_tokens)/embedding", r"\1", "vo", tied="lm_head"),
        *same(rf"{_LAYERS}/(?:{_DECODER_LAYER})|{_MODEL}(?:{last})|lm_head"),
        *(
            Name(rf"({_LAYERS}{module})/{parameter}", r"\1", "o", parameter)
            for module, parameters in odd.items()
            for parameter in parameters
        ),
        Name(rf"({_LAYERS}/linear_attn/conv1d)/kernel", r"\1", "kio"),
        Name(at + "gate_up_proj", r"\1", "eio", "gate_up_proj", **how),
        Name(at + "gate_up_proj_bias", r"\1", "eo", "gate_up_proj_bias"),
        *experts(at, r"\1", **how),
    )


LLAMA = _decoder()

LLAMA_SCANNED = (
    Name(rf"model/layers/({_DECODER_LAYER})/kernel", r"model.layers.{}.\1", "lio"),
    Name(rf"model/layers/({_DECODER_LAYER})/(?:scale|weight)", r"model.layers.{}.\1", "lo"),
    *LLAMA,
)

LLAMA4 = _decoder(transposed=True)

ALTERNATING: Any = {"transposed": True, "is_transposed": True, "alternating": True}  # of gpt-oss
GPT_OSS = _decoder(**ALTERNATING)

_PATCHES = "(?:vit/)?embeddings/patch_embeddings/projection"

VIT = (
    Name(f"({_PATCHES})/kernel", r"\1", "kkio"),
    Name(f"({_PATCHES})/bias", r"\1", "o", "bias"),
    *same(
        r"(?:vit/)?(?:encoder/layer/\d+/(?:attention/(?:attention/(?:query|key|value)|output/dense)"
        r"|(?:intermediate|output)/dense|layernorm_(?:before|after))|layernorm|pooler/dense)"
        r"|classifier"
    ),
)
