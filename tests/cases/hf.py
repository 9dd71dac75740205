"""Whole models: small configurations of the Flax models of `transformers`, with random weights.

`transformers` is imported when a case is built, as it takes seconds. Slow are those whose kinds of
sites another case has.
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp

from jlora import LoRA, Slots

from ._case import Case, Problem, entry, fill

CASES: list[Case] = []
case = partial(entry, CASES, subject="model", exact_at_zero=False, strict=False)
LORA = LoRA(rank=2, alpha=4)  # all-linear
IDS = ((3, 0, 6, 1), (9, 2, 6, 4))
MASK = ((1, 1, 1, 1), (1, 1, 0, 0))
ENCODER = {
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
}
# Of one encoder layer at rank 2: q, k, v, o (8, 8); up (8, 12), down (12, 8).
LAYER = 4 * 2 * (8 + 8) + 2 * 2 * (8 + 12)


def model_of(name, dtype, **config):
    """A Flax model of `transformers` without weights."""
    import transformers

    cls = getattr(transformers, f"Flax{name}")
    return cls(cls.config_class(**config), dtype=dtype, _do_init=False)


def whole(name, dtype, *args, config, **kwargs):
    """A problem of the model `name` with random parameters."""
    model = model_of(name, dtype, **config)

    def apply(params, *args, **kwargs):
        return model(*args, params=params, **kwargs)

    return Problem(apply, fill(model.params_shape_tree, dtype, 0.3), args, kwargs)


# --------------------------------------------------------------------------------------------
# BERT.
# --------------------------------------------------------------------------------------------


@case(
    rules=(LoRA("word_embeddings", rank=3, alpha=3), LORA),
    sites=8,
    trainable=3 * (11 + 8) + LAYER + 2 * (8 + 8),  # the tied table; one layer; transform
    slow=True,
)
def hf_bert_masked_lm(dtype):
    """The head is tied to the table of words, which is adapted by name."""
    config = {**ENCODER, "num_hidden_layers": 1}
    return whole("BertForMaskedLM", dtype, jnp.array(IDS), config=config)


# --------------------------------------------------------------------------------------------
# GPT-2: kernels are stored (outputs, inputs).
# --------------------------------------------------------------------------------------------

GPT2 = {
    "vocab_size": 11,
    "n_embd": 8,
    "n_layer": 2,
    "n_head": 2,
    "n_inner": 12,
    "n_positions": 16,
    "bos_token_id": 0,
    "eos_token_id": 0,
}
# c_attn (24, 8), c_proj (8, 8), c_fc (12, 8), c_proj (8, 12).
GPT2_LAYER = 2 * (8 + 24) + 2 * (8 + 8) + 2 * (8 + 12) + 2 * (12 + 8)
QV = LoRA("c_attn/kernel$", rank=2, alpha=4, slots=Slots(3, (0, 2)))


@case(
    rules=(QV, LoRA("wte", rank=3, alpha=3), LoRA("wpe", rank=2, alpha=2), LORA),
    sites=10,
    # c_attn by slots; tied table; positions looked up; the three other kernels of two layers
    trainable=128 + 3 * (11 + 8) + 2 * (16 + 8) + 2 * (GPT2_LAYER - 2 * (8 + 24)),
    float64=False,
)
def hf_gpt2_everything(dtype):
    """Every matrix of GPT-2, with tables by name."""
    return whole("GPT2LMHeadModel", dtype, jnp.array(IDS), config=GPT2)


# --------------------------------------------------------------------------------------------
# Llama.
# --------------------------------------------------------------------------------------------

LLAMA = {
    **ENCODER,
    "num_hidden_layers": 1,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
}


@case(
    rules=(LORA,),
    sites=8,
    # q, o; k, v (8, 4); gate, up, down; head
    trainable=2 * 2 * (8 + 8) + 2 * 2 * (8 + 4) + 3 * 2 * (8 + 12) + 2 * (8 + 11),
    float64=False,
)
def hf_llama(dtype):
    """Llama with grouped queries, all-linear."""
    mask = jnp.array(MASK)
    return whole("LlamaForCausalLM", dtype, jnp.array(IDS), config=LLAMA, attention_mask=mask)
