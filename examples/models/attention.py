"""Attention of a decoder: shared keys and values, rotary positions, windows, caps, and the cache.

    y, written = Attention(config)(x, layer, tokens)

`Layer` has what differs between layers, `Tokens` what all of them see alike.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from .cache import write
from .parts import Part, ShiftedRMSNorm, constrain, dense, rms_norm
from .rope import rope


class Layer(NamedTuple):
    """What differs between layers; in the stack with layers on axis 0.

    Attributes:
        frequencies: of the rotary positions, (head_dim / 2,).
        window: how many tokens a query sees, (); None where no layer has a window.
        keys: of the cache, (batch, slots, kv_heads, head_dim), or None.
        values: the same.
    """

    frequencies: jax.Array
    window: jax.Array | None
    keys: jax.Array | None = None
    values: jax.Array | None = None


class Tokens(NamedTuple):
    """What all layers see alike.

    Attributes:
        positions: of the queries, (batch or 1, length).
        mask: which keys there are, (batch, 1, 1, length); with a cache, which slots a query sees,
            (batch, 1, length, slots). None is all.
        distance: how far a query is behind a key, (batch or 1, 1, length, keys); None where no
            layer has a window.
        slots: of the cache, where keys and values go, (batch, length).
    """

    positions: jax.Array
    mask: jax.Array | None
    distance: jax.Array | None
    slots: jax.Array | None


def norm(c: Any, name: str, **options: Any) -> nn.Module:
    """The normalization of the family."""
    return (ShiftedRMSNorm if c.shifted_norms else rms_norm)(c.norm_eps, **options, name=name)


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    mask: jax.Array | None,
    causal: bool,
    scale: float,
    cap: float | None,
) -> jax.Array:
    """Softmax attention in which heads of queries share keys and values, with capped scores.

    Args:
        query: (batch, length, heads, head_dim).
        key: (batch, keys, kv_heads, head_dim).
        value: the same.
        mask: (batch or 1, 1, length or 1, keys), True where a key is seen.
        causal: whether a query sees no later key.
        scale: of the scores.
        cap: c in c · tanh(scores / c).

    Returns:
        As `query`.
    """
    if cap is None:
        return jax.nn.dot_product_attention(
            query, key, value, mask=mask, is_causal=causal, scale=scale
        )
    groups = query.reshape(*query.shape[:2], key.shape[2], -1, query.shape[-1])
    scores = jnp.einsum("blhgd,bshd->bhgls", groups, key, preferred_element_type=jnp.float32)
    scores = cap * jnp.tanh(scale * scores / cap)
    if causal:
        before = jnp.tri(query.shape[1], key.shape[1], dtype=bool)[None, None]
        mask = before if mask is None else mask & before
    if mask is not None:
        scores = jnp.where(mask[:, :, None], scores, jnp.finfo(scores.dtype).min)
    weights = jax.nn.softmax(scores).astype(value.dtype)
    return jnp.einsum("bhgls,bshd->blhgd", weights, value).reshape(query.shape)


class Attention(Part):
    """Causal self-attention in which `heads / kv_heads` query heads share a key and a value."""

    @nn.compact
    def __call__(self, x: jax.Array, layer: Layer, tokens: Tokens) -> tuple[jax.Array, Any]:
        """Outputs (batch, length, dim), and the keys and values of the cache where there is one."""
        c, options = self.config, self.options

        def project(name: str, heads: int, axis: str) -> jax.Array:
            bias = name in c.biases
            y = dense(heads * c.head_dim, ("embed", axis), use_bias=bias, **options, name=name)(x)
            y = y.reshape(*x.shape[:2], heads, c.head_dim)
            return constrain(y, "batch", "length", axis, None)

        query = project("query", c.heads, "heads")  # (batch, length, heads, head_dim)
        key = project("key", c.kv_heads, "kv_heads")  # (batch, length, kv_heads, head_dim)
        value = project("value", c.kv_heads, "kv_heads")  # (batch, length, kv_heads, head_dim)
        if c.qk_norm:
            query = norm(c, "query_norm", **options)(query)
            key = norm(c, "key_norm", **options)(key)
        query, key = (rope(y, layer.frequencies, tokens.positions) for y in (query, key))

        written = None
        if layer.keys is not None:
            written = tuple(
                write(old, new, tokens.slots)
                for old, new in ((layer.keys, key), (layer.values, value))
            )
            key, value = (y.astype(query.dtype) for y in written)  # (batch, slots, …)
        mask = tokens.mask
        if layer.window is not None:
            near = tokens.distance < layer.window
            mask = near if mask is None else mask & near
        scale = (c.query_scale or c.head_dim) ** -0.5
        mixed = attend(query, key, value, mask, written is None, scale, c.attention_cap)
        mixed = constrain(mixed, "batch", "length", "heads", None).reshape(*x.shape[:2], -1)
        out = dense(c.dim, ("heads", "embed"), use_bias="out" in c.biases, **options, name="out")
        return out(mixed), written
