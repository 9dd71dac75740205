"""The models of tunix and those of `transformers`, on the same files. Needs `google-tunix`."""

import pathlib
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import pytest
from flax import nnx

with warnings.catch_warnings():  # of its own
    warnings.simplefilter("ignore")
    pytest.importorskip("tunix")
    from tunix.models.gemma import model as gemma2
    from tunix.models.gemma import params_safetensors as gemma2_files
    from tunix.models.gemma3 import model as gemma3
    from tunix.models.gemma3 import params_safetensors as gemma3_files
    from tunix.models.gemma4 import model as gemma4
    from tunix.models.llama3 import model as llama3
    from tunix.models.llama3 import params as llama3_files
    from tunix.models.qwen2 import model as qwen2
    from tunix.models.qwen2 import params as qwen2_files
    from tunix.models.qwen3 import model as qwen3
    from tunix.models.qwen3 import params as qwen3_files

    from tests.peft.names.tables.common import *

from jlora import LoRA, Slots
from jlora.peft import tables


def model(kind: Any, files: Any, config: Any) -> Model:
    """The model, which takes positions and a mask beside the tokens."""

    def apply(module: Any, tokens: jax.Array) -> jax.Array:
        batch, length = tokens.shape
        positions = jnp.tile(jnp.arange(length), (batch, 1))
        mask = jnp.tile(jnp.tril(jnp.ones((length, length), bool)), (batch, 1, 1))
        return module(tokens, positions, None, mask)[0]

    def load(folder: pathlib.Path) -> Any:
        return files.create_model_from_safe_tensors(str(folder), config)

    like = nnx.eval_shape(lambda: kind(config, rngs=nnx.Rngs(0)))
    return Model(like, apply, load if files else None)


def decoder(library: Any, kind: str, files: Any, tied: str) -> Any:
    """Llama's form, with the embedding `tied` to the head or not."""

    def build(config: Any) -> Model:
        own = sizes(config, "vocab_size") | {
            "num_layers": config.num_hidden_layers,
            "rope_theta": config.rope_parameters["rope_theta"],
            "norm_eps": config.rms_norm_eps,
            tied: config.tie_word_embeddings,
        }
        return model(getattr(library, kind), files, library.ModelConfig(**own))

    return build


def build_experts(config: Any) -> Model:
    own = qwen3.ModelConfig(
        **sizes(config, "vocab_size") | {"hidden_dim": config.moe_intermediate_size},
        num_layers=config.num_hidden_layers,
        rope_theta=config.rope_parameters["rope_theta"],
        norm_eps=config.rms_norm_eps,
        num_experts=config.num_experts,
        num_experts_per_tok=config.num_experts_per_tok,
    )
    return model(qwen3.Qwen3, qwen3_files, own)


def build_gemma2(config: Any) -> Model:
    local, everywhere = gemma2.AttentionType.LOCAL_SLIDING, gemma2.AttentionType.GLOBAL
    own = gemma2.ModelConfig(
        **sizes_of_gemma2(config),
        num_layers=config.num_hidden_layers,
        attention_types=(local, everywhere),
    )
    return model(gemma2.Gemma, gemma2_files, own)


def build_gemma3(config: Any) -> Model:
    own = gemma3.ModelConfig(
        **sizes(config),
        num_layers=config.num_hidden_layers,
        sliding_window_size=config.sliding_window,
        local_base_frequency=10_000,
        global_base_frequency=1_000_000,
        param_dtype=jnp.float32,
    )
    return model(gemma3.Gemma3, gemma3_files, own)


def build_gemma4(config: Any) -> Model:
    local, everywhere = gemma4.AttentionType.LOCAL_SLIDING, gemma4.AttentionType.GLOBAL
    own = gemma4.ModelConfig(
        **sizes_of_gemma4(config),
        num_layers=config.num_hidden_layers,
        attention_pattern=(local, everywhere),
        num_experts_per_tok=config.top_k_experts,
    )
    return model(gemma4.Gemma4, None, own)  # its loader wants the names of a model with vision


