"""The Flax side of the fixtures in `fixtures/peft`: models, name tables, parameters.

Parameters are turned from PyTorch's by the rules below, not by jlora's, so that they check it.
"""

import functools
import json
import pathlib
import re
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors import deserialize
from small import as_jax

from jlora import peft

FIXTURES = pathlib.Path(__file__).parents[1] / "fixtures" / "peft"
CASES = sorted(path.parent.name for path in FIXTURES.glob("*/model.json"))
TABLES = {x: peft.TABLES[x.lower()] for x in ("Bert", "Roberta", "GPT2", "Llama", "ViT")}
# What is not s·A·B alone.
BEYOND = tuple(name for name in CASES if name.startswith(("dora", "tokens")))
EXAMPLES = ("scanned", "tied", "dora_scanned", "tokens")  # through examples/models/llama.py
EXPERTS = (
    peft.Name("experts/gate_up", "experts", "eio", "gate_up_proj"),
    peft.Name("experts/down", "experts", "eio", "down_proj"),
    peft.Name("head/kernel", "head", "io"),
    peft.Name("head/bias", "head", "o", "bias"),
)


class Case(NamedTuple):
    """A fixture with its model in JAX."""

    folder: pathlib.Path
    apply: Any
    base: Any
    names: tuple[peft.Name, ...]
    torch: dict[str, np.ndarray]

    def merged(self) -> dict[str, np.ndarray]:
        """PyTorch's parameters after merging."""
        base = {k[5:]: x for k, x in self.torch.items() if k.startswith("base.")}
        return base | {k[7:]: x for k, x in self.torch.items() if k.startswith("merged.")}


def read(path: pathlib.Path) -> dict[str, np.ndarray]:
    """The tensors of a safetensors file, bfloat16 and float8 too."""
    kinds = {"F64": np.float64, "F32": np.float32, "F16": np.float16, "I64": np.int64}
    kinds |= {"BF16": ml_dtypes.bfloat16, "U8": np.uint8}
    kinds |= {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E5M2": ml_dtypes.float8_e5m2}
    return {
        name: np.frombuffer(x["data"], kinds[x["dtype"]]).reshape(x["shape"])
        for name, x in deserialize(path.read_bytes())
    }


def case(name: str) -> Case:
    """The case `name`, with fresh containers around shared arrays."""
    found = _case(name)
    return found._replace(base=jax.tree.map(lambda x: x, found.base), torch=dict(found.torch))


@functools.cache
def _case(name: str) -> Case:
    folder = FIXTURES / name
    torch = read(folder / "torch.safetensors")
    base = tree(name, {k[5:]: x for k, x in torch.items() if k.startswith("base.")})
    about = json.loads((folder / "model.json").read_text())
    if name == "experts":
        return Case(folder, experts, base, EXPERTS, torch)
    if name in EXAMPLES:
        return Case(folder, _example_llama(about["config"]), base, llama_names(), torch)
    model, kind = _flax(**about)
    apply = lambda params, x: model(x, params=params)[0]  # noqa: E731
    return Case(folder, apply, base, TABLES[kind], torch)


def tree(name: str, weights: dict[str, np.ndarray]) -> Any:
    """The parameters of a case's model in JAX from PyTorch's."""
    if name == "experts":
        return experts_from(weights)
    if name in EXAMPLES:
        return {"params": llama_from(weights, layers=2)}
    model, _ = _flax(**json.loads((FIXTURES / name / "model.json").read_text()))
    shapes = flatten_dict(model.params_shape_tree, sep="/")
    params = {path: from_torch(path, weights) for path in shapes}
    assert {p: x.shape for p, x in params.items()} == {p: x.shape for p, x in shapes.items()}
    return unflatten_dict(params, sep="/")


def _flax(architecture: str, config: dict[str, Any]) -> tuple[Any, str]:
    """A Flax model of `transformers` without weights, and the first part of its name."""
    import transformers

    kind = re.match("Bert|Roberta|GPT2|Llama|ViT", architecture)
    assert kind is not None
    cls = getattr(transformers, f"Flax{architecture}")
    dtype = jnp.dtype(config.get("dtype", "float32"))
    options = {k: v for k, v in config.items() if k != "dtype"}
    return cls(cls.config_class(**options), dtype=dtype, _do_init=False), kind[0]


def from_torch(path: str, weights: dict[str, np.ndarray]) -> jax.Array:
    """One leaf of `transformers`' Flax trees."""
    module, _, leaf = path.rpartition("/")
    dotted = module.replace("/", ".")
    if leaf == "bias" or f"{dotted}.weight" not in weights:
        return as_jax(weights[path.replace("/", ".")])
    x = weights[f"{dotted}.weight"]
    if x.ndim == 4:
        x = x.transpose(2, 3, 1, 0)
    elif leaf == "kernel":  # GPT-2's are (inputs, outputs) in PyTorch and the reverse in Flax
        x = x.T
    return as_jax(x)


def llama_names() -> tuple[peft.Name, ...]:
    """The example's table."""
    from models import llama

    return llama.NAMES


def _example_llama(config: dict[str, Any]) -> Any:
    from models import llama

    fields = {ours: config[theirs] for ours, theirs in llama.FIELDS.items() if theirs in config}
    return llama.Llama(llama.Config(**fields)).apply


def llama_from(weights: dict[str, np.ndarray], layers: int) -> Any:
    """The tree of `examples/models/llama.py` without its `params`."""
    stack = lambda end: np.stack([weights[f"model.layers.{i}.{end}"] for i in range(layers)])  # noqa: E731
    attention = {"query": "q_proj", "key": "k_proj", "value": "v_proj", "out": "o_proj"}
    tree = {
        "embed/embedding": weights["model.embed_tokens.weight"],
        "norm/scale": weights["model.norm.weight"],
        "layers/attention_norm/scale": stack("input_layernorm.weight"),
        "layers/mlp_norm/scale": stack("post_attention_layernorm.weight"),
    }
    for ours, theirs in attention.items():
        tree[f"layers/attention/{ours}/kernel"] = stack(f"self_attn.{theirs}.weight").swapaxes(1, 2)
    for ours in ("gate", "up", "down"):
        tree[f"layers/mlp/{ours}/kernel"] = stack(f"mlp.{ours}_proj.weight").swapaxes(1, 2)
    return unflatten_dict({k: as_jax(x) for k, x in tree.items()}, sep="/")


def experts_from(weights: dict[str, np.ndarray]) -> Any:
    """The tree of `experts`."""
    swap = lambda name: as_jax(weights[name].swapaxes(1, 2))  # noqa: E731
    return {
        "experts": {"gate_up": swap("experts.gate_up_proj"), "down": swap("experts.down_proj")},
        "head": {"kernel": as_jax(weights["head.weight"].T), "bias": as_jax(weights["head.bias"])},
    }


def experts(params: Any, x: jax.Array) -> jax.Array:
    """A layer of three experts and a head: (batch, 8) to (batch, 5)."""
    gate, up = jnp.split(jnp.einsum("bi,eio->ebo", x, params["experts"]["gate_up"]), 2, -1)
    y = jnp.einsum("ebi,eio->bo", jax.nn.silu(gate) * up, params["experts"]["down"]) / 3
    return y @ params["head"]["kernel"] + params["head"]["bias"]
