"""BERT encoder in Flax linen, reading and writing Hugging Face checkpoints.

    config, variables = bert.load(folder)       # config.json and model.safetensors
    model = bert.Bert(config)
    hidden = model.apply(variables, ids, mask)  # (B, L, D)

    variables = bert.add_head(variables, classes=2)
    model = bert.Bert(config, classes=2)
    logits = model.apply(variables, ids, mask)  # (B, 2): mean over the tokens, norm, dense head

Letters in the shapes: B batch, L tokens, D hidden size, H heads, K size of a head, F inner size.
"""

import dataclasses
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict
from safetensors.numpy import load_file, save_file

# Hugging Face module -> our module; {} is the number of the layer.
MODULES = {
    "embeddings.word_embeddings": "embeddings/word",
    "embeddings.position_embeddings": "embeddings/position",
    "embeddings.token_type_embeddings": "embeddings/token_type",
    "embeddings.LayerNorm": "embeddings/norm",
    "encoder.layer.{}.attention.self.query": "encoder/layer_{}/attention/query",
    "encoder.layer.{}.attention.self.key": "encoder/layer_{}/attention/key",
    "encoder.layer.{}.attention.self.value": "encoder/layer_{}/attention/value",
    "encoder.layer.{}.attention.output.dense": "encoder/layer_{}/attention/out",
    "encoder.layer.{}.attention.output.LayerNorm": "encoder/layer_{}/attention_norm",
    "encoder.layer.{}.intermediate.dense": "encoder/layer_{}/up",
    "encoder.layer.{}.output.dense": "encoder/layer_{}/down",
    "encoder.layer.{}.output.LayerNorm": "encoder/layer_{}/norm",
    "classifier": "classifier",
}
LEAVES = {"kernel": "weight", "embedding": "weight", "scale": "weight", "bias": "bias"}
# In some files, in no computation of ours: kept as they are so that a file survives the round trip.
UNUSED = re.compile(r"embeddings\.position_ids|pooler\.dense\.(weight|bias)")


@dataclasses.dataclass(frozen=True)
class Config:
    """The fields of `config.json` that shape the computation."""

    vocab_size: int
    hidden_size: int
    num_hidden_layers: int
    num_attention_heads: int
    intermediate_size: int
    max_position_embeddings: int
    type_vocab_size: int
    layer_norm_eps: float

    @classmethod
    def read(cls, path: Path) -> "Config":
        """Read `config.json`; what this file does not compute is an error."""
        fields = json.loads(Path(path).read_text())
        for name, known in KNOWN.items():
            if fields.get(name, known) != known:
                raise ValueError(f"`{path}`: expected {name} {known!r}, got {fields[name]!r}")
        return cls(**{field.name: fields[field.name] for field in dataclasses.fields(cls)})


KNOWN = {"model_type": "bert", "hidden_act": "gelu", "position_embedding_type": "absolute"}


# ---- the model ----------------------------------------------------------------------------------


class Embeddings(nn.Module):
    """The sum of word, position and token type embeddings, normalized."""

    config: Config

    @nn.compact
    def __call__(self, ids: jax.Array, types: jax.Array) -> jax.Array:
        """``(B, L)`` token ids and types to ``(B, L, D)``."""
        config, size = self.config, self.config.hidden_size
        positions = jnp.arange(ids.shape[1])[None]  # (1, L)
        x = nn.Embed(config.vocab_size, size, name="word")(ids)  # (B, L, D)
        x += nn.Embed(config.max_position_embeddings, size, name="position")(positions)
        x += nn.Embed(config.type_vocab_size, size, name="token_type")(types)
        return nn.LayerNorm(epsilon=config.layer_norm_eps, name="norm")(x)


