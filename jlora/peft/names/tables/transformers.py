"""Name tables for the models of `transformers` in Flax.

| table | models |
|---|---|
| `BERT`, `GPT2`, `VIT` | those of these names, with any head |
| `ROBERTA` | RoBERTa, XLM-RoBERTa |
| `LLAMA` | Llama, Mistral, Gemma |
| `LLAMA_SCANNED` | the same trees with their layers stacked on axis 0 by a scan |

A table names the modules of its models and no others. A tree with modules of its own, such as a new
head, takes a row for each: `(*peft.BERT, peft.Name("head/kernel", "head", "io"))`.
"""

from .._names import Name


def same(modules: str) -> tuple[Name, ...]:
    """Makes the rows of modules that Flax and PyTorch call the same."""
    return (
        Name(f"({modules})/kernel", r"\1", "io"),
        Name(f"({modules})/embedding", r"\1", "vo"),
        Name(f"({modules})/(?:scale|weight)", r"\1", "o"),
        Name(f"({modules})/bias", r"\1", "o", "bias"),
    )


# A model without a head has no first part.
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
    # Flax keeps these kernels as (outputs, inputs), PyTorch's Conv1D as (inputs, outputs).
    Name(rf"({_CONV1D})/kernel", r"\1", "oi", transposed=True),
    *same(
        rf"{_CONV1D}|{_GPT2_LAYER}/ln_(?:1|2|cross_attn)|(?:transformer/)?(?:wte|wpe|ln_f)|lm_head"
    ),
)

_LLAMA_LAYER = (
    "(?:self_attn/[qkvo]_proj|mlp/(?:gate|up|down)_proj|(?:input|post_attention)_layernorm)"
)

LLAMA = (
    Name(r"(model/embed_tokens)/embedding", r"\1", "vo", tied="lm_head"),
    *same(rf"(?:model/)?(?:layers/\d+/{_LLAMA_LAYER}|embed_tokens|norm)|lm_head"),
)

LLAMA_SCANNED = (
    Name(rf"model/layers/({_LLAMA_LAYER})/kernel", r"model.layers.{}.\1", "lio"),
    Name(rf"model/layers/({_LLAMA_LAYER})/(?:scale|weight)", r"model.layers.{}.\1", "lo"),
    *LLAMA,
)

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
