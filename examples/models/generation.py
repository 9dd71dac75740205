"""Texts from a causal model with a cache: the most likely ones, or drawn.

    logits_fn = jax.tree_util.Partial(model.apply, variables)        # or lora.apply, base, adapter
    answers = generate(logits_fn, prompts, config.cache, stop=2)     # greedy
    answers = generate(logits_fn, prompts, config.cache, stop=2, choose=Sampling(0.7, top_p=0.9),
                       key=jax.random.key(0))

What is drawn for a row depends on the key, the number of the row and the step alone. For beam
search see `tasks.beam`.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .cache import Cache


class Sampling(NamedTuple):
    """Draws from the model's distribution, sharpened and cut off.

    Attributes:
        temperature: logits are divided by it.
        top_k: only as many most likely tokens stay; None is all.
        top_p: of these only the most likely ones whose probabilities add up to it, the token that
            reaches it included.
    """

    temperature: float = 1.0
    top_k: int | None = None
    top_p: float = 1.0

    def __call__(self, logits: jax.Array, key: jax.Array) -> jax.Array:
        """Logits (vocab,) to a token, ()."""
        return jax.random.categorical(key, self.cut(logits))

    def cut(self, logits: jax.Array) -> jax.Array:
        """The logits that are drawn from; -inf where a token is out of question."""
        logits = logits / self.temperature
        if self.top_k is not None:
            least = jax.lax.top_k(logits, min(self.top_k, logits.size))[0][-1]
            logits = jnp.where(logits < least, -jnp.inf, logits)
        if self.top_p < 1:
            best = jnp.sort(logits, descending=True)
            p = jax.nn.softmax(best)
            more_likely = jnp.cumsum(p) - p  # than each
            least = jnp.where(more_likely < self.top_p, best, jnp.inf).min()
            logits = jnp.where(logits < least, -jnp.inf, logits)
        return logits


def greedy(logits: jax.Array, key: jax.Array) -> jax.Array:
    """The most likely token, (), by logits (vocab,)."""
    del key
    return logits.argmax(-1)


def generate(
    logits_fn: Callable[..., tuple[jax.Array, Cache]],
    prompts: Sequence[Sequence[int]],
    cache: Callable[[int, int], Cache],
    *,
    stop: int | Sequence[int],
    limit: int = 32,
    choose: Callable[[jax.Array, jax.Array], jax.Array] = greedy,
    key: jax.Array | None = None,
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
        choose: logits (vocab,) and a key to a token; `greedy` or a `Sampling`.
        key: for what is drawn.

    Returns:
        What was added to each prompt, without the token that ended it.

    Raises:
        ValueError: a prompt is empty, or something is to be drawn without a key.
    """
    if not prompts or not all(map(len, prompts)):
        raise ValueError("`prompts`: expected at least one, of at least one token each")
    if key is None and choose is not greedy:
        raise ValueError("`key`: expected one to draw with, got None")
    stops = np.atleast_1d(np.asarray(stop, np.int32))
    lengths = np.array([len(prompt) for prompt in prompts])
    mask = np.arange(lengths.max()) < lengths[:, None]
    ids = np.zeros(mask.shape, np.int32)
    ids[mask] = np.concatenate([np.asarray(prompt, np.int32) for prompt in prompts])
    empty = cache(len(prompts), lengths.max() + limit)
    key = jax.random.key(0) if key is None else key
    answers = np.asarray(_generate(logits_fn, empty, ids, mask, stops, key, limit, choose))
    ends = np.where((ended := np.isin(answers, stops)).any(1), ended.argmax(1), limit)
    return [row[:end].tolist() for row, end in zip(answers, ends, strict=True)]


@functools.partial(jax.jit, static_argnames=("limit", "choose"))
def _generate(
    logits_fn: Any,
    cache: Cache,
    ids: jax.Array,  # (batch, length)
    mask: jax.Array,  # (batch, length)
    stops: jax.Array,
    key: jax.Array,
    limit: int,
    choose: Callable[[jax.Array, jax.Array], jax.Array],
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
        keys = jax.vmap(lambda row: jax.random.fold_in(jax.random.fold_in(key, row), step))(rows)
        token = jax.vmap(choose)(logits[:, 0], keys).astype(token.dtype)
        answers = answers.at[:, step].set(token)
        return step + 1, token, cache, done | jnp.isin(token, stops), answers

    step, done = jnp.zeros((), jnp.int32), jnp.zeros(len(ids), bool)
    answers = jnp.zeros((len(ids), limit), ids.dtype)
    state = step, ids[rows, ends], cache, done, answers
    return jax.lax.while_loop(unfinished, extend, state)[-1]


def fill(logits_fn: Any, cache: Cache, ids: jax.Array, mask: jax.Array) -> Cache:
    """The cache with these tokens, (batch, length); XLA leaves out logits that nobody reads."""
    return logits_fn(ids, mask, cache=cache)[1] if ids.shape[1] > 1 else cache
