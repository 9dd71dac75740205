"""Decoders in Hugging Face's files: a folder to config and variables, and back.

    config, variables = load(folder)      # config.json and model.safetensors, or shards
    save(path, variables, config)         # the same tensors

Of the model types in `families`. `jlora.peft` takes `names(config)`.
"""

import dataclasses
import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jlora import peft

from . import hf, parts
from .decoder import Config, Decoder
from .families import FAMILIES, MLP, read_config

_ATTENTION = {
    "layers/attention/query": "layers.{}.self_attn.q_proj",
    "layers/attention/key": "layers.{}.self_attn.k_proj",
    "layers/attention/value": "layers.{}.self_attn.v_proj",
    "layers/attention/out": "layers.{}.self_attn.o_proj",
}
_MORE_NORMS = {
    "layers/attention/query_norm": "layers.{}.self_attn.q_norm",
    "layers/attention/key_norm": "layers.{}.self_attn.k_norm",
    "norm": "norm",
}


def names(config: Config) -> tuple[peft.Name, ...]:
    """What our leaves are called in the checkpoint, and how their axes lie there."""
    family, prefix = FAMILIES[config.model_type], "" if config.bare else "model."
    module, *three = family.mlp
    inner = f"layers.{{}}.{module}" + (".experts.{}" if config.experts else "")
    mlp = {f"layers/mlp/{ours}": f"{inner}.{x}" for ours, x in zip(MLP, three, strict=True)}
    router = {"layers/mlp/router": f"layers.{{}}.{module}.gate"} if config.experts else {}
    norms = {f"layers/{ours}": f"layers.{{}}.{x}" for ours, x in family.norms.items()} | _MORE_NORMS
    kernel, bias = {"kernel": ("io", "weight")}, {"bias": ("o", "bias")}
    of_mlp = {"kernel": ("lio", "weight")} if config.experts else kernel | bias
    return (
        peft.Name("embed/embedding", f"{prefix}embed_tokens", "vo", tied="lm_head"),
        peft.Name("head/kernel", "lm_head", "io"),
        *hf.rows(_ATTENTION, kernel | bias, "layers", prefix),
        *hf.rows(router, kernel, "layers", prefix),
        *hf.rows(mlp, of_mlp, "layers", prefix),
        *hf.rows(norms, {"scale": ("o", "weight")}, "layers", prefix),
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
