"""Attention, as PyTorch has it."""

import jax
import jax.numpy as jnp

from ._refuse import DRAWN, refuse


def attend(
    query: jax.Array,
    key: jax.Array,
    value: jax.Array,
    attn_mask: jax.Array | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
) -> jax.Array:
    """Attends, with softmax in float32, but of float64 in float64; without keys it is zero."""
    if dropout_p:
        refuse(*DRAWN)
    scale = query.shape[-1] ** -0.5 if scale is None else scale
    if is_causal:
        attn_mask = jnp.tri(query.shape[-2], key.shape[-2], dtype=bool)
    if enable_gqa:  # groups of queries' heads share one of keys
        shape = query.shape[:-1]
        if key.shape[-3] != value.shape[-3]:
            heads = shape[-3]
            key, value = (jnp.repeat(x, heads // x.shape[-3], -3) for x in (key, value))
        query = _group(query, key.shape[-3])
        has_heads = attn_mask is not None and attn_mask.ndim > 2
        attn_mask = _group(attn_mask, key.shape[-3]) if has_heads else attn_mask
        found = _attend(query, key[..., None, :, :], value[..., None, :, :], attn_mask, scale)
        return found.reshape(*shape, value.shape[-1])
    return _attend(query, key, value, attn_mask, scale)


def _group(x: jax.Array, heads: int) -> jax.Array:
    """Splits the axis of heads; one that all share stays one."""
    groups = (heads, -1) if x.shape[-3] > 1 else (1, 1)
    return x.reshape(*x.shape[:-3], *groups, *x.shape[-2:])


def _attend(
    query: jax.Array, key: jax.Array, value: jax.Array, mask: jax.Array | None, scale: float
) -> jax.Array:
    wide = jnp.promote_types(query.dtype, jnp.float32)
    scores = jnp.einsum("...le,...se->...ls", query, key, preferred_element_type=wide) * scale
    if mask is None:
        seen = jnp.ones((1, 1), bool)
    elif mask.dtype == bool:
        seen = mask
    else:
        seen = mask > -jnp.inf
        scores = scores + jnp.where(seen, mask, 0)
    scores = jnp.where(seen, scores, jnp.finfo(wide).min)
    weights = jax.nn.softmax(scores).astype(query.dtype)
    found = jnp.einsum("...ls,...sv->...lv", weights, value)
    return jnp.where(seen.any(-1, keepdims=True), found, 0)
