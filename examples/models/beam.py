"""Texts from a causal model: greedy, or by beam search with a length penalty.

    logits_fn = jax.tree_util.Partial(lora.apply, base, adapter)
    step = beam.cached(logits_fn, config.cache)  # or beam.uncached(logits_fn)
    texts = beam.search(step, prompts, beams=10, new_tokens=64, stop=(50256,), penalty=0.9)

The score of a text is the sum of its tokens' log probabilities, the stop included, divided by their
number to the power of the penalty: that of `transformers`, whose search with early_stopping="never"
finds the same texts. `greedy` is one beam. The search ends when no unfinished text can
become better than those kept. Shapes are fixed: with a cache two programs are compiled, one for the
prompts and one for a token of each text; without, one for whole texts.

Letters in the shapes: R rows, each an unfinished text, L tokens, V vocabulary.
"""

from collections.abc import Callable, Collection, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from .cache import Cache


class Text(NamedTuple):
    """Generated tokens, with the stop if they have one, and their score."""

    ids: tuple[int, ...]
    score: float


State = Any
Step = Callable[
    [np.ndarray, np.ndarray, np.ndarray | None, State], tuple[jax.Array | np.ndarray, State]
]


def uncached(logits_fn: Callable[[jax.Array], jax.Array]) -> Step:
    """The step of a causal model, which runs over whole texts each time.

    Args:
        logits_fn: a `jax.tree_util.Partial` of ids (R, L) to logits (R, L, V).
    """

    def step(ids: Any, lengths: Any, parents: Any, state: State) -> tuple[jax.Array, State]:
        del parents, state
        return _last_logits(logits_fn, ids, lengths), None

    return step


@jax.jit
def _last_logits(logits_fn: Any, ids: jax.Array, lengths: jax.Array) -> jax.Array:
    return jnp.take_along_axis(logits_fn(ids), lengths[:, None, None] - 1, axis=1)[:, 0]


def cached(logits_fn: Callable[..., Any], cache: Callable[[int, int], Cache]) -> Step:
    """The step of a causal model that reads only the last token of each text.

    Args:
        logits_fn: a `jax.tree_util.Partial` of `(ids, mask, cache=cache)` to logits and cache.
        cache: rows and slots to an empty cache, as the model's `config.cache`.
    """

    def step(ids: Any, lengths: Any, parents: Any, state: State) -> tuple[jax.Array, State]:
        if parents is None:
            state = _read(logits_fn, cache(*ids.shape), ids, lengths)
            parents = np.arange(len(ids))
        token = ids[np.arange(len(ids)), lengths - 1][:, None]
        return _next_logits(logits_fn, state, parents, token)

    return step


@jax.jit
def _read(logits_fn: Any, cache: Cache, ids: jax.Array, lengths: jax.Array) -> Cache:
    """The cache with all but the last token of each row; XLA leaves out logits nobody reads."""
    mask = jnp.arange(ids.shape[1]) < lengths[:, None] - 1
    return logits_fn(ids, mask, cache=cache)[1] if ids.shape[1] > 1 else cache


@jax.jit
def _next_logits(
    logits_fn: Any, cache: Cache, parents: jax.Array, token: jax.Array
) -> tuple[jax.Array, Cache]:
    logits, cache = logits_fn(token, cache=cache.rows(parents))
    return logits[:, 0], cache


def search(
    step: Step,
    prompts: Sequence[Sequence[int]],
    *,
    beams: int,
    new_tokens: int,
    stop: Collection[int],
    penalty: float = 1.0,
    no_repeat: int = 0,
    prompt_counts: bool = True,
    length: int | None = None,
) -> list[list[Text]]:
    """The best texts after each prompt, at most `beams`, best first.

    Args:
        step: `uncached` or `cached`: a function of ids, (R, L) int32, the numbers of their tokens,
            (R,) int32, the row of the last call that each goes on, (R,), and what the last call
            gave besides; both None at first. It gives the logits of the next tokens, (R, V), and
            what the next call gets. R and L are the same in every call.
        prompts: at least a token each.
        beams: how many unfinished texts are followed, for each prompt.
        new_tokens: the most tokens of a text.
        stop: the tokens that end a text.
        penalty: of the length; above 0 it favors longer texts.
        no_repeat: no sequence of so many tokens comes twice; 0 allows it.
        prompt_counts: whether sequences of the prompt count for that, as in `transformers`; in the
            paper's scripts they do not.
        length: L, at least that of the longest prompt and `new_tokens`, which is the default.

    Raises:
        ValueError: a prompt is empty, or `length` too short.
        FloatingPointError: logits are not numbers.
    """
    if not prompts or not all(map(len, prompts)):
        raise ValueError("`prompts`: expected at least one, of at least one token each")
    needed = max(map(len, prompts)) + new_tokens
    if (length or needed) < needed:
        raise ValueError(f"`length`: expected at least {needed}, got {length}")
    searches = [_Search(prompt, beams, length or needed) for prompt in prompts]
    rules = _Rules(new_tokens, frozenset(stop), penalty, no_repeat, prompt_counts)
    parents = state = None
    for _ in range(new_tokens):
        ids = np.concatenate([one.ids for one in searches])
        lengths = np.repeat([one.start + one.count for one in searches], beams).astype(np.int32)
        logits, state = step(ids, lengths, parents, state)
        logits = np.asarray(logits, np.float64).reshape(len(prompts), beams, -1)
        if np.isnan(logits).any():
            raise FloatingPointError(f"`step` gave NaN for texts of {lengths.tolist()} tokens")
        for one, rows in zip(searches, logits, strict=True):
            if not one.done:
                one.advance(rows, rules)
        if all(one.done for one in searches):
            break
        parents = np.concatenate([i * beams + one.parents for i, one in enumerate(searches)])
    return [one.best(rules) for one in searches]


