"""Keys and values of the tokens so far, so that the next ones cost what they alone cost.

    cache = config.cache(batch, slots)                           # empty, of a model's config
    logits, cache = model.apply(variables, ids, mask, cache=cache)   # the prompts
    logits, cache = model.apply(variables, token, cache=cache)   # (batch, 1): the next token, …

An adapted model takes and gives it likewise: `lora.apply(base, adapter, ids, mask, cache=cache)`.
The slot of a token is its position, whatever padding lies around it: prompts of several lengths may
be padded on either side. Where a row has no slot left, its logits are NaN.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from .parts import constrain


class Cache(NamedTuple):
    """What a causal model remembers of each row of a batch.

    Attributes:
        keys: turned by their positions, (layers, batch, slots, kv_heads, head_dim).
        values: the same.
        lengths: the tokens of each row, (batch,).
    """

    keys: jax.Array
    values: jax.Array
    lengths: jax.Array

    @property
    def slots(self) -> int:
        """The most tokens of a row."""
        return self.keys.shape[2]

    def place(self, shape: tuple[int, ...], mask: jax.Array | None) -> "Place":
        """Where the next tokens of each row stand; see `Place`.

        Args:
            shape: of the token ids, (batch, length).
            mask: (batch, length), nonzero where there is a token and not padding.
        """
        real = jnp.ones(shape, bool) if mask is None else mask.astype(bool)
        count = jnp.cumsum(real, axis=1, dtype=jnp.int32)
        positions = jnp.maximum(self.lengths[:, None] + count - 1, 0)
        slots = jnp.where(real, positions, self.slots)
        seen = jnp.arange(self.slots)[None, None, None] <= positions[:, None, :, None]
        return Place(positions, slots, seen, self.lengths + count[:, -1])

    def rows(self, index: Any) -> "Cache":
        """The cache of these rows of the batch, in this order, each as often as it is named."""
        return Cache(self.keys[:, index], self.values[:, index], self.lengths[index])


class Place(NamedTuple):
    """Where tokens stand in a cache.

    Attributes:
        positions: of the tokens, (batch, length).
        slots: the same; of padding, which is not written, one that is not there.
        seen: which slots a token attends to, (batch, 1, length, slots).
        lengths: of the rows with these tokens, (batch,).
    """

    positions: jax.Array
    slots: jax.Array
    seen: jax.Array
    lengths: jax.Array

    def checked(self, out: jax.Array) -> jax.Array:
        """`out` (batch, last tokens, ...), NaN where there was no slot left."""
        full = self.positions[:, -out.shape[1] :] >= self.seen.shape[-1]
        return jnp.where(jnp.expand_dims(full, range(2, out.ndim)), jnp.nan, out)


def empty(
    layers: int, batch: int, slots: int, kv_heads: int, head_dim: int, dtype: Any = jnp.float32
) -> Cache:
    """A cache without tokens."""
    zeros = jnp.zeros((layers, batch, slots, kv_heads, head_dim), dtype)
    return Cache(zeros, zeros, jnp.zeros(batch, jnp.int32))


def begin(
    cache: Cache | None, ids: jax.Array, mask: jax.Array | None, positions: jax.Array | None
) -> tuple[Place | None, jax.Array, jax.Array | None]:
    """The place of a model's tokens, their positions, and which keys or slots they attend to.

    Without a cache, tokens attend to those with the same number in the mask; 0 is padding.

    Raises:
        ValueError: there are positions beside a cache.
    """
    if cache is None:
        seen = None if mask is None else _seen(mask[:, None, None], mask[:, None, :, None])
        return None, jnp.arange(ids.shape[1])[None] if positions is None else positions, seen
    if positions is not None:
        raise ValueError("`positions`: expected none with a cache, which says where it is")
    place = cache.place(ids.shape, mask)
    return place, place.positions, place.seen


def _seen(keys: jax.Array, queries: jax.Array) -> jax.Array:
    return (keys != 0) & ((keys == queries) | (queries == 0))


def end(place: Place | None, out: jax.Array, written: Any) -> Any:
    """What a model returns: logits, say, and the cache with `written` keys and values if any."""
    if place is None:
        return out
    return place.checked(out), Cache(*written, place.lengths)


def write(cached: jax.Array, new: jax.Array, slots: jax.Array) -> jax.Array:
    """Keys or values of one layer, (batch, slots, kv_heads, head_dim), with new ones in `slots`."""
    rows = jnp.arange(len(new))[:, None]
    cached = cached.at[rows, slots].set(new.astype(cached.dtype), mode="drop")
    return constrain(cached, "batch", None, "kv_heads", None)
