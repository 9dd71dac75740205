"""The decoders of MaxText and those of `transformers`, on the same files. Needs `maxtext`.

MaxText needs Python 3.12 and JAX 0.11.
"""

import pathlib
import warnings
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from flax import nnx
from safetensors.numpy import load_file

with warnings.catch_warnings():  # of its own
    warnings.simplefilter("ignore")
    maxtext = pytest.importorskip("maxtext")
    from maxtext.checkpoint_conversion.utils import param_mapping
    from maxtext.configs import pyconfig
    from maxtext.utils import model_creation_utils

    from tests.peft.names.tables.common import *

from jlora import LoRA
from jlora.peft import tables

SETTINGS = pathlib.Path(maxtext.__file__).parent / "configs" / "base.yml"
# Numbers as they are, in float32, on one device.
PLAIN = {
    "run_name": "test",
    "skip_jax_distributed_system": True,
    "enable_checkpointing": False,
    "enable_dropout": False,
    "dtype": "float32",
    "weight_dtype": "float32",
    "matmul_precision": "highest",
    "attention": "dot_product",
    "normalize_embedding_logits": False,
    "mlp_activations": "['silu','linear']",
}


def settings(config: Any, more: dict[str, Any]) -> Any:
    """MaxText's configuration from that of `transformers`."""
    own = {
        "vocab_size": config.vocab_size,
        "base_emb_dim": config.hidden_size,
        "base_mlp_dim": config.intermediate_size,
        "base_num_decoder_layers": config.num_hidden_layers,
        "base_num_query_heads": config.num_attention_heads,
        "base_num_kv_heads": config.num_key_value_heads,
        "head_dim": config.head_dim,
        "logits_via_embedding": config.tie_word_embeddings,
        "normalization_layer_epsilon": config.rms_norm_eps,
    }
    given = [f"{key}={value}" for key, value in (PLAIN | own | more).items()]
    return pyconfig.initialize(["", str(SETTINGS), *given])


def decoder(own: Callable[[Any], dict[str, Any]], scan: bool, mapping: str | None = None) -> Any:
    """From a configuration to the model with its `own` settings too."""

    def build(config: Any) -> Model:
        made = settings(config, own(config) | {"scan_layers": scan})
        model = model_creation_utils.from_config(made, rngs=nnx.Rngs(0))
        graph, params, rest = nnx.split(model, nnx.Param, ...)

        def apply(params: Any, tokens: jax.Array) -> jax.Array:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
            model = nnx.merge(graph, params, rest, copy=True)
            return model(tokens, positions, enable_dropout=False)

        def load(folder: pathlib.Path) -> Any:
            return converted(mapping, config, scan, params, folder)

        return Model(params, apply, load if mapping else None)

    return build


def converted(mapping: str, config: Any, scan: bool, like: Any, folder: pathlib.Path) -> Any:
    """The parameters by MaxText's tables of names and functions."""
    tensors = load_file(folder / "model.safetensors")
    fields = config.to_dict()
    names = getattr(param_mapping, f"{mapping}_PARAM_MAPPING")(fields, None, scan)
    hooks = getattr(param_mapping, f"{mapping}_PARAM_HOOK_FN")(fields, None, scan)

    def one(path: tuple[str, ...], x: Any) -> jax.Array:
        key = "-".join(["params", *path])
        found = names[key]
        if isinstance(found, str):
            return jnp.asarray(hooked(hooks.get(key), tensors[found], x.shape))
        shape = (*x.shape[:1], *x.shape[2:])
        return jnp.stack([hooked(hooks.get(key), tensors[name], shape) for name in found], 1)

    flat = nnx.to_flat_state(like)
    values = [(path, x.replace(one(path, x.get_value()))) for path, x in flat]
    return nnx.from_flat_state(values)


def hooked(hook: Any, x: np.ndarray, shape: tuple[int, ...]) -> Any:
    for f in hook if isinstance(hook, list) else [hook] if hook else []:
        x = f(x, shape)
    return x


def llama(config: Any) -> dict[str, Any]:
    return {"decoder_block": "llama2", "rope_type": "llama3.1", "rope_max_timescale": 500_000}


def qwen3(config: Any) -> dict[str, Any]:
    return {"decoder_block": "qwen3", "use_qk_norm": True, "rope_max_timescale": 1_000_000}


