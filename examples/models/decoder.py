"""A decoder in Flax linen: Llama, and what Mistral, Qwen, Gemma and Mixtral do in their own ways.

    config, variables = checkpoint.load(folder)                # Llama of Hugging Face's files
    logits = Decoder(config).apply(variables, ids)             # (batch, length, vocab)

What a family does in its own way is a field of `Config`. Every kernel is (inputs, outputs), and
those of the layers are stacked on axis 0, one leaf for all: `layers/attention/query/kernel` of
SmolLM2-135M is (30, 576, 576); those of experts are (layers, experts, inputs, outputs). With
``scan=False`` the layers are modules `layers_0`, `layers_1`, …. For a mesh see `parts`; for texts,
`cache` and `beam`.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from . import cache as caches
from .attention import Attention, Layer, Tokens, norm
from .cache import Cache
from .experts import Experts
from .parts import Part, constrain, dense, embed, stack
from .rope import Linear, Llama3, frequencies

ACTIVATIONS: dict[str, Callable[[jax.Array], jax.Array]] = {
    "silu": nn.silu,
    "gelu": functools.partial(nn.gelu, approximate=False),
    "gelu_pytorch_tanh": functools.partial(nn.gelu, approximate=True),
}
FAR = 2**30  # a window that nothing is outside of


@dataclass(frozen=True)
class Config:
    """What a checkpoint says about its model; the defaults are Llama's.

    Attributes:
        vocab: tokens.
        layers: blocks.
        dim: the model size.
        hidden: the size within the MLP, or within each expert.
        heads: of queries.
        kv_heads: of keys and values, each shared by as many queries.
        rope_base: of the rotary positions.
        norm_eps: added to mean squares.
        tied: whether the head is the embedding.
        bare: whether the checkpoint is that of a model without a head, whose names lack `model.`.
        head_size: of one head; None is dim / heads.
        biases: the dense layers that have one, of query, key, value, out, gate, up and down.
        qk_norm: whether queries and keys are normalized, each head by itself.
        activation: of the gate; a key of `ACTIVATIONS`.
        windows: of each layer, how many tokens a query sees, itself included; 0 is all before it.
            Empty where no layer has a window.
        local_rope_base: of the layers with a window; None is as of the others.
        rope_scaling: of the frequencies of the layers with `rope_base`.
        query_scale: queries are divided by its square root; None is the size of a head.
        attention_cap: c in c · tanh(scores / c); None does without.
        logit_cap: the same of the logits.
        scaled_embedding: whether embeddings are multiplied by the square root of `dim`.
        shifted_norms: whether scales of norms are kept as what they differ from 1 by.
        post_norms: whether outputs of attention and MLP are normalized too.
        experts: how many MLPs there are in a layer; 0 is one, which all tokens pass.
        experts_per_token: how many of them a token passes.
        normalized_experts: whether the weights of these are divided by their sum.
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
    biases: tuple[str, ...] = ()
    qk_norm: bool = False
    activation: str = "silu"
    windows: tuple[int, ...] = ()
    local_rope_base: float | None = None
    rope_scaling: Linear | Llama3 | None = None
    query_scale: float | None = None
    attention_cap: float | None = None
    logit_cap: float | None = None
    scaled_embedding: bool = False
    shifted_norms: bool = False
    post_norms: bool = False
    experts: int = 0
    experts_per_token: int = 0
    normalized_experts: bool = True

    @property
    def head_dim(self) -> int:
        """The width of one attention head."""
        return self.head_size or self.dim // self.heads

    @property
    def act(self) -> Callable[[jax.Array], jax.Array]:
        """The activation of the gate."""
        return ACTIVATIONS[self.activation]

    def cache(self, batch: int, slots: int, dtype: Any = jnp.float32) -> Cache:
        """An empty cache for rows of at most `slots` tokens."""
        return caches.empty(self.layers, batch, slots, self.kv_heads, self.head_dim, dtype)


def layers_of(c: Config) -> Layer:
    """Those of a config, without a cache."""
    base = frequencies(c.head_dim, c.rope_base, c.rope_scaling)
    local = base if c.local_rope_base is None else frequencies(c.head_dim, c.local_rope_base)
    windows = np.array(c.windows or [0] * c.layers, np.int32)
    each = np.where(windows[:, None] > 0, local, base)
    return Layer(each, np.where(windows > 0, windows, FAR) if windows.any() else None)


