"""Tasks of texts: E2E, WebNLG and DART.

    problem = texts.generation(folder, "e2e", tokenizer, recipe)

A causal model learns prompt, end of text, answer, end of text, of which the answer counts; it
writes by beam search until the end of the text or an empty line.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from models import beam
from models.cache import Cache
from progress import progress
from tokenizers import Tokenizer

from . import batches, encoding, metrics, nlg, table
from .problems import EVALUATED, Model, Problem, Result, cross_entropy, lengths, shuffled

DECODED = 8  # prompts that are searched together
END, BREAK = "<|endoftext|>", "ĊĊ"  # GPT-2's tokens 50256 and 628, two line feeds


def generation(
    folder: str | Path,
    task: str,
    tokenizer: Tokenizer,
    recipe: table.Recipe,
    *,
    limit: int | None = None,
    cache: Callable[[int, int], Cache] | None = None,
) -> Problem:
    """A task of texts for a causal model with GPT-2's tokens.

    After each epoch counts the likelihood of the dev set's answers; the best epoch's model writes
    texts by beam search.

    Args:
        folder: of the data.
        task: a key of `nlg.READERS`.
        tokenizer: of the model.
        recipe: the settings.
        limit: the most prompts of a split.
        cache: the model's `config.cache`; None writes texts without.

    Raises:
        FileNotFoundError: a file is missing; the message says what to put where.
        FormatError: a file is not as it should be.
        ValueError: an answer is longer than `recipe.length`, or the tokenizer is not GPT-2's.
    """
    decoding, tokenizer = table.DECODING[task], encoding.plain(tokenizer)
    end = tokenizer.token_to_id(END)
    if end is None:
        raise ValueError(f"the tokenizer has no token {END}: expected that of a GPT-2 or GPT-3")
    stop = [end] if (token := tokenizer.token_to_id(BREAK)) is None else [end, token]
    room = recipe.length - decoding.new_tokens
    if room < 1:
        raise ValueError(
            f"`length`: expected more than {decoding.new_tokens}, for as many new tokens, got "
            f"{recipe.length}"
        )

    def rows(examples: Sequence[nlg.Example]) -> list[encoding.Row]:
        pairs = [(prompt, f" {text}") for prompt, text in nlg.pairs(examples)]
        return encoding.generation(pairs, tokenizer, recipe.length, end, end)

    read = {split: nlg.read(folder, task, split)[:limit] for split in nlg.SPLITS}
    train, given, shape = rows(read["train"]), read["test"], {"lengths": lengths(recipe.length)}
    data = batches.batches(rows(read["dev"]), EVALUATED, **shape)

    def loss(logits: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
        each = cross_entropy(logits[:, :-1], batch["ids"][:, 1:], recipe.label_smoothing)
        return jnp.average(each, weights=batch["counts"][:, 1:] * batch["weight"][:, None])

    def dev(model: Model) -> dict[str, float]:
        found = np.zeros(2)
        for i in range(len(data)):
            found += _likelihood(model, data[i])
        return {"log_likelihood": float(found[0] / found[1])}  # of a token

    def test(model: Model) -> Result:
        prompts = tokenizer.encode_batch([t.prompt for t in given], add_special_tokens=False)
        ids = [[*prompt.ids, end][-room:] for prompt in prompts]
        step = beam.cached(model, cache) if cache else beam.uncached(model)
        texts = _written(step, ids, stop, decoding, tokenizer)
        return Result(score(task, texts, given, read["train"]), tuple(texts))

    return Problem(
        examples=len(train),
        outputs=0,
        inputs=("ids",),
        batches=functools.partial(shuffled, train, recipe, shape),
        loss=loss,
        dev=dev,
        test=test,
    )


@jax.jit
def _likelihood(model: Model, batch: Mapping[str, jax.Array]) -> jax.Array:
    """The sum of the answers' log probabilities, and the number of their tokens."""
    each = -cross_entropy(model(batch["ids"])[:, :-1], batch["ids"][:, 1:])
    counts = batch["counts"][:, 1:] * batch["weight"][:, None]
    return jnp.stack([(each * counts).sum(), counts.sum()])


def _written(
    step: beam.Step,
    prompts: Sequence[Sequence[int]],
    stop: Sequence[int],
    decoding: table.Decoding,
    tokenizer: Tokenizer,
) -> list[str]:
    """The best text after each prompt."""
    options = {
        "beams": decoding.beams,
        "new_tokens": decoding.new_tokens,
        "stop": stop,
        "penalty": decoding.length_penalty,
        "no_repeat": decoding.no_repeat,
        "prompt_counts": False,
        "length": max(map(len, prompts)) + decoding.new_tokens,
    }
    texts = []
    for i in progress(range(0, len(prompts), DECODED), desc="beam search"):
        for found in beam.search(step, prompts[i : i + DECODED], **options):
            ids = [token for token in found[0].ids if token not in stop] if found else []
            texts.append(tokenizer.decode(ids).strip())
    return texts


def score(
    task: str, texts: Sequence[str], given: Sequence[nlg.Example], train: Sequence[nlg.Example]
) -> dict[str, float]:
    """The official scores of texts for the examples `given`.

    Of WebNLG also BLEU for the categories of the training set, and for the others.
    """
    scores = metrics.generation(texts, [g.references for g in given])
    known = {t.category for t in train}
    for name, is_seen in (("seen", True), ("unseen", False)) if task == "webnlg" else ():
        chosen = [i for i, g in enumerate(given) if (g.category in known) == is_seen]
        if chosen:
            references = [given[i].references for i in chosen]
            bleu = metrics.bleu([texts[i] for i in chosen], references, lowercase=True)
            scores[f"bleu_lower_{name}"] = bleu
    return scores
