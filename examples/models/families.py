"""What config.json says of each family of decoders, and what that means.

    config = read_config(json.loads(path.read_text()), path)

A family is a row of `FAMILIES`, by the `model_type` of its config.json.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from types import MappingProxyType
from typing import Any, NamedTuple

from . import hf
from .decoder import ACTIVATIONS, Config
from .rope import SCALINGS, Linear, Llama3

Fields = Mapping[str, Any]
# Our names of fields and those of config.json.
FIELDS = {
    "vocab": "vocab_size",
    "layers": "num_hidden_layers",
    "dim": "hidden_size",
    "hidden": "intermediate_size",
    "heads": "num_attention_heads",
    "kv_heads": "num_key_value_heads",
    "head_size": "head_dim",
    "rope_base": "rope_theta",
    "norm_eps": "rms_norm_eps",
    "activation": "hidden_act",
    "model_type": "model_type",
}
GEMMA_FIELDS = {
    "activation": "hidden_activation",
    "query_scale": "query_pre_attn_scalar",
    "attention_cap": "attn_logit_softcapping",
    "logit_cap": "final_logit_softcapping",
}
ROUTED = {"experts_per_token": "num_experts_per_tok"}
ABSENT = {"num_key_value_heads": "num_attention_heads"}
# What these must be, or be absent, in every family.
KNOWN: Fields = {"partial_rotary_factor": 1.0}
QKV, MLP = ("query", "key", "value"), ("gate", "up", "down")


def _every(found: Fields, layer: int) -> bool:
    return found.get("use_sliding_window", True)


def _upper(found: Fields, layer: int) -> bool:
    return found["use_sliding_window"] and layer >= found["max_window_layers"]


def _but_every_nth(found: Fields, layer: int) -> bool:
    return (layer + 1) % found["sliding_window_pattern"] != 0


_NONE: Fields = MappingProxyType({})
_NORMS = {"attention_norm": "input_layernorm", "mlp_norm": "post_attention_layernorm"}


class Family(NamedTuple):
    """What the files of one `model_type` have in their own way.

    Attributes:
        defaults: what a field means that config.json leaves out.
        fields: besides `FIELDS`.
        known: besides `KNOWN`.
        implied: the fields of `Config` that the type itself decides.
        slides: whether a layer has a window, where there is no `layer_types`.
        mlp: the module of the MLP or of its experts there, and its three layers.
        norms: those of a layer.
    """

    defaults: Fields = _NONE
    fields: Mapping[str, str] = _NONE
    known: Fields = _NONE
    implied: Fields = _NONE
    slides: Callable[[Fields, int], bool] = _every
    mlp: tuple[str, str, str, str] = ("mlp", "gate_proj", "up_proj", "down_proj")
    norms: Mapping[str, str] = _NORMS


_GEMMA_NORMS = {
    "attention_norm": "input_layernorm",
    "attention_post_norm": "post_attention_layernorm",
    "mlp_norm": "pre_feedforward_layernorm",
    "mlp_post_norm": "post_feedforward_layernorm",
}
_GEMMA = {
    "num_key_value_heads": 4,
    "head_dim": 256,
    "hidden_activation": "gelu_pytorch_tanh",
    "query_pre_attn_scalar": 256,
    "sliding_window": 4096,
}
_GEMMA_IMPLIED = {"scaled_embedding": True, "shifted_norms": True, "post_norms": True}
_QWEN = {
    "num_key_value_heads": 32,
    "sliding_window": 4096,
    "use_sliding_window": False,
    "max_window_layers": 28,
}
_NO_BIAS = {"attention_bias": False, "mlp_bias": False}

FAMILIES: Mapping[str, Family] = {
    "llama": Family(known={"sliding_window": None}),
    "mistral": Family(
        defaults={"num_key_value_heads": 8, "sliding_window": 4096},
        known=_NO_BIAS | {"layer_types": None},
    ),
    "mixtral": Family(
        defaults={
            "num_key_value_heads": 8,
            "rms_norm_eps": 1e-5,
            "rope_theta": 1e6,
            "num_local_experts": 8,
            "num_experts_per_tok": 2,
        },
        fields=ROUTED | {"experts": "num_local_experts"},
        known=_NO_BIAS | {"layer_types": None},
        mlp=("block_sparse_moe", "w1", "w3", "w2"),
    ),
    "qwen2": Family(defaults=_QWEN, known=_NO_BIAS, implied={"biases": QKV}, slides=_upper),
    "qwen3": Family(
        defaults=_QWEN | {"head_dim": 128},
        known={"mlp_bias": False},
        implied={"qk_norm": True},
        slides=_upper,
    ),
    "qwen3_moe": Family(
        defaults={
            "num_key_value_heads": 4,
            "sliding_window": 4096,
            "use_sliding_window": False,
            "moe_intermediate_size": 768,
            "num_experts": 128,
            "num_experts_per_tok": 8,
            "norm_topk_prob": False,
        },
        fields=ROUTED
        | {
            "hidden": "moe_intermediate_size",
            "experts": "num_experts",
            "normalized_experts": "norm_topk_prob",
        },
        known={
            "mlp_bias": False,
            "mlp_only_layers": [],
            "decoder_sparse_step": 1,
            "layer_types": None,
        },
        implied={"qk_norm": True},
    ),
    "gemma2": Family(
        defaults=_GEMMA
        | {
            "attn_logit_softcapping": 50.0,
            "final_logit_softcapping": 30.0,
            "sliding_window_pattern": 2,
        },
        fields=GEMMA_FIELDS,
        known={"mlp_bias": False},
        implied=_GEMMA_IMPLIED,
        slides=_but_every_nth,
        norms=_GEMMA_NORMS,
    ),
    "gemma3_text": Family(
        defaults=_GEMMA
        | {"rope_theta": 1e6, "rope_local_base_freq": 1e4, "sliding_window_pattern": 6},
        fields=GEMMA_FIELDS | {"local_rope_base": "rope_local_base_freq"},
        known={
            "mlp_bias": False,
            "attn_logit_softcapping": None,
            "use_bidirectional_attention": False,
        },
        implied=_GEMMA_IMPLIED | {"qk_norm": True},
        slides=_but_every_nth,
        norms=_GEMMA_NORMS,
    ),
}


def read_config(found: Fields, path: str | Path = "config.json") -> Config:
    """The config of a model from the fields of its config.json.

    Raises:
        ValueError: where the file asks for what the model does not compute; `path` says which.
    """
    found = dict(found)
    rotary = found.pop("rope_parameters", None) or {}  # of transformers 5
    if "full_attention" in rotary:
        found["rope_local_base_freq"] = rotary["sliding_attention"]["rope_theta"]
        rotary = rotary["full_attention"]
    rotary = {**rotary, **(found.pop("rope_scaling", None) or {})}
    found |= {name: x for name, x in rotary.items() if name in ("rope_theta", *KNOWN)}

    family = FAMILIES.get(found.get("model_type", ""), Family())
    found = {"hidden_act": "silu", **family.defaults, **found}
    fields = {**FIELDS, **family.fields}
    known = {
        "model_type": tuple(FAMILIES),
        **KNOWN,
        **family.known,
        fields["activation"]: tuple(ACTIVATIONS),
        "rope_type": ("default", *SCALINGS),
    }
    unsaid = "" if "factor" in rotary else "default"
    found["rope_type"] = rotary.get("rope_type", rotary.get("type", unsaid))
    if found[fields["activation"]] is None:
        raise ValueError(f"`{path}` lacks {fields['activation']}")
    config = hf.to_config(found, Config, fields, known, ABSENT, path)
    more = {
        "biases": _biases(found),
        "windows": _windows(found, family),
        "rope_scaling": _scaling(found["rope_type"], rotary, path),
    }
    return dataclasses.replace(config, **{**more, **family.implied})


def _biases(found: Fields) -> tuple[str, ...]:
    attention = (*QKV, "out") if found.get("attention_bias") else ()
    return (*attention, *(MLP if found.get("mlp_bias") else ()))


def _windows(found: Fields, family: Family) -> tuple[int, ...]:
    window, layers = found.get("sliding_window"), range(found["num_hidden_layers"])
    types = found.get("layer_types")
    slides = [types[i] == "sliding_attention" if types else family.slides(found, i) for i in layers]
    return tuple(window * each for each in slides) if window and any(slides) else ()


def _scaling(kind: str, rotary: Fields, path: str | Path) -> Linear | Llama3 | None:
    if kind == "default":
        return None
    if lost := [name for name in SCALINGS[kind]._fields if name not in rotary]:
        raise ValueError(f"`{path}`: rope scaling {kind!r} lacks {', '.join(lost)}")
    return SCALINGS[kind](*(rotary[name] for name in SCALINGS[kind]._fields))
