"""Name tables for the models of `transformers` in Flax."""

from .._names import Name

# Where `transformers`' Flax modules are called as its PyTorch modules are.
_SAME = (
    Name(r"(.*)/kernel", r"\1", "io"),
    Name(r"(.*)/embedding", r"\1", "vo"),
    Name(r"(.*)/(?:scale|weight)", r"\1", "o"),
    Name(r"(.*)/bias", r"\1", "o", "bias"),
)

BERT = (
    Name(
        r"(bert/embeddings/word_embeddings)/embedding",
        r"\1",
        "vo",
        tied="cls.predictions.decoder",
    ),
    *_SAME,
)

ROBERTA = (
    Name(r"(roberta/embeddings/word_embeddings)/embedding", r"\1", "vo", tied="lm_head.decoder"),
    *_SAME,
)

GPT2 = (
    Name(r"(transformer/wte)/embedding", r"\1", "vo", tied="lm_head"),
    # Flax keeps these kernels as (outputs, inputs), PyTorch's Conv1D as (inputs, outputs).
    Name(r"(.*/c_(?:attn|proj|fc|q_attn))/kernel", r"\1", "oi", transposed=True),
    *_SAME,
)

LLAMA = (
    Name(r"(model/embed_tokens)/embedding", r"\1", "vo", tied="lm_head"),
    *_SAME,
)

# The same tree with its layers stacked on axis 0 by a scan.
LLAMA_SCANNED = (
    Name(r"model/layers/(.*)/kernel", r"model.layers.{}.\1", "lio"),
    Name(r"model/layers/(.*)/(?:scale|weight)", r"model.layers.{}.\1", "lo"),
    *LLAMA,
)

VIT = (Name(r"(.*/patch_embeddings/projection)/kernel", r"\1", "kkio"), *_SAME)
