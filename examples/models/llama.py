"""Llama, Qwen 2 and Qwen 3 in Flax linen, reading and writing Hugging Face checkpoints.

    config, variables = llama.load(folder)     # config.json and model.safetensors, or shards
    model = llama.Llama(config)
    logits = model.apply(variables, ids)       # (B, L, V); for texts see `cache` and `beam`
    llama.save(path, variables, config)        # the same tensors

The layers are scanned, with their parameters stacked on axis 0 of ``layers``, or with
``scan=False`` modules ``layers_0``, ``layers_1``, …. Every kernel is (inputs, outputs):
``layers/attention/query/kernel`` of SmolLM2-135M is (30, 576, 576). For a mesh see `parts`, for
SmolLM2's file and its chats `smollm2`. `jlora.peft` takes `names(config)`.

Letters in the shapes: B batch, L tokens, D model size, H heads of queries, G heads of keys and
values, K size of a head, F inner size, S slots of a cache, V vocabulary.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import chunked
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jlora import peft

from . import cache as caches
from . import hf, parts
from .cache import Cache
from .parts import Part, constrain, dense, embed, rms_norm, stack

# ---- sizes --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """What a checkpoint says about its model.

    Attributes:
        vocab: tokens.
        layers: blocks.
        dim: the model size.
        hidden: the size within the MLP.
        heads: of queries.
        kv_heads: of keys and values, each shared by as many queries.
        rope_base: of the rotary positions.
        norm_eps: added to mean squares.
        tied: whether the head is the embedding.
        bare: whether the checkpoint is that of a model without a head, whose names lack `model.`.
        head_size: of one head; None is dim / heads.
        biased: whether queries, keys and values have a bias, as those of Qwen 2.
        normed: whether queries and keys are normalized, as those of Qwen 3.
        stretch: what the periods of slow rotary positions are multiplied by, as those of Llama 3.1.
        low: a position is slow that turns less often than this within `trained` tokens.
        high: a position is fast, and stays, that turns more often.
        trained: tokens.
    """

    vocab: int
    layers: int
    dim: int
    hidden: int
    heads: int
    kv_heads: int
    rope_base: float = 10_000.0
    norm_eps: float = 1e-6
    tied: bool = True
    bare: bool = False
    head_size: int | None = None
    biased: bool = False
    normed: bool = False
    stretch: float = 1.0
    low: float = 1.0
    high: float = 4.0
    trained: int = 8192

    @property
    def head_dim(self) -> int:
        """The width of one attention head."""
        return self.head_size or self.dim // self.heads

    @property
    def frequencies(self) -> np.ndarray:
        """By how much a step turns each pair of a head, (K / 2,)."""
        found = self.rope_base ** -(np.arange(0, self.head_dim, 2) / self.head_dim)
        turns = self.trained * found / (2 * np.pi)
        stays = np.clip((turns - self.low) / (self.high - self.low), 0, 1)
        return np.float32(found * (stays + (1 - stays) / self.stretch))

    def cache(self, batch: int, slots: int, dtype: Any = jnp.float32) -> Cache:
        """An empty cache for rows of at most `slots` tokens."""
        return caches.empty(self.layers, batch, slots, self.kv_heads, self.head_dim, dtype)


SIZES = {
    "llama2-7b": Config(32000, 32, 4096, 11008, 32, 32, 1e4, 1e-5, tied=False),
    "llama2-70b": Config(32000, 80, 8192, 28672, 64, 8, 1e4, 1e-5, tied=False),
    "llama3-8b": Config(128_256, 32, 4096, 14336, 32, 8, 5e5, 1e-5, tied=False),
    "smollm2-135m": Config(49152, 30, 576, 1536, 9, 3, 1e5, 1e-5),
}

# ---- the model ----------------------------------------------------------------------------------

Cached = tuple[jax.Array, jax.Array] | None  # keys and values of a layer


def rope(x: jax.Array, positions: jax.Array, frequencies: np.ndarray) -> jax.Array:
    """Rotates each pair (x[i], x[i + K / 2]) of every head by the angle position · frequency[i].

    Source: Su et al., arXiv 2104.09864.

    Args:
        x: ``(B, L, H, K)``.
        positions: ``(B, L)`` or ``(1, L)``.
        frequencies: ``(K / 2,)``.
    """
    angle = positions[..., None].astype(jnp.float32) * frequencies[None, None]
    cos, sin = jnp.cos(angle)[:, :, None], jnp.sin(angle)[:, :, None]  # (B or 1, L, 1, K / 2)
    first, second = jnp.split(x.astype(jnp.float32), 2, axis=-1)
    rotated = jnp.concatenate([first * cos - second * sin, second * cos + first * sin], axis=-1)
    return rotated.astype(x.dtype)


class Attention(Part):
    """Causal attention in which H / G heads of queries share a head of keys and values."""

    @nn.compact
    def __call__(
        self,
        x: jax.Array,
        cached: Cached,
        positions: jax.Array,
        mask: jax.Array | None,
        slots: jax.Array | None,
    ) -> tuple[jax.Array, Cached]:
        """``(B, L, D)`` to the same, and what the cache then holds.

        Args:
            x: inputs.
            cached: keys and values, ``(B, S, G, K)``, or None.
            positions: of the tokens, ``(B, L)`` or ``(1, L)``.
            mask: True where a key is seen, ``(B, 1, L, L)``; with a cache ``(B, 1, L, S)``.
            slots: of the cache, where these tokens go, ``(B, L)``.
        """
        c, options = self.config, self.options

        def project(name: str, heads: int, axis: str) -> jax.Array:
            y = dense(heads * c.head_dim, ("embed", axis), use_bias=c.biased, **options, name=name)
            y = y(x).reshape(*x.shape[:2], heads, c.head_dim)
            return constrain(y, "batch", "length", axis, None)

        def place(name: str, heads: int, axis: str) -> jax.Array:
            y = project(name, heads, axis)
            y = rms_norm(c.norm_eps, **options, name=f"{name}_norm")(y) if c.normed else y
            return rope(y, positions, c.frequencies)

        query = place("query", c.heads, "heads")  # (B, L, H, K)
        key = place("key", c.kv_heads, "kv_heads")  # (B, L, G, K)
        value = project("value", c.kv_heads, "kv_heads")  # (B, L, G, K)
        causal = cached is None
        if cached is not None:
            old_key, old_value = cached
            cached = caches.write(old_key, key, slots), caches.write(old_value, value, slots)
            key, value = (y.astype(query.dtype) for y in cached)  # (B, S, G, K)
        y = jax.nn.dot_product_attention(query, key, value, mask=mask, is_causal=causal)
        y = constrain(y, "batch", "length", "heads", None).reshape(*x.shape[:2], -1)
        out = dense(c.dim, ("heads", "embed"), use_bias=False, **options, name="out")
        return out(y), cached


class MLP(Part):
    """The gated feed-forward layer, down(silu(gate(x)) · up(x))."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(B, L, D)`` to ``(B, L, D)``."""

        def layer(name: str, size: int, *axes: str) -> nn.Dense:
            return dense(size, axes, use_bias=False, **self.options, name=name)

        c = self.config
        gate, up = (layer(name, c.hidden, "embed", "mlp")(x) for name in ("gate", "up"))
        y = constrain(nn.silu(gate) * up, "batch", "length", "mlp")  # (B, L, F)
        return layer("down", c.dim, "mlp", "embed")(y)