class Attention(nn.Module):
    """Multi-head attention of every token to all tokens under the mask."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """``(B, L, D)`` and ``(B, L)`` to ``(B, L, D)``."""
        heads, size = self.config.num_attention_heads, self.config.hidden_size

        def project(name):
            y = nn.Dense(size, name=name)(x)  # (B, L, D)
            return y.reshape(*y.shape[:2], heads, size // heads)  # (B, L, H, K)

        query, key, value = project("query"), project("key"), project("value")
        scores = jnp.einsum("bqhk,bshk->bhqs", query, key) / (size // heads) ** 0.5
        scores = jnp.where(mask[:, None, None, :] > 0, scores, jnp.finfo(scores.dtype).min)
        y = jnp.einsum("bhqs,bshk->bqhk", nn.softmax(scores), value)  # (B, L, H, K)
        return nn.Dense(size, name="out")(y.reshape(x.shape))


class Layer(nn.Module):
    """Attention and a two-layer perceptron, each with a residual and a norm after it."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """``(B, L, D)`` and ``(B, L)`` to ``(B, L, D)``."""
        epsilon, size = self.config.layer_norm_eps, self.config.hidden_size
        y = Attention(self.config, name="attention")(x, mask)
        x = nn.LayerNorm(epsilon=epsilon, name="attention_norm")(x + y)
        y = nn.Dense(self.config.intermediate_size, name="up")(x)  # (B, L, F)
        y = nn.Dense(size, name="down")(nn.gelu(y, approximate=False))  # (B, L, D)
        return nn.LayerNorm(epsilon=epsilon, name="norm")(x + y)


class Encoder(nn.Module):
    """The stack of layers."""

    config: Config

    @nn.compact
    def __call__(self, x: jax.Array, mask: jax.Array) -> jax.Array:
        """``(B, L, D)`` and ``(B, L)`` to ``(B, L, D)``."""
        for i in range(self.config.num_hidden_layers):
            x = Layer(self.config, name=f"layer_{i}")(x, mask)
        return x


class Bert(nn.Module):
    """BERT without a head (`classes` 0), or with one on the mean of the hidden states."""

    config: Config
    classes: int = 0

    @nn.compact
    def __call__(self, ids: jax.Array, mask: jax.Array, types: jax.Array | None = None):
        """``(B, L)`` ids and mask to hidden states ``(B, L, D)``, or to logits ``(B, classes)``."""
        types = jnp.zeros_like(ids) if types is None else types
        x = Embeddings(self.config, name="embeddings")(ids, types)
        x = Encoder(self.config, name="encoder")(x, mask)
        if not self.classes:
            return x
        # MiniLM's means have a size of about 0.2; a head learns faster from inputs of size 1.
        x = nn.LayerNorm(use_bias=False, use_scale=False)(pool(x, mask))  # (B, D)
        return nn.Dense(self.classes, name="classifier")(x)


def pool(hidden: jax.Array, mask: jax.Array) -> jax.Array:
    """The mean over the tokens under the mask: ``(B, L, D)`` and ``(B, L)`` to ``(B, D)``."""
    weight = mask.astype(hidden.dtype)[..., None]  # (B, L, 1)
    return (hidden * weight).sum(1) / weight.sum(1)


def add_head(variables: Mapping[str, Any], classes: int) -> dict[str, Any]:
    """`variables` with a zero head, which gives every class the same logit."""
    size = variables["params"]["embeddings"]["norm"]["scale"].size
    head = {"kernel": jnp.zeros((size, classes)), "bias": jnp.zeros(classes)}
    return {**variables, "params": {**variables["params"], "classifier": head}}


# ---- checkpoints --------------------------------------------------------------------------------


def load(folder: Path) -> tuple[Config, dict[str, Any]]:
    """Config and variables from a folder with `config.json` and `model.safetensors`."""
    config = Config.read(Path(folder) / "config.json")
    return config, from_hf(load_file(Path(folder) / "model.safetensors"), config)


def save(path: Path, variables: Mapping[str, Any]) -> None:
    """Write `variables` to a safetensors file under Hugging Face's names."""
    save_file(to_hf(variables), path, metadata={"format": "pt"})


def from_hf(tensors: Mapping[str, np.ndarray], config: Config) -> dict[str, Any]:
    """The variables of `Bert` from the tensors of a Hugging Face checkpoint.

    A collection ``"unused"`` keeps the tensors that the model does not compute with.

    Raises:
        ValueError: tensors are missing, unexpected or misshapen; the message lists them all.
    """
    classes = len(tensors.get("classifier.bias", ()))
    ids = jax.ShapeDtypeStruct((1, 1), jnp.int32)
    init = jax.eval_shape(Bert(config, classes).init, jax.random.key(0), ids, ids)
    unused = {name: jnp.asarray(tensors[name]) for name in tensors if UNUSED.fullmatch(name)}
    params, problems, unknown = {}, [], set(tensors) - set(unused)
    for path, leaf in flatten_dict(init["params"], sep="/").items():
        name = hf_name(path)
        unknown.discard(name)
        shape = leaf.shape[::-1] if path.endswith("kernel") else leaf.shape
        if name not in tensors:
            problems.append(f"missing {name} of shape {shape}")
        elif tensors[name].shape != shape:
            problems.append(f"misshapen {name}: expected {shape}, got {tensors[name].shape}")
        else:
            params[path] = jnp.asarray(turn(path, tensors[name]))
    problems += [f"unexpected {name}" for name in unknown]
    if problems:
        raise ValueError("`tensors` do not fit `config`:\n  " + "\n  ".join(sorted(problems)))
    variables = {"params": unflatten_dict(params, sep="/")}
    return {**variables, "unused": unused} if unused else variables


def to_hf(variables: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The tensors of a Hugging Face checkpoint: what `from_hf` turns into `variables`."""
    tensors = {}
    for path, leaf in flatten_dict(variables["params"], sep="/").items():
        tensors[hf_name(path)] = np.ascontiguousarray(turn(path, np.asarray(leaf)))
    for name, leaf in variables.get("unused", {}).items():
        # Index buffers are int64 in these files, but int32 in JAX.
        is_index = np.issubdtype(leaf.dtype, np.integer)
        tensors[name] = np.asarray(leaf, np.int64 if is_index else leaf.dtype)
    return tensors


def hf_name(path: str) -> str:
    """Hugging Face's name of the parameter at `path`.

    >>> hf_name("encoder/layer_3/attention/query/kernel")
    'encoder.layer.3.attention.self.query.weight'
    """
    module, leaf = path.rsplit("/", 1)
    number = re.search(r"(?<=layer_)\d+", module)
    pattern = re.sub(r"(?<=layer_)\d+", "{}", module)
    return f"{HF_MODULES[pattern].format(number and number[0])}.{LEAVES[leaf]}"


def turn(path: str, array: np.ndarray) -> np.ndarray:
    """Dense weights are (outputs, inputs) at Hugging Face and (inputs, outputs) in Flax."""
    return array.T if path.endswith("kernel") else array


HF_MODULES = {ours: theirs for theirs, ours in MODULES.items()}
