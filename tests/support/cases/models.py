"""Whole models: the linen models of the examples, small, with random weights.

Each with queries and values by name and all-linear, one of both with its layers scanned.
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp

from jlora import LoRA, Slots

from ._case import Case, Problem, entry, fill

CASES: list[Case] = []
IDS = ((3, 0, 6, 1), (9, 2, 6, 4))
MASK = ((1, 1, 1, 1), (1, 1, 0, 0))
# Of one encoder layer at rank 2: q, k, v, o (8, 8); up (8, 12), down (12, 8).
LAYER = 4 * 2 * (8 + 8) + 2 * 2 * (8 + 12)
SIZES = {"layers": 2, "dim": 8, "heads": 2}
ENCODER = {
    "vocab_size": 11,
    "hidden_size": 8,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "intermediate_size": 12,
    "max_position_embeddings": 16,
    "layer_norm_eps": 1e-6,
    "head": "cls",
}
HEAD = 2 * (8 + 8) + 2 * (8 + 3)  # pooler, classifier
DISENTANGLED = {"position_buckets": 2, "conv_kernel_size": 3}


def gpt(**options):
    """GPT-2."""
    from models import gpt

    config = gpt.Config(vocab=11, positions=16, inner=12, **SIZES)
    return gpt.GPT(config, **options), gpt.shapes(config, options["scan"])


def llama(**options):
    """Llama with grouped queries and a head of its own."""
    from models import llama

    config = llama.Config(vocab=11, hidden=12, kv_heads=2, **{**SIZES, "heads": 4}, tied=False)
    return llama.Llama(config, **options), llama.shapes(config, options["scan"])


def roberta(**options):
    """RoBERTa for classification."""
    from models import bert

    config = bert.Config(**ENCODER, type_vocab_size=1, model_type="roberta", pad_token_id=1)
    return bert.Bert(config, 3, **options), bert.shapes(config, 3, options["scan"])


def deberta(**options):
    """DeBERTa-v2 for classification, with a convolution."""
    from models import deberta

    config = deberta.Config(**ENCODER, type_vocab_size=0, **DISENTANGLED)
    return deberta.Deberta(config, 3, **options), deberta.shapes(config, 3, options["scan"])


def whole(dtype, make, scan):
    """A problem of the model that `make` makes."""
    options = {"dtype": dtype, "param_dtype": dtype, "scan": scan}
    model, shapes = make(**options)
    return Problem(model.apply, fill(shapes, dtype, 0.3), (jnp.array(IDS), jnp.array(MASK)))


BY_NAME = LoRA("attention/(query|value)/kernel", rank=2, alpha=4)
C_ATTN = LoRA("c_attn/kernel", rank=2, alpha=4, slots=Slots(3, (0, 2)))
ALL = LoRA(rank=2, alpha=4)
# Rules, whether scanned, the sites of a layer and elsewhere, and their trainable parameters.
EXPECTED = {
    "gpt_qv_scan": (gpt, C_ATTN, True, 1, 0, 2 * 2 * (8 + 8), 0),
    "gpt_all_loop": (gpt, ALL, False, 4, 0, 2 * (8 + 24) + 2 * (8 + 8) + 2 * 2 * (8 + 12), 0),
    "llama_qv_loop": (llama, BY_NAME, False, 2, 0, 2 * (8 + 8) + 2 * (8 + 4), 0),
    "llama_all_scan": (
        *(llama, ALL, True, 7, 1),
        *(4 * (8 + 8) + 4 * (8 + 4) + 6 * (8 + 12), 2 * (8 + 11)),
    ),
    "roberta_qv_scan": (roberta, BY_NAME, True, 2, 0, 4 * (8 + 8), 0),
    "roberta_all_loop": (roberta, ALL, False, 6, 2, LAYER, HEAD),
    "deberta_qv_loop": (deberta, BY_NAME, False, 2, 0, 4 * (8 + 8), 0),
    "deberta_all_scan": (deberta, ALL, True, 6, 3, LAYER, HEAD + 2 * (3 * 8 + 8)),
}
for name, (make, rule, scan, sites, more_sites, trainable, more_trainable) in EXPECTED.items():
    entry(CASES)(
        *("model", 2 * trainable + more_trainable, f"model_{name}"),
        rules=(rule,),
        sites=sites * (1 if scan else 2) + more_sites,
        # JAX's own attention computes its weights in float32.
        float64=make in (roberta, deberta),
        tolerance=2e-5,
        exact_at_zero=False,
        strict=False,
    )(partial(whole, make=make, scan=scan))