# ---- layers -------------------------------------------------------------------------------------


class MLP(Part):
    """The gated feed-forward layer, down(act(gate(x)) * up(x))."""

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:  # (batch, length, dim)
        """Applies the layer to every position."""
        c, options = self.config, self.options

        def layer(name: str, size: int, *axes: str) -> nn.Dense:
            return dense(size, axes, use_bias=name in c.biases, **options, name=name)

        gate = layer("gate", c.hidden, "embed", "mlp")(x)
        up = layer("up", c.hidden, "embed", "mlp")(x)  # (batch, length, hidden)
        y = constrain(c.act(gate) * up, "batch", "length", "mlp")
        return layer("down", c.dim, "mlp", "embed")(y)


class Block(Part):
    """One layer: attention and then the MLP, each on normalized inputs, are added to x."""

    @nn.compact
    def __call__(self, x: jax.Array, layer: Layer, tokens: Tokens) -> tuple[jax.Array, Any]:
        """The next x, (batch, length, dim), and what attention has written into the cache."""
        c, options = self.config, self.options

        def normalized(name: str, y: jax.Array) -> jax.Array:
            return constrain(norm(c, name, **options)(y), "batch", "length", None)

        x = constrain(x, "batch", "residual", None)
        y = normalized("attention_norm", x)
        y, written = Attention(c, **options, name="attention")(y, layer, tokens)
        y = normalized("attention_post_norm", y) if c.post_norms else y
        x = constrain(x + y, "batch", "residual", None)
        y = normalized("mlp_norm", x)
        y = (Experts if c.experts else MLP)(c, **options, name="mlp")(y)
        y = normalized("mlp_post_norm", y) if c.post_norms else y
        return constrain(x + y, "batch", "residual", None), written


# ---- the model ----------------------------------------------------------------------------------


class Decoder(nn.Module):
    """The language model: token ids (batch, length) to float32 logits (batch, length, vocab).

    Attributes:
        config: the sizes.
        dtype: what activations and products are computed in.
        remat: whether the backward pass recomputes each layer instead of storing its activations.
        policy: what is stored nevertheless, as `jlora.checkpoint_policy`.
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
    ) -> Any:
        """Embeds, applies the layers, and reads the logits off the embedding or the head.

        Args:
            ids: (batch, length).
            mask: (batch, length), nonzero where there is a token and not padding.
            positions: (batch, length) or (1, length); None is 0, 1, 2, …. Those with a cache follow
                from what it holds, and must not be given.
            cache: of the tokens before these, which are seen too.

        Returns:
            The logits; with a cache, these and the cache that holds these tokens too.
        """
        c, options = self.config, {"dtype": self.dtype, "param_dtype": self.param_dtype}
        layer = layers_of(c)
        place, positions, seen = caches.begin(cache, ids, mask, positions)
        keys = positions
        if cache is not None:
            keys = jnp.arange(cache.slots)[None]
            layer = layer._replace(keys=cache.keys, values=cache.values)
        distance = (positions[:, None, :, None] - keys[:, None, None]) if c.windows else None
        tokens = Tokens(positions, seen, distance, None if place is None else place.slots)

        table = embed(c.vocab, c.dim, "vocab", **options, name="embed")
        x = table(ids)
        x = x * jnp.asarray(c.dim**0.5, x.dtype) if c.scaled_embedding else x
        how = {"scan": self.scan, "remat": self.remat, "policy": self.policy, "each": (layer,)}
        x, written = stack(Block, c.layers, "layers", x, tokens, **how, config=c, **options)
        x = constrain(norm(c, "norm", **options)(x), "batch", "length", None)
        if c.tied:
            logits = table.attend(x)
        else:
            head = dense(c.vocab, ("embed", "vocab"), use_bias=False, **options, name="head")
            logits = head(x)
        logits = constrain(logits.astype(jnp.float32), "batch", "length", "vocab")
        if c.logit_cap is not None:
            logits = c.logit_cap * jnp.tanh(logits / c.logit_cap)
        return caches.end(place, logits, written)
