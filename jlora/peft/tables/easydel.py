"""A name table for EasyDeL's decoders, whose modules are called as those of `transformers`."""

from .._names import Name

# Llama, Qwen 2 and 3, Gemma 2 and 3.
EASYDEL = (
    Name(r"(model/embed_tokens)/embedding", r"\1", "vo", tied="lm_head"),
    Name(r"(.*)/kernel", r"\1", "io"),
    Name(r"(.*)/kernel", r"\1", "o"),  # of norms
    Name(r"(.*)/bias", r"\1", "o", "bias"),
)
