"""The models of keras-hub and those of `transformers`, on the same files. Needs `keras-hub`."""

import os
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import pytest

os.environ.setdefault("KERAS_BACKEND", "jax")
with warnings.catch_warnings():  # of its own
    warnings.simplefilter("ignore")
    keras_hub = pytest.importorskip("keras_hub")
    from tests.peft.names.tables.common import *

from jlora import LoRA
from jlora.peft import tables


def model(kind: str, backbone: Any) -> Model:
    """The model, whose parameters are a dict by path."""
    model = getattr(keras_hub.models, f"{kind}CausalLM")(backbone=backbone, preprocessor=None)

    def apply(params: dict[str, jax.Array], tokens: jax.Array) -> jax.Array:
        trained, others = (
            [params[v.path] for v in variables]
            for variables in (model.trainable_variables, model.non_trainable_variables)
        )
        inputs = {"token_ids": tokens, "padding_mask": jnp.ones_like(tokens)}
        return model.stateless_call(trained, others, inputs)[0]

    def load(folder: Any) -> dict[str, jax.Array]:
        return parameters(type(backbone).from_preset(str(folder), dtype="float32"))

    return Model(parameters(model), apply, load)


def parameters(model: Any) -> dict[str, jax.Array]:
    return {v.path: v.value for v in model.variables}


def decoder(kind: str, **more: Any) -> Any:
    def build(config: Any) -> Model:
        own = {
            "vocabulary_size": config.vocab_size,
            "num_layers": config.num_hidden_layers,
            "num_query_heads": config.num_attention_heads,
            "num_key_value_heads": config.num_key_value_heads,
            "hidden_dim": config.hidden_size,
            "intermediate_dim": config.intermediate_size,
            "layer_norm_epsilon": config.rms_norm_eps,
            "dtype": "float32",
        }
        return model(kind, getattr(keras_hub.models, f"{kind}Backbone")(**own, **more))

    return build


# keras-hub 0.32 does not find it in the files of transformers 5.
SCALED = scaled(32)
LLAMA31 = decoder(
    "Llama3",
    rope_max_wavelength=5e5,
    rope_frequency_adjustment_factor=8.0,
    rope_low_freq_factor=1.0,
    rope_high_freq_factor=4.0,
    rope_pretraining_sequence_length=32,
)
# The sixth layer sees everything; the seventh is local again.
GEMMA3 = {"query_pre_attn_scalar": 8, "sliding_window": 5, "num_hidden_layers": 7}
LINEAR = (LoRA(r".*attention/.*kernel|.*dense/kernel|ffw.*kernel", rank=4),)

CASES = {
    "llama3": Case(tables.keras_hub.LLAMA3, ("LlamaConfig", {}), decoder("Llama3"), LINEAR),
    "llama3.1": Case(tables.keras_hub.LLAMA3, ("LlamaConfig", SCALED), LLAMA31, LINEAR),
    "llama3-tied": Case(
        tables.keras_hub.LLAMA3,
        ("LlamaConfig", TIED),
        decoder("Llama3", tie_word_embeddings=True),
        LINEAR,
    ),
    "qwen3": Case(
        tables.keras_hub.QWEN3,
        ("Qwen3Config", {}),
        decoder("Qwen3", head_dim=8, tie_word_embeddings=False),
        LINEAR,
    ),
    "qwen3-tied": Case(
        tables.keras_hub.QWEN3,
        ("Qwen3Config", TIED),
        decoder("Qwen3", head_dim=8, tie_word_embeddings=True),
        LINEAR,
    ),
    "gemma3": Case(
        tables.keras_hub.GEMMA3,
        ("Gemma3TextConfig", GEMMA3),
        decoder(
            "Gemma3",
            image_size=None,
            head_dim=8,
            use_query_key_norm=True,
            use_post_ffw_norm=True,
            use_post_attention_norm=True,
            use_sliding_window_attention=True,
            sliding_window_size=5,
        ),
        LINEAR,
    ),
}

made = made_of(CASES, "gemma3")
