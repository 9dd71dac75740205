"""Small decoders of every family, by the config classes of `transformers`, for the tests."""

import functools
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import jax.numpy as jnp
import numpy as np
import transformers
from cases._case import fill
from models import checkpoint, hf
from models.decoder import Config
from models.families import read_config

SIZES = {
    "vocab_size": 61,
    "hidden_size": 16,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "intermediate_size": 24,
    "max_position_embeddings": 64,
    "rope_theta": 500.0,
}
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0}
LLAMA3 |= {"original_max_position_embeddings": 32}
PATTERN = ["sliding_attention", "full_attention"]
GEMMA = {"head_dim": 8, "query_pre_attn_scalar": 6, "sliding_window": 4, "layer_types": PATTERN}
CAPS = {"attn_logit_softcapping": 2.0, "final_logit_softcapping": 3.0}
EXPERTS = {"moe_intermediate_size": 12, "num_experts": 5, "num_experts_per_tok": 3, "head_dim": 8}
# The class of each, and what its config has besides `SIZES`.
FAMILIES: Mapping[str, tuple[str, Mapping[str, Any]]] = {
    "llama": ("Llama", {"tie_word_embeddings": True}),
    "llama_untied": ("Llama", {}),
    "llama3": ("Llama", {"rope_scaling": LLAMA3, "attention_bias": True, "mlp_bias": True}),
    "mistral": ("Mistral", {"sliding_window": 3, "tie_word_embeddings": True}),
    "mixtral": ("Mixtral", {"num_local_experts": 4, "sliding_window": 5}),
    "qwen2": ("Qwen2", {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 1}),
    "qwen3": ("Qwen3", {"head_dim": 8, "tie_word_embeddings": True}),
    "qwen3_moe": ("Qwen3Moe", EXPERTS),
    "gemma2": ("Gemma2", {**GEMMA, **CAPS, "attention_bias": True}),
    "gemma3": ("Gemma3Text", {**GEMMA, "rope_local_base_freq": 20.0}),
}


def fields(name: str, **more: Any) -> dict[str, Any]:
    """The config.json of a family, as `transformers` has it."""
    kind, own = FAMILIES[name]
    return getattr(transformers, f"{kind}Config")(**{**SIZES, **own, **more}).to_dict()


@functools.cache
def config(name: str) -> Config:
    """Of a family."""
    found = fields(name)
    return replace(read_config(found), tied=found["tie_word_embeddings"])


@functools.cache
def tensors(name: str) -> dict[str, np.ndarray]:
    """Random ones, as in a file."""
    variables = fill(checkpoint.shapes(config(name), False), jnp.float32, 0.3)
    return hf.to_tensors(variables, checkpoint.names(config(name)))


def variables(name: str, scan: bool = True) -> dict[str, Any]:
    """The same whether scanned or not."""
    like = checkpoint.shapes(config(name), scan)
    return hf.to_variables(tensors(name), like, checkpoint.names(config(name)))
