"""Small decoders for the tests: Llama with and without a head, Gemma 3 and 2, and Mixtral."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
from cases._case import fill
from models import checkpoint
from models.decoder import Config
from models.rope import Llama3

SIZES = {"vocab": 61, "layers": 2, "dim": 16, "hidden": 24, "heads": 4, "kv_heads": 2}
SIZES |= {"rope_base": 500.0}
GEMMA = {"shifted_norms": True, "post_norms": True, "scaled_embedding": True, "windows": (4, 0)}
GEMMA |= {"head_size": 8, "query_scale": 6, "activation": "gelu_pytorch_tanh"}
BIASES = ("query", "key", "value", "out", "gate", "up", "down")
CONFIGS = {
    "llama": Config(**SIZES),
    "llama_untied": Config(**SIZES, tied=False),
    "llama3": Config(**SIZES, biases=BIASES, rope_scaling=Llama3(8.0, 1.0, 4.0, 32), tied=False),
    "mixtral": Config(**SIZES, experts=4, experts_per_token=2, windows=(5, 5), tied=False),
    "gemma2": Config(**SIZES, **GEMMA, attention_cap=2.0, logit_cap=3.0),
    "gemma3": Config(**SIZES, **GEMMA, qk_norm=True, local_rope_base=20.0),
}


@functools.cache
def variables(name: str, scan: bool = True) -> dict[str, Any]:
    """Random ones, the same whether scanned or not."""
    found = fill(checkpoint.shapes(CONFIGS[name], True), jnp.float32, 0.3)
    return found if scan else unstacked(found)


def unstacked(variables: Any) -> Any:
    """The variables of the model without a scan."""
    params = dict(variables["params"])
    layers = params.pop("layers")
    each = {f"layers_{i}": jax.tree.map(lambda x, i=i: x[i], layers) for i in range(2)}
    return {"params": {**params, **each}}
