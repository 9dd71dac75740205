"""Whole models: the linen models of the examples, small, with random weights.

Each with queries and values by name and all-linear, its layers scanned and not.
"""

from __future__ import annotations

from functools import partial

import jax.numpy as jnp

from jlora import LoRA, Slots

from ._case import Case, Problem, fill

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
# The rule, the sites of a layer and elsewhere, and their trainable parameters.
EXPECTED = {
    gpt: [
        (C_ATTN, 1, 0, 2 * 2 * (8 + 8), 0),
        (ALL, 4, 0, 2 * (8 + 24) + 2 * (8 + 8) + 2 * 2 * (8 + 12), 0),
    ],
    llama: [
        (BY_NAME, 2, 0, 2 * (8 + 8) + 2 * (8 + 4), 0),
        (ALL, 7, 1, 4 * (8 + 8) + 4 * (8 + 4) + 6 * (8 + 12), 2 * (8 + 11)),
    ],
    roberta: [(BY_NAME, 2, 0, 4 * (8 + 8), 0), (ALL, 6, 2, LAYER, HEAD)],
    deberta: [(BY_NAME, 2, 0, 4 * (8 + 8), 0), (ALL, 6, 3, LAYER, HEAD + 2 * (3 * 8 + 8))],
}
# Of each model for every day: whether all-linear, whether scanned.
DAILY = {
    gpt: (False, True),
    llama: (True, False),
    roberta: (True, False),
    deberta: (False, True),
}
for make, choices in EXPECTED.items():
    for rule, sites, more_sites, trainable, more_trainable in choices:
        for scan in (True, False):
            name = f"{make.__name__}_{'all' if rule is ALL else 'qv'}_{'scan' if scan else 'loop'}"
            case = Case(
                name=f"model_{name}",
                subject="model",
                build=partial(whole, make=make, scan=scan),
                rules=(rule,),
                sites=sites * (1 if scan else 2) + more_sites,
                trainable=2 * trainable + more_trainable,
                # JAX's own attention computes its weights in float32.
                float64=make in (roberta, deberta),
                tolerance=2e-5,
                exact_at_zero=False,
                strict=False,
                slow=(rule is ALL, scan) != DAILY.get(make),
            )
            CASES.append(case)