class Block(Part):
    """Attention and the MLP, each on normalized inputs, added to x."""

    @nn.compact
    def __call__(self, x: jax.Array, cached: Cached, *tokens: Any) -> tuple[jax.Array, Cached]:
        """``(B, L, D)`` to the same, and what the cache then holds; see `Attention`."""
        c, options = self.config, self.options
        x = constrain(x, "batch", "residual", None)
        y = rms_norm(c.norm_eps, **options, name="attention_norm")(x)
        y = constrain(y, "batch", "length", None)
        y, cached = Attention(c, **options, name="attention")(y, cached, *tokens)
        x = constrain(x + y, "batch", "residual", None)
        y = rms_norm(c.norm_eps, **options, name="mlp_norm")(x)
        y = constrain(y, "batch", "length", None)
        y = MLP(c, **options, name="mlp")(y)
        return constrain(x + y, "batch", "residual", None), cached


class Llama(nn.Module):
    """The language model: token ids ``(B, L)`` to float32 logits ``(B, L, V)``.

    Attributes:
        config: the sizes.
        dtype: of activations and products.
        remat: whether the backward pass computes each layer again instead of keeping activations.
        policy: what is kept nevertheless, as `jlora.remat_policy`.
        scan: whether the layers are one compiled block in a loop.
        param_dtype: of the parameters that `init` draws.
    """

    config: Config
    dtype: Any = jnp.float32
    remat: bool = False
    policy: Callable[..., bool] | None = None
    scan: bool = True
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        ids: jax.Array,
        mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: Cache | None = None,
        labels: jax.Array | None = None,
    ) -> Any:
        """Embeds, applies the layers, and reads the logits off the embedding or the head.

        Args:
            ids: ``(B, L)``.
            mask: ``(B, L)``, nonzero where there is a token and not padding. Tokens with different
                numbers do not see each other: these are the texts that are packed into a row.
            positions: ``(B, L)`` or ``(1, L)``; None is 0, 1, 2, …. Those with a cache follow from
                what it holds, and must not be given.
            cache: of the tokens before these, which are seen too.
            labels: ``(B, T)``, what follows the last T tokens.

        Returns:
            The logits; with labels, their log-probabilities ``(B, T)``, for which the logits are
            never whole. With a cache, these and the cache that holds these tokens too.
        """
        c, options = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        place, positions, seen = caches.begin(cache, ids, mask, positions)
        cached = None if cache is None else (cache.keys, cache.values)
        tokens = positions, seen, None if place is None else place.slots
        table = embed(c.vocab, c.dim, "vocab", **options, name="embed")
        how = {"scan": self.scan, "remat": self.remat, "policy": self.policy, "each": (cached,)}
        x, written = stack(
            Block, c.layers, "layers", table(ids), *tokens, **how, config=c, **options
        )
        x = constrain(rms_norm(c.norm_eps, **options, name="norm")(x), "batch", "length", None)
        head = table
        if not c.tied:
            head = dense(c.vocab, ("embed", "vocab"), use_bias=False, **options, name="head")
        if labels is None:
            return caches.end(place, read_logits(head, x), written)
        alone, weights = head.unbind()  # so that a loop can call it
        found = chunked.log_probs(
            lambda x: read_logits(alone.bind(weights), x), x[:, -labels.shape[1] :], labels
        )
        return caches.end(place, found, written)


