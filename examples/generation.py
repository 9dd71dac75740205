"""Texts from a causal language model of `transformers`, by one function that JAX compiles.

    params, apply = jlora.torch.extract(model)
    call = functools.partial(apply, params)        # or lora.apply, base, adapter
    tokens = generate(call, model, ids, mask, new_tokens=32, stop=[2])            # the most likely
    tokens = generate(call, model, ids, mask, new_tokens=32, stop=[2], key=key)   # drawn

One call reads the prompts, and a scan makes the tokens. The most likely ones are those of PyTorch's
`model.generate(do_sample=False)`.
"""

import inspect
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from transformers import StaticCache
from transformers.cache_utils import StaticLayer, StaticSlidingWindowLayer


def generate(
    call: Callable[..., Any],
    model: Any,
    ids: jax.Array,
    mask: jax.Array,
    *,
    new_tokens: int,
    stop: Sequence[int],
    key: jax.Array | None = None,
    temperature: float = 1.0,
    is_cached: bool = True,
) -> jax.Array:
    """The tokens after each prompt, (batch, new tokens); after a stop, that stop again.

    Args:
        call: the model as a function of ids and of what its `forward` takes.
        model: the module, for its class and its configuration; it may be on the meta device.
        ids: prompts, (batch, length), padded on the left.
        mask: the same, 0 where there is padding.
        new_tokens: how many tokens are made.
        stop: the tokens that end a text.
        key: draws the tokens; None takes the most likely.
        temperature: what logits are divided by before a draw.
        is_cached: whether the keys and values of earlier tokens are kept. Otherwise each step reads
            whole texts: slower, for models that cannot, such as those with layers in a scan, and
            MPT and XGLM, which read the cache's length.

    Raises:
        ValueError: the model has a cache that no scan can hold.
    """
    ids, mask = (jnp.pad(x, ((0, 0), (1, new_tokens))) for x in (ids, mask))
    start = ids.shape[1] - new_tokens - 1  # of the last token of the prompts
    mask = mask.at[:, start + 1 :].set(1)
    positions = jnp.maximum(mask.cumsum(1) - 1, 0)
    takes = inspect.signature(type(model).forward).parameters

    def read(ids: jax.Array, positions: jax.Array, mask: Any, cache: Any) -> tuple[Any, Any]:
        given = {"attention_mask": mask, "position_ids": positions, "cache": cache}
        known = {name: x for name, x in given.items() if name in takes and x is not None}
        out = call(ids, **known, use_cache=cache is not None)
        return out.logits, None if cache is None else out.cache

    def step(carry: Any, given: Any) -> Any:
        ids, is_over, cache = carry
        at, key = given
        if cache is None:
            logits = read(ids, positions, mask, None)[0][:, at]
        else:
            seen = None if all(cache.is_linear) else mask  # a state has left the padding behind
            logits, cache = read(ids[:, at, None], positions[:, at, None], seen, cache)
            logits = logits[:, 0]
        found = (
            logits.argmax(1) if key is None else jax.random.categorical(key, logits / temperature)
        )
        token = jnp.where(is_over, ids[:, at], found)
        is_over |= jnp.isin(token, jnp.array(stop))
        return (ids.at[:, at + 1].set(token), is_over, cache), token

    cache = make_cache(model.config, ids.shape[1]) if is_cached else None
    if is_cached:
        # Without position_ids, as Bloom, a model reads them from a mask of all slots.
        is_whole = "position_ids" not in takes and not any(cache.is_linear)
        seen = mask if is_whole else mask[:, :start]
        _, cache = read(ids[:, :start], positions[:, :start], seen, cache)
    keys = None if key is None else jax.random.split(key, new_tokens)
    carry = ids, jnp.zeros(len(ids), bool), cache
    return jax.lax.scan(step, carry, (start + jnp.arange(new_tokens), keys))[1].T


def make_cache(config: Any, slots: int) -> StaticCache:
    """A cache of `slots` tokens, also for layers that see a window of them.

    PyTorch's caches of windows count tokens in Python, which a scan over tokens cannot.
    """
    cache = StaticCache(config, slots)
    for i, layer in enumerate(cache.layers):
        if type(layer) is StaticSlidingWindowLayer:
            cache.layers[i] = StaticLayer(slots)
    if odd := [x for x in cache.layers if isinstance(x, StaticSlidingWindowLayer)]:
        raise ValueError(f"{type(odd[0]).__name__} counts tokens in Python: give is_cached=False")
    return cache
