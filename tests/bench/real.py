"""The floor's ratios on the models, weights and batches of two examples, and on a Llama."""

import functools
from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import data
import flax.linen as nn
import jax
import jax.numpy as jnp
import optax
import quickstart
from conversations import DEFINITIONS, Rows, answer_nll, lay, read
from models import llama, smollm2

from . import floor, report, steps


def run(quick: bool) -> None:
    """A row for each model, choice of sites and rank; quick: MiniLM on few sentences."""
    works = [minilm(sentences=4)]
    if not quick:
        works = [minilm(sentences=32), definitions(pairs=8), *map(grouped, floor.MODES)]
    ranks, rounds = ((8,), 2) if quick else ((8, 64), 9)
    rows = [row for work in works for row in measure(work, ranks, rounds)]
    report.table("real: ratios to the frozen step", rows)
    full = {row["model"]: row["FLOPs"] for row in rows if row["trained"] == "full"}
    for row in rows:
        assert row["trained"] == "full" or row["FLOPs"] < full[row["model"]], row


class Work(NamedTuple):
    """What an example trains.

    Attributes:
        name: of the model, with the sizes of the batch.
        apply: the model.
        params: its weights.
        batch: of the training data.
        loss: of the model's apply function, parameters and a batch.
        inputs: the arguments of the model in a batch.
    """

    name: str
    apply: Callable[..., jax.Array]
    params: Any
    batch: Any
    loss: steps.Loss
    inputs: Callable[[Any], tuple[Any, ...]]


def minilm(sentences: int) -> Work:
    """The quickstart's: sentiment of movie reviews."""
    bert, variables, tokenizer = quickstart.load()
    snippets, _ = data.movie_snippets(quickstart.MARGIN)
    batch = quickstart.encode(tokenizer, snippets[:sentences])

    def loss(apply: Callable[..., jax.Array], params: Any, batch: quickstart.Batch) -> jax.Array:
        logits = apply(params, batch.ids, batch.mask)
        return optax.softmax_cross_entropy_with_integer_labels(logits, batch.labels).mean()

    # Without the tensors that the model does not compute with; no product may be zero.
    head = jax.tree.map(lambda x: x + 0.01, variables["params"]["classifier"])
    params = {"params": {**variables["params"], "classifier": head}}
    name = f"MiniLM, {sentences} × {batch.ids.shape[1]} tokens"
    return Work(name, bert.apply, params, batch, loss, lambda batch: (batch.ids, batch.mask))


def definitions(pairs: int) -> Work:
    """The example's of the language model: definitions of words."""
    config, variables, tokenizer = smollm2.load(data.smollm2())
    rows = lay([[text] for text in read([DEFINITIONS], tokenizer, length=64)])
    batch = quickstart.take(rows, slice(pairs))

    def loss(apply: Callable[..., jax.Array], params: Any, rows: Rows) -> jax.Array:
        total, count = answer_nll(functools.partial(apply, params), rows)
        return total / count

    name = f"SmolLM2, {pairs} × {batch.ids.shape[1] - 1} tokens"

    def inputs(rows: Rows) -> tuple[Any, ...]:
        return tuple(x[:, :-1] for x in (rows.ids, rows.segments, rows.positions))

    return Work(name, llama.Llama(config).apply, variables, batch, loss, inputs)


def grouped(mode: str) -> Work:
    """A Llama whose heads of queries share keys and values, with random weights."""
    config = llama.Config(vocab=1024, layers=5, dim=640, hidden=1728, heads=10, kv_heads=2)
    lm = llama.Llama(config, **{"scan": False} | floor.MODES[mode])
    ids = jax.random.randint(jax.random.key(1), (4, 129), 0, config.vocab)
    variables = nn.unbox(jax.jit(lm.init)(jax.random.key(0), ids))
    name = f"Llama, 5 layers, d = 640, 4 × 128 tokens, {mode}"
    return Work(name, lm.apply, variables, ids, steps.next_token, lambda ids: (ids[:, :-1],))


def measure(work: Work, ranks: Sequence[int], rounds: int) -> list[dict]:
    """The rows of one model."""
    params, batch = jax.tree.map(jnp.asarray, (work.params, work.batch))
    tasks = floor.choices(work.apply, params, batch, work.loss, work.inputs, ranks=ranks)
    return floor.compare(tasks, batch, rounds, {"model": work.name})
