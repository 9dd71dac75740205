"""Tasks as a model sees them: rows to learn from, a loss, scores on the official splits.

    problem = problems.classification(folder, "mnli", tokenizer, recipe, pad=1)  # of GLUE
    problem = texts.generation(folder, "e2e", tokenizer, recipe)                 # see `texts.py`

    problem.batches(seed)      # of all epochs
    problem.loss(logits, batch)
    problem.dev(model)         # after each epoch; of the first score more is better
    problem.test(model)        # of the best epoch

Here a `model` is a `jax.tree_util.Partial` of inputs to logits, with its weights in it.
"""

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import grain
import jax
import jax.numpy as jnp
import numpy as np
from tokenizers import Tokenizer

from . import batches, encoding, glue, metrics, table
from .batches import Batch

Model = Callable[..., jax.Array]
EVALUATED = 32  # rows in a batch
SHORTEST = 32  # sequences are padded to this length, to twice it, …


class Result(NamedTuple):
    """Scores by name, and the texts that were generated for them."""

    scores: dict[str, float]
    texts: tuple[str, ...] = ()


class Problem(NamedTuple):
    """What a model is to learn, and how it is scored.

    Attributes:
        examples: rows to learn from.
        outputs: of the model's head; 0 keeps a language model's own.
        inputs: the entries of a batch that the model takes.
        batches: those of all epochs, from a seed.
        loss: of logits and a batch, a scalar.
        dev: the scores after an epoch; of the first more is better.
        test: what the best epoch's model is scored on besides.
    """

    examples: int
    outputs: int
    inputs: tuple[str, ...]
    batches: Callable[[int], "grain.MapDataset[Batch]"]
    loss: Callable[[jax.Array, Mapping[str, jax.Array]], jax.Array]
    dev: Callable[[Model], dict[str, float]]
    test: Callable[[Model], Result] = lambda model: Result({})


def lengths(most: int) -> tuple[int, ...]:
    """The lengths that sequences are padded to.

    Example:
        >>> lengths(100)
        (32, 64, 100)
    """
    doubled = (SHORTEST << i for i in range(most.bit_length()))
    return (*(n for n in doubled if n < most), most)


def cross_entropy(logits: jax.Array, labels: jax.Array, smoothing: float = 0.0) -> jax.Array:
    """That of logits (..., V) to labels (...), where all V classes share the part `smoothing`."""
    log_p = jax.nn.log_softmax(logits.astype(jnp.float32))
    right = jnp.take_along_axis(log_p, labels[..., None], -1)[..., 0]
    return -(1 - smoothing) * right - smoothing * log_p.mean(-1)


@jax.jit
def run(model: Model, *inputs: jax.Array) -> jax.Array:
    """The logits, by a program that is compiled once for all weights."""
    return model(*inputs)


def shuffled(
    rows: Sequence[encoding.Row], recipe: table.Recipe, shape: Mapping[str, Any], seed: int
) -> "grain.MapDataset[Batch]":
    """The batches of all epochs."""
    return batches.batches(rows, recipe.batch, seed=seed, epochs=recipe.epochs, **shape)


# ---- classes and scores -------------------------------------------------------------------------


def classification(
    folder: str | Path,
    task: str,
    tokenizer: Tokenizer,
    recipe: table.Recipe,
    pad: int = 0,
    types: bool = False,
    *,
    limit: int | None = None,
) -> Problem:
    """A task of GLUE for an encoder with a head; STS-B is regression to the score.

    Args:
        folder: of the data.
        task: a key of `glue.TASKS`.
        tokenizer: of the model.
        recipe: the settings.
        pad: the token that fills up.
        types: whether the model tells the two texts by token types.
        limit: the most examples of a split.

    Raises:
        FileNotFoundError: as in `glue.read`.
        FormatError: as in `glue.read`.
        ValueError: as in `glue.read`.
    """
    spec, shape = glue.TASKS[task], {"lengths": lengths(recipe.length), "pads": {"ids": pad}}
    inputs = ("ids", "mask", "types") if types else ("ids", "mask")

    def rows(split: str) -> list[encoding.Row]:
        texts, labels = zip(*glue.read(folder, task, split)[:limit], strict=True)
        return encoding.classification(texts, labels, tokenizer, recipe.length)

    train, held_out = rows("train"), {split: rows(split) for split in spec.dev}
    labels = {split: np.array([row["label"] for row in held_out[split]]) for split in spec.dev}
    data = {split: batches.batches(held_out[split], EVALUATED, **shape) for split in spec.dev}

    def loss(logits: jax.Array, batch: Mapping[str, jax.Array]) -> jax.Array:
        if spec.classes:
            each = cross_entropy(logits, batch["label"], recipe.label_smoothing)
        else:
            each = jnp.square(logits[:, 0].astype(jnp.float32) - batch["label"])
        return jnp.average(each, weights=batch["weight"])

    def dev(model: Model) -> dict[str, float]:
        found = {}
        for split in spec.dev:
            logits = _logits(model, data[split], inputs)  # (n, classes)
            found[split] = logits.argmax(-1) if spec.classes else logits[:, 0]
        scores = metrics.glue(task, *(np.concatenate([*x.values()]) for x in (found, labels)))
        for split in spec.dev if len(spec.dev) > 1 else ():
            for name, score in metrics.glue(task, found[split], labels[split]).items():
                scores[f"{name}_{split.removeprefix('dev_')}"] = score
        return scores

    return Problem(
        examples=len(train),
        outputs=len(spec.classes) or 1,
        inputs=inputs,
        batches=functools.partial(shuffled, train, recipe, shape),
        loss=loss,
        dev=dev,
    )


def _logits(model: Model, data: Sequence[Batch], inputs: Sequence[str]) -> np.ndarray:
    """Those of all rows but the ones that fill up."""
    found = []
    for i in range(len(data)):
        batch = data[i]
        logits = np.asarray(run(model, *(batch[name] for name in inputs)), np.float32)
        found.append(logits[batch["weight"] > 0])
    return np.concatenate(found)
