"""GPT-2 and GPT-3 in Flax linen, reading and writing Hugging Face checkpoints.

    config, variables = gpt.load(folder)     # config.json and model.safetensors, or shards
    model = gpt.GPT(config)
    logits = model.apply(variables, ids)     # (B, L, V); for texts see `cache` and `beam`
    gpt.save(path, variables, config)        # the same tensors

    model = gpt.GPT(gpt.SIZES["gpt3-175b"], remat=True, param_dtype=jnp.bfloat16)
    abstract = jax.eval_shape(model.init, key, ids)  # 175B parameters without memory; see `parts`

The layers are scanned, with their parameters stacked on axis 0 of ``h``, or with ``scan=False``
modules ``h_0``, ``h_1``, …. Queries, keys and values have one kernel, (D, 3, D), which a mesh cuts
along the heads of each: those of the paper are `jlora.LoRA("c_attn/kernel", slots=jlora.Slots(3,
(0, 2)))`. `jlora.peft` takes `names(config)`.

Letters in the shapes: B batch, L tokens, D model size, H heads, K size of a head, F inner size, V
vocabulary, padded.
"""

import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jlora import peft

from . import cache as caches
from . import hf, parts
from .cache import Cache
from .parts import Part, check_length, constrain, dense, dropout, embed, fused, layer_norm, stack

