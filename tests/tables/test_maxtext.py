"""The decoders of MaxText and those of `transformers`, on the same files. Needs `maxtext`.

MaxText needs Python 3.12 and JAX 0.11.
"""

import pathlib
import warnings
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
    from common import *
    from maxtext.checkpoint_conversion.utils import param_mapping
    from maxtext.configs import pyconfig
    from maxtext.utils import model_creation_utils

from jlora import LoRA, peft
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


def settings(config: Any, **more: Any) -> Any:
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


def decoder(mapping: str, **more: Any) -> Any:
    def build(config: Any) -> Model:
        own = settings(config, **more)
        made = lambda: model_creation_utils.from_config(own, rngs=nnx.Rngs(0))  # noqa: E731
        graph, params, rest = nnx.split(made(), nnx.Param, ...)

        def apply(params: Any, tokens: jax.Array) -> jax.Array:
            positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
            model = nnx.merge(graph, params, rest, copy=True)
            return model(tokens, positions, enable_dropout=False)

        def load(folder: pathlib.Path) -> Any:
            return converted(mapping, config, own.scan_layers, params, folder)

        return Model(params, apply, load)

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


def test_base_comes_back(made: Made) -> None:
    """The tensors of the checkpoint are those of the base, but for what was divided."""
    expected = load_file(made.folder / "base" / "model.safetensors")
    tensors = peft.to_tensors(made.base, made.case.names)
    assert tensors.keys() == expected.keys()
    for name, x in expected.items():
        off = 2.0**-22 if made.case.names is tables.maxtext.LLAMA and "q_proj" in name else 0.0
        np.testing.assert_allclose(tensors[name], x, rtol=off, atol=0, err_msg=name)


def llama(**more: Any) -> Any:
    own = {"decoder_block": "llama2", "rope_type": "llama3.1", "rope_max_timescale": 500_000}
    return decoder("LLAMA31_MAXTEXT_TO_HF", **own | more)


def qwen3(**more: Any) -> Any:
    own = {"decoder_block": "qwen3", "use_qk_norm": True, "rope_max_timescale": 1_000_000}
    return decoder("QWEN_MAXTEXT_TO_HF", **own | more)


# Of Llama 3.1 and later; MaxText has it without numbers of its own.
SCALED = {
    "max_position_embeddings": 131_072,
    "rope_parameters": {
        "rope_type": "llama3",
        "rope_theta": 5e5,
        "factor": 8.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    },
}
PLAIN_ROPE = {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}
LINEAR = (LoRA(r"(self_attention|mlp)/\w+/kernel", rank=4),)
LLAMA, QWEN3 = tables.maxtext.LLAMA, tables.maxtext.QWEN3

CASES = {
    "llama": Case(LLAMA, ("LlamaConfig", SCALED), llama(scan_layers=False), LINEAR),
    "llama-scanned": Case(LLAMA, ("LlamaConfig", SCALED), llama(scan_layers=True), LINEAR),
    "qwen3": Case(QWEN3, ("Qwen3Config", PLAIN_ROPE), qwen3(scan_layers=False), LINEAR),
    "qwen3-scanned": Case(QWEN3, ("Qwen3Config", PLAIN_ROPE), qwen3(scan_layers=True), LINEAR),
    "qwen3-tied": Case(QWEN3, ("Qwen3Config", PLAIN_ROPE | TIED), qwen3(scan_layers=True), LINEAR),
}

made = made_of(CASES, "llama-scanned")