def gpt_oss(config: Any) -> dict[str, Any]:
    return {
        **YARN,
        **EXPERTS,
        "decoder_block": "gpt_oss",
        "base_moe_mlp_dim": config.intermediate_size,
        "num_experts": config.num_local_experts,
        "attention_bias": True,
        "attention_sink": True,
        "mlp_activations": "['sigmoid','linear']",
        "mlp_activations_limit": 7.0,
        "routed_bias": True,
        "mlp_bias": True,
        "sliding_window_size": config.sliding_window,
        "inhomogeneous_layer_cycle_interval": 2,
        "rope_interleave": False,
        "rope_truncate": False,
        "rope_attention_scaling": True,
    }


def deepseek(config: Any) -> dict[str, Any]:
    return {
        **YARN,
        **EXPERTS,
        "decoder_block": "deepseek",
        "first_num_dense_layers": config.first_k_dense_replace,
        "base_moe_mlp_dim": config.moe_intermediate_size,
        "num_experts": config.n_routed_experts,
        "shared_experts": config.n_shared_experts,
        "routed_scaling_factor": config.routed_scaling_factor,
        "routed_score_func": "sigmoid",
        "routed_bias": True,
        "attention_type": "mla",
        "q_lora_rank": config.q_lora_rank,
        "kv_lora_rank": config.kv_lora_rank,
        "qk_nope_head_dim": config.qk_nope_head_dim,
        "qk_rope_head_dim": config.qk_rope_head_dim,
        "v_head_dim": config.v_head_dim,
        "rope_max_timescale": 10_000,
        "max_position_embeddings": config.max_position_embeddings,
        "rope_factor": 40,
        "rope_interleave": True,
        "rope_truncate": True,
        "rope_attention_scaling": False,
        "mscale": 1.0,
    }


def llama4(config: Any) -> dict[str, Any]:
    return {
        **EXPERTS,
        "decoder_block": "llama4",
        "base_moe_mlp_dim": config.intermediate_size,
        "base_mlp_dim": config.intermediate_size_mlp,
        "num_experts": config.num_local_experts,
        "shared_experts": 1,
        "num_experts_per_tok": 1,
        "rope_max_timescale": 500_000,
        "rope_type": "llama3.1",
        "rope_use_scale": False,
        "use_qk_norm": False,
        "nope_layer_interval": 4,
        "interleave_moe_layer_step": 2,
        "inhomogeneous_layer_cycle_interval": 4,
        "temperature_tuning": True,
        "chunk_attn_window_size": config.attention_chunk_size,
    }


def gemma4(config: Any) -> dict[str, Any]:
    own = {
        "model_name": "gemma4-26b" if config.enable_moe_block else "gemma4-31b",
        "override_model_config": True,
        "normalize_embedding_logits": True,
        "mlp_activations": "['gelu','linear']",
        "global_head_dim": config.per_layer_config[-1].head_dim,
        "sliding_window_size": config.sliding_window,
        "use_post_attn_norm": True,
        "use_post_ffw_norm": True,
        "share_kv_projections": config.attention_k_eq_v,
        "global_num_kv_heads": config.per_layer_config[-1].num_key_value_heads,
        "local_rope_max_timescale": 10_000,
        "global_rope_max_timescale": 1_000_000,
        "rope_max_timescale": 1_000_000,
        "global_rope_proportion": 0.25,
        "local_rope_proportion": 1.0,
        "v_norm_with_scale": False,
        "final_logits_soft_cap": config.final_logit_softcapping or 0.0,
    }
    if config.enable_moe_block:
        own |= EXPERTS | {
            "base_moe_mlp_dim": config.moe_intermediate_size,
            "num_experts": config.num_experts,
            "shared_experts": 1,
            "norm_topk_prob": True,
        }
    return own


