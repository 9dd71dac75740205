"""Greedy texts from a causal model with a cache; for beam search see `paper.tasks.beam`.

logits_fn = jax.tree_util.Partial(model.apply, variables)        # or lora.apply, base, adapter
answers = generate(logits_fn, prompts, config.cache, stop=2)
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from .cache import Cache


def generate(
    logits_fn: Callable[..., tuple[jax.Array, Cache]],
    prompts: Sequence[Sequence[int]],
    cache: Callable[[int, int], Cache],
    *,
    stop: int | Sequence[int],
    limit: int = 32,
) -> list[list[int]]:
    """Continues each prompt, token by token.

    Args:
        logits_fn: `(ids, mask, cache=cache)` to logits and cache, as a `jax.tree_util.Partial` of
            an apply function and its parameters: these are then arguments of the compiled program,
            and new values need no new compilation.
        prompts: token ids.
        cache: batch and slots to an empty cache, as `config.cache`.
        stop: the tokens that end an answer.
        limit: the most tokens to add.

    Returns:
        What was added to each prompt, without the token that ended it.

    Raises:
        ValueError: a prompt is empty.
    """
    if not prompts or not all(map(len, prompts)):
        raise ValueError("`prompts`: expected at least one, of at least one token each")
    stops = np.atleast_1d(np.asarray(stop, np.int32))
    lengths = np.array([len(prompt) for prompt in prompts])
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = np.zeros(mask.shape, np.int32)
    ids[mask] = np.concatenate([np.asarray(prompt, np.int32) for prompt in prompts])
    empty = cache(len(prompts), lengths.max() + limit)
    answers = np.asarray(_generate(logits_fn, empty, ids, mask, stops, limit))
    ends = np.where((ended := np.isin(answers, stops)).any(1), ended.argmax(1), limit)
    return [row[:end].tolist() for row, end in zip(answers, ends, strict=True)]


@functools.partial(jax.jit, static_argnames="limit")
def _generate(
    logits_fn: Any,
    cache: Cache,
    ids: jax.Array,  # (batch, length)
    mask: jax.Array,  # (batch, length)
    stops: jax.Array,
    limit: int,
) -> jax.Array:
    """The added tokens, (batch, limit); behind a stop they are arbitrary."""
    rows = jnp.arange(len(ids))
    ends = mask.sum(1) - 1
    cache = fill(logits_fn, cache, ids, mask & (jnp.arange(ids.shape[1]) < ends[:, None]))

    def unfinished(state: Any) -> jax.Array:
        step, _, _, done, _ = state
        return (step < limit) & ~done.all()

    def extend(state: Any) -> Any:
        step, token, cache, done, answers = state
        logits, cache = logits_fn(token[:, None], cache=cache)
        token = logits[:, 0].argmax(-1).astype(token.dtype)
        answers = answers.at[:, step].set(token)
        return step + 1, token, cache, done | jnp.isin(token, stops), answers

    step, done = jnp.zeros((), jnp.int32), jnp.zeros(len(ids), bool)
    answers = jnp.zeros((len(ids), limit), ids.dtype)
    state = step, ids[rows, ends], cache, done, answers
    return jax.lax.while_loop(unfinished, extend, state)[-1]


def fill(logits_fn: Any, cache: Cache, ids: jax.Array, mask: jax.Array) -> Cache:
    """The cache with these tokens, (batch, length); XLA leaves out logits that nobody reads."""
    return logits_fn(ids, mask, cache=cache)[1] if ids.shape[1] > 1 else cache