LLAMA3 = decoder(llama3, "Llama3", llama3_files, "weight_tying")
QWEN2 = decoder(qwen2, "Qwen2", qwen2_files, "use_tied_embedding")
QWEN3 = decoder(qwen3, "Qwen3", qwen3_files, "use_tied_embedding")
LINEAR = LoRA(r"layers/.*(_proj|q_einsum|attn_vec_einsum)/(w|kernel)", rank=4)
FUSED_KV = LoRA("kv_einsum", rank=4, slots=Slots(2, (0, 1))), LINEAR
FUSED_QKV = LoRA("qkv_einsum", rank=4, slots=Slots(3, (0, 1, 2))), LINEAR
# Of Llama 3 and Qwen 3, tunix 0.1.7 has this one whatever its configuration says.
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
EXPERTS = {
    "moe_intermediate_size": 24,
    "num_experts": 3,
    "num_experts_per_tok": 2,
    "norm_topk_prob": True,
}

CASES = {
    "llama3": Case(tables.tunix.LLAMA3, ("LlamaConfig", ROPE), LLAMA3, (LINEAR,)),
    "llama3-tied": Case(tables.tunix.LLAMA3, ("LlamaConfig", ROPE | TIED), LLAMA3, (LINEAR,)),
    "qwen2": Case(tables.tunix.QWEN2, ("Qwen2Config", {}), QWEN2, (LINEAR,)),
    "qwen2-tied": Case(tables.tunix.QWEN2, ("Qwen2Config", TIED), QWEN2, (LINEAR,)),
    "qwen3": Case(tables.tunix.QWEN3, ("Qwen3Config", ROPE), QWEN3, (LINEAR,)),
    "qwen3-tied": Case(tables.tunix.QWEN3, ("Qwen3Config", ROPE | TIED), QWEN3, (LINEAR,)),
    "qwen3-experts": Case(
        tables.tunix.QWEN3_EXPERTS,
        ("Qwen3MoeConfig", ROPE | EXPERTS),
        build_experts,
        (LINEAR, LoRA("mlp/(gate|up|down)_proj", rank=4)),
        some=("q_proj", "down_proj"),
        left="mlp.gate",  # no torch.nn.Linear there, so that PEFT takes it as a parameter only
    ),
    "gemma2": Case(tables.tunix.GEMMA, ("Gemma2Config", GEMMA2), build_gemma2, FUSED_KV),
    "gemma2-qkv": Case(
        tables.tunix.GEMMA, ("Gemma2Config", GEMMA2 | ALIKE), build_gemma2, FUSED_QKV
    ),
    "gemma3": Case(tables.tunix.GEMMA, ("Gemma3TextConfig", GEMMA3), build_gemma3, FUSED_KV),
    "gemma4": Case(
        tables.tunix.GEMMA4,
        ("Gemma4TextConfig", GEMMA4 | PER_LAYER),
        build_gemma4,
        (LoRA(r"per_layer_\w*(gate|projection)/w", rank=4), *FUSED_KV),
    ),
    "gemma4-experts": Case(
        tables.tunix.GEMMA4,
        ("Gemma4TextConfig", GEMMA4_EXPERTS),
        build_gemma4,
        (
            LoRA("router_logits", rank=3),
            LoRA("k_einsum/w|moe/(gating_einsum|linear)", rank=4),
            *FUSED_KV,
        ),
        some=("q_proj", "down_proj"),
        experts=PARAMETERS,
        constant="pre_feedforward_layernorm_2",  # after which the experts are chosen here
    ),
    "gemma3-qkv": Case(
        tables.tunix.GEMMA, ("Gemma3TextConfig", GEMMA3 | ALIKE), build_gemma3, FUSED_QKV
    ),
}

made = made_of(CASES, "llama3", "qwen3-experts", "gemma3", "gemma4-experts")