def greedy(
    logits_fn: Callable[..., Any],
    prompts: Sequence[Sequence[int]],
    cache: Callable[[int, int], Cache],
    stop: int,
    new_tokens: int = 32,
) -> list[list[int]]:
    """The most likely token after each prompt, and so on until `stop`, which is left out."""
    step, options = cached(logits_fn, cache), {"beams": 1, "stop": (stop,), "penalty": 0.0}
    found = search(step, prompts, new_tokens=new_tokens, **options)
    return [[token for token in texts[0].ids if token != stop] for texts in found]


class _Rules(NamedTuple):
    new_tokens: int
    stop: frozenset[int]
    penalty: float
    no_repeat: int
    prompt_counts: bool


class _Search:
    """The search after one prompt: unfinished texts and the best finished ones."""

    def __init__(self, prompt: Sequence[int], beams: int, length: int) -> None:
        self.start, self.count, self.beams, self.done = len(prompt), 0, beams, False
        self.ids = np.zeros((beams, length), np.int32)
        self.ids[:, : self.start] = prompt
        self.parents = np.arange(beams)  # which of the texts before each is a continuation of
        self.totals = np.full(beams, -np.inf)  # the sums of log probabilities
        self.totals[0] = 0.0  # all beams are the same prompt
        self.finished: list[Text] = []

    def advance(self, logits: np.ndarray, rules: _Rules) -> None:
        """Appends a token to every text and keeps the best."""
        scores = self.totals[:, None] + log_softmax(logits)
        for beam in range(self.beams):
            first = 0 if rules.prompt_counts else self.start
            scores[beam, repeats(self.ids[beam, first : self._end], rules.no_repeat)] = -np.inf
        ids, totals = self.ids.copy(), np.full(self.beams, -np.inf)
        self.parents, kept = np.arange(self.beams), 0
        for rank, (beam, token) in enumerate(_best(scores, self.beams * (1 + len(rules.stop)))):
            if token in rules.stop:
                if rank < self.beams:
                    self._finish((*self._text(beam), token), scores[beam, token], rules)
            elif kept < self.beams:
                ids[kept], self.parents[kept] = self.ids[beam], beam
                ids[kept, self._end] = token
                totals[kept] = scores[beam, token]
                kept += 1
        self.ids, self.totals, self.count = ids, totals, self.count + 1
        self.done = self._bound(rules) <= self._worst()

    def best(self, rules: _Rules) -> list[Text]:
        """The finished texts, and those that have no room left."""
        if self.count == rules.new_tokens:
            for beam in np.flatnonzero(self.totals > -np.inf):
                self._finish(self._text(beam), self.totals[beam], rules)
        return self.finished

    @property
    def _end(self) -> int:
        return self.start + self.count

    def _text(self, beam: int) -> tuple[int, ...]:
        return tuple(self.ids[beam, self.start : self._end].tolist())

    def _finish(self, ids: tuple[int, ...], total: float, rules: _Rules) -> None:
        texts = [*self.finished, Text(ids, float(total) / len(ids) ** rules.penalty)]
        self.finished = sorted(texts, key=lambda text: -text.score)[: self.beams]

    def _worst(self) -> float:
        return self.finished[-1].score if len(self.finished) == self.beams else -np.inf

    def _bound(self, rules: _Rules) -> float:
        """The best score that an unfinished text can get: at once or at the end, without loss."""
        length = rules.new_tokens if rules.penalty > 0 else self.count + 1
        return self.totals.max() / length**rules.penalty


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """The log probabilities along the last axis."""
    shifted = logits - logits.max(-1, keepdims=True)
    return shifted - np.log(np.exp(shifted).sum(-1, keepdims=True))


def repeats(ids: np.ndarray, size: int) -> list[int]:
    """The tokens that would complete a sequence of `size` tokens which is already in `ids`.

    Example:
        >>> repeats(np.array([5, 6, 7, 5, 6]), 3)
        [7]
    """
    if not 0 < size <= len(ids):
        return []
    windows = np.lib.stride_tricks.sliding_window_view(ids, size)
    return windows[(windows[:, :-1] == ids[len(ids) - size + 1 :]).all(1), -1].tolist()


def _best(scores: np.ndarray, number: int) -> list[tuple[int, int]]:
    """The beams and tokens of the highest finite scores, best first."""
    flat = scores.ravel()
    number = min(number, flat.size)
    top = np.argpartition(-flat, number - 1)[:number]
    top = top[np.argsort(-flat[top], kind="stable")]
    return [divmod(int(i), scores.shape[1]) for i in top if flat[i] > -np.inf]