# ---- sizes --------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Config:
    """What shapes the computation; the defaults are GPT-2's.

    Attributes:
        vocab: tokens.
        positions: the most tokens of a sequence.
        layers: blocks.
        dim: the model size.
        heads: of attention.
        inner: the size within the MLP; None is four times the model size.
        norm_eps: added to variances.
        dropout: the rate, in calls with `rngs={"dropout": key}`.
        pad_vocab: rows of the table of tokens come in multiples of this, so that it can be cut.
            Rows that are no tokens are zero, and their logits are the least number.
        bare: whether the checkpoint is `GPT2Model`'s, whose names lack ``transformer.``.
    """

    vocab: int = 50257
    positions: int = 1024
    layers: int = 12
    dim: int = 768
    heads: int = 12
    inner: int | None = None
    norm_eps: float = 1e-5
    dropout: float = 0.1
    pad_vocab: int = 1
    bare: bool = False

    @property
    def rows(self) -> int:
        """Rows of the table of tokens."""
        return -(-self.vocab // self.pad_vocab) * self.pad_vocab

    def cache(self, batch: int, slots: int, dtype: Any = jnp.float32) -> Cache:
        """An empty cache for rows of at most `slots` tokens.

        Raises:
            ValueError: there are fewer positions.
        """
        if slots > self.positions:
            raise ValueError(
                f"`slots`: expected at most {self.positions}, the positions of the model, got "
                f"{slots}"
            )
        size = self.dim // self.heads
        return caches.empty(self.layers, batch, slots, self.heads, size, dtype)


SIZES = {
    "gpt2": Config(),
    "gpt2-medium": Config(layers=24, dim=1024, heads=16),
    "gpt2-large": Config(layers=36, dim=1280, heads=20),
    "gpt3-175b": Config(positions=2048, layers=96, dim=12288, heads=96),
}

# ---- the model ----------------------------------------------------------------------------------


Cached = tuple[jax.Array, jax.Array] | None  # keys and values of a layer


class Block(Part):
    """Causal attention and a two-layer perceptron, each on normalized inputs, added to x."""

    @nn.compact
    def __call__(
        self, x: jax.Array, cached: Cached, mask: jax.Array | None, slots: jax.Array | None
    ) -> tuple[jax.Array, Cached]:
        """``(B, L, D)`` to the same, and what the cache then holds; see `Attention`."""
        c, options = self.config, self.options
        x = constrain(x, "batch", "residual", None)
        y = layer_norm(c.norm_eps, **options, name="ln_1")(x)
        y = constrain(y, "batch", "length", None)
        y, cached = Attention(c, **options, name="attn")(y, cached, mask, slots)
        x = constrain(x + dropout(self, c.dropout, y), "batch", "residual", None)
        y = layer_norm(c.norm_eps, **options, name="ln_2")(x)
        y = constrain(y, "batch", "length", None)
        y = MLP(c, **options, name="mlp")(y)
        return constrain(x + dropout(self, c.dropout, y), "batch", "residual", None), cached


class Attention(Part):
    """Multi-head attention of every token to itself and those before it."""

    @nn.compact
    def __call__(
        self, x: jax.Array, cached: Cached, mask: jax.Array | None, slots: jax.Array | None
    ) -> tuple[jax.Array, Cached]:
        """``(B, L, D)`` to the same, and what the cache then holds.

        Args:
            x: inputs.
            cached: keys and values in S slots, ``(B, S, H, K)``, or None.
            mask: True where a key is seen, ``(B, 1, L, L)``; with a cache ``(B, 1, L, S)``.
            slots: of the cache, where these tokens go, ``(B, L)``.
        """
        c, options = self.config, self.options
        y = fused(3, c.dim, c.dim, ("embed", "heads"), **options, name="c_attn")(x)  # (B, L, 3, D)
        y = y.reshape(*x.shape[:2], 3, c.heads, c.dim // c.heads)  # (B, L, 3, H, K)
        y = constrain(y, "batch", "length", None, "heads", None)
        q, k, v = (y[:, :, i] for i in range(3))  # (B, L, H, K)
        causal = cached is None
        if cached is not None:
            old_k, old_v = cached
            cached = caches.write(old_k, k, slots), caches.write(old_v, v, slots)
            k, v = (y.astype(q.dtype) for y in cached)  # (B, S, H, K)
        y = jax.nn.dot_product_attention(q, k, v, mask=mask, is_causal=causal)
        y = constrain(y, "batch", "length", "heads", None).reshape(x.shape)
        return dense(c.dim, ("heads", "embed"), **options, name="c_proj")(y), cached


class MLP(Part):
    """Dense, GELU by its tanh approximation, dense."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        """``(B, L, D)`` to ``(B, L, D)``."""
        c, options = self.config, self.options
        y = dense(c.inner or 4 * c.dim, ("embed", "mlp"), **options, name="c_fc")(x)  # (B, L, F)
        y = constrain(nn.gelu(y, approximate=True), "batch", "length", "mlp")
        return dense(c.dim, ("mlp", "embed"), **options, name="c_proj")(y)


class GPT(nn.Module):
    """The language model: token ids ``(B, L)`` to float32 logits ``(B, L, V)``.

    Attributes:
        config: the sizes.
        scan: whether the layers are one compiled block in a loop.
        remat: whether the backward pass computes each layer again instead of keeping activations.
        policy: what is kept nevertheless, as `jlora.remat_policy`.
        dtype: of activations and products.
        param_dtype: of the parameters that `init` draws.
    """

    config: Config
    scan: bool = True
    remat: bool = False
    policy: Callable[..., bool] | None = None
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32

    @nn.compact
    def __call__(
        self,
        ids: jax.Array,
        mask: jax.Array | None = None,
        positions: jax.Array | None = None,
        cache: Cache | None = None,
    ) -> Any:
        """Embeds, applies the layers, and reads the logits off the tied embedding.

        Args:
            ids: ``(B, L)``.
            mask: ``(B, L)``, nonzero where there is a token and not padding.
            positions: ``(B, L)`` or ``(1, L)``; None is 0, 1, 2, …. Those with a cache follow from
                what it holds, and must not be given.
            cache: of the tokens before these, which are seen too.

        Returns:
            The logits; with a cache, these and the cache that holds these tokens too.

        Raises:
            ValueError: there are more tokens than positions, or positions beside a cache.
        """
        c, options = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        if positions is None and cache is None:
            check_length(ids, c.positions)
        place, positions, seen = caches.begin(cache, ids, mask, positions)
        cached = None if cache is None else (cache.keys, cache.values)
        slots = None if place is None else place.slots
        wte = embed(c.rows, c.dim, "vocab", **options, name="wte")
        wpe = embed(c.positions, c.dim, "position", **options, name="wpe")
        x = dropout(self, c.dropout, wte(ids) + wpe(positions))  # (B, L, D)
        how = {"scan": self.scan, "remat": self.remat, "policy": self.policy, "each": (cached,)}
        x, written = stack(Block, c.layers, "h", x, seen, slots, **how, config=c, **options)
        x = layer_norm(c.norm_eps, **options, name="ln_f")(x)
        logits = wte.attend(constrain(x, "batch", "length", None)).astype(jnp.float32)
        logits = constrain(logits, "batch", "length", "vocab")
        if c.rows > c.vocab:
            least = jnp.finfo(jnp.float32).min
            logits = jnp.where(jnp.arange(c.rows) < c.vocab, logits, least)
        return caches.end(place, logits, written)


# ---- checkpoints --------------------------------------------------------------------------------

_DENSE = {"h/(attn|mlp)/c_(fc|proj)": r"h.{}.\1.c_\2"}
_FUSED = {"h/attn/c_attn": "h.{}.attn.c_attn"}
_NORMS = {r"h/(ln_\d)": r"h.{}.\1", "ln_f": "ln_f"}


def names(config: Config) -> tuple[peft.Name, ...]:
    """What our leaves are called in the checkpoint, and how their axes lie there."""
    prefix = "" if config.bare else "transformer."
    return (
        peft.Name("wte/embedding", f"{prefix}wte", "vo", tied="lm_head"),
        peft.Name("wpe/embedding", f"{prefix}wpe", "vo"),
        # Its Conv1D keeps a kernel as (inputs, outputs), as Flax does.
        *hf.rows(_DENSE, {"kernel": ("io", "weight")}, "h", prefix, transposed=True),
        *hf.rows(_DENSE, {"bias": ("o", "bias")}, "h", prefix),
        *hf.rows(_FUSED, {"kernel": ("ioo", "weight")}, "h", prefix, transposed=True),
        *hf.rows(_FUSED, {"bias": ("oo", "bias")}, "h", prefix),
        *hf.rows(_NORMS, {"scale": ("o", "weight"), "bias": ("o", "bias")}, "h", prefix),
    )


FIELDS = {
    "vocab": "vocab_size",
    "positions": "n_positions",
    "layers": "n_layer",
    "dim": "n_embd",
    "heads": "n_head",
    "inner": "n_inner",
    "norm_eps": "layer_norm_epsilon",
    "dropout": "resid_pdrop",
}
KNOWN = {
    "model_type": "gpt2",
    "activation_function": ("gelu_new", "gelu_pytorch_tanh"),
    "scale_attn_weights": True,
    "scale_attn_by_inverse_layer_idx": False,
    "add_cross_attention": False,
    "tie_word_embeddings": True,
}


def load(
    folder: str | Path, scan: bool = True, pad_vocab: int = 1
) -> tuple[Config, dict[str, Any]]:
    """Config and variables, in the file's dtype, from a folder of Hugging Face's.

    Args:
        folder: with `config.json` and `model.safetensors` or its shards.
        scan: of the model that the variables are for.
        pad_vocab: of the config.
    """
    config = hf.read_config(folder, Config, FIELDS, KNOWN)
    tensors = hf.read_tensors(folder)
    bare = not any(name.startswith("transformer.") for name in tensors)
    config = dataclasses.replace(config, bare=bare, pad_vocab=pad_vocab)
    table, head = f"{names(config)[0].module}.weight", "lm_head.weight"
    for name in {table, head} & set(tensors):
        tensors[name] = np.pad(tensors[name], ((0, config.rows - config.vocab), (0, 0)))
    like = shapes(config, scan)
    return config, hf.to_variables(tensors, like, names(config), copies={head: table})


def save(path: str | Path, variables: Mapping[str, Any], config: Config) -> None:
    """Writes `variables` to a safetensors file under Hugging Face's names."""
    tensors = hf.to_tensors(variables, names(config))
    table = f"{names(config)[0].module}.weight"
    hf.write_tensors(path, {**tensors, table: tensors[table][: config.vocab]})


def shapes(config: Config, scan: bool = True) -> Any:
    """The variables of the model as `jax.ShapeDtypeStruct`s."""
    return parts.shapes(GPT(config, scan))
