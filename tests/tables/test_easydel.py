"""The decoders of EasyDeL and those of `transformers`, on the same files. Needs `easydel`."""

import os
import pathlib
import warnings
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import pytest

# Else it sets flags of the compiler that later releases do not know, and looks for other hosts.
os.environ.update({"EASYDEL_AUTO": "0", "ENABLE_DISTRIBUTED_INIT": "0"})
with warnings.catch_warnings():  # of its own
    warnings.simplefilter("ignore")
    easydel = pytest.importorskip("easydel")
    import torch
    from common import *
    from flax import nnx

from jlora import LoRA, peft
from jlora.peft import tables

PLAIN = {"attn_mechanism": "vanilla", "attn_dtype": jnp.float32, "kvdtype": jnp.float32}
NUMBERS = {"dtype": jnp.float32, "param_dtype": jnp.float32, "precision": jax.lax.Precision.HIGHEST}
# It keeps the cosines and sines of rotary embeddings in bfloat16.
TOLERANCE = 0.1


def decoder(kind: str, settings: str, **more: Any) -> Any:
    def build(config: Any) -> Model:
        fields = {name: getattr(config, name) for name in FIELDS} | PLAIN | more
        own = getattr(easydel, settings)(**fields)
        model = getattr(easydel, f"{kind}ForCausalLM")(own, **NUMBERS, rngs=nnx.Rngs(0))
        graph, params, rest = split(model)

        def apply(params: Any, tokens: jax.Array) -> jax.Array:
            with model.mesh:
                return nnx.merge(graph, params, rest, copy=True)(input_ids=tokens).logits

        def load(folder: pathlib.Path) -> Any:
            return split(
                easydel.AutoEasyDeLModelForCausalLM.from_pretrained(
                    str(folder),
                    from_torch=True,
                    torch_dtype=torch.float32,
                    auto_shard_model=False,
                    config_kwargs=PLAIN,
                    **NUMBERS,
                )
            )[1]

        return Model(params, apply, load, TOLERANCE)

    return build


def split(model: Any) -> Any:
    """The parameters apart; a head that is tied has a leaf that is not used."""

    def is_used(path: tuple[Any, ...], _: Any) -> bool:
        return not (model.config.tie_word_embeddings and "lm_head" in path)

    return nnx.split(model, nnx.All(nnx.Param, is_used), ...)


@each_adapter
def test_as_merged(which: str, made: Made, tmp_path: pathlib.Path) -> None:
    """The adapter is what EasyDeL makes of the merged checkpoint."""
    adapter = peft.load(made.folder / which, made.base, made.case.names)
    peft.export_merged(made.folder / "base", adapter, tmp_path / "merged", names=made.case.names)
    assert made.model.load is not None
    expected = made.model.apply(made.model.load(tmp_path / "merged"), jnp.asarray(TOKENS))
    np.testing.assert_allclose(our_logits(made, adapter), expected, rtol=0, atol=1e-4)


FIELDS = (
    "vocab_size",
    "hidden_size",
    "intermediate_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "max_position_embeddings",
    "rms_norm_eps",
    "tie_word_embeddings",
)
ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4}}
# The sixth layer sees everything. A window of EasyDeL is one longer than it says.
GEMMA3 = {"query_pre_attn_scalar": 8, "sliding_window": 5, "num_hidden_layers": 6}
LINEAR = (LoRA(r".*_proj/kernel", rank=4),)
TABLE = tables.easydel.EASYDEL

CASES = {
    "llama": Case(
        TABLE, ("LlamaConfig", ROPE), decoder("Llama", "LlamaConfig", rope_theta=1e4), LINEAR
    ),
    "qwen2": Case(
        TABLE, ("Qwen2Config", ROPE), decoder("Qwen2", "Qwen2Config", rope_theta=1e4), LINEAR
    ),
    "qwen3-tied": Case(
        TABLE, ("Qwen3Config", ROPE | TIED), decoder("Qwen3", "Qwen3Config", rope_theta=1e4), LINEAR
    ),
    "gemma3": Case(
        TABLE,
        ("Gemma3TextConfig", GEMMA3),
        decoder("Gemma3", "Gemma3TextConfig", query_pre_attn_scalar=8, sliding_window=4),
        LINEAR,
    ),
}

made = made_of(CASES, *CASES)
