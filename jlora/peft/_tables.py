"""Name tables for the models of `transformers` in Flax and for those of this repository."""

from ._names import Name

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


def _rows(modules: dict[str, str], stack: str = "") -> tuple[Name, ...]:
    """Kernel, bias and scale of each module: ours to PyTorch's."""
    ends = (("kernel", "io", "weight"), ("scale", "o", "weight"), ("bias", "o", "bias"))
    return tuple(
        Name(f"{ours}/{leaf}", theirs, (stack if "{}" in theirs else "") + axes, parameter)
        for ours, theirs in modules.items()
        for leaf, axes, parameter in ends
    )


# examples/models/bert.py
EXAMPLE_BERT = (
    Name("embeddings/word/embedding", "embeddings.word_embeddings", "vo"),
    Name("embeddings/position/embedding", "embeddings.position_embeddings", "vo"),
    Name("embeddings/token_type/embedding", "embeddings.token_type_embeddings", "vo"),
    *_rows(
        {
            "embeddings/norm": "embeddings.LayerNorm",
            r"encoder/layer_(\d+)/attention/(query|key|value)": (
                r"encoder.layer.\1.attention.self.\2"
            ),
            r"encoder/layer_(\d+)/attention/out": r"encoder.layer.\1.attention.output.dense",
            r"encoder/layer_(\d+)/attention_norm": r"encoder.layer.\1.attention.output.LayerNorm",
            r"encoder/layer_(\d+)/up": r"encoder.layer.\1.intermediate.dense",
            r"encoder/layer_(\d+)/down": r"encoder.layer.\1.output.dense",
            r"encoder/layer_(\d+)/norm": r"encoder.layer.\1.output.LayerNorm",
            "classifier": "classifier",
        }
    ),
)

# examples/models/llama.py
EXAMPLE_LLAMA = (
    Name("embed/embedding", "model.embed_tokens", "vo", tied="lm_head"),
    *_rows(
        {
            "layers/attention/query": "model.layers.{}.self_attn.q_proj",
            "layers/attention/key": "model.layers.{}.self_attn.k_proj",
            "layers/attention/value": "model.layers.{}.self_attn.v_proj",
            "layers/attention/out": "model.layers.{}.self_attn.o_proj",
            r"layers/mlp/(gate|up|down)": r"model.layers.{}.mlp.\1_proj",
            "layers/attention_norm": "model.layers.{}.input_layernorm",
            "layers/mlp_norm": "model.layers.{}.post_attention_layernorm",
            "norm": "model.norm",
        },
        stack="l",
    ),
)

# By the names that the command line takes.
TABLES = {
    "bert": BERT,
    "roberta": ROBERTA,
    "gpt2": GPT2,
    "llama": LLAMA,
    "llama-scanned": LLAMA_SCANNED,
    "vit": VIT,
    "example-bert": EXAMPLE_BERT,
    "example-llama": EXAMPLE_LLAMA,
}
