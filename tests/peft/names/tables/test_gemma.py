"""The package `gemma` and `transformers`, on the same files. Needs `gemma`.

It has no loader of PyTorch's files, so that the base is loaded by the table alone. It needs
Python 3.12.
"""

import functools
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import pytest

with warnings.catch_warnings():  # of its own
    warnings.simplefilter("ignore")
    gm = pytest.importorskip("gemma.gm")
    from gemma.gm.nn import AttentionType, Transformer
    from gemma.gm.nn.config import TransformerConfig
    from gemma.gm.nn.gemma4 import _config, _modules, _transformer

    from tests.peft.names.tables.common import *

from jlora import LoRA, Slots
from jlora.peft import tables


def model(module: Any) -> Model:
    like = jax.eval_shape(module.init, jax.random.key(0), jnp.ones((1, 2), jnp.int32))
    return Model(like, lambda params, tokens: module.apply(params, tokens).logits)


def types(config: Any, kinds: Any) -> tuple[Any, ...]:
    """What each layer sees."""
    local, everywhere = kinds.LOCAL_SLIDING, kinds.GLOBAL
    return tuple(local if x == "sliding_attention" else everywhere for x in config.layer_types)


def build(config: Any, **more: Any) -> Model:
    more |= {"attention_types": types(config, AttentionType)}
    own = TransformerConfig(**sizes_of_gemma2(config), **more)
    return model(Transformer(config=own, dtype=jnp.float32))


def build_gemma4(config: Any) -> Model:
    own = _config.TransformerConfig(
        **sizes_of_gemma4(config),
        use_post_attn_norm=True,
        use_post_ffw_norm=True,
        attention_types=types(config, _modules.AttentionType),
        local_base_frequency=10_000,
        global_base_frequency=1_000_000,
        local_rope_proportion=1.0,
        global_rope_proportion=0.25,
        top_k_experts=config.top_k_experts or 0,
    )
    return model(_transformer.Transformer(config=own, dtype=jnp.float32))


build_9b = functools.partial(build, transpose_gating_einsum=True)
build_gemma3 = functools.partial(
    build_9b, use_qk_norm=True, local_base_frequency=10_000, global_base_frequency=1_000_000
)
RULES = (
    LoRA("kv_einsum/w|gating_einsum", rank=4, slots=Slots(2, (0, 1))),
    LoRA("(q_einsum|attn_vec_einsum)/w|linear", rank=4),
)
QKV_RULES = (
    LoRA("qkv_einsum/w", rank=4, slots=Slots(3, (0, 1, 2))),
    LoRA("gating_einsum", rank=4, slots=Slots(2, (0, 1))),
    LoRA("attn_vec_einsum/w|linear", rank=4),
)

CASES = {
    "gemma2-2b": Case(tables.gemma.GEMMA2_2B, ("Gemma2Config", GEMMA2), build, RULES),
    "gemma2-9b": Case(tables.gemma.GEMMA3, ("Gemma2Config", GEMMA2), build_9b, RULES),
    "gemma3": Case(tables.gemma.GEMMA3, ("Gemma3TextConfig", GEMMA3), build_gemma3, RULES),
    "gemma3-qkv": Case(
        tables.gemma.GEMMA3, ("Gemma3TextConfig", GEMMA3 | ALIKE), build_gemma3, QKV_RULES
    ),
}
GEMMA4_RULES = (
    LoRA(r"kv_einsum/w|(mlp2?)/gating_einsum$", rank=4, slots=Slots(2, (0, 1))),
    LoRA(r"(q_einsum|k_einsum|attn_vec_einsum)/w|mlp2?/linear$|per_layer_\w+(gate|n)/w", rank=4),
)
EXPERTS = (
    LoRA(r"kv_einsum/w|mlp2/gating_einsum", rank=4, slots=Slots(2, (0, 1))),
    LoRA("router_logits", rank=3),
    LoRA(r"(q_einsum|k_einsum|attn_vec_einsum)/w|mlp2/linear|mlp/\w+/w", rank=4),
)
CASES |= {
    "gemma4": Case(
        tables.gemma.GEMMA4, ("Gemma4TextConfig", GEMMA4 | PER_LAYER), build_gemma4, GEMMA4_RULES
    ),
    "gemma4-experts": Case(
        tables.gemma.GEMMA4_EXPERTS,
        ("Gemma4TextConfig", GEMMA4_EXPERTS),
        build_gemma4,
        EXPERTS,
        some=("q_proj", "down_proj"),
        experts=PARAMETERS,
        constant="pre_feedforward_layernorm_2",  # after which the experts are chosen here
    ),
}

made = made_of(CASES, "gemma3", "gemma4-experts")