def read_logits(head: nn.Embed | nn.Dense, x: jax.Array) -> jax.Array:
    """The logits ``(B, L, V)`` of ``(B, L, D)`` by the embedding or the head."""
    logits = head.attend(x) if isinstance(head, nn.Embed) else head(x)
    return constrain(logits.astype(jnp.float32), "batch", "length", "vocab")


# ---- checkpoints --------------------------------------------------------------------------------

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
    "layers/attention/query_norm": "layers.{}.self_attn.q_norm",
    "layers/attention/key_norm": "layers.{}.self_attn.k_norm",
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


# Of a model with its head: `--names models.llama:NAMES`.
NAMES = names(SIZES["smollm2-135m"])

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
    "stretch": "factor",
    "low": "low_freq_factor",
    "high": "high_freq_factor",
    "trained": "original_max_position_embeddings",
}
KNOWN = {
    "model_type": ("llama", "qwen2", "qwen3"),
    "hidden_act": "silu",
    "rope_type": ("llama3", "default"),
    "type": "default",
    "partial_rotary_factor": 1.0,
    "attention_bias": False,
    "mlp_bias": False,
    "use_sliding_window": False,
}


def read(folder: str | Path) -> Config:
    """The config of a folder, by its `config.json` and the names of its tensors."""
    config, tensors = hf.read_config(folder, Config, FIELDS, KNOWN), hf.read_index(folder)
    prefix = "model." if any(name.startswith("model.") for name in tensors) else ""
    first = f"{prefix}layers.0.self_attn."
    return dataclasses.replace(
        config,
        bare=not prefix,
        tied="lm_head.weight" not in tensors,
        biased=f"{first}q_proj.bias" in tensors,
        normed=f"{first}q_norm.weight" in tensors,
    )


def load(folder: str | Path, scan: bool = True) -> tuple[Config, dict[str, Any]]:
    """Config and variables, in the file's dtype, from a folder of Hugging Face's.

    Args:
        folder: with `config.json` and `model.safetensors` or its shards.
        scan: of the model that the variables are for.
    """
    config = read(folder)
    return config, hf.to_variables(hf.read_tensors(folder), shapes(config, scan), names(config))


def save(path: str | Path, variables: Mapping[str, Any], config: Config) -> None:
    """Writes `variables` to a safetensors file under Hugging Face's names."""
    hf.write_tensors(path, hf.to_tensors(variables, names(config)))


def shapes(config: Config, scan: bool = True) -> Any:
    """The variables of the model as `jax.ShapeDtypeStruct`s."""
    return parts.shapes(Llama(config, scan=scan))
