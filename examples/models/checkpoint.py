"""Llama in Hugging Face's files: a folder to config and variables, and back.

    config, variables = load(folder)      # config.json and model.safetensors, or shards
    save(path, variables, config)         # the same tensors

`jlora.peft` takes `names(config)`.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jlora import peft

from . import hf, parts
from .decoder import ACTIVATIONS, Config, Decoder
from .rope import SCALINGS, Linear, Llama3

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
}
ABSENT = {"num_key_value_heads": "num_attention_heads"}
# What these must be, or be absent.
KNOWN = {
    "model_type": "llama",
    "hidden_act": tuple(ACTIVATIONS),
    "rope_type": ("default", *SCALINGS),
    "partial_rotary_factor": 1.0,
    "sliding_window": None,
}
# The layers that have a bias where config.json says so.
BIASED = {
    "attention_bias": ("query", "key", "value", "out"),
    "mlp_bias": ("gate", "up", "down"),
}


def read_config(found: Mapping[str, Any], path: str | Path = "config.json") -> Config:
    """The config of a model from the fields of its config.json.

    Raises:
        ValueError: where the file asks for what the model does not compute; `path` says which.
    """
    found = dict(found)
    rotary = found.pop("rope_parameters", None) or {}  # of transformers 5
    rotary = {**rotary, **(found.pop("rope_scaling", None) or {})}
    found |= {name: x for name, x in rotary.items() if name in ("rope_theta", *KNOWN)}
    unsaid = "" if "factor" in rotary else "default"
    found["rope_type"] = kind = rotary.get("rope_type", rotary.get("type", unsaid))
    config = hf.to_config(found, Config, FIELDS, KNOWN, ABSENT, path)
    biases = tuple(x for name, layers in BIASED.items() if found.get(name) for x in layers)
    scaling = None if kind == "default" else _scaling(kind, rotary, path)
    return dataclasses.replace(config, biases=biases, rope_scaling=scaling)


def _scaling(kind: str, rotary: Mapping[str, Any], path: str | Path) -> Linear | Llama3:
    if lost := [name for name in SCALINGS[kind]._fields if name not in rotary]:
        raise ValueError(f"`{path}`: rope scaling {kind!r} lacks {', '.join(lost)}")
    return SCALINGS[kind](*(rotary[name] for name in SCALINGS[kind]._fields))


_DENSE = {
    "layers/attention/query": "layers.{}.self_attn.q_proj",
    "layers/attention/key": "layers.{}.self_attn.k_proj",
    "layers/attention/value": "layers.{}.self_attn.v_proj",
    "layers/attention/out": "layers.{}.self_attn.o_proj",
    r"layers/mlp/(gate|up|down)": r"layers.{}.mlp.\1_proj",
}
_NORMS = {
    "layers/attention_norm": "layers.{}.input_layernorm",
    "layers/mlp_norm": "layers.{}.post_attention_layernorm",
    "norm": "norm",
}


def names(config: Config) -> tuple[peft.Name, ...]:
    """What our leaves are called in the checkpoint, and how their axes lie there."""
    prefix = "" if config.bare else "model."
    return (
        peft.Name("embed/embedding", f"{prefix}embed_tokens", "vo", tied="lm_head"),
        peft.Name("head/kernel", "lm_head", "io"),
        *hf.rows(_DENSE, {"kernel": ("io", "weight"), "bias": ("o", "bias")}, "layers", prefix),
        *hf.rows(_NORMS, {"scale": ("o", "weight")}, "layers", prefix),
    )


def load(folder: str | Path, scan: bool = True) -> tuple[Config, dict[str, Any]]:
    """Config and variables, in the file's dtype, from a folder of Hugging Face's.

    Args:
        folder: with `config.json` and `model.safetensors` or its shards.
        scan: of the model that the variables are for.

    Raises:
        ValueError: where the files ask for what the model does not compute, or do not fit.
    """
    path = Path(folder) / "config.json"
    config, tensors = read_config(json.loads(path.read_text()), path), hf.read_tensors(folder)
    bare = not any(name.startswith("model.") for name in tensors)
    config = dataclasses.replace(config, bare=bare, tied="lm_head.weight" not in tensors)
    return config, hf.to_variables(tensors, shapes(config, scan), names(config))


def save(path: str | Path, variables: Mapping[str, Any], config: Config) -> None:
    """Writes `variables` to a safetensors file under Hugging Face's names."""
    hf.write_tensors(path, hf.to_tensors(variables, names(config)))


def shapes(config: Config, scan: bool = True) -> Any:
    """The variables of the model as `jax.ShapeDtypeStruct`s."""
    return parts.shapes(Decoder(config, scan=scan))