EXPERTS = {"megablox": False, "sparse_matmul": False, "num_experts_per_tok": 2}
YARN = {
    "rope_type": "yarn",
    "rope_max_timescale": 150_000,
    "max_position_embeddings": 131_072,
    "original_max_position_embeddings": 4096,
    "rope_factor": 32,
    "beta_fast": 32,
    "beta_slow": 1,
}
# MaxText has it without numbers of its own.
SCALED = {"max_position_embeddings": 131_072} | scaled(8192)
PLAIN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
LINEAR = (LoRA(r"(self_attention|mlp)/\w+/kernel", rank=4),)
ALL = (LoRA(r"\w*([aA]ttention|mlp|shared_experts)/\w+/kernel|(wi_0|wi_1|wo)$", rank=4),)
GPT_OSS = {
    "num_hidden_layers": 4,
    "num_local_experts": 3,
    "num_experts_per_tok": 2,
    "sliding_window": 5,
    "max_position_embeddings": 131_072,
}
DEEPSEEK = {
    "num_hidden_layers": 5,
    "num_key_value_heads": 4,
    "first_k_dense_replace": 3,
    "moe_intermediate_size": 20,
    "n_routed_experts": 4,
    "num_experts_per_tok": 2,
    "n_group": 1,
    "topk_group": 1,
    "q_lora_rank": 12,
    "kv_lora_rank": 10,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 4,
    "v_head_dim": 6,
    "head_dim": 4,
    "max_position_embeddings": 163_840,
    "rope_parameters": {
        "rope_type": "yarn",
        "rope_theta": 1e4,
        "factor": 40.0,
        "original_max_position_embeddings": 4096,
        "beta_fast": 32,
        "beta_slow": 1,
        "mscale": 1.0,
        "mscale_all_dim": 1.0,
    },
}
LLAMA4 = {
    "num_hidden_layers": 8,
    "num_local_experts": 3,
    "num_experts_per_tok": 1,
    "intermediate_size_mlp": 40,
    "interleave_moe_layer_step": 2,
    "use_qk_norm": False,
    "attention_chunk_size": 8,
    "rope_parameters": {"rope_type": "default", "rope_theta": 5e5},
}
BLOCKS = {
    "hidden_size": 64,  # whose root is exact
    "num_hidden_layers": 12,
    "layer_types": (["sliding_attention"] * 5 + ["full_attention"]) * 2,
}
LLAMA31, QWEN = "LLAMA31_MAXTEXT_TO_HF", "QWEN_MAXTEXT_TO_HF"
MAPPINGS = {"llama": LLAMA31, "qwen3": QWEN, "qwen3-tied": QWEN}  # of MaxText's own converter
LLAMA, QWEN3 = tables.maxtext.LLAMA, tables.maxtext.QWEN3

MODELS = {
    "llama": Case(LLAMA, ("LlamaConfig", SCALED), llama, LINEAR, rounded="q_proj"),
    "qwen3": Case(QWEN3, ("Qwen3Config", PLAIN_ROPE), qwen3, LINEAR),
    "qwen3-tied": Case(QWEN3, ("Qwen3Config", PLAIN_ROPE | TIED), qwen3, LINEAR),
    "gpt-oss": Case(
        tables.maxtext.GPT_OSS,
        ("GptOssConfig", GPT_OSS),
        gpt_oss,
        ALL,
        some=("q_proj", "v_proj"),
        experts=PARAMETERS,
    ),
    "deepseek": Case(
        tables.maxtext.DEEPSEEK_V3,
        ("DeepseekV3Config", DEEPSEEK),
        deepseek,
        # PEFT takes the MLP of dense layers and of shared experts for experts, and adapts none.
        (LoRA(r"self_attention/\w+/kernel|(wi_0|wi_1|wo)$", rank=4),),
        some=("q_a_proj", "kv_b_proj"),
        left="mlp.gate",
        experts=PARAMETERS,
    ),
    "llama4": Case(
        tables.maxtext.LLAMA4,
        ("Llama4TextConfig", LLAMA4),
        llama4,
        ALL,
        some=("q_proj", "v_proj"),
        experts=PARAMETERS,
        every=r".*_proj",  # all but the router, whose outputs PEFT takes for one
    ),
}
for name, config, experts in (
    ("gemma4", GEMMA4, ()),
    ("gemma4-experts", GEMMA4_EXPERTS, PARAMETERS),
):
    MODELS[name] = Case(
        tables.maxtext.GEMMA4,
        ("Gemma4TextConfig", config | BLOCKS),
        gemma4,
        ALL,
        some=("q_proj", "o_proj"),
        experts=experts,
        left="router.proj",
    )
CASES = {
    name + "-scanned" * scan: case._replace(build=decoder(case.build, scan, MAPPINGS.get(name)))
    for name, case in MODELS.items()
    for scan in (False, True)
}

made = made_of(CASES, "llama-scanned", "gpt-oss-scanned")
